"""Full and read-only disks, out of memory: finished stages stay, and the error says what to do."""

import os
import resource
import signal
import subprocess
from pathlib import Path

import cheap
import pytest
import torch
from cheap import PLAN
from test_faults import forked, status

from kn.__main__ import main
from kn.suite import executors, launch
from kn.suite.store import Store, StoreError


@pytest.fixture
def small(tmp_path):
    """mount(kilobytes), a real disk of that size; again to resize it, or read-only. Skips without root."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = []

    def mount(kilobytes, how="rw"):
        again = ",remount" if mounted else ""
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k,{how}{again}", "tmpfs", str(folder)],
            capture_output=True,
            text=True,
        )
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
    """The disk fills up at another file each time, also safetensors'; with more room the run goes on."""
    home = small(kilobytes)
    with pytest.raises((launch.StageFailed, StoreError)) as error:
        cheap.run(home)
    said = str(error.value)
    assert "\n" not in said and (
        "No space left on device): free some space or choose another folder with KN_HOME=…" in said
    )
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
            os._exit(
                3
                if "File too large): free some space or choose another folder with KN_HOME=…" in str(error)
                and "\n" not in str(error)
                else 4
            )

    assert status(forked(limited)) == 3
    assert not cheap.finished(tmp_path) and set(cheap.wrong(cheap.tables(tmp_path), whole[1])) == set()
    cheap.run(tmp_path)
    assert cheap.tables(tmp_path) == whole[1]


def test_a_read_only_store(whole, small, tmp_path, capsys, monkeypatch):
    home = small(20000)
    cheap.run(home, plan=PLAN[:5])
    kept = cheap.finished(home)
    small(20000, "ro")
    with pytest.raises(
        StoreError,
        match=r"cannot be written \(Read-only file system\): choose another folder with KN_HOME=…$",
    ):
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
    assert (
        "could not be written (Read-only file system): free some space or choose another folder with "
        "KN_HOME=… (finished work is kept"
        in str(error.value)
    )
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
    assert (
        "MemoryError: out of memory: run again with --jobs 1, or with --set hardware.micro_batch=1 where "
        "one process is too much (finished"
        in str(error.value)
    )
    done = cheap.finished(tmp_path)
    assert {path.partition("/")[0] for path in done} >= {
        "corpus",
        "pretrained",
        "twins",
        "decompose",
        "finetune_glue",
    } and cheap.wrong(cheap.tables(tmp_path), whole[1]) == []
    cheap.run(tmp_path)
    assert done.items() <= cheap.finished(tmp_path).items() and cheap.tables(tmp_path) == whole[1]


def test_a_limit_on_memory(whole, tmp_path):
    """The same under a real limit of the system, RLIMIT_AS, with a tensor that would fit without it."""

    def limited():
        used = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**27, used + 2**27))
        try:
            cheap.run(tmp_path, pretrain=lambda *_: {"value": float(torch.ones(2**27).sum())})
        except launch.StageFailed as error:
            os._exit(
                3
                if "MemoryError: out of memory: run again with --jobs 1" in str(error)
                and "\n" not in str(error)
                else 4
            )

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
    with pytest.raises(
        executors.WorkerDied,
        match=r"^shapes/.*: its process died \(out of memory, or killed\): run again with --jobs 1$",
    ):
        executor.wait(running)
    executor.close()
    assert not store.has(item)
