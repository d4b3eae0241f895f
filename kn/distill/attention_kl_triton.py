"""Triton kernels for eq. 3 on an NVIDIA GPU: per-query KL and its gradients without writing an attention map.

Formulas: attention_kl.py; a and b are the two models in the order of the direction. Forward: a program takes
a block of queries and streams over its keys once, with a running maximum per model; its sums, also that of
e^(a − max)·(a − b), are rescaled when the maximum grows. Saved per query: that mean, lse, the valid flag.
Backward: scores are recomputed, once for dq (a block of queries, streaming over keys) and once for dk (keys,
streaming over queries). Scores are in base 2: exp2 is what the hardware has. Sums are float32."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kn.kronecker.autograd import once_differentiable

HEAD_SIZES = (16, 32, 64, 128)  # tl.dot wants powers of two, from 16 on
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LOG2E, LN2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
MASKED = tl.constexpr(-1e30)  # finite, so that the difference of two masked scores is 0


def supports(q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor) -> bool:
    """Whether the kernels take these inputs: not empty, HEAD_SIZES, DTYPES, q and k of one dtype."""
    one_dtype = q_s.dtype == k_s.dtype and q_t.dtype == k_t.dtype
    fit = all(q.shape[-1] in HEAD_SIZES and q.dtype in DTYPES for q in (q_s, q_t))
    return q_s.numel() > 0 and one_dtype and fit


def block_size(q_s: Tensor, q_t: Tensor) -> int:
    """Queries and keys per program: < 99 KB of shared memory (sm_86's limit), ≤ 16 bytes spilled a thread."""
    head_bytes = max(q.shape[-1] * q.element_size() for q in (q_s, q_t))
    if head_bytes <= 128 and q_s.element_size() == q_t.element_size() == 2:
        return 64
    return 32 if head_bytes <= 256 else 16


@triton.jit
def _load_tile(x, strides, batch, head, rows, length, SIZE: tl.constexpr):
    """Some rows (B,) of one head of x: (B, SIZE), zeros beyond the length."""
    start = x + batch * strides[0] + head * strides[1]
    pointers = start + rows.to(tl.int64)[:, None] * strides[2] + tl.arange(0, SIZE)[None, :]
    return tl.load(pointers, mask=(rows < length)[:, None], other=0.0)


@triton.jit
def _scores(q, k, scale):
    """Base-2 scores (B queries, B keys) in float32, from tiles (B, e)."""
    return tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2E)


@triton.jit
def _allowed(i, j, valid, batch, length, MASK: tl.constexpr):
    """Which keys j (B,) the queries i (B,) see, (B, B): none later, none padded.
    A query that sees none gives finite numbers and, being padded, counts for nothing."""
    allowed = j[None, :] <= i[:, None]
    if MASK:
        real = tl.load(valid + batch * length + j, mask=j < length, other=0) != 0
        allowed = allowed & real[None, :]
    return allowed


@triton.jit
def _forward(
    q_a, k_a, q_b, k_b, valid, kl_out, mean, lse_a, lse_b, strides, scale_a, scale_b, heads, length,
    A: tl.constexpr, B: tl.constexpr, MASK: tl.constexpr, BLOCK: tl.constexpr,
):
    """Eq. 3 for a block of queries: KL in nats; mean, lse_a, lse_b in base 2; each (batch·heads, length)."""
    blocks = tl.cdiv(length, BLOCK)
    batch_head = (tl.program_id(0) // blocks).to(tl.int64)
    block = blocks - 1 - tl.program_id(0) % blocks  # the longest first
    batch, head = batch_head // heads, batch_head % heads
    i = block * BLOCK + tl.arange(0, BLOCK)
    qa = _load_tile(q_a, strides[0], batch, head, i, length, A)  # (BLOCK, A)
    qb = _load_tile(q_b, strides[2], batch, head, i, length, B)  # (BLOCK, B)
    max_a, max_b = tl.full((BLOCK,), MASKED, tl.float32), tl.full((BLOCK,), MASKED, tl.float32)
    sum_a, sum_b = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, (block + 1) * BLOCK, BLOCK):  # up to the diagonal's block
        j = start + tl.arange(0, BLOCK)
        ka = _load_tile(k_a, strides[1], batch, head, j, length, A)
        kb = _load_tile(k_b, strides[3], batch, head, j, length, B)
        allowed = _allowed(i, j, valid, batch, length, MASK)
        a = tl.where(allowed, _scores(qa, ka, scale_a), MASKED)  # (BLOCK, BLOCK)
        b = tl.where(allowed, _scores(qb, kb, scale_b), MASKED)
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
    rows = batch_head * length + i
    tl.store(kl_out + rows, kl, mask=inside)
    tl.store(mean + rows, expectation, mask=inside)
    tl.store(lse_a + rows, la, mask=inside)
    tl.store(lse_b + rows, lb, mask=inside)


