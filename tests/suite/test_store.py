"""The store: keys, atomic results, damage found, two processes at once, clear errors."""

import json
import multiprocessing
import os
import subprocess
import time

import pytest

from kn.suite.provenance import git_commit
from kn.suite.store import Stage, Store, StoreError


def make_stage(**more):
    return Stage("demo", (("seed", 0),), json.dumps({"a": 1}), **more)


def work(stage, folder, store):
    (folder / "data.bin").write_bytes(b"0123456789" * 100)
    with (store.home / "calls").open("a") as calls:
        calls.write("x")
    time.sleep(0.2)
    return {"value": 1.5}


def test_key_covers_settings_inputs_and_version_but_not_cost():
    a = make_stage()
    assert a.hash == make_stage(cost=5.0).hash
    assert len(
        {
            a.hash, make_stage(version=2).hash, make_stage(inputs=(a,)).hash,
            Stage("demo", (("seed", 1),), a.settings).hash, Stage("demo", a.fields, "{}").hash
        }
    ) == 5


def test_made_once_and_read_back(tmp_path):
    store, item = Store(tmp_path).open(), make_stage()
    assert store.make(item, work) is True and store.make(item, work) is False
    assert store.metrics(item) == {"value": 1.5} and (tmp_path / "calls").read_text() == "x"
    record = store.record(item)
    assert record["fields"] == {"seed": 0} and record["provenance"]["wall_seconds"] > 0.1


@pytest.mark.parametrize("damage", ["truncate", "flip", "delete", "manifest", "metrics"])
def test_damage_is_found_and_redone(tmp_path, damage):
    store, item = Store(tmp_path).open(), make_stage()
    store.make(item, work)
    folder = store.folder(item)
    data, manifest, metrics = folder / "data.bin", folder / "manifest.json", folder / "metrics.json"
    if damage == "truncate":
        data.write_bytes(data.read_bytes()[:-1])
    elif damage == "flip":
        data.write_bytes(b"X" + data.read_bytes()[1:])
    elif damage == "delete":
        data.unlink()
    elif damage == "manifest":
        manifest.write_text(manifest.read_text()[:-20])
    else:
        metrics.write_text(metrics.read_text().replace("1.5", "9.5"))
    assert store.find_corruption(item, deep=True)
    # a flipped byte in a large file is seen when the stage is made or used, not at every look
    if damage != "flip":
        with pytest.raises(StoreError, match=r"run ./run_all.sh to make it again"):
            store.metrics(item)
    assert store.make(item, work) is True and store.metrics(item) == {"value": 1.5}
    assert store.find_corruption(item, deep=True) is None


def test_a_failing_stage_leaves_nothing(tmp_path):
    store, item = Store(tmp_path).open(), make_stage()

    def fail(*_):
        raise RuntimeError("broken on purpose")

    with pytest.raises(RuntimeError, match="broken on purpose"):
        store.make(item, fail)
    assert [p.name for p in (tmp_path / "demo").iterdir() if p.suffix != ".lock"] == []
    with pytest.raises(ValueError, match="not JSON compliant"):
        store.make(item, lambda *_: {"value": float("nan")})
    assert not store.has(item)


def _make(home):
    Store(home).make(make_stage(), work)


def test_two_processes_make_it_once(tmp_path):
    Store(tmp_path).open()
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=_make, args=(tmp_path,)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [p.exitcode for p in processes] == [0, 0] and (tmp_path / "calls").read_text() == "x"


def test_a_store_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be written .*choose another folder with KN_HOME"):
        Store(tmp_path / "file" / "store").open()


def test_full_disk_is_one_line(tmp_path):
    store, item = Store(tmp_path).open(), make_stage()

    def full(*_):
        raise OSError(28, os.strerror(28))

    with pytest.raises(
        StoreError,
        match="could not be written .No space left on device.: free some space or choose another folder"
    ):
        store.make(item, full)
    assert not store.has(item)


def test_default_home_does_not_follow_the_working_directory(tmp_path, monkeypatch):
    """Notebooks run in notebooks/: they must find the store that ./run_all.sh filled."""
    monkeypatch.delenv("KN_HOME", raising=False)
    here = Store().home
    monkeypatch.chdir(tmp_path)
    assert Store().home == here and here.name == "artifacts"


def test_the_recorded_commit_is_the_checkout_s_own_and_says_whether_files_were_changed(tmp_path):
    def git(*arguments):
        author = ("-c", "user.name=n", "-c", "user.email=n@example.org")
        command = ["git", *author, "-C", str(tmp_path), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    (tmp_path / "code.py").write_text("a = 1\n")
    git("add", "code.py")
    git("commit", "-qm", "first")
    commit = git("rev-parse", "--short=12", "HEAD")
    assert git_commit(tmp_path) == commit
    (tmp_path / "untracked").write_text("")
    assert git_commit(tmp_path) == commit
    (tmp_path / "code.py").write_text("a = 2\n")
    assert git_commit(tmp_path) == f"{commit}+"
    (tmp_path / "copy").mkdir()  # a copy without a repository of its own, inside another's
    assert git_commit(tmp_path / "copy") == ""
