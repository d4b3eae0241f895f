"""Exact symmetries, common to GPT-2 and Llama (MATH.md §4): untied copies and the checks before a change."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

TOLERANCE = 1e-8  # of orthogonality


def untied_copy(model: nn.Module, classes: tuple[type, ...]) -> Any:
    """A copy whose head is no longer the embedding; TypeError for other classes."""
    if type(model) not in classes:
        names = " and ".join(cls.__name__ for cls in classes)
        raise TypeError(f"the symmetries are for {names}, got {type(model).__name__}")
    config = copy.deepcopy(model.config)
    config.tie_word_embeddings = False
    with torch.device(model.device):
        untied = type(model)(config).to(model.dtype)
    untied.load_state_dict({name: value.clone() for name, value in model.state_dict().items()})
    return untied.train(model.training)


def require_untied(model: nn.Module, reason: str) -> None:
    """Raises ValueError if the head is the embedding, with the reason why it must not be."""
    head = model.get_output_embeddings()
    if head is not None and head.weight is model.get_input_embeddings().weight:
        raise ValueError(f"the head is tied to the embedding, {reason}: take untied(model)")


def require_permutation(order: Tensor, count: int) -> None:
    """Raises ValueError if order is not a permutation of 0 to count − 1."""
    if sorted(order.tolist()) != list(range(count)):
        raise ValueError(f"order must be a permutation of 0 to {count - 1}")


def is_orthogonal(Q: Tensor, width: int) -> bool:
    """Whether Q is (width, width), its rows orthonormal up to TOLERANCE."""
    eye = torch.eye(width, dtype=Q.dtype, device=Q.device)
    return Q.shape == eye.shape and bool((Q @ Q.T - eye).abs().max() <= TOLERANCE)
