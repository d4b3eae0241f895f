"""Eq. 3 on an NVIDIA GPU: kn.attention_kl's rows and gradients as three Triton kernels that never write an attention map.

With scores s = scale·q·k of a query's allowed keys (causal, not padded), p = softmax(s) and a, b the two models in the order of the direction:

    (3)   KL(a ‖ b) of a query = E_{p_a}[a − b] − lse_a + lse_b           lse: log-sum-exp of the scores
    (3')  its gradient by the student's score s, where a is the student:  p_s ((s − t) − E_{p_s}[s − t])
    (3'') and where a is the teacher:                                     p_s − p_t

Forward: a program takes a block of queries and streams over its keys once. Each model has a running maximum and a sum that is rescaled
when the maximum grows; so is the sum of e^(a − max)·(a − b). Kept for the way back are four numbers a query: (3)'s expectation, both
lse and the valid flag. Backward: scores are made again, once for the gradient of q (a block of queries, streaming over keys) and
once for that of k (a block of keys, streaming over queries). Scores are in base 2 inside the kernels: exp2 is what the hardware has.
Sums are float32. Has been run in Triton's interpreter and compiled for sm_80 and sm_90, but not yet on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

SIZES = (16, 32, 64, 128)  # of a head: tl.dot wants powers of two, from 16 on
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LOG2E, LN2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
MASKED = tl.constexpr(-1e30)  # finite, so that a difference of two masked scores is 0; rescaling wipes out what a wholly masked block leaves


def fits(q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor) -> bool:
    """Whether the kernels take these: head sizes 16, 32, 64 or 128; bfloat16, float16 or float32, the same for q and k of a model; some token."""
    return q_s.numel() > 0 and all(q.shape[-1] in SIZES and q.dtype in DTYPES and k.dtype == q.dtype for q, k in ((q_s, k_s), (q_t, k_t)))


def rows_kl(q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor, scales: tuple[float, float], valid: Tensor | None, direction: str) -> Tensor:
    """Each query's KL, float32 (batch, heads, length), 0 for padded queries, from what `fits`: q_s, k_s (batch, heads, length, e_s) and q_t, k_t (…, e_t).

    valid (batch, length) is bool, true on real tokens. Gradients reach q_s and k_s, in their dtype; the teacher's are None.
    """
    return _RowsKL.apply(q_s, k_s, q_t, k_t, scales, valid, direction)


def block_of(q_s: Tensor, q_t: Tensor) -> int:
    """Queries and keys a program holds at a time, by the wider head in bytes: compiled, all want less than 99 KB of shared memory (sm_86 has no more) and none spills more than 16 bytes a thread."""
    wider = max(q.shape[-1] * q.element_size() for q in (q_s, q_t))
    if wider <= 128 and q_s.element_size() == q_t.element_size() == 2:
        return 64
    return 32 if wider <= 256 else 16


@triton.jit
def _tile(x, strides, batch, head, at, length, SIZE: tl.constexpr):
    """Rows `at` (B,) of one head of x: (B, SIZE), zeros beyond the length."""
    place = x + batch * strides[0] + head * strides[1] + at.to(tl.int64)[:, None] * strides[2] + tl.arange(0, SIZE)[None, :]
    return tl.load(place, mask=(at < length)[:, None], other=0.0)


@triton.jit
def _scores(q, k, scale):
    """Base-2 scores (B queries, B keys) in float32, from tiles (B, e)."""
    return tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2E)


@triton.jit
def _allowed(i, j, valid, batch, length, MASK: tl.constexpr):
    """Which keys j (B,) the queries i (B,) see, (B, B): none later, none padded. A query without any gives finite numbers, and as a padded one it counts for nothing."""
    allowed = j[None, :] <= i[:, None]
    if MASK:
        real = tl.load(valid + batch * length + j, mask=j < length, other=0) != 0
        allowed = allowed & real[None, :]
    return allowed


@triton.jit
def _forward(q_a, k_a, q_b, k_b, valid, rows, mean, lse_a, lse_b, strides, scale_a, scale_b, heads, length,
             A: tl.constexpr, B: tl.constexpr, MASK: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Eq. 3 for a block of queries: rows in nats; mean, lse_a and lse_b in base 2, all (batch·heads, length) float32."""
    blocks = tl.cdiv(length, BLOCK)
    pair = (tl.program_id(0) // blocks).to(tl.int64)
    block = blocks - 1 - tl.program_id(0) % blocks  # the longest first
    batch, head = pair // heads, pair % heads
    i = block * BLOCK + tl.arange(0, BLOCK)
    qa, qb = _tile(q_a, strides[0], batch, head, i, length, A), _tile(q_b, strides[2], batch, head, i, length, B)  # (BLOCK, A), (BLOCK, B)
    max_a, max_b = tl.full((BLOCK,), MASKED, tl.float32), tl.full((BLOCK,), MASKED, tl.float32)
    sum_a, sum_b, total = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, (block + 1) * BLOCK, BLOCK):  # up to the diagonal's block
        j = start + tl.arange(0, BLOCK)
        ka, kb = _tile(k_a, strides[1], batch, head, j, length, A), _tile(k_b, strides[3], batch, head, j, length, B)
        allowed = _allowed(i, j, valid, batch, length, MASK)
        a, b = tl.where(allowed, _scores(qa, ka, scale_a), MASKED), tl.where(allowed, _scores(qb, kb, scale_b), MASKED)  # (BLOCK, BLOCK)
        new_a, new_b = tl.maximum(max_a, tl.max(a, 1)), tl.maximum(max_b, tl.max(b, 1))
        keep_a, keep_b = tl.exp2(max_a - new_a), tl.exp2(max_b - new_b)
        e_a, e_b = tl.exp2(a - new_a[:, None]), tl.exp2(b - new_b[:, None])
        sum_a, sum_b = sum_a * keep_a + tl.sum(e_a, 1), sum_b * keep_b + tl.sum(e_b, 1)
        total = total * keep_a + tl.sum(e_a * (a - b), 1)
        max_a, max_b = new_a, new_b
    la, lb, expectation = max_a + tl.log2(sum_a), max_b + tl.log2(sum_b), total / sum_a
    kl = (expectation - (la - lb)) * LN2  # in this order a query with one key gives exactly 0
    inside = i < length
    if MASK:
        kl = tl.where(tl.load(valid + batch * length + i, mask=inside, other=0) != 0, kl, 0.0)
    here = pair * length + i
    tl.store(rows + here, kl, mask=inside)
    tl.store(mean + here, expectation, mask=inside)
    tl.store(lse_a + here, la, mask=inside)
    tl.store(lse_b + here, lb, mask=inside)


