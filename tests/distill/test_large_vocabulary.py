"""kn.distill.large_vocabulary against the losses of whole logits in float64: values, gradients, masks,
autocast, memory; and the Trainer's step that uses it against the one that does not.
"""

from importlib import import_module

import pytest
import torch
from conftest import largest_tensor, tiny_gpt2
from torch.nn import functional as F
from transformers import TrainingArguments

from kn import DistillTrainer, compress, vanilla_kd_loss
from kn.distill import DistillationConfig, chunked_cross_entropy, chunked_logit_kd, large_vocabulary

EXACT = 1e-12  # float64 against float64
ROUNDED = 2**-7  # bfloat16 logits and slopes are off by 2^-9 each, their products by some of those
SINGLE = 1e-6  # transformers' own cross-entropy is float32
B, T, D, G, V = 3, 7, 8, 12, 29  # batch, length, the student's and the teacher's width, vocabulary: 21 rows
MASK = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 0, 1], [1, 1, 1, 1, 0, 0, 0]])


def made(*shapes, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return [
        torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes
    ]


def labels(ignored=True):
    found = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(1))
    return found.masked_fill(MASK == 0, large_vocabulary.IGNORE_INDEX) if ignored else found


def whole(hidden, weight, target):
    return F.cross_entropy((hidden @ weight.T)[:, :-1].flatten(0, 1), target[:, 1:].flatten())


def same(found, wanted, given, close=EXACT):
    assert found.ndim == 0 and abs(found - wanted) <= close * max(1, abs(wanted.detach()))
    for a, b in zip(
        torch.autograd.grad(found * 3, given), torch.autograd.grad(wanted * 3, given), strict=True
    ):
        assert a.dtype == b.dtype and (a - b).norm() <= close * b.norm()


@pytest.mark.parametrize("rows", [1, 4, 18, 256], ids=lambda rows: f"{rows} rows at a time")
@pytest.mark.parametrize("ignored", [False, True], ids=["all", "some left out"])
def test_next_token_loss(monkeypatch, rows, ignored):
    monkeypatch.setattr(large_vocabulary, "CHUNK_ROWS", rows)
    given = made((B, T, D), (V, D))
    same(chunked_cross_entropy(*given, labels(ignored)), whole(*given, labels(ignored)), given)


@pytest.mark.parametrize("rows", [1, 4, 21, 256], ids=lambda rows: f"{rows} rows at a time")
@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.5])
def test_logit_kd(monkeypatch, rows, mask, temperature):
    monkeypatch.setattr(large_vocabulary, "CHUNK_ROWS", rows)
    hidden, weight, guide, guide_weight = made((B, T, D), (V, D), (B, T, G), (V, G))
    found = chunked_logit_kd(hidden, weight, guide, guide_weight, mask, temperature)
    wanted = vanilla_kd_loss(
        hidden @ weight.T, guide @ guide_weight.T, None if mask is None else mask.float(), temperature
    )
    with pytest.raises(RuntimeError, match="not have been used in the graph"):
        torch.autograd.grad(found, guide, retain_graph=True)  # the teacher is fixed
    same(found, wanted, (hidden, weight))


def test_only_where_asked():
    hidden, weight = made((B, T, D), (V, D))
    chunked_cross_entropy(hidden, weight.detach(), labels()).backward()
    assert hidden.grad is not None and weight.grad is None
    chunked_cross_entropy(hidden.detach(), weight, labels()).backward()
    assert weight.grad is not None
    with torch.no_grad():
        assert not chunked_cross_entropy(hidden, weight, labels()).requires_grad


def test_nothing_left_is_not_a_number():
    """As in PyTorch."""
    given = made((B, T, D), (V, D))
    nothing = torch.full((B, T), large_vocabulary.IGNORE_INDEX)
    assert chunked_cross_entropy(*given, nothing).isnan() and whole(*given, nothing).isnan()


def test_going_back_twice_says_why_not():
    for loss in (
        chunked_cross_entropy(*made((B, T, D), (V, D)), labels()),
        chunked_logit_kd(*made((B, T, D), (V, D), (B, T, G), (V, G))),
    ):
        loss.backward(retain_graph=True)
        with pytest.raises(
            RuntimeError,
            match="^backward ran twice: the gradients of this loss are made once and given away$",
        ):
            loss.backward()


def test_autocast_takes_bfloat16_products_and_float32_sums():
    given = made((B, T, D), (V, D), dtype=torch.float32)
    teacher = [x.detach() for x in made((B, T, G), (V, G), seed=2, dtype=torch.float32)]
    rounded = [x.detach().bfloat16().float().requires_grad_() for x in given]
    losses = (
        (lambda h, w: chunked_cross_entropy(h, w, labels())),
        (lambda h, w: chunked_logit_kd(h, w, *teacher, MASK)),
    )
    wholes = (
        (lambda h, w: whole(h, w, labels())),
        (lambda h, w: vanilla_kd_loss(h @ w.T, teacher[0] @ teacher[1].T, MASK.float())),
    )
    for loss, exact in zip(losses, wholes, strict=True):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = loss(*given)
        wanted = exact(*rounded)
        assert found.dtype == torch.float32 and abs(found - wanted) <= ROUNDED * wanted
        for a, b in zip(torch.autograd.grad(found, given), torch.autograd.grad(wanted, rounded), strict=True):
            assert a.dtype == torch.float32 and (a - b).norm() <= ROUNDED * b.norm()


