"""Low-rank baseline of the same size: each matrix that a KroneckerSpec compresses is two thin ones instead.

As good as the tools of the aligned start make it: activation-weighted, with biases, layer after layer on the
compressed prefix, dense layers refitted, the embedding in its best directions."""

import torch
from torch import Tensor, nn

from kn.align.gpt2 import Sublayer, build_aligned_pair, refit_writer
from kn.align.least_squares import gram_matrix, weighted_low_rank
from kn.models.config import KroneckerSpec


class LowRankLinear(nn.Module):
    """y = (x U) V + b, y in p equal parts (fused layers): U (p, n, r), V (p, r, m / p), b (m)."""

    def __init__(self, U: Tensor, V: Tensor, bias: Tensor):
        super().__init__()
        self.U, self.V, self.bias = nn.Parameter(U), nn.Parameter(V), nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([(x @ u) @ v for u, v in zip(self.U, self.V, strict=True)], -1) + self.bias


class LowRankEmbedding(nn.Module):
    """Token embedding A V with A (vocabulary, r) and V (r, d)."""

    def __init__(self, A: Tensor, V: Tensor):
        super().__init__()
        self.A, self.V = nn.Parameter(A), nn.Parameter(V)

    def forward(self, ids: Tensor) -> Tensor:
        return nn.functional.embedding(ids, self.A) @ self.V


def rank_for(n: int, m: int, factor: int) -> int:
    """The largest rank (at least 1) with n·r + r·m ≤ n·m / factor, the size of a Kronecker product."""
    return max(1, n * m // (factor * (n + m)))


@torch.no_grad()
def build_low_rank_pair(model: nn.Module, spec: KroneckerSpec, ids: Tensor) -> tuple[nn.Module, nn.Module]:
    """(equivalent teacher, low-rank GPT-2 of the Kronecker model's size), calibrated on ids as it is."""
    teacher, student = build_aligned_pair(model, spec, ids, fit_sublayer=fit_low_rank)
    if spec.embedding:  # already projected: a thin product holds it exactly
        embedding = student.transformer.wte.weight
        rank, weight = embedding.shape[1] // (spec.embedding_factor or spec.factor), embedding.double()
        V = torch.linalg.svd(weight, full_matrices=False).Vh[:rank]
        student.transformer.wte = LowRankEmbedding((weight @ V.T).to(embedding.dtype), V.to(embedding.dtype))
    return teacher, student


def fit_low_rank(sublayer: Sublayer, teacher: Sublayer, y_t: Tensor, x_s: Tensor, factor: int) -> None:
    """Make in_proj and out_proj products of thin matrices; in between, out_proj is refitted to y_t."""
    in_proj = factorize_linear(sublayer.in_proj, gram_matrix(sublayer.norm, x_s), factor)
    setattr(sublayer.module, sublayer.in_proj_name, in_proj)
    refit_writer(sublayer, y_t, x_s)
    gram = gram_matrix(lambda x: sublayer.with_inner(x)[0], x_s)
    sublayer.module.c_proj = factorize_linear(sublayer.out_proj, gram, factor)


def factorize_linear(layer: nn.Module, gram: Tensor, factor: int) -> LowRankLinear:
    """The LowRankLinear nearest to a Conv1D (q, k, v apart) under its inputs' Gram matrix (n + 1, n + 1)."""
    weight, bias, dtype = layer.weight.double(), layer.bias.double(), layer.weight.dtype
    n, m = weight.shape
    parts = weight.chunk(3 if m == 3 * n else 1, 1)
    covariance = gram[:-1, :-1] - torch.outer(gram[:-1, -1], gram[-1, :-1]) / gram[-1, -1]  # bias: the mean
    eye = torch.eye(m // len(parts), dtype=weight.dtype, device=weight.device)
    rank = rank_for(n, len(eye), factor)
    U, V = zip(*(weighted_low_rank(w, eye, rank, covariance) for w in parts), strict=True)
    mean = gram[-1, :-1] / gram[-1, -1]
    lost = torch.cat([mean @ (w - u @ v) for w, u, v in zip(parts, U, V, strict=True)])
    return LowRankLinear(torch.stack(U).to(dtype), torch.stack(V).to(dtype), (bias + lost).to(dtype))