@triton.jit
def _slope(qs, ks, qt, kt, allowed, mean, lse_s, lse_t, scale_s, scale_t, FIRST: tl.constexpr):
    """Eq. 3' or 3'': the gradient of each query's KL by the student's scores, (B queries, B keys), from tiles and the numbers (B,) of the forward pass."""
    s, t = _scores(qs, ks, scale_s), _scores(qt, kt, scale_t)
    p = tl.exp2(tl.where(allowed, s - lse_s[:, None], MASKED))
    if FIRST:
        return p * ((s - t) - mean[:, None]) * LN2
    return p - tl.exp2(tl.where(allowed, t - lse_t[:, None], MASKED))


@triton.jit
def _backward_q(q_s, k_s, q_t, k_t, valid, mean, lse_s, lse_t, grad, dq, strides, scale_s, scale_t, heads, length,
                S: tl.constexpr, T: tl.constexpr, MASK: tl.constexpr, FIRST: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """dq (batch·heads, length, S) of a block of queries; grad (batch·heads, length) is that of their rows, 0 for padded ones."""
    blocks = tl.cdiv(length, BLOCK)
    pair = (tl.program_id(0) // blocks).to(tl.int64)
    block = blocks - 1 - tl.program_id(0) % blocks
    batch, head = pair // heads, pair % heads
    i = block * BLOCK + tl.arange(0, BLOCK)
    here, inside = pair * length + i, i < length
    qs, qt = _tile(q_s, strides[0], batch, head, i, length, S), _tile(q_t, strides[2], batch, head, i, length, T)
    m, ls, lt = tl.load(mean + here, mask=inside, other=0.0), tl.load(lse_s + here, mask=inside, other=0.0), tl.load(lse_t + here, mask=inside, other=0.0)
    total = tl.zeros((BLOCK, S), tl.float32)
    for start in range(0, (block + 1) * BLOCK, BLOCK):
        j = start + tl.arange(0, BLOCK)
        ks, kt = _tile(k_s, strides[1], batch, head, j, length, S), _tile(k_t, strides[3], batch, head, j, length, T)
        slope = _slope(qs, ks, qt, kt, _allowed(i, j, valid, batch, length, MASK), m, ls, lt, scale_s, scale_t, FIRST)
        total += tl.dot(slope.to(ks.dtype), ks, input_precision="ieee")
    total *= tl.load(grad + here, mask=inside, other=0.0)[:, None] * scale_s
    tl.store(dq + here[:, None] * S + tl.arange(0, S)[None, :], total.to(dq.dtype.element_ty), mask=inside[:, None])


@triton.jit
def _backward_k(q_s, k_s, q_t, k_t, valid, mean, lse_s, lse_t, grad, top, dk, strides, scale_s, scale_t, heads, length,
                S: tl.constexpr, T: tl.constexpr, MASK: tl.constexpr, FIRST: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """dk (batch·heads, length, S) of a block of keys; grad as above, but divided by top (1,), its largest: a float16 slope times 1/(tokens) would be 0."""
    blocks = tl.cdiv(length, BLOCK)
    pair = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks  # the first keys have the most queries
    batch, head = pair // heads, pair % heads
    j = block * BLOCK + tl.arange(0, BLOCK)
    ks, kt = _tile(k_s, strides[1], batch, head, j, length, S), _tile(k_t, strides[3], batch, head, j, length, T)
    total = tl.zeros((BLOCK, S), tl.float32)
    for start in range(block * BLOCK, length, BLOCK):  # from the diagonal's block on
        i = start + tl.arange(0, BLOCK)
        here, inside = pair * length + i, i < length
        qs, qt = _tile(q_s, strides[0], batch, head, i, length, S), _tile(q_t, strides[2], batch, head, i, length, T)
        m, ls, lt = tl.load(mean + here, mask=inside, other=0.0), tl.load(lse_s + here, mask=inside, other=0.0), tl.load(lse_t + here, mask=inside, other=0.0)
        slope = _slope(qs, ks, qt, kt, _allowed(i, j, valid, batch, length, MASK), m, ls, lt, scale_s, scale_t, FIRST)
        slope *= tl.load(grad + here, mask=inside, other=0.0)[:, None]
        total += tl.dot(tl.trans(slope.to(qs.dtype)), qs, input_precision="ieee")
    total *= tl.load(top) * scale_s
    there = (pair * length + j)[:, None] * S + tl.arange(0, S)[None, :]
    tl.store(dk + there, total.to(dk.dtype.element_ty), mask=(j < length)[:, None])


class _RowsKL(torch.autograd.Function):
    """The kernels' launches: inputs may have any strides but a head's own numbers lie side by side (else they are copied)."""

    @staticmethod
    def forward(ctx, q_s, k_s, q_t, k_t, scales, valid, direction):
        inputs = [x if x.stride(-1) == 1 else x.contiguous() for x in (q_s, k_s, q_t, k_t)]
        batch, heads, length, _ = q_s.shape
        block = block_of(q_s, q_t)
        flags = None if valid is None else valid.to(torch.uint8).contiguous()
        rows, mean, lse_a, lse_b = (torch.empty(q_s.shape[:3], dtype=torch.float32, device=q_s.device) for _ in range(4))
        scales = [float(x) for x in scales]
        first = direction == "student_teacher"
        a, b = (slice(0, 2), slice(2, 4)) if first else (slice(2, 4), slice(0, 2))  # the kernel's order is the direction's
        given = inputs[a] + inputs[b]
        order = scales if first else scales[::-1]
        with torch.cuda.device_of(q_s):
            _forward[(triton.cdiv(length, block) * batch * heads,)](*given, flags, rows, mean, lse_a, lse_b, _strides(given), *order, heads, length,
                                                                    A=given[0].shape[-1], B=given[2].shape[-1], MASK=flags is not None, BLOCK=block)  # fmt: skip
        ctx.save_for_backward(*inputs, flags, mean, *((lse_a, lse_b) if first else (lse_b, lse_a)))
        ctx.scales, ctx.first, ctx.block = scales, first, block
        return rows

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # (batch, heads, length)
        *inputs, flags, mean, lse_s, lse_t = ctx.saved_tensors
        batch, heads, length, size = inputs[0].shape
        grad = grad.float()
        grad = (grad if flags is None else grad * flags[:, None]).contiguous()
        numbers = (flags, mean, lse_s, lse_t)
        how = {"S": size, "T": inputs[2].shape[-1], "MASK": flags is not None, "FIRST": ctx.first, "BLOCK": ctx.block}
        grid, rest = (triton.cdiv(length, ctx.block) * batch * heads,), (_strides(inputs), *ctx.scales, heads, length)
        dq = dk = None
        with torch.cuda.device_of(grad):
            if ctx.needs_input_grad[0]:
                dq = torch.empty(inputs[0].shape, dtype=inputs[0].dtype, device=grad.device)
                _backward_q[grid](*inputs, *numbers, grad, dq, *rest, **how)
            if ctx.needs_input_grad[1]:
                dk = torch.empty(inputs[1].shape, dtype=inputs[1].dtype, device=grad.device)
                top = grad.abs().amax().clamp(min=torch.finfo(torch.float32).tiny).reshape(1)
                _backward_k[grid](*inputs, *numbers, grad / top, top, dk, *rest, **how)
        return dq, dk, None, None, None, None, None


def _strides(inputs: list[Tensor]) -> tuple[tuple[int, ...], ...]:
    """Of batch, head and token, for each tensor."""
    return tuple(x.stride()[:3] for x in inputs)
