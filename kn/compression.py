"""compress(): a GPT-2 or Llama becomes a model of Kronecker products, by the chosen start."""

from __future__ import annotations

import copy
from dataclasses import asdict

import torch
from torch import nn

from kn.align.gpt2 import prepare
from kn.kronecker import checks
from kn.kronecker.layers import KroneckerEmbedding, KroneckerLinear
from kn.models import model_card
from kn.models.auto import COMPRESSED_CLASSES
from kn.models.base import FACTORED, KroneckerModel, is_conv1d
from kn.models.config import KroneckerSpec


def compress(model: nn.Module, spec: KroneckerSpec = KroneckerSpec(), calibration=None) -> KroneckerModel:
    """The compressed model of a GPT-2 or Llama (language model, sequence classifier or neither), started from the nearest Kronecker products (eq. 1, §3.2).

    The output head stays dense, a clone of the teacher's and no longer tied to the embedding, unless spec.head is "tied".
    `calibration`, token ids (sequences, length) of some text, is for init="aligned" (aligned.py). Raises TypeError for other model classes and ValueError for specs the model cannot take.
    """
    if type(model) not in COMPRESSED_CLASSES:
        raise TypeError(f"compress takes a GPT-2 or Llama model (GPT2LMHeadModel, GPT2ForSequenceClassification, LlamaForCausalLM, …), got {type(model).__name__}")
    if not isinstance(spec, KroneckerSpec):
        raise TypeError(f"spec is {checks.describe_value(spec)}: a KroneckerSpec wanted, such as kn.KroneckerSpec(factor=2)")
    head = model.get_output_embeddings()
    if spec.head == "tied" and head is not None and head.weight is not model.get_input_embeddings().weight:
        raise ValueError("head 'tied' needs a teacher whose head is its embedding: this one's is a matrix of its own, so take head='dense'")
    made = model_card.provenance(model)
    if spec.init == "aligned":
        model = prepare(model, spec, calibration)
    student = factorize(model, spec)
    student.config.provenance = made
    return student


def factorize(model: nn.Module, spec: KroneckerSpec) -> KroneckerModel:
    """The compressed model whose matrices are the Kronecker products nearest to this one's, whatever it was started from: what `compress` ends with. ValueError where its weights do not fit."""
    student_class = COMPRESSED_CLASSES[type(model)]
    fields = {k: v for k, v in model.config.to_dict().items() if k not in ("model_type", "architectures", "tie_word_embeddings")}
    config = student_class.config_class(**fields, kronecker=asdict(spec))
    config._attn_implementation = model.config._attn_implementation
    with torch.device(model.device):
        student = student_class(config).to(model.dtype)
    state = {k: v.clone() for k, v in model.state_dict().items()}  # a tied head appears here under its own name
    factored = {name: module for name, module in student.named_modules() if isinstance(module, FACTORED)}
    for name, module in factored.items():
        weight = state.pop(f"{name}.weight")
        try:
            if isinstance(module, KroneckerLinear):
                module.approximate(weight.T if is_conv1d(model.get_submodule(name)) else weight, spec.scale)
            elif isinstance(module, KroneckerEmbedding):
                module.approximate(weight, spec.scale)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    missing, unexpected = student.load_state_dict(state, strict=False)
    left = [k for k in missing if k.rpartition(".")[0] not in factored]
    if left or unexpected:
        raise ValueError(f"the teacher's weights do not fit: missing {left[:3]}, unexpected {unexpected[:3]}")
    if student.can_generate():
        student.generation_config = copy.deepcopy(model.generation_config)
    return student.train(model.training)
