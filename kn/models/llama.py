"""KnLlama: Llama models with Kronecker products (eq. 1), and their exact folding.

Llama has nn.Linear, grouped key and value heads, a gated MLP and rotary positions, which turn the queries
that share an entry of A by different angles: query and key keep their width, while values, output projection
and MLP become narrow.
  values  rows of the attention sum to one, so W_o (Σ_t p_t v_t) reads v = e ⊗ b_v + β_v only through b_v
  MLP     z_k = Σ_j c_j g(b_j a_k + β_jk) (b'_j e_k + β'_jk) for the gate a ⊗ b + β and up e ⊗ b' + β'"""

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, LlamaModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

from kn.models.base import KroneckerModel
from kn.models.config import KnLlamaConfig
from kn.models.fold import FoldablePart, apply_in_row_chunks

GATED = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


class NarrowValueAttention(modeling_llama.LlamaAttention):
    """Llama's attention with values, value cache and output projection at 1/f of their width."""

    def forward(self, hidden_states, position_embeddings, attention_mask, past_key_values=None, **kwargs):
        batch = hidden_states.shape[:-1]  # (batch, length)
        q, k = self.q_proj(hidden_states), self.k_proj(hidden_states)
        q, k = (t.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for t in (q, k))  # (…, heads, length, e)
        v = self.v_proj(hidden_states).unflatten(-1, (k.shape[1], -1)).transpose(1, 2)  # (…, e / f)
        q, k = modeling_llama.apply_rotary_pos_emb(q, k, *position_embeddings)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        implementation, width = self.config._attn_implementation, v.shape[-1]
        eager = modeling_llama.eager_attention_forward
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)
        if implementation != "eager":  # fused kernels need values of e columns; zeros are cheap
            v = nn.functional.pad(v, (0, self.head_dim - width))
        mixed, weights = attention(self, q, k, v, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs)
        return self.o_proj(mixed[..., :width].reshape(*batch, -1)), weights


