"""Kronecker layers: the nearest Kronecker product, KroneckerLinear and KroneckerEmbedding. Needs torch only.

Notation of the paper, eq. 1: W = A ⊗ B with W (m1·m2, n1·n2), A (m1, n1), B (m2, n2), and y = W x + bias.
A forward pass builds A ⊗ B only where that was measured to be faster: MATERIALIZE_MAX_NUMEL. The property `.weight` always
does, as the dense reference for tests and export.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from kn.kronecker import autograd as pairs
from kn.kronecker import checks

GRAM_LIMIT = 64  # up to this many columns of the rearranged matrix its Gram matrix is cheaper than an SVD

# On a CPU a layer of at most this many weights multiplies A ⊗ B out first: the expansion to every token costs more than
# the product saves. Forward and backward in bf16 autocast, one thread, microseconds, A ⊗ B built / two products:
# 128→512, B 2x1: 432 tokens 1,437 / 3,654, 4,096 tokens 10,127 / 33,632; 512→128, B 1x2: 1,688 / 2,814 and 10,437 / 17,390.
# 768→3072, B 2x1: 256 tokens 43,968 / 21,252, 1,024 tokens 92,029 / 77,446: never built. Other devices: not measured, never built.
MATERIALIZE_MAX_NUMEL = 2**17

# Up to this many elements of the wide activation autograd's own nodes cost less than fewer passes save. Forward and backward, two
# threads, times nn.Linear, autograd / by hand (pairs.py): 768→768, 1 row 1.06 / 0.70, 16 rows 1.24 / 0.83, 64 rows 1.23 / 1.06;
# 768→3072, 64 rows 1.4 / 1.5, 1,024 rows 1.44 / 1.75.
CUSTOM_BACKWARD_MIN_NUMEL = 2**16


def _factor_shapes(shape: tuple[int, int], b_shape: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """((m1, n1), (m2, n2)) for a weight of this shape; ValueError where B's shape does not divide it."""
    (m, n), (m2, n2) = shape, checks.require_shape("b_shape", b_shape)
    if m % m2 or n % n2:
        raise ValueError(f"B of shape {m2}x{n2} does not divide W of shape {m}x{n}: give b_shape=(m2, n2) with {m} % m2 == 0 and {n} % n2 == 0")
    return (m // m2, n // n2), (m2, n2)


def nearest_kronecker(W: Tensor, b_shape: tuple[int, int], rank: int = 1, scale: str = "sqrt") -> tuple[Tensor, Tensor]:
    """Eq. 1's A and B: the best sum of `rank` Kronecker products in Frobenius norm (Van Loan), W (m, n) ≈ Σ_r A_r ⊗ B_r.

    Returns A (rank, m/m2, n/n2) and B (rank, m2, n2) in W's dtype and device, computed in float64. `scale` says
    how a singular value is shared: "sqrt" gives √σ to each factor, "unit_b" leaves ‖B_r‖ = 1. The sign makes the
    entry of B_r with the largest magnitude positive. Raises ValueError where shapes do not divide, the rank is not
    between 1 and min(m1·n1, m2·n2), `scale` is unknown or W is not finite.
    """
    (m1, n1), (m2, n2) = _factor_shapes(tuple(checks.require_float_tensor("W", W, 2).shape), b_shape)
    largest = min(m1 * n1, m2 * n2)
    if checks.require_positive_int("rank", rank) > largest:
        raise ValueError(f"rank {checks.describe_value(rank)} is not possible for W {m1 * m2}x{n1 * n2} and B {m2}x{n2}: allowed are 1 to {largest}")
    if scale not in ("sqrt", "unit_b"):
        raise ValueError(f"scale {checks.describe_value(scale)} is unknown: allowed are 'sqrt' and 'unit_b'")
    if not torch.isfinite(W).all():
        raise ValueError("W holds NaN or infinite values: a Kronecker approximation of it is not defined")
    R = W.detach().double().reshape(m1, m2, n1, n2).permute(0, 2, 1, 3).reshape(m1 * n1, m2 * n2)  # rearranged W
    unit, greatest = 1.0, R.abs().max().item()
    if greatest and not 1e-30 < greatest < 1e30:  # its square would leave float64; a power of two changes no digit
        unit = 2.0 ** math.floor(math.log2(greatest))
        R = R / unit
    if m2 * n2 <= GRAM_LIMIT:
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
    A, B = U.T.reshape(rank, m1, n1).to(W.dtype).contiguous(), V.T.reshape(rank, m2, n2).to(W.dtype).contiguous()
    if not (A.isfinite().all() and B.isfinite().all()):
        raise ValueError(f"W holds values up to {greatest:.3g}, its factors are beyond the range of {str(W.dtype).removeprefix('torch.')}: scale W, or give it in a wider type")
    return A, B


def kronecker_sum(A: Tensor, B: Tensor) -> Tensor:
    """Dense Σ_r A_r ⊗ B_r, shape (m1·m2, n1·n2), from A (rank, m1, n1) and B (rank, m2, n2)."""
    (_, m1, n1), (_, m2, n2) = A.shape, B.shape
    return torch.einsum("rik,rjl->ijkl", A, B).reshape(m1 * m2, n1 * n2)


def kronecker_apply(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """x (…, n1·n2) times (Σ_r A_r ⊗ B_r)ᵀ → (…, m1·m2): Y = A X Bᵀ with the cheaper side first (MATH.md §1)."""
    (rank, m1, n1), (_, m2, n2) = A.shape, B.shape
    lead = x.shape[:-1]
    if m1 * n1 * n2 + m1 * n2 * m2 <= n1 * n2 * m2 + m1 * n1 * m2:  # multiply-adds of A first and of B first
        X = x.reshape(*lead, n1, n2).transpose(-1, -2)  # (…, n2, n1)
        Y = nn.functional.linear(X, A.reshape(rank * m1, n1)).reshape(*lead, n2, rank, m1)
        if n2 == 1 and rank == 1:
            return (Y.reshape(*lead, m1, 1) * B.reshape(m2)).reshape(*lead, m1 * m2)
        return torch.einsum("...lri,rjl->...ij", Y, B).reshape(*lead, m1 * m2)
    X = x.reshape(*lead, n1, n2)
    if m2 == 1:  # pairs of inputs are contracted, then one product: no transposed copy
        Z = torch.einsum("...kl,rl->...rk", X, B[:, 0]) if rank > 1 else X @ B[0, 0]
        return nn.functional.linear(Z.reshape(*lead, rank * n1), A.permute(1, 0, 2).reshape(m1, rank * n1))
    Z = torch.einsum("...kl,rjl->...jrk", X, B).reshape(*lead, m2, rank * n1)
    Y = nn.functional.linear(Z, A.permute(1, 0, 2).reshape(m1, rank * n1))  # (…, m2, m1)
    return Y.transpose(-1, -2).reshape(*lead, m1 * m2)


class KroneckerLinear(nn.Module):
    """Eq. 1: y = (Σ_r A_r ⊗ B_r) x + bias, for x (…, in_features) → y (…, out_features).

    A (parts·rank, m1, n1) and B (parts·rank, m2, n2) are the parameters; `parts` > 1 stacks that many independent
    maps of the same input along the output, as GPT-2's fused query, key and value do: one layer call, three products.
    Raises ValueError for a B that does not divide the weight, a rank or a number of parts that is not possible.
    """

    def __init__(self, in_features: int, out_features: int, b_shape: tuple[int, int], rank: int = 1, bias: bool = True, parts: int = 1):
        super().__init__()
        if checks.require_positive_int("out_features", out_features) * checks.require_positive_int("in_features", in_features) > checks.MAX_NUMEL:
            raise ValueError(f"a layer of {checks.describe_value(in_features)} inputs and {checks.describe_value(out_features)} outputs is larger than any memory")
        if out_features % checks.require_positive_int("parts", parts):
            raise ValueError(f"out_features {out_features} cannot be split into {parts} equal parts")
        (m1, n1), (m2, n2) = _factor_shapes((out_features // parts, in_features), b_shape)
        if checks.require_positive_int("rank", rank) > min(m1 * n1, m2 * n2):
            raise ValueError(f"rank {checks.describe_value(rank)} is not possible with B {m2}x{n2}: allowed are 1 to {min(m1 * n1, m2 * n2)}")
        self.in_features, self.out_features, self.rank, self.parts = in_features, out_features, rank, parts
        self.A = nn.Parameter(torch.empty(parts * rank, m1, n1))
        self.B = nn.Parameter(torch.empty(parts * rank, m2, n2))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        """Random start: A normal with `std`, B near one, bias zero."""
        with torch.no_grad():
            self.A.normal_(0.0, std)
            self.B.normal_(1.0, std)
            if self.bias is not None:
                self.bias.zero_()

    @classmethod
    def from_linear(cls, linear: nn.Module, b_shape: tuple[int, int], rank: int = 1, parts: int = 1, scale: str = "sqrt") -> KroneckerLinear:
        """The nearest Kronecker layer to an nn.Linear (weight out×in) or a Hugging Face Conv1D (weight in×out), in its dtype and device; TypeError for another layer."""
        conv1d = type(linear).__name__ == "Conv1D"
        if not conv1d and not isinstance(linear, nn.Linear):
            raise TypeError(f"from_linear takes nn.Linear or transformers' Conv1D, got {type(linear).__name__}")
        weight = linear.weight.detach().T if conv1d else linear.weight.detach()  # (out, in)
        layer = cls(weight.shape[1], weight.shape[0], b_shape, rank, linear.bias is not None, parts)
        layer = layer.to(device=weight.device, dtype=weight.dtype)
        layer.approximate(weight, scale)
        if linear.bias is not None:
            with torch.no_grad():
                layer.bias.copy_(linear.bias)
        return layer

    def approximate(self, weight: Tensor, scale: str = "sqrt") -> None:
        """Set A and B to the nearest Kronecker product of a dense weight (out, in), part by part."""
        b_shape = tuple(self.B.shape[1:])
        factors = [nearest_kronecker(part, b_shape, self.rank, scale) for part in weight.chunk(self.parts)]
        with torch.no_grad():
            self.A.copy_(torch.cat([a for a, _ in factors]))
            self.B.copy_(torch.cat([b for _, b in factors]))

    @property
    def weight(self) -> Tensor:
        """Dense (out_features, in_features); a reference, never used by forward."""
        return torch.cat([kronecker_sum(a, b) for a, b in zip(self.A.split(self.rank), self.B.split(self.rank), strict=True)])

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.in_features:
            raise ValueError(f"x is {tuple(x.shape)}: the layer has {self.in_features} inputs, which is the last size wanted")
        m2, n2 = self.B.shape[1:]
        if x.device.type == "cpu" and self.in_features * self.out_features <= MATERIALIZE_MAX_NUMEL:
            factors = self.A.unflatten(0, (self.parts, -1)), self.B.unflatten(0, (self.parts, -1))  # (parts, rank, m1, n1), (parts, rank, m2, n2)
            return nn.functional.linear(x, torch.einsum("prik,prjl->pijkl", *factors).reshape(self.out_features, self.in_features), self.bias)
        wide = x.numel() // self.in_features * max(self.in_features, self.out_features)
        if self.rank == 1 and wide > CUSTOM_BACKWARD_MIN_NUMEL and not torch.compiler.is_compiling():  # a compiler fuses the passes itself
            if n2 == 1:
                return pairs.column_factor_linear(x, self.A, self.B[..., 0], self.bias)
            if m2 == 1 and self.parts == 1:
                return pairs.row_factor_linear(x, self.A[0], self.B[0], self.bias)
        if n2 == 1 and self.rank == 1:  # one product for all parts, then y[m2·i + j] = b_j a_i
            a = nn.functional.linear(x, self.A.flatten(0, 1)).unflatten(-1, (self.parts, -1, 1))  # (…, parts, m1, 1)
            y = (a * self.B.to(a.dtype).view(self.parts, 1, m2)).flatten(-3)
        else:
            groups = zip(self.A.split(self.rank), self.B.split(self.rank), strict=True)
            y = torch.cat([kronecker_apply(x, a, b) for a, b in groups], -1) if self.parts > 1 else kronecker_apply(x, self.A, self.B)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        (_, m1, n1), (_, m2, n2) = self.A.shape, self.B.shape
        return f"{self.in_features} -> {self.out_features}, A {m1}x{n1}, B {m2}x{n2}, rank {self.rank}, parts {self.parts}, bias {self.bias is not None}"


class KroneckerEmbedding(nn.Module):
    """Lookup table W_E = A ⊗ B with A (num_embeddings, embedding_dim / factor) and B (1, factor), §3.2 of the paper.

    ids (…) of int64 → rows (…, embedding_dim), each the Kronecker product of one row of A with B: O(d) work a token.
    Raises ValueError where the factor does not divide embedding_dim.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, factor: int):
        super().__init__()
        if checks.require_positive_int("num_embeddings", num_embeddings) * checks.require_positive_int("embedding_dim", embedding_dim) > checks.MAX_NUMEL:
            raise ValueError(f"a table of {checks.describe_value(num_embeddings)} rows of {checks.describe_value(embedding_dim)} is larger than any memory")
        if embedding_dim % checks.require_positive_int("factor", factor):
            raise ValueError(f"factor {factor} does not divide embedding_dim {embedding_dim}")
        self.num_embeddings, self.embedding_dim, self.factor = num_embeddings, embedding_dim, factor
        self.A = nn.Parameter(torch.empty(num_embeddings, embedding_dim // factor))
        self.B = nn.Parameter(torch.empty(1, factor))
        self.reset_parameters()

    reset_parameters = KroneckerLinear.reset_parameters
    bias = None

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, factor: int, scale: str = "sqrt") -> KroneckerEmbedding:
        """The nearest Kronecker embedding to a dense one; TypeError for another layer."""
        if not isinstance(embedding, nn.Embedding):
            raise TypeError(f"from_embedding takes nn.Embedding, got {type(embedding).__name__}")
        weight = embedding.weight.detach()
        layer = cls(weight.shape[0], weight.shape[1], factor).to(device=weight.device, dtype=weight.dtype)
        layer.approximate(weight, scale)
        return layer

    def approximate(self, weight: Tensor, scale: str = "sqrt") -> None:
        """Set A and B to the nearest Kronecker product of a dense table (num_embeddings, embedding_dim)."""
        A, B = nearest_kronecker(weight, (1, self.factor), 1, scale)
        with torch.no_grad():
            self.A.copy_(A[0])
            self.B.copy_(B[0])

    @property
    def weight(self) -> Tensor:
        """Dense (num_embeddings, embedding_dim); a reference, never used by forward."""
        return kronecker_sum(self.A[None], self.B[None])

    def forward(self, ids: Tensor) -> Tensor:
        return (nn.functional.embedding(ids, self.A).unsqueeze(-1) * self.B[0]).flatten(-2)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, A {self.A.shape[0]}x{self.A.shape[1]}, B 1x{self.factor}"


class KroneckerHead(nn.Module):
    """Output head that is the embedding's table W_E = A ⊗ B (§3.2) once more: hidden (…, d) → logits (…, num_embeddings), the factors shared.

    The hidden state is contracted with B first, so it costs 1/factor of the dense head.
    """

    bias = None

    def __init__(self, embedding: KroneckerEmbedding):
        super().__init__()
        self.A, self.B = embedding.A, embedding.B

    @property
    def weight(self) -> Tensor:
        """Dense (num_embeddings, d); a reference, never used by forward."""
        return kronecker_sum(self.A[None], self.B[None])

    def forward(self, hidden: Tensor) -> Tensor:
        return nn.functional.linear(hidden.unflatten(-1, (self.A.shape[1], -1)) @ self.B[0], self.A)

    def extra_repr(self) -> str:
        return f"{self.A.shape[1] * self.B.shape[1]} -> {self.A.shape[0]}, A and B of the embedding"
