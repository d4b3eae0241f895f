"""compress(): a GPT-2 or Llama becomes a model of Kronecker products, from the start that the spec names."""

from dataclasses import asdict

from torch import nn

from kn.align import prepare
from kn.kronecker import checks
from kn.kronecker.layers import KroneckerHead, KroneckerLayer, is_conv1d
from kn.models import model_card
from kn.models.auto import COMPRESSED_CLASSES
from kn.models.base import KroneckerModel, convert_config, model_like
from kn.models.config import KroneckerSpec


def compress(model: nn.Module, spec: KroneckerSpec = KroneckerSpec(), calibration=None) -> KroneckerModel:
    """Compress a GPT-2 or Llama by the nearest Kronecker products to its weight matrices (eq. 1, §3.2).

    Takes language models, sequence classifiers and models without a head. The output head stays dense, a
    clone of the teacher's that is not tied to the embedding, unless spec.head is "tied". `calibration`, token
    ids (sequences, length) of some text, is for init="aligned". Raises TypeError for other model classes or
    another spec, and ValueError for specs that do not fit the model."""
    if type(model) not in COMPRESSED_CLASSES:
        classes = "GPT2LMHeadModel, GPT2ForSequenceClassification, LlamaForCausalLM, …"
        raise TypeError(f"compress takes a GPT-2 or Llama model ({classes}), got {type(model).__name__}")
    if not isinstance(spec, KroneckerSpec):
        described = checks.describe_value(spec)
        raise TypeError(f"spec is {described}: expected a KroneckerSpec, such as kn.KroneckerSpec(factor=2)")
    head = model.get_output_embeddings()
    if spec.head == "tied" and head is not None and head.weight is not model.get_input_embeddings().weight:
        problem = "head 'tied' needs a teacher whose head is tied to its embedding, and this one's is not"
        raise ValueError(f"{problem}: take head='dense'")
    provenance = model_card.provenance(model)
    student = factorize(prepare(model, spec, calibration) if spec.init == "aligned" else model, spec)
    student.config.provenance = provenance
    return student


def factorize(model: nn.Module, spec: KroneckerSpec) -> KroneckerModel:
    """The model of the nearest Kronecker products, whatever spec.init is; ValueError for unfit weights."""
    student_class = COMPRESSED_CLASSES[type(model)]
    config = convert_config(model.config, student_class.config_class, kronecker=asdict(spec))
    student = model_like(model, student_class, config)
    state = {k: v.clone() for k, v in model.state_dict().items()}  # a tied head has its own name here
    factored = {name: m for name, m in student.named_modules() if isinstance(m, KroneckerLayer)}
    for name, module in factored.items():
        weight = state.pop(f"{name}.weight")
        if isinstance(module, KroneckerHead):  # shares the embedding's factors
            continue
        try:
            module.approximate(weight.T if is_conv1d(model.get_submodule(name)) else weight, spec.scale)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    missing, unexpected = student.load_state_dict(state, strict=False)
    missing = [key for key in missing if key.rpartition(".")[0] not in factored]
    if missing or unexpected:
        problem = f"missing {missing[:3]}, unexpected {unexpected[:3]}"
        raise ValueError(f"the teacher's weights do not fit: {problem}")
    return student
