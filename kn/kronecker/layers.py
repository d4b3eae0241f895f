"""Kronecker layers: KroneckerLinear, KroneckerEmbedding and the tied output head KroneckerHead.

Notation of eq. 1 (nearest.py): W = Σ_r A_r ⊗ B_r with A_r (m1, n1) and B_r (m2, n2). A forward pass builds
the dense W only where that was measured to be faster (MATERIALIZE_MAX_NUMEL). The property `weight` always
builds it, as the reference for tests and export."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kn.kronecker import checks
from kn.kronecker.autograd import column_factor_linear, row_factor_linear
from kn.kronecker.nearest import Shape, factor_shapes, kronecker_sum, nearest_kronecker, require_rank

# On a CPU, not elsewhere, a layer of at most this many weights builds A ⊗ B first: the expansion of every
# token costs more than the smaller product saves. Forward and backward in bf16 autocast, one thread,
# microseconds, A ⊗ B built / two products:
#   128→512, B 2x1:  432 tokens  1,437 /  3,654, 4,096 tokens 10,127 / 33,632; 512→128, B 1x2: the same way
#   768→3072, B 2x1: 256 tokens 43,968 / 21,252, 1,024 tokens 92,029 / 77,446, so never built
MATERIALIZE_MAX_NUMEL = 2**17

# Up to this many elements of the wide activation the custom backward's overhead is more than it saves.
# Forward and backward, two threads, speed-up over nn.Linear, autograd / autograd.py: 768→768: 1 row
# 1.06 / 0.70, 64 rows 1.23 / 1.06; 768→3072: 64 rows 1.4 / 1.5, 1,024 rows 1.44 / 1.75
CUSTOM_BACKWARD_MIN_NUMEL = 2**16


def is_conv1d(module: nn.Module) -> bool:
    """Whether a layer is transformers' Conv1D, whose weight is (in, out)."""
    return type(module).__name__ == "Conv1D"


