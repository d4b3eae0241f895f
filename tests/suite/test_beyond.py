"""What goes beyond the paper, and the ledger of claims, run whole in the seconds-long profile: stages,
notebooks against their committed outputs, pages."""

import json

import pandas
import pytest
import torch
from conftest import compare_notebook
from safetensors.torch import load_file
from transformers import GPT2LMHeadModel

from kn.suite import plan as kinds
from kn.suite import profiles, readings
from kn.suite import run as stages
from kn.suite.store import Store
from kn.suite.work.pretrained import load_model, perplexities


@pytest.fixture(scope="module")
def home(whole_test_run):
    return whole_test_run


@pytest.fixture(scope="module")
def store(home):
    return Store(home / "store")


def test_pages_tables_and_index(home):
    folder = home / "reports" / "test"
    for name in kinds.BEYOND:
        frame = pandas.read_csv(folder / f"{name}.csv")
        assert len(frame) > 40 and frame["ours"].notna().mean() > 0.9 and (folder / f"{name}.html").exists()
        assert (folder / f"{name}_claims.csv").exists()
        assert f'id="{name}"' in (folder / "index.html").read_text()


def test_the_ledger_its_readings_and_the_pages_around_it(home):
    folder = home / "reports" / "test"
    ledger, effects = (
        pandas.read_csv(folder / f"{name}.csv", keep_default_na=False) for name in ("claims", "readings")
    )
    assert set(ledger.loc[ledger["judge"] == "algebra", "ours"]) == {"reproduced", "not reproduced"}
    assert "not run" not in set(ledger["ours"])
    # one seed decides nothing
    assert set(effects["reading"]) == set(readings.SWITCHES) and set(effects["n"]) == {1}
    assert set(effects["turned"]) == {"no"}
    for page in ("claims", "how", "failed", "index"):
        assert (folder / f"{page}.html").stat().st_size > 5000, page
    front = (folder.parent / "index.html").read_text()
    assert "test/claims.html#perplexity" in front and "1 seed" in front
    # the command of a switched reading's stage
    assert "--profile test --only claims" in (folder / "records.html").read_text()


@pytest.mark.parametrize("name", (*kinds.BEYOND, kinds.LEDGER))
def test_notebook_against_its_committed_outputs(home, tmp_path, name):
    """With the test profile for mini: what they print (rows, sizes, claims) is the same."""
    places = {"KN_HOME": str(home / "store"), "KN_REPORTS": str(tmp_path / "reports")}
    compare_notebook(name, tmp_path, "test", **places)


def test_the_aligned_start_keeps_the_teacher_in_its_own_basis(store):
    """What ILKD compares with: the same function, other weights; the student beside it, both as a fresh
    process would load them."""
    plan = kinds.StagePlanner(profiles.TEST)
    folder = store.folder(plan.aligned(0))
    teacher = GPT2LMHeadModel.from_pretrained(store.folder(plan.pretrained("teacher")) / "model")
    same = GPT2LMHeadModel.from_pretrained(folder / "teacher")
    ids = torch.arange(100, 164).view(2, 32)
    with torch.no_grad():
        assert torch.allclose(same(ids).logits, teacher(ids).logits, atol=2e-3)
        assert not torch.allclose(same.transformer.wte.weight, teacher.transformer.wte.weight, atol=0.1)
    card = (folder / "model" / "README.md").read_text()
    assert "aligned" in card
    assert json.loads((folder / "model" / "config.json").read_text())["kronecker"]["init"] == "aligned"


def test_other_seeds_calibrate_on_other_text_and_the_svd_start_stays():
    plan = kinds.StagePlanner(profiles.TEST)
    assert plan.aligned(0).hash != plan.aligned(1).hash
    assert plan.light_pretrained("svd", 0, 0) is plan.light_pretrained("svd", 0, 1)
    assert plan.light_pretrained("svd", 1, 3) == plan.pretrain("web", "lm_kd", 3)  # Table 3's, not made twice
    assert kinds.glue_row("svd", 1) == "student" and kinds.glue_row("svd", 0.1) == "svd@0.1"


