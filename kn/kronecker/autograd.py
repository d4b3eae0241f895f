"""Forward and hand-written backward of KroneckerLinear at rank 1 where B has one column or one row (eq. 1).

  column factor  B (f, 1): a = A x, y[f·i + j] = b_j a_i + β[f·i + j]
  row factor     B (1, f): z_k = Σ_j b_j x[f·k + j], y = A z + β

Autograd makes several passes over the wide activation and keeps a and z for the backward pass. These
functions make each pass once and keep only what a dense layer or its consumer keeps anyway: a is recovered
from the output, through b's largest entry. One entry of b's gradient comes without a pass over the
activation: Σ_j b_j ∂b_j = ⟨∂A, A⟩."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def once_differentiable(backward: Callable) -> Callable:
    """PyTorch's, but a second derivative raises also where the incoming gradient is constant, as of a sum."""
    @functools.wraps(backward)
    def wrapper(ctx, *grads):
        with torch.no_grad():
            outputs = backward(ctx, *grads)
        if not torch.is_grad_enabled():  # no create_graph=True
            return outputs
        message = b"differentiated twice a function marked with @once_differentiable"
        raises = torch._C._functions.DelayedError(message, len(outputs))
        return raises(*(None if x is None else x.detach().requires_grad_() for x in outputs))

    return wrapper


def expand(a: Tensor, B: Tensor, bias: Tensor | None = None) -> Tensor:
    """y[f·i + j] = b_j a_i + β[f·i + j] by map: a (rows, fused·m), B (fused, f) → (rows, fused·m·f)."""
    fused, f = B.shape
    rows, m = a.shape[0], a.shape[1] // fused
    a = a.view(rows, fused, m)
    y = a.new_empty(rows, fused, m, f)
    # f strided writes take half the time of a broadcast over f
    for j, b in enumerate(B.unsqueeze(1).unbind(-1)):
        if bias is None:
            torch.mul(a, b, out=y[..., j])
        else:
            torch.addcmul(bias.view(fused, m, f)[..., j], a, b, out=y[..., j])
    return y.view(rows, -1)


def contract(x: Tensor, B: Tensor) -> Tensor:
    """z_i = Σ_j b_j x[f·i + j] for each fused map; x (rows, fused·m·f), B (fused, f) → z (rows, fused·m)."""
    fused, f = B.shape
    if fused == 1:
        return x.view(x.shape[0], -1, f) @ B[0]
    X, B = x.view(x.shape[0], fused, -1, f), B.unsqueeze(1)
    z = X[..., 0] * B[..., 0]
    for j in range(1, f):
        z.addcmul_(X[..., j], B[..., j])
    return z.flatten(1)


def inner_product(u: Tensor, v: Tensor) -> Tensor:
    """⟨u, v⟩ over (rows, m), accumulated in float32 or wider; a scalar."""
    if u.dtype in (torch.float32, torch.float64):
        return torch.linalg.vecdot(u, v).sum()
    return (u * v).sum(dtype=torch.float32)


def _argmax_abs(b: list[float]) -> int:
    return max(range(len(b)), key=lambda j: abs(b[j]))


def _factor_grad(b: list[float], grad_entry: Callable[[int], Tensor], grad_A, A, use_identity) -> Tensor:
    """∂b (f) from grad_entry(j) = ∂b_j, the largest entry's from Σ_j b_j ∂b_j = ⟨∂A, A⟩ if `use_identity`."""
    largest = _argmax_abs(b)
    grads = {j: grad_entry(j) for j in range(len(b)) if not (use_identity and j == largest)}
    if use_identity:
        rest = sum(b[j] * grad for j, grad in grads.items())
        grads[largest] = (inner_product(grad_A, A) - rest) / b[largest]
    return torch.stack([grads[j] for j in range(len(b))])


