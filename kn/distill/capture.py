"""Capture the activations that intermediate-layer distillation (eq. 2-5) compares, through forward hooks."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from kn.distill.large_vocabulary import IGNORE_INDEX, chunked_cross_entropy
from kn.kronecker import checks

NO_LABELS = "no label to predict (all are -100, or of rows of one token)"
HIDDEN_POINTS = ("c_proj", "block")  # output of the second fully connected layer (§3.3) or of the block
CHUNKING_MIN_LOGITS = 2**24  # more logits (64 MB in float32) are made and compared in chunks


@dataclass
class Captured:
    """Activations that eq. 2-5 compare: batch b, length t, width d, heads h, head size e, vocabulary v."""

    embedding: Tensor  # (b, t, d) token + position, before dropout
    q: list[Tensor]  # per layer (b, h, t, e), after the projection, before softmax and dropout
    k: list[Tensor]  # per layer (b, h, t, e)
    hidden: list[Tensor]  # per layer (b, t, d)
    logits: Tensor | None  # (b, t, v), or (b, labels) of a classifier
    loss: Tensor | None  # cross-entropy, when labels were given
    scaling: list[float]  # per layer: the factor on q·k inside softmax
    last_hidden_state: Tensor | None = None  # (b, t, d), input of the head, where the loss was made in chunks


def capture(
    model: nn.Module, hidden_point: str = "c_proj", head: bool = True, wrapper: nn.Module | None = None,
    logits: bool = True, **inputs,
) -> Captured:
    """Run a GPT-2 or KnGPT2 once and return what ILKD compares (eq. 2-5); works with every attention backend.

    head=False skips the output head (logits and loss are None): eq. 5 needs no teacher logits. logits=False
    makes a language model's loss in chunks where the logits would be large. wrapper (DistributedDataParallel)
    is called in the model's place.
    Raises TypeError for other models, TypeError or ValueError for inputs that do not fit, ValueError for an
    unknown hidden_point, RuntimeError where a layer did not run exactly once."""
    _check_inputs(model, inputs)
    scaling = [block.attn.scaling for block in model.transformer.h]
    captured = Captured(torch.empty(0), [], [], [], None, None, scaling)

    def on_attention(_layer: int, query: Tensor, key: Tensor) -> None:
        captured.q.append(query)
        captured.k.append(key)

    call, labels = wrapper or model, inputs.get("labels")
    with capture_hooks(
        model, hidden_point, on_embedding=partial(setattr, captured, "embedding"), on_attention=on_attention,
        on_hidden=lambda _layer, output: captured.hidden.append(output),
    ):
        if not head:
            model.transformer(**inputs)
        elif logits or labels is None or not should_chunk_logits(model, labels):
            output = call(**inputs)
            captured.logits, captured.loss = output.logits, output.loss
        else:
            del inputs["labels"]
            with model.transformer.ln_f.register_forward_hook(
                lambda _module, _args, output: setattr(captured, "last_hidden_state", output)
            ):
                call(**inputs, logits_to_keep=1)
            weight = model.lm_head.weight
            captured.loss = chunked_cross_entropy(captured.last_hidden_state, weight, labels)
    return captured


def _check_inputs(model: nn.Module, inputs: dict) -> None:
    """Refuse what would fail deep inside the model; values on a CPU only, a GPU would wait for them."""
    if not isinstance(model, nn.Module) or not hasattr(getattr(model, "transformer", None), "h"):
        raise TypeError(f"capture takes a GPT-2 or KnGPT2 with a head, got {type(model).__name__}")
    if "inputs_embeds" in inputs:
        return
    ids, config = inputs.get("input_ids"), model.config
    got = checks.describe_value(ids)
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"input_ids is {got}: expected an int64 or int32 tensor (batch, length)")
    if not 0 < ids.shape[1] <= config.n_positions or not len(ids):
        raise ValueError(f"input_ids is {got}: expected 1 to {config.n_positions} tokens a row")
    if ids.device.type == "cpu" and (ids.min() < 0 or ids.max() >= config.vocab_size):
        got, last = f"{int(ids.min())} to {int(ids.max())}", config.vocab_size - 1
        raise ValueError(f"input_ids holds {got}: the model's tokens are 0 to {last}")
    label_shape = tuple(ids.shape if hasattr(model, "lm_head") else ids.shape[:1])
    for name, shape in (("attention_mask", tuple(ids.shape)), ("labels", label_shape)):
        value = inputs.get(name)
        if value is not None and (not isinstance(value, Tensor) or value.shape != shape):
            raise ValueError(f"{name} is {checks.describe_value(value)}: expected a tensor of shape {shape}")
    if (labels := inputs.get("labels")) is None or labels.device.type != "cpu":
        return
    if not (labels[:, 1:] if labels.ndim == 2 else labels).ne(IGNORE_INDEX).any():
        raise ValueError(f"labels has {NO_LABELS}: their mean loss is not defined")


@contextlib.contextmanager
def capture_hooks(
    model: nn.Module, hidden_point: str, on_embedding: Callable, on_attention: Callable, on_hidden: Callable
) -> Iterator[None]:
    """Hooks on a GPT-2, calling on_embedding(output), on_attention(layer, q, k) and on_hidden(layer, output).
    Raises ValueError for an unknown hidden_point, RuntimeError where a layer did not run exactly once."""
    checks.require_choice("hidden_point", hidden_point, HIDDEN_POINTS)
    blocks, heads, layers_seen = model.transformer.h, model.config.n_head, []

    def split_heads(layer: int, output: Tensor) -> None:  # (b, t, 3·d)
        query, key, _ = output.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # each (b, h, t, e)
        on_attention(layer, query, key)

    def see_hidden(layer: int, output: Tensor) -> None:
        layers_seen.append(layer)
        on_hidden(layer, output)

    with contextlib.ExitStack() as hooks:
        hooks.enter_context(
            model.transformer.drop.register_forward_pre_hook(lambda _module, args: on_embedding(args[0]))
        )
        for layer, block in enumerate(blocks):
            point = block.mlp.c_proj if hidden_point == "c_proj" else block
            for module, callback in ((block.attn.c_attn, split_heads), (point, see_hidden)):
                hooks.enter_context(module.register_forward_hook(
                    lambda _module, _args, output, layer=layer, callback=callback: callback(layer, output)
                ))
        yield
    if layers_seen != list(range(len(blocks))):
        seen = f"{len(layers_seen)} hidden outputs of {len(blocks)} layers"
        raise RuntimeError(f"saw {seen}: is gradient checkpointing on?")


def should_chunk_logits(model: nn.Module, labels: Tensor) -> bool:
    """Whether a language model makes more than CHUNKING_MIN_LOGITS logits for these labels."""
    return hasattr(model, "lm_head") and bool(labels.numel() * model.config.vocab_size > CHUNKING_MIN_LOGITS)
