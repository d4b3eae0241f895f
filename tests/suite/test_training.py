"""A training run that is stopped goes on with the same losses; micro-batches change nothing; errors say what
to set."""

import dataclasses
import functools

import pytest
import torch
from conftest import tiny_gpt2

from kn import KroneckerSpec, compress
from kn.distill import DistillationConfig
from kn.suite import training
from kn.suite.settings import Readings, Training

ROWS = torch.randint(0, 50, (64, 16), generator=torch.Generator().manual_seed(0)).to(torch.int32)


class Stop(Exception):
    """What interrupts a run here."""


def run(scratch, steps, stop_at=None, hardware=None, **changes):
    """ILKD pre-training of a tiny KnGPT2; `stop_at` raises when that many batches were collated."""
    torch.manual_seed(0)
    teacher = tiny_gpt2(attn_implementation="eager")
    student, count = compress(teacher, KroneckerSpec()), [0]

    def collate(items):
        count[0] += 1
        if count[0] == stop_at:
            raise Stop
        return training.token_row_batch(ROWS, items)

    how = {
        "batch_size": 4, "learning_rate": 1e-3, "epochs": 1, "max_steps": steps, "warmup": 0.06,
        "weight_decay": 0.01, "schedule": "linear", "optimizer": "adamw_torch_fused", "clip": 1.0
    }
    settings = {"training": {**how, **changes}, "precision": "fp32", "readings": vars(Readings())}
    rows, config = range(len(ROWS)), DistillationConfig("ilkd")
    result = training.run_training(student, rows, collate, scratch, settings, 0, config, teacher, hardware)
    return student, result.log, result.hyperparameters, result.seconds


def test_a_run_of_a_thousand_steps_goes_on_with_the_same_curve(tmp_path):
    whole, log, used, seconds = run(tmp_path / "whole", 1000)
    with pytest.raises(Stop):
        run(tmp_path / "stopped", 1000, stop_at=760)
    kept = list((tmp_path / "stopped" / "trainer").glob("checkpoint-*"))
    assert [p.name for p in kept] == ["checkpoint-520"]  # of 500 steps, rounded up to a logged one
    before = training.checkpoint_seconds(kept[0])
    resumed, again, _, spent = run(tmp_path / "stopped", 1000)
    assert again == log and len(log) == 25 and used["steps"] == 1000 and spent > before > 0 and seconds > 0
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert not (tmp_path / "stopped" / "trainer").exists()


def test_a_short_run_writes_no_checkpoint(tmp_path):
    with pytest.raises(Stop):
        run(tmp_path, 20, stop_at=19)
    assert not list(tmp_path.glob("trainer/checkpoint-*"))


def test_recomputed_activations_leave_the_losses_as_they_are(tmp_path):
    """What ILKD captures inside the blocks still carries its gradient."""
    _, whole, _, _ = run(tmp_path / "whole", 20)
    student, again, _, _ = run(tmp_path / "again", 20, hardware={"checkpointing": True})
    assert student.is_gradient_checkpointing
    assert [line["loss"] for line in again] == pytest.approx([line["loss"] for line in whole], rel=1e-5)


def test_micro_batches_leave_the_losses_as_they_are(tmp_path):
    """The mean of means over equal parts is the mean: float32 rounding alone differs."""
    _, whole, _, _ = run(tmp_path / "whole", 20)
    _, parts, _, _ = run(tmp_path / "parts", 20, hardware={"micro_batch": 2})
    _, again, _, _ = run(tmp_path / "again", 20, hardware={"checkpointing": False, "micro_batch": 4})
    assert again == whole
    # Trainer rounds what it logs to 4 digits
    assert [line["loss"] for line in parts] == pytest.approx([line["loss"] for line in whole], rel=2e-3)


def test_refusals_say_what_to_set(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="hardware.micro_batch 3 does not divide the batch of 4"):
        run(tmp_path, 2, hardware={"micro_batch": 3})

    def full(*_, **__):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(training.DistillTrainer, "training_step", full)
    with pytest.raises(
        MemoryError,
        match=(
            "out of GPU memory with 4 rows at a time: --set hardware.micro_batch=2 keeps the effective "
            "batch of 4"
        )
    ):
        run(tmp_path, 2)
    with pytest.raises(MemoryError, match="with 1 rows at a time: --set hardware.checkpointing=true"):
        run(tmp_path, 2, hardware={"micro_batch": 1})


def test_a_loss_that_is_not_finite_is_an_error(tmp_path):
    with pytest.raises(FloatingPointError, match="the loss is not finite at step"):
        run(tmp_path, 4, learning_rate=1e30)


def poisoned_training(scratch, steps, poison):
    """A short training whose weights stop being numbers before the step `poison`."""
    model, count = tiny_gpt2(attn_implementation="eager"), [0]
    rows = torch.randint(0, 50, (64, 16), generator=torch.Generator().manual_seed(0)).to(torch.int32)

    def count_and_poison(*_):
        count[0] += 1
        if count[0] == poison:
            with torch.no_grad():
                model.transformer.h[0].mlp.c_fc.weight[0, 0] = float("nan")

    model.register_forward_pre_hook(count_and_poison)
    how = dataclasses.asdict(Training(batch_size=4, learning_rate=1e-3, epochs=1, max_steps=steps))
    settings = {"training": how, "precision": "fp32", "readings": dataclasses.asdict(Readings())}
    collate, config = functools.partial(training.token_row_batch, rows), DistillationConfig("none")
    return training.run_training(model, range(len(rows)), collate, scratch, settings, 0, config)


@pytest.mark.parametrize(("steps", "poison"), [(10, 5), (10, 10), (51, 51), (74, 74)])
def test_a_loss_that_stops_being_a_number(tmp_path, steps, poison):
    """Of 51 steps the last logged one is 50, of 74 steps it is 74 (by twos): what comes after it must be seen
    all the same."""
    with pytest.raises(
        FloatingPointError,
        match=rf"^the loss is not finite at step {poison}: lower the learning rate \(0.001\) or use float32$"
    ):
        poisoned_training(tmp_path, steps, poison)
