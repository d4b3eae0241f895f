"""KnGPT2: GPT-2 whose embedding and chosen layers are Kronecker products (§3.2 of the paper).

`compress(teacher, spec)` builds it from a GPT-2; `from_pretrained` loads it without one. GPT-2's module tree is kept.
"""

from __future__ import annotations

from dataclasses import asdict

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from .config import KnGPT2Config, KroneckerSpec
from .fold import fold, install_narrow
from .kronecker import KroneckerEmbedding, KroneckerLinear


def factor_shapes(spec: KroneckerSpec) -> dict[str, tuple[tuple[int, int], int]]:
    """B's shape and the number of stacked parts for each compressed matrix of a layer, by module path."""
    outputs, inputs = (spec.factor, 1), (1, spec.factor)
    shapes = {"attn.c_attn": (outputs, 3), "mlp.c_fc": (outputs, 1), "mlp.c_proj": (inputs, 1)}
    return {**shapes, "attn.c_proj": (inputs, 1)} if spec.out_proj else shapes


def install_factors(transformer: nn.Module, spec: KroneckerSpec, folded: bool = False) -> None:
    """Replace the chosen Conv1D layers and the token embedding of a GPT2Model by empty Kronecker (or narrow) layers, in place."""
    if folded:
        install_narrow(transformer, spec)
    for index in () if folded else spec.indices(len(transformer.h)):
        block = transformer.h[index]
        for path, (b_shape, parts) in factor_shapes(spec).items():
            dense: Conv1D = block.get_submodule(path)  # weight (in, out)
            n, m = dense.weight.shape
            block.set_submodule(path, KroneckerLinear(n, m, b_shape, spec.rank, True, parts).to(dense.weight.dtype))
    if spec.embedding:
        table = transformer.wte
        transformer.wte = KroneckerEmbedding(table.num_embeddings, table.embedding_dim, spec.factor).to(table.weight.dtype)


class _KnGPT2Mixin:
    """What the two KnGPT2 models share: build the factors from the configuration, initialise them, go back to dense."""

    config_class = KnGPT2Config
    _tied_weights_keys = {}  # the head is dense and untied: it is not compressed (Table 3's footnote)

    def __init__(self, config: KnGPT2Config):
        super().__init__(config)
        install_factors(self.transformer, config.spec, config.folded)
        self.post_init()

    def _init_weights(self, module):
        if isinstance(module, (KroneckerLinear, KroneckerEmbedding)):
            module.reset_parameters(self.config.initializer_range)
        elif not isinstance(getattr(module, "c_proj", None), KroneckerLinear):
            super()._init_weights(module)

    def fold(self):
        """The same function for inference, exactly narrower in its compressed layers: see fold.py."""
        return fold(self)

    def to_dense(self):
        """A stock GPT-2 (float rounding aside) with equal logits, embedding and head untied; ValueError for a folded model."""
        if self.config.folded:
            raise ValueError("to_dense needs the model before fold(): narrow layers cannot be widened again")
        fields = {k: v for k, v in self.config.to_dict().items() if k not in ("kronecker", "folded", "model_type", "architectures")}
        dense = self.dense_class(GPT2Config(**{**fields, "tie_word_embeddings": False})).to(self.dtype)
        dense.load_state_dict(dense_state(self))
        return dense.to(self.device).train(self.training)


class KnGPT2LMHeadModel(_KnGPT2Mixin, GPT2LMHeadModel):
    """Language model; logits (batch, length, vocabulary)."""

    dense_class = GPT2LMHeadModel


class KnGPT2ForSequenceClassification(_KnGPT2Mixin, GPT2ForSequenceClassification):
    """Sequence classifier on the last token that is not padding; logits (batch, labels)."""

    dense_class = GPT2ForSequenceClassification


def dense_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """State dictionary with every Kronecker layer multiplied out to the dense layout of GPT-2 (Conv1D is in×out)."""
    state = {k: v for k, v in model.state_dict().items()}
    for name, module in model.named_modules():
        if isinstance(module, (KroneckerLinear, KroneckerEmbedding)):
            del state[f"{name}.A"], state[f"{name}.B"]
            weight = module.weight.detach()
            state[f"{name}.weight"] = (weight.T if isinstance(module, KroneckerLinear) else weight).contiguous()
    return state


def compress(model: nn.Module, spec: KroneckerSpec = KroneckerSpec(), calibration=None):
    """KnGPT2 from a GPT-2 language model or sequence classifier, started from the nearest Kronecker products.

    The output head stays dense: a clone of the teacher's, no longer tied to the embedding. `calibration` is for
    init="aligned". Raises TypeError for other model classes and ValueError for specs the model cannot take.
    """
    classes = {GPT2LMHeadModel: KnGPT2LMHeadModel, GPT2ForSequenceClassification: KnGPT2ForSequenceClassification}
    if type(model) not in classes:
        raise TypeError(f"compress takes GPT2LMHeadModel or GPT2ForSequenceClassification, got {type(model).__name__}")
    if spec.init != "svd":
        raise ValueError(f"init {spec.init!r} is unknown: allowed is 'svd'")
    if not spec.indices(model.config.n_layer) and not spec.embedding:
        raise ValueError(f"layers {spec.layers!r} and embedding=False leave nothing to compress in a model of {model.config.n_layer} layers")
    fields = {k: v for k, v in model.config.to_dict().items() if k not in ("model_type", "architectures", "tie_word_embeddings")}
    config = KnGPT2Config(**fields, tie_word_embeddings=False, kronecker=asdict(spec))
    config._attn_implementation = model.config._attn_implementation
    with torch.device(model.device):
        student = classes[type(model)](config).to(model.dtype)
    teacher_state = {k: v.clone() for k, v in model.state_dict().items()}  # a tied head appears here under its own name
    compressed = {n: m for n, m in student.named_modules() if isinstance(m, (KroneckerLinear, KroneckerEmbedding))}
    for name, module in compressed.items():
        weight = teacher_state.pop(f"{name}.weight")
        module.approximate(weight.T if isinstance(module, KroneckerLinear) else weight, spec.scale)
    missing, unexpected = student.load_state_dict(teacher_state, strict=False)
    left = [k for k in missing if k.rpartition(".")[0] not in compressed]
    if left or unexpected:
        raise ValueError(f"the teacher's weights do not fit: missing {left[:3]}, unexpected {unexpected[:3]}")
    return student.train(model.training)


def count_parameters(model: nn.Module) -> dict[str, int]:
    """{"total", "without_head"}: a tied head counts once; `without_head` leaves out an untied output head (Table 3)."""
    total = sum(p.numel() for p in model.parameters())
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else getattr(model, "score", None)
    table = model.get_input_embeddings()
    tied = head is None or (hasattr(table, "A") is False and head.weight is table.weight)
    return {"total": total, "without_head": total if tied else total - head.weight.numel()}


AutoModelForCausalLM.register(KnGPT2Config, KnGPT2LMHeadModel, exist_ok=True)
AutoModelForSequenceClassification.register(KnGPT2Config, KnGPT2ForSequenceClassification, exist_ok=True)
