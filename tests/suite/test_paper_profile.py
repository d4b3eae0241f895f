"""The paper profile from a rehearsal mirror of real data: its stages, cut to a few steps; models with random
weights.

The models here are tiny, for time; `tests/rehearsal.py` without --tiny makes them at full size.
"""

import json
import os
import subprocess
import sys
import zipfile

import pandas
import pytest
from conftest import ROOT, known_speed

from kn.data import glue_submission
from kn.suite import profiles

CUT = [
    "text.sample=0.3", "text.web_shares=0.2,0.2", "text.limit=4", "glue.limit=40", "pretrain.max_steps=2",
    "ablation.max_steps=2",
    "finetune_lm.max_steps=2", "finetune_lm.batch_size=2", "hardware.micro_batch=1",
    "finetune_glue.max_steps=2", "finetune_glue.batch_size=4",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory, rehearsal_mirror):
    """Tables 4 and 6: every kind of stage but the ablation's arms."""
    home = tmp_path_factory.mktemp("paper")
    known_speed(home, profiles.load("paper", tuple(CUT)))
    variables = {
        **os.environ, "KN_MIRROR": str(rehearsal_mirror), "KN_HOME": str(home / "store"),
        "KN_REPORTS": str(home / "reports"), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"
    }
    start(home, variables, "4,6")
    return home, variables


def start(home, variables, tables, *more):
    """./run_all.sh --profile paper, cut short."""
    options = [part for setting in CUT for part in ("--set", setting)]
    result = subprocess.run(
        [sys.executable, "-m", "kn", "--profile", "paper", "--only", tables, *options, *more], cwd=ROOT,
        env=variables, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-1000:] + result.stderr[-3000:]
    return {
        int(n): pandas.read_csv(
            home / "reports" / "paper" / f"table{n}.csv", dtype=str, keep_default_na=False
        )
        for n in tables.split(",")
    }


def test_tables_are_made_from_the_real_formats(run):
    home, _ = run
    tables = {
        n: pandas.read_csv(home / "reports" / "paper" / f"table{n}.csv", dtype=str, keep_default_na=False)
        for n in (4, 6)
    }
    printed = tables[4][tables[4]["paper"] != ""]
    assert len(printed) == 3 and (printed["ours"] != "").all()
    test = tables[6][(tables[6]["column"] == "CoLA") & (tables[6]["row"] == "KnGPT2 + ILKD")].iloc[0]
    assert test["verdict"] == "server only" and test["ours"] == ""


def test_a_rehearsal_is_not_taken_for_a_result(run):
    folder = run[0] / "reports" / "paper"
    for name in ("index.html", "table4.html", "table6.html"):
        assert "a rehearsal: models with random weights" in (folder / name).read_text(), name


def test_predictions_are_there_for_the_server(run):
    folders = [
        p
        for p in (run[0] / "store" / "finetune_glue").iterdir()
        if p.name.startswith("student_ilkd-cola-0-") and p.is_dir()
    ]
    lines = (folders[0] / "submission" / "CoLA.tsv").read_text().splitlines()
    assert lines[0] == "index\tprediction" and len(lines) == 41


def test_a_zip_is_there_for_the_server(run):
    (folder,) = [
        p
        for p in (run[0] / "store" / "score").iterdir()
        if p.name.startswith("student_ilkd-0-") and p.is_dir()
    ]
    with zipfile.ZipFile(folder / "submission" / "submission.zip") as archive:
        assert sorted(archive.namelist()) == sorted(glue_submission.SUBMISSION)
        assert archive.read("AX.tsv").decode().count("\n") == 1105
        assert archive.read("CoLA.tsv").decode().count("\n") == 41
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics == {"tasks": {}, "filled_with_a_constant": ["STS-B.tsv", "WNLI.tsv", "AX.tsv"]}


def test_provenance_says_what_was_read_and_overridden(run):
    teacher = next(
        p for p in (run[0] / "store" / "pretrained").iterdir() if p.name.startswith("teacher") and p.is_dir()
    )
    metrics = json.loads((teacher / "metrics.json").read_text())
    assert metrics["commit"] == "rehearsal: not the hub's" and metrics["weights"] == "random"
    assert json.loads((run[0] / "reports" / "paper" / "run.json").read_text())["overrides"] == CUT


def test_scores_of_the_server_fill_table_6(run):
    home, variables = run
    scores = home / "scores.csv"
    scores.write_text("row,seed,task,score\nstudent_ilkd,0,cola,40.8\n")
    table = start(home, variables, "6", "--glue-scores", str(scores))[6]
    line = table[(table["column"] == "CoLA") & (table["row"] == "KnGPT2 + ILKD")].iloc[0]
    assert (line["paper"], line["ours"], line["delta"], line["verdict"]) == (
        "41.8", "40.8", "-1.0", "recorded"
    )
    assert set(
        table[(table["column"] == "RTE") & (table["metric"] == "accuracy")]["verdict"]
    ) == {"server only"}
