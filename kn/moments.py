"""Least squares and low-rank products under the second moments of real activations (MATH.md §5): what the aligned starts share.

Row vectors: a sample is a row x (…, n); Gram matrices are (n, n) sums of xᵀ x in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

RIDGE = 1e-4  # added to a Gram matrix's diagonal, relative to its mean
ROWS = 32  # sequences at a time


def solve(gram: Tensor, right: Tensor) -> Tensor:
    """(gram + ridge)⁻¹ right."""
    ridge = RIDGE * gram.diagonal().mean()
    return torch.linalg.solve(gram + ridge * torch.eye(len(gram), dtype=gram.dtype), right)


def root(gram: Tensor) -> Tensor:
    """R with Rᵀ R = gram + ridge."""
    ridge = RIDGE * gram.diagonal().mean()
    return torch.linalg.cholesky(gram + ridge * torch.eye(len(gram), dtype=gram.dtype)).T


def low_rank(left: Tensor, right: Tensor, r: int, gram_left: Tensor, gram_right: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The best (n, r), (r, m) for left @ right (n, e)(e, m), errors measured by the Gram matrices of what multiplies each side."""
    R, S = root(gram_left), None if gram_right is None else root(gram_right)
    U, s, Vh = torch.linalg.svd(R @ left @ (right if S is None else right @ S.T), full_matrices=False)
    scale = s[:r].sqrt()
    new_right = scale[:, None] * Vh[:r]
    return torch.linalg.solve_triangular(R, U[:, :r] * scale, upper=True), new_right if S is None else torch.linalg.solve_triangular(S, new_right.T, upper=True).T


def gram(*columns: Tensor) -> Tensor:
    """Σ x xᵀ over all rows, of the columns side by side."""
    x = torch.cat([c.flatten(0, -2) for c in columns], -1)
    return torch.stack([part.double().T @ part.double() for part in x.split(8192)]).sum(0)


def one(x: Tensor) -> Tensor:
    """A column of ones beside x (…, n), for a bias."""
    return torch.ones(*x.shape[:-1], 1, dtype=x.dtype)


def refit(z: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Weight (n, m) and bias (m) of the least-squares map from z (…, n) to target (…, m)."""
    n = z.shape[-1] + 1
    both = gram(z, one(z), target)
    found = solve(both[:n, :n], both[:n, n:])
    return found[:-1], found[-1]


@torch.no_grad()
def in_parts(function, *inputs: Tensor) -> Tensor:
    """function over ROWS sequences at a time."""
    return torch.cat([function(*part) for part in zip(*(t.split(ROWS) for t in inputs), strict=True)])


def spread(weight: Tensor, factor: int, dim: int) -> Tensor:
    """Every column (dim 1) or row (dim 0) followed by factor − 1 of zeros: the Kronecker product with (1, 0, …)."""
    return torch.stack([weight, *[torch.zeros_like(weight)] * (factor - 1)], dim + 1).flatten(dim, dim + 1)
