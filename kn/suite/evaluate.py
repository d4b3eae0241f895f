"""Measure a model: perplexity, predictions, bytes on disk, factor shapes."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch.nn import functional as F

from kn.kronecker.layers import KroneckerEmbedding, KroneckerLinear

FORWARD_TOKENS = 4096  # of one forward pass: their logits over 50,257 words take 0.8 GB in float32
MAX_LOSS = 700.0  # nats; exp of more overflows
UNUSABLE = "its weights are not usable, lower the learning rate it was trained with or use float32"


def autocast(precision: str, device: str = "cpu"):
    """Mixed-precision context of "bf16" or "fp32"."""
    return torch.autocast(device, dtype=torch.bfloat16, enabled=precision == "bf16")


@torch.no_grad()
def perplexity(model, rows: torch.Tensor, precision: str = "fp32", batch: int | None = None) -> float:
    """exp(total NLL / predicted tokens) over token rows (n, context), windows without overlap.

    Raises ValueError for no rows, FloatingPointError for a loss that is not finite.
    """
    if not len(rows):
        raise ValueError("perplexity of an empty text is not defined: the corpus gave no full window")
    model.eval()
    total, count = 0.0, 0
    for part in rows.long().split(batch or max(1, FORWARD_TOKENS // rows.shape[1])):
        with autocast(precision, model.device.type):
            logits = model(input_ids=part.to(model.device)).logits  # (b, context, vocabulary)
        labels = part[:, 1:].flatten()
        predicted = logits[:, :-1].float().flatten(0, 1)
        total += F.cross_entropy(predicted, labels.to(model.device), reduction="sum").item()
        count += labels.numel()
    if not math.isfinite(total):
        raise FloatingPointError(f"the model's loss is not finite on this text: {UNUSABLE}")
    return math.exp(min(total / count, MAX_LOSS))


def word_perplexity(value: float, tokens: int, words: int) -> float:
    """Perplexity per word from one per token: the same total NLL, spread over words."""
    return math.exp(min(math.log(value) * tokens / words, MAX_LOSS))


@torch.no_grad()
def predict(model, input_ids: list[list[int]], precision: str = "fp32", batch: int = 64) -> list[int]:
    """Most likely class of each row of token ids, in the rows' order.

    Rows are batched by length and right-padded. Raises FloatingPointError for logits that are not finite.
    """
    model.eval()
    order, classes = sorted(range(len(input_ids)), key=lambda i: len(input_ids[i])), [0] * len(input_ids)
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        inputs = pad([input_ids[i] for i in chosen], model.config.pad_token_id)
        with autocast(precision, model.device.type):
            logits = model(**{k: v.to(model.device) for k, v in inputs.items()}).logits  # (b, labels)
        if not logits.isfinite().all():  # argmax of NaN is a class all the same
            raise FloatingPointError(f"the model's answers are not finite: {UNUSABLE}")
        for index, label in zip(chosen, logits.argmax(-1).tolist(), strict=True):
            classes[index] = label
    return classes


def pad(input_ids: list[list[int]], pad_id: int) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask (b, longest), padded on the right."""
    tensors = [torch.tensor(row) for row in input_ids]
    masks = [torch.ones(len(row), dtype=torch.long) for row in input_ids]
    padded = torch.nn.utils.rnn.pad_sequence
    return {"input_ids": padded(tensors, True, pad_id), "attention_mask": padded(masks, True, 0)}


def model_bytes(folder: Path) -> int:
    """Bytes of a saved model's safetensors files."""
    return sum(p.stat().st_size for p in folder.glob("*.safetensors"))


def format_shape(module) -> str:
    """ "A 384x768, B 2x1" of a Kronecker layer, "768x768" (outputs × inputs) of a dense one.

    A dense fused qkv layer counts as one of its three parts.
    """
    if isinstance(module, KroneckerLinear):
        (_, m1, n1), (_, m2, n2) = module.A.shape, module.B.shape
        return f"A {m1}x{n1}, B {m2}x{n2}"
    if isinstance(module, KroneckerEmbedding):
        return f"A {module.A.shape[0]}x{module.A.shape[1]}, B 1x{module.factor}"
    if isinstance(module, torch.nn.Embedding):
        return "x".join(map(str, module.weight.shape))
    inputs, outputs = module.weight.shape  # Conv1D is in×out
    return f"{inputs if outputs == 3 * inputs else outputs}x{inputs}"


def layer_shapes(model) -> dict[str, str]:
    """Shapes of Table 1: the embedding, and the matrices of the last block (a compressed one in KnGPT2)."""
    block = model.transformer.h[-1]
    return {
        "embedding": format_shape(model.transformer.wte),
        "qkv": format_shape(block.attn.c_attn),
        "out_proj": format_shape(block.attn.c_proj),
        "ffn": format_shape(block.mlp.c_fc),
        "ffn_second": format_shape(block.mlp.c_proj),
    }
