"""KnGPT2: GPT-2 with a Kronecker embedding and chosen layers (§3.2 of the paper), and its exact folding.

GPT-2's module tree is kept. What fold() makes narrow, with a = A x the factor's output, b its B, β its bias:
  attention  q·k = Σ_i (s a_i + u_i) c_i + terms equal for all keys, for a and c of query and key,
             s = b_q·b_k and u_i = Σ_j β_q[f·i + j] b_k[j]. The output projection reads values only through
             b_v, and the rows of the attention sum to one, so β_v joins the projection's bias.
  MLP        Σ_j c_j g(b_j a_k + β[f·k + j]), c the B of c_proj, is formed before the second product."""

import copy

import torch
from torch import Tensor, nn
from transformers import GPT2ForSequenceClassification, GPT2LMHeadModel, GPT2Model
from transformers.activations import NewGELUActivation
from transformers.pytorch_utils import Conv1D

from kn.kronecker.layers import KroneckerLinear
from kn.models.base import KroneckerModel
from kn.models.config import KnGPT2Config
from kn.models.fold import FoldablePart, apply_in_row_chunks


def widen_paged_states(attn: nn.Module, args: tuple, kwargs: dict) -> tuple | None:
    """Forward pre-hook: narrow keys and values are padded to the pages of a continuous batch."""
    if (cache := kwargs.get("cache")) is None:
        return None

    def update(key_states, value_states, **others):
        missing = (0, attn.embed_dim // attn.num_heads - attn.head_dim)
        padded = (nn.functional.pad(x, missing) for x in (key_states, value_states))
        return tuple(x[..., : attn.head_dim] for x in cache.update(*padded, **others))
    wide = copy.copy(cache)  # of the same class, with the same pages
    wide.update = update
    return args, {**kwargs, "cache": wide}


class GPT2AttentionFold(FoldablePart):
    """GPT-2's attention with heads at 1/f of their width: half the key and value cache at factor 2."""

    paths, outputs, attention = ("attn.c_attn", "attn.c_proj"), ("attn.c_attn",), "attn"

    @staticmethod
    def install(block: nn.Module, factor: int) -> None:
        """Narrow c_attn (d → 3·d/f) and c_proj (d/f → d)."""
        attn, dtype = block.attn, block.attn.c_proj.weight.dtype
        width, narrow = attn.embed_dim, attn.embed_dim // factor
        attn.head_dim //= factor  # attn.scaling stays that of the wide heads
        attn.split_size = narrow
        attn.register_forward_pre_hook(widen_paged_states, with_kwargs=True)
        attn.c_attn, attn.c_proj = Conv1D(3 * narrow, width).to(dtype), Conv1D(width, narrow).to(dtype)

    @staticmethod
    def folded_state_dict(block: nn.Module, factor: int) -> dict[str, Tensor]:
        """Parameters of the narrow c_attn and c_proj, Conv1D's weights (in, out)."""
        qkv, out = block.attn.c_attn, block.attn.c_proj
        (a_q, a_k, a_v), (b_q, b_k, b_v) = qkv.A, qkv.B[..., 0]  # (d/f, d) and (f) each
        beta_q, _, beta_v = qkv.bias.chunk(3)
        u = beta_q.unflatten(0, (-1, factor)) @ b_k  # (d/f)
        dense = out.weight if isinstance(out, KroneckerLinear) else out.weight.T  # (d, d)
        return {
            "attn.c_attn.weight": torch.cat([(b_q @ b_k) * a_q, a_k, a_v]).T.contiguous(),
            "attn.c_attn.bias": torch.cat([u, torch.zeros_like(u), torch.zeros_like(u)]),
            "attn.c_proj.weight": (dense.unflatten(1, (-1, factor)) @ b_v).T.contiguous(),
            "attn.c_proj.bias": out.bias + dense @ beta_v,
        }


class FoldedActivation(nn.Module):
    """z_k = Σ_j c_j g(b_j a_k + β_jk) from its first argument t = b_0 a + β_0; t and z are (…, width).
    The other arguments of g are r_j t + γ_j with r_j = b_j / b_0 and γ_j = β_j − r_j β_0; b_0 is the largest
    entry, so |r_j| ≤ 1. g is the model's activation."""

    def __init__(self, width: int, factor: int, activation: nn.Module):
        super().__init__()
        if isinstance(activation, NewGELUActivation):
            activation = nn.GELU(approximate="tanh")  # the same function in one pass
        self.activation = activation
        self.weight = nn.Parameter(torch.ones(factor))  # c
        self.ratio = nn.Parameter(torch.ones(factor - 1))  # r
        self.bias = nn.Parameter(torch.zeros(factor - 1, width))  # γ

    def forward(self, t: Tensor) -> Tensor:
        return apply_in_row_chunks(self.weighted_sum, t)

    def weighted_sum(self, t: Tensor, out: Tensor | None = None) -> Tensor:
        """z for some rows t (…, width), written to `out` if given."""
        z = torch.mul(self.activation(t), self.weight[0], out=out)
        for ratio, bias, weight in zip(self.ratio, self.bias, self.weight[1:], strict=True):
            z = torch.addcmul(z, self.activation(torch.addcmul(bias, t, ratio)), weight, out=out)
        return z


class GPT2MLPFold(FoldablePart):
    """GPT-2's MLP with both products at 1/f of the inner width."""

    paths, outputs, inputs = ("mlp.c_fc", "mlp.c_proj"), ("mlp.c_fc",), ("mlp.c_proj",)

    @staticmethod
    def install(block: nn.Module, factor: int) -> None:
        """Narrow c_fc and c_proj, and a FoldedActivation between them."""
        mlp, dtype = block.mlp, block.mlp.c_fc.weight.dtype
        width, inner = mlp.c_fc.weight.shape[0], mlp.c_fc.weight.shape[1] // factor
        mlp.act = FoldedActivation(inner, factor, mlp.act).to(dtype)
        mlp.c_fc, mlp.c_proj = Conv1D(inner, width).to(dtype), Conv1D(width, inner).to(dtype)

    @staticmethod
    def folded_state_dict(block: nn.Module, factor: int) -> dict[str, Tensor]:
        """Parameters of the narrow c_fc, act and c_proj; the activation's terms are in the order of |b|."""
        fc, proj = block.mlp.c_fc, block.mlp.c_proj
        b, c = fc.B[0, :, 0], proj.B[0, 0]  # (f) each
        order = b.abs().argsort(descending=True)
        b, c, beta = b[order], c[order], fc.bias.unflatten(0, (-1, factor)).T[order]  # β (f, inner/f)
        ratio = (b / b[0])[1:] if b[0] else torch.zeros_like(b[1:])
        return {
            "mlp.c_fc.weight": (b[0] * fc.A[0]).T.contiguous(), "mlp.c_fc.bias": beta[0].contiguous(),
            "mlp.act.weight": c, "mlp.act.ratio": ratio, "mlp.act.bias": beta[1:] - ratio[:, None] * beta[0],
            "mlp.c_proj.weight": proj.A[0].T.contiguous(), "mlp.c_proj.bias": proj.bias.clone(),
        }


class _KnGPT2(KroneckerModel):
    config_class = KnGPT2Config
    blocks_path, embedding_path = "h", "wte"
    # B is (f, 1) where outputs share an entry of A and (1, f) where inputs do (Table 1); c_attn fuses q, k, v
    target_modules = {
        "attn.c_attn": ("outputs", 3), "attn.c_proj": ("inputs", 1),
        "mlp.c_fc": ("outputs", 1), "mlp.c_proj": ("inputs", 1),
    }
    out_proj = "attn.c_proj"
    foldable_parts = (GPT2AttentionFold, GPT2MLPFold)
    _tied_weights_keys = {}  # a dense head is a clone; base.py ties a Kronecker one


class KnGPT2Model(_KnGPT2, GPT2Model):
    """KnGPT2 (§3.2 of the paper) without a head; last_hidden_state (batch, length, d)."""


class KnGPT2LMHeadModel(_KnGPT2, GPT2LMHeadModel):
    """KnGPT2 (§3.2 of the paper) as language model; logits (batch, length, v), head as in spec."""


class KnGPT2ForSequenceClassification(_KnGPT2, GPT2ForSequenceClassification):
    """KnGPT2 (§3.2 of the paper) as sequence classifier, read at the last token; logits (batch, labels)."""


COMPRESSED_CLASSES = {
    model.dense_class: model for model in (KnGPT2Model, KnGPT2LMHeadModel, KnGPT2ForSequenceClassification)
}