def kronecker_apply(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """y = (Σ_r A_r ⊗ B_r) x for x (…, n1·n2) → (…, m1·m2), as Y = A X Bᵀ with the cheaper product first."""
    (rank, m1, n1), (_, m2, n2), batch = A.shape, B.shape, x.shape[:-1]
    if m1 * n1 * n2 + m1 * n2 * m2 <= n1 * n2 * m2 + m1 * n1 * m2:  # multiply-adds, A first and B first
        X = x.reshape(*batch, n1, n2).transpose(-1, -2)  # (…, n2, n1)
        Y = F.linear(X, A.reshape(rank * m1, n1)).reshape(*batch, n2, rank, m1)
        return torch.einsum("...lri,rjl->...ij", Y, B).reshape(*batch, m1 * m2)
    X = x.reshape(*batch, n1, n2)
    if m2 == 1:  # inputs are contracted, then one product: no transposed copy
        Z = torch.einsum("...kl,rl->...rk", X, B[:, 0]) if rank > 1 else X @ B[0, 0]
        return F.linear(Z.reshape(*batch, rank * n1), A.permute(1, 0, 2).reshape(m1, rank * n1))
    Z = torch.einsum("...kl,rjl->...jrk", X, B).reshape(*batch, m2, rank * n1)
    Y = F.linear(Z, A.permute(1, 0, 2).reshape(m1, rank * n1))  # (…, m2, m1)
    return Y.transpose(-1, -2).reshape(*batch, m1 * m2)


class KroneckerLayer(nn.Module):
    """Base of the layers: A ([num_fused·rank,] m1, n1) and B ([num_fused·rank,] m2, n2); [] if not 1."""

    rank = num_fused = 1

    def extra_repr(self) -> str:
        return ", ".join(f"{name} {'x'.join(map(str, p.shape))}" for name, p in self.named_parameters())

    def reset_parameters(self, std: float = 0.02) -> None:
        """Random initialisation: A normal around 0, B around 1, standard deviation `std`; bias zero."""
        with torch.no_grad():
            self.A.normal_(0.0, std)
            self.B.normal_(1.0, std)
            if getattr(self, "bias", None) is not None:
                self.bias.zero_()

    def approximate(self, weight: Tensor, scale: str = "sqrt") -> None:
        """Set A and B to the nearest Kronecker products of a dense weight (out, in), map by map."""
        b_shape, maps = tuple(self.B.shape[-2:]), weight.chunk(self.num_fused)
        factors = [nearest_kronecker(W, b_shape, self.rank, scale) for W in maps]
        with torch.no_grad():
            for parameter, values in zip((self.A, self.B), zip(*factors, strict=True), strict=True):
                parameter.copy_(torch.cat(values).view_as(parameter))

    @property
    def weight(self) -> Tensor:
        """Dense weight (out, in), of an embedding (num_embeddings, d); a reference, not used by forward."""
        A, B = (t.view(-1, *t.shape[-2:]).split(self.rank) for t in (self.A, self.B))
        return torch.cat([kronecker_sum(*factors) for factors in zip(A, B, strict=True)])


class KroneckerLinear(KroneckerLayer):
    """Linear layer y = (Σ_r A_r ⊗ B_r) x + bias (eq. 1), for x (…, in_features) → y (…, out_features).
    The parameters are A (num_fused·rank, m1, n1) and B (num_fused·rank, m2, n2). `num_fused` maps of the same
    input are stacked along the output and factored one by one, as GPT-2's fused query, key and value: one
    call, three products. Raises TypeError or ValueError for sizes that are impossible or do not fit."""

    def __init__(
            self, in_features: int, out_features: int, b_shape: Shape, rank: int = 1, bias: bool = True,
            num_fused: int = 1):
        super().__init__()
        checks.require_sizes(in_features=in_features, out_features=out_features)
        checks.require_positive_int("num_fused", num_fused)
        if out_features % num_fused:
            raise ValueError(f"num_fused {num_fused} does not divide out_features {out_features}")
        (m1, n1), (m2, n2) = factor_shapes((out_features // num_fused, in_features), b_shape)
        require_rank(rank, (m1, n1), (m2, n2))
        self.in_features, self.out_features = in_features, out_features
        self.rank, self.num_fused = rank, num_fused
        self.A = nn.Parameter(torch.empty(num_fused * rank, m1, n1))
        self.B = nn.Parameter(torch.empty(num_fused * rank, m2, n2))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        self.reset_parameters()

    @classmethod
    def from_linear(
        cls, linear: nn.Module, b_shape: Shape, rank: int = 1, num_fused: int = 1, scale: str = "sqrt"
    ) -> KroneckerLinear:
        """The nearest Kronecker layer to nn.Linear or transformers' Conv1D, with its dtype and device.
        Raises TypeError for another layer, and ValueError as the constructor and nearest_kronecker do."""
        if not is_conv1d(linear) and not isinstance(linear, nn.Linear):
            problem = "from_linear takes nn.Linear or transformers' Conv1D"
            raise TypeError(f"{problem}, got {type(linear).__name__}")
        weight = linear.weight.detach().T if is_conv1d(linear) else linear.weight.detach()  # (out, in)
        (m, n), has_bias = weight.shape, linear.bias is not None
        layer = cls(n, m, b_shape, rank, has_bias, num_fused).to(weight)
        layer.approximate(weight, scale)
        if linear.bias is not None:
            layer.bias.data.copy_(linear.bias.detach())
        return layer

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.in_features:
            raise ValueError(f"x is {tuple(x.shape)}: expected {self.in_features} as the last size")
        fused, m2, n2 = self.num_fused, *self.B.shape[1:]
        if x.device.type == "cpu" and self.in_features * self.out_features <= MATERIALIZE_MAX_NUMEL:
            A, B = (factor.unflatten(0, (fused, -1)) for factor in (self.A, self.B))  # (fused, rank, …)
            weight = torch.einsum("prik,prjl->pijkl", A, B).reshape(self.out_features, self.in_features)
            return F.linear(x, weight, self.bias)
        numel = x.numel() // self.in_features * max(self.in_features, self.out_features)
        # a compiler fuses the passes itself
        if self.rank == 1 and numel > CUSTOM_BACKWARD_MIN_NUMEL and not torch.compiler.is_compiling():
            if n2 == 1:
                return column_factor_linear(x, self.A, self.B[..., 0], self.bias)
            if m2 == 1 and fused == 1:
                return row_factor_linear(x, self.A[0], self.B[0], self.bias)
        if n2 == 1 and self.rank == 1:  # one product for all fused maps, then y[m2·i + j] = b_j a_i
            a = F.linear(x, self.A.flatten(0, 1)).unflatten(-1, (fused, -1, 1))  # (…, fused, m1, 1)
            y = (a * self.B.to(a.dtype).view(fused, 1, m2)).flatten(-3)
        elif fused > 1:
            factors = zip(self.A.split(self.rank), self.B.split(self.rank), strict=True)
            y = torch.cat([kronecker_apply(x, A, B) for A, B in factors], -1)
        else:
            y = kronecker_apply(x, self.A, self.B)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class KroneckerEmbedding(KroneckerLayer):
    """Embedding W_E = A ⊗ B, A (num_embeddings, embedding_dim / factor), B (1, factor): §3.2 of the paper.
    ids (…) of int64 → (…, embedding_dim), each the Kronecker product of one row of A with B: O(embedding_dim)
    a token. Raises TypeError or ValueError for sizes that are no positive integers, ValueError for a factor
    that does not divide embedding_dim."""

    def __init__(self, num_embeddings: int, embedding_dim: int, factor: int):
        super().__init__()
        checks.require_sizes(num_embeddings=num_embeddings, embedding_dim=embedding_dim)
        checks.require_positive_int("factor", factor)
        if embedding_dim % factor:
            raise ValueError(f"factor {factor} does not divide embedding_dim {embedding_dim}")
        self.num_embeddings, self.embedding_dim, self.factor = num_embeddings, embedding_dim, factor
        self.A = nn.Parameter(torch.empty(num_embeddings, embedding_dim // factor))
        self.B = nn.Parameter(torch.empty(1, factor))
        self.reset_parameters()

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, factor: int, scale: str = "sqrt") -> KroneckerEmbedding:
        """The nearest Kronecker embedding to an nn.Embedding. Raises TypeError for another layer."""
        if not isinstance(embedding, nn.Embedding):
            raise TypeError(f"from_embedding takes nn.Embedding, got {type(embedding).__name__}")
        weight = embedding.weight.detach()
        layer = cls(weight.shape[0], weight.shape[1], factor).to(weight)
        layer.approximate(weight, scale)
        return layer

    def forward(self, ids: Tensor) -> Tensor:
        return (F.embedding(ids, self.A).unsqueeze(-1) * self.B[0]).flatten(-2)


class KroneckerHead(KroneckerLayer):
    """Output head tied to a Kronecker embedding (§3.2): hidden (…, d), contracted with B, → logits (…, v)."""

    def __init__(self, embedding: KroneckerEmbedding):
        super().__init__()
        self.A, self.B = embedding.A, embedding.B

    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden.unflatten(-1, (self.A.shape[1], -1)) @ self.B[0], self.A)
