"""Eq. 3, the KL divergence of two models' attention, from queries and keys in memory linear in the length.

    KL(S ‖ T) of a query = E_{p_S}[s_S − s_T] − lse_S + lse_T, ∂/∂s_S = p_S ((s_S − s_T) − E_{p_S}[s_S − s_T])
    KL(T ‖ S) of a query = E_{p_T}[s_T − s_S] − lse_T + lse_S, ∂/∂s_S = p_S − p_T

s are scaled scores q·k, p their softmax, lse their log-sum-exp. Scores exist for one block of
queries at a time. Where the queries' weights are known beforehand ("mean", "sum") the gradients come from the
same pass, else from a second one. On an NVIDIA GPU, attention_kl_triton.py does the same in Triton kernels.
"""

import functools
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from kn.kronecker import checks
from kn.kronecker.autograd import once_differentiable

DIRECTIONS = ("student_teacher", "teacher_student")  # KL(S ‖ T) as eq. 3 prints it, or MiniLM's KL(T ‖ S)
REDUCTIONS = ("mean", "sum", "none")
BLOCK_SCORES = 2**19  # scores of one model at a time: 2 MB stay in a core's cache
MIN_BLOCK = 16  # queries at a time
MASKED = -1e30  # finite, so that the difference of two masked scores is 0


def attention_kl(
    q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor, scale_s: float | None = None,
    scale_t: float | None = None, attention_mask: Tensor | None = None, direction: str = "student_teacher",
    reduction: str = "mean",
) -> Tensor:
    """KL divergence of two models' causal attention in one layer (eq. 3), student (_s) and teacher (_t).

    q, k: (batch, heads, length, head size); head sizes may differ. Scales default to 1/√head size.
    attention_mask: (batch, length), 0 on padding: its keys get no probability, its queries do not count.
    Returns the mean or sum over batch, heads and valid queries, or with "none" each query's KL (batch, heads,
    length), 0 for padded ones; float32 (float64 stays). Gradients reach q_s and k_s only.
    Raises TypeError for wrong types, ValueError for wrong shapes and for unknown directions and reductions.
    """
    checks.require_choice("direction", direction, DIRECTIONS)
    checks.require_choice("reduction", reduction, REDUCTIONS)
    tensors = {"q_s": q_s, "k_s": k_s, "q_t": q_t, "k_t": k_t}
    shapes = [tuple(checks.require_float_tensor(name, x).shape) for name, x in tensors.items()]
    same_model = shapes[0] == shapes[1] and shapes[2] == shapes[3]
    if any(len(shape) != 4 for shape in shapes) or not same_model or shapes[0][:3] != shapes[2][:3]:
        raise ValueError(
            "q and k must be (batch, heads, length, head size), the first three the same for both models, "
            f"got {', '.join(map(str, shapes))}"
        )
    batch, heads, length, _ = shapes[0]
    valid = None
    if attention_mask is not None:
        if not isinstance(attention_mask, Tensor):
            got = checks.describe_value(attention_mask)
            raise TypeError(f"attention_mask is {got}: expected a tensor (batch, length)")
        if (shape := tuple(attention_mask.shape)) != (batch, length):
            raise ValueError(f"attention_mask must be (batch, length) = ({batch}, {length}), got {shape}")
        valid = attention_mask.bool()
    scales = [
        shape[3] ** -0.5 if scale is None else checks.require_nonnegative(name, scale)
        for name, scale, shape in (("scale_s", scale_s, shapes[0]), ("scale_t", scale_t, shapes[2]))
    ]
    dtype, sums = torch.promote_types(q_s.dtype, torch.float32), reduction != "none"
    weights = q_s.new_ones(batch, length, dtype=dtype) if valid is None else valid.to(dtype)
    if reduction == "mean":
        weights = weights / (weights.sum().clamp(min=1) * heads)  # no valid query at all: 0
    inputs = (q_s, k_s, q_t.detach(), k_t.detach())
    if (kernels := triton_backend(*inputs)) is not None:
        kl = kernels.PerQueryKL.apply(*inputs, scales, valid, direction)
        return (kl * weights[:, None]).sum() if sums else kl
    with torch.autocast(q_s.device.type, enabled=False):
        kl = _AttentionKL.apply(*inputs, scales, valid, direction, weights, sums)
    return kl.sum() if sums else kl


def triton_backend(*inputs: Tensor) -> ModuleType | None:
    """The module attention_kl_triton where it can take q_s, k_s, q_t, k_t, else None.
    It needs Triton, an NVIDIA GPU (Ampere or newer), and head sizes and dtypes that its kernels support."""
    device = inputs[0].device
    on_one_gpu = device.type == "cuda" and all(x.device == device for x in inputs)
    if not on_one_gpu or torch.version.cuda is None or torch.cuda.get_device_capability(device) < (8, 0):
        return None
    kernels = _import_kernels()
    return kernels if kernels is not None and kernels.supports(*inputs) else None


