"""Eq. 3 without attention maps (MATH.md §6): the KL of two models' attention distributions from queries and keys alone, in memory linear in the length.

    KL(S ‖ T) of a query = E_{p_S}[s_S − s_T] − lse_S + lse_T,  its gradient by s_S is p_S ((s_S − s_T) − E_{p_S}[s_S − s_T])
    KL(T ‖ S) of a query = E_{p_T}[s_T − s_S] − lse_T + lse_S,  its gradient by s_S is p_S − p_T

Scores stand in memory for a block of queries at a time; where the weights of the queries are known beforehand (every mean or
sum) the gradients are made in the same pass, else in a second one. On an NVIDIA GPU with Triton, kernels_triton.py takes the same
steps in kernels of its own.
"""

from __future__ import annotations

import functools
from types import ModuleType

import torch
from torch import Tensor

from kn.kronecker import checks

DIRECTIONS = ("student_teacher", "teacher_student")  # KL(S‖T) as eq. 3 prints it, or MiniLM's KL(T‖S)
REDUCTIONS = ("mean", "sum", "none")
SCORES = 2**19  # of one model, at a time: 2 MB stay in a core's cache
SMALLEST = 16  # queries at a time
MASKED = -1e30  # finite, so that a difference of two masked scores is 0


def attention_kl(q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor, scale_s: float | None = None, scale_t: float | None = None,
                 attention_mask: Tensor | None = None, direction: str = "student_teacher", reduction: str = "mean") -> Tensor:  # fmt: skip
    """Eq. 3 for one layer: KL of causal attention distributions, from q and k (batch, heads, length, head size) of student and teacher.

    Head sizes may differ; scales default to 1/√head size of each model. Padded keys (attention_mask (batch, length) zero) get no
    probability and padded queries do not count. Mean or sum over batch, heads and valid queries, or each query's (batch, heads,
    length), 0 for padded ones. Computed in float32 (float64 inputs stay float64); gradients reach q_s and k_s: the teacher is fixed.
    Raises TypeError for what is no tensor or number, ValueError for shapes that do not fit and for unknown directions and reductions.
    """
    if direction not in DIRECTIONS:
        raise ValueError(f"direction {checks.describe_value(direction)} is unknown: allowed are {', '.join(DIRECTIONS)}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction {checks.describe_value(reduction)} is unknown: allowed are {', '.join(REDUCTIONS)}")
    shapes = [tuple(checks.require_float_tensor(name, x).shape) for name, x in (("q_s", q_s), ("k_s", k_s), ("q_t", q_t), ("k_t", k_t))]
    for name, scale in (("scale_s", scale_s), ("scale_t", scale_t)):
        if scale is not None:
            checks.require_nonnegative(name, scale)
    if attention_mask is not None and not isinstance(attention_mask, Tensor):
        raise TypeError(f"attention_mask is {checks.describe_value(attention_mask)}: a tensor (batch, length) wanted")
    if any(len(shape) != 4 for shape in shapes) or shapes[0] != shapes[1] or shapes[2] != shapes[3] or shapes[0][:3] != shapes[2][:3]:
        raise ValueError(f"q and k must be (batch, heads, length, head size), the first three the same for both models, got {', '.join(map(str, shapes))}")
    batch, heads, length, size = shapes[0]
    if attention_mask is not None and tuple(attention_mask.shape) != (batch, length):
        raise ValueError(f"attention_mask must be (batch, length) = ({batch}, {length}), got {tuple(attention_mask.shape)}")
    scales = (size**-0.5 if scale_s is None else scale_s, shapes[2][3] ** -0.5 if scale_t is None else scale_t)
    valid = None if attention_mask is None else attention_mask.bool()
    weights = None
    if reduction != "none":
        weights = q_s.new_ones(batch, length, dtype=_wide(q_s)) if valid is None else valid.to(_wide(q_s))
        weights = weights / (weights.sum().clamp(min=1) * heads) if reduction == "mean" else weights  # no valid query at all: 0
    inputs = (q_s, k_s, q_t.detach(), k_t.detach())
    kernels = gpu_form(*inputs)
    if kernels is not None:
        rows = kernels.rows_kl(*inputs, scales, valid, direction)
        return rows if weights is None else (rows * weights[:, None]).sum()
    with torch.autocast(q_s.device.type, enabled=False):
        rows = _AttentionKL.apply(*inputs, scales, valid, direction, weights)
    return rows if weights is None else rows.sum()


def gpu_form(*inputs: Tensor) -> ModuleType | None:
    """kn.distill.attention_kl_triton where it can take q_s, k_s, q_t and k_t: on one NVIDIA GPU (Ampere or newer), Triton installed, and what the kernels `fits`; else None."""
    device = inputs[0].device
    if device.type != "cuda" or any(x.device != device for x in inputs) or torch.version.cuda is None or torch.cuda.get_device_capability(device) < (8, 0):
        return None
    kernels = _kernels()
    return kernels if kernels is not None and kernels.fits(*inputs) else None


