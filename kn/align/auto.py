"""The aligned start of either family, chosen by model_type."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor, nn

from kn.align import gpt2, llama
from kn.models.config import KroneckerSpec


def _family(model: nn.Module) -> ModuleType:
    """The module of the model's family; ValueError for others."""
    families, model_type = {"gpt2": gpt2, "llama": llama}, model.config.model_type
    if model_type not in families:
        raise ValueError(f"init 'aligned' is for GPT-2 and Llama, not yet for {model_type}: take init='svd'")
    return families[model_type]


def equivalent_teacher(model: nn.Module, spec: KroneckerSpec, ids: Tensor) -> nn.Module:
    """An untied model with the same logits in the student's basis, for ILKD; ids (sequences, length)."""
    return _family(model).equivalent_teacher(model, spec, ids)


def prepare(model: nn.Module, spec: KroneckerSpec, ids: Tensor) -> nn.Module:
    """A dense model near that teacher whose compressed matrices are exact Kronecker products."""
    return _family(model).prepare(model, spec, ids)
