"""Forward and backward by hand of the two products that GPT-2 needs: B with one column or one row, rank 1 (eq. 1).

  shared outputs  B (f, 1): a = A x, y[f i + j] = b_j a_i + β[f i + j]
  shared inputs   B (1, f): z_k = Σ_j b_j x[f k + j], y = A z + β

Autograd's version of them passes several times over the wide activation and keeps a and z. Here each pass is made once,
and nothing is kept that a dense layer would not keep or its consumer does: a is found again in the output, through the
largest entry of b. Two gradients of b come from one: Σ_j b_j ∂b_j = ⟨∂A, A⟩.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def expand(a: Tensor, B: Tensor, bias: Tensor | None = None) -> Tensor:
    """y (rows, parts·m·f) with y[f i + j] = b_j a_i + β, part by part, from a (rows, parts·m), B (parts, f), bias (parts·m·f)."""
    parts, f = B.shape
    rows, m = a.shape[0], a.shape[1] // parts
    a = a.view(rows, parts, m)
    y = a.new_empty(rows, parts, m, f)
    columns = (None,) * f if bias is None else bias.view(parts, m, f).unbind(-1)
    for out, b, beta in zip(y.unbind(-1), B.unsqueeze(1).unbind(-1), columns, strict=True):  # strided writes: half the time of a broadcast over f
        torch.mul(a, b, out=out) if beta is None else torch.addcmul(beta, a, b, out=out)
    return y.view(rows, -1)


def contract(x: Tensor, B: Tensor) -> Tensor:
    """z (rows, parts·m) with z_i = Σ_j b_j x[f i + j], part by part, from x (rows, parts·m·f), B (parts, f)."""
    parts, f = B.shape
    if parts == 1:
        return x.view(x.shape[0], -1, f) @ B[0]
    columns = zip(x.view(x.shape[0], parts, -1, f).unbind(-1), B.unsqueeze(1).unbind(-1), strict=True)
    first, b = next(columns)
    z = first * b
    for column, b in columns:
        z.addcmul_(column, b)
    return z.flatten(1)


def inner(u: Tensor, v: Tensor) -> Tensor:
    """Σ u v over (rows, m), a float32 (float64) scalar."""
    if u.dtype in (torch.float32, torch.float64):
        return torch.linalg.vecdot(u, v).sum()
    return (u * v).sum(dtype=torch.float32)


class _SharedOutputs(torch.autograd.Function):
    @staticmethod
    def forward(x, A, B, bias):  # x (rows, n), A (parts, m, n), B (parts, f), bias (parts·m·f) or None
        return expand(F.linear(x, A.flatten(0, 1)), B, bias)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs, output)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, A, B, bias, y = ctx.saved_tensors
        want_x, want_A, want_B, want_bias = ctx.needs_input_grad
        grad_a = contract(grad, B) if want_x or want_A or want_B else None  # (rows, parts·m)
        grad_x = grad_a @ A.flatten(0, 1) if want_x else None
        grad_A = (grad_a.T @ x).view_as(A) if want_A or want_B else None
        grad_bias = grad.sum(0) if bias is not None and (want_bias or want_B) else None
        grad_B = None
        if want_B:
            shape = (len(B), A.shape[1], B.shape[1])
            wide, kept = (t.view(-1, *shape) for t in (grad, y))  # (rows, parts, m, f)
            constant = None if bias is None else (grad_bias.view(shape), bias.view(shape))
            grad_B = torch.stack([_factor_gradient(x, grad_A[p], A[p], b, wide[:, p], kept[:, p], constant and (constant[0][p], constant[1][p])) for p, b in enumerate(B.tolist())]).to(B.dtype)
        return grad_x, grad_A if want_A else None, grad_B, grad_bias if want_bias else None


def _factor_gradient(x, grad_A, A, b, wide, kept, constant):
    """∂b (f) of one part from ∂y and y (rows, m, f): a is (y − β) / b, by the largest entry of b."""
    big = max(range(len(b)), key=lambda j: abs(b[j]))
    if not b[big]:  # the output says nothing of a
        a = F.linear(x, A)
        return torch.stack([inner(column, a) for column in wide.unbind(-1)])
    others = len(x) >= A.shape[1]  # then ⟨∂A, A⟩ is cheaper than one more ⟨∂y, a⟩
    columns, source = wide.unbind(-1), kept[..., big]
    found = {j: inner(columns[j], source) for j in range(len(b)) if not (others and j == big)}
    if constant is not None:
        beta = constant[1][:, big]
        found = {j: value - torch.dot(constant[0][:, j], beta) for j, value in found.items()}
    found = {j: value / b[big] for j, value in found.items()}
    if others:
        found[big] = (inner(grad_A, A) - sum(b[j] * value for j, value in found.items())) / b[big]
    return torch.stack([found[j] for j in range(len(b))])


class _SharedInputs(torch.autograd.Function):
    @staticmethod
    def forward(x, A, B, bias):  # x (rows, m·f), A (out, m), B (1, f), bias (out) or None
        return F.linear(contract(x, B), A, bias)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.has_bias = inputs[3] is not None
        ctx.save_for_backward(*inputs[:3])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, A, B = ctx.saved_tensors
        want_x, want_A, want_B, want_bias = ctx.needs_input_grad
        grad_z = grad @ A if want_x or want_B else None  # (rows, m)
        grad_x = expand(grad_z, B) if want_x else None
        grad_A = grad.T @ contract(x, B) if want_A or want_B else None
        grad_B = None
        if want_B:
            (b,) = B.tolist()
            big = max(range(len(b)), key=lambda j: abs(b[j]))
            others = len(x) >= len(A) and b[big]
            columns = x.view(len(x), -1, len(b)).unbind(-1)
            found = {j: inner(columns[j], grad_z) for j in range(len(b)) if not (others and j == big)}
            if others:
                found[big] = (inner(grad_A, A) - sum(b[j] * value for j, value in found.items())) / b[big]
            grad_B = torch.stack([found[j] for j in range(len(b))]).to(B.dtype)[None]
        return grad_x, grad_A if want_A else None, grad_B, grad.sum(0) if ctx.has_bias and want_bias else None


def _apply(function, x: Tensor, A: Tensor, B: Tensor, bias: Tensor | None) -> Tensor:
    """In autocast's dtype where it is on, as nn.Linear does."""
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) and x.dtype != torch.float64 else x.dtype
    y = function.apply(x.to(dtype).reshape(-1, x.shape[-1]), A.to(dtype), B.to(dtype), None if bias is None else bias.to(dtype))
    return y.view(*x.shape[:-1], -1)


def column_factor_linear(x: Tensor, A: Tensor, B: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (…, n) → y (…, parts·m·f) for A (parts, m, n), B (parts, f) and bias (parts·m·f); differentiable once."""
    return _apply(_SharedOutputs, x, A, B, bias)


def row_factor_linear(x: Tensor, A: Tensor, B: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (…, m·f) → y (…, out) for A (out, m), B (1, f) and bias (out); differentiable once."""
    return _apply(_SharedInputs, x, A, B, bias)
