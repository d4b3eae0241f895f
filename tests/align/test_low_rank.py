"""The low-rank baseline: its parameters, its best rank, and that it is built on what it says."""

import pytest
import torch
from conftest import tiny_gpt2

from kn import KroneckerSpec, compress, count_parameters
from kn.align import build_low_rank_pair, low_rank
from kn.align.least_squares import RIDGE

IDS = torch.randint(1, 50, (40, 12), generator=torch.Generator().manual_seed(5))
SPEC = KroneckerSpec(init="aligned", layers="all")


def test_no_more_parameters_than_the_kronecker_model_but_for_the_embedding_s_second_factor():
    teacher = tiny_gpt2(n_embd=32)
    _, student = build_low_rank_pair(teacher, SPEC, IDS)
    ours, theirs = (
        count_parameters(student)["total"],
        count_parameters(compress(teacher, SPEC, calibration=IDS))["total"],
    )
    assert theirs - 4 * 2000 < ours <= theirs + 32 * 16  # V of the embedding; ranks are rounded down
    assert [low_rank.rank_for(n, m, 2) for n, m in ((768, 768), (768, 3072), (3072, 768))] == [192, 307, 307]


def test_full_rank_is_the_teacher(monkeypatch):
    monkeypatch.setattr(low_rank, "rank_for", lambda n, m, _: min(n, m))
    teacher = tiny_gpt2(dtype=torch.float64, n_embd=16)
    same, student = build_low_rank_pair(
        teacher, KroneckerSpec(init="aligned", layers="all", embedding=False), IDS
    )
    # the ridge of what is refitted
    assert (student(IDS).logits - teacher(IDS).logits).abs().max() < 1e-5 * teacher(IDS).logits.abs().max()
    assert (same(IDS).logits - teacher(IDS).logits).abs().max() < 1e-10 * teacher(IDS).logits.abs().max()


def test_the_factorized_layer_is_the_best_of_its_rank_for_these_inputs():
    g = torch.Generator().manual_seed(1)
    x = (
        torch.randn(400, 12, dtype=torch.float64, generator=g)
        @ torch.randn(12, 12, dtype=torch.float64, generator=g)
        + 1
    )
    layer = tiny_gpt2(dtype=torch.float64, n_embd=12).transformer.h[0].mlp.c_fc
    ones = torch.cat([x, torch.ones(400, 1, dtype=torch.float64)], 1)
    made = low_rank.factorize_linear(layer, ones.T @ ones, 2)
    r = low_rank.rank_for(12, 48, 2)
    assert made.U.shape == (1, 12, r) and made.V.shape == (1, r, 48)
    centred = (layer(x) - layer(x).mean(0)).detach()
    # Eckart-Young: no map of rank r does better on these outputs
    tail = torch.linalg.svdvals(centred)[r:].square().sum()
    assert tail <= (made(x) - layer(x)).square().sum() <= tail * (1 + 50 * RIDGE)


def test_query_key_and_value_are_three():
    layer = tiny_gpt2(dtype=torch.float64, n_embd=16).transformer.h[0].attn.c_attn
    made = low_rank.factorize_linear(layer, torch.eye(17, dtype=torch.float64), 2)
    assert made.U.shape == (3, 16, 4) and made(torch.zeros(1, 2, 16, dtype=torch.float64)).shape == (1, 2, 48)


@pytest.mark.parametrize("name", ["c_attn", "c_proj"])
def test_it_can_be_trained(name):
    _, student = build_low_rank_pair(tiny_gpt2(n_embd=16), SPEC, IDS)
    student(IDS, labels=IDS).loss.backward()
    layer = getattr(student.transformer.h[1].attn, name)
    assert layer.U.grad.abs().sum() > 0
    assert layer.V.grad.abs().sum() > 0
    assert student.transformer.wte.A.grad.abs().sum() > 0
