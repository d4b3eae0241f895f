"""Scripts that call the suite: without a `__main__` guard, on stdin; and kn outside a checkout."""

import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

CODE = """
print("began", flush=True)
from kn.suite import make_records
print(len(make_records("test", tables=[1])), "record")
"""


def called(arguments, cwd, root=ROOT, **more):
    variables = {name: value for name, value in os.environ.items() if not name.startswith("KN_")}
    variables |= {"PYTHONPATH": str(root), "KN_QUICK_IMPORT": "1", **more.pop("env", {})}
    return subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=200,
                          env=variables, **more)


@pytest.mark.parametrize("how", ["file", "stdin", "-c"])
def test_a_script_needs_no_main_guard(tmp_path, how):
    """multiprocessing would run the script again in every worker: ninety lines of traceback."""
    (tmp_path / "script.py").write_text(CODE, encoding="utf-8")
    arguments = {"file": ["script.py"], "stdin": ["-"], "-c": ["-c", CODE]}[how]
    done = called(arguments, tmp_path, env={"KN_HOME": "store"}, input=CODE)
    assert done.returncode == 0 and done.stdout.split("\n")[:2] == ["began", "1 record"], done.stderr[-2000:]
    assert "Traceback" not in done.stderr and done.stdout.count("began") == 1
    assert len(list(tmp_path.glob("store/shapes/*/manifest.json"))) == 1


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    """kn alone, as somebody copies it into their project or site-packages."""
    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(ROOT / "kn", folder / "kn", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


NEED = "the suite needs a whole checkout, and {}/kn lies in none: run ./run_all.sh in a clone "
NEED += "(make_records: name folders with KN_HOME=… and KN_REPORTS=…)"


@pytest.mark.parametrize("arguments", [["--profile", "test"], ["plan"], ["doctor"], ["publish", "."]])
def test_outside_a_checkout_the_suite_says_what_it_needs(copied, tmp_path, arguments):
    done = called(["-B", "-m", "kn", *arguments], tmp_path, copied)
    assert (done.returncode, done.stderr) == (2, f"error: {NEED.format(copied)}\n")
    assert [path.name for path in copied.iterdir()] == ["kn"] and not list(tmp_path.iterdir())


def test_outside_a_checkout_the_method_works_and_folders_can_be_named(copied, tmp_path):
    code = "import kn, torch; print(kn.nearest_kronecker(torch.ones(4, 4), (2, 2))[0].shape[0])"
    done = called(["-B", "-c", code], tmp_path, copied, env={"KN_QUICK_IMPORT": ""})
    assert done.returncode == 0 and done.stdout == "1\n", done.stderr
    done = called(["-B", "-c", CODE], tmp_path, copied)
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == f"ValueError: {NEED.format(copied)}"
    done = called(["-B", "-c", CODE], tmp_path, copied, env={"KN_HOME": str(tmp_path / "store")})
    assert done.returncode == 0 and "1 record" in done.stdout, done.stderr
    assert [path.name for path in copied.iterdir()] == ["kn"]
