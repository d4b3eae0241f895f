"""Any values whatever, given to the public functions: a valid result, or one clear line that names the value. And what must hold for all values."""

import math
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_gpt2
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kn import KroneckerEmbedding, KroneckerLinear, KroneckerSpec, attention_kl, capture, compress, count_parameters, ilkd_loss, nearest_kronecker, report, vanilla_kd_loss
from kn.suite import profiles
from kn.suite import run as stages
from kn.suite.plan import StagePlanner, table_stages
from kn.suite.store import Stage, Store, StoreError

ALLOWED = (ValueError, TypeError)
EXAMPLES = 120
USUAL = settings(derandomize=True, max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
EXACT = 1e-11  # float64 rounding of sums of a few hundred products, relative to their size
COUNTED = {"examples": 0, "refused": 0}

odd_text = st.one_of(st.text(max_size=8), st.sampled_from(["", "odd", "even", "all", "svd", "aligned", "sqrt", "unit_b", "tied", "dense", "0,2:", "::0", "-1", "9" * 30, "²", "a\nb", "\ud800"]))
odd = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 9),
    st.sampled_from([10**9, 10**30, -(10**30)]),
    st.floats(allow_nan=True, allow_infinity=True, width=32),
    odd_text,
    st.binary(max_size=3),
    st.lists(st.integers(-1, 5), max_size=3),
    st.tuples(st.integers(-1, 5), st.integers(-1, 5)),
    st.dictionaries(st.text(max_size=3), st.integers(-1, 3), max_size=2),
    st.builds(object),
    st.complex_numbers(max_magnitude=9),
)


@st.composite
def tensors(draw, dimensions=None, sizes=st.integers(0, 5)):
    """A small tensor of any type, some of it not finite, huge or tiny."""
    shape = draw(st.lists(sizes, min_size=dimensions or 0, max_size=dimensions or 4))
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.complex64]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    made = torch.randn(shape, generator=generator, dtype=torch.float64) * draw(st.sampled_from([1.0, 0.0, 1e-200, 1e200, 1e-320, 1e308, 1e5]))
    if made.numel() and draw(st.integers(0, 4)) == 0:
        made.view(-1)[0] = draw(st.sampled_from([math.nan, math.inf, -math.inf]))
    return made.to(dtype)


anything = st.one_of(odd, tensors())


def attempt(call, *names):
    """The result, or None where the call ended in one allowed line; any other error is the test's."""
    COUNTED["examples"] += 1
    try:
        return call()
    except ALLOWED as error:
        COUNTED["refused"] += 1
        said = str(error)
        assert said.strip() and "\n" not in said and len(said) < 600, repr(said)
        return None


# ---------------------------------------------------------------- bad values


@USUAL
@given(
    W=st.one_of(tensors(2, st.integers(0, 6)), anything),
    b_shape=st.one_of(st.tuples(st.integers(1, 3), st.integers(1, 3)), odd),
    rank=st.one_of(st.integers(1, 3), odd),
    scale=st.sampled_from(["sqrt", "unit_b", "half", None, 3]),
)
def test_nearest_kronecker(W, b_shape, rank, scale):
    found = attempt(lambda: nearest_kronecker(W, b_shape, rank, scale))
    if found:
        A, B = found
        assert A.isfinite().all() and B.isfinite().all() and A.dtype == B.dtype == W.dtype
        error, size = (W.double() - torch.einsum("rik,rjl->ijkl", A.double(), B.double()).reshape(W.shape)).norm(), W.double().abs().max() * math.sqrt(W.numel())
        assert (
            error <= size * (1 + 8 * torch.finfo(W.dtype).eps) or W.double().abs().max() < torch.finfo(W.dtype).tiny * 1e3
        )  # never farther than nothing at all; below that the type itself rounds to nothing


@USUAL
@given(
    sizes=st.tuples(st.one_of(st.integers(1, 12), odd), st.one_of(st.integers(1, 12), odd)),
    b_shape=st.one_of(st.tuples(st.integers(1, 3), st.integers(1, 3)), odd),
    rank=st.one_of(st.integers(1, 3), odd),
    num_fused=st.one_of(st.integers(1, 3), odd),
    x=tensors(),
)
def test_layers(sizes, b_shape, rank, num_fused, x):
    layer = attempt(lambda: KroneckerLinear(*sizes, b_shape, rank, num_fused=num_fused))
    table = attempt(lambda: KroneckerEmbedding(*sizes, rank))
    if layer is not None:
        assert layer.weight.shape == (sizes[1], sizes[0]) and layer(torch.ones(2, sizes[0])).shape == (2, sizes[1])
        if x.ndim and x.shape[-1] != sizes[0]:
            with pytest.raises(ValueError, match=r"^x is \(.*\): expected \d+ as the last size$"):
                layer(x.float())
    if table is not None:
        assert table(torch.tensor([0, sizes[0] - 1])).shape == (2, sizes[1])


