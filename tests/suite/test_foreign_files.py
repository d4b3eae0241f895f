"""What other machines do to text: CRLF checkouts, byte order marks, semicolons, locales, a matplotlibrc."""

import os
import subprocess
import sys
from types import SimpleNamespace

import matplotlib
import pandas
import pytest
from conftest import ROOT, known_speed, tiny_gpt2

import kn
from kn.data import glue_submission
from kn.files import ASSETS
from kn.models import model_card
from kn.report import plots
from kn.suite import profiles, run
from kn.suite.store import Stage

ROWS = ("teacher", "student")


def git(*arguments, cwd=ROOT):
    done = subprocess.run(["git", *arguments], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs git's list of files")
def test_a_checkout_with_crlf_line_ends_has_the_same_bytes(tmp_path):
    """git's autocrlf would give scripts that do not start, and assets of other digests."""
    index = {"GIT_INDEX_FILE": str(tmp_path / "index")}
    done = subprocess.run(["git", "add", "-A"], cwd=ROOT, env={**os.environ, **index}, capture_output=True)
    assert done.returncode == 0, done.stderr
    git_dir = subprocess.run(
        ["git", "-c", "core.autocrlf=true", "checkout-index", "-a", f"--prefix={tmp_path}/clone/"],
        cwd=ROOT, env={**os.environ, **index}, capture_output=True,
    )
    assert git_dir.returncode == 0, git_dir.stderr
    names = [name for name in git("ls-files").splitlines() if (ROOT / name).exists()]
    assert len(names) > 300
    for name in names:
        content = (tmp_path / "clone" / name).read_bytes()
        assert content == (ROOT / name).read_bytes(), name
        assert b"\r\n" not in content or name.endswith(".safetensors"), name
    assert (tmp_path / "clone" / ASSETS.relative_to(ROOT) / "mini" / "SHA256SUMS").is_file()


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbfrow,seed,task,score\r\nteacher,0,cola,47.5\r\nstudent,1,rte,60\r\n",
        b"row;seed;task;score\r\nteacher;0;cola;47,5\r\nstudent;1;rte;60\r\n",
        b"\xef\xbb\xbfrow\tseed\ttask\tscore\r\nteacher\t0\tcola\t47,5\r\nstudent\t1\trte\t60\r\n",
        b'row,seed,task,score\nteacher,0,cola,"47,5"\nstudent,1,rte,60\n',
        b"\n\nrow, seed, task, score\n\nteacher, 0, cola, 47.5\n,,,\n  \nstudent, 1, rte, 60\n\n",
    ],
    ids=["mark", "semicolons", "tabs", "decimal comma", "blanks"],
)
def test_scores_saved_by_a_spreadsheet_are_read(tmp_path, content):
    path = tmp_path / "scores.csv"
    path.write_bytes(content)
    assert glue_submission.read_scores(path, ROWS) == {
        ("teacher", 0): {"cola": 47.5}, ("student", 1): {"rte": 60.0}
    }


def test_blank_lines_count_in_the_line_that_is_named(tmp_path):
    path = tmp_path / "scores.csv"
    path.write_bytes(b"row;seed;task;score\r\n\r\nteacher;0;cola;4x\r\n")
    with pytest.raises(ValueError, match="scores.csv, line 3: seed '0' and score '4x' must be numbers$"):
        glue_submission.read_scores(path, ROWS)
    path.write_bytes("row,seed,task,score\n".encode("utf-16"))
    with pytest.raises(ValueError, match=r"scores.csv cannot be read \(it is no CSV in UTF-8\)$"):
        glue_submission.read_scores(path, ROWS)


