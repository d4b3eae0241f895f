"""Llama's aligned start: the teacher in another basis, exact Kronecker products, each part against a naive
reference, and nearer to the teacher than the SVD start.
"""

import pytest
import torch
from test_llama import exact_norm, logits, tiny_llama  # noqa: F401
from transformers import LlamaForSequenceClassification

from kn import KroneckerLinear, KroneckerSpec, align, compress, count_parameters
from kn.align import calibration, least_squares, llama, rotary

pytestmark = pytest.mark.usefixtures("exact_norm")
IDS = torch.randint(1, 50, (40, 12), generator=torch.Generator().manual_seed(5))
ALIGNED = KroneckerSpec(init="aligned")
SPECS = {
    "paper": {},
    "factor 2, embedding 4": {"embedding_factor": 4},
    "blocks": {"embedding": False},
    "every layer": {"layers": "all"},
    "embedding": {"layers": ()},
    "attention": {"shapes": {"mlp.*": None}, "embedding": False},
    "feed-forward": {"shapes": {"self_attn.*": None}, "embedding": False},
}


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    """Enough for models this small."""
    monkeypatch.setattr(rotary, "LBFGS_STEPS", 8)


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def error(model, teacher):
    return (logits(model, input_ids=IDS) - logits(teacher, input_ids=IDS)).std()


def test_the_equivalent_teacher_has_the_same_logits():
    teacher = tiny_llama(biases=True)
    for fields in ({}, {"embedding_factor": 4}, {"embedding": False}):
        model = align.equivalent_teacher(teacher, KroneckerSpec(init="aligned", **fields), IDS)
        assert (logits(model) - logits(teacher)).abs().max() < 1e-10 * logits(teacher).abs().max()


