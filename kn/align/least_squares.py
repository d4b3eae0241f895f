"""Least squares and low-rank products under the second moments of real activations (MATH.md §5): what the aligned starts share.

Row vectors: a sample is a row x (…, n). Samples come from streams (sequences, length, d) a few sequences at a time, so that
no more than TOKENS samples stand in memory; sums over all of them, and what is solved from them, are float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

RIDGE = 1e-3  # added to a Gram matrix's diagonal, relative to its mean
TOKENS = 4096  # at a time
STEPS = 32  # of an elimination


def parts(*streams: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The streams (sequences, length, …) a few sequences at a time."""
    return zip(*(stream.split(max(1, TOKENS // stream.shape[1])) for stream in streams), strict=True)


def zero(beside: Tensor) -> Tensor:
    """A float64 0 on the device of a tensor, for sums of any shape to start from."""
    return torch.zeros((), dtype=torch.float64, device=beside.device)


@torch.no_grad()
def in_parts(function: Callable[..., Tensor], *streams: Tensor) -> Tensor:
    """function over the streams, a few sequences at a time."""
    return torch.cat([function(*part) for part in parts(*streams)])


@torch.no_grad()
def moments(samples: Callable[..., tuple[Tensor, Tensor]], *streams: Tensor) -> Tensor:
    """Σ xᵀ y (n, m) over all samples (x, y) that `samples` makes of the streams, float64."""
    return sum((_product(*samples(*part)) for part in parts(*streams)), start=zero(streams[0]))


def _product(x: Tensor, y: Tensor) -> Tensor:
    x, y = x.flatten(0, -2), y.flatten(0, -2)
    wide = torch.promote_types(x.dtype, torch.float32)  # a product rounded to half precision may not be positive definite any more
    return sum((a.to(wide).T @ b.to(wide)).double() for a, b in zip(x.split(1024), y.split(1024), strict=True))  # few enough rows that float32 rounds far below the ridge


def one(x: Tensor) -> Tensor:
    """x (…, n) with a column of ones after it, for a bias."""
    return torch.cat([x, torch.ones_like(x[..., :1])], -1)


def ridged(gram: Tensor) -> Tensor:
    """gram + ridge."""
    return gram + RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)


def least_squares(samples: Callable[..., tuple[Tensor, Tensor]], *streams: Tensor) -> Tensor:
    """The (n, m) map from x to y over all samples (x, y): (Σ xᵀ x + ridge)⁻¹ Σ xᵀ y, float64."""

    def beside(*part: Tensor) -> tuple[Tensor, Tensor]:
        x, y = samples(*part)
        return x, torch.cat([x, y], -1)

    both = moments(beside, *streams)
    n = len(both)
    return torch.linalg.solve(ridged(both[:, :n]), both[:, n:])


def root(gram: Tensor) -> Tensor:
    """R with Rᵀ R = gram + ridge."""
    return torch.linalg.cholesky(ridged(gram)).T


def low_rank(left: Tensor, right: Tensor, r: int, gram_left: Tensor, gram_right: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The best (n, r), (r, m) for left @ right (n, e)(e, m), errors measured by the Gram matrices of what multiplies each side."""
    R, S = root(gram_left), None if gram_right is None else root(gram_right)
    U, s, Vh = torch.linalg.svd(R @ left @ (right if S is None else right @ S.T), full_matrices=False)
    scale = s[:r].sqrt()
    new_right = scale[:, None] * Vh[:r]
    return torch.linalg.solve_triangular(R, U[:, :r] * scale, upper=True), new_right if S is None else torch.linalg.solve_triangular(S, new_right.T, upper=True).T


def subset(gram: Tensor, weight: Tensor, keep: int) -> Tensor:
    """Indices (keep) of the inputs on which a least-squares map does best for the outputs input @ weight (n, m); gram (n + 1, n + 1), ones last.

    Backward elimination: dropping input j and refitting the others costs |w_j|² / (C⁻¹)_jj, C the inputs' covariance; a STEPS-th of what must go at a time.
    """
    mean = gram[:-1, -1] / gram[-1, -1]
    inverse, weight = torch.linalg.inv(ridged(gram[:-1, :-1] / gram[-1, -1] - torch.outer(mean, mean))), weight.double().clone()
    left = torch.arange(len(weight), device=weight.device)
    for wanted in torch.linspace(len(weight), keep, STEPS + 1).round().int().tolist()[1:]:
        order = (weight.square().sum(1) / inverse.diagonal()).argsort()
        drop, stay = order[: len(left) - wanted], order[len(left) - wanted :].sort().values
        step = torch.linalg.solve(inverse[drop][:, drop], torch.cat([inverse[drop][:, stay], weight[drop]], 1))
        weight = weight[stay] - inverse[stay][:, drop] @ step[:, wanted:]
        inverse, left = inverse[stay][:, stay] - inverse[stay][:, drop] @ step[:, :wanted], left[stay]
    return left


def spread(weight: Tensor, factor: int, dim: int) -> Tensor:
    """Every column (dim 1) or row (dim 0) followed by factor − 1 of zeros: the Kronecker product with (1, 0, …)."""
    return torch.stack([weight, *[torch.zeros_like(weight)] * (factor - 1)], dim + 1).flatten(dim, dim + 1)
