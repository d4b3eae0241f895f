"""Where stages run: processes of this machine, or Slurm jobs through submitit. Each has `slots`, `submit`, `wait` and `close`."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import multiprocessing
import os
import pickle
import threading
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from kn.suite import distributed as ranks
from kn.suite.devices import gpus
from kn.suite.store import Stage, Store

THREAD_VARIABLES = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "false"}
# glibc gives large tensors back to the system after every operation; keeping them saves page faults: evaluation 1.45 times, training
# 1.4 times as fast with these (256 windows in bf16: 2.3 s and 1.5 s). Other C libraries ignore them.
THREAD_VARIABLES |= {"MALLOC_MMAP_THRESHOLD_": "2147483648", "MALLOC_TRIM_THRESHOLD_": "4294967296", "MALLOC_TOP_PAD_": "268435456"}
# --slurm's keys: (submitit's name, type)
SLURM = {
    "partition": ("slurm_partition", str), "account": ("slurm_account", str), "qos": ("slurm_qos", str), "constraint": ("slurm_constraint", str),
    "minutes": ("timeout_min", int), "gpus": ("gpus_per_node", int), "cpus": ("cpus_per_task", int), "memory_gb": ("mem_gb", int), "at_once": ("slurm_array_parallelism", int),
}  # fmt: skip
RETRIES = 2  # of a stage whose machine went away


class WorkerDied(RuntimeError):
    """A process or job ended without an answer."""


def work(text: str, home: str) -> bool:
    """In a worker: make the stage that `text` describes (Stage.to_json); True if it ran, False if it was there."""
    import torch

    torch.set_num_threads(1)
    from kn.suite.work import WORK

    if not gc.get_freeze_count():
        gc.freeze()  # what the imports left is never garbage: a collection takes 0.01 instead of 0.27 s, and Trainer asks for one in each run
    item = Stage.from_json(text)
    try:
        return Store(home).make(item, ranks.work if ranks.wanted(item) > 1 else WORK[item.kind])
    except Exception as error:
        raise picklable_error(error) from None
    finally:
        release()


def picklable_error(error: Exception) -> Exception:
    """The error as another process can read it, and with advice where memory ran out: torch raises that as a RuntimeError, Python without a word."""
    if "out of GPU memory" not in str(error) and (isinstance(error, MemoryError) or "can't allocate memory" in str(error)):
        return MemoryError("out of memory: run again with --jobs 1, or with --set hardware.micro_batch=1 where one process is too much")
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # of several arguments, say: it would end the whole pool when it arrives
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def release() -> None:
    """Give freed memory back to the system between stages: a worker of many stages grew from 1.0 to 3.1 GB without it."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # other C libraries have no malloc_trim
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _begin_worker(parent: int, started, devices: int) -> None:
    """A worker takes the next GPU in turn, and ends itself when its parent is gone, so that a killed run leaves nothing behind."""
    if devices > 1 and "CUDA_VISIBLE_DEVICES" not in os.environ:
        with started.get_lock():
            os.environ["CUDA_VISIBLE_DEVICES"] = str(started.value % devices)
            os.environ[ranks.PINNED] = "1"
            started.value += 1

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class Processes:
    """Worker processes of one thread each on this machine."""

    def __init__(self, slots: int, home: Path):
        for name, value in THREAD_VARIABLES.items():
            os.environ.setdefault(name, value)
        self.slots, self.home = slots, str(home)
        context = multiprocessing.get_context("spawn")  # not fork: torch's threads do not survive a fork
        self.pool = ProcessPoolExecutor(slots, context, _begin_worker, (os.getpid(), context.Value("i", 0), len(gpus())))

    def submit(self, items: list[Stage]) -> dict:
        """{handle: stage} of started stages."""
        return {self.pool.submit(work, item.to_json(), self.home): item for item in items}

    def wait(self, running: dict) -> list[tuple[Stage, bool | BaseException]]:
        """(stage, whether it ran or its error) of those that have ended, at least one; they leave `running`. WorkerDied where a process died."""
        ended: list[tuple[Stage, bool | BaseException]] = []
        for handle in wait(running, return_when=FIRST_COMPLETED).done:
            error = handle.exception()
            if isinstance(error, BrokenProcessPool):
                raise WorkerDied(f"{running[handle].path}: its process died (out of memory, or killed): run again with --jobs 1")
            ended.append((running.pop(handle), error or handle.result()))
        return ended

    def close(self) -> None:
        """Let the running stages end, start no others."""
        self.pool.shutdown(wait=True, cancel_futures=True)


class Job:
    """What a Slurm job runs; a pre-empted or timed-out one is queued again and goes on from its last checkpoint."""

    def __call__(self, text: str, home: str) -> bool:
        return work(text, home)

    def checkpoint(self, text: str, home: str):
        """Called by submitit when Slurm announces the end."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, text, home)


class Submitit:
    """Jobs through submitit: `cluster` is "slurm", or "local" and "debug" for tests. Stages that are ready together are one job array."""

    def __init__(self, home: Path, options: dict | None = None, cluster: str = "slurm", slots: int = 1000, poll: float = 5.0):
        import submitit

        logging.getLogger("submitit").setLevel(logging.ERROR)  # without an accounting database it warns at every look

        os.environ.update({name: value for name, value in THREAD_VARIABLES.items() if name not in os.environ})
        self.slots, self.home, self.poll = slots, str(home), poll
        self.tries: dict[str, int] = {}
        self.executor = submitit.AutoExecutor(folder=home / "jobs" / "%j", cluster=cluster)
        self.executor.update_parameters(**{"name": "kn", "timeout_min": 600, **(options or {})})

    def submit(self, items: list[Stage]) -> dict:
        """{handle: stage} of queued stages."""
        if not items:
            return {}
        with self.executor.batch():
            jobs = [self.executor.submit(Job(), item.to_json(), self.home) for item in items]
        return dict(zip(jobs, items, strict=True))

    def wait(self, running: dict) -> list[tuple[Stage, bool | BaseException]]:
        """As Processes.wait; a job that vanished with its machine is submitted again, RETRIES times."""
        from submitit.core.utils import FailedJobError, UncompletedJobError

        while True:
            ended: list[tuple[Stage, bool | BaseException]] = []
            for handle in [h for h in running if h.done()]:
                item = running.pop(handle)
                try:
                    ended.append((item, handle.result()))
                except FailedJobError as error:
                    ended.append((item, RuntimeError(ranks.error_in(str(error)))))
                except UncompletedJobError as error:
                    self.tries[item.path] = self.tries.get(item.path, 0) + 1
                    if self.tries[item.path] > RETRIES:
                        ended.append((item, WorkerDied(f"its job ended {RETRIES + 1} times without an answer (state {handle.state}), see {handle.paths.stderr}: {str(error).splitlines()[0]}")))
                    else:
                        running.update(self.submit([item]))
            if ended:
                return ended
            time.sleep(self.poll)

    def close(self) -> None:
        """Queued jobs stay: they belong to the store, and the next run finds what they made."""


def slurm_options(text: str) -> dict:
    """ "partition=gpu,minutes=120" → submitit's parameters; ValueError says what is allowed."""
    found = {}
    for part in filter(None, text.split(",")):
        key, equals, value = part.partition("=")
        if key not in SLURM or not equals:
            raise ValueError(f"--slurm {part!r} is not understood: allowed are {', '.join(f'{k}=…' for k in SLURM)}, joined by commas")
        name, kind = SLURM[key]
        if kind is int and not (value.isdigit() and int(value)):
            raise ValueError(f"--slurm {part}: a whole number of at least 1 wanted")
        found[name] = kind(value)
    return found
