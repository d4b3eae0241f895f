"""Any values given to the method's functions: a valid result or a one-line error; and laws for all values."""

import math

import pytest
import torch
from conftest import tiny_gpt2
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import USUAL, Attempts, anything, mostly, odd, tensors

from kn import (
    KroneckerEmbedding,
    KroneckerLinear,
    KroneckerSpec,
    attention_kl,
    capture,
    compress,
    count_parameters,
    ilkd_loss,
    nearest_kronecker,
    vanilla_kd_loss,
)

EXACT = 1e-11  # float64 rounding of sums of a few hundred products, relative to their size
attempt = Attempts()

# ---------------------------------------------------------------- bad values


@USUAL
@given(
    W=mostly(tensors(2, st.integers(0, 6)), anything),
    b_shape=mostly(st.tuples(st.integers(1, 3), st.integers(1, 3))),
    rank=mostly(st.integers(1, 3)),
    scale=st.sampled_from(["sqrt", "unit_b", "half", None, 3]),
)
def test_nearest_kronecker(W, b_shape, rank, scale):
    found = attempt(lambda: nearest_kronecker(W, b_shape, rank, scale))
    if found:
        A, B = found
        assert A.isfinite().all() and B.isfinite().all() and A.dtype == B.dtype == W.dtype
        error = (W.double() - torch.einsum("rik,rjl->ijkl", A.double(), B.double()).reshape(W.shape)).norm()
        size = W.double().abs().max() * math.sqrt(W.numel())
        # never farther than nothing at all; below that the type itself rounds to nothing
        assert (
            error <= size * (1 + 8 * torch.finfo(W.dtype).eps)
            or W.double().abs().max() < torch.finfo(W.dtype).tiny * 1e3
        )


@USUAL
@given(
    sizes=st.tuples(*[mostly(st.integers(1, 12), odd.filter(lambda size: size != 10**9))] * 2),
    b_shape=mostly(st.tuples(st.integers(1, 3), st.integers(1, 3))),
    rank=mostly(st.integers(1, 3)),
    num_fused=mostly(st.integers(1, 3)),
    x=tensors(),
)
def test_layers(sizes, b_shape, rank, num_fused, x):
    layer = attempt(lambda: KroneckerLinear(*sizes, b_shape, rank, num_fused=num_fused))
    table = attempt(lambda: KroneckerEmbedding(*sizes, rank))
    if layer is not None:
        assert layer.weight.shape == (sizes[1], sizes[0])
        assert layer(torch.ones(2, sizes[0])).shape == (2, sizes[1])
        if x.ndim and x.shape[-1] != sizes[0]:
            with pytest.raises(ValueError, match=r"^x is \(.*\): expected \d+ as the last size$"):
                layer(x.float())
    if table is not None:
        assert table(torch.tensor([0, sizes[0] - 1])).shape == (2, sizes[1])


@USUAL
@given(
    source=st.one_of(st.just(torch.nn.Linear(4, 6)), st.just(torch.nn.Embedding(6, 4)), anything),
    b_shape=mostly(st.tuples(st.integers(1, 3), st.integers(1, 2))),
    rank=mostly(st.integers(1, 2)),
    num_fused=mostly(st.just(1)),
    factor=mostly(st.just(2)),
)
def test_from_linear_and_from_embedding(source, b_shape, rank, num_fused, factor):
    layer = attempt(lambda: KroneckerLinear.from_linear(source, b_shape, rank, num_fused))
    assert layer is None or torch.equal(layer.bias, source.bias)
    table = attempt(lambda: KroneckerEmbedding.from_embedding(source, factor))
    assert table is None or table.weight.shape == source.weight.shape


FIELDS = list(KroneckerSpec.__dataclass_fields__)