def test_a_readme_in_latin_1_is_left_alone(tmp_path):
    student = kn.compress(tiny_gpt2(), kn.KroneckerSpec())
    (tmp_path / "README.md").write_bytes("Modèle de Zoë\n".encode("latin-1"))
    student.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_bytes() == "Modèle de Zoë\n".encode("latin-1")
    (tmp_path / "README.md").unlink()
    student.save_pretrained(tmp_path)
    assert model_card.SIGNATURE in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_plots_start_from_matplotlib_s_defaults(tmp_path):
    frame = pandas.DataFrame(
        [{"row": "Perplexity", "column": name, "metric": "perplexity", "paper": 1.0 + i, "ours": 2.0 + i,
          "sd": 0.1} for i, name in enumerate("ab")])
    expected = plots.svg(plots.draw(plots.perplexities, frame), "table 4")
    (tmp_path / "matplotlibrc").write_text(
        "text.usetex: True\nsavefig.bbox: tight\nlines.linewidth: 9\naxes.titlesize: 30\nfigure.dpi: 300\n"
        "axes.prop_cycle: cycler('color', ['red'])\nfont.family: serif\nsavefig.facecolor: black\n",
        encoding="utf-8",
    )
    with matplotlib.rc_context(fname=tmp_path / "matplotlibrc"):
        assert matplotlib.rcParams["text.usetex"]
        assert plots.svg(plots.draw(plots.perplexities, frame), "table 4") == expected
        assert matplotlib.rcParams["text.usetex"]  # the user's own plots keep their settings


def test_a_locale_without_utf_8(tmp_path):
    """Help, a plan and errors in the C locale, where Python would write ASCII."""
    known_speed(tmp_path, profiles.TEST)
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONUTF8"}
    variables |= {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT),
                  "KN_HOME": str(tmp_path / "store")}
    for arguments, status, shown in (
        (["--help"], 0, "partition=\\u2026"),
        (["plan", "--profile", "test"], 0, f"of disk in {tmp_path}/store"),
        (["--profile", "test", "--set", "Zoë=1"], 2, "one line of printable text is needed"),
        (["compare", "Zoë", "x"], 2, "is not a report folder"),
    ):
        done = subprocess.run([sys.executable, "-m", "kn", *arguments], env=variables, cwd=tmp_path,
                              capture_output=True)
        said = (done.stdout + done.stderr).decode()
        assert done.returncode == status and shown in said and "Traceback" not in said, said


def test_no_file_of_ours_leaves_its_encoding_to_the_locale():
    """ruff's PLW1514 sees open(); here are the methods of paths that it cannot infer."""
    for path in (ROOT / "kn").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert ".read_text()" not in text and "text=True" not in text, path
        for line in text.splitlines():
            assert ".write_text(" not in line or "encoding" in line, (path, line)


def test_given_scores_replace_those_of_their_row_seed_and_task_alone(tmp_path, monkeypatch):
    """Scores of the GLUE server for one row leave the others' own ones in Table 6."""

    class Kept(SimpleNamespace):
        def record(self, stage):
            tasks = {"cola": {"headline": 1.0, "matthews": 1.0}, "rte": {"headline": 2.0}}
            metrics = {"tasks": tasks} if stage.kind == "score" else {"dev": {}}
            return {"stage": stage.kind, "fields": dict(stage.fields), "metrics": metrics}

    stages = [Stage("score", (("row", row), ("seed", 0)), "{}") for row in ROWS]
    stages += [Stage("finetune_glue", (("row", row), ("task", task), ("seed", 0)), "{}")
               for row in ROWS for task in ("cola", "rte")]
    (tmp_path / "scores.csv").write_text("row,seed,task,score\nstudent,0,rte,60\n", encoding="utf-8")

    def shown():
        return {(r["fields"]["row"], r["fields"]["task"]): r["metrics"]["test"]["headline"]
                for r in run.records(Kept(), stages) if r["stage"] == "finetune_glue"}

    monkeypatch.delenv("KN_GLUE_SCORES", raising=False)
    ours = {(row, task): value for row in ROWS for task, value in (("cola", 1.0), ("rte", 2.0))}
    assert shown() == ours
    monkeypatch.setenv("KN_GLUE_SCORES", str(tmp_path / "scores.csv"))
    assert shown() == ours | {("student", "rte"): 60.0}
