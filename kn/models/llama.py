"""KnLlama: Llama-type models with Kronecker products (nn.Linear, grouped key and value heads, gated feed-forward, rotary positions).

Evidence that the method carries over. What folds exactly is less than in GPT-2: rotary positions turn the two queries of
a pair by different angles, so query and key keep their width; values, the output projection and the feed-forward halve:
  values       rows of attention sum to one, so W_o (Σ_t p_t v_t) reads v = e⊗b_v + β_v only through b_v, head by head
  feed-forward z_k = Σ_j c_j g(b_j a_k + β_jk) (b'_j e_k + β'_jk) for gate a⊗b + β and up e⊗b' + β'
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, LlamaModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb, eager_attention_forward

from kn.models.base import KroneckerModel
from kn.models.config import KnLlamaConfig
from kn.models.fold import in_parts, narrow_heads, shared

GATED = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


class NarrowValues(LlamaAttention):
    """Llama's attention with values, value cache and output projection at 1/f of the width."""

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, past_key_values=None, **kwargs):
        lead = hidden_states.shape[:-1]  # (batch, length)
        q, k = (proj(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for proj in (self.q_proj, self.k_proj))
        v = self.v_proj(hidden_states).unflatten(-1, (k.shape[1], -1)).transpose(1, 2)  # (batch, key heads, length, head_dim / f)
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        width = v.shape[-1]
        if self.config._attn_implementation != "eager":  # fused attention wants values as wide as queries; the zeros cost less than the unfused way
            v = nn.functional.pad(v, (0, self.head_dim - width))
        mixed, weights = attend(self, q, k, v, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs)
        return self.o_proj(mixed[..., :width].reshape(*lead, -1)), weights


class Values:
    """Values and the output projection of Llama's attention; the value cache is half as wide at factor 2."""

    paths = ("self_attn.v_proj", "self_attn.o_proj")

    @staticmethod
    def factor(block: nn.Module, plan: dict) -> int:
        """The factor f by which the part can be narrower; ValueError where it cannot."""
        return narrow_heads(plan, "self_attn.v_proj", block.self_attn.head_dim)

    @staticmethod
    def install(block: nn.Module, factor: int) -> None:
        """Put empty narrow layers into a block that is still dense, in place."""
        attn, dtype = block.self_attn, block.self_attn.o_proj.weight.dtype
        attn.__class__ = NarrowValues  # same parameters but for the two layers below
        width, heads, values = attn.o_proj.out_features, attn.o_proj.in_features, attn.v_proj.out_features
        biased = attn.v_proj.bias is not None or attn.o_proj.bias is not None
        attn.v_proj = nn.Linear(width, values // factor, bias=False, dtype=dtype)
        attn.o_proj = nn.Linear(heads // factor, width, bias=biased, dtype=dtype)

    @staticmethod
    def state(block: nn.Module, factor: int) -> dict[str, Tensor]:
        """The narrow layers' parameters, made of a compressed block's, in its dtype."""
        attn = block.self_attn
        value, out = attn.v_proj, attn.o_proj
        dense = out.weight  # (d, heads · head_dim), Kronecker or not
        state = {"self_attn.v_proj.weight": value.A[0].clone(), "self_attn.o_proj.weight": dense.unflatten(1, (-1, factor)) @ value.B[0, :, 0]}
        if value.bias is not None or out.bias is not None:
            bias = torch.zeros_like(dense[:, 0]) if out.bias is None else out.bias
            if value.bias is not None:  # every query head reads its group's β_v
                bias = bias + dense @ value.bias.view(-1, attn.head_dim).repeat_interleave(attn.num_key_value_groups, 0).flatten()
            state["self_attn.o_proj.bias"] = bias.clone()
        return state


class NarrowGatedFeedForward(nn.Module):
    """y = A z with z_k = Σ_j c_j g(b_j a_k + β_jk) (b'_j e_k + β'_jk), a and e of the gate's and up's factors."""

    def __init__(self, width: int, inner: int, factor: int, activation: nn.Module, biased: bool, dtype: torch.dtype):
        super().__init__()
        self.act_fn, self.factor = activation, factor
        self.gate_proj, self.up_proj = (nn.Linear(width, inner, bias=False, dtype=dtype) for _ in range(2))
        self.down_proj = nn.Linear(inner, width, bias=biased, dtype=dtype)
        self.gate_scale, self.weight = (nn.Parameter(torch.ones(factor, dtype=dtype)) for _ in range(2))  # b and c·b'
        self.gate_bias, self.up_bias = (nn.Parameter(torch.zeros(factor, inner, dtype=dtype)) if biased else None for _ in range(2))  # β and c·β'

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(in_parts(self.mix, self.gate_proj(x), self.up_proj(x)))

    def mix(self, a: Tensor, e: Tensor, out: Tensor | None = None) -> Tensor:
        """z (…, inner) from a and e (…, inner), into `out` if given."""
        z = torch.mul(*self._term(0, a, e), out=out)
        for j in range(1, self.factor):
            z = torch.addcmul(z, *self._term(j, a, e), out=out)
        return torch.mul(z, e, out=out) if self.up_bias is None else z

    def _term(self, j: int, a: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        """g(b_j a + β_j), and what multiplies it: c_j (b'_j e + β'_j), or without biases c_j b'_j alone."""
        if self.gate_bias is None:
            return self.act_fn(a * self.gate_scale[j]), self.weight[j]
        return self.act_fn(torch.addcmul(self.gate_bias[j], a, self.gate_scale[j])), torch.addcmul(self.up_bias[j], e, self.weight[j])


class GatedFeedForward:
    """Llama's feed-forward network: all three products at 1/f of the inner width."""

    paths = GATED

    @staticmethod
    def factor(block: nn.Module, plan: dict) -> int:
        """The factor f by which the part can be narrower; ValueError where it cannot."""
        return shared(plan, GATED[:2], GATED[2:])

    @staticmethod
    def install(block: nn.Module, factor: int) -> None:
        """Put empty narrow layers into a block that is still dense, in place."""
        mlp = block.mlp
        gate = mlp.gate_proj
        block.mlp = NarrowGatedFeedForward(gate.in_features, gate.out_features // factor, factor, mlp.act_fn, gate.bias is not None, gate.weight.dtype)

    @staticmethod
    def state(block: nn.Module, factor: int) -> dict[str, Tensor]:
        """The narrow layers' parameters, made of a compressed block's, in its dtype."""
        gate, up, down = (block.get_submodule(path) for path in GATED)
        weight = down.B[0, 0]  # c
        state = {f"{path}.weight": layer.A[0].clone() for path, layer in zip(GATED, (gate, up, down), strict=True)}
        state |= {"mlp.gate_scale": gate.B[0, :, 0].clone(), "mlp.weight": weight * up.B[0, :, 0]}
        if gate.bias is not None:
            state |= {
                "mlp.gate_bias": gate.bias.unflatten(0, (-1, factor)).T.contiguous(),
                "mlp.up_bias": (up.bias.unflatten(0, (-1, factor)) * weight).T.contiguous(),
                "mlp.down_proj.bias": down.bias.clone(),
            }
        return state


class _KnLlama(KroneckerModel):
    config_class = KnLlamaConfig
    blocks, table = "layers", "embed_tokens"
    matrices = {
        **{f"self_attn.{name}_proj": ("outputs", 1) for name in "qkv"}, "self_attn.o_proj": ("inputs", 1),
        "mlp.gate_proj": ("outputs", 1), "mlp.up_proj": ("outputs", 1), "mlp.down_proj": ("inputs", 1),
    }  # fmt: skip
    out_proj = "self_attn.o_proj"
    narrow = (Values, GatedFeedForward)
    _tied_weights_keys = {}  # a dense head is a clone; model.py ties a Kronecker one


class KnLlamaModel(_KnLlama, LlamaModel):
    """Llama without a head, its matrices Kronecker products (eq. 1); last_hidden_state (batch, length, width)."""

    dense_class = LlamaModel


class KnLlamaForCausalLM(_KnLlama, LlamaForCausalLM):
    """Llama as language model, its matrices Kronecker products (eq. 1); logits (batch, length, vocabulary)."""

    dense_class = LlamaForCausalLM


class KnLlamaForSequenceClassification(_KnLlama, LlamaForSequenceClassification):
    """Llama as sequence classifier on the last token that is not padding, its matrices Kronecker products (eq. 1); logits (batch, labels)."""

    dense_class = LlamaForSequenceClassification


COMPRESSED_CLASSES = {model.dense_class: model for model in (KnLlamaModel, KnLlamaForCausalLM, KnLlamaForSequenceClassification)}