@USUAL
@given(
    fields=st.dictionaries(
        st.sampled_from([*FIELDS, "evil"]),
        st.one_of(
            odd,
            st.dictionaries(
                st.sampled_from(["*", "mlp.*", "1.attn.c_attn", "[", 3]),
                st.one_of(odd, st.just((2, 1)), st.just(1)), max_size=2,
            ),
        ),
        min_size=1, max_size=3,
    ),
    layers=st.integers(1, 6),
)
def test_specs_and_compress(fields, layers):
    spec = attempt(lambda: KroneckerSpec(**fields))
    if spec is not None:
        attempt(lambda: spec.indices(layers))
        model = None if spec.init == "aligned" else attempt(lambda: compress(TEACHER, spec))
        assert model is None or model(IDS).logits.isfinite().all()


TEACHER = tiny_gpt2()
STUDENT = compress(tiny_gpt2())
IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])


@USUAL
@given(model=anything, spec=anything)
def test_other_things_are_no_models(model, spec):
    assert attempt(lambda: compress(model)) is None
    assert attempt(lambda: compress(TEACHER, spec)) is None
    assert attempt(lambda: count_parameters(model)) is None
    assert attempt(lambda: capture(model, input_ids=IDS)) is None
    assert attempt(lambda: ilkd_loss(model, spec, (1, 1, 1, 1))) is None
    assert attempt(
        lambda: compress(TEACHER, KroneckerSpec(init="aligned"), spec)
    ) is None or isinstance(spec, torch.Tensor)


@USUAL
@given(
    ids=mostly(tensors(2), anything), mask=mostly(st.none(), anything),
    labels=mostly(st.none(), anything), point=mostly(st.just("c_proj")),
)
def test_capture(ids, mask, labels, point):
    given_too = {
        name: value for name, value in (("attention_mask", mask), ("labels", labels)) if value is not None
    }
    found = attempt(lambda: capture(STUDENT, point, input_ids=ids, **given_too))
    assert found is None or found.logits.shape == (*ids.shape, 50)


HERE, THERE = (capture(model, input_ids=IDS, labels=IDS) for model in (STUDENT, TEACHER))


@USUAL
@given(
    alphas=st.one_of(st.tuples(*[st.floats(0, 2)] * 4), st.tuples(*[odd] * 4), odd),
    mask=st.one_of(st.none(), tensors(2, st.integers(2, 3)), anything),
    direction=mostly(st.just("student_teacher")),
)
def test_ilkd_loss(alphas, mask, direction):
    found = attempt(lambda: ilkd_loss(HERE, THERE, alphas, mask, direction))
    if found:
        assert found[0].shape == () and (found[0].isfinite() or mask is not None)
    attempt(
        lambda: vanilla_kd_loss(HERE.logits, mask if mask is not None else THERE.logits, temperature=alphas)
    )


@USUAL
@given(
    q=mostly(tensors(4, st.integers(0, 3)), anything),
    k=anything,
    scale=mostly(st.none()),
    mask=mostly(st.none(), anything),
    direction=mostly(st.sampled_from(["student_teacher", "teacher_student"])),
    reduction=mostly(st.sampled_from(["mean", "sum", "none"])),
)
def test_attention_kl(q, k, scale, mask, direction, reduction):
    other = q if not isinstance(k, torch.Tensor) else k
    found = attempt(lambda: attention_kl(q, q, other, other, scale, None, mask, direction, reduction))
    if found is not None and other is q and q.isfinite().all() and q.abs().max() < 1e3 and scale is None:
        assert found.abs().max() < 1e-3  # a model against itself, in float32


# ---------------------------------------------------------------- what must hold for all values


