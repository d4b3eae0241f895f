"""Custom backward against dense A ⊗ B in float64: values, gradients, signs, zeros, and saved activations."""

import copy

import pytest
import torch
from torch import nn

from kn import KroneckerLinear
from kn.kronecker import layers as kronecker

CASES = [
    (12, 24, (2, 1), 1), (12, 24, (4, 1), 1), (12, 36, (3, 1), 3), (24, 12, (1, 2), 1), (24, 12, (1, 4), 1)
]


def by_hand(monkeypatch, hand=True):
    monkeypatch.setattr(kronecker, "MATERIALIZE_MAX_NUMEL", 0)
    monkeypatch.setattr(kronecker, "CUSTOM_BACKWARD_MIN_NUMEL", 0 if hand else 2**60)


def made(n, m, b_shape, num_fused, bias=True, dtype=torch.float64):
    torch.manual_seed(n + m)
    layer = KroneckerLinear(n, m, b_shape, bias=bias, num_fused=num_fused).to(dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer


def gradients(layer, x, grad, dense=False):
    """Output and gradients of x and the parameters; `dense` multiplies A ⊗ B out."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y = nn.functional.linear(x, layer.weight, layer.bias) if dense else layer(x)
    y.backward(grad)
    return [y.detach(), x.grad, *(p.grad.clone() for p in layer.parameters())]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("rows", [(2, 3), (40,)], ids=["fewer rows than inputs", "more"])
def test_values_and_gradients(monkeypatch, case, bias, rows):
    by_hand(monkeypatch)
    layer = made(*case, bias=bias)
    x = torch.randn(*rows, case[0], dtype=torch.float64)
    grad = torch.randn(*rows, case[1], dtype=torch.float64)
    for ours, reference in zip(gradients(layer, x, grad), gradients(layer, x, grad, dense=True), strict=True):
        assert (ours - reference).abs().max() < 1e-12 * reference.abs().max()


@pytest.mark.parametrize("case", CASES[:4], ids=str)
@pytest.mark.parametrize("b", [(0.0, 1.0), (-2.0, 0.0), (0.0, 0.0), (-1e-3, -1e3), (1e-9, 1e-9)], ids=str)
def test_b_with_zeros_and_extremes(monkeypatch, case, b):
    """a is recovered through the largest entry, and computed again where all are zero; the bias is large."""
    by_hand(monkeypatch)
    layer = made(*case)
    with torch.no_grad():
        layer.B.copy_(torch.tensor((b * 2)[: layer.B[0].numel()]).view_as(layer.B[:1]).expand_as(layer.B))
    x, grad = torch.randn(40, case[0], dtype=torch.float64), torch.randn(40, case[1], dtype=torch.float64)
    scale = max(abs(v) for v in b) or 1.0  # a = (y − β) / b: rounding of β is divided by b
    for ours, reference in zip(gradients(layer, x, grad), gradients(layer, x, grad, dense=True), strict=True):
        assert (ours - reference).abs().max() <= 1e-12 / min(1.0, scale) * max(1.0, reference.abs().max())


def test_only_the_gradients_that_are_asked_for(monkeypatch):
    by_hand(monkeypatch)
    for case in (CASES[0], CASES[3]):
        layer, x = made(*case), torch.randn(5, case[0], dtype=torch.float64)
        for name, parameter in layer.named_parameters():
            layer.requires_grad_(False)
            parameter.requires_grad_(True)
            layer(x).sum().backward()
            assert [n for n, p in layer.named_parameters() if p.grad is not None] == [name]
            layer.zero_grad(set_to_none=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_half_precision_and_autocast(monkeypatch, case, dtype):
    """Errors of a few half-precision roundings (2^-8, 2^-11) of the largest entry."""
    by_hand(monkeypatch)
    layer = made(*case, dtype=torch.float32)
    x, grad = torch.randn(64, case[0]), torch.randn(64, case[1])
    reference = gradients(layer, x, grad, dense=True)
    bound = 4 * torch.finfo(dtype).eps
    half = gradients(copy.deepcopy(layer).to(dtype), x.to(dtype), grad.to(dtype))
    with torch.autocast("cpu", dtype=dtype):
        cast = gradients(layer, x, grad.to(dtype))
    assert cast[0].dtype == dtype and cast[2].dtype == torch.float32
    for each in (half, cast):
        for ours, wanted in zip(each, reference, strict=True):
            assert (ours.float() - wanted).abs().max() < bound * wanted.abs().max()


def kept_bytes(layer, x):
    """Bytes saved for the backward pass, without parameters and the output, which its consumer keeps."""
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t) is None or t, lambda t: t
    ):
        y = layer(x)
    free = {p.untyped_storage().data_ptr() for p in layer.parameters()} | {y.untyped_storage().data_ptr()}
    return sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in free)


@pytest.mark.parametrize(
    ("n", "m", "b_shape"), [(768, 768, (2, 1)), (768, 3072, (2, 1)), (3072, 768, (1, 2))]
)
def test_activation_memory_is_a_dense_layer_s(n, m, b_shape):
    x = torch.randn(128, n, requires_grad=True)
    dense = nn.Linear(n, m)
    assert kept_bytes(KroneckerLinear.from_linear(dense, b_shape), x) == kept_bytes(dense, x) == x.nbytes


def test_a_second_derivative_is_refused(monkeypatch):
    by_hand(monkeypatch)
    layer, x = made(*CASES[0]), torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="marked with @once_differentiable"):
        first.sum().backward()


def test_by_hand_and_by_autograd_agree(monkeypatch):
    """The two sides of CUSTOM_BACKWARD_MIN_NUMEL."""
    layer = made(*CASES[2])
    x = torch.randn(50, 12, dtype=torch.float64)
    grad = torch.randn(50, 36, dtype=torch.float64)
    found, names = [], []
    for hand in (True, False):
        by_hand(monkeypatch, hand)
        names.append(layer(x).grad_fn.next_functions[0][0].name())
        found.append(gradients(layer, x, grad))
    assert "_ColumnFactorLinear" in names[0] and "_ColumnFactorLinear" not in names[1]
    assert all(torch.allclose(a, b, rtol=0, atol=1e-11) for a, b in zip(*found, strict=True))
