"""Exact symmetries of Llama (MATH.md §4): weight settings of one and the same function, of which an aligned start can choose.

Row vectors: the residual stream is x (…, d); an nn.Linear's weight is (out, in). Each function changes a stock model in place
and leaves its logits as they are, up to float rounding; sums and products are done in float64.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

TOLERANCE = 1e-8  # of orthogonality, relative to 1


def _set(parameter: nn.Parameter, value: Tensor) -> None:
    with torch.no_grad():
        parameter.copy_(value)


def untied(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """A copy whose head is a matrix of its own, so that the embedding can change without it; TypeError for other classes."""
    if type(model) is not LlamaForCausalLM:
        raise TypeError(f"the symmetries are for LlamaForCausalLM, got {type(model).__name__}")
    config = copy.deepcopy(model.config)
    config.tie_word_embeddings = False
    with torch.device(model.device):
        other = LlamaForCausalLM(config).to(model.dtype)
    other.load_state_dict({name: value.clone() for name, value in model.state_dict().items()})
    other.generation_config = copy.deepcopy(model.generation_config)
    return other.train(model.training)


def readers(model: LlamaForCausalLM) -> list[tuple[nn.Module, tuple[nn.Linear, ...]]]:
    """(norm, the linear maps that read it) of every block and of the head."""
    found = []
    for block in model.model.layers:
        attn, mlp = block.self_attn, block.mlp
        found += [(block.input_layernorm, (attn.q_proj, attn.k_proj, attn.v_proj)), (block.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj))]
    return [*found, (model.model.norm, (model.lm_head,))]


def writers(model: LlamaForCausalLM) -> list[nn.Linear]:
    """The linear maps that add to the residual stream; the embedding writes too."""
    return [layer for block in model.model.layers for layer in (block.self_attn.o_proj, block.mlp.down_proj)]


def _need_untied(model: LlamaForCausalLM, what: str) -> None:
    if model.lm_head.weight is model.model.embed_tokens.weight:
        raise ValueError(f"the head is tied to the embedding, and {what}: take untied(model)")


def fold_norms(model: LlamaForCausalLM) -> None:
    """Move every RMSNorm's gain into what reads it: W ← W diag(g). ValueError for a tied head."""
    _need_untied(model, "takes up the gain of the last norm")
    for norm, layers in readers(model):
        gain = norm.weight.detach().double()
        for layer in layers:
            _set(layer.weight, layer.weight.detach().double() * gain)
        _set(norm.weight, torch.ones_like(gain))


def rotate(model: LlamaForCausalLM, Q: Tensor) -> None:
    """Turn the stream by any orthogonal Q (d, d), after fold_norms: RMSNorm(x Q) = RMSNorm(x) Q then. ValueError for another Q, a tied head, or before that."""
    _need_untied(model, "a rotation would count twice")
    table = model.model.embed_tokens.weight
    Q = Q.detach().to(table.device, torch.float64)
    if Q.shape != (table.shape[1],) * 2 or (Q @ Q.T - torch.eye(len(Q), dtype=Q.dtype, device=Q.device)).abs().max() > TOLERANCE:
        raise ValueError(f"Q must be orthogonal and {table.shape[1]} wide, so that RMSNorm's mean square stays what it is")
    if any((norm.weight != 1).any() for norm, _ in readers(model)):
        raise ValueError("a norm has a gain, which a rotation would mix: fold_norms(model) first")
    _set(table, table.detach().double() @ Q)
    for _, layers in readers(model):
        for layer in layers:
            _set(layer.weight, layer.weight.detach().double() @ Q)
    for layer in writers(model):
        _set(layer.weight, Q.T @ layer.weight.detach().double())
        if layer.bias is not None:
            _set(layer.bias, layer.bias.detach().double() @ Q)


def permute_units(model: LlamaForCausalLM, layer: int, order: Tensor) -> None:
    """Put the gated hidden units of one feed-forward network into another order, a permutation of its indices; ValueError for another."""
    mlp = model.model.layers[layer].mlp
    if sorted(order.tolist()) != list(range(mlp.down_proj.in_features)):
        raise ValueError(f"order must be a permutation of 0 to {mlp.down_proj.in_features - 1}")
    for reader in (mlp.gate_proj, mlp.up_proj):
        for parameter in reader.parameters():
            _set(parameter, parameter[order].clone())
    _set(mlp.down_proj.weight, mlp.down_proj.weight[:, order].clone())


def _left(layer: nn.Linear, rows: Tensor, M: Tensor) -> None:
    """Multiply some outputs of a linear map by M: y ← M y."""
    for parameter in layer.parameters():
        with torch.no_grad():
            parameter[rows] = (M @ parameter[rows].double()).to(parameter.dtype)


def _head(attn: nn.Module, head: int) -> Tensor:
    """Where a head lies among the outputs of q_proj (or a key head among those of k_proj and v_proj)."""
    return torch.arange(head * attn.head_dim, (head + 1) * attn.head_dim)


def group(attn: nn.Module, head: int) -> range:
    """The query heads that read one key head."""
    return range(head * attn.num_key_value_groups, (head + 1) * attn.num_key_value_groups)


def change_value_output(model: LlamaForCausalLM, layer: int, head: int, N: Tensor) -> None:
    """v ← v N of one key head, N (head size, head size) invertible, and N⁻¹ before the output projection of every query head that reads it."""
    attn, N = model.model.layers[layer].self_attn, N.detach().double()
    _left(attn.v_proj, _head(attn, head), N.T)
    back = torch.linalg.inv(N).T
    for query in group(attn, head):
        columns = _head(attn, query)
        with torch.no_grad():
            attn.o_proj.weight[:, columns] = (attn.o_proj.weight[:, columns].double() @ back).to(attn.o_proj.weight.dtype)


def turn_pair(model: LlamaForCausalLM, layer: int, head: int, frequency: int, z: complex) -> None:
    """q ← z q and k ← k / conj(z) of one key head's group at one rotary frequency: dimensions `frequency` and that plus half a head are a complex number.

    Rotary positions multiply both by complex numbers of length one, so Re(q conj(k)) stays. ValueError for z = 0.
    """
    if z == 0:
        raise ValueError("z must not be 0: the key would be divided by it")
    attn = model.model.layers[layer].self_attn
    both = torch.tensor([frequency, frequency + attn.head_dim // 2])

    def matrix(c: complex) -> Tensor:
        return torch.tensor([[c.real, -c.imag], [c.imag, c.real]], dtype=torch.float64)

    for query in group(attn, head):
        _left(attn.q_proj, _head(attn, query)[both], matrix(z))
    _left(attn.k_proj, _head(attn, head)[both], matrix(1 / z.conjugate()))
