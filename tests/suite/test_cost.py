"""The plan's numbers: counted steps and tokens, seconds scaled from a timing run, kept in the store."""

import dataclasses
import json

import pytest
from conftest import TIMED

from kn.suite import cost, devices, profiles, timing
from kn.suite.plan import plan_stages
from kn.suite.store import Store

PLAN = plan_stages(profiles.PAPER, without_mirror=True)[0]


def pick(kind, **fields):
    return next(item for item in PLAN if item.kind == kind and all(item[k] == v for k, v in fields.items()))


def test_paper_steps_are_table_2_s():
    """§4.2: batch 1 on 10 % of OpenWebText, which is 880 k rows of 1,024 tokens or so."""
    pretrain = pick("pretrain", on="web")
    assert pretrain.steps == 878907 and pretrain.tokens == 900e6
    assert pick("finetune_glue", task="cola", row="teacher").steps == 3 * 8551 // 16 + 1


def test_each_stage_is_costed_by_what_it_is_most_like():
    assert cost.training_kind(pick("pretrain", on="wiki", objective="lm")) == "lm"
    assert cost.training_kind(pick("pretrain", on="wiki", objective="kd")) == "lm_ilkd"
    assert cost.training_kind(pick("finetune_glue", row="student_ilkd")) == "glue_ilkd"
    assert cost.training_kind(pick("finetune_glue", row="baseline_kd")) == "glue"
    assert cost.training_kind(pick("finetune_lm", model="student")) == "lm"
    item = pick("pretrain", on="web")
    assert cost.seconds(item, TIMED) == pytest.approx(item.cost / 1.5e12 * 3.0 + 10)
    assert cost.seconds(pick("corpus"), TIMED) == pytest.approx((900e6 + 118e6) / 1e6)


def test_disk_counts_models_and_token_rows():
    assert cost.disk_bytes(pick("pretrained", model="baseline"), TIMED) == 3.3e8
    assert (
        cost.disk_bytes(pick("finetune_glue", row="teacher"), TIMED) == 5e8
        and cost.disk_bytes(pick("finetune_glue", row="student"), TIMED) == 0
    )
    assert cost.disk_bytes(pick("corpus"), TIMED) == 2 * (900e6 + 118e6)


def test_the_plan_says_what_it_costs(tmp_path):
    text = cost.describe_plan(PLAN, Store(tmp_path), TIMED, jobs=4)
    lines = {line.split()[0]: line.split() for line in text.splitlines()}
    assert lines["pretrain"][1:4] == ["0", "4", "1,224,612"]
    assert "with 4 processes" in text and "7 GB of memory a training; timed on a machine" in text
    assert (
        text.splitlines()[-1]
        == "tokens a second and process: language model 1,000, with ILKD 800, GLUE 500, GLUE with ILKD 300"
    )
    chain = cost.critical_path(PLAN, Store(tmp_path), TIMED)
    assert (
        cost.seconds(pick("pretrain", on="web"), TIMED)
        < chain
        < sum(cost.seconds(item, TIMED) for item in PLAN)
    )


def test_starts_of_processes_and_notebooks_are_in_the_whole_time(tmp_path):
    """One worker: its start, all stages, and a kernel for each notebook; a finished plan: notebooks alone."""
    store, shapes = Store(tmp_path), [pick("shapes")]
    work = cost.seconds(shapes[0], TIMED)
    text = cost.describe_plan(shapes, store, {**TIMED, "start": 40.0}, jobs=1, notebooks=2)
    assert work < 1 and "in all about 2 min 40 s with 1 process (0 s of work, the longest chain 0 s" in text
    assert "notebooks 2 min 00 s)" in text
    assert "in all about 2 min 00 s with" in cost.describe_plan([], store, {**TIMED, "start": 40.0}, 1, 2)
    assert "in all about nothing with" in cost.describe_plan([], store, TIMED, 1)


def test_a_disk_that_is_too_small_is_found_before_anything_runs(tmp_path, monkeypatch):
    cost.check_disk_space(PLAN, Store(tmp_path), {**TIMED, "bytes": dict.fromkeys(TIMED["bytes"], 0)})
    monkeypatch.setattr(devices.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 5e9}))
    with pytest.raises(
        cost.CostError,
        match=r"^8\.8 GB will be written to .*, 5.0 GB are free there: make room, or .* KN_HOME=…$",
    ):
        cost.check_disk_space(PLAN, Store(tmp_path), TIMED)


def test_a_timing_run_is_made_once(tmp_path):
    store = Store(tmp_path).open()
    found = timing.measured_timing(profiles.TEST, "fp32", store)
    assert set(found["seconds"]) == set(timing.METHODS) and all(
        0 < value < 60 for value in found["seconds"].values()
    )
    assert found["bytes"]["teacher"] == 4 * 1796096  # parameters of mini's GPT-2, float32
    (kept,) = tmp_path.glob("timing-*.json")
    kept.write_text(json.dumps({**found, "device": "read back"}))
    assert timing.measured_timing(profiles.TEST, "fp32", store)["device"] == "read back"
    other = dataclasses.replace(
        profiles.TEST, pretrain=dataclasses.replace(profiles.TEST.pretrain, batch_size=8)
    )
    assert timing.measured_timing(other, "fp32", store)["tokens"]["lm"] == 8 * 128


def test_a_timing_run_that_fails_says_why(tmp_path):
    broken = dataclasses.replace(profiles.TEST, model=dataclasses.replace(profiles.TEST.model, heads=5))
    with pytest.raises(cost.CostError, match="the timing run failed: ValueError: .*128.*5"):
        timing.measured_timing(broken, "fp32", Store(tmp_path / "none"))
