"""A training that is stopped after any step of any epoch goes on as the undisturbed one, bit for bit."""

import contextlib
import dataclasses
import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import ROOT, tiny_gpt2

from kn.distill import DistillationConfig
from kn.suite import evaluate, training
from kn.suite.settings import Readings, Training

GENERATOR = torch.Generator().manual_seed(3)
LENGTHS = torch.randint(2, 15, (22,), generator=GENERATOR).tolist()  # the last batch of an epoch has 2
TEXTS = [torch.randint(1, 50, (n,), generator=GENERATOR).tolist() for n in LENGTHS]
EPOCH = 6  # steps


class Stop(Exception):
    """What interrupts a run here."""


def run(scratch, grouped, batches, micro=None):
    """Three epochs on GLUE-like rows with dropout; the indices of each batch are appended to `batches`."""
    model = tiny_gpt2(labels=2, resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1)
    rows = [{"input_ids": ids, "index": index} for index, ids in enumerate(TEXTS)]

    def collate(items):
        batches.append([item["index"] for item in items])
        labels = torch.tensor([item["index"] % 2 for item in items])
        return {**evaluate.pad([item["input_ids"] for item in items], 0), "labels": labels}

    how = dataclasses.asdict(Training(batch_size=4, learning_rate=1e-3, epochs=3, max_steps=3 * EPOCH))
    settings = {"training": how, "precision": "fp32", "readings": dataclasses.asdict(Readings())}
    settings["group_by_length"] = grouped
    config, hardware = DistillationConfig("none"), {"micro_batch": micro}
    result = training.run_training(model, rows, collate, scratch, settings, 0, config, None, hardware)
    return model, result.log


@functools.cache
def undisturbed(grouped, micro):
    with tempfile.TemporaryDirectory() as folder:
        return *run(Path(folder), grouped, batches := [], micro), batches


def stop_after(patch, stop):
    """Checkpoints every `stop` steps, and the end of the run after the first."""
    save = training.CheckpointCallback.on_save

    def save_and_stop(*arguments, **named):
        save(*arguments, **named)
        raise Stop

    patch.setattr(training, "CHECKPOINT_STEPS", stop)
    patch.setattr(training.CheckpointCallback, "on_save", save_and_stop)


STOPS = [(1, None), (4, 2), (6, None), (6, 2), (7, 2), (9, None), (11, 2), (12, None), (13, 2), (17, 2)]


@pytest.mark.parametrize(("stop", "micro"), STOPS)
@pytest.mark.parametrize("grouped", [False, True], ids=["random", "grouped"])
def test_a_run_goes_on_from_any_step_of_any_epoch(tmp_path, monkeypatch, grouped, stop, micro):
    whole, log, batches = undisturbed(grouped, micro)
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_after(patch, stop)
        run(tmp_path, grouped, [], micro)
    resumed, again = run(tmp_path, grouped, rest := [], micro)
    assert 0 < len(rest) < len(batches) and rest == batches[-len(rest) :] and again == log
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def one_of_two_processes(folder):
    """What torchrun starts twice: whether batches and weights of a resumed run are those of the whole one."""
    rank = os.environ["RANK"]
    for grouped in (False, True):
        scratch = Path(folder) / f"grouped-{grouped}"  # one for both processes
        whole, _ = run(scratch / "whole", grouped, batches := [])
        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Stop):
            stop_after(patch, 9)
            run(scratch, grouped, [])
        torch.distributed.barrier()
        assert (scratch / "trainer/checkpoint-9").is_dir()
        resumed, _ = run(scratch, grouped, rest := [])
        same = all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
        epochs = [sorted(sum(batches[i : i + EPOCH], [])) for i in range(0, 3 * EPOCH, EPOCH)]
        found = {"grouped": grouped, "same": same and rest == batches[-len(rest) :], "epochs": epochs}
        (Path(folder) / f"{rank}-{grouped}.json").write_text(json.dumps(found))


def test_two_processes_share_each_epoch_and_go_on_as_they_were(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    variables, command = {**os.environ, "PYTHONPATH": paths}, [*command, __file__, str(tmp_path)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for grouped in (False, True):
        one, two = (json.loads((tmp_path / f"{rank}-{grouped}.json").read_text()) for rank in (0, 1))
        assert one["same"] and two["same"]
        for a, b in zip(one["epochs"], two["epochs"], strict=True):  # the last batches are filled up
            assert set(a) | set(b) == set(range(len(TEXTS))) and len(a) == len(b)


if __name__ == "__main__":
    one_of_two_processes(sys.argv[1])