class LlamaValueFold(FoldablePart):
    """Values and output projection of Llama's attention; half the value cache at factor 2."""

    paths, outputs = ("self_attn.v_proj", "self_attn.o_proj"), ("self_attn.v_proj",)
    attention = "self_attn"

    @staticmethod
    def install(block: nn.Module, factor: int) -> None:
        """Narrow v_proj and o_proj, read by a NarrowValueAttention."""
        attn, dtype = block.self_attn, block.self_attn.o_proj.weight.dtype
        attn.__class__ = NarrowValueAttention  # same parameters but for the two layers below
        width, heads, values = attn.o_proj.out_features, attn.o_proj.in_features, attn.v_proj.out_features
        has_bias = attn.v_proj.bias is not None or attn.o_proj.bias is not None
        attn.v_proj = nn.Linear(width, values // factor, bias=False, dtype=dtype)
        attn.o_proj = nn.Linear(heads // factor, width, bias=has_bias, dtype=dtype)

    @staticmethod
    def folded_state_dict(block: nn.Module, factor: int) -> dict[str, Tensor]:
        """Parameters of the narrow v_proj and o_proj; v_proj's bias joins o_proj's."""
        attn = block.self_attn
        value, out, dense = attn.v_proj, attn.o_proj, attn.o_proj.weight  # (d, heads · head_dim)
        state = {
            "self_attn.v_proj.weight": value.A[0].clone(),
            "self_attn.o_proj.weight": dense.unflatten(1, (-1, factor)) @ value.B[0, :, 0],
        }
        if value.bias is not None or out.bias is not None:
            bias = torch.zeros_like(dense[:, 0]) if out.bias is None else out.bias
            if value.bias is not None:  # every query head reads its group's β_v
                beta = value.bias.view(-1, attn.head_dim).repeat_interleave(attn.num_key_value_groups, 0)
                bias = bias + dense @ beta.flatten()
            state["self_attn.o_proj.bias"] = bias.clone()
        return state


class NarrowGatedMLP(nn.Module):
    """y = A z, z_k = Σ_j c_j g(b_j a_k + β_jk) (b'_j e_k + β'_jk), a and e narrow gate and up projections."""

    def __init__(self, width: int, inner: int, factor: int, activation: nn.Module, bias: bool, dtype):
        super().__init__()
        self.act_fn, self.factor = activation, factor
        self.gate_proj, self.up_proj = (nn.Linear(width, inner, bias=False, dtype=dtype) for _ in range(2))
        self.down_proj = nn.Linear(inner, width, bias=bias, dtype=dtype)
        self.gate_scale = nn.Parameter(torch.ones(factor, dtype=dtype))  # b
        self.weight = nn.Parameter(torch.ones(factor, dtype=dtype))  # c·b'
        zeros = [nn.Parameter(torch.zeros(factor, inner, dtype=dtype)) if bias else None for _ in range(2)]
        self.gate_bias, self.up_bias = zeros  # β and c·β'

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(apply_in_row_chunks(self.gated_sum, self.gate_proj(x), self.up_proj(x)))

    def gated_sum(self, a: Tensor, e: Tensor, out: Tensor | None = None) -> Tensor:
        """z (…, inner) from a and e (…, inner), written to `out` if given."""
        z = torch.mul(*self._term(0, a, e), out=out)
        for j in range(1, self.factor):
            z = torch.addcmul(z, *self._term(j, a, e), out=out)
        return torch.mul(z, e, out=out) if self.up_bias is None else z

    def _term(self, j: int, a: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        """g(b_j a + β_j) and its multiplier c_j (b'_j e + β'_j), or c_j b'_j alone without biases."""
        if self.gate_bias is None:
            return self.act_fn(a * self.gate_scale[j]), self.weight[j]
        gate = self.act_fn(torch.addcmul(self.gate_bias[j], a, self.gate_scale[j]))
        return gate, torch.addcmul(self.up_bias[j], e, self.weight[j])


class LlamaMLPFold(FoldablePart):
    """Llama's gated MLP with all three products at 1/f of the inner width."""

    paths, outputs, inputs = GATED, GATED[:2], GATED[2:]

    @staticmethod
    def install(block: nn.Module, factor: int) -> None:
        """A NarrowGatedMLP."""
        gate, act_fn = block.mlp.gate_proj, block.mlp.act_fn
        inner, has_bias = gate.out_features // factor, gate.bias is not None
        block.mlp = NarrowGatedMLP(gate.in_features, inner, factor, act_fn, has_bias, gate.weight.dtype)

    @staticmethod
    def folded_state_dict(block: nn.Module, factor: int) -> dict[str, Tensor]:
        """Parameters of the NarrowGatedMLP."""
        gate, up, down = (block.get_submodule(path) for path in GATED)
        c = down.B[0, 0]  # (f)
        state = {f"{path}.weight": block.get_submodule(path).A[0].clone() for path in GATED}
        state |= {"mlp.gate_scale": gate.B[0, :, 0].clone(), "mlp.weight": c * up.B[0, :, 0]}
        if gate.bias is not None:
            state |= {
                "mlp.gate_bias": gate.bias.unflatten(0, (-1, factor)).T.contiguous(),
                "mlp.up_bias": (up.bias.unflatten(0, (-1, factor)) * c).T.contiguous(),
                "mlp.down_proj.bias": down.bias.clone(),
            }
        return state


class _KnLlama(KroneckerModel):
    config_class = KnLlamaConfig
    blocks_path, embedding_path = "layers", "embed_tokens"
    target_modules = {
        "self_attn.q_proj": ("outputs", 1), "self_attn.k_proj": ("outputs", 1),
        "self_attn.v_proj": ("outputs", 1), "self_attn.o_proj": ("inputs", 1),
        "mlp.gate_proj": ("outputs", 1), "mlp.up_proj": ("outputs", 1), "mlp.down_proj": ("inputs", 1),
    }
    out_proj = "self_attn.o_proj"
    foldable_parts = (LlamaValueFold, LlamaMLPFold)
    _tied_weights_keys = {}  # a dense head is a clone; base.py ties a Kronecker one


class KnLlamaModel(_KnLlama, LlamaModel):
    """Llama with Kronecker products (eq. 1), without a head; last_hidden_state (batch, length, d)."""


class KnLlamaForCausalLM(_KnLlama, LlamaForCausalLM):
    """Llama with Kronecker products (eq. 1) as language model; logits (batch, length, vocabulary)."""


class KnLlamaForSequenceClassification(_KnLlama, LlamaForSequenceClassification):
    """Llama with Kronecker products (eq. 1) as sequence classifier; logits (batch, labels)."""


COMPRESSED_CLASSES = {
    model.dense_class: model for model in (KnLlamaModel, KnLlamaForCausalLM, KnLlamaForSequenceClassification)
}