def test_what_is_not_restricted_to_tables():
    made, wanted = stages.plan_stages(profiles.TEST, kinds.BEYOND, 2, tasks=("rte",))
    assert {item["task"] for item in wanted if item.kind == "finetune_glue"} == {"rte"}
    assert {item.kind for item in made} == {
        "corpus", "pretrained", "decompose", "aligned", "heal", "pretrain", "twins", "finetune_glue",
        "compressed"
    }
    with pytest.raises(
        ValueError,
        match="^table 8 does not exist: allowed are 1 to 7, beyond_alignment, beyond_compression and claims$"
    ):
        stages.plan_stages(profiles.TEST, [8])


def test_narrow_models_begin_from_the_aligned_ones_and_the_sizes_are_equal(store):
    plan = kinds.StagePlanner(profiles.TEST)
    every = {"layers": "all", "factor": 2}
    metrics = {
        method: store.metrics(plan.compressed(method, every, 0))
        for method in ("aligned", "narrow", "lowrank", "svd")
    }
    assert metrics["narrow"]["start"] == metrics["aligned"]["start"]
    assert metrics["narrow"]["perplexity"] != metrics["aligned"]["perplexity"]
    kept, rows = load_model(store.folder(plan.compressed("aligned", every, 0)) / "model"), load_file(
        store.folder(plan.corpus) / "rows.safetensors"
    )
    # what a narrow model begins from is what was measured: saved and loaded it is the same, up to sums in
    # another order
    again = perplexities(kept, rows, plan.precision, splits=("test",))
    assert all(
        again[domain]["test"] == pytest.approx(
            metrics["narrow"]["start"]["perplexity"][domain]["test"], rel=1e-5
        )
        for domain in again
    )
    sizes = {method: found["parameters"]["without_head"] for method, found in metrics.items()}
    assert sizes["narrow"] == sizes["aligned"] == sizes["svd"]
    assert abs(sizes["lowrank"] / sizes["svd"] - 1) < 0.01
    starts = {method: found["start"]["perplexity"]["web"]["test"] for method, found in metrics.items()}
    assert starts["aligned"] < starts["lowrank"] < starts["svd"] / 10


@pytest.mark.parametrize(("method", "start"), [("aligned", "aligned"), ("svd", "decompose")])
def test_the_profile_s_own_configuration_is_not_trained_twice(store, method, start):
    plan = kinds.StagePlanner(profiles.TEST)
    assert plan.compressed(method, {"layers": "odd", "factor": 2}, 0).steps == 0
    of = {
        item.kind: store.metrics(item)
        for item in plan.compressed(method, {"layers": "odd", "factor": 2}, 0).inputs
    }
    found = store.metrics(plan.compressed(method, {"layers": "odd", "factor": 2}, 0))
    assert found["start"]["perplexity"] == of[start]["perplexity"]
    assert {key: found[key] for key in of["heal"]} == of["heal"]
    assert found["parameters"] == of[start]["parameters"]


def test_another_configuration_than_the_profile_s_is_trained_for_itself():
    """Whether the embedding's factor differs too: with factor 4 the profile halves nothing of what
    beyond_compression halves."""
    plan = kinds.StagePlanner(profiles.load("test", ("compression.factor=4",)))
    for factor in (2, 4):
        assert not {
            item.kind for item in plan.compressed("aligned", {"layers": "odd", "factor": factor}, 0).inputs
        } & {"heal", "aligned"}
    share = kinds.StagePlanner(profiles.load("test", ("beyond.share=1.0",))).compressed(
        "svd", {"layers": "odd", "factor": 2}, 0
    )
    assert {item.kind for item in share.inputs} == {"corpus", "pretrained", "decompose", "pretrain"}
