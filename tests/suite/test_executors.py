"""Stages as jobs of a cluster: results of local processes, lost jobs done again, errors in one line."""

import dataclasses
import io
import json
import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest

from kn.suite import devices, executors, launch, profiles
from kn.suite.plan import plan_stages
from kn.suite.store import Store

PLAN = plan_stages(profiles.TEST, tables=(3,))[0]


def metrics(store):
    """Of every stage, without what the clock or the machine decides."""
    return {
        item.path: json.dumps(
            {k: v for k, v in store.metrics(item).items() if k not in ("hours", "seconds", "hardware")},
            sort_keys=True,
        )
        for item in PLAN
    }


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    store = Store(tmp_path_factory.mktemp("local")).open()
    launch.run(PLAN, store, jobs=2)
    return store


@pytest.mark.parametrize("cluster", ["local", "debug"])
def test_submitit_jobs_give_what_processes_give(local, tmp_path, cluster):
    store = Store(tmp_path).open()
    ran = launch.run(PLAN, store, executor=executors.Submitit(store.home, cluster=cluster, slots=2, poll=0.2))
    assert sorted(ran) == sorted(item.path for item in PLAN)
    assert metrics(store) == metrics(local)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the job's processes in Linux's /proc")
def test_a_job_that_vanishes_is_done_again(tmp_path):
    store, item = Store(tmp_path).open(), PLAN[0]
    executor = executors.Submitit(store.home, cluster="local", poll=0.1)
    running = executor.submit([item])
    (handle,) = running

    def kill():  # the job and what it started, as when a machine goes away
        time.sleep(1)
        children = Path(f"/proc/{handle.job_id}/task/{handle.job_id}/children")
        for pid in (handle.job_id, *children.read_text(encoding="utf-8").split()):
            os.kill(int(pid), signal.SIGKILL)

    threading.Thread(target=kill).start()
    assert executor.wait(running) == [(item, True)] and executor.losses == {item.path: 1}
    assert store.has(item)


def test_a_failing_job_says_why_in_one_line(tmp_path):
    store = Store(tmp_path).open()
    broken = dataclasses.replace(
        next(item for item in PLAN if item.kind == "shapes"), settings='{"model": {}, "compression": {}}'
    )
    with pytest.raises(
        launch.StageFailed,
        match=r"^1 of 1 stages failed; first shapes/all-\w+: RuntimeError: KeyError: 'vocabulary' "
        r"\(finished work is kept: run again to go on\)$",
    ):
        launch.run([broken], store, executor=executors.Submitit(store.home, cluster="local", poll=0.1))


def test_progress_names_every_finished_stage(tmp_path):
    """Notebooks are executed between two waits, as soon as their stages are there."""
    seen = []
    stages = [stage for stage in PLAN if stage.kind in ("shapes", "corpus")]
    launch.run(stages[:1], Store(tmp_path).open(), jobs=1)
    launch.run(stages, Store(tmp_path).open(), jobs=1, on_progress=seen.append)
    assert seen == [{stage.path for stage in stages}]


class AtOnce:
    """An executor whose stages are done as soon as they begin."""

    slots = 1

    def submit(self, stages):
        return {stage.path: stage for stage in stages}

    def wait(self, running):
        return [(running.popitem()[1], True)]

    def close(self):
        pass


@pytest.mark.parametrize("cost", [0.0, 3e8, 1.4e9, 2e12])
def test_the_bar_ends_at_a_hundred(tmp_path, cost):
    """Also for a plan of stages below a GFLOP, and whatever is rounded."""
    stages, stream = [dataclasses.replace(stage, cost=cost) for stage in PLAN], io.StringIO()
    launch.run(stages, Store(tmp_path).open(), executor=AtOnce(), stream=stream)
    shown = re.findall(r"(\d+)%", stream.getvalue())
    assert shown[0] == "0" and shown[-1] == "100"


def test_slurm_options_are_read_and_refused():
    assert executors.slurm_options("partition=gpu,minutes=90,gpus=1") == {
        "slurm_partition": "gpu",
        "timeout_min": 90,
        "gpus_per_node": 1,
    }
    for text, message in {
        "queue=x": "--slurm 'queue=x' is not understood: allowed are partition=…, account=…, qos=…, "
        "constraint=…, minutes=…, gpus=…, cpus=…, memory_gb=…, at_once=…, joined by commas",
        "minutes=soon": "--slurm minutes=soon: an integer of at least 1 is needed",
    }.items():
        with pytest.raises(ValueError) as error:
            executors.slurm_options(text)
        assert str(error.value) == message


def test_workers_share_the_gpus_in_turn(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv(executors.distributed.WORKER_GPU, raising=False)
    context, seen = executors.multiprocessing.get_context("spawn"), []
    started = context.Value("i", 0)
    for _ in range(3):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        executors._start_worker(os.getppid(), started, 2)
        seen.append(os.environ["CUDA_VISIBLE_DEVICES"])
    assert seen == ["0", "1", "0"] and os.environ.pop(executors.distributed.WORKER_GPU) == "1"


def test_a_cpu_profile_hides_a_gpu_and_says_so(monkeypatch):
    monkeypatch.setattr(devices, "gpus", lambda: ["Some GPU"])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert devices.keep_off_gpus("auto") == "" and "CUDA_VISIBLE_DEVICES" not in os.environ
    assert devices.keep_off_gpus("cpu").startswith("Some GPU is not used: this profile is for the CPU")
    assert os.environ.pop("CUDA_VISIBLE_DEVICES") == ""
