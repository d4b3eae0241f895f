"""The command line as a user meets it: refusals, the dry run, and runs that are killed and taken up again."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, known_speed

from kn.files import ASSETS
from kn.suite import profiles
from kn.suite.input_digests import asset_digest
from kn.suite.store import StoreError


def kn(*arguments, home, timeout=300, **environment):
    """python -m kn with its own store and report folder."""
    variables = {
        **os.environ,
        "KN_HOME": str(home / "store"),
        "KN_REPORTS": str(home / "reports"),
        "PYTHONPATH": str(ROOT),
        **environment,
    }
    return subprocess.run(
        [sys.executable, "-m", "kn", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=variables,
        timeout=timeout,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--profile", "huge"], "profile 'huge' is unknown: allowed are mini, midi, paper, test"),
        (
            ["--only", "9"],
            "table 9 does not exist: allowed are 1 to 7, beyond and claims, as in --only 4,5,beyond",
        ),
        (
            ["--only", "4,below"],
            "'4,below' is not a list of table numbers: allowed are 1 to 7, beyond and claims, as in "
            "--only 4,5,beyond",
        ),
        (["--only", "four"], "'four' is not a list of table numbers"),
        (["--seeds", "0"], "'0' is not a whole number of at least 1"),
        (["--set", "pretrain.batchsize=3"], "did you mean pretrain.batch_size"),
        (["--set", "pretrain.batch_size=x"], "--set pretrain.batch_size=x: input should be a valid integer"),
        (["--fast"], "unrecognized arguments: --fast"),
        (["export-corpus"], "the following arguments are required: FILE"),
        (["--slurm", "queue=gpu"], "--slurm 'queue=gpu' is not understood: allowed are partition=…"),
        (["mirror"], "the following arguments are required: DIR"),
        (["plan", "somewhere"], "unrecognized arguments: somewhere"),
        (["--wheels"], "unrecognized arguments: --wheels"),
        (["compare", "here", "there"], "here"),
        (["--profile", "paper"], "is no mirror (mirror.json is missing): make one with `python -m kn mirror"),
        (
            ["--glue-scores", "scores.csv"],
            "--glue-scores is for the paper profile: mini scores its test sets itself",
        ),
    ],
)
def test_refusals(tmp_path, arguments, message):
    result = kn(*arguments, home=tmp_path)
    lines = [line for line in result.stderr.splitlines() if "error:" in line]
    assert result.returncode == 2 and len(lines) == 1 and message in lines[0]
    assert "Traceback" not in result.stderr and not list(tmp_path.iterdir())


def test_dry_run_lists_costs_and_runs_nothing(tmp_path):
    result = kn("--dry-run", home=tmp_path)
    assert result.returncode == 0 and not list(tmp_path.iterdir())
    for kind in ("corpus", "pretrained", "decompose", "pretrain", "finetune_lm", "finetune_glue", "score"):
        assert kind in result.stdout
    assert "in all about" in result.stdout


@pytest.mark.parametrize("arguments", [["--help"], ["plan", "--profile", "test"]])
def test_help_and_the_plan_import_no_model_library(tmp_path, arguments):
    known_speed(tmp_path, profiles.TEST)
    code = "import sys; sys.argv[:] = ['-m', *sys.argv[1:]]; import kn.__main__ as command\n"
    code += (
        "try: command.main(sys.argv[1:])\nfinally: assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    variables = {**os.environ, "KN_HOME": str(tmp_path / "store"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=tmp_path)
    assert result.returncode == 0, result.stderr


def test_unwritable_store(tmp_path):
    (tmp_path / "store").write_text("a file, not a folder")
    result = kn("--profile", "test", "--only", "1", home=tmp_path)
    assert (
        result.returncode == 2
        and "cannot be written" in result.stderr
        and "KN_HOME" in result.stderr
        and "Traceback" not in result.stderr
    )


def test_unwritable_reports(tmp_path):
    """Found before any stage is made."""
    (tmp_path / "reports").write_text("a file, not a folder")
    result = kn("--profile", "test", "--only", "1", home=tmp_path)
    lines = result.stderr.splitlines()
    assert (
        result.returncode == 2
        and len(lines) == 1
        and "could not be written" in lines[0]
        and "KN_REPORTS" in lines[0]
    )
    assert not list((tmp_path / "store").glob("*/*"))


@pytest.mark.parametrize(("what", "message"), [("damage", "is damaged"), ("delete", "is missing")])
def test_damaged_assets(tmp_path, what, message):
    shutil.copytree(ASSETS, tmp_path / "assets")
    target = tmp_path / "assets" / "mini" / "teacher" / "model.safetensors"
    if what == "damage":
        content = bytearray(target.read_bytes())
        content[1000] ^= 1
        target.write_bytes(bytes(content))
    else:
        target.unlink()
    with pytest.raises(StoreError, match=message + ".*git checkout"):
        asset_digest(tmp_path / "assets" / "mini" / "teacher")


def finished(home):
    """Finished stages of a store: folder → when its manifest was written."""
    return {
        p.parent.name: p.stat().st_mtime_ns
        for p in (home / "store").glob("*/*/manifest.json")
        if not p.parent.name.endswith(".tmp")
    }


def metrics(home):
    """Everything the tables read, without times."""
    found = {}
    for path in (home / "store").glob("*/*/metrics.json"):
        if not path.parent.name.endswith(".tmp"):
            found[path.parent.name] = {
                k: v for k, v in json.loads(path.read_text()).items() if k not in ("hours", "seconds")
            }
    return found


TABLES = ("--profile", "test", "--only", "3,4")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    home = tmp_path_factory.mktemp("undisturbed")
    known_speed(home, profiles.TEST)
    result = kn(*TABLES, home=home)
    assert result.returncode == 0, result.stderr[-2000:]
    return home


def test_a_run_leaves_tables_and_run_json(undisturbed):
    folder = undisturbed / "reports" / "test"
    for name in (
        "table3.csv",
        "table3.html",
        "table4.csv",
        "table4.html",
        "table4.ipynb",
        "index.html",
        "run.json",
    ):
        assert (folder / name).stat().st_size > 100, name
    run = json.loads((folder / "run.json").read_text())
    assert (
        run["stages"] == run["finished"]
        and run["environment"]["packages"]["torch"]
        and run["peak_bytes_of_a_stage"] > 0
    )
    header = (folder / "table4.csv").read_text().splitlines()[0]
    assert header == "table,row,column,metric,paper,ours,sd,n,delta,verdict,unit,stage"


def test_a_second_run_makes_nothing(undisturbed):
    before = finished(undisturbed)
    started = time.monotonic()
    result = kn(*TABLES, home=undisturbed)
    assert (
        result.returncode == 0 and finished(undisturbed) == before and result.stdout.count("unchanged") == 2
    )
    assert time.monotonic() - started < 60


def test_killed_five_times_and_taken_up_again(undisturbed, tmp_path):
    """After each SIGKILL finished stages stay; the end is that of an undisturbed run."""
    variables = {
        **os.environ,
        "KN_HOME": str(tmp_path / "store"),
        "KN_REPORTS": str(tmp_path / "reports"),
        "PYTHONPATH": str(ROOT),
    }
    moments = random.Random(0)
    known_speed(tmp_path, profiles.TEST)
    for _ in range(5):
        before = finished(tmp_path)
        process = subprocess.Popen(
            [sys.executable, "-m", "kn", *TABLES],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=ROOT,
            env=variables,
            start_new_session=True,
        )
        time.sleep(moments.uniform(1, 15))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        time.sleep(1)
        assert before.items() <= finished(tmp_path).items()
    before = finished(tmp_path)
    result = kn(*TABLES, home=tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    after = finished(tmp_path)
    assert before.items() <= after.items() and set(after) == set(finished(undisturbed))
    assert metrics(tmp_path) == metrics(undisturbed)  # one thread, fixed seeds: bit-equal on one machine
    assert not list((tmp_path / "store").glob("*/*.tmp"))


def test_a_failing_stage_is_named_and_the_rest_goes_on(undisturbed, tmp_path):
    """The fine-tunings of Table 4 fail, a pre-training that was missing is made all the same."""
    shutil.copytree(undisturbed / "store", tmp_path / "store", symlinks=True)
    (pretrained,) = (
        p
        for p in (tmp_path / "store" / "pretrain").iterdir()
        if p.name.startswith("web-lm_kd") and p.is_dir() and not p.is_symlink()
    )
    shutil.rmtree(pretrained)
    result = kn(*TABLES, "--set", "finetune_lm.learning_rate=1e30", home=tmp_path)
    assert result.returncode == 1
    assert "the loss is not finite" in result.stderr and "finished work is kept" in result.stderr
    assert result.stderr.count("the loss is not finite at") == 2  # stage and notebook: not again
    told = [line for line in result.stderr.splitlines() if line.startswith("error: table4.ipynb")]
    assert len(told) == 1 and told[0].startswith(
        "error: table4.ipynb: StoreError: 3 of 8 stages are missing, first finetune_lm/"
    )
    assert "FloatingPointError: the loss is not finite" in told[0]  # why, and the page says it as well
    page = (tmp_path / "reports" / "test" / "table4-failed.html").read_text()
    assert "FloatingPointError: the loss is not finite" in page
    assert pretrained.name in finished(tmp_path)
    assert "not run" in (tmp_path / "reports" / "test" / "index.html").read_text()


def shell(folder, *arguments, **environment):
    """run_all.sh in a folder of its own, where only the tools it needs and a Python 3.8 are found."""
    tools = folder / "tools"
    tools.mkdir()
    for name in ("bash", "cksum", "dirname", "cat"):
        (tools / name).symlink_to(shutil.which(name))
    old = tools / "python3"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.8.20" && exit 0\nexit 1\n')
    old.chmod(0o755)
    for name in ("run_all.sh", "requirements.txt"):
        shutil.copy(ROOT / name, folder)
    return subprocess.run(
        [tools / "bash", "run_all.sh", *arguments],
        cwd=folder,
        env={"PATH": str(tools), **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {},
            "error: Python 3.11, 3.12 or 3.13 is needed, found Python 3.8.20: install one, or name an "
            "environment with KN_PYTHON=/path/to/python",
        ),
        (
            {"KN_PYTHON": "/nowhere/python"},
            "error: KN_PYTHON=/nowhere/python is not a Python that can be run",
        ),
        (
            {"KN_PYTHON": "python3"},
            "error: KN_PYTHON=python3 is Python 3.8.20: Python 3.11 or newer is needed",
        ),
    ],
)
def test_a_python_that_will_not_do(tmp_path, environment, message):
    result = shell(tmp_path, **environment)
    assert (
        result.returncode == 2
        and result.stderr.splitlines() == [message]
        and not (tmp_path / ".venv").exists()
    )
