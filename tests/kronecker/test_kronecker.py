"""nearest_kronecker and the layers against naive float64 references."""

import itertools

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

from kn import KroneckerEmbedding, KroneckerLinear, nearest_kronecker
from kn.kronecker import kronecker_apply, kronecker_sum
from kn.kronecker.layers import MATERIALIZE_MAX_NUMEL

EXACT = 1e-11  # float64 rounding of sums of a few hundred products of order one


def naive_kronecker(A, B):
    """Eq. 1 of the paper, entry by entry."""
    (m1, n1), (m2, n2) = A.shape, B.shape
    W = torch.zeros(m1 * m2, n1 * n2, dtype=A.dtype)
    for i, k, j, m in itertools.product(range(m1), range(n1), range(m2), range(n2)):
        W[i * m2 + j, k * n2 + m] = A[i, k] * B[j, m]
    return W


SHAPES = [
    ((6, 4), (2, 1), 1), ((6, 4), (1, 2), 1), ((6, 4), (1, 2), 2), ((12, 9), (3, 3), 4), ((8, 6), (8, 6), 1),
    ((8, 6), (1, 1), 1), ((40, 36), (10, 9), 3),
]


@pytest.mark.parametrize(("shape", "b_shape", "rank"), SHAPES)
def test_residual_is_the_tail_of_the_spectrum(shape, b_shape, rank):
    torch.manual_seed(0)
    W = torch.randn(shape, dtype=torch.float64)
    A, B = nearest_kronecker(W, b_shape, rank)
    (m2, n2), m1, n1 = b_shape, shape[0] // b_shape[0], shape[1] // b_shape[1]
    assert A.shape == (rank, m1, n1) and B.shape == (rank, m2, n2)
    blocks = torch.stack([
        W[i * m2 : (i + 1) * m2, k * n2 : (k + 1) * n2].flatten() for i in range(m1) for k in range(n1)
    ])
    tail = torch.linalg.svdvals(blocks)[rank:].square().sum()
    residual = (W - sum(naive_kronecker(a, b) for a, b in zip(A, B, strict=True))).square().sum()
    assert abs(residual - tail) < EXACT * W.square().sum()


@pytest.mark.parametrize("b_shape", [(2, 1), (1, 2), (3, 3), (10, 9)])
def test_a_kronecker_product_is_found_exactly(b_shape):
    torch.manual_seed(1)
    A, B = torch.randn(4, 5, dtype=torch.float64), torch.randn(b_shape, dtype=torch.float64)
    found = nearest_kronecker(naive_kronecker(A, B), b_shape)
    assert torch.allclose(kronecker_sum(*found), naive_kronecker(A, B), atol=EXACT)


def test_scale_and_sign():
    W = torch.randn(6, 4, dtype=torch.float64)
    A, B = nearest_kronecker(W, (2, 1), scale="unit_b")
    assert abs(B.norm() - 1) < EXACT and B.flatten()[B.abs().argmax()] > 0
    C, D = nearest_kronecker(W, (2, 1))
    assert abs(C.norm() - D.norm()) < EXACT
    assert torch.allclose(kronecker_sum(A, B), kronecker_sum(C, D), atol=EXACT)


def test_zero_matrix_gives_zero_without_nan():
    A, B = nearest_kronecker(torch.zeros(4, 4), (2, 1))
    assert kronecker_sum(A, B).abs().max() == 0


def test_errors_say_what_is_allowed():
    W = torch.randn(6, 4)
    with pytest.raises(ValueError, match=r"B of shape 4x1 does not divide W of shape 6x4"):
        nearest_kronecker(W, (4, 1))
    with pytest.raises(ValueError, match=r"rank 3 is not possible .* allowed are 1 to 2"):
        nearest_kronecker(W, (2, 1), rank=3)
    with pytest.raises(ValueError, match=r"scale 'half' is unknown: allowed are 'sqrt', 'unit_b'"):
        nearest_kronecker(W, (2, 1), scale="half")
    with pytest.raises(ValueError, match=r"W holds NaN or infinite values"):
        nearest_kronecker(W * float("nan"), (2, 1))
    with pytest.raises(TypeError, match=r"takes nn.Linear or transformers' Conv1D, got ReLU"):
        KroneckerLinear.from_linear(nn.ReLU(), (2, 1))
    with pytest.raises(ValueError, match=r"factor 3 does not divide embedding_dim 8"):
        KroneckerEmbedding(5, 8, 3)
    with pytest.raises(ValueError, match=r"num_fused 3 does not divide out_features 7"):
        KroneckerLinear(4, 7, (1, 1), num_fused=3)


