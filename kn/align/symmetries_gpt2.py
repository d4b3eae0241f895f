"""Exact symmetries of GPT-2 (MATH.md §4): changes of the weights that leave the function as it is.

Row vectors: the residual stream is x (…, d), a Conv1D's weight is (in, out). Each function changes a model in
place and leaves its logits as they are, up to float rounding; sums and products are float64.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import GPT2ForSequenceClassification, GPT2LMHeadModel

from kn.align.symmetries import TOLERANCE, is_orthogonal, require_permutation, require_untied, untied_copy

Model = GPT2LMHeadModel | GPT2ForSequenceClassification


def head_of(model: Model) -> nn.Linear:
    """The output head of a language model or classifier."""
    return model.lm_head if isinstance(model, GPT2LMHeadModel) else model.score


def untied(model: Model) -> Model:
    """A copy whose head is no longer the embedding; TypeError for other classes."""
    return untied_copy(model, (GPT2LMHeadModel, GPT2ForSequenceClassification))


def norm_consumers(model: Model) -> list[tuple[nn.LayerNorm, nn.Module]]:
    """(norm, the Conv1D that reads its output) of every sublayer."""
    blocks = model.transformer.h
    return [pair for b in blocks for pair in ((b.ln_1, b.attn.c_attn), (b.ln_2, b.mlp.c_fc))]


def residual_writers(model: Model) -> list[Tensor]:
    """Parameters whose output is added to the residual stream; their last dimension is d."""
    projections = [layer for block in model.transformer.h for layer in (block.attn.c_proj, block.mlp.c_proj)]
    embeddings = [model.transformer.wte.weight, model.transformer.wpe.weight]
    return embeddings + [parameter for layer in projections for parameter in layer.parameters()]


@torch.no_grad()
def centre(model: Model) -> None:
    """Subtract the mean over d from all residual writers, as LayerNorm does; ValueError for a tied head."""
    require_untied(model, "which centring changes")
    for parameter in residual_writers(model):
        value = parameter.double()
        parameter.copy_(value - value.mean(-1, keepdim=True))


@torch.no_grad()
def fold_norms(model: Model) -> None:
    """Fold LayerNorm gains g and biases β into the layers that read them: W ← diag(g) W, b ← b + β W.

    ln_f, whose head has no bias, keeps β / g. Raises ValueError for a tied head or a zero gain of ln_f.
    """
    require_untied(model, "and takes up the gain of ln_f")
    final_norm, head = model.transformer.ln_f, head_of(model)
    if zeros := int((final_norm.weight == 0).sum()):
        raise ValueError(
            f"{zeros} gains of ln_f are zero: its bias cannot be written as a multiple of them, "
            "so this model cannot be aligned"
        )
    for norm, layer in norm_consumers(model):
        gain, shift, weight = norm.weight.double(), norm.bias.double(), layer.weight.double()
        layer.bias.copy_(layer.bias.double() + shift @ weight)
        layer.weight.copy_(gain[:, None] * weight)
        norm.reset_parameters()  # gain 1, bias 0
    gain = final_norm.weight.double()
    head.weight.copy_(head.weight.double() * gain)
    final_norm.bias.copy_(final_norm.bias.double() / gain)
    final_norm.weight.fill_(1)


@torch.no_grad()
def rotate(model: Model, Q: Tensor) -> None:
    """Rotate the residual stream by an orthogonal Q (d, d) with Q·1 = 1: LayerNorm(x Q) = LayerNorm(x) Q.

    Comes after centre and fold_norms. Raises ValueError for another Q, or where a LayerNorm is not folded.
    """
    Q = Q.double().to(model.device)
    ones = torch.ones_like(Q[0])
    if not is_orthogonal(Q, len(Q)) or (Q @ ones - ones).abs().max() > TOLERANCE:
        raise ValueError("Q must be orthogonal with Q·1 = 1, so that LayerNorm's mean and variance stay")
    norms, final_norm = [norm for norm, _ in norm_consumers(model)], model.transformer.ln_f
    if any((n.weight != 1).any() or (n.bias != 0).any() for n in norms) or (final_norm.weight != 1).any():
        raise ValueError("a LayerNorm has a gain or bias that a rotation would mix: fold_norms(model) first")
    for parameter in (*residual_writers(model), final_norm.bias, head_of(model).weight):
        parameter.copy_(parameter.double() @ Q)
    for _, layer in norm_consumers(model):
        layer.weight.copy_(Q.T @ layer.weight.double())


@torch.no_grad()
def permute_neurons(model: Model, layer: int, order: Tensor) -> None:
    """Permute the hidden neurons of one MLP; ValueError if order is no permutation of their indices."""
    mlp = model.transformer.h[layer].mlp
    require_permutation(order, mlp.c_fc.weight.shape[1])
    mlp.c_fc.weight.copy_(mlp.c_fc.weight[:, order])
    mlp.c_fc.bias.copy_(mlp.c_fc.bias[order])
    mlp.c_proj.weight.copy_(mlp.c_proj.weight[order])


def _head_columns(model: Model, part: int, head: int) -> slice:
    """Columns of one head's query (part 0), key (1) or value (2) in c_attn's weight."""
    d, e = model.config.n_embd, model.config.n_embd // model.config.n_head
    return slice(part * d + head * e, part * d + (head + 1) * e)


def _transform_outputs(layer: nn.Module, columns: slice, M: Tensor) -> None:
    """y ← y M for some outputs y of a Conv1D."""
    M = M.to(layer.weight.device)
    layer.weight[:, columns] = (layer.weight[:, columns].double() @ M).to(layer.weight.dtype)
    layer.bias[columns] = (layer.bias[columns].double() @ M).to(layer.bias.dtype)


@torch.no_grad()
def change_query_key(model: Model, layer: int, head: int, M: Tensor) -> None:
    """q ← q M, k ← k M⁻ᵀ of one head, M (head size, head size) invertible: q·k stays."""
    attn, M = model.transformer.h[layer].attn, M.double()
    _transform_outputs(attn.c_attn, _head_columns(model, 0, head), M)
    _transform_outputs(attn.c_attn, _head_columns(model, 1, head), torch.linalg.inv(M).T)


@torch.no_grad()
def change_value_output(model: Model, layer: int, head: int, N: Tensor) -> None:
    """v ← v N of one head, and N⁻¹ before the output projection's rows that read it."""
    attn, N = model.transformer.h[layer].attn, N.double()
    _transform_outputs(attn.c_attn, _head_columns(model, 2, head), N)
    weight, rows = attn.c_proj.weight, _head_columns(model, 0, head)
    weight[rows] = (torch.linalg.inv(N).to(model.device) @ weight[rows].double()).to(weight.dtype)
