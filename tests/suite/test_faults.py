"""Killed runs: they never end in a wrong table, and what is finished stays."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import cheap
import pytest
from cheap import PLAN
from conftest import ROOT, known_speed

from kn.suite import profiles
from kn.suite.store import Store

KILLS = 50


def forked(task):
    """The id of a child process that does the task and ends with 0, or with 1 and the error on stderr."""
    child = os.fork()
    if child:
        return child
    os.setsid()
    try:
        task()
        os._exit(0)
    except BaseException as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        os._exit(1)


def status(child):
    """Exit status of a child, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# ---------------------------------------------------------------- killed


def test_fifty_kills_at_random_moments(whole, tmp_path):
    """Finished stages are not touched, what is read is right, and the end is that of an undisturbed run.

    Stores that are complete are begun anew.
    """
    moments, killed, rounds = random.Random(0), 0, 0
    while killed < KILLS:
        rounds += 1
        home, before = tmp_path / f"store{rounds}", {}
        while True:
            child = forked(lambda home=home: cheap.run(home, work=cheap.slow))
            if killed < KILLS:
                time.sleep(moments.uniform(0, 0.3))
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
            ended = status(child)
            after = cheap.finished(home)
            assert before.items() <= after.items()
            assert cheap.wrong(cheap.tables(home), whole[1]) == []
            before = after
            if ended == 0:
                break
            assert ended == -signal.SIGKILL
            killed += 1
        assert len(after) == len(PLAN) and cheap.tables(home) == whole[1]
        assert not list(home.glob("*/*.tmp")) and not list(home.glob("*/*.work"))


STEPS = [
    ("write_text", 0.0),
    ("write_text", 0.5),
    ("write_text", 1.0),
    ("rename", 0.0),
    ("rename", 1.0),
    ("mkdir", 1.0),
]


@pytest.mark.parametrize(("step", "share"), STEPS)
def test_killed_at_every_step_of_one_write(whole, tmp_path, step, share):
    """Before, in the middle of and after each write, rename and folder of the store, one stage at a time."""
    real, item = getattr(Path, step), PLAN[0]

    def dying(number):
        seen = 0

        def call(self, *arguments, **options):
            nonlocal seen
            seen += 1
            if seen != number:
                return real(self, *arguments, **options)
            if step == "write_text":
                real(self, arguments[0][: round(share * len(arguments[0]))])
            elif share:
                real(self, *arguments, **options)
            os.kill(os.getpid(), signal.SIGKILL)

        setattr(Path, step, call)
        cheap.run(home, plan=[item])

    for number in range(1, 30):
        home = tmp_path / str(number)
        ended = status(forked(lambda number=number: dying(number)))
        there = Store(home).has(item)
        assert cheap.run(home, plan=[item]) == ([] if there else [item.path])
        assert Store(home).metrics(item) == Store(whole[0]).metrics(item)
        if ended == 0:
            break
    assert ended == 0 and number > 2


def kn(home, *arguments, **environment):
    """python -m kn with its own store and reports, not waited for."""
    variables = {
        **os.environ,
        "KN_HOME": str(home / "store"),
        "KN_REPORTS": str(home / "reports"),
        "PYTHONPATH": str(ROOT),
        **environment,
    }
    command = [sys.executable, "-m", "kn", "--profile", "test", *arguments]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=variables,
        start_new_session=True,
    )


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A real, undisturbed run of the seconds-long profile's Table 4."""
    home = tmp_path_factory.mktemp("real")
    known_speed(home, profiles.TEST)
    process = kn(home, "--only", "4")
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, out + err
    return home


def real_tables(home):
    """Table 4's CSV, and those of the index, without the numbers that a clock gives."""
    found = {path.name: path.read_text() for path in sorted((home / "reports" / "test").glob("table*.csv"))}
    return {
        name: [line for line in text.splitlines() if "Training time" not in line]
        for name, text in found.items()
    }


def test_three_kills_of_the_real_run_and_two_runs_at_once(real, tmp_path):
    """The last two of the runs are started together on one store and one report."""
    known_speed(tmp_path, profiles.TEST)
    moments, before = random.Random(1), {}
    for _ in range(3):
        process = kn(tmp_path, "--only", "4")
        time.sleep(moments.uniform(3, 12))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        time.sleep(1)  # workers watch for their parent every half second
        after = {
            path.parent.name: path.stat().st_mtime_ns
            for path in (tmp_path / "store").glob("*/*/manifest.json")
            if path.parent.suffix != ".tmp"
        }
        assert before.items() <= after.items()
        before = after
    both = [kn(tmp_path, "--only", "4", "--jobs", "1") for _ in range(2)]
    for process in both:
        out, err = process.communicate(timeout=600)
        assert process.returncode == 0, out + err
    assert real_tables(tmp_path) == real_tables(real)
    assert not list((tmp_path / "reports").rglob("*.part*"))


def test_two_runs_at_once_make_each_stage_once(whole, tmp_path):
    children = [forked(lambda: cheap.run(tmp_path, work=cheap.slow)) for _ in range(2)]
    assert [status(child) for child in children] == [0, 0]
    assert (
        sorted(cheap.calls(tmp_path)) == sorted(item.path for item in PLAN)
        and cheap.tables(tmp_path) == whole[1]
    )
