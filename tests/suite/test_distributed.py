"""Two processes give what one gives: same losses, same weights, at the same effective batch."""

import dataclasses
import shutil

import pytest
from safetensors.torch import load_file

from kn.suite import distributed, profiles, settings
from kn.suite.planner import StagePlanner
from kn.suite.store import Stage, Store
from kn.suite.work import WORK

STEPS = 12


def plan(processes):
    """The test profile with enough steps to differ in, in float32 so that rounding stays small."""
    longer = dataclasses.replace(profiles.TEST.pretrain, max_steps=STEPS)
    made = StagePlanner(
        dataclasses.replace(
            profiles.TEST, pretrain=longer, ablation=longer, hardware=settings.Hardware(processes=processes)
        )
    )
    made.precision = "fp32"
    return made


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """What the trainings start from."""
    store = Store(tmp_path_factory.mktemp("one")).open()
    made = plan(1)
    for item in (made.corpus, made.pretrained("teacher"), made.decompose):
        store.make(item, WORK[item.kind])
    return store


def test_two_processes_train_like_one(store, tmp_path):
    one, two = (
        plan(n).pretrain("wiki", "kd", 0) for n in (1, 2)
    )  # the hard case: no gradient reaches the head
    assert (
        one.hash == two.hash and distributed.process_count(one) == 1 and distributed.process_count(two) == 2
    )
    other = Store(shutil.copytree(store.home, tmp_path / "two"))
    store.make(one, WORK["pretrain"])
    other.make(two, distributed.run_torchrun)
    single, double = store.metrics(one), other.metrics(two)
    assert [line["step"] for line in double["log"]] == [line["step"] for line in single["log"]]
    for a, b in zip(
        single["log"], double["log"], strict=True
    ):  # sums in another order, and Trainer rounds the loss to four digits
        assert b["loss"] == pytest.approx(a["loss"], abs=2e-4)
        assert b["attention"] == pytest.approx(a["attention"], rel=1e-3) and b["hidden"] == pytest.approx(
            a["hidden"], rel=1e-3
        )
    weights = [
        load_file(s.folder(item) / "model" / "model.safetensors") for s, item in ((store, one), (other, two))
    ]
    for name, value in weights[0].items():
        assert (weights[1][name] - value).abs().max() < 1e-3, (
            name
        )  # AdamW turns rounding of a tiny gradient into a part of a step (rate 1e-3)
    assert double["perplexity"]["wiki"]["test"] == pytest.approx(
        single["perplexity"]["wiki"]["test"], rel=1e-3
    )
    assert sorted(p.name for p in other.folder(two).iterdir()) == ["manifest.json", "metrics.json", "model"]


def test_a_batch_that_cannot_be_shared_is_refused(store):
    with pytest.raises(
        RuntimeError,
        match="one of 3 processes failed: ValueError: hardware.processes 3 does not divide the batch of 4",
    ):
        store.make(plan(3).pretrain("wiki", "lm", 0), distributed.run_torchrun)
    assert not [p for p in (store.home / "pretrain").iterdir() if p.suffix == ".tmp"]


def test_a_worker_s_one_gpu_is_not_handed_on(store, tmp_path, monkeypatch):
    seen = {}

    def run(command, env, **_):
        seen.update(env)
        return type("Done", (), {"returncode": 1, "stderr": "OSError: stopped here"})

    monkeypatch.setattr(distributed.subprocess, "run", run)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    for pinned, visible in (("", "1"), ("1", None)):  # the user's own choice of GPUs stays
        seen.clear()
        monkeypatch.setenv(distributed.WORKER_GPU, pinned)
        with pytest.raises(RuntimeError, match="^one of 2 processes failed: OSError: stopped here$"):
            distributed.run_torchrun(plan(2).pretrain("wiki", "lm", 0), tmp_path, store)
        assert seen.get("CUDA_VISIBLE_DEVICES") == visible


def test_a_stage_survives_json():
    item = plan(2).pretrain("wiki", "kd", 3)
    again = Stage.from_json(item.to_json())
    assert (
        again == item
        and again.hash == item.hash
        and again.resources == item.resources
        and again.inputs[0].path == item.inputs[0].path
    )
