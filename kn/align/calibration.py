"""Calibration text of the aligned start: checks, token frequencies, gradients by the embedding."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from kn.align.least_squares import cross_moment
from kn.models.config import KroneckerSpec


def check_calibration(model: nn.Module, spec: KroneckerSpec, ids: Tensor, tokens: str) -> None:
    """Raises ValueError for a device, spec or calibration ids (sequences, length) that cannot be aligned."""
    device, config = model.device, model.config
    if device.type in ("mps", "meta"):
        raise ValueError(f"init 'aligned' needs float64, which {device} lacks: move it with .to('cpu')")
    is_ids = isinstance(ids, Tensor) and ids.ndim == 2 and not ids.is_floating_point()
    if not is_ids or not len(ids) or ids.shape[1] < 2:
        expected = f"an integer tensor (sequences, length) of some {tokens} tokens of text"
        raise ValueError(f"init 'aligned' needs calibration=token ids, {expected}")
    longest, vocabulary = config.max_position_embeddings, config.vocab_size
    if ids.shape[1] > longest or ids.min() < 0 or ids.max() >= vocabulary:
        allowed = f"below {vocabulary} in sequences of at most {longest}"
        raise ValueError(f"calibration ids must be {allowed}, got up to {int(ids.max())} and {ids.shape[1]}")
    if spec.rank != 1 or spec.ranks or not spec.out_proj or spec.factor < 2:
        raise ValueError("init 'aligned' needs rank 1 everywhere, out_proj=True and a factor of at least 2")
    factor, width = spec.embedding_factor or spec.factor, config.hidden_size
    if spec.embedding and (factor < 2 or width % factor):
        raise ValueError(f"init 'aligned' needs an embedding factor ≥ 2 that divides {width}, got {factor}")
    if spec.head == "tied":
        raise ValueError("init 'aligned' gives the head the last norm's gain, so it is untied: take 'dense'")


def token_frequencies(ids: Tensor, vocabulary: int, smoothing: float) -> Tensor:
    """Share (vocabulary,) of each token in ids, float64, `smoothing` added to every count."""
    count = torch.bincount(ids.flatten(), minlength=vocabulary).double() + smoothing
    return count / count.sum()


def gradient_covariance(
    embedding: nn.Module, losses: Callable[[Tensor, Tensor], list[Tensor]], batches: Iterable[Tensor]
) -> Tensor:
    """E[g gᵀ] (d, d), float64, of mean diagonal 1: how much each direction of the token embedding matters.
    g is the gradient of each of losses(embeddings (sequences, length, d), ids) by the embeddings."""
    total = embedding.weight.new_zeros(())
    for ids in batches:
        x = embedding(ids).detach().requires_grad_()
        with torch.enable_grad():
            values = losses(x, ids)
        for loss in values:
            (g,) = torch.autograd.grad(loss, x, retain_graph=loss is not values[-1])
            total = total + cross_moment(g, g)
    return total / total.diagonal().mean()


def evenly_spaced(ids: Tensor, tokens: int) -> Tensor:
    """Sequences spread over a text (sequences, length, …), with that number of tokens; at least one."""
    count = max(1, min(len(ids), tokens // ids.shape[1]))
    return ids[torch.arange(count, device=ids.device) * len(ids) // count]