@triton.jit
def _score_grad(qs, ks, qt, kt, allowed, mean, lse_s, lse_t, scale_s, scale_t, STUDENT_FIRST: tl.constexpr):
    """Gradient of the KL by the student's scores, (B queries, B keys)."""
    s, t = _scores(qs, ks, scale_s), _scores(qt, kt, scale_t)
    p = tl.exp2(tl.where(allowed, s - lse_s[:, None], MASKED))
    if STUDENT_FIRST:
        return p * ((s - t) - mean[:, None]) * LN2
    return p - tl.exp2(tl.where(allowed, t - lse_t[:, None], MASKED))


@triton.jit
def _backward_q(
    q_s, k_s, q_t, k_t, valid, mean, lse_s, lse_t, grad, dq, strides, scale_s, scale_t, heads, length,
    S: tl.constexpr, T: tl.constexpr, MASK: tl.constexpr, STUDENT_FIRST: tl.constexpr, BLOCK: tl.constexpr,
):
    """dq (batch·heads, length, S) of a block of queries; grad (batch·heads, length) is 0 for padded ones."""
    blocks = tl.cdiv(length, BLOCK)
    batch_head = (tl.program_id(0) // blocks).to(tl.int64)
    block = blocks - 1 - tl.program_id(0) % blocks
    batch, head = batch_head // heads, batch_head % heads
    i = block * BLOCK + tl.arange(0, BLOCK)
    rows, inside = batch_head * length + i, i < length
    qs = _load_tile(q_s, strides[0], batch, head, i, length, S)
    qt = _load_tile(q_t, strides[2], batch, head, i, length, T)
    m = tl.load(mean + rows, mask=inside, other=0.0)
    ls = tl.load(lse_s + rows, mask=inside, other=0.0)
    lt = tl.load(lse_t + rows, mask=inside, other=0.0)
    total = tl.zeros((BLOCK, S), tl.float32)
    for start in range(0, (block + 1) * BLOCK, BLOCK):
        j = start + tl.arange(0, BLOCK)
        ks = _load_tile(k_s, strides[1], batch, head, j, length, S)
        kt = _load_tile(k_t, strides[3], batch, head, j, length, T)
        allowed = _allowed(i, j, valid, batch, length, MASK)
        ds = _score_grad(qs, ks, qt, kt, allowed, m, ls, lt, scale_s, scale_t, STUDENT_FIRST)
        total += tl.dot(ds.to(ks.dtype), ks, input_precision="ieee")
    total *= tl.load(grad + rows, mask=inside, other=0.0)[:, None] * scale_s
    pointers = dq + rows[:, None] * S + tl.arange(0, S)[None, :]
    tl.store(pointers, total.to(dq.dtype.element_ty), mask=inside[:, None])


@triton.jit
def _backward_k(
    q_s, k_s, q_t, k_t, valid, mean, lse_s, lse_t, grad, grad_max, dk, strides, scale_s, scale_t, heads,
    length, S: tl.constexpr, T: tl.constexpr, MASK: tl.constexpr, STUDENT_FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dk (batch·heads, length, S) of a block of keys; grad as above, divided by its largest, grad_max (1,).
    Undivided, a float16 score gradient times 1/(tokens) would be 0."""
    blocks = tl.cdiv(length, BLOCK)
    batch_head = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks  # the first keys have the most queries
    batch, head = batch_head // heads, batch_head % heads
    j = block * BLOCK + tl.arange(0, BLOCK)
    ks = _load_tile(k_s, strides[1], batch, head, j, length, S)
    kt = _load_tile(k_t, strides[3], batch, head, j, length, T)
    total = tl.zeros((BLOCK, S), tl.float32)
    for start in range(block * BLOCK, length, BLOCK):  # from the diagonal's block on
        i = start + tl.arange(0, BLOCK)
        rows, inside = batch_head * length + i, i < length
        qs = _load_tile(q_s, strides[0], batch, head, i, length, S)
        qt = _load_tile(q_t, strides[2], batch, head, i, length, T)
        m = tl.load(mean + rows, mask=inside, other=0.0)
        ls = tl.load(lse_s + rows, mask=inside, other=0.0)
        lt = tl.load(lse_t + rows, mask=inside, other=0.0)
        allowed = _allowed(i, j, valid, batch, length, MASK)
        ds = _score_grad(qs, ks, qt, kt, allowed, m, ls, lt, scale_s, scale_t, STUDENT_FIRST)
        ds *= tl.load(grad + rows, mask=inside, other=0.0)[:, None]
        total += tl.dot(tl.trans(ds.to(qs.dtype)), qs, input_precision="ieee")
    total *= tl.load(grad_max) * scale_s
    pointers = dk + (batch_head * length + j)[:, None] * S + tl.arange(0, S)[None, :]
    tl.store(pointers, total.to(dk.dtype.element_ty), mask=(j < length)[:, None])


class PerQueryKL(torch.autograd.Function):
    """Each query's KL (eq. 3), float32 (batch, heads, length), 0 where padded; see `supports` for the inputs.

    q_s, k_s: (batch, heads, length, e_s), q_t, k_t: (…, e_t), any strides, copied where the last dimension is
    not contiguous; valid (batch, length) is true on real tokens. Gradients reach q_s and k_s, in their dtype.
    """

    @staticmethod
    def forward(ctx, q_s, k_s, q_t, k_t, scales, valid, direction):
        inputs = [x if x.stride(-1) == 1 else x.contiguous() for x in (q_s, k_s, q_t, k_t)]
        batch, heads, length, _ = q_s.shape
        block = block_size(q_s, q_t)
        flags = None if valid is None else valid.to(torch.uint8).contiguous()
        kl, mean, lse_a, lse_b = (q_s.new_empty(q_s.shape[:3], dtype=torch.float32) for _ in range(4))
        scales, student_first = [float(scale) for scale in scales], direction == "student_teacher"
        ordered = inputs if student_first else inputs[2:] + inputs[:2]  # the direction's order
        ordered_scales = scales if student_first else scales[::-1]
        strides = tuple(x.stride()[:3] for x in ordered)
        with torch.cuda.device_of(q_s):
            _forward[(triton.cdiv(length, block) * batch * heads,)](
                *ordered, flags, kl, mean, lse_a, lse_b, strides, *ordered_scales, heads, length,
                A=ordered[0].shape[-1], B=ordered[2].shape[-1], MASK=flags is not None, BLOCK=block,
            )
        ctx.save_for_backward(*inputs, flags, mean, *((lse_a, lse_b) if student_first else (lse_b, lse_a)))
        ctx.scales, ctx.student_first, ctx.block = scales, student_first, block
        return kl

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # (batch, heads, length)
        *inputs, flags, _, _, _ = saved = ctx.saved_tensors
        batch, heads, length, size = inputs[0].shape
        grad = (grad.float() if flags is None else grad.float() * flags[:, None]).contiguous()
        shapes = (tuple(x.stride()[:3] for x in inputs), *ctx.scales, heads, length)
        constants = {"S": size, "T": inputs[2].shape[-1], "MASK": flags is not None}
        constants |= {"STUDENT_FIRST": ctx.student_first, "BLOCK": ctx.block}
        grid = (triton.cdiv(length, ctx.block) * batch * heads,)
        dq = dk = None
        with torch.cuda.device_of(grad):
            if ctx.needs_input_grad[0]:
                dq = inputs[0].new_empty(inputs[0].shape)
                _backward_q[grid](*saved, grad, dq, *shapes, **constants)
            if ctx.needs_input_grad[1]:
                dk = inputs[1].new_empty(inputs[1].shape)
                grad_max = grad.abs().amax().clamp(min=torch.finfo(torch.float32).tiny).reshape(1)
                _backward_k[grid](*saved, grad / grad_max, grad_max, dk, *shapes, **constants)
        return dq, dk, None, None, None, None, None
