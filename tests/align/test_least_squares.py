"""Least squares, low-rank products and sums over streams against their definitions."""

import itertools

import pytest
import torch

from kn.align import least_squares as lsq


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(lsq, "BATCH_TOKENS", 24)  # two sequences of 10 at a time


def test_sums_come_a_few_sequences_at_a_time(few):
    x, y, seen = random(7, 10, 4), random(7, 10, 3, seed=1), []

    def samples(a, b):
        seen.append(a.shape[0] * a.shape[1])
        return a, b

    assert torch.allclose(
        lsq.streamed_cross_moment(samples, x, y), x.flatten(0, 1).T @ y.flatten(0, 1), atol=1e-12
    )
    assert max(seen) <= 24 and sum(seen) == 70
    assert torch.equal(lsq.map_batches(lambda a, b: a.sum(-1) + b.sum(-1), x, y), x.sum(-1) + y.sum(-1))
    long = random(1, 5000, 2)  # a sequence longer than what is summed in one product
    assert torch.allclose(lsq.streamed_cross_moment(lambda a: (a, a), long), long[0].T @ long[0], rtol=1e-12)


def test_least_squares_with_its_ridge(few):
    """The ridge is a row √r e_i of its own for every input, with target 0."""
    x, y = random(7, 10, 4), random(7, 10, 3, seed=1)
    found = lsq.fit_linear_map(lambda a, b: (lsq.append_ones(a), b), x, y)
    rows = torch.cat([x.flatten(0, 1), torch.ones(70, 1, dtype=torch.float64)], 1)
    r = lsq.RIDGE * rows.square().sum(0).mean()
    wanted = torch.linalg.lstsq(
        torch.cat([rows, r.sqrt() * torch.eye(5, dtype=torch.float64)]),
        torch.cat([y.flatten(0, 1), torch.zeros(5, 3, dtype=torch.float64)]),
    ).solution
    assert torch.allclose(found, wanted, atol=1e-12)


@pytest.mark.parametrize("two_sided", [False, True])
def test_low_rank_is_the_best_of_its_rank(two_sided):
    x, z, left, right = random(60, 8), random(50, 9, seed=1), random(8, 5, seed=2), random(5, 9, seed=3)
    G, K = x.T @ x, z.T @ z if two_sided else None

    def cost(a, c):  # Σ over samples of (x (left·right − a·c) zᵀ)²
        R, error = lsq.gram_root(G), left @ right - a @ c
        return (
            (R @ error @ (lsq.gram_root(K).T if two_sided else torch.eye(9, dtype=torch.float64)))
            .square()
            .sum()
        )

    a, c = lsq.weighted_low_rank(left, right, 3, G, K)
    assert a.shape == (8, 3) and c.shape == (3, 9)
    U, s, Vh = torch.linalg.svd(left @ right)
    assert cost(a, c) < cost(U[:, :3] * s[:3], Vh[:3])  # the best without samples
    for seed in range(20):
        assert cost(a, c) <= cost(a + 1e-4 * random(8, 3, seed=seed), c + 1e-4 * random(3, 9, seed=seed + 50))
    full = lsq.weighted_low_rank(left, right, 5, G, K)
    assert torch.allclose(full[0] @ full[1], left @ right, atol=1e-9)


@pytest.mark.parametrize("factor", [2, 3])
def test_spread_is_a_kronecker_product(factor):
    b = torch.zeros(1, factor, dtype=torch.float64)
    b[0, 0] = 1
    W = random(4, 5)
    assert torch.equal(lsq.interleave_zeros(W, factor, 1), torch.kron(W, b))
    assert torch.equal(lsq.interleave_zeros(W, factor, 0), torch.kron(W, b.reshape(factor, 1)))


def test_a_subset_found_by_elimination_is_the_best_or_near_it(monkeypatch):
    """Against all subsets of 4 of 8 correlated inputs, each refitted by least squares; one at a time."""
    monkeypatch.setattr(lsq, "ELIMINATION_STEPS", 4)
    monkeypatch.setattr(lsq, "RIDGE", 1e-9)
    ranks = []
    for seed in range(10):
        x = random(200, 8, seed=seed) @ random(8, 8, seed=seed + 50) + random(8, seed=seed + 90)
        W = random(8, 5, seed=seed + 100)
        ones, y = torch.cat([x, torch.ones(200, 1, dtype=torch.float64)], 1), x @ W

        def lost(kept, ones=ones, y=y):
            read = ones[:, [*kept, 8]]
            return float((y - read @ torch.linalg.lstsq(read, y).solution).square().sum())

        costs = sorted(lost(kept) for kept in itertools.combinations(range(8), 4))
        found = lsq.backward_elimination(ones.T @ ones, W, 4)
        assert found.tolist() == sorted(found.tolist()) and len(set(found.tolist())) == 4
        ranks.append(sum(cost < lost(found.tolist()) * (1 - 1e-9) for cost in costs))
    assert sorted(ranks)[5] <= 2 and max(ranks) <= 20, ranks  # of 70 subsets; elimination is greedy


def test_nothing_is_lost_where_inputs_are_repeated():
    x = random(100, 5)
    both = torch.cat([x, x, torch.ones(100, 1, dtype=torch.float64)], 1)
    found = lsq.backward_elimination(both.T @ both, random(10, 3, seed=1), 5)
    assert {int(i) % 5 for i in found} == set(range(5))
