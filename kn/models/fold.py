"""Exact narrow inference: compressed layers that run at 1/f of the width (MATH.md §3); nothing is approximated.

A part of a block can run narrow where its B's are (f, 1) on the way in and (1, f) on the way out, at rank 1. For GPT-2:
  attention  q·k = Σ_i (s a_i + u_i) c_i + terms equal for all keys, s = b_q·b_k, u_i = Σ_j β_q[f i + j] b_k[j];
             the output projection reads value pairs only through b_v, and rows of attention sum to one, so β_v joins its bias
  FFN        Σ_j b'_j g(b_j a_k + β[f k + j]) is formed before the second product: the wide activation is never multiplied
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers.activations import NewGELUActivation
from transformers.pytorch_utils import Conv1D

from kn.kronecker.layers import KroneckerLinear

Plan = dict[str, tuple[tuple[int, int], int]]  # matrix of a block: B's shape and the rank
# Rows of an activation's work on a CPU at a time, so that its buffers stay in the cache. 768→3072→768, 1,024 rows, two threads,
# float32, times the dense network: 1.60 all at once, 1.75-1.84 with 64, 1.92 with 128, 1.97 with 256 rows; the products alone 2.3.
ROWS = 256


def shared(plan: Plan, outputs: tuple[str, ...], inputs: tuple[str, ...] = ()) -> int:
    """The factor f of a part with B (f, 1) in `outputs` and (1, f) in `inputs`; ValueError says why it cannot run narrow."""
    for path in (*outputs, *inputs):
        if path not in plan:
            raise ValueError(f"fold needs a compressed {path}, this one is dense")
        if plan[path][1] != 1:
            rank = plan[path][1]
            raise ValueError(f"fold needs rank 1, this model has rank {rank}: a sum of {rank} products is not narrower than the dense layer at factor {max(plan[path][0])}")
    factor = plan[outputs[0]][0][0]
    for path, wanted in [(path, (factor, 1)) for path in outputs] + [(path, (1, factor)) for path in inputs]:
        if plan[path][0] != wanted:
            raise ValueError(f"fold needs B {wanted[0]}x{wanted[1]} in {path}, this model has {plan[path][0][0]}x{plan[path][0][1]}")
    return factor


def narrow_heads(plan: Plan, path: str, size: int) -> int:
    """The factor of the heads that `path` projects to, each `size` wide; ValueError where they cannot be 1/f as wide."""
    factor = shared(plan, (path,))  # what reads them may be anything
    if size % factor:
        raise ValueError(f"fold needs heads that factor {factor} divides, they are {size} wide")
    return factor


def in_parts(function, *inputs: Tensor) -> Tensor:
    """function(*inputs, out) for inputs and output of one shape, on a CPU some rows at a time where no gradient is wanted."""
    first = inputs[0]
    if first.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling() or first.numel() <= ROWS * first.shape[-1]:
        return function(*inputs)
    result = torch.empty_like(first, memory_format=torch.contiguous_format)
    for parts in zip(*(t.flatten(0, -2).split(ROWS) for t in (*inputs, result)), strict=True):
        function(*parts)
    return result


class FoldedActivation(nn.Module):
    """z_k = Σ_j c_j g(b_j a_k + β_jk) from its first term's argument t = b_0 a + β_0, for t (…, width) → z (…, width).

    The other arguments are r_j t + γ_j with r_j = b_j / b_0 and γ_j = β_j − r_j β_0; b_0 is the largest, so |r_j| ≤ 1.
    g is the model's activation.
    """

    def __init__(self, width: int, factor: int, activation: nn.Module):
        super().__init__()
        self.activation = nn.GELU(approximate="tanh") if isinstance(activation, NewGELUActivation) else activation  # the same function in one pass
        self.weight = nn.Parameter(torch.ones(factor))  # c, the B of c_proj
        self.ratio = nn.Parameter(torch.ones(factor - 1))  # r
        self.bias = nn.Parameter(torch.zeros(factor - 1, width))  # γ

    def forward(self, t: Tensor) -> Tensor:
        return in_parts(self.mix, t)

    def mix(self, t: Tensor, out: Tensor | None = None) -> Tensor:
        """forward for some rows (…, width), into `out` if given."""
        z = torch.mul(self.activation(t), self.weight[0], out=out)
        for ratio, bias, weight in zip(self.ratio, self.bias, self.weight[1:], strict=True):
            z = torch.addcmul(z, self.activation(torch.addcmul(bias, t, ratio)), weight, out=out)
        return z

    @staticmethod
    def state(b: Tensor, c: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(b_0, β_0, the module's parameters) from b (f), c (f) and β (width·f, pairs side by side); the terms are put in the order of |b|."""
        order = b.abs().argsort(descending=True)
        b, c, beta = b[order], c[order], beta.unflatten(0, (-1, len(b))).T[order]  # β (f, width)
        ratio = (b / b[0])[1:] if b[0] else torch.zeros_like(b[1:])
        return b[0], beta[0].contiguous(), {"weight": c, "ratio": ratio, "bias": beta[1:] - ratio[:, None] * beta[0]}


