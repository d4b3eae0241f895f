"""Exact symmetries of GPT-2 (MATH.md §4): weight settings of one and the same function, of which an aligned start can choose.

Row vectors: the residual stream is x (…, d), a Conv1D's weight is (in, out). Each function changes a stock model in place
and leaves its logits as they are, up to float rounding; sums and products are done in float64.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers import GPT2ForSequenceClassification, GPT2LMHeadModel

TOLERANCE = 1e-8  # of orthogonality, relative to 1
Model = GPT2LMHeadModel | GPT2ForSequenceClassification


def head_of(model: Model) -> nn.Linear:
    """The output head of a language model or classifier."""
    return model.lm_head if isinstance(model, GPT2LMHeadModel) else model.score


def _set(parameter: Tensor, value: Tensor) -> None:
    with torch.no_grad():
        parameter.copy_(value)


def untied(model: Model) -> Model:
    """A copy whose head is a matrix of its own, so that the embedding can change without it; TypeError for other classes."""
    if type(model) not in (GPT2LMHeadModel, GPT2ForSequenceClassification):
        raise TypeError(f"the symmetries are for GPT2LMHeadModel and GPT2ForSequenceClassification, got {type(model).__name__}")
    config = copy.deepcopy(model.config)
    config.tie_word_embeddings = False
    with torch.device(model.device):
        other = type(model)(config).to(model.dtype)
    other.load_state_dict({name: value.clone() for name, value in model.state_dict().items()})
    return other.train(model.training)


def readers(model: Model) -> list[tuple[nn.LayerNorm, nn.Module]]:
    """(norm, the Conv1D that reads it) of every block."""
    return [pair for block in model.transformer.h for pair in ((block.ln_1, block.attn.c_attn), (block.ln_2, block.mlp.c_fc))]


def writers(model: Model) -> list[Tensor]:
    """Everything that is added to the residual stream; its last dimension is d."""
    found = [model.transformer.wte.weight, model.transformer.wpe.weight]
    return found + [p for block in model.transformer.h for layer in (block.attn.c_proj, block.mlp.c_proj) for p in layer.parameters()]


def centre(model: Model) -> None:
    """Subtract the mean over d from all that is written into the stream: every LayerNorm subtracts it anyway. ValueError for a tied head."""
    if head_of(model).weight is model.transformer.wte.weight:
        raise ValueError("the head is tied to the embedding, which centring changes: take untied(model)")
    for parameter in writers(model):
        value = parameter.detach().double()
        _set(parameter, value - value.mean(-1, keepdim=True))


def fold_norms(model: Model) -> None:
    """Move every LayerNorm's gain and bias into what reads it: W ← diag(g) W, b ← b + β W; ln_f keeps β / g. ValueError for a tied head, or where a gain of ln_f is 0."""
    if head_of(model).weight is model.transformer.wte.weight:
        raise ValueError("the head is tied to the embedding, and takes up the gain of ln_f: take untied(model)")
    last = model.transformer.ln_f
    if zeros := int((last.weight == 0).sum()):
        raise ValueError(f"{zeros} gains of ln_f are zero: its bias cannot be written as a multiple of them, so this model cannot be aligned")
    for norm, layer in readers(model):
        gain, shift, weight = norm.weight.detach().double(), norm.bias.detach().double(), layer.weight.detach().double()
        _set(layer.bias, layer.bias.detach().double() + shift @ weight)
        _set(layer.weight, gain[:, None] * weight)
        _set(norm.weight, torch.ones_like(gain))
        _set(norm.bias, torch.zeros_like(shift))
    head, gain = head_of(model), last.weight.detach().double()
    _set(head.weight, head.weight.detach().double() * gain)
    _set(last.bias, last.bias.detach().double() / gain)
    _set(last.weight, torch.ones_like(gain))


def rotate(model: Model, Q: Tensor) -> None:
    """Turn the stream by an orthogonal Q (d, d) with Q·1 = 1, after centre and fold_norms: LayerNorm(x Q) = LayerNorm(x) Q then. ValueError for another Q, or before those."""
    Q = Q.detach().double().to(model.device)
    ones = torch.ones_like(Q[0])
    if (Q @ Q.T - torch.eye(len(Q), dtype=Q.dtype, device=Q.device)).abs().max() > TOLERANCE or (Q @ ones - ones).abs().max() > TOLERANCE:
        raise ValueError("Q must be orthogonal with Q·1 = 1, so that LayerNorm's mean and variance stay what they are")
    if any((norm.weight != 1).any() or (norm.bias != 0).any() for norm, _ in readers(model)) or (model.transformer.ln_f.weight != 1).any():
        raise ValueError("a LayerNorm has a gain or a bias, which a rotation would mix: fold_norms(model) first")
    for parameter in writers(model):
        _set(parameter, parameter.detach().double() @ Q)
    for _, layer in readers(model):
        _set(layer.weight, Q.T @ layer.weight.detach().double())
    for parameter in (model.transformer.ln_f.bias, head_of(model).weight):
        _set(parameter, parameter.detach().double() @ Q)


def permute_units(model: Model, layer: int, order: Tensor) -> None:
    """Put the hidden units of one feed-forward network into another order, a permutation of its indices; ValueError for another."""
    mlp = model.transformer.h[layer].mlp
    if sorted(order.tolist()) != list(range(mlp.c_fc.weight.shape[1])):
        raise ValueError(f"order must be a permutation of 0 to {mlp.c_fc.weight.shape[1] - 1}")
    _set(mlp.c_fc.weight, mlp.c_fc.weight[:, order].clone())
    _set(mlp.c_fc.bias, mlp.c_fc.bias[order].clone())
    _set(mlp.c_proj.weight, mlp.c_proj.weight[order].clone())


def _columns(model: Model, part: int, head: int) -> slice:
    """Where head's query (part 0), key (1) or value (2) lies among c_attn's outputs."""
    d, e = model.config.n_embd, model.config.n_embd // model.config.n_head
    return slice(part * d + head * e, part * d + (head + 1) * e)


def _right(layer: nn.Module, columns: slice, M: Tensor) -> None:
    """Multiply some outputs of a Conv1D by M."""
    with torch.no_grad():
        M = M.to(layer.weight.device)
        layer.weight[:, columns] = (layer.weight[:, columns].double() @ M).to(layer.weight.dtype)
        layer.bias[columns] = (layer.bias[columns].double() @ M).to(layer.bias.dtype)


def change_query_key(model: Model, layer: int, head: int, M: Tensor) -> None:
    """q ← q M and k ← k M⁻ᵀ of one head, M (head size, head size) invertible: q·k stays."""
    attn, M = model.transformer.h[layer].attn, M.detach().double()
    _right(attn.c_attn, _columns(model, 0, head), M)
    _right(attn.c_attn, _columns(model, 1, head), torch.linalg.inv(M).T)


def change_value_output(model: Model, layer: int, head: int, N: Tensor) -> None:
    """v ← v N and the rows of the output projection that read it ← N⁻¹ of themselves, of one head."""
    attn, N = model.transformer.h[layer].attn, N.detach().double()
    _right(attn.c_attn, _columns(model, 2, head), N)
    rows = _columns(model, 0, head)
    with torch.no_grad():
        attn.c_proj.weight[rows] = (torch.linalg.inv(N).to(model.device) @ attn.c_proj.weight[rows].double()).to(attn.c_proj.weight.dtype)
