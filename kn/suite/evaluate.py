"""Measure a model: perplexity, predictions, bytes on disk, factor shapes."""

import math

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
    Raises ValueError for no rows, FloatingPointError for a loss that is not finite."""
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
    """Most likely class of each row of token ids, in order; FloatingPointError for logits not finite."""
    model.eval()
    # batches of similar length
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
    """input_ids and attention_mask (b, longest), padded on the right; ValueError for a row of no token."""
    if [] in input_ids:
        raise ValueError(f"row {input_ids.index([])} has no token: an empty text is encoded as a blank")
    rows, padded = [torch.tensor(row) for row in input_ids], torch.nn.utils.rnn.pad_sequence
    masks = [torch.ones(len(row), dtype=torch.long) for row in rows]
    return {"input_ids": padded(rows, True, pad_id), "attention_mask": padded(masks, True, 0)}


def format_shape(module) -> str:
    """ "A 384x768, B 2x1" of a Kronecker layer; "768x768" (outputs × inputs; of q alone) of a dense one."""
    if isinstance(module, KroneckerLinear):
        return "A {}x{}, B {}x{}".format(*module.A.shape[1:], *module.B.shape[1:])  # (rank, m, n) each
    if isinstance(module, KroneckerEmbedding):
        return "A {}x{}, B 1x{}".format(*module.A.shape, module.factor)
    if isinstance(module, torch.nn.Embedding):
        return "x".join(map(str, module.weight.shape))
    inputs, outputs = module.weight.shape  # of a Conv1D
    return f"{inputs if outputs == 3 * inputs else outputs}x{inputs}"


def layer_shapes(model) -> dict[str, str]:
    """Shapes of Table 1: the embedding, and the matrices of the last block (a compressed one in KnGPT2)."""
    block = model.transformer.h[-1]
    modules = {"embedding": model.transformer.wte, "qkv": block.attn.c_attn, "out_proj": block.attn.c_proj,
               "ffn": block.mlp.c_fc, "ffn_second": block.mlp.c_proj}
    return {name: format_shape(module) for name, module in modules.items()}