class Attention:
    """GPT-2's attention: narrow heads, half the key and value cache at factor 2."""

    paths = ("attn.c_attn", "attn.c_proj")

    @staticmethod
    def factor(block: nn.Module, plan: Plan) -> int:
        """The factor f by which the part can be narrower; ValueError where it cannot."""
        return narrow_heads(plan, "attn.c_attn", block.attn.head_dim)

    @staticmethod
    def install(block: nn.Module, factor: int) -> None:
        """Put empty narrow layers into a block that is still dense, in place."""
        attn, dtype = block.attn, block.attn.c_proj.weight.dtype
        width, narrow = attn.embed_dim, attn.embed_dim // factor
        attn.head_dim, attn.split_size = attn.head_dim // factor, narrow  # attn.scaling stays that of the wide heads
        attn.c_attn, attn.c_proj = Conv1D(3 * narrow, width).to(dtype), Conv1D(width, narrow).to(dtype)

    @staticmethod
    def state(block: nn.Module, factor: int) -> dict[str, Tensor]:
        """The narrow layers' parameters, made of a compressed block's, in its dtype."""
        (a_q, a_k, a_v), (b_q, b_k, b_v) = block.attn.c_attn.A, block.attn.c_attn.B[..., 0]  # (d/f, d) and (f,) each
        beta_q, _, beta_v = block.attn.c_attn.bias.chunk(3)
        u = beta_q.unflatten(0, (-1, factor)) @ b_k
        out = block.attn.c_proj
        dense = out.weight if isinstance(out, KroneckerLinear) else out.weight.T  # (d, d)
        return {
            "attn.c_attn.weight": torch.cat([(b_q @ b_k) * a_q, a_k, a_v]).T.contiguous(),
            "attn.c_attn.bias": torch.cat([u, torch.zeros_like(u), torch.zeros_like(u)]),
            "attn.c_proj.weight": (dense.unflatten(1, (-1, factor)) @ b_v).T.contiguous(),
            "attn.c_proj.bias": out.bias + dense @ beta_v,
        }


class FeedForward:
    """GPT-2's feed-forward network: both products at 1/f of the inner width."""

    paths = ("mlp.c_fc", "mlp.c_proj")

    @staticmethod
    def factor(block: nn.Module, plan: Plan) -> int:
        """The factor f by which the part can be narrower; ValueError where it cannot."""
        return shared(plan, ("mlp.c_fc",), ("mlp.c_proj",))

    @staticmethod
    def install(block: nn.Module, factor: int) -> None:
        """Put empty narrow layers into a block that is still dense, in place."""
        mlp, dtype = block.mlp, block.mlp.c_fc.weight.dtype
        width, inner = mlp.c_fc.weight.shape[0], mlp.c_fc.weight.shape[1] // factor
        mlp.act = FoldedActivation(inner, factor, mlp.act).to(dtype)
        mlp.c_fc, mlp.c_proj = Conv1D(inner, width).to(dtype), Conv1D(width, inner).to(dtype)

    @staticmethod
    def state(block: nn.Module, factor: int) -> dict[str, Tensor]:
        """The narrow layers' parameters, made of a compressed block's, in its dtype."""
        fc, proj = block.mlp.c_fc, block.mlp.c_proj
        first, bias, activation = FoldedActivation.state(fc.B[0, :, 0], proj.B[0, 0], fc.bias)
        return {
            "mlp.c_fc.weight": (first * fc.A[0]).T.contiguous(),
            "mlp.c_fc.bias": bias,
            **{f"mlp.act.{name}": value for name, value in activation.items()},
            "mlp.c_proj.weight": proj.A[0].T.contiguous(),
            "mlp.c_proj.bias": proj.bias.clone(),
        }


def foldable(blocks: nn.ModuleList, plan: Plan, parts: tuple) -> list[tuple[int, type, int]]:
    """(layer, part, factor) of all that can run narrow; ValueError, with the first reason, where nothing can."""
    found, reasons = [], []
    for index in sorted({int(name.partition(".")[0]) for name in plan}):
        of_block = {name.partition(".")[2]: value for name, value in plan.items() if name.startswith(f"{index}.")}
        for part in parts:
            try:
                found.append((index, part, part.factor(blocks[index], of_block)))
            except ValueError as reason:
                reasons.append(reason)
    if not found:
        if not reasons:
            raise ValueError("fold needs compressed layers, this model has none")
        raise min(reasons, key=lambda reason: "this one is dense" in str(reason))  # whoever left a matrix dense knows it
    return found


def install_narrow(blocks: nn.ModuleList, plan: Plan, parts: tuple) -> set[str]:
    """Put empty narrow layers into blocks that are still dense, and return what they replace; the module tree stays the same."""
    replaced = set()
    for index, part, factor in foldable(blocks, plan, parts):
        part.install(blocks[index], factor)
        replaced |= {f"{index}.{path}" for path in part.paths}
    return replaced


@torch.no_grad()
def fold(model: nn.Module) -> nn.Module:
    """A model of the same class and logits (rounding aside) for inference: half the work and KV cache in compressed layers at factor 2.

    What cannot run narrow exactly stays as it is. Raises ValueError for a folded model and where nothing can.
    """
    if model.config.folded:
        raise ValueError("this model is folded already")
    base = model.base_model
    blocks = base.get_submodule(model.blocks)
    where = f"{model.blocks}." if base is model else f"{model.base_model_prefix}.{model.blocks}."
    plan = model.plan(len(blocks))
    state = dict(model.state_dict())
    for index, part, factor in foldable(blocks, plan, model.narrow):
        prefix = f"{where}{index}."
        replaced = tuple(f"{prefix}{path}." for path in part.paths)
        state = {name: value for name, value in state.items() if not name.startswith(replaced)}
        state |= {prefix + name: value for name, value in part.state(blocks[index], factor).items()}
    config = copy.deepcopy(model.config)
    config.folded = True
    with torch.device(model.device):
        narrow = type(model)(config).to(model.dtype)
    narrow.load_state_dict(state)
    if model.can_generate():
        narrow.generation_config = copy.deepcopy(model.generation_config)
    return narrow.eval()
