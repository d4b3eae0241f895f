"""The midi profile on a small text that is carried as a file: models trained within the run, all the way to
the tables."""

import json
import os
import subprocess
import sys

import pandas
import pytest
from conftest import ROOT, known_speed

from kn.data import documentation
from kn.suite import pretrain_mini, profiles

CUT = [
    "model.vocabulary=600", "model.context=32", "model.width=16", "model.layers=2", "model.heads=2",
    "teacher.steps=4", "teacher.batch=4", "baseline.steps=3", "baseline.batch=4",
    "text.sample=0.5", "pretrain.max_steps=2", "ablation.max_steps=2", "finetune_lm.max_steps=2",
]


@pytest.fixture(scope="module")
def carried(tmp_path_factory):
    """A corpus of two small packages, written as `python -m kn export-corpus` does."""
    file = tmp_path_factory.mktemp("carried") / "corpus.json"
    documentation.write(
        documentation.build(
            {"web": ("joblib", "jinja2"), "wiki": ("mpmath",)}, {"web": (0.25, 0.25), "wiki": (0.25, 0.25)}
        ),
        file
    )
    return file


def start(home, carried, *more):
    options = [part for setting in (*CUT, f"text.file={carried}") for part in ("--set", setting)]
    variables = {
        **os.environ, "KN_HOME": str(home / "store"), "KN_REPORTS": str(home / "reports"),
        "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"
    }
    return subprocess.run(
        [sys.executable, "-m", "kn", "--profile", "midi", *options, *more], cwd=ROOT, env=variables,
        capture_output=True, text=True
    )


def test_midi_trains_its_models_and_fills_its_tables(tmp_path, carried):
    known_speed(tmp_path, profiles.load("midi", tuple(CUT)))
    result = start(tmp_path, carried, "--only", "3,4")
    assert result.returncode == 0, result.stdout[-1000:] + result.stderr[-3000:]
    tables = {
        n: pandas.read_csv(tmp_path / "reports" / "midi" / f"table{n}.csv", dtype=str, keep_default_na=False)
        for n in (3, 4)
    }
    assert all((table[table["paper"] != ""]["ours"] != "").all() for table in tables.values())
    (folder,) = [
        p
        for p in (tmp_path / "store" / "pretrained").iterdir()
        if p.name.startswith("baseline") and p.is_dir()
    ]
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["steps"] == 3 and metrics["shapes"]["embedding"] == "600x16"
    assert metrics["log"][-1]["valid_perplexity"] > 1
    assert json.loads((folder / "manifest.json").read_text())["settings"]["recipe"]["kd_weight"] == 0.5


def test_a_missing_corpus_file_is_named(tmp_path):
    result = start(tmp_path, tmp_path / "nothing.json", "--dry-run")
    assert result.returncode == 2
    assert "nothing.json is not there: make it with `python -m kn export-corpus" in result.stderr


def test_a_corpus_file_is_read_back_or_refused(tmp_path, carried):
    found = documentation.read(carried)
    assert set(found) == {"web", "wiki"} and found["web"].train
    assert all(isinstance(split, tuple) for split in (found["web"].train, found["wiki"].test))
    (tmp_path / "other.json").write_text('{"web": {"train": []}}')
    with pytest.raises(
        ValueError, match="other.json is no corpus file .*: make it again with `python -m kn export-corpus"
    ):
        documentation.read(tmp_path / "other.json")


def test_midi_has_the_size_it_says():
    assert pretrain_mini.count_parameters(
        pretrain_mini.random_gpt2(profiles.MIDI.model)
    )["total"] == 17_440_512
