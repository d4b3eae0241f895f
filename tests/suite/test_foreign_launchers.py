"""Variables that mpirun, srun, torchrun or accelerate leave divide no batch of ours and let nothing hang."""

import contextlib
import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, known_speed

from kn import __main__ as command
from kn.suite import devices, distributed, executors, launch, profiles
from kn.suite.plan import plan_stages
from kn.suite.store import Store

FOREIGN = {
    "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0",
    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29501", "PMI_SIZE": "2", "PMI_RANK": "0", "PMIX_RANK": "0",
    "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0", "MPI_LOCALRANKID": "0",
    "MV2_COMM_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x", "ACCELERATE_MIXED_PRECISION": "fp8",
    "ACCELERATE_USE_FSDP": "true", "OMP_PROC_BIND": "true", "KMP_AFFINITY": "compact",
}
KEPT = {"OMP_NUM_THREADS": "1", "SLURM_JOB_ID": "7", "SLURM_CONF": "/etc/slurm.conf", "FRANK": "y"}
PLAN = plan_stages(profiles.TEST, tables=(3,))[0]
TRAINING = next(stage for stage in PLAN if stage.kind == "pretrain")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Table 3's stages, made without such variables."""
    store = Store(tmp_path_factory.mktemp("alone")).open()
    launch.run(PLAN, store, jobs=1)
    return store


def losses(store):
    return [(line["step"], line["loss"]) for line in store.metrics(TRAINING)["log"]]


def test_which_variables_are_a_launcher_s(monkeypatch):
    for name, value in (FOREIGN | KEPT).items():
        monkeypatch.setenv(name, value)
    devices.forget_launcher()
    assert not FOREIGN.keys() & os.environ.keys() and KEPT.items() <= os.environ.items()


def test_a_training_is_the_same_under_a_foreign_launcher(store, tmp_path, monkeypatch):
    other = Store(shutil.copytree(store.home, tmp_path / "store"))
    other.forget([TRAINING])
    for name, value in (FOREIGN | KEPT).items():
        monkeypatch.setenv(name, value)
    assert launch.run(PLAN, other, jobs=1) == [TRAINING.path] and losses(other) == losses(store)
    assert FOREIGN.items() <= os.environ.items()  # a script that calls us keeps its own


def test_two_ranks_under_a_foreign_launcher_see_torchrun_s_variables_alone(store, monkeypatch, tmp_path):
    seen = {}

    def run(_, env, **__):
        seen.update(env)
        return type("Done", (), {"returncode": 1, "stderr": "OSError: stopped here"})

    monkeypatch.setattr(distributed.subprocess, "run", run)
    for name, value in FOREIGN.items():
        monkeypatch.setenv(name, value)
    other = Store(shutil.copytree(store.home, tmp_path / "store"))
    other.forget([TRAINING])
    two = dataclasses.replace(TRAINING, resources='{"processes": 2}')
    with pytest.raises(RuntimeError, match="stopped here"):
        executors.run_stage(two.to_json(), str(other.home))
    assert seen and not FOREIGN.keys() & seen.keys() and int(seen[distributed.WORKER]) == os.getpid()


def test_the_timing_run_and_the_whole_command_are_alone(tmp_path):
    variables = {**os.environ, **FOREIGN, "KN_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", "kn", "plan", "--profile", "test", "--only", "1"],
                          env=variables, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and "tokens a second and process" in done.stdout, done.stderr


def test_a_command_hands_on_no_launcher(monkeypatch, tmp_path):
    monkeypatch.setenv("KN_HOME", str(tmp_path))
    for name, value in FOREIGN.items():
        monkeypatch.setenv(name, value)
    assert command.main(["compare", str(tmp_path), str(tmp_path)]) == 2
    assert not FOREIGN.keys() & os.environ.keys()


def test_jobs_are_submitted_from_within_a_job_as_from_a_login_node(monkeypatch, tmp_path):
    executor, seen = executors.Submitit(tmp_path, cluster="local"), {}
    monkeypatch.setattr(executor.executor, "batch", contextlib.nullcontext)
    monkeypatch.setattr(executor.executor, "submit", lambda *_: seen.update(os.environ))
    for name, value in {"SLURM_JOB_ID": "7", "SLURM_CONF": "/etc/slurm.conf", "RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    executor.submit([TRAINING])
    assert seen["SLURM_CONF"] == "/etc/slurm.conf" and not {"SLURM_JOB_ID", "RANK"} & seen.keys()
    assert os.environ["SLURM_JOB_ID"] == "7"


def test_a_rank_ends_with_the_worker_whose_torchrun_it_is():
    worker = subprocess.Popen(["sleep", "100"])
    code = "import os, sys, time; from kn.suite import distributed\n"
    code += "distributed.end_with(os.getppid(), int(sys.argv[1])); print('up', flush=True); time.sleep(60)"
    rank = subprocess.Popen([sys.executable, "-c", code, str(worker.pid)], stdout=subprocess.PIPE,
                            env={**os.environ, "PYTHONPATH": str(ROOT), "KN_QUICK_IMPORT": "1"})
    assert rank.stdout.readline() == b"up\n" and rank.poll() is None
    worker.kill()
    worker.wait()
    assert rank.wait(timeout=10) == 1


def test_sigint_to_the_parent_alone_ends_the_run(tmp_path):
    """As `kill -INT` or a scheduler does; Ctrl-C reaches the workers, too."""
    known_speed(tmp_path, profiles.TEST)
    variables = {**os.environ, "KN_HOME": str(tmp_path / "store"), "KN_REPORTS": str(tmp_path / "reports"),
                 "PYTHONPATH": str(ROOT)}
    long = ("--set", "pretrain.max_steps=20000")
    process = subprocess.Popen([sys.executable, "-m", "kn", "--profile", "test", "--only", "3", *long],
                               env=variables, cwd=tmp_path, stderr=subprocess.PIPE, text=True,
                               stdout=subprocess.DEVNULL, start_new_session=True)
    until = time.monotonic() + 120
    while not list(tmp_path.glob("store/pretrain/*.tmp")) and time.monotonic() < until:
        time.sleep(0.1)
    time.sleep(1)
    os.kill(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=15)
    assert process.returncode == 130 and "Traceback" not in said
    assert said.strip().endswith("stopped; finished stages are kept: run the same command again to go on")
    time.sleep(1)
    states = [path.read_text(encoding="utf-8").rpartition(") ")[2].split()[:3]
              for path in Path("/proc").glob("[0-9]*/stat")]  # of Linux: state, parent, group
    assert not [state for state, _, group in states if group == str(process.pid) and state != "Z"]
