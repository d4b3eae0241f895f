"""Measuring models: perplexity, predictions, bytes and factor shapes."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch.nn import functional as F

from kn.kronecker.layers import KroneckerEmbedding, KroneckerLinear

TOKENS = 4096  # at once: their logits over 50,257 words take 0.8 GB in float32


def autocast(precision: str, device: str = "cpu"):
    """Mixed precision context: "bf16" or "fp32"."""
    return torch.autocast(device, dtype=torch.bfloat16, enabled=precision == "bf16")


@torch.no_grad()
def perplexity(model, rows: torch.Tensor, precision: str = "fp32", batch: int | None = None) -> float:
    """exp(total NLL / predicted tokens) over token rows (n, context): windows without overlap, no token twice; `batch` rows at a time.

    ValueError for no rows, FloatingPointError for a loss that is not finite.
    """
    if not len(rows):
        raise ValueError("perplexity of an empty text is not defined: the corpus gave no full window")
    model.eval()
    total, count = 0.0, 0
    for part in rows.long().split(batch or max(1, TOKENS // rows.shape[1])):
        with autocast(precision, model.device.type):
            logits = model(input_ids=part.to(model.device)).logits
        total += F.cross_entropy(logits[:, :-1].float().flatten(0, 1), part[:, 1:].flatten().to(model.device), reduction="sum").item()
        count += part[:, 1:].numel()
    if not math.isfinite(total):
        raise FloatingPointError("the model's loss is not finite on this text: its weights are not usable, lower the learning rate it was trained with or use float32")
    return math.exp(min(total / count, 700.0))


def per_word(value: float, tokens: int, words: int) -> float:
    """Perplexity per word from one per token: the same total NLL, spread over words."""
    return math.exp(min(math.log(value) * tokens / words, 700.0))


@torch.no_grad()
def predict(model, encoded: dict[str, list], precision: str = "fp32", batch: int = 64) -> list[int]:
    """Most likely label of each encoded row {"input_ids": [[…]]}; rows are right-padded, sorted by length inside; FloatingPointError for answers that are not finite."""
    model.eval()
    ids = encoded["input_ids"]
    order, answer = sorted(range(len(ids)), key=lambda i: len(ids[i])), [0] * len(ids)
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        inputs = pad([ids[i] for i in chosen], model.config.pad_token_id)
        with autocast(precision, model.device.type):
            logits = model(**{k: v.to(model.device) for k, v in inputs.items()}).logits
        if not logits.isfinite().all():  # the largest of numbers that are none would be an answer all the same
            raise FloatingPointError("the model's answers are not finite: its weights are not usable, lower the learning rate it was trained with or use float32")
        for index, label in zip(chosen, logits.argmax(-1).tolist(), strict=True):
            answer[index] = label
    return answer


def pad(ids: list[list[int]], pad_id: int) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask (b, longest), padded on the right."""
    tensors = [torch.tensor(row) for row in ids]
    masks = [torch.ones(len(row), dtype=torch.long) for row in ids]
    padded = torch.nn.utils.rnn.pad_sequence
    return {"input_ids": padded(tensors, True, pad_id), "attention_mask": padded(masks, True, 0)}


def disk_bytes(folder: Path) -> int:
    """Bytes of a saved model's safetensors files."""
    return sum(p.stat().st_size for p in folder.glob("*.safetensors"))


def shape_text(module) -> str:
    """ "A 384x768, B 2x1" for a Kronecker layer, "768x768" (outputs × inputs) for a dense one, each part of a fused layer."""
    if isinstance(module, KroneckerLinear):
        (_, m1, n1), (_, m2, n2) = module.A.shape, module.B.shape
        return f"A {m1}x{n1}, B {m2}x{n2}"
    if isinstance(module, KroneckerEmbedding):
        return f"A {module.A.shape[0]}x{module.A.shape[1]}, B 1x{module.factor}"
    rows, columns = module.weight.shape if isinstance(module, torch.nn.Embedding) else module.weight.shape[::-1]  # Conv1D is in×out
    parts = rows // columns if rows == 3 * columns and not isinstance(module, torch.nn.Embedding) else 1
    return f"{rows // parts if parts == 3 else rows}x{columns}"


def shapes(model) -> dict[str, str]:
    """Shapes of Table 1 read off a built model; for layers, those of the last one (a compressed one in KnGPT2)."""
    block = model.transformer.h[-1]
    return {
        "embedding": shape_text(model.transformer.wte),
        "qkv": shape_text(block.attn.c_attn),
        "out_proj": shape_text(block.attn.c_proj),
        "ffn": shape_text(block.mlp.c_fc),
        "ffn_second": shape_text(block.mlp.c_proj),
    }