@pytest.mark.parametrize("factor", [2, 4])
def test_the_rotation_is_the_best_projection(factor):
    """Against the definition: orthogonal, and no nearby projection of that rank costs less under the metric.
    """
    rows, half = random(300, 16) * torch.linspace(0.2, 2, 16), random(16, 16, seed=1)
    metric = half @ half.T / 16
    Q, P = llama.optimal_rotation(rows.T @ rows, metric, factor)
    metric = metric + least_squares.METRIC_RIDGE * torch.eye(16)
    eye = torch.eye(16, dtype=torch.float64)
    turned = rows @ P @ Q
    assert torch.allclose(Q @ Q.T, eye, atol=1e-10)
    assert turned.unflatten(1, (-1, factor))[..., 1:].abs().max() < 1e-10
    assert torch.linalg.matrix_rank(turned) == 16 // factor

    def cost(projected):
        gone = rows - projected
        return ((gone @ metric) * gone).sum()

    plain = torch.linalg.svd(rows, full_matrices=False).Vh[: 16 // factor]
    assert cost(rows @ P) < cost(rows @ plain.T @ plain)
    for seed in range(20):
        step = 1e-3 * random(16, 16, seed=seed)
        assert cost(rows @ P) <= cost(rows @ P @ (eye + step))
        assert cost(rows @ P) <= cost(rows @ (eye + step) @ P)


@pytest.mark.parametrize("biases", [False, True], ids=["plain", "biases"])
@pytest.mark.parametrize("name", SPECS)
def test_the_matrices_are_exact_products_and_near(name, biases):
    teacher, spec = tiny_llama(biases=biases), KroneckerSpec(init="aligned", **SPECS[name])
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    dense, model, svd = (
        align.prepare(teacher, spec, IDS),
        compress(teacher, spec, calibration=IDS),
        compress(teacher, KroneckerSpec(**SPECS[name])),
    )
    assert all(torch.equal(before[k], v) for k, v in teacher.state_dict().items())
    assert (logits(dense) - logits(model)).abs().max() < 1e-10 * logits(dense).abs().max()
    assert count_parameters(model) == count_parameters(svd)
    assert {k: v.shape for k, v in model.state_dict().items()} == {
        k: v.shape for k, v in svd.state_dict().items()
    }
    assert error(model, teacher) < 0.8 * error(svd, teacher)
    for other in (model.to_dense(), *([] if name == "embedding" else [model.fold()])):
        assert (logits(other) - logits(model)).abs().max() < 1e-10
    assert model.config.spec == spec
    assert not model.training
    assert model.config._attn_implementation == teacher.config._attn_implementation
    model(input_ids=IDS, labels=IDS).loss.backward()
    # what starts as (1, 0) can be trained
    assert all(
        layer.B.grad.abs().max() > 0 for layer in model.modules() if isinstance(layer, KroneckerLinear)
    )


def test_the_same_text_gives_the_same_model():
    teacher = tiny_llama()
    one, two = (compress(teacher, ALIGNED, calibration=IDS) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    half = compress(teacher.to(torch.bfloat16), ALIGNED, calibration=IDS)
    assert half.dtype == torch.bfloat16 and logits(half).isfinite().all()


def test_the_gradient_covariance_is_that_of_small_changes():
    """Against the definition, by changing one number of one token's embedding."""
    teacher, ids, step = tiny_llama(biases=True), IDS[:2], 1e-5
    found = calibration.gradient_covariance(
        teacher.model.embed_tokens,
        lambda x, batch: [teacher(inputs_embeds=x, labels=batch).loss],
        ids.split(1),
    )
    total = torch.zeros(24, 24, dtype=torch.float64)

    def loss(row):  # transformers' own is in float32, too coarse for differences
        return torch.nn.functional.cross_entropy(logits(teacher, input_ids=row[None])[0, :-1], row[1:])

    for row in ids:
        g = torch.zeros(12, 24, dtype=torch.float64)
        for place in range(12):
            for i in range(24):
                change = torch.zeros(1, 12, 24, dtype=torch.float64)
                change[0, place, i] = step
                hook = teacher.model.embed_tokens.register_forward_hook(
                    lambda _layer, _inputs, out, change=change: out + change
                )
                g[place, i] = loss(row)
                hook.remove()
        g = (g - loss(row)) / step
        total += g.T @ g
    assert torch.allclose(found, total / total.diagonal().mean(), atol=1e-3)


def test_least_squares_drawn_towards_a_prior():
    """Against the stacked problem that it solves."""
    z, target, prior, ridge = random(50, 6), random(50, 3, seed=1), random(6, 3, seed=2), 0.3
    G, C = least_squares.cross_moment(z, z), least_squares.cross_moment(z, target)
    weight = (ridge * G.diagonal().mean()).sqrt()
    naive = torch.linalg.lstsq(
        torch.cat([z, weight * torch.eye(6)]), torch.cat([target, weight * prior])
    ).solution
    assert torch.allclose(least_squares.ridge_regression(G, C, ridge, prior), naive)


def test_tokens_where_attention_rests_count_for_more():
    """The moments against their definition: errors relative to the teacher's stream, and one token 20 times
    as large as the others.
    """
    z, target, x = random(2, 9, 5), random(2, 9, 4, seed=1), random(2, 9, 4, seed=2).sign()
    x[0, 0] *= 20
    weight = torch.ones(2, 9, dtype=torch.float64)
    weight[0, 0] = llama.SINK_WEIGHT / 20**2
    writer = llama.WriterRegression(torch.nn.Linear(5, 4, dtype=torch.float64), z, target, x)
    read = torch.cat([z, torch.ones(2, 9, 1)], -1)  # a bias reads a 1
    assert torch.allclose(writer.G, torch.einsum("sli,sl,slj->ij", read, weight, read))
    assert torch.allclose(writer.C, torch.einsum("sli,sl,slj->ij", read, weight, target))


def test_the_units_kept_are_the_best_where_one_leaves():
    """Against trying every unit."""
    z, W = random(200, 6) @ random(6, 6, seed=1), random(6, 3, seed=2)
    G = z.T @ z
    left = [tuple(i for i in range(6) if i != gone) for gone in range(6)]
    costs = [
        (z @ W - z[:, rows] @ torch.linalg.lstsq(z[:, rows], z @ W).solution).square().sum() for rows in left
    ]
    found = llama.select_neurons(G, W, 5, 0.0)
    assert tuple(found.tolist()) == left[int(torch.stack(costs).argmin())]


def test_queries_and_keys_come_nearer_to_the_teacher_s_attention(monkeypatch):
    """KL of the attention after the fit, against every second frequency as it is; a naive softmax with eager
    attention.
    """
    teacher = tiny_llama(head_dim=16)
    spec = KroneckerSpec(init="aligned", embedding=False, layers=(0,), shapes={"mlp.*": None})

    def divergence():
        model = align.prepare(teacher, spec, IDS)
        for m in (teacher, model):
            m.set_attn_implementation("eager")
        with torch.no_grad():
            t, s = (m(IDS, output_attentions=True).attentions[0].clamp_min(1e-30) for m in (teacher, model))
        return float((t * (t / s).log()).sum(-1).mean())

    monkeypatch.setattr(rotary, "LBFGS_STEPS", 30)
    fitted = divergence()
    monkeypatch.setattr(rotary, "LBFGS_STEPS", 0)
    started = divergence()
    monkeypatch.setattr(rotary, "SLOW_ANGLE", 0.0)
    assert fitted < 0.7 * min(started, divergence())


def test_frequencies_that_do_not_turn_are_an_ordinary_low_rank_product():
    """Where nothing turns within the text, the start is the best product of that rank for the scores (one
    query head a key head).
    """
    q, k = random(400, 8) * torch.linspace(0.3, 2, 8), random(400, 8, seed=1) @ random(8, 8, seed=2)
    roots = [torch.linalg.cholesky(x.T @ x).T[None] for x in (q, k)]
    still = (torch.ones(1, 5, 8, dtype=torch.float64), torch.zeros(1, 5, 8, dtype=torch.float64))
    mine_q, mine_k = rotary.initial_maps(*roots, still, 2)
    s = torch.linalg.svdvals(q @ k.T)
    assert torch.allclose((q @ k.T - q @ mine_q[0] @ (k @ mine_k[0]).T).norm(), s[4:].norm())


@pytest.mark.parametrize(
    ("fields", "ids", "message"),
    [
        (
            {},
            None,
            r"^init 'aligned' needs calibration=token ids, an integer tensor "
            r"\(sequences, length\) of some 65,000 tokens of text$",
        ),
        ({}, IDS.float(), "^init 'aligned' needs calibration=token ids"),
        ({}, IDS[:, :1], "^init 'aligned' needs calibration=token ids"),
        (
            {},
            IDS + 40,
            r"^calibration ids must be below 50 in sequences of at most 2048, got up to 89 and 12$",
        ),
        ({}, IDS.to("meta"), "^the calibration ids are on meta and the model on cpu: move one of them"),
        ({"rank": 2}, IDS, "^init 'aligned' needs rank 1 everywhere"),
        (
            {"ranks": {"mlp.*": 2}},
            IDS,
            "^init 'aligned' needs rank 1 everywhere",
        ),
        (
            {"shapes": {"mlp.*": (4, 1)}},
            IDS,
            "^init 'aligned' takes shapes that leave matrices dense",
        ),
        (
            {"shapes": {"mlp.up_proj": None}},
            IDS,
            "^init 'aligned' compresses mlp.gate_proj, mlp.up_proj, mlp.down_proj "
            "of a layer together or not at all$",
        ),
        ({"head": "tied"}, IDS, "^init 'aligned' gives the head the last norm's gain"),
        (
            {"embedding_factor": 5},
            IDS,
            "^init 'aligned' needs an embedding factor ≥ 2 that divides 24, got 5$",
        ),
        ({"factor": 4}, IDS, "^factor 4 does not divide the frequencies of a head of 4"),
    ],
    ids=str,
)
def test_refusals(fields, ids, message):
    with pytest.raises(ValueError, match=message):
        compress(tiny_llama(), KroneckerSpec(init="aligned", **fields), calibration=ids)


def test_other_classes_are_refused():
    with pytest.raises(
        ValueError,
        match="^init 'aligned' takes LlamaForCausalLM, not LlamaForSequenceClassification: take init='svd'$",
    ):
        compress(LlamaForSequenceClassification(tiny_llama().config), ALIGNED, calibration=IDS)
