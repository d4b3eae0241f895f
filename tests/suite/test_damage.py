"""Faults of what is stored and made, on purpose: turned bits, cut files, deleted stages, other versions,
stages and kernels that fail. Never a wrong table, one line that says what to do."""

import csv
import html
import json
import random
import shutil

import cheap
import nbformat
import pytest
from cheap import FILES, PLAN
from conftest import TIMED

from kn.report import formatting, notebooks, pages
from kn.suite import input_digests, launch, profiles, timing, training
from kn.suite import run as stages
from kn.suite.store import Store, StoreError

EVERY = (*FILES, "metrics.json", "manifest.json")
FLIPS = 6  # of each kind of file


@pytest.fixture
def copied(whole, tmp_path):
    """A copy of the undisturbed store, to be damaged."""
    shutil.copytree(whole[0], tmp_path / "store", copy_function=shutil.copy2)
    return tmp_path / "store"


def turn(path, draw):
    """Turn one bit."""
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def cut(path, draw):
    """Lose the end."""
    path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size)])


def lose(path, draw):
    """Lose all."""
    path.unlink()


def readers(item):
    """Stages that read this one's files, directly."""
    return [other for other in PLAN if item in other.inputs]


@pytest.mark.parametrize("harm", [turn, cut, lose])
@pytest.mark.parametrize("name", EVERY)
def test_a_damaged_file_never_reaches_a_table(whole, copied, name, harm):
    """A stage after the damaged one is missing, so that it must be read: it is made again first, and all
    numbers are those of the undisturbed run."""
    draw = random.Random(f"{name} {harm.__name__}")
    for _ in range(FLIPS if harm is turn else 2):
        item = draw.choice([item for item in PLAN if readers(item)])
        missing = draw.choice(readers(item))
        harm(copied / item.path / name, draw)
        shutil.rmtree(copied / missing.path)
        assert cheap.wrong(cheap.tables(copied), whole[1]) == []
        before = cheap.finished(copied)
        ran = cheap.run(copied)
        assert set(ran) in ({item.path, missing.path}, {missing.path})
        assert before.keys() | set(ran) == {i.path for i in PLAN}
        # a bit of its blanks says nothing
        assert item.path in ran or (name == "manifest.json" and harm is turn)
        assert {
            path: at for path, at in before.items() if path not in ran
        }.items() <= cheap.finished(copied).items()
        assert cheap.tables(copied) == whole[1]


@pytest.mark.parametrize("harm", [turn, cut])
def test_a_damaged_number_is_not_shown(whole, copied, harm):
    """metrics.json and the manifest are what tables read: each of forty single faults is seen at once."""
    draw = random.Random(0)
    for _ in range(20):
        for name in ("metrics.json", "manifest.json"):
            item = draw.choice(PLAN)
            path, content = copied / item.path / name, (copied / item.path / name).read_bytes()
            harm(path, draw)
            store = Store(copied)
            assert store.has(item) is False or store.record(item) == Store(whole[0]).record(item)
            assert cheap.wrong(cheap.tables(copied), whole[1]) == []
            path.write_bytes(content)


def test_an_input_that_changes_while_a_run_goes_on(copied):
    """Between the look at the store and the work: the stage refuses it in one line, the next run makes it
    again."""
    item = next(item for item in PLAN if item.kind == "finetune_lm")
    shutil.rmtree(copied / item.path)
    turn(copied / item.inputs[0].path / "rows.safetensors", random.Random(0))
    with pytest.raises(StoreError) as error:
        Store(copied).make(item, cheap.cheap)
    assert str(error.value) == (
        f"{item.path} needs {item.inputs[0].path}: rows.safetensors has another content than the manifest "
        "says; run ./run_all.sh to make it again"
    )
    assert set(cheap.run(copied)) == {item.path, item.inputs[0].path}


def test_a_deleted_stage_is_made_again_and_nothing_else(whole, copied):
    for item in (item for item in PLAN if readers(item)):
        shutil.rmtree(copied / item.path)
        before = cheap.finished(copied)
        assert cheap.wrong(cheap.tables(copied), whole[1]) == []
        assert cheap.run(copied) == [item.path] and before.items() <= cheap.finished(copied).items()
        assert cheap.tables(copied) == whole[1]


def test_a_stage_deleted_while_a_run_goes_on(whole, copied):
    item = next(item for item in PLAN if item.kind == "pretrain")
    shutil.rmtree(copied / item.path)
    need = item.inputs[0]

    def work(stage, folder, store):
        shutil.rmtree(store.folder(need))
        return {"value": (store.folder(need) / "rows.safetensors").stat().st_size}

    with pytest.raises(launch.StageFailed) as error:
        cheap.run(copied, plan=[item], pretrain=work)
    assert "FileNotFoundError: " in str(error.value) and "free some space" not in str(error.value)
    assert "\n" not in str(error.value)
    assert set(cheap.run(copied)) == {item.path, need.path} and cheap.tables(copied) == whole[1]