@USUAL
@given(
    source=st.one_of(st.just(torch.nn.Linear(4, 6)), st.just(torch.nn.Embedding(6, 4)), anything),
    b_shape=st.one_of(st.tuples(st.integers(1, 3), st.integers(1, 2)), odd),
    rank=st.one_of(st.integers(1, 2), odd),
    num_fused=st.one_of(st.just(1), odd),
    factor=st.one_of(st.just(2), odd),
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
        st.one_of(odd, st.dictionaries(st.sampled_from(["*", "mlp.*", "1.attn.c_attn", "[", 3]), st.one_of(odd, st.just((2, 1)), st.just(1)), max_size=2)),
        min_size=1,
        max_size=3,
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
    assert attempt(lambda: compress(model)) is None and attempt(lambda: compress(TEACHER, spec)) is None and attempt(lambda: count_parameters(model)) is None
    assert attempt(lambda: capture(model, input_ids=IDS)) is None and attempt(lambda: ilkd_loss(model, spec, (1, 1, 1, 1))) is None
    assert attempt(lambda: compress(TEACHER, KroneckerSpec(init="aligned"), spec)) is None or isinstance(spec, torch.Tensor)


@USUAL
@given(ids=st.one_of(tensors(2), anything), mask=st.one_of(st.none(), anything), labels=st.one_of(st.none(), anything), point=st.one_of(st.just("c_proj"), odd))
def test_capture(ids, mask, labels, point):
    given_too = {name: value for name, value in (("attention_mask", mask), ("labels", labels)) if value is not None}
    found = attempt(lambda: capture(STUDENT, point, input_ids=ids, **given_too))
    assert found is None or found.logits.shape == (*ids.shape, 50)


HERE, THERE = (capture(model, input_ids=IDS, labels=IDS) for model in (STUDENT, TEACHER))


@USUAL
@given(
    alphas=st.one_of(st.tuples(*[st.floats(0, 2)] * 4), st.tuples(*[odd] * 4), odd),
    mask=st.one_of(st.none(), tensors(2, st.integers(2, 3)), anything),
    direction=st.one_of(st.just("student_teacher"), odd),
)
def test_ilkd_loss(alphas, mask, direction):
    found = attempt(lambda: ilkd_loss(HERE, THERE, alphas, mask, direction))
    if found:
        assert found[0].shape == () and (found[0].isfinite() or mask is not None)
    attempt(lambda: vanilla_kd_loss(HERE.logits, mask if mask is not None else THERE.logits, temperature=alphas))


@USUAL
@given(
    q=st.one_of(tensors(4, st.integers(0, 3)), anything),
    k=anything,
    scale=st.one_of(st.none(), odd),
    mask=st.one_of(st.none(), anything),
    direction=st.one_of(st.sampled_from(["student_teacher", "teacher_student"]), odd),
    reduction=st.one_of(st.sampled_from(["mean", "sum", "none"]), odd),
)
def test_attention_kl(q, k, scale, mask, direction, reduction):
    other = q if not isinstance(k, torch.Tensor) else k
    found = attempt(lambda: attention_kl(q, q, other, other, scale, None, mask, direction, reduction))
    if found is not None and other is q and q.isfinite().all() and q.abs().max() < 1e3 and scale is None:
        assert found.abs().max() < 1e-3  # a model against itself, in float32


@USUAL
@given(
    name=st.one_of(st.sampled_from(list(profiles.PROFILES)), odd),
    key=st.one_of(st.sampled_from(profiles.keys(profiles.MIDI)), odd_text),
    value=st.one_of(odd_text, st.sampled_from(["1", "0", "-1", "1e400", "nan", "true", "1,2,3,4", "0.1,0.2", "99999999999999", "1_0", "(1,)"]), st.integers().map(str), st.floats().map(str)),
)
def test_profiles_and_their_plans(name, key, value):
    """What load takes can be planned: no overflow, no endless sizes."""
    profile = attempt(lambda: profiles.load(name, (f"{key}={value}",)))
    if profile is not None and "text.web" not in key and "text.wiki" not in key and key != "text.file":
        made = StagePlanner(profile, without_mirror=True)
        assert all(0 <= item.cost < math.inf and item.path for item in (*table_stages(made, 4, range(1), ("cola",)), *table_stages(made, 5, range(1), ("cola",))))


record = st.one_of(
    odd,
    st.fixed_dictionaries(
        {
            "stage": st.one_of(st.sampled_from(["pretrained", "finetune_lm", "finetune_glue", "shapes", "decompose", "pretrain", "twins"]), odd),
            "path": st.just("a/b"),
            "provenance": st.just({}),
            "fields": st.fixed_dictionaries(
                {"model": st.sampled_from(["teacher", "student"]), "row": st.just("teacher"), "task": st.just("cola"), "seed": st.integers(0, 1), "on": st.just("web"), "objective": st.just("lm_kd")}
            ),
            "metrics": st.one_of(
                odd,
                st.fixed_dictionaries(
                    {
                        "perplexity": st.one_of(odd, st.fixed_dictionaries({"wiki": st.one_of(odd, st.fixed_dictionaries({"test": odd, "valid": odd}))})),
                        "hyper": odd,
                        "dev": st.one_of(odd, st.fixed_dictionaries({"headline": odd})),
                        "parameters": odd,
                        "hours": odd,
                    }
                ),
            ),
        }
    ),
)


@USUAL
@given(number=st.one_of(st.integers(1, 7), odd), records=st.one_of(odd, st.lists(record, max_size=3)), name=odd)
def test_report_table(number, records, name):
    frame = attempt(lambda: report.table(number, records, name))
    if frame is not None:
        assert list(frame) == report.COLUMNS and not [value for value in frame["ours"] if isinstance(value, float) and math.isinf(value)]


@USUAL
@given(
    home=st.one_of(st.just("store"), odd),
    kind=st.one_of(st.just("demo"), odd_text),
    fields=st.lists(st.tuples(st.text(max_size=4), odd), max_size=2),
    plain=st.sampled_from(["{}", '{"a": 1}']),
    found=anything,
)
def test_store(tmp_path_factory, home, kind, fields, plain, found):
    """A stage is made and read back the same, or refused; nothing is ever written outside the store."""
    folder, item = tmp_path_factory.getbasetemp() / "properties" / "store", Stage(kind, tuple(fields), plain)
    if not isinstance(home, str) or not home.isprintable():
        with pytest.raises((StoreError, *ALLOWED)):
            assert Store(home).home is None or not home  # what is empty or None means the default
            raise ValueError
    store = Store(folder)
    made = attempt(lambda: store.make(item, lambda *_: {"value": found}))
    assert not folder.parent.exists() or [path.name for path in folder.parent.iterdir()] == ["store"]
    assert made in (None, False, True) and (made is None or store.metrics(item).keys() == {"value"})


@USUAL
@given(tables=st.one_of(st.just([4]), odd), seeds=st.one_of(st.just(1), odd), tasks=st.one_of(st.just(("cola",)), odd))
def test_plan(tables, seeds, tasks):
    found = attempt(lambda: stages.plan_stages(profiles.TEST, tables, seeds, tasks))
    assert found is None or all(item.path for item in found[0])


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
    (m2, n2), W = b, torch.randn(m * b[0], n * b[1], dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    rank = min(rank, m * n, m2 * n2)
    A, B = nearest_kronecker(W * 2.0**power, b, rank, scale)
    blocks = W.reshape(m, m2, n, n2).permute(0, 2, 1, 3).reshape(m * n, m2 * n2)
    tail = torch.linalg.svdvals(blocks)[rank:].square().sum()
    products = sum(torch.kron(x, y) for x, y in zip(A * 2.0 ** (-power / 2), B * 2.0 ** (-power / 2), strict=True))
    assert abs((W - products).square().sum() - tail) < EXACT * W.square().sum()
    largest = B.flatten(1).gather(1, B.flatten(1).abs().argmax(1, keepdim=True))
    assert (largest >= 0).all() and (scale == "sqrt" or torch.allclose(B.flatten(1).norm(dim=1), torch.ones(rank, dtype=torch.float64)))


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
    dense = torch.cat([sum(torch.kron(layer.A[p * rank + r], layer.B[p * rank + r]) for r in range(rank)) for p in range(num_fused)])
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
        assert torch.allclose(model.to_dense()(IDS).logits, expected, atol=1e-9) and count_parameters(model)["total"] >= count_parameters(model)["without_head"] > 0
        narrow = attempt(model.fold)
        assert narrow is None or torch.allclose(narrow(IDS).logits, expected, atol=1e-9)
        assert narrow is None or (attempt(narrow.fold) is None and attempt(narrow.to_dense) is None)


DOUBLE = tiny_gpt2(dtype=torch.float64)


def test_so_many_values_were_tried():
    """So that a strategy that refuses everything is seen."""
    assert COUNTED["examples"] > 1500 and 0.2 < COUNTED["refused"] / COUNTED["examples"] < 0.95, SimpleNamespace(**COUNTED)
