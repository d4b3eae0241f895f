"""The real plan, runner and store, with work that takes milliseconds: for faults that must be met hundreds of
times.

Each stage's numbers follow from every byte it reads, as a training's do: a changed byte that is used is a
changed number.
"""

import csv
import hashlib
import io
import json
import time
from types import SimpleNamespace

import numpy
from safetensors.numpy import save_file

from kn import report
from kn.suite import executors, launch, profiles
from kn.suite import run as stages
from kn.suite.store import Store
from kn.suite.work import WORK

TABLES = (3, 4, 5, 6, 7)  # all that are measured
PLAN, WANTED = stages.plan_stages(profiles.TEST, tables=TABLES, tasks=("cola", "mnli"))
FILES = (
    "rows.safetensors", "web_train.json", "tokenizer/tokenizer.json", "model/model.safetensors",
    "submission/CoLA.tsv", "scores.csv", "log.jsonl"
)


class Here:
    """An executor that does the work in this process, one stage after another."""

    slots = 1

    def __init__(self, home):
        self.home = str(home)

    def submit(self, items):
        """{handle: stage}; the work is done when it is waited for."""
        return {item.path: item for item in items}

    def wait(self, running):
        """(stage, whether it ran or its error)."""
        _, item = running.popitem()
        try:
            return [(item, executors.run_stage(item.to_json(), self.home))]
        except Exception as error:
            return [(item, error)]

    def close(self):
        """Nothing is held."""


def cheap(stage, folder, store, pause=0.0):
    """A few kB of every kind of file, and the metrics of any table, drawn from what the stage has read."""
    seen = hashlib.sha256(stage.hash.encode())
    for need in stage.inputs:
        for path in sorted(
            p for p in store.folder(need).rglob("*") if p.is_file() and p.name != "manifest.json"
        ):
            seen.update(path.read_bytes())
    draw = numpy.random.default_rng(list(seen.digest()))
    (store.scratch(stage) / "begun").write_text("x")
    for name in FILES:
        (folder / name).parent.mkdir(exist_ok=True)
        if name.endswith(".safetensors"):
            save_file({"weight": draw.random((64, 16), dtype=numpy.float32)}, folder / name)
        else:
            (folder / name).write_text(json.dumps(draw.random(40).tolist()))
        time.sleep(pause)
    value = float(draw.uniform(20, 60))
    score = {"headline": value, "f1": value, "matthews": value}
    found = {
        "perplexity": {domain: {"valid": value, "test": value + 1} for domain in ("wiki", "web")},
        "word_perplexity": {"test": value + 2}, "parameters": {"total": 10, "without_head": 9},
        "bytes": 40, "hours": 0.5, "data_bytes": 1000, "steps": 2, "tokens": 512, "dev": score,
        "tasks": {"cola": score, "mnli": score}, "fingerprint": "f", "hyper": {"batch_size": 4},
    }
    with (store.home / "calls").open("a") as calls:
        calls.write(f"{stage.path}\n")
    return found


def slow(stage, folder, store):
    """With pauses, so that a kill falls inside."""
    return cheap(stage, folder, store, pause=0.0005)


def run(home, plan=PLAN, work=cheap, executor=None, **other):
    """launch.run in this process; `other` {kind: work} replaces that of single kinds."""
    before, collector, release = dict(WORK), executors.gc, executors.release
    WORK.update({kind: work for kind in before} | other)
    # garbage collection would take four times as long as all the rest
    executors.gc, executors.release = SimpleNamespace(get_freeze_count=lambda: 1), lambda: None
    try:
        return launch.run(plan, Store(home).open(), stream=io.StringIO(), executor=executor or Here(home))
    finally:
        WORK.update(before)
        executors.gc, executors.release = collector, release


def calls(home):
    """Paths of the stages whose work was done to its end, in order."""
    path = home / "calls"
    return path.read_text().splitlines() if path.exists() else []


def finished(home):
    """Finished stages: path → when its manifest was written."""
    return {
        item.path: (home / item.path / "manifest.json").stat().st_mtime_ns
        for item in PLAN
        if Store(home).has(item)
    }


def tables(home):
    """{(table, row, column, metric): our value as the CSV has it, "" where it was not run}, of what the store
    has now."""
    store, found = Store(home), {}
    records = stages.records(store, [item for item in WANTED if store.has(item)])
    for number in TABLES:
        lines = csv.DictReader(report.table(number, records, "test").to_csv(index=False).splitlines())
        found |= {
            (number, line["row"], line["column"], line["metric"]): value(line["ours"]) for line in lines
        }
    return found


def value(text):
    """A cell of a CSV as a number where it is one: 2 is 2.0."""
    try:
        return float(text)
    except ValueError:
        return text


def wrong(found, expected):
    """Cells that hold another number than in an undisturbed run; none at all is right. The mean over the
    informative tasks depends on what is known of them, so it is left out."""
    return [
        (cell, value)
        for cell, value in found.items()
        if value not in ("", expected.get(cell)) and cell[2] != "Average (informative)"
    ]


def undisturbed(home):
    """A run that nobody disturbed: its store, and the tables made of it."""
    assert len(run(home)) == len(PLAN) == len(calls(home))
    found = tables(home)
    assert sum(value != "" for value in found.values()) > 100
    return home, found