@pytest.mark.parametrize("which", ["chunked_cross_entropy", "chunked_logit_kd"])
def test_logits_never_stand_whole(which):
    """The largest tensor of a step does not grow with the tokens; that of the whole logits' way does, so the
    test can fail.
    """
    found = {}
    for tokens in (1024, 4096):
        hidden, weight = made((1, tokens, 4), (300, 4), dtype=torch.float32)
        target, guide = torch.zeros(1, tokens, dtype=torch.long), (hidden.detach() + 1, weight.detach())
        with largest_tensor() as seen:
            (
                chunked_cross_entropy(hidden, weight, target)
                if which == "chunked_cross_entropy"
                else chunked_logit_kd(hidden, weight, *guide)
            ).backward()
        with largest_tensor() as all_of_them:
            (
                whole(hidden, weight, target)
                if which == "chunked_cross_entropy"
                else vanilla_kd_loss(hidden @ weight.T, guide[0] @ guide[1].T)
            ).backward()
        found[tokens] = seen[0], all_of_them[0]
    assert found[1024][0] == found[4096][0] == large_vocabulary.CHUNK_ROWS * 300
    assert found[4096][1] >= 4096 * 300


@pytest.mark.parametrize("logit_term", [0.0, 0.7])
@pytest.mark.parametrize("heads", ["dense", "tied"])
def test_the_trainers_step_is_the_same_without_logits(tmp_path, monkeypatch, heads, logit_term):
    """Loss, terms and every gradient of an ILKD step with padding, with and without a logit term."""
    from kn import KroneckerSpec

    teacher = tiny_gpt2(dtype=torch.float64)
    student = compress(teacher, KroneckerSpec(head=heads)).train()
    mask = torch.tensor([[1] * 6, [1, 1, 1, 1, 0, 0]])
    ids = torch.randint(1, 50, (2, 6), generator=torch.Generator().manual_seed(0)) * mask
    given = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    found = []
    for limit in (10**9, 0):
        monkeypatch.setattr(import_module("kn.distill.capture"), "CHUNKING_MIN_LOGITS", limit)
        trainer = DistillTrainer(
            model=student,
            args=arguments,
            distillation=DistillationConfig("ilkd", logit_term=logit_term),
            teacher=teacher,
        )
        student.zero_grad()
        loss = trainer.compute_loss(student, dict(given))
        loss.backward()
        found.append((loss.detach(), dict(trainer.term_sums), [p.grad.clone() for p in student.parameters()]))
    (loss, terms, slopes), (loss_, terms_, slopes_) = found
    assert abs(loss - loss_) < SINGLE
    assert terms.keys() == terms_.keys()
    assert ("logits" in terms) == bool(logit_term)
    assert all(abs(terms[name] - terms_[name]) < SINGLE for name in terms)
    assert all(torch.allclose(a, b, atol=SINGLE) for a, b in zip(slopes, slopes_, strict=True))


def test_the_trainers_chunked_step_makes_no_logits(tmp_path, monkeypatch):
    """So that the two steps above are two."""
    monkeypatch.setattr(import_module("kn.distill.capture"), "CHUNKING_MIN_LOGITS", 0)
    teacher = tiny_gpt2()
    student = compress(teacher).train()
    trainer = DistillTrainer(
        model=student,
        args=TrainingArguments(str(tmp_path), report_to="none", use_cpu=True),
        distillation=DistillationConfig("ilkd", logit_term=1.0),
        teacher=teacher,
    )
    called = []
    monkeypatch.setattr(
        import_module("kn.distill.trainer"),
        "chunked_logit_kd",
        lambda *given: called.append(given) or chunked_logit_kd(*given),
    )
    ids = torch.ones(1, 6, dtype=torch.long)
    trainer.compute_loss(student, {"input_ids": ids, "labels": ids})
    assert len(called) == 1 and called[0][0].shape == (1, 6, 8)
    trainer.compute_loss(student, {"input_ids": ids, "labels": ids}, return_outputs=True)
    assert len(called) == 1  # who wants the outputs gets logits


def test_a_classifiers_logit_term_is_vanilla_kd_of_its_labels(tmp_path):
    """A classifier has no head over words: its few logits are compared whole."""
    teacher = tiny_gpt2(labels=3)
    student = compress(teacher).train()
    trainer = DistillTrainer(
        model=student,
        args=TrainingArguments(str(tmp_path), report_to="none", use_cpu=True),
        distillation=DistillationConfig("ilkd", logit_term=0.5),
        teacher=teacher,
    )
    inputs = {
        "input_ids": torch.tensor([[5, 6, 7], [8, 9, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
        "labels": torch.tensor([0, 2]),
    }
    trainer.compute_loss(student, inputs)
    asked = {name: value for name, value in inputs.items() if name != "labels"}
    # float32 sums of six numbers
    assert float(trainer.term_sums["logits"]) == pytest.approx(
        float(vanilla_kd_loss(student(**asked).logits, teacher(**asked).logits).detach()), rel=1e-6
    )
