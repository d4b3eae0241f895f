"""The usual other way to the same size: every matrix that a KroneckerSpec would compress becomes a product of two thin ones.

A baseline for beyond_compression, as good as the aligned start's own tools make it: activation-weighted, with biases, layer
after layer on the compressed prefix, dense layers corrected, the embedding in its best directions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kn.align import gpt2 as aligned
from kn.align.least_squares import low_rank, moments, one
from kn.models.config import KroneckerSpec


class LowRankLinear(nn.Module):
    """y = (x U) V + b, for each of `stacked` equal parts of the outputs: U (stacked, n, r), V (stacked, r, m / stacked), b (m)."""

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


def rank_of(n: int, m: int, factor: int) -> int:
    """The rank at which n·r + r·m comes nearest below the n·m / factor parameters of a Kronecker product."""
    return max(1, n * m // (factor * (n + m)))


@torch.no_grad()
def start(model: nn.Module, spec: KroneckerSpec, ids: Tensor) -> tuple[nn.Module, nn.Module]:
    """(equivalent teacher, low-rank model) for a GPT2LMHeadModel, at the parameters of KroneckerSpec's model; ids (sequences, length) of calibration text."""
    teacher, student = aligned.pair(model, spec, ids, to_smaller=to_thin)
    if spec.embedding:  # projected already: a thin product holds it exactly
        table = student.transformer.wte
        V = torch.linalg.svd(table.weight.double(), full_matrices=False).Vh[: table.embedding_dim // (spec.embedding_factor or spec.factor)]
        student.transformer.wte = LowRankEmbedding((table.weight.double() @ V.T).to(table.weight.dtype), V.to(table.weight.dtype))
    return teacher, student


def to_thin(half: aligned.Half, teacher: aligned.Half, name: str, y_t: Tensor, x_s: Tensor, factor: int) -> None:
    """One half of a compressed layer: reader and writer as thin products, the writer refitted first."""
    half.reader = thin(half.reader, moments(lambda x: (one(half.norm(x)),) * 2, x_s), factor)
    aligned.correct_writer(half, y_t, x_s)
    half.module.c_proj = thin(half.writer, moments(lambda x: (one(half.inside(x)[0]),) * 2, x_s), factor)


def thin(layer: nn.Module, H: Tensor, factor: int) -> LowRankLinear:
    """The LowRankLinear nearest to a Conv1D for inputs with the Gram matrix H (n + 1, n + 1), ones last; query, key and value are three."""
    weight, bias = layer.weight.double(), layer.bias.double()
    n, m = weight.shape
    stacked = 3 if m == 3 * n else 1
    inner = H[:-1, :-1] - torch.outer(H[:-1, -1], H[-1, :-1]) / H[-1, -1]  # centred: the bias takes up the mean
    parts = [low_rank(w, torch.eye(w.shape[1], dtype=w.dtype, device=w.device), rank_of(n, m // stacked, factor), inner) for w in weight.chunk(stacked, 1)]
    U, V = (torch.stack(side) for side in zip(*parts, strict=True))
    mean = H[-1, :-1] / H[-1, -1]
    lost = torch.cat([mean @ (w - u @ v) for w, u, v in zip(weight.chunk(stacked, 1), U, V, strict=True)])
    dtype = layer.weight.dtype
    return LowRankLinear(U.to(dtype), V.to(dtype), (bias + lost).to(dtype))