@pytest.mark.parametrize(("shape", "b_shape", "rank"), SHAPES)
@pytest.mark.parametrize("lead", [(), (3,), (2, 5)])
def test_apply_equals_the_dense_product(shape, b_shape, rank, lead):
    torch.manual_seed(2)
    A, B = nearest_kronecker(torch.randn(shape, dtype=torch.float64), b_shape, rank)
    x = torch.randn(*lead, shape[1], dtype=torch.float64)
    assert torch.allclose(
        kronecker_apply(x, A, B), x @ sum(naive_kronecker(a, b) for a, b in zip(A, B, strict=True)).T,
        atol=EXACT,
    )


@pytest.mark.parametrize("built", [True, False])
@pytest.mark.parametrize("num_fused", [1, 3])
@pytest.mark.parametrize(
    ("b_shape", "rank"), [((2, 1), 1), ((2, 1), 2), ((1, 2), 1), ((1, 2), 2), ((2, 2), 3)]
)
def test_layer_forward_and_gradients(monkeypatch, b_shape, rank, num_fused, built):
    monkeypatch.setattr("kn.kronecker.layers.MATERIALIZE_MAX_NUMEL", 1000 if built else 0)
    torch.manual_seed(3)
    layer = KroneckerLinear(4, 6 * num_fused, b_shape, rank, num_fused=num_fused).double()
    nn.init.normal_(layer.bias)
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.allclose(layer(x), x @ layer.weight.T + layer.bias, atol=EXACT)
    names = [name for name, _ in layer.named_parameters()]
    assert torch.autograd.gradcheck(
        lambda x, *values: torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,)),
        (x, *layer.parameters()),
    )


@pytest.mark.parametrize("num_fused", [1, 3])
def test_from_linear_and_conv1d_agree(num_fused):
    torch.manual_seed(4)
    linear, conv = nn.Linear(8, 12), Conv1D(12, 8)
    with torch.no_grad():
        conv.weight.copy_(linear.weight.T)
        conv.bias.copy_(linear.bias)
    from_linear, from_conv = (
        KroneckerLinear.from_linear(source, (2, 1), num_fused=num_fused) for source in (linear, conv)
    )
    assert torch.equal(from_linear.weight, from_conv.weight) and torch.equal(from_linear.bias, from_conv.bias)
    for index, part in enumerate(linear.weight.detach().chunk(num_fused)):
        A, B = nearest_kronecker(part, (2, 1))
        # float32
        assert torch.allclose(from_conv.weight.chunk(num_fused)[index], kronecker_sum(A, B), atol=1e-6)
    # rank 2 is exact for two rows
    full = KroneckerLinear.from_linear(conv, (2, 1), rank=2, num_fused=num_fused)
    x = torch.randn(5, 8)
    assert torch.allclose(full(x), conv(x), atol=1e-5)


@pytest.mark.parametrize(("b_shape", "num_fused"), [((2, 1), 3), ((1, 2), 1)])
def test_forward_does_not_build_the_dense_weight_above_the_limit(b_shape, num_fused):
    """Above MATERIALIZE_MAX_NUMEL the FLOPs are those of A alone, half of the dense layer's."""
    tokens, n = 5, 512
    for m, share in ((MATERIALIZE_MAX_NUMEL // n // 6 * 6 + 6, 2), (MATERIALIZE_MAX_NUMEL // n // 6 * 6, 1)):
        layer = KroneckerLinear(n, m, b_shape, num_fused=num_fused)
        with FlopCounterMode(display=False) as counter:
            layer(torch.randn(tokens, n))
        flops = counter.get_total_flops()
        reading = 2 * tokens * n if share == 2 and b_shape == (1, 2) else 0  # B's own product with the inputs
        assert flops <= 2 * tokens * m * n // share + reading and (share == 2 or flops == 2 * tokens * m * n)


def test_embedding():
    torch.manual_seed(5)
    table = nn.Embedding(11, 8).double()
    layer = KroneckerEmbedding.from_embedding(table, 2)
    ids = torch.tensor([[0, 3, 10], [3, 3, 1]])
    assert torch.allclose(layer(ids), layer.weight[ids], atol=EXACT)
    A, B = nearest_kronecker(table.weight.detach(), (1, 2))
    assert torch.allclose(layer.weight, naive_kronecker(A[0], B[0]), atol=EXACT)
