"""Exact narrow inference: a compressed layer whose factors run at 1/f of the width (MATH.md §3); nothing is approximated.

With f = spec.factor, B of shape (f, 1) for query, key, value and c_fc, and (1, f) for c_proj:
  attention  q·k = Σ_i (s a_i + u_i) c_i + terms equal for all keys, s = b_q·b_k, u_i = Σ_j β_q[f i + j] b_k[j];
             the output projection reads value pairs only through b_v, and rows of attention sum to one, so β_v joins its bias
  FFN        Σ_j b'_j gelu(b_j a_k + β[f k + j]) is formed before the second product: the wide activation is never multiplied
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .kronecker import KroneckerLinear


class FoldedActivation(nn.Module):
    """z_k = Σ_j c_j g(b_j a_k + β_jk), for a (…, width) → z (…, width); g is the model's activation."""

    def __init__(self, width: int, factor: int, activation: nn.Module):
        super().__init__()
        self.activation = activation
        self.scale = nn.Parameter(torch.ones(factor))  # b, of c_fc
        self.weight = nn.Parameter(torch.ones(factor))  # c, the B of c_proj
        self.bias = nn.Parameter(torch.zeros(factor, width))  # β

    def forward(self, a: Tensor) -> Tensor:
        parts = (self.activation(torch.addcmul(bias, a, scale)) * weight for scale, weight, bias in zip(self.scale, self.weight, self.bias, strict=True))
        return sum(parts)


def install_narrow(transformer: nn.Module, spec) -> None:
    """Put empty narrow layers where `spec` compresses: the module tree stays GPT-2's, heads are 1/f as wide."""
    if spec.rank != 1:
        raise ValueError(f"fold needs rank 1, this model has rank {spec.rank}: a sum of {spec.rank} products is not narrower than the dense layer at factor {spec.factor}")
    for index in spec.indices(len(transformer.h)):
        attn, mlp = transformer.h[index].attn, transformer.h[index].mlp
        if attn.head_dim % spec.factor:
            raise ValueError(f"fold needs heads that factor {spec.factor} divides, they are {attn.head_dim} wide")
        width, narrow, inner = attn.embed_dim, attn.embed_dim // spec.factor, mlp.c_fc.weight.shape[-1] // spec.factor
        dtype = attn.c_proj.weight.dtype
        attn.head_dim, attn.split_size = attn.head_dim // spec.factor, narrow  # attn.scaling stays that of the wide heads
        attn.c_attn, attn.c_proj = Conv1D(3 * narrow, width).to(dtype), Conv1D(width, narrow).to(dtype)
        mlp.act = FoldedActivation(inner, spec.factor, mlp.act).to(dtype)
        mlp.c_fc, mlp.c_proj = nn.Linear(width, inner, bias=False, dtype=dtype), Conv1D(width, inner).to(dtype)


@torch.no_grad()
def narrow_state(model: nn.Module) -> dict[str, Tensor]:
    """State dictionary of the folded model from a compressed one; Conv1D weights are (in, out)."""
    state, factor = dict(model.state_dict()), model.config.spec.factor
    for index in model.config.spec.indices(model.config.n_layer):
        block, name = model.transformer.h[index], f"transformer.h.{index}"
        for path in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
            for part in ("A", "B", "bias", "weight"):
                state.pop(f"{name}.{path}.{part}", None)
        (a_q, a_k, a_v), (b_q, b_k, b_v) = block.attn.c_attn.A, block.attn.c_attn.B[..., 0]  # (d/f, d) and (f,) each
        beta_q, _, beta_v = block.attn.c_attn.bias.chunk(3)
        u = beta_q.unflatten(0, (-1, factor)) @ b_k
        state[f"{name}.attn.c_attn.weight"] = torch.cat([(b_q @ b_k) * a_q, a_k, a_v]).T.contiguous()
        state[f"{name}.attn.c_attn.bias"] = torch.cat([u, torch.zeros_like(u), torch.zeros_like(u)])
        out = block.attn.c_proj
        dense = out.weight if isinstance(out, KroneckerLinear) else out.weight.T  # (d, d)
        state[f"{name}.attn.c_proj.weight"] = (dense.unflatten(1, (-1, factor)) @ b_v).T.contiguous()
        state[f"{name}.attn.c_proj.bias"] = out.bias + dense @ beta_v
        fc, proj = block.mlp.c_fc, block.mlp.c_proj
        state[f"{name}.mlp.c_fc.weight"] = fc.A[0].clone()
        state[f"{name}.mlp.act.scale"], state[f"{name}.mlp.act.weight"] = fc.B[0, :, 0].clone(), proj.B[0, 0].clone()
        state[f"{name}.mlp.act.bias"] = fc.bias.unflatten(0, (-1, factor)).T.contiguous()
        state[f"{name}.mlp.c_proj.weight"], state[f"{name}.mlp.c_proj.bias"] = proj.A[0].T.contiguous(), proj.bias.clone()
    return state


def fold(model: nn.Module):
    """A model of the same class and logits (rounding aside) for inference: half the work and KV cache in compressed layers at factor 2.

    Raises ValueError for a folded model, rank > 1, or heads that the factor does not divide.
    """
    if model.config.folded:
        raise ValueError("this model is folded already")
    config = copy.deepcopy(model.config)
    config.folded = True
    with torch.device(model.device):
        narrow = type(model)(config).to(model.dtype)
    narrow.load_state_dict(narrow_state(model))
    return narrow.eval()
