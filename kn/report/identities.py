"""The paper's algebra (§3), checked by numbers in float64: each check gives (does it hold, a value, the value's unit)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

EXACT = 1e-12  # relative; float64 sums of a few thousand terms


def _matrices(*shapes: tuple[int, int]) -> list:
    import torch

    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def _apart(left, right) -> tuple[bool, float, str]:
    off = float((left - right).norm() / right.norm())
    return off < EXACT * 100, off, "relative difference"


def determinant() -> tuple[bool, float, str]:
    """|A ⊗ B| = |A|^n |B|^m as printed, A of size n and B of size m; what holds is |A|^m |B|^n."""
    import torch

    a, b = _matrices((3, 3), (2, 2))
    return _apart(torch.linalg.det(a) ** 3 * torch.linalg.det(b) ** 2, torch.linalg.det(torch.kron(a, b)))


def distributive() -> tuple[bool, float, str]:
    """A ⊗ (B + C) = A ⊗ B + A ⊗ C."""
    import torch

    a, b, c = _matrices((4, 3), (2, 5), (2, 5))
    return _apart(torch.kron(a, b + c), torch.kron(a, b) + torch.kron(a, c))


def inverse() -> tuple[bool, float, str]:
    """(A ⊗ B)⁻¹ = A⁻¹ ⊗ B⁻¹."""
    import torch

    a, b = _matrices((4, 4), (3, 3))
    return _apart(torch.linalg.inv(torch.kron(a, b)), torch.kron(torch.linalg.inv(a), torch.linalg.inv(b)))


def transpose() -> tuple[bool, float, str]:
    """(A ⊗ B)ᵀ = Aᵀ ⊗ Bᵀ."""
    import torch

    a, b = _matrices((4, 3), (2, 5))
    return _apart(torch.kron(a, b).T, torch.kron(a.T.contiguous(), b.T.contiguous()))


def factor_four() -> tuple[bool, float, str]:
    """1024 × 1024 against 512 × 512 and 2 × 2: §3.2's example."""
    times = 1024**2 / (512**2 + 2**2)
    return abs(times / 4 - 1) < 0.01, times, "times smaller"


def lookup() -> tuple[bool, float, str]:
    """Row i of A ⊗ B (B 1 × f) is A_i ⊗ B, and kn.KroneckerEmbedding looks it up so."""
    import torch

    from kn import KroneckerEmbedding

    layer = KroneckerEmbedding(7, 6, factor=2).double()
    rows = torch.stack([torch.kron(layer.A[i], layer.B.flatten()) for i in range(7)])
    return _apart(layer(torch.arange(7)).detach(), rows.detach())


def nearest() -> tuple[bool, float, str]:
    """‖W − A ⊗ B‖² of kn.nearest_kronecker is what the other singular values of the rearranged W leave: no product is nearer."""
    import torch

    from kn import nearest_kronecker

    (w,) = _matrices((8, 6))
    a, b = nearest_kronecker(w, (2, 3))
    blocks = w.reshape(4, 2, 2, 3).permute(0, 2, 1, 3).reshape(8, 6)  # a block a row
    return _apart((w - torch.kron(a[0], b[0])).norm() ** 2, torch.linalg.svdvals(blocks)[1:].square().sum())


def dimensions() -> tuple[bool, float, str]:
    """Every layer of KnGPT2 at the paper's size has the outputs of GPT-2's, and as many layers."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from kn import KnGPT2Config, KnGPT2LMHeadModel, KroneckerSpec

    def sizes(model) -> list[int]:
        found = [model.transformer.wte.embedding_dim]
        for block in model.transformer.h:
            found += [size for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj") for size in [_width(block.get_submodule(name))]]
        return found

    with torch.device("meta"):
        teacher, student = GPT2LMHeadModel(GPT2Config()), KnGPT2LMHeadModel(KnGPT2Config(tie_word_embeddings=False, kronecker=dataclasses.asdict(KroneckerSpec())))
    left, right = sizes(student), sizes(teacher)
    return left == right, float(sum(a == b for a, b in zip(left, right, strict=True))), f"of {len(right)} widths"


def _width(module) -> int:
    """Outputs of a dense, Kronecker or fused layer."""
    if hasattr(module, "nf"):
        return module.nf
    return module.out_features if hasattr(module, "out_features") else sum(part.out_features for part in module.children())


def embedding_share() -> tuple[bool, float, str]:
    """GPT-2 small's token embedding as a share of its parameters; "a large portion" is read as at least a quarter."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config())
    share = model.transformer.wte.weight.numel() / sum(p.numel() for p in model.parameters())
    return share >= 0.25, share, "of all parameters"


CHECKS: dict[str, Callable[[], tuple[bool, float, str]]] = {
    f.__name__: functools.cache(f) for f in (determinant, distributive, inverse, transpose, factor_four, lookup, nearest, dimensions, embedding_share)
}
