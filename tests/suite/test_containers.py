"""What a container or a network file system allows: processors, memory, locks."""

import errno
import fcntl
import math
import os

import pytest
from filelock import FileLock

from kn.suite import devices
from kn.suite.store import Stage, Store, StoreError


@pytest.fixture
def cgroup(tmp_path, monkeypatch):
    """write(the process's groups, {file: content}) puts control groups of a container in place."""

    def write(groups, files):
        (tmp_path / "self").write_text(groups, encoding="utf-8")
        for name, content in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(content + "\n", encoding="utf-8")
        monkeypatch.setattr(devices, "PROCESS_CGROUP", tmp_path / "self")
        monkeypatch.setattr(devices, "CGROUPS", tmp_path)

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    monkeypatch.setattr(devices, "gpus", list)
    return write


V1 = "5:cpu,cpuacct:/docker/1a\n4:memory:/docker/1a\n1:name=systemd:/docker/1a\n"


@pytest.mark.parametrize(
    ("groups", "files", "cores"),
    [
        ("0::/\n", {"cpu.max": "200000 100000"}, 2),
        ("0::/\n", {"cpu.max": "150000 100000"}, 2),
        ("0::/\n", {"cpu.max": "5000 100000"}, 1),
        ("0::/\n", {"cpu.max": "max 100000"}, 64),
        ("0::/a.slice/b\n", {"a.slice/cpu.max": "400000 100000", "a.slice/b/cpu.max": "max 100000"}, 4),
        (V1, {"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3),
        (V1, {"cpu/docker/1a/cpu.cfs_quota_us": "50000", "cpu/docker/1a/cpu.cfs_period_us": "25000"}, 2),
        (V1, {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 64),
        ("0::/\n", {"cpu.max": "9900000 100000"}, 64),
        ("", {}, 64), ("nonsense\n", {}, 64), ("0::/\n", {"cpu.max": "much"}, 64),
    ],
)
def test_a_quota_of_processor_time_limits_the_processes(cgroup, groups, files, cores):
    cgroup(groups, files)
    assert devices.cores() == cores


@pytest.mark.parametrize(
    ("groups", "files", "limit"),
    [
        ("0::/\n", {"memory.max": str(5 * 10**9)}, 5e9),
        ("0::/\n", {"memory.max": "max"}, None),
        (V1, {"memory/memory.limit_in_bytes": str(3 * 10**9)}, 3e9),
        (V1, {"memory/docker/1a/memory.limit_in_bytes": "9223372036854771712"}, None),
        ("0::/x\n", {"x/memory.max": str(6 * 10**9), "memory.max": str(4 * 10**9)}, 4e9),
    ],
)
def test_memory_limits_the_processes(cgroup, monkeypatch, groups, files, limit):
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 4 * 10**6}.get)
    cgroup(groups, files)
    expected = limit or 4096 * 4e6
    assert devices.memory_bytes() == expected
    assert devices.worker_count(2e9) == expected // 2e9
    assert devices.worker_count(7e10) == 1 and devices.worker_count(1e3) == 64
    monkeypatch.setattr(devices, "gpus", lambda: ["one", "two"])
    assert devices.worker_count(7e10) == 2  # GPUs have memory of their own


def test_a_system_that_says_nothing(monkeypatch, tmp_path):
    def nothing(_):
        raise ValueError

    monkeypatch.setattr(devices, "PROCESS_CGROUP", tmp_path / "none")
    monkeypatch.setattr(os, "sysconf", nothing)
    assert devices.memory_bytes() == math.inf and devices.worker_count() == devices.cores() >= 1


ADVICE = r"^the file system of the store .* refuses locks \({}\): "
ADVICE += "choose a folder on a local disk with KN_HOME=…$"


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_flock_is_refused_at_once(tmp_path, monkeypatch, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(StoreError, match=ADVICE.format(os.strerror(number))):
        Store(tmp_path / "store").open()
    assert not list((tmp_path / "store").iterdir())


@pytest.mark.parametrize(
    ("error", "said"),
    [(NotImplementedError(), "no flock"), (OSError(errno.ENOLCK, "No locks"), "No locks")],
)
def test_a_lock_that_cannot_be_taken_is_one_line(tmp_path, monkeypatch, error, said):
    def refuse(*_, **__):
        raise error

    store, stage = Store(tmp_path).open(), Stage("demo", (), "{}")
    monkeypatch.setattr(FileLock, "acquire", refuse)
    with pytest.raises(StoreError, match=ADVICE.format(said)):
        store.make(stage, lambda *_: {})
    assert not store.has(stage)


def test_what_a_stage_does_not_implement_is_no_lock(tmp_path):
    def work(*_):
        raise NotImplementedError("aten::odd is not implemented")

    with pytest.raises(NotImplementedError, match="aten::odd"):
        Store(tmp_path).open().make(Stage("demo", (), "{}"), work)