@functools.cache
def _import_kernels() -> ModuleType | None:
    """The module attention_kl_triton, or None without Triton, which only serves speed on a GPU."""
    try:
        from kn.distill import attention_kl_triton
    except ImportError:
        return None
    return attention_kl_triton


class _AttentionKL(torch.autograd.Function):
    """Per-query KL (batch, heads, length) times the constant weights (batch, length).
    If the result is only summed (`sums`), its gradients are made by forward as well."""

    @staticmethod
    def forward(ctx, q_s, k_s, q_t, k_t, scales, valid, direction, weights, sums):
        ctx.options, ctx.weights, ctx.sums = (scales, valid, direction), weights, sums
        needs_grad = sums and any(ctx.needs_input_grad[:2])
        kl_grad = weights[:, None].expand(q_s.shape[:3]) if needs_grad else None
        kl, *grads = _blockwise_kl((q_s, k_s, q_t, k_t), *ctx.options, kl_grad)
        ctx.save_for_backward(*(grads if sums else (q_s, k_s, q_t, k_t)))
        return kl * weights[:, None]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # (batch, heads, length)
        if ctx.sums:
            dq, dk = (x * grad[0, 0, 0].to(x.dtype) for x in ctx.saved_tensors)
        else:
            _, dq, dk = _blockwise_kl(ctx.saved_tensors, *ctx.options, grad * ctx.weights[:, None])
        return dq, dk, None, None, None, None, None, None, None


def _blockwise_kl(
    inputs: Sequence[Tensor], scales: list[float], valid: Tensor | None, direction: str,
    kl_grad: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """(kl,) or, with kl_grad, (kl, dq, dk), a block of queries at a time; kl and kl_grad (b, h, t)."""
    dtype = torch.promote_types(inputs[0].dtype, torch.float32)
    q_s, k_s, q_t, k_t = (x.detach().flatten(0, 1).to(dtype) for x in inputs)  # (b·h, t, e)
    q_s, q_t = q_s * scales[0], q_t * scales[1]
    batch_heads, length = q_s.shape[:2]
    padded = None if valid is None else ~valid.repeat_interleave(inputs[0].shape[1], 0)  # (b·h, t)
    kl = q_s.new_empty(batch_heads, length)
    if kl_grad is not None:
        weight = kl_grad.reshape(batch_heads, length, 1).to(dtype)
        dq, dk = torch.empty_like(q_s), torch.zeros_like(k_s)
    block = min(length, max(MIN_BLOCK, BLOCK_SCORES // (batch_heads * length)))
    future = torch.ones(block, block, dtype=torch.bool, device=q_s.device).triu_(1)
    for start in range(0, length, block):
        end = min(start + block, length)
        rows, keys = slice(start, end), slice(0, end)
        s = _masked_scores(q_s[:, rows], k_s[:, keys], padded, future)  # (b·h, block, keys)
        t = _masked_scores(q_t[:, rows], k_t[:, keys], padded, future)
        # softmax's kernels know exp's underflow; exp and logsumexp take 20 times as long on masked scores
        p_s, p_t = s.softmax(-1), t.softmax(-1)
        lse_s, lse_t = (x.amax(-1, True) - p.amax(-1, True).log() for x, p in ((s, p_s), (t, p_t)))
        if direction == "student_teacher":
            mean = torch.linalg.vecdot(p_s, s.sub_(t)).unsqueeze(-1)
            kl[:, rows] = (mean - lse_s + lse_t).squeeze(-1)
        else:
            mean = torch.linalg.vecdot(p_t, t.sub_(s)).unsqueeze(-1)
            kl[:, rows] = (mean - lse_t + lse_s).squeeze(-1)
        if kl_grad is not None:
            ds = s.sub_(mean).mul_(p_s) if direction == "student_teacher" else p_s.sub_(p_t)
            ds.mul_(weight[:, rows])
            dq[:, rows] = torch.bmm(ds, k_s[:, keys])
            dk[:, keys].baddbmm_(ds.transpose(1, 2), q_s[:, rows])
    kl = kl.view(inputs[0].shape[:3])
    if kl_grad is None:
        return (kl,)
    grads = zip((dq * scales[0], dk), inputs[:2], strict=True)
    return kl, *(grad.view(x.shape).to(x.dtype) for grad, x in grads)


def _masked_scores(q: Tensor, k: Tensor, padded: Tensor | None, future: Tensor) -> Tensor:
    """q·k (b·h, queries, keys), MASKED where a key is padded or later; queries belong to the last keys."""
    scores = torch.bmm(q, k.transpose(1, 2))
    size, length = scores.shape[1:]
    before, block = scores.split([length - size, size], -1)
    if padded is not None:
        itself = torch.eye(size, dtype=torch.bool, device=q.device)  # seen though padded: softmax is defined
        before.masked_fill_(padded[:, None, : length - size], MASKED)
        block.masked_fill_(padded[:, None, length - size : length] & ~itself, MASKED)
    block.masked_fill_(future[:size, :size], MASKED)
    return scores
