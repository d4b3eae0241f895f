"""Exact symmetries of Llama (MATH.md §4): changes of the weights that leave the function as it is.

Row vectors: the residual stream is x (…, d), an nn.Linear's weight (out, in). Each function changes a model
in place and leaves its logits as they are, up to float rounding; sums and products are float64.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from kn.align.symmetries import is_orthogonal, require_permutation, require_untied, untied_copy


def untied(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """A copy whose head is no longer the embedding; TypeError for other classes."""
    other = untied_copy(model, (LlamaForCausalLM,))
    other.generation_config = copy.deepcopy(model.generation_config)
    return other


def norm_consumers(model: LlamaForCausalLM) -> list[tuple[nn.Module, tuple[nn.Linear, ...]]]:
    """(norm, the linear layers that read its output) of every sublayer and of the head."""
    found = []
    for block in model.model.layers:
        attn, mlp = block.self_attn, block.mlp
        found.append((block.input_layernorm, (attn.q_proj, attn.k_proj, attn.v_proj)))
        found.append((block.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)))
    return [*found, (model.model.norm, (model.lm_head,))]


def residual_writers(model: LlamaForCausalLM) -> list[nn.Linear]:
    """The linear layers whose output is added to the residual stream; the embedding writes to it, too."""
    return [layer for block in model.model.layers for layer in (block.self_attn.o_proj, block.mlp.down_proj)]


@torch.no_grad()
def fold_norms(model: LlamaForCausalLM) -> None:
    """Fold RMSNorm gains g into the layers that read them: W ← W diag(g). ValueError for a tied head."""
    require_untied(model, "and takes up the gain of the last norm")
    for norm, layers in norm_consumers(model):
        gain = norm.weight.double()
        for layer in layers:
            layer.weight.copy_(layer.weight.double() * gain)
        norm.weight.fill_(1)


@torch.no_grad()
def rotate(model: LlamaForCausalLM, Q: Tensor) -> None:
    """Rotate the residual stream by any orthogonal Q (d, d), after fold_norms: RMSNorm(x Q) = RMSNorm(x) Q.

    Raises ValueError for another Q, a tied head, or where a norm is not folded.
    """
    require_untied(model, "and a rotation would count twice")
    embedding = model.model.embed_tokens.weight
    width, Q = embedding.shape[1], Q.to(embedding.device, torch.float64)
    if not is_orthogonal(Q, width):
        raise ValueError(f"Q must be orthogonal and {width} wide, so that RMSNorm's mean square stays")
    if any((norm.weight != 1).any() for norm, _ in norm_consumers(model)):
        raise ValueError("a norm has a gain, which a rotation would mix: fold_norms(model) first")
    embedding.copy_(embedding.double() @ Q)
    for _, layers in norm_consumers(model):
        for layer in layers:
            layer.weight.copy_(layer.weight.double() @ Q)
    for layer in residual_writers(model):
        layer.weight.copy_(Q.T @ layer.weight.double())
        if layer.bias is not None:
            layer.bias.copy_(layer.bias.double() @ Q)


@torch.no_grad()
def permute_neurons(model: LlamaForCausalLM, layer: int, order: Tensor) -> None:
    """Permute the gated hidden neurons of one MLP; ValueError if order is no permutation of their indices."""
    mlp = model.model.layers[layer].mlp
    require_permutation(order, mlp.down_proj.in_features)
    for parameter in (*mlp.gate_proj.parameters(), *mlp.up_proj.parameters()):
        parameter.copy_(parameter[order])
    mlp.down_proj.weight.copy_(mlp.down_proj.weight[:, order])


def _transform_outputs(layer: nn.Linear, rows: Tensor, M: Tensor) -> None:
    """y ← M y for some outputs y of a linear layer."""
    for parameter in layer.parameters():
        parameter[rows] = (M @ parameter[rows].double()).to(parameter.dtype)


def _head_rows(attn: nn.Module, head: int) -> Tensor:
    """Rows of a head in q_proj's weight, or of a key head in k_proj's and v_proj's."""
    return torch.arange(head * attn.head_dim, (head + 1) * attn.head_dim)


def query_heads(attn: nn.Module, key_head: int) -> range:
    """The query heads that share one key head."""
    return range(key_head * attn.num_key_value_groups, (key_head + 1) * attn.num_key_value_groups)


@torch.no_grad()
def change_value_output(model: LlamaForCausalLM, layer: int, head: int, N: Tensor) -> None:
    """v ← v N of one key head, N (head size, head size), and N⁻¹ before o_proj of its query heads."""
    attn, N = model.model.layers[layer].self_attn, N.double()
    _transform_outputs(attn.v_proj, _head_rows(attn, head), N.T)
    weight, inverse = attn.o_proj.weight, torch.linalg.inv(N).T
    for query in query_heads(attn, head):
        columns = _head_rows(attn, query)
        weight[:, columns] = (weight[:, columns].double() @ inverse).to(weight.dtype)


@torch.no_grad()
def scale_rotary_pair(model: LlamaForCausalLM, layer: int, head: int, frequency: int, z: complex) -> None:
    """q ← z q, k ← k / conj(z) at one rotary frequency of one key head and its query heads.

    Dimensions `frequency` and that plus half a head are a complex number, which rotary positions multiply by
    one of length 1: Re(q conj(k)) stays. Raises ValueError for z = 0.
    """
    if z == 0:
        raise ValueError("z must not be 0: the key would be divided by it")
    attn = model.model.layers[layer].self_attn
    pair = torch.tensor([frequency, frequency + attn.head_dim // 2])

    def as_matrix(c: complex) -> Tensor:
        return torch.tensor([[c.real, -c.imag], [c.imag, c.real]], dtype=torch.float64)

    for query in query_heads(attn, head):
        _transform_outputs(attn.q_proj, _head_rows(attn, query)[pair], as_matrix(z))
    _transform_outputs(attn.k_proj, _head_rows(attn, head)[pair], as_matrix(1 / z.conjugate()))
