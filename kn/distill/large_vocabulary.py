"""Cross-entropy and logit distillation over a large vocabulary, a few rows of logits at a time.

The logits, made from the last hidden states, are never in memory as one tensor, nor is their gradient: the
gradients by hidden states and head are made with the loss and kept. PyTorch 2.13's chunked
F.linear_cross_entropy takes 16 rows at a time on a CPU, which doubles the step's time, and its backward makes
a second gradient of the head's size; Liger's needs a GPU (LOG.md)."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from kn.kronecker.autograd import once_differentiable

CHUNK_ROWS = 256  # of logits at a time: 51 MB at GPT-2's vocabulary in float32
IGNORE_INDEX = -100
ChunkLoss = Callable[[Tensor, slice], tuple[Tensor, Tensor]]  # (logits, their rows) → (loss, its gradient)


def chunked_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Mean next-token cross-entropy from last hidden states (b, t, d) and the head's weight (v, d).
    labels: (b, t), −100 is left out. float32 (float64 stays); NaN where no label is left, as in PyTorch."""
    target = labels[:, 1:].flatten()
    known = target != IGNORE_INDEX
    row_weight = known.to(torch.promote_types(weight.dtype, torch.float32)) / known.sum()

    def chunk_loss(logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        log_p = F.log_softmax(logits, -1)
        index = target[rows].clamp(min=0)[:, None]
        loss = -(log_p.gather(1, index)[:, 0] * row_weight[rows]).sum()
        grad = log_p.exp_()
        grad.scatter_add_(1, index, grad.new_full(index.shape, -1))
        return loss, grad.mul_(row_weight[rows, None])

    return _chunked_loss(hidden[:, :-1].flatten(0, 1), weight, chunk_loss)


def chunked_logit_kd(
    hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor,
    mask: Tensor | None = None, temperature: float = 2.0,
) -> Tensor:
    """vanilla_kd_loss (T²·KL(teacher ‖ student)) from the last hidden states (b, t, d) and heads (v, d).
    Mean over the positions where mask (b, t) is 1 (none: 0), or all. Gradients reach the student only."""
    mask = torch.ones(hidden.shape[:2], device=hidden.device) if mask is None else mask
    valid = mask.to(hidden.device, torch.promote_types(weight.dtype, torch.float32))
    row_weight = (valid / valid.sum().clamp(min=1)).flatten()
    teacher_hidden = teacher_hidden.detach().flatten(0, 1)

    def chunk_loss(logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        log_p_s = F.log_softmax(logits / temperature, -1)
        log_p_t = F.log_softmax(_logits(teacher_hidden[rows], teacher_weight.detach()) / temperature, -1)
        p_t = log_p_t.exp()
        loss = (torch.linalg.vecdot(p_t, log_p_t - log_p_s) * row_weight[rows]).sum() * temperature**2
        return loss, log_p_s.exp_().sub_(p_t).mul_(row_weight[rows, None] * temperature)

    return _chunked_loss(hidden.flatten(0, 1), weight, chunk_loss)


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """(rows, d), (v, d) → (rows, v), in float32 at least."""
    return (hidden.to(weight.dtype) @ weight.T).to(torch.promote_types(weight.dtype, torch.float32))


def _chunked_loss(hidden: Tensor, weight: Tensor, chunk_loss: ChunkLoss) -> Tensor:
    """_ChunkedLoss with products in autocast's dtype and everything else outside of it."""
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        return _ChunkedLoss.apply(hidden, weight, chunk_loss)


class _ChunkedLoss(torch.autograd.Function):
    """Sum of a ChunkLoss over all rows of hidden (n, d) @ weight (v, d).T."""

    @staticmethod
    def forward(ctx, hidden, weight, chunk_loss):
        total, dtype = 0, torch.promote_types(weight.dtype, torch.float32)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=dtype) if ctx.needs_input_grad[1] else None
        for start in range(0, len(hidden), CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            loss, grad = chunk_loss(_logits(hidden[rows], weight), rows)
            total, grad = total + loss, grad.to(weight.dtype)
            if grad_hidden is not None:
                torch.mm(grad, weight, out=grad_hidden[rows])
            if grad_weight is not None and grad.dtype == grad_weight.dtype:
                grad_weight.addmm_(grad.T, hidden[rows])
            elif grad_weight is not None:
                grad_weight += grad.T @ hidden[rows]
        ctx.grads, ctx.dtype = (grad_hidden, grad_weight), weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        if ctx.grads is None:
            raise RuntimeError("backward ran twice: the gradients of this loss are made once and given away")
        (grad_hidden, grad_weight), ctx.grads = ctx.grads, None
        grad_hidden = None if grad_hidden is None else grad_hidden.mul_(grad)
        return grad_hidden, None if grad_weight is None else grad_weight.mul_(grad).to(ctx.dtype), None