# ---------------------------------------------------------------- other files than results


@pytest.mark.parametrize(
    "content",
    [
        "", "{", "[]", '{"seconds": 1}', json.dumps(TIMED)[:-60],
        json.dumps({**TIMED, "tokenized": float("nan")}), json.dumps({**TIMED, "flops": None}), "[" * 100_000
    ]
)
def test_a_damaged_timing_is_measured_again(tmp_path, content, monkeypatch):
    """A run that was killed while it wrote it must not stop every later one."""
    store, request = Store(tmp_path).open(), timing.timing_request(profiles.TEST, "fp32")
    file = timing.timing_file(request, store)
    file.write_text(content)
    done = type("Done", (), {"returncode": 0, "stdout": json.dumps(TIMED), "stderr": ""})
    monkeypatch.setattr(timing.subprocess, "run", lambda *_, **__: done)
    assert timing.measured_timing(profiles.TEST, "fp32", store) == TIMED == timing.load_timing(file)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "3", '{"notebooks": 3}', '{"notebooks": {"table4": 7}}', "[" * 100_000]
)
def test_a_damaged_run_json_means_that_notebooks_are_run_again(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    assert "table4" not in notebooks.finished(
        tmp_path / "run.json"
    ) or notebooks.finished(tmp_path / "run.json") == {"table4": "7"}
    assert notebooks.finished(tmp_path / "nothing.json") == {}


def checkpoint(folder, step):
    """A sealed checkpoint of two files."""
    made = folder / f"checkpoint-{step}"
    made.mkdir(parents=True)
    (made / "model.safetensors").write_bytes(bytes(range(256)))
    (made / "trainer_state.json").write_text(json.dumps({"step": step}))
    training.write_checkpoint_manifest(made, 10.0 * step)
    return made


@pytest.mark.parametrize("harm", [turn, cut, lose])
@pytest.mark.parametrize("name", ["model.safetensors", "trainer_state.json", training.MANIFEST])
def test_a_damaged_checkpoint_is_not_gone_on_from(tmp_path, name, harm):
    """The one before it is, or the beginning."""
    draw = random.Random(0)
    for number in range(5):
        folder = tmp_path / str(number)
        before, last = checkpoint(folder, 500), checkpoint(folder, 1000)
        assert training.latest_checkpoint(folder) == last and training.checkpoint_seconds(last) == 10_000
        harm(last / name, draw)
        assert training.latest_checkpoint(folder) == before and not last.exists()
        harm(before / "model.safetensors", draw)
        assert training.latest_checkpoint(folder) is None


# ---------------------------------------------------------------- stages and numbers that fail


class Odd(Exception):
    """An error of two arguments, as libraries raise: it cannot be read back in another process."""

    def __init__(self, first, second):
        super().__init__(f"{first} and\n{second}")


RAISED = {
    "ValueError: broken on purpose": ValueError("broken on purpose"),
    "RuntimeError: Odd: one and": Odd("one", "two"),
    "KeyError: 'name'": KeyError("name"),
    "AssertionError (finished": AssertionError(),
    "OSError: first line (finished": OSError("first line\nsecond line"),
    "FileNotFoundError: [Errno 2] No such file or directory: 'corpus.json'": FileNotFoundError(
        2, "No such file or directory", "corpus.json"
    ),
}


@pytest.mark.parametrize("message", RAISED)
@pytest.mark.parametrize("kind", ["decompose", "finetune_glue"])
def test_a_stage_that_raises(whole, tmp_path, message, kind):
    """Named with its cause in one line; what does not need it goes on; the next run makes the rest."""

    def broken(*_):
        raise RAISED[message]

    with pytest.raises(launch.StageFailed) as error:
        cheap.run(tmp_path, **{kind: broken})
    assert message in str(error.value) and "\n" not in str(error.value)
    assert str(error.value).endswith("(finished work is kept: run again to go on)")
    assert f"first {kind}/" in str(error.value)
    done, failed = cheap.finished(tmp_path), {item.path for item in PLAN if item.kind == kind}

    def needs(item):
        return item.path in failed or any(needs(need) for need in item.inputs)

    assert set(done) == {item.path for item in PLAN if not needs(item)}
    assert cheap.wrong(cheap.tables(tmp_path), whole[1]) == []
    cheap.run(tmp_path)
    assert done.items() <= cheap.finished(tmp_path).items() and cheap.tables(tmp_path) == whole[1]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_metrics_that_are_not_finite_are_no_result(whole, tmp_path, value):
    with pytest.raises(
        launch.StageFailed,
        match="ValueError: a metric is not a finite number .Out of range float values are not JSON compliant"
    ):
        cheap.run(tmp_path, finetune_lm=lambda *_: {"perplexity": {"wiki": {"test": value}}})
    found = cheap.tables(tmp_path)
    assert found[4, "Perplexity", "KnGPT2", "test perplexity"] == "" and cheap.wrong(found, whole[1]) == []


# ---------------------------------------------------------------- other versions


def test_another_version_of_a_documentation_package_is_another_key(monkeypatch):
    """Its documentation is the corpus: nothing made from one version is ever taken for the other's."""
    real = input_digests.version
    monkeypatch.setattr(input_digests, "version", lambda name: "0.0.1" if name == "mpmath" else real(name))
    input_digests.package_versions.cache_clear()
    other, _ = stages.plan_stages(profiles.TEST, tables=cheap.TABLES, tasks=("cola", "mnli"))
    input_digests.package_versions.cache_clear()
    assert {item.path for item in other} & {item.path for item in PLAN} == {
        item.path for item in PLAN if item.kind == "shapes"
    }


@pytest.mark.parametrize("package", ["torch", "transformers"])
def test_two_versions_of_a_library_in_one_table_are_said(copied, package):
    """Their results share a key, so the pages and the command's last lines warn."""
    records = stages.records(Store(copied), [item for item in PLAN if item.kind == "finetune_lm"])
    assert not [line for line in formatting.cautions(records, "test") if "stages were made with" in line]
    records[0]["provenance"]["packages"] = {**records[0]["provenance"]["packages"], package: "9.9.9"}
    (line,) = [line for line in formatting.cautions(records, "test") if "stages were made with" in line]
    assert line.startswith(f"stages were made with {package} ")
    assert " and 9.9.9: numbers of one table may differ for that alone" in line
    assert "make all with one, in a store of its own (KN_HOME=…)" in line
    assert line in html.unescape(pages.records_page(records, "test"))


# ---------------------------------------------------------------- notebooks


def notebook(path, code):
    """A notebook with the usual parameters and one cell of code."""
    first = nbformat.v4.new_code_cell(
        'profile = "mini"\nseeds = 1\nonly = None', metadata={"tags": ["parameters"]}
    )
    made = nbformat.v4.new_notebook(
        cells=[first, nbformat.v4.new_code_cell("print('begun')"), nbformat.v4.new_code_cell(code)]
    )
    made.metadata["kernelspec"] = {"name": "python3", "language": "python", "display_name": "Python 3"}
    nbformat.write(made, path)


def test_a_kernel_that_dies_and_a_cell_that_raises(whole, tmp_path, monkeypatch, capsys):
    """Both are rendered, the notebook after them is run, the index and run.json are written, the exit status
    is 1; then what failed or was damaged is made again."""
    for name, code in {
        "table3": "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
        "table4": "raise ValueError('<script>alert(1)</script>')", "table5": "print('reached')"
    }.items():
        notebook(tmp_path / f"{name}.ipynb", code)
    monkeypatch.setattr(notebooks, "SOURCE", tmp_path)
    monkeypatch.setenv("KN_REPORTS", str(tmp_path / "reports"))
    folder, store = tmp_path / "reports" / "test", Store(whole[0])
    assert notebooks.NotebookRunner("test", [3, 4, 5], 1, store).finish(PLAN) == 1
    said = capsys.readouterr()
    errors = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in said.err and len(errors) == 2
    assert errors[0] == (
        "error: table3.ipynb: its kernel was ended by signal 9, from outside or for want of memory: run the "
        "same command again, with --jobs 1 if it was memory"
    )
    assert errors[1] == "error: table4.ipynb: ValueError: <script>alert(1)</script>"
    assert "notebook table3: FAILED" in said.out and "notebook table5: done" in said.out
    assert f"report: {folder / 'index.html'}" in said.out
    assert "begun" in (folder / "table3-failed.html").read_text()
    assert "<script>alert(1)" not in (folder / "table4-failed.html").read_text()
    assert list(json.loads((folder / "run.json").read_text())["notebooks"]) == ["table5"]
    assert not list(folder.glob("*.part*"))
    assert "not run" in (folder / "index.html").read_text()
    assert list(csv.DictReader((folder / "table4.csv").read_text().splitlines()))[0]["ours"]
    for name in ("table3", "table4"):
        notebook(tmp_path / f"{name}.ipynb", "print('mended')")
    turn(folder / "table5.ipynb", random.Random(0))
    before = {
        name: (folder / name).read_bytes()
        for name in ("table4.csv", "table4.html", "claims.csv", "trends.csv")
    }
    for name in before:
        turn(folder / name, random.Random(0))
    assert notebooks.NotebookRunner("test", [3, 4, 5], 1, store).finish(PLAN) == 0
    said = capsys.readouterr()
    assert said.err == "" and "unchanged" not in said.out and not list(folder.glob("*-failed.html"))
    assert "reached" in (folder / "table5.ipynb").read_text()
    assert {name: (folder / name).read_bytes() for name in before} == before
