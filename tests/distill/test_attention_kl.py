"""kn.attention_kl against naive loops in float64: values, gradients, masks, block borders, reductions,
memory, messages.
"""

from importlib import import_module

import pytest
import torch
from conftest import largest_tensor

import kn
from kn.distill.attention_kl import attention_kl

module = import_module("kn.distill.attention_kl")  # kn.distill.attention_kl is the function
EXACT = 1e-11  # float64 against float64


def naive(q_s, k_s, q_t, k_t, scale_s, scale_t, mask, direction):
    """Each query's KL by its definition, (b, h, t); 0 where the query is padded."""
    b, h, t, _ = q_s.shape
    rows = [[[q_s.new_zeros(()) for _ in range(t)] for _ in range(h)] for _ in range(b)]
    for i in range(b):
        for j in range(h):
            for query in range(t):
                if mask is not None and not mask[i, query]:
                    continue
                keys = [key for key in range(query + 1) if mask is None or mask[i, key]]
                s = torch.stack([scale_s * q_s[i, j, query] @ k_s[i, j, key] for key in keys]).log_softmax(0)
                r = torch.stack([scale_t * q_t[i, j, query] @ k_t[i, j, key] for key in keys]).log_softmax(0)
                first, second = (s, r) if direction == "student_teacher" else (r, s)
                rows[i][j][query] = (first.exp() * (first - second)).sum()
    return torch.stack([torch.stack([torch.stack(line) for line in head]) for head in rows])


def inputs(b=2, h=2, t=7, e_s=3, e_t=5, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    made = [torch.randn(b, h, t, e, dtype=torch.float64, generator=g).to(dtype) for e in (e_s, e_s, e_t, e_t)]
    return [x.requires_grad_(index < 2) for index, x in enumerate(made)]


MASKS = {
    "none": None,
    "right": torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0]]),
    "left and holes": torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 0, 1, 1, 0, 1, 0]]),
    "a row without any token": torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0]]),
}


@pytest.mark.parametrize("block", [1, 3, 16], ids=lambda block: f"blocks of {block}")
@pytest.mark.parametrize("direction", module.DIRECTIONS)
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_values_and_gradients_against_loops(monkeypatch, mask, direction, block):
    monkeypatch.setattr(module, "BLOCK_SCORES", 0)
    monkeypatch.setattr(module, "MIN_BLOCK", block)
    mask, given = MASKS[mask], inputs()
    rows = naive(*given, 0.5, 0.4, mask, direction)
    count = rows.shape[1] * (14 if mask is None else int(mask.sum()))
    for reduction, wanted in (("none", rows), ("sum", rows.sum()), ("mean", rows.sum() / count)):
        found = attention_kl(
            *given, scale_s=0.5, scale_t=0.4, attention_mask=mask, direction=direction, reduction=reduction
        )
        assert found.shape == wanted.shape and torch.allclose(found, wanted, atol=EXACT)
        weights = torch.randn(wanted.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
        for a, b in zip(
            torch.autograd.grad((found * weights).sum(), given[:2]),
            torch.autograd.grad((wanted * weights).sum(), given[:2], retain_graph=True),
            strict=True,
        ):
            assert torch.allclose(a, b, atol=EXACT)


def test_scales_default_to_one_over_the_root_of_each_head_size():
    given = inputs()
    assert torch.equal(attention_kl(*given), attention_kl(*given, scale_s=3**-0.5, scale_t=5**-0.5))
    assert attention_kl(*given) > 0


@pytest.mark.parametrize("direction", module.DIRECTIONS)
@pytest.mark.parametrize("reduction", module.REDUCTIONS)
def test_gradcheck(direction, reduction):
    given = inputs(b=1, t=5)
    assert torch.autograd.gradcheck(
        lambda q, k: attention_kl(q, k, *given[2:], direction=direction, reduction=reduction), given[:2]
    )


def test_only_the_student_learns_and_only_where_asked():
    q_s, k_s, q_t, k_t = inputs()
    for x in (q_t, k_t):
        x.requires_grad_()
    attention_kl(q_s, k_s.detach(), q_t, k_t).backward()
    assert q_s.grad is not None and q_t.grad is None and k_t.grad is None
    with torch.no_grad():
        assert not attention_kl(q_s, k_s, q_t, k_t).requires_grad


@pytest.mark.parametrize("length", [130, 257])
def test_float32_and_bfloat16_inputs(length):
    """float32 sums: 1e-5 of the value; bfloat16 inputs are taken as they are and computed in float32, their
    gradients are rounded to bfloat16 once (2^-8).
    """
    wide = inputs(1, 2, length, 16, 16)
    for dtype, close in ((torch.float32, 1e-5), (torch.bfloat16, 2**-7)):
        given = [x.detach().to(dtype).requires_grad_(x.requires_grad) for x in wide]
        exact = [x.detach().double().requires_grad_(x.requires_grad) for x in given]
        loss, wanted = attention_kl(*given), attention_kl(*exact)
        assert loss.dtype == torch.float32 and abs(loss - wanted) < 1e-5 * wanted
        for a, b in zip(
            torch.autograd.grad(loss, given[:2]), torch.autograd.grad(wanted, exact[:2]), strict=True
        ):
            assert a.dtype == dtype and (a - b).norm() < close * b.norm()


def test_autocast_does_not_change_it():
    given = [x.detach().float().requires_grad_(x.requires_grad) for x in inputs()]
    plain = attention_kl(*given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(attention_kl(*given), plain)


def test_large_scores_stay_finite():
    q_s, k_s, q_t, k_t = (100 * x.detach() for x in inputs())
    found = attention_kl(q_s.requires_grad_(), k_s, q_t, k_t)
    found.backward()
    assert torch.isfinite(found) and torch.isfinite(q_s.grad).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"direction": "both"},
            "^direction 'both' is unknown: allowed are 'student_teacher', 'teacher_student'$",
        ),
        ({"reduction": "max"}, "^reduction 'max' is unknown: allowed are 'mean', 'sum', 'none'$"),
        (
            {"k_s": torch.zeros(2, 2, 6, 3)},
            r"^q and k must be \(batch, heads, length, head size\), the first three the same "
            r"for both models, got \(2, 2, 7, 3\), \(2, 2, 6, 3\), ",
        ),
        ({"q_t": torch.zeros(2, 7, 5)}, r"^q and k must be \(batch, heads, length, head size\)"),
        (
            {"attention_mask": torch.ones(2, 6)},
            r"^attention_mask must be \(batch, length\) = \(2, 7\), got \(2, 6\)$",
        ),
    ],
    ids=str,
)
def test_messages(change, message):
    given = dict(zip(("q_s", "k_s", "q_t", "k_t"), inputs(), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        attention_kl(**given)


def test_no_map_ever_stands_in_memory():
    """The largest tensor that is made: a block of scores, or q's size; not length × length."""
    largest = {}
    for length in (1024, 4096):
        given = [x.detach().float().requires_grad_(x.requires_grad) for x in inputs(1, 2, length, 8, 8)]
        with largest_tensor() as seen:
            attention_kl(*given).backward()
        largest[length] = seen[0]
    assert largest[1024] <= module.BLOCK_SCORES and largest[4096] <= module.BLOCK_SCORES < 2 * 4096**2 / 16


def test_the_package_offers_the_function():
    assert kn.attention_kl is attention_kl
