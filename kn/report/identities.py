"""The paper's algebra (§3), checked in float64: each check gives (whether it holds, a value, its unit)."""

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, kron
from torch.linalg import det, inv

from kn import KnGPT2Config, KnGPT2LMHeadModel, KroneckerEmbedding, KroneckerSpec, nearest_kronecker

Result = tuple[bool, float, str]
RELATIVE_TOLERANCE = 1e-10  # float64 sums of a few thousand terms
CHECKS: dict[str, Callable[[], Result]] = {}


def check(function: Callable[[], Result]) -> Callable[[], Result]:
    """Registers a check under its name; it is computed once."""
    CHECKS[function.__name__] = functools.cache(function)
    return CHECKS[function.__name__]


def _random_matrices(*shapes: tuple[int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def _equal(left: Tensor, right: Tensor) -> Result:
    difference = float((left - right).norm() / right.norm())
    return difference < RELATIVE_TOLERANCE, difference, "relative difference"


def _check_identity(name: str, *shapes: tuple[int, int], sides: Callable[..., tuple[Tensor, Tensor]]) -> None:
    """Registers the check that both sides of an identity are equal for random matrices of these shapes."""
    CHECKS[name] = functools.cache(lambda: _equal(*sides(*_random_matrices(*shapes))))


# |A ⊗ B| = |A|ⁿ |B|ᵐ as printed, A of size n and B of size m; what holds is |A|ᵐ |B|ⁿ
_check_identity("determinant", (3, 3), (2, 2),
                sides=lambda a, b: (det(a) ** 3 * det(b) ** 2, det(kron(a, b))))
# A ⊗ (B + C) = A ⊗ B + A ⊗ C
_check_identity("distributive", (4, 3), (2, 5), (2, 5),
                sides=lambda a, b, c: (kron(a, b + c), kron(a, b) + kron(a, c)))
# (A ⊗ B)⁻¹ = A⁻¹ ⊗ B⁻¹
_check_identity("inverse", (4, 4), (3, 3), sides=lambda a, b: (inv(kron(a, b)), kron(inv(a), inv(b))))
# (A ⊗ B)ᵀ = Aᵀ ⊗ Bᵀ
_check_identity("transpose", (4, 3), (2, 5),
                sides=lambda a, b: (kron(a, b).T, kron(a.T.contiguous(), b.T.contiguous())))


@check
def factor_four() -> Result:
    """1024 × 1024 against 512 × 512 and 2 × 2: §3.2's example."""
    times = 1024**2 / (512**2 + 2**2)
    return abs(times / 4 - 1) < 0.01, times, "times smaller"


@check
def lookup() -> Result:
    """Row i of A ⊗ B (B 1 × f) is A_i ⊗ B, and kn.KroneckerEmbedding computes it so."""
    layer = KroneckerEmbedding(7, 6, factor=2).double()
    rows = torch.stack([kron(layer.A[i], layer.B.flatten()) for i in range(7)])
    return _equal(layer(torch.arange(7)).detach(), rows.detach())


@check
def nearest() -> Result:
    """‖W − A ⊗ B‖² of kn.nearest_kronecker is minimal: the rearranged W's other singular values, squared."""
    (w,) = _random_matrices((8, 6))
    a, b = nearest_kronecker(w, (2, 3))
    blocks = w.reshape(4, 2, 2, 3).permute(0, 2, 1, 3).reshape(8, 6)  # (blocks, entries of a 2 × 3 block)
    return _equal((w - kron(a[0], b[0])).norm() ** 2, torch.linalg.svdvals(blocks)[1:].square().sum())


@check
def dimensions() -> Result:
    """Every layer of KnGPT2 at the paper's size has as many outputs as GPT-2's."""
    from transformers import GPT2Config, GPT2LMHeadModel

    def widths(model: Any) -> list[int]:
        names = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
        layers = [block.get_submodule(name) for block in model.transformer.h for name in names]
        return [model.transformer.wte.embedding_dim, *map(_out_features, layers)]

    with torch.device("meta"):
        spec = dataclasses.asdict(KroneckerSpec())
        student = widths(KnGPT2LMHeadModel(KnGPT2Config(tie_word_embeddings=False, kronecker=spec)))
        teacher = widths(GPT2LMHeadModel(GPT2Config()))
    return student == teacher, float(sum(map(operator.eq, student, teacher))), f"of {len(teacher)} widths"


def _out_features(layer: Any) -> int:
    """Outputs of a Conv1D, a (Kronecker) linear layer, or several linear layers side by side."""
    if hasattr(layer, "nf"):
        return layer.nf
    return layer.out_features if hasattr(layer, "out_features") else sum(map(_out_features, layer.children()))


@check
def embedding_share() -> Result:
    """GPT-2 small's token embedding as a share of its parameters; "a large portion": at least a quarter."""
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config())
    share = model.transformer.wte.weight.numel() / sum(p.numel() for p in model.parameters())
    return share >= 0.25, share, "of all parameters"
