"""Words that others wrote are never trusted.

What is read back into a page is shown as the text it is; settings, names and folders cannot lead elsewhere.
"""

import html
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import cheap
import pandas
import pytest
from cheap import PLAN
from conftest import ROOT, TIMED

from kn import __main__ as command
from kn import report
from kn.report import notebooks
from kn.suite import launch, timing
from kn.suite import run as stages
from kn.suite.store import Stage, Store, StoreError

SCRIPT = """<script>alert("1")</script><img src=x onerror='alert(1)'>"""
FORMULA = '=HYPERLINK("http://example.invalid";"click")'
MARKUP = re.compile(r"<script|<img")


def harmless(text, word):
    """The word is not markup there; it may stand as text."""
    assert word not in text and not MARKUP.search(text)


# ---------------------------------------------------------------- what is read back into pages


@pytest.fixture(scope="module")
def written(whole, tmp_path_factory):
    """The report of a whole run, as a profile of another name, for the page over all profiles."""
    folder = tmp_path_factory.mktemp("reports") / "mini"
    store = Store(whole[0])
    report.write_ledger(stages.records(store, PLAN), {}, "mini", folder)
    (folder / "run.json").write_text(json.dumps({"seeds": 1, "environment": {"device": "a processor"}}))
    return folder


@pytest.fixture
def reports(written, tmp_path):
    """A copy of it."""
    (tmp_path / "mini").mkdir()
    for path in written.iterdir():
        (tmp_path / "mini" / path.name).write_bytes(path.read_bytes())
    return tmp_path


@pytest.mark.parametrize("word", [SCRIPT, FORMULA])
@pytest.mark.parametrize("column",
                         ["id", "group", "claim", "quote", "paper", "ours", "unit", "note", "section"])
def test_every_cell_of_claims_csv_is_shown_as_text(reports, column, word):
    path = reports / "mini" / "claims.csv"
    frame = pandas.read_csv(path, dtype=str, keep_default_na=False)
    frame.loc[1, column] = word
    frame.to_csv(path, index=False)
    text = report.write_front(reports).read_text(encoding="utf-8")
    assert word == FORMULA or harmless(text, word) is None
    if column in ("id", "group", "ours"):
        # shown, so this test looks at the right place
        assert word in html.unescape(text) or word.replace("-", " ") in html.unescape(text)


RUNS = [
    {"seeds": SCRIPT, "environment": {"device": SCRIPT}},
    {"seeds": 1, "environment": {"device": SCRIPT}},
    {"seeds": [SCRIPT]},
    {"environment": SCRIPT, "seeds": 3},
    [SCRIPT],
    SCRIPT,
    {"seeds": 1e400},
]


@pytest.mark.parametrize("content", RUNS)
def test_run_json_is_shown_as_text(reports, content):
    (reports / "mini" / "run.json").write_text(json.dumps(content))
    harmless(report.write_front(reports).read_text(encoding="utf-8"), SCRIPT)