class _ColumnFactorLinear(torch.autograd.Function):
    @staticmethod
    def forward(x, A, B, bias):  # x (rows, n), A (fused, m, n), B (fused, f), bias (fused·m·f) or None
        return expand(F.linear(x, A.flatten(0, 1)), B, bias)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs, output)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, A, B, bias, y = ctx.saved_tensors
        need_x, need_A, need_B, need_bias = ctx.needs_input_grad
        grad_x = grad_A = grad_B = grad_bias = None
        if need_x or need_A or need_B:
            grad_a = contract(grad, B)  # (rows, fused·m)
        if need_x:
            grad_x = grad_a @ A.flatten(0, 1)
        if need_A or need_B:
            grad_A = (grad_a.T @ x).view_as(A)
        if bias is not None and (need_bias or need_B):
            grad_bias = grad.sum(0)
        if need_B:
            grad_B = _ColumnFactorLinear.grad_B(x, A, B, bias, y, grad, grad_A, grad_bias)
        return grad_x, grad_A if need_A else None, grad_B, grad_bias if need_bias else None

    @staticmethod
    def grad_B(x, A, B, bias, y, grad, grad_A, grad_bias):
        """∂B (fused, f): ∂b_j = ⟨∂y_j, a⟩ with a = (y_l − β_l) / b_l for b's largest entry l."""
        shape = (len(B), A.shape[1], B.shape[1])
        grad, y = (t.view(-1, *shape) for t in (grad, y))  # (rows, fused, m, f)
        if bias is not None:
            grad_bias, bias = grad_bias.view(shape), bias.view(shape)

        def grad_b(p: int, b: list[float]) -> Tensor:  # (f)
            largest, columns = _argmax_abs(b), grad[:, p].unbind(-1)
            if not b[largest]:  # y does not depend on a
                a = F.linear(x, A[p])
                return torch.stack([inner_product(column, a) for column in columns])

            def grad_entry(j: int) -> Tensor:
                value = inner_product(columns[j], y[:, p, :, largest])
                if bias is not None:
                    value = value - torch.dot(grad_bias[p, :, j], bias[p, :, largest])
                return value / b[largest]

            # ⟨∂A, A⟩ over m·n entries instead of one more ⟨∂y_j, a⟩ over rows·m
            return _factor_grad(b, grad_entry, grad_A[p], A[p], use_identity=len(x) >= A.shape[2])

        return torch.stack([grad_b(p, b) for p, b in enumerate(B.tolist())]).to(B.dtype)


class _RowFactorLinear(torch.autograd.Function):
    @staticmethod
    def forward(x, A, B, bias):  # x (rows, m·f), A (out, m), B (1, f), bias (out) or None
        return F.linear(contract(x, B), A, bias)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:3])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, A, B = ctx.saved_tensors
        need_x, need_A, need_B, need_bias = ctx.needs_input_grad
        grad_x = grad_A = grad_B = None
        if need_x or need_B:
            grad_z = grad @ A  # (rows, m)
        if need_x:
            grad_x = expand(grad_z, B)
        if need_A or need_B:
            grad_A = grad.T @ contract(x, B)
        if need_B:
            (b,) = B.tolist()
            columns = x.view(len(x), -1, len(b)).unbind(-1)  # f times (rows, m)
            use_identity = len(x) >= len(A) and any(b)
            grad_B = _factor_grad(b, lambda j: inner_product(columns[j], grad_z), grad_A, A, use_identity)
            grad_B = grad_B.to(B.dtype)[None]
        return grad_x, grad_A if need_A else None, grad_B, grad.sum(0) if need_bias else None


def _apply(function, x: Tensor, A: Tensor, B: Tensor, bias: Tensor | None) -> Tensor:
    """Apply an autograd function to x (…, n), in autocast's dtype where autocast is on, as nn.Linear does."""
    device, dtype = x.device.type, x.dtype
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    bias = None if bias is None else bias.to(dtype)
    y = function.apply(x.to(dtype).reshape(-1, x.shape[-1]), A.to(dtype), B.to(dtype), bias)
    return y.view(*x.shape[:-1], -1)


def column_factor_linear(x: Tensor, A: Tensor, B: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = (A_p ⊗ b_p) x + β for each fused map p, b_p one column; differentiable once.
    x (…, n), A (fused, m, n), B (fused, f) and bias (fused·m·f) → y (…, fused·m·f)."""
    return _apply(_ColumnFactorLinear, x, A, B, bias)


def row_factor_linear(x: Tensor, A: Tensor, B: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = (A ⊗ B) x + β, differentiable once: x (…, m·f), A (out, m), B (1, f), bias (out) → y (…, out)."""
    return _apply(_RowFactorLinear, x, A, B, bias)