@functools.cache
def _kernels() -> ModuleType | None:
    """kn.distill.attention_kl_triton, or None where Triton is not installed: kn needs it only on a GPU, and there only for speed."""
    try:
        from kn.distill import attention_kl_triton as kernels_triton
    except ImportError:
        return None
    return kernels_triton


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class _AttentionKL(torch.autograd.Function):
    """Each query's KL (batch, heads, length), times its weight (batch, length) where those are given; they must not depend on anything that is trained."""

    @staticmethod
    def forward(ctx, q_s, k_s, q_t, k_t, scales, valid, direction, weights):
        ctx.how = (scales, valid, direction)
        ctx.at_once = weights is not None
        wanted = ctx.at_once and (ctx.needs_input_grad[0] or ctx.needs_input_grad[1])
        rows, *grads = _pass((q_s, k_s, q_t, k_t), *ctx.how, weights[:, None].expand(q_s.shape[:3]) if wanted else None)
        if ctx.at_once:
            rows = rows * weights[:, None]
            ctx.save_for_backward(*grads)
        else:
            rows = rows if valid is None else rows * valid[:, None]
            ctx.save_for_backward(q_s, k_s, q_t, k_t)
        return rows

    @staticmethod
    def backward(ctx, grad):  # (batch, heads, length)
        if ctx.at_once:  # the rows were summed: one number for all
            dq, dk = ctx.saved_tensors
            dq, dk = dq * grad[0, 0, 0].to(dq.dtype), dk * grad[0, 0, 0].to(dk.dtype)
        else:
            valid = ctx.how[1]
            _, dq, dk = _pass(ctx.saved_tensors, *ctx.how, grad if valid is None else grad * valid[:, None])
        return dq, dk, None, None, None, None, None, None


def _pass(inputs: tuple[Tensor, ...], scales: tuple[float, float], valid: Tensor | None, direction: str, weights: Tensor | None) -> tuple[Tensor, ...]:
    """(rows (b, h, t), and where weights (b, h, t) are given the gradients of Σ weights·rows by q_s and k_s), a block of queries at a time."""
    dtype = _wide(inputs[0])
    q_s, k_s, q_t, k_t = (x.detach().flatten(0, 1).to(dtype) for x in inputs)  # (b·h, t, e)
    q_s, q_t = q_s * scales[0], q_t * scales[1]
    pairs, length = q_s.shape[:2]
    heads = inputs[0].shape[1]
    padded = None if valid is None else ~valid.repeat_interleave(heads, 0)  # (b·h, t)
    rows = q_s.new_empty(pairs, length)
    grads = None if weights is None else (weights.reshape(pairs, length, 1).to(dtype), torch.empty_like(q_s), torch.zeros_like(k_s))
    block = min(length, max(SMALLEST, SCORES // (pairs * length)))
    triangle = torch.ones(block, block, dtype=torch.bool, device=q_s.device).triu_(1)
    for start in range(0, length, block):
        end = min(start + block, length)
        here, seen, size = slice(start, end), slice(0, end), end - start

        def scores(q, k, here=here, seen=seen, start=start, size=size):
            s = torch.bmm(q[:, here], k[:, seen].transpose(1, 2))  # (b·h, block, keys)
            if padded is not None:
                own = torch.eye(size, dtype=torch.bool, device=s.device)  # a padded query keeps itself, so that its softmax is defined
                s[..., :start].masked_fill_(padded[:, None, :start], MASKED)
                s[..., start:].masked_fill_(padded[:, None, here] & ~own, MASKED)
            s[..., start:].masked_fill_(triangle[:size, :size], MASKED)
            return s

        s, t = scores(q_s, k_s), scores(q_t, k_t)
        p_s, p_t = s.softmax(-1), t.softmax(-1)  # these kernels know exp's underflow; exp and logsumexp take 20 times as long on masked scores
        lse_s, lse_t = (x.amax(-1, keepdim=True) - p.amax(-1, keepdim=True).log() for x, p in ((s, p_s), (t, p_t)))
        if direction == "student_teacher":
            mean = torch.linalg.vecdot(p_s, s.sub_(t)).unsqueeze(-1)
            rows[:, here] = (mean - lse_s + lse_t).squeeze(-1)
        else:
            mean = torch.linalg.vecdot(p_t, t.sub_(s)).unsqueeze(-1)
            rows[:, here] = (mean - lse_t + lse_s).squeeze(-1)
        if grads is not None:
            weight, dq, dk = grads
            slope = (s.sub_(mean).mul_(p_s) if direction == "student_teacher" else p_s.sub_(p_t)).mul_(weight[:, here])
            dq[:, here] = torch.bmm(slope, k_s[:, seen])
            dk[:, seen].baddbmm_(slope.transpose(1, 2), q_s[:, here])
    rows = rows.view(inputs[0].shape[:3])
    if grads is None:
        return (rows,)
    _, dq, dk = grads
    return rows, (dq * scales[0]).view(inputs[0].shape).to(inputs[0].dtype), dk.view(inputs[1].shape).to(inputs[1].dtype)