@USUAL
@given(
    m=st.integers(1, 5),
    n=st.integers(1, 5),
    b=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    seed=st.integers(0, 10**6),
    power=st.integers(-300, 300),
    rank=st.integers(1, 20),
    scale=st.sampled_from(["sqrt", "unit_b"]),
)
def test_the_residual_is_the_tail_of_the_spectrum(m, n, b, seed, power, rank, scale):
    """For every shape and every size of numbers: no other sum of so many products is nearer."""
    (m2, n2), generator = b, torch.Generator().manual_seed(seed)
    W = torch.randn(m * m2, n * n2, dtype=torch.float64, generator=generator)
    rank = min(rank, m * n, m2 * n2)
    A, B = nearest_kronecker(W * 2.0**power, b, rank, scale)
    blocks = W.reshape(m, m2, n, n2).permute(0, 2, 1, 3).reshape(m * n, m2 * n2)
    tail = torch.linalg.svdvals(blocks)[rank:].square().sum()
    products = sum(
        torch.kron(x, y) for x, y in zip(A * 2.0 ** (-power / 2), B * 2.0 ** (-power / 2), strict=True)
    )
    assert abs((W - products).square().sum() - tail) < EXACT * W.square().sum()
    largest = B.flatten(1).gather(1, B.flatten(1).abs().argmax(1, keepdim=True))
    assert (largest >= 0).all()
    assert (
        scale == "sqrt" or torch.allclose(B.flatten(1).norm(dim=1), torch.ones(rank, dtype=torch.float64))
    )


@USUAL
@given(
    m=st.integers(1, 5),
    n=st.integers(1, 5),
    b=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    rank=st.integers(1, 4),
    num_fused=st.integers(1, 3),
    seed=st.integers(0, 10**6),
    limits=st.sampled_from([(2**17, 2**16), (0, 2**16), (0, 0)]),
    lead=st.lists(st.integers(1, 3), max_size=2),
)
def test_a_layer_is_torch_kron(m, n, b, rank, num_fused, seed, limits, lead):
    """Whichever way the forward pass takes: multiplied out, by autograd or by hand."""
    torch.manual_seed(seed)
    rank = min(rank, m * n, b[0] * b[1])
    layer = KroneckerLinear(n * b[1], num_fused * m * b[0], b, rank, num_fused=num_fused).double()
    torch.nn.init.normal_(layer.bias)
    x = torch.randn(*lead, n * b[1], dtype=torch.float64)
    dense = torch.cat([
        sum(torch.kron(layer.A[p * rank + r], layer.B[p * rank + r]) for r in range(rank))
        for p in range(num_fused)
    ])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kn.kronecker.layers.MATERIALIZE_MAX_NUMEL", limits[0])
        patch.setattr("kn.kronecker.layers.CUSTOM_BACKWARD_MIN_NUMEL", limits[1])
        assert torch.allclose(layer(x), x @ dense.T + layer.bias, atol=1e-10)  # sums of up to 25 products


@settings(USUAL, max_examples=40)
@given(
    layers=st.sampled_from(["odd", "even", "all", "0", "2:"]),
    factor=st.sampled_from([1, 2, 4]),
    rank=st.integers(1, 2),
    embedding=st.booleans(),
    out_proj=st.booleans(),
    head=st.sampled_from(["dense", "tied"]),
)
def test_dense_and_folded_models_give_the_same_logits(layers, factor, rank, embedding, out_proj, head):
    spec = attempt(lambda: KroneckerSpec(layers, factor, rank, embedding, out_proj, head=head))
    model = spec and attempt(lambda: compress(DOUBLE, spec))
    if model:
        expected = model(IDS).logits
        assert torch.allclose(model.to_dense()(IDS).logits, expected, atol=1e-9)
        assert count_parameters(model)["total"] >= count_parameters(model)["without_head"] > 0
        narrow = attempt(model.fold)
        assert narrow is None or torch.allclose(narrow(IDS).logits, expected, atol=1e-9)
        assert narrow is None or (attempt(narrow.fold) is None and attempt(narrow.to_dense) is None)


DOUBLE = tiny_gpt2(dtype=torch.float64)


def test_so_many_values_were_tried():
    """So that strategies whose values are all refused, or all taken, are noticed."""
    assert attempt.made > 1200
    assert 0.2 < attempt.refused / attempt.made < 0.95, vars(attempt)
