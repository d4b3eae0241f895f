"""Faults of the machine, made on purpose: a run that is killed, crowded or starved never ends in a wrong table, keeps what is done, and says what to do."""

import contextlib
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import cheap
import pytest
import torch
from cheap import PLAN
from conftest import ROOT, known_speed

from kn.__main__ import main
from kn.suite import executors, launch, profiles
from kn.suite.store import Store, StoreError

KILLS = 50
KEPT = "(finished work is kept: run again to go on)"


def forked(task):
    """The id of a child process that does the task and ends with 0, or with 1 and the error's line in the file `said`."""
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
    """What was finished is not touched, what is read is right, and the end is that of an undisturbed run; stores that got done are begun anew."""
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


STEPS = [("write_text", 0.0), ("write_text", 0.5), ("write_text", 1.0), ("rename", 0.0), ("rename", 1.0), ("mkdir", 1.0)]


@pytest.mark.parametrize(("step", "share"), STEPS)
def test_killed_at_every_step_of_one_write(whole, tmp_path, step, share):
    """Before, in the middle of and after each write, rename and folder that the store makes itself, for one stage at a time."""
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
    variables = {**os.environ, "KN_HOME": str(home / "store"), "KN_REPORTS": str(home / "reports"), "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, "-m", "kn", "--profile", "test", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=variables, start_new_session=True)


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
    return {name: [line for line in text.splitlines() if "Training time" not in line] for name, text in found.items()}


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
        after = {path.parent.name: path.stat().st_mtime_ns for path in (tmp_path / "store").glob("*/*/manifest.json") if path.parent.suffix != ".tmp"}
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
    assert sorted(cheap.calls(tmp_path)) == sorted(item.path for item in PLAN) and cheap.tables(tmp_path) == whole[1]


# ---------------------------------------------------------------- starved


@pytest.fixture
def small(tmp_path):
    """mount(kilobytes), a real disk of that size; again for another size, or read-only. Skips where only root could."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = []

    def mount(kilobytes, how="rw"):
        again = ",remount" if mounted else ""
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k,{how}{again}", "tmpfs", str(folder)], capture_output=True, text=True)
        if done.returncode and not mounted:
            pytest.skip("a disk of a chosen size needs the right to mount a tmpfs: " + done.stderr.strip())
        assert done.returncode == 0, done.stderr
        mounted.append(folder)
        return folder / "store"

    yield mount
    if mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("kilobytes", [*range(24, 64, 4), 100, 200, 400, 700])
def test_a_full_disk(whole, small, kilobytes):
    """The disk fills up at another file each time, also one that safetensors writes; with more room the run goes on."""
    home = small(kilobytes)
    with pytest.raises((launch.StageFailed, StoreError)) as error:
        cheap.run(home)
    said = str(error.value)
    assert "\n" not in said and ("No space left on device): free some space or choose another folder with KN_HOME=…" in said)
    kept = cheap.finished(home)
    assert cheap.wrong(cheap.tables(home), whole[1]) == [] and not list(home.glob("*/*.tmp"))
    small(20000)
    cheap.run(home)
    assert kept.items() <= cheap.finished(home).items() and cheap.tables(home) == whole[1]


def test_a_file_that_may_not_grow(whole, tmp_path):
    """The same where nothing can be mounted: a limit on the size of files, met by the largest ones only."""

    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
        try:
            cheap.run(tmp_path)
        except launch.StageFailed as error:
            os._exit(3 if "File too large): free some space or choose another folder with KN_HOME=…" in str(error) and "\n" not in str(error) else 4)

    assert status(forked(limited)) == 3
    assert not cheap.finished(tmp_path) and set(cheap.wrong(cheap.tables(tmp_path), whole[1])) == set()
    cheap.run(tmp_path)
    assert cheap.tables(tmp_path) == whole[1]


def test_a_read_only_store(whole, small, tmp_path, capsys, monkeypatch):
    home = small(20000)
    cheap.run(home, plan=PLAN[:5])
    kept = cheap.finished(home)
    small(20000, "ro")
    with pytest.raises(StoreError, match=r"cannot be written \(Read-only file system\): choose another folder with KN_HOME=…$"):
        cheap.run(home)
    for number in ("KN_HOME", "KN_REPORTS"):
        monkeypatch.setenv("KN_HOME", str(tmp_path / "writable"))
        monkeypatch.setenv("KN_REPORTS", str(tmp_path / "reports"))
        monkeypatch.setenv(number, str(home))
        assert main(["--profile", "test", "--only", "1"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "Read-only file system" in line and number in line
    assert cheap.finished(home) == kept and cheap.wrong(cheap.tables(home), whole[1]) == []


def test_a_store_that_becomes_read_only_in_the_middle(whole, small):
    home = small(20000)

    class Turning(cheap.Here):
        """After twelve stages the disk takes no more."""

        def wait(self, running):
            if len(cheap.calls(home)) == 12:
                small(20000, "ro")
            return super().wait(running)

    with pytest.raises(launch.StageFailed) as error:
        cheap.run(home, executor=Turning(home))
    assert "could not be written (Read-only file system): free some space or choose another folder with KN_HOME=… (finished work is kept" in str(error.value)
    kept = cheap.finished(home)
    assert len(kept) == 12 and cheap.wrong(cheap.tables(home), whole[1]) == []
    small(20000)
    cheap.run(home)
    assert kept.items() <= cheap.finished(home).items() and cheap.tables(home) == whole[1]


def hungry(*_):
    """More memory than there is, as a training asks for it."""
    return {"value": torch.empty(2**42, dtype=torch.uint8).numel()}


def greedy(*_):
    """The same, asked of Python."""
    return {"value": len(bytearray(2**45))}


@pytest.mark.parametrize("work", [hungry, greedy], ids=["torch", "python"])
def test_out_of_memory(whole, tmp_path, work):
    """One stage asks for too much: the error says how to need less, what does not depend on it goes on."""
    with pytest.raises(launch.StageFailed) as error:
        cheap.run(tmp_path, pretrain=work)
    assert "MemoryError: out of memory: run again with --jobs 1, or with --set hardware.micro_batch=1 where one process is too much (finished" in str(error.value)
    done = cheap.finished(tmp_path)
    assert {path.partition("/")[0] for path in done} >= {"corpus", "pretrained", "twins", "decompose", "finetune_glue"} and cheap.wrong(cheap.tables(tmp_path), whole[1]) == []
    cheap.run(tmp_path)
    assert done.items() <= cheap.finished(tmp_path).items() and cheap.tables(tmp_path) == whole[1]


def test_a_limit_on_memory(whole, tmp_path):
    """The same under a real limit of the system, RLIMIT_AS, with a tensor that would fit without it."""

    def limited():
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**27, used + 2**27))
        try:
            cheap.run(tmp_path, pretrain=lambda *_: {"value": float(torch.ones(2**27).sum())})
        except launch.StageFailed as error:
            os._exit(3 if "MemoryError: out of memory: run again with --jobs 1" in str(error) and "\n" not in str(error) else 4)

    assert status(forked(limited)) == 3
    kept = cheap.finished(tmp_path)
    assert kept and cheap.wrong(cheap.tables(tmp_path), whole[1]) == []
    cheap.run(tmp_path)
    assert kept.items() <= cheap.finished(tmp_path).items() and cheap.tables(tmp_path) == whole[1]


def test_a_worker_that_the_system_kills(tmp_path):
    """What the out-of-memory killer does to one of the processes."""
    store, item = Store(tmp_path).open(), next(item for item in PLAN if item.kind == "shapes")
    executor = executors.Processes(1, store.home)
    running = executor.submit([item])
    (worker,) = executor.pool._processes
    os.kill(worker, signal.SIGKILL)
    with pytest.raises(executors.WorkerDied, match=r"^shapes/.*: its process died \(out of memory, or killed\): run again with --jobs 1$"):
        executor.wait(running)
    executor.close()
    assert not store.has(item)
