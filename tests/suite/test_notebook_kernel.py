"""The kernel of a run's notebooks: the running Python whatever is around, and what it says where it fails."""

import json
import re
import sys

import pytest
from test_damage import notebook

from kn.report import kernel, notebooks


@pytest.fixture
def one_notebook(tmp_path, monkeypatch):
    """A call that executes a notebook with one cell of this code into out/table3.ipynb; returns its error."""
    monkeypatch.setattr(notebooks, "SOURCE", tmp_path)
    (tmp_path / "out").mkdir()

    def call(code):
        notebook(tmp_path / "table3.ipynb", code)
        return notebooks.execute(tmp_path / "table3.ipynb", tmp_path / "out" / "table3.ipynb", {})

    return call


def test_a_failed_notebook_does_not_replace_the_earlier_one(one_notebook, tmp_path):
    out = tmp_path / "out"
    assert one_notebook("raise ValueError('first')") == "table3.ipynb: ValueError: first"
    assert "first" in (out / "table3.ipynb").read_text()  # none before: it is rendered as it failed
    assert one_notebook("print('good')") is None
    good = (out / "table3.ipynb").read_bytes()
    assert one_notebook("raise ValueError('second')") == "table3.ipynb: ValueError: second"
    assert (out / "table3.ipynb").read_bytes() == good
    page = (out / "table3-failed.html").read_text()
    assert "second" in page and not re.search(r"<script|<link|https?://|src=", page)  # self-contained
    assert sorted(path.name for path in out.iterdir()) == ["table3-failed.html", "table3.ipynb"]


def test_the_running_python_is_the_kernel(one_notebook, tmp_path, monkeypatch):
    """Not a kernelspec of another environment, nor settings, histories and folders that cannot be written."""
    foreign = tmp_path / "foreign" / "kernels" / "python3"
    foreign.mkdir(parents=True)
    spec = {"argv": ["/bin/false"], "display_name": "foreign", "language": "python"}
    (foreign / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "foreign"))
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR"):
        monkeypatch.setenv(name, "/proc/not-there")
    assert one_notebook(f"import sys\nassert sys.executable == {sys.executable!r}") is None


@pytest.mark.parametrize(("command", "said"), [
    ((sys.executable, "-m", "no_such_kernel"),
     f"its kernel ended with status 1: {sys.executable}: No module named no_such_kernel"),
    ((sys.executable, "-c", "raise SystemExit('no space')"), "its kernel ended with status 1: no space"),
    ((sys.executable, "-c", "import time; time.sleep(60)"),
     "its kernel did not answer within 2 s, run the same command again"),
], ids=["missing module", "its own error", "too slow"])
def test_a_kernel_that_cannot_start_says_why(one_notebook, tmp_path, monkeypatch, command, said):
    monkeypatch.setattr(kernel, "COMMAND", list(command))
    monkeypatch.setattr(kernel, "START_SECONDS", 2 if "sleep" in command[-1] else 60)
    assert one_notebook("pass") == f"table3.ipynb: {said}"