DAMAGE = [
    lambda c: c[: len(c) // 2],
    lambda c: b"",
    lambda c: b"\xff\xfe" + c,
    lambda c: b"id\n1\n",
    lambda c: c.replace(b",", b"\t"),
    lambda c: c.replace(b"\n", b',"\n', 1),
    lambda c: b"\0" * 500,
    lambda c: c.replace(b"low", b"high", 1),
]


@pytest.mark.parametrize("number", range(len(DAMAGE)))
def test_a_damaged_claims_csv_is_left_out_or_read(reports, number, capsys):
    """The page over all profiles must not stop the run of another profile."""
    path = reports / "mini" / "claims.csv"
    path.write_bytes(DAMAGE[number](path.read_bytes()))
    assert report.write_front(reports).read_text(encoding="utf-8").endswith("</html>\n")
    said = capsys.readouterr().out
    assert not said or (said.startswith(f"note: {path} cannot be read (")
                        and said.endswith("left out of the page over all profiles: run its profile again\n")
                        and said.count("\n") == 1)


@pytest.mark.parametrize("column",
                         ["group", "case", "variant", "dtype", "device", "threads", "torch", "unit"])
def test_a_benchmark_is_shown_as_text(tmp_path, monkeypatch, column):
    from kn.report import pages, plots

    frame = pandas.read_csv(ROOT / "benchmarks" / "speed-cpu.csv").astype({column: object})
    figure = plots.draw(plots.speed, frame)
    frame[column] = SCRIPT
    source = '{% import "macros.html" as macros %}{% include "benchmark.html" %}'
    template = pages.ENVIRONMENT.from_string(source)
    text = template.render(benchmark=pages.benchmark_view(frame, figure))
    assert column == "unit" or SCRIPT in html.unescape(text)
    harmless(text, SCRIPT)


@pytest.mark.parametrize("word", [SCRIPT, FORMULA])
def test_words_in_records_are_text_in_pages_and_csv(whole, tmp_path, word):
    """A machine's name, a version, a setting, a path may be anything; a CSV's formula stays text."""
    records = stages.records(Store(whole[0]),
                             [item for item in PLAN
                              if item.kind in ("shapes", "pretrained", "pretrain", "decompose", "corpus")])
    for record in records:
        record["provenance"] = {**record["provenance"], "device": word, "commit": word, "system": word,
                                "packages": {"torch": word}}
        record["settings"], record["inputs"] = {word: word}, [word]
        record["metrics"] = {**record["metrics"], "hardware": word, "hyper": {"optimizer": word},
                             "log": [{word: word}]}
    report.write_table(3, records, word, tmp_path)
    report.write_table(2, records, word, tmp_path)
    from kn.report import pages

    (tmp_path / "records.html").write_text(pages.records_page(records, word))
    made = {"seeds": word, "overrides": [word], "tables": [word], "corpus": word}
    (tmp_path / "how.html").write_text(pages.how_page(records, word, made))
    for page in tmp_path.glob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert word in html.unescape(text) and (word == FORMULA or harmless(text, word) is None), page
    assert word in set(pandas.read_csv(tmp_path / "table3.csv")["ours"])


# ---------------------------------------------------------------- settings, names, folders


@pytest.fixture
def quiet(tmp_path, monkeypatch):
    """The command line without its hours: main(arguments) plans and stops where the work would begin."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KN_HOME", str(tmp_path / "store"))
    monkeypatch.setenv("KN_REPORTS", str(tmp_path / "reports"))
    monkeypatch.setenv("KN_SET", "")
    monkeypatch.setattr(timing, "measured_timing", lambda *_: TIMED)
    monkeypatch.setattr(launch, "run", lambda *_, **__: [])
    runner = SimpleNamespace(update=None, finish=lambda *_: 0)  # executes no notebook
    monkeypatch.setattr("kn.report.notebooks.NotebookRunner", lambda *_: runner)
    return command.main


def said(capsys):
    lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("text.file=../../etc/passwd", "is not there: make it with `python -m kn export-corpus"),
        ("text.file=/etc", "is not there"),
        ("text.web=../../evil", "package '../../evil' is not installed"),
        ("text.web=os.path", "package 'os.path' is not installed"),
        (f"text.web={SCRIPT}", "is not installed"),
        (f"readings.direction={SCRIPT}", "allowed are student_teacher, teacher_student"),
        ("pretrain.batch_size=__import__('os').system('touch ran')", "input should be a valid integer"),
        ("pretrain.alphas=__import__('os'),1,1,1", "input should be a valid number"),
        ("model.activation=os.system", "allowed are gelu_pytorch_tanh"),
        ("pretrain.optimizer=evil.Optimizer", "allowed are adamw_torch_fused"),
        ("__class__=x", "is unknown"),
        ("text.__init__=x", "is unknown"),
        ("text.web=joblib\npretrain.batch_size=64", "one line of printable text is needed"),
        ("seeds=<script>", "is unknown"),
        ("checks=evil", "allowed are random"),
        ("beyond.tasks=../evil", "allowed: cola"),
    ],
)
def test_settings_run_no_code_and_stay_in_their_folder(quiet, capsys, tmp_path, item, message):
    assert quiet(["--profile", "test", "--set", item]) == 2 and message in said(capsys)
    assert not (tmp_path / "ran").exists() and not (tmp_path / "reports").exists()


@pytest.mark.parametrize("name", ["../mini", "/etc/passwd", SCRIPT, "", "mini/../mini", "test\0", "TEST"])
def test_names_of_profiles(quiet, capsys, name):
    assert quiet(["--profile", name]) == 2
    assert said(capsys) == f"error: profile {name!r} is unknown: allowed are mini, midi, paper, test"
    with pytest.raises(ValueError, match="is unknown: allowed are mini, midi, paper, test"):
        stages.make_records(name)


@pytest.mark.parametrize("value", [SCRIPT, "1", 0, -1, 1.0, True, None, 10**6])
def test_parameters_of_a_notebook(quiet, value):
    with pytest.raises(ValueError, match="^seeds is .*: an integer from 1 to 999 is needed$"):
        stages.make_records("test", tables=[1], seeds=value)


@pytest.mark.parametrize("only", [["../evil"], SCRIPT, [SCRIPT], [7], ["cola", "evil"]])
def test_tasks_of_a_notebook(quiet, only):
    with pytest.raises(ValueError, match="^task .* is unknown: allowed are cola, rte"):
        stages.make_records("test", tables=[5], only=only)


def test_a_parameter_that_a_notebook_does_not_have(tmp_path):
    """papermill would put it in as code; it is refused before."""
    found = notebooks.execute(ROOT / "notebooks" / "table1.ipynb", tmp_path / "table1.ipynb",
                              {"profile": "test", SCRIPT: 1})
    said = f"table1.ipynb has no parameter {SCRIPT!r} in its cell tagged parameters: "
    said += "found profile, seeds, only"
    assert found == said and not list(tmp_path.iterdir())


@pytest.mark.parametrize("home", ["a\nb", "a\0b", "\x1b[31m"])
def test_odd_names_of_stores(home):
    with pytest.raises(StoreError,
                       match=r"^the store .* cannot be a folder's name: "
                             "choose another folder with KN_HOME=…$"):
        Store(home)


@pytest.mark.parametrize("variable", ["KN_HOME", "KN_REPORTS"])
@pytest.mark.parametrize("value", ["/proc/nothing", "/dev/null/x", "x" * 300, "/dev/null"])
def test_folders_that_cannot_be(quiet, capsys, monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    assert quiet(["--profile", "test", "--only", "1"]) == 2
    line = said(capsys)
    assert "KN_HOME" in line and ("cannot be written" in line or "could not be written" in line)


def test_relative_folders_are_the_same_in_a_notebook(tmp_path, monkeypatch):
    """A notebook runs in another folder: what is named from here must be named from there."""
    monkeypatch.chdir(tmp_path)
    for name in ("KN_HOME", "KN_REPORTS", "KN_MIRROR"):
        monkeypatch.setenv(name, f"here/{name}")
    assert command.main(["--profile", "huge"]) == 2
    for name in ("KN_HOME", "KN_REPORTS", "KN_MIRROR"):
        assert os.environ[name] == str(tmp_path / "here" / name)
    found = [command.setting(item) for item in ("text.file = corpus.json", "text.limit=3", "text.file=")]
    assert found == [f"text.file={tmp_path}/corpus.json", "text.limit=3", "text.file="]


@pytest.mark.parametrize(("kind", "value"),
                         [("../evil", "x"), ("demo", "../../evil"), ("demo", "/etc"), ("demo", "a\nb"),
                          ("demo", ".hidden"), ("demo", "x" * 300), ("", "x"), ("a/b", "x")])
def test_a_stage_cannot_leave_the_store(tmp_path, kind, value):
    item = Stage(kind, (("name", value),), "{}")
    for call in (lambda: item.path, lambda: Store(tmp_path / "store").make(item, cheap.cheap)):
        with pytest.raises(ValueError,
                           match="has no name for a folder: "
                                 "letters, digits and punctuation other than / wanted$"):
            call()
    assert not list(tmp_path.rglob("*evil*"))


def test_a_package_name_with_dots_imports_nothing(tmp_path):
    """find_spec of a dotted name would import what stands before the dot, from the current folder."""
    (tmp_path / "evil.py").write_text("open('ran', 'w')\n")
    arguments = ["-m", "kn", "export-corpus", "out.json", "--profile", "test", "--set", "text.web=evil.inner"]
    made = subprocess.run([sys.executable, *arguments], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert made.returncode == 2 and not (tmp_path / "ran").exists()
    said = "error: package 'evil.inner' is not installed, mini's corpus is made of its documentation: "
    assert made.stderr.splitlines() == [f"{said}run ./run_all.sh to set up the pins"]
