"""Nearest Kronecker product of a matrix (eq. 1 of the paper), by the rearrangement of Van Loan and Pitsianis.

Eq. 1 is W = A ⊗ B for W (m1·m2, n1·n2), A (m1, n1), B (m2, n2): W[m2·i + j, n2·k + l] = A[i, k] B[j, l]. With
one row of R per block of W, R[n1·i + k, n2·j + l] = W[m2·i + j, n2·k + l], ‖W − Σ_r A_r ⊗ B_r‖ is
‖R − Σ_r vec(A_r) vec(B_r)ᵀ‖: the best A_r and B_r are R's leading singular vectors."""

import math

import torch
from torch import Tensor

from kn.kronecker import checks

SCALES = ("sqrt", "unit_b")
GRAM_MAX_COLUMNS = 64  # up to this many columns of R its Gram matrix RᵀR is cheaper than an SVD

Shape = tuple[int, int]


def factor_shapes(weight_shape: Shape, b_shape: Shape) -> tuple[Shape, Shape]:
    """((m1, n1), (m2, n2)), the shapes of A and B. Raises ValueError if B's does not divide the weight's."""
    (m, n), (m2, n2) = weight_shape, checks.require_shape("b_shape", b_shape)
    if m % m2 or n % n2:
        allowed = f"give b_shape=(m2, n2) with {m} % m2 == 0 and {n} % n2 == 0"
        raise ValueError(f"B of shape {m2}x{n2} does not divide W of shape {m}x{n}: {allowed}")
    return (m // m2, n // n2), (m2, n2)


def require_rank(rank: int, a_shape: Shape, b_shape: Shape) -> None:
    """An int from 1 to R's full rank min(m1·n1, m2·n2). Raises TypeError or ValueError for anything else."""
    (m1, n1), (m2, n2) = a_shape, b_shape
    largest = min(m1 * n1, m2 * n2)
    if checks.require_positive_int("rank", rank) > largest:
        problem, shapes = f"rank {checks.describe_value(rank)}", f"W {m1 * m2}x{n1 * n2} with B {m2}x{n2}"
        raise ValueError(f"{problem} is not possible for {shapes}: allowed are 1 to {largest}")


def nearest_kronecker(W: Tensor, b_shape: Shape, rank: int = 1, scale: str = "sqrt") -> tuple[Tensor, Tensor]:
    """A and B of eq. 1: the nearest sum of `rank` Kronecker products to W (m, n) in Frobenius norm.

    W ≈ Σ_r A_r ⊗ B_r; returns A (rank, m/m2, n/n2) and B (rank, m2, n2) with W's dtype and device, computed
    in float64. `scale` shares out the singular value σ_r: "sqrt" gives √σ_r to each factor, "unit_b" leaves
    ‖B_r‖ = 1. The sign makes the entry of B_r with the largest magnitude positive. Raises TypeError or
    ValueError for a W, B's shape, rank or `scale` that does not fit, or factors that overflow W's dtype."""
    (m1, n1), (m2, n2) = factor_shapes(tuple(checks.require_float_tensor("W", W, 2).shape), b_shape)
    require_rank(rank, (m1, n1), (m2, n2))
    checks.require_choice("scale", scale, SCALES)
    if not torch.isfinite(W).all():
        raise ValueError("W holds NaN or infinite values: a Kronecker approximation of it is not defined")
    R = W.detach().double().reshape(m1, m2, n1, n2).permute(0, 2, 1, 3).reshape(m1 * n1, m2 * n2)
    unit, largest = 1.0, R.abs().max().item()
    if largest and not 1e-30 < largest < 1e30:  # keeps R² in float64; powers of two are exact
        unit = 2.0 ** math.floor(math.log2(largest))
        R = R / unit
    if m2 * n2 <= GRAM_MAX_COLUMNS:
        V = torch.linalg.eigh(R.T @ R).eigenvectors.flip(1)[:, :rank]  # (m2·n2, rank), largest first
    else:
        V = torch.linalg.svd(R, full_matrices=False).Vh[:rank].T
    V = V * torch.sign(V.gather(0, V.abs().argmax(0, keepdim=True)))
    U = R @ V  # (m1·n1, rank), column norms are the singular values
    if scale == "sqrt":
        root = U.norm(dim=0).clamp_min(torch.finfo(torch.float64).tiny).sqrt()
        U, V = U / root * unit**0.5, V * root * unit**0.5
    else:
        U = U * unit
    A = U.T.reshape(rank, m1, n1).to(W.dtype).contiguous()
    B = V.T.reshape(rank, m2, n2).to(W.dtype).contiguous()
    if not (A.isfinite().all() and B.isfinite().all()):
        problem = f"W holds values up to {largest:.3g}, its factors are beyond the range of {W.dtype}"
        raise ValueError(f"{problem}: scale W, or give it in a wider dtype")
    return A, B


def kronecker_sum(A: Tensor, B: Tensor) -> Tensor:
    """Dense Σ_r A_r ⊗ B_r (m1·m2, n1·n2) from A (rank, m1, n1) and B (rank, m2, n2)."""
    (_, m1, n1), (_, m2, n2) = A.shape, B.shape
    return torch.einsum("rik,rjl->ijkl", A, B).reshape(m1 * m2, n1 * n2)
