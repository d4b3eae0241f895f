"""Exact symmetries of GPT-2 and Llama: changes of the weights that leave the function as it is.

Row vectors: the residual stream is x (…, d), a Conv1D's weight (in, out), an nn.Linear's (out, in). Each
function changes an untied_copy in place and leaves its logits as they are, up to float rounding; a rotation
comes after centring and folding. Sums and products are float64. These are the symmetries that the aligned
start applies as such; tests/align has the others."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2ForSequenceClassification, GPT2LMHeadModel, LlamaForCausalLM

from kn.models.base import model_like

TOLERANCE = 1e-8  # of orthogonality
CLASSES = (GPT2LMHeadModel, GPT2ForSequenceClassification, LlamaForCausalLM)
GPT2 = GPT2LMHeadModel | GPT2ForSequenceClassification


def untied_copy(model: nn.Module) -> Any:
    """A copy whose head is no longer the embedding; TypeError for other classes."""
    if type(model) not in CLASSES:
        names = ", ".join(cls.__name__ for cls in CLASSES)
        raise TypeError(f"the symmetries are for {names}, got {type(model).__name__}")
    config = copy.deepcopy(model.config)
    config.tie_word_embeddings = False
    untied = model_like(model, type(model), config)
    untied.load_state_dict(model.state_dict())
    return untied


def _is_orthogonal(Q: Tensor, width: int) -> bool:
    eye = torch.eye(width, dtype=Q.dtype, device=Q.device)
    return Q.shape == eye.shape and bool((Q @ Q.T - eye).abs().max() <= TOLERANCE)


def gpt2_head(model: GPT2) -> nn.Linear:
    """The output head of a language model or classifier."""
    return model.lm_head if isinstance(model, GPT2LMHeadModel) else model.score


def gpt2_norm_consumers(model: GPT2) -> list[tuple[nn.LayerNorm, nn.Module]]:
    """(norm, the Conv1D that reads its output) of every sublayer."""
    blocks = model.transformer.h
    return [pair for b in blocks for pair in ((b.ln_1, b.attn.c_attn), (b.ln_2, b.mlp.c_fc))]


def gpt2_residual_writers(model: GPT2) -> list[Tensor]:
    """Parameters whose output is added to the residual stream; their last dimension is d."""
    body = model.transformer
    layers = [body.wte, body.wpe, *(part.c_proj for block in body.h for part in (block.attn, block.mlp))]
    return [parameter for layer in layers for parameter in layer.parameters()]


@torch.no_grad()
def centre_gpt2(model: GPT2) -> None:
    """Subtract the mean over d from all residual writers, as LayerNorm does."""
    for parameter in gpt2_residual_writers(model):
        value = parameter.double()
        parameter.copy_(value - value.mean(-1, keepdim=True))


@torch.no_grad()
def fold_gpt2_norms(model: GPT2) -> None:
    """Fold LayerNorm gains g and biases β into the layers that read them: W ← diag(g) W, b ← b + β W.
    ln_f, whose head has no bias, keeps β / g. Raises ValueError for a zero gain of ln_f."""
    final_norm, head = model.transformer.ln_f, gpt2_head(model)
    if zeros := int((final_norm.weight == 0).sum()):
        reason = "its bias cannot be written as a multiple of them, so this model cannot be aligned"
        raise ValueError(f"{zeros} gains of ln_f are zero: {reason}")
    for norm, layer in gpt2_norm_consumers(model):
        gain, shift, weight = norm.weight.double(), norm.bias.double(), layer.weight.double()
        layer.bias.copy_(layer.bias.double() + shift @ weight)
        layer.weight.copy_(gain[:, None] * weight)
        norm.reset_parameters()  # gain 1, bias 0
    gain = final_norm.weight.double()
    head.weight.copy_(head.weight.double() * gain)
    final_norm.bias.copy_(final_norm.bias.double() / gain)
    final_norm.weight.fill_(1)


@torch.no_grad()
def rotate_gpt2(model: GPT2, Q: Tensor) -> None:
    """Rotate by an orthogonal Q (d, d), Q·1 = 1, LayerNorm(x Q) = LayerNorm(x) Q; ValueError for another."""
    Q = Q.double().to(model.device)
    ones = torch.ones_like(Q[0])
    if not _is_orthogonal(Q, len(Q)) or (Q @ ones - ones).abs().max() > TOLERANCE:
        raise ValueError("Q must be orthogonal with Q·1 = 1, so that LayerNorm's mean and variance stay")
    for parameter in (*gpt2_residual_writers(model), model.transformer.ln_f.bias, gpt2_head(model).weight):
        parameter.copy_(parameter.double() @ Q)
    for _, layer in gpt2_norm_consumers(model):
        layer.weight.copy_(Q.T @ layer.weight.double())


def llama_norm_consumers(model: LlamaForCausalLM) -> list[tuple[nn.Module, tuple[nn.Linear, ...]]]:
    """(norm, the linear layers that read its output) of every sublayer and of the head."""
    found: list[tuple[nn.Module, tuple[nn.Linear, ...]]] = [(model.model.norm, (model.lm_head,))]
    for block in model.model.layers:
        attn, mlp = block.self_attn, block.mlp
        found.append((block.input_layernorm, (attn.q_proj, attn.k_proj, attn.v_proj)))
        found.append((block.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)))
    return found


@torch.no_grad()
def fold_llama_norms(model: LlamaForCausalLM) -> None:
    """Fold RMSNorm gains g into the layers that read them: W ← W diag(g)."""
    for norm, layers in llama_norm_consumers(model):
        gain = norm.weight.double()
        for layer in layers:
            layer.weight.copy_(layer.weight.double() * gain)
        norm.weight.fill_(1)


@torch.no_grad()
def rotate_llama(model: LlamaForCausalLM, Q: Tensor) -> None:
    """Rotate by an orthogonal Q (d, d), RMSNorm(x Q) = RMSNorm(x) Q; ValueError for another Q."""
    embedding, Q = model.model.embed_tokens, Q.double().to(model.device)
    if not _is_orthogonal(Q, width := embedding.embedding_dim):
        raise ValueError(f"Q must be orthogonal and {width} wide, so that RMSNorm's mean square stays")
    for layer in (embedding, *(layer for _, layers in llama_norm_consumers(model) for layer in layers)):
        layer.weight.copy_(layer.weight.double() @ Q)
    for block in model.model.layers:
        for layer in (block.self_attn.o_proj, block.mlp.down_proj):
            layer.weight.copy_(Q.T @ layer.weight.double())
            if layer.bias is not None:
                layer.bias.copy_(layer.bias.double() @ Q)
