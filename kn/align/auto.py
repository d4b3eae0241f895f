"""The aligned start of either family, chosen by model_type."""

from types import ModuleType

from torch import Tensor, nn

from kn.align import gpt2, llama
from kn.models.config import KroneckerSpec

FAMILIES = {"gpt2": gpt2, "llama": llama}


def _family(model: nn.Module) -> ModuleType:
    if (kind := model.config.model_type) not in FAMILIES:
        raise ValueError(f"init 'aligned' is for GPT-2 and Llama, not yet for {kind}: take init='svd'")
    return FAMILIES[kind]


def equivalent_teacher(model: nn.Module, spec: KroneckerSpec, ids: Tensor) -> nn.Module:
    """An untied model with the same logits in the student's basis, for ILKD; ids (sequences, length)."""
    family = _family(model)
    family.check(model, spec, ids)
    return family.rotated_teacher(model, spec, ids)[0].to(model.dtype).train(model.training)


def prepare(model: nn.Module, spec: KroneckerSpec, ids: Tensor) -> nn.Module:
    """A dense model near that teacher whose compressed matrices are exact Kronecker products."""
    return _family(model).build_aligned_pair(model, spec, ids)[1]
