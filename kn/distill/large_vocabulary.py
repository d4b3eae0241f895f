"""Losses over a large vocabulary made from the last hidden states, some rows of logits at a time: neither a model's logits nor their gradient stand in memory whole.

    chunked_cross_entropy(hidden, weight, labels)                       cross-entropy of each next token
    chunked_logit_kd(hidden, weight, guide, guide_weight, mask, T)        Hinton's T²·KL(teacher ‖ student) of the softened logits

The gradients are made with the value and kept, not the logits. PyTorch 2.13's own chunked F.linear_cross_entropy does the first of the two,
but takes rows 16 at a time on a CPU, which doubles the step's time, and makes a second gradient of the head's size in its backward;
Liger's is for GPUs alone (LOG.md). Reference: F.cross_entropy and distill.vanilla_kd_loss (tests/test_head.py).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

ROWS = 256  # of logits at a time: 51 MB at GPT-2's vocabulary in float32
IGNORED = -100


def chunked_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of each next token (labels (b, t), −100 is left out) from the last hidden states (b, t, d) and the head's weight (v, d); float32 (float64 stays)."""
    target = labels[:, 1:].flatten()
    known = target != IGNORED
    share = known.to(_wide(weight)) / known.sum()  # as PyTorch: not a number where nothing is left

    def rows(logits: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        log_p = F.log_softmax(logits, -1)
        at = target[part].clamp(min=0)[:, None]
        value = -(log_p.gather(1, at)[:, 0] * share[part]).sum()
        slope = log_p.exp_()
        slope.scatter_add_(1, at, slope.new_full(at.shape, -1))
        return value, slope.mul_(share[part, None])

    return _over_rows(hidden[:, :-1].flatten(0, 1), weight, rows)


def chunked_logit_kd(hidden: Tensor, weight: Tensor, guide: Tensor, guide_weight: Tensor, mask: Tensor | None = None, temperature: float = 2.0) -> Tensor:
    """T²·KL(teacher ‖ student), mean over positions (those where mask (b, t) is 1), from both models' last hidden states (b, t, d) and heads (v, d); no gradient to the teacher."""
    valid = (torch.ones(hidden.shape[:2], device=hidden.device) if mask is None else mask).to(hidden.device, _wide(weight))
    share, guide = (valid / valid.sum()).flatten(), guide.detach().flatten(0, 1)

    def rows(logits: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        s = F.log_softmax(logits / temperature, -1)
        t = F.log_softmax(_product(guide[part], guide_weight.detach()) / temperature, -1)
        p = t.exp()
        value = (torch.linalg.vecdot(p, t - s) * share[part]).sum() * temperature**2
        return value, s.exp_().sub_(p).mul_(share[part, None] * temperature)

    return _over_rows(hidden.flatten(0, 1), weight, rows)


def _over_rows(hidden: Tensor, weight: Tensor, rows: Callable[[Tensor, slice], tuple[Tensor, Tensor]]) -> Tensor:
    if torch.is_autocast_enabled(hidden.device.type):
        kind = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(kind), weight.to(kind)
    with torch.autocast(hidden.device.type, enabled=False):
        return _OverRows.apply(hidden, weight, rows)


def _product(hidden: Tensor, weight: Tensor) -> Tensor:
    """Logits, in float32 at least."""
    return (hidden.to(weight.dtype) @ weight.T).to(_wide(weight))


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class _OverRows(torch.autograd.Function):
    """The sum of rows(logits of some rows) and its gradients by hidden (n, d) and weight (v, d)."""

    @staticmethod
    def forward(ctx, hidden, weight, rows):
        total, to_hidden, to_weight = 0, None, None
        if ctx.needs_input_grad[0]:
            to_hidden = torch.empty_like(hidden)
        if ctx.needs_input_grad[1]:
            to_weight = torch.zeros_like(weight, dtype=_wide(weight))
        for start in range(0, len(hidden), ROWS):
            part = slice(start, start + ROWS)
            value, slope = rows(_product(hidden[part], weight), part)
            total, slope = total + value, slope.to(weight.dtype)
            if to_hidden is not None:
                torch.mm(slope, weight, out=to_hidden[part])
            if to_weight is not None and slope.dtype == to_weight.dtype:
                to_weight.addmm_(slope.T, hidden[part])
            elif to_weight is not None:
                to_weight += slope.T @ hidden[part]
        ctx.grads, ctx.kind = (to_hidden, to_weight), weight.dtype
        return total

    @staticmethod
    def backward(ctx, grad):
        if ctx.grads is None:
            raise RuntimeError("this loss was gone back through already: its gradients are made once and given away")
        (to_hidden, to_weight), ctx.grads = ctx.grads, None
        return None if to_hidden is None else to_hidden.mul_(grad), None if to_weight is None else to_weight.mul_(grad).to(ctx.kind), None
