"""Executors of stages (`slots`, `submit`, `wait`, `close`): worker processes, or Slurm jobs by submitit."""

import contextlib
import ctypes
import gc
import logging
import multiprocessing
import os
import pickle
import sys
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import ModuleType

from kn.suite import distributed
from kn.suite.devices import forget_launcher, gpus
from kn.suite.store import Stage, Store

WORKER_VARIABLES = {
    "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive",
    "TOKENIZERS_PARALLELISM": "false",
    # glibc returns large tensors to the system after every operation; keeping them saves page faults:
    # evaluation is 1.45 times, training 1.4 times as fast. Other C libraries ignore these.
    "MALLOC_MMAP_THRESHOLD_": "2147483648", "MALLOC_TRIM_THRESHOLD_": "4294967296",
    "MALLOC_TOP_PAD_": "268435456",
}
SLURM_OPTIONS = {  # key of --slurm: (submitit's parameter, type)
    "partition": ("slurm_partition", str), "account": ("slurm_account", str), "qos": ("slurm_qos", str),
    "constraint": ("slurm_constraint", str), "minutes": ("timeout_min", int), "gpus": ("gpus_per_node", int),
    "cpus": ("cpus_per_task", int), "memory_gb": ("mem_gb", int), "at_once": ("slurm_array_parallelism", int),
}
RETRIES = 2  # of a stage whose machine went away
Result = tuple[Stage, bool | BaseException]  # whether it ran, or its error


class WorkerDied(RuntimeError):
    """A process or job ended without a result."""


def run_stage(description: str, home: str) -> bool:
    """In a worker: make the stage described by Stage.to_json; True if it ran, False if the store had it."""
    forget_launcher()
    import torch

    from kn.suite.work import WORK
    torch.set_num_threads(1)
    if not gc.get_freeze_count():
        gc.freeze()  # imported modules are never garbage: Trainer's collection takes 0.01 instead of 0.27 s
    stage = Stage.from_json(description)
    work = distributed.run_torchrun if distributed.process_count(stage) > 1 else WORK[stage.kind]
    try:
        return Store(home).make(stage, work)
    except Exception as error:
        raise picklable_error(error) from None
    finally:
        release()


def picklable_error(error: Exception) -> Exception:
    """The error in a form that another process can read, with a remedy where the CPU's memory ran out."""
    out_of_memory = isinstance(error, MemoryError) or "can't allocate memory" in str(error)  # torch's words
    if out_of_memory and "out of GPU memory" not in str(error):
        remedy = "run again with --jobs 1, or with --set hardware.micro_batch=1 where one process is too much"
        return MemoryError(f"out of memory: {remedy}")
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # an exception class of several arguments, say: unpickling it would end the pool
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def release() -> None:
    """Return freed memory to the system between stages: workers grew from 1.0 to 3.1 GB without it."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # other C libraries have no malloc_trim
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _start_worker(parent: int, started, gpu_count: int) -> None:
    """Take the next GPU in turn; exit when the parent is gone, so that a killed run leaves no process."""
    if gpu_count > 1 and "CUDA_VISIBLE_DEVICES" not in os.environ:
        with started.get_lock():
            gpu, started.value = started.value % gpu_count, started.value + 1
        os.environ.update({"CUDA_VISIBLE_DEVICES": str(gpu), distributed.WORKER_GPU: "1"})

    distributed.end_with(parent)


class Processes:
    """Worker processes of one thread each on this machine."""

    def __init__(self, slots: int, home: Path):
        os.environ.update({**WORKER_VARIABLES, **os.environ})
        self.slots, self.home = slots, str(home)
        context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
        arguments = (os.getpid(), context.Value("i", 0), len(gpus()))
        self.pool = ProcessPoolExecutor(slots, context, _start_worker, arguments)

    def submit(self, stages: list[Stage]) -> dict:
        """{handle: stage} of the started stages."""
        main = sys.modules["__main__"]
        sys.modules["__main__"] = ModuleType("__main__")  # a new process imports it: a script would run again
        try:
            return {self.pool.submit(run_stage, stage.to_json(), self.home): stage for stage in stages}
        finally:
            sys.modules["__main__"] = main

    def wait(self, running: dict) -> list[Result]:
        """Take the stages that ended out of `running`, at least one. WorkerDied where a process died."""
        ended: list[Result] = []
        for handle in wait(running, return_when=FIRST_COMPLETED).done:
            stage, error = running.pop(handle), handle.exception()
            if isinstance(error, BrokenProcessPool):
                reason = "its process died (out of memory, or killed): run again with --jobs 1"
                raise WorkerDied(f"{stage.path}: {reason}")
            ended.append((stage, error or handle.result()))
        return ended

    def close(self) -> None:
        """Let the running stages end, start no others; end them where the run is interrupted."""
        if isinstance(sys.exc_info()[1], KeyboardInterrupt):
            for process in list((self.pool._processes or {}).values()):
                process.terminate()
        self.pool.shutdown(wait=True, cancel_futures=True)


class Job:
    """A Slurm job; pre-empted or timed out, it is queued again and goes on from its last checkpoint."""

    def __call__(self, description: str, home: str) -> bool:
        return run_stage(description, str(Store(home).open().home))  # this node, too, must write and lock

    def checkpoint(self, *arguments: str):
        """Called by submitit when Slurm announces the end."""
        from submitit.helpers import DelayedSubmission
        return DelayedSubmission(self, *arguments)


class Submitit:
    """Slurm jobs through submitit, one array for stages that are ready together; tests: "local", "debug"."""

    def __init__(self, home: Path, options: dict | None = None, cluster="slurm", slots=1000, poll=5.0):
        """`options` are submitit's parameters, `poll` the seconds between two looks at the jobs."""
        import submitit
        logging.getLogger("submitit").setLevel(logging.ERROR)  # it warns at every look without accounting
        os.environ.update({**WORKER_VARIABLES, **os.environ})
        self.slots, self.home, self.poll = slots, str(home), poll
        self.losses: dict[str, int] = {}  # by path, of stages whose jobs ended without a result
        self.executor = submitit.AutoExecutor(folder=home / "jobs" / "%j", cluster=cluster)
        self.executor.update_parameters(**{"name": "kn", "timeout_min": 600, **(options or {})})

    def submit(self, stages: list[Stage]) -> dict:
        """{handle: stage} of the queued stages."""
        if not stages:
            return {}
        from submitit.helpers import clean_env
        conf = {name: os.environ[name] for name in ("SLURM_CONF",) if name in os.environ}
        with clean_env(), self.executor.batch():  # this process may be in a job itself
            os.environ.update(conf)
            jobs = [self.executor.submit(Job(), stage.to_json(), self.home) for stage in stages]
        return dict(zip(jobs, stages, strict=True))

    def wait(self, running: dict) -> list[Result]:
        """Take the stages that ended out of `running`, at least one; a lost job gets RETRIES more tries."""
        from submitit.core.utils import FailedJobError, UncompletedJobError
        ended: list[Result] = []
        while not (done := [handle for handle in running if handle.done()]):
            time.sleep(self.poll)
        for handle in done:
            stage = running.pop(handle)
            try:
                ended.append((stage, handle.result()))
            except FailedJobError as error:
                ended.append((stage, RuntimeError(distributed.error_line(str(error)))))
            except UncompletedJobError as error:
                lost = self.losses[stage.path] = self.losses.get(stage.path, 0) + 1
                if lost <= RETRIES:
                    running.update(self.submit([stage]))
                    continue
                reason = f"its job ended {lost} times without an answer (state {handle.state})"
                details = f"see {handle.paths.stderr}: {str(error).splitlines()[0]}"
                ended.append((stage, WorkerDied(f"{reason}, {details}")))
        return ended or self.wait(running)

    def close(self) -> None:
        """Queued jobs stay: they belong to the store, and the next run finds what they made."""


def slurm_options(text: str) -> dict:
    """ "partition=gpu,minutes=120" as submitit's parameters; ValueError with the allowed keys and values."""
    options = {}
    for part in filter(None, text.split(",")):
        key, equals, value = part.partition("=")
        if key not in SLURM_OPTIONS or not equals:
            allowed = ", ".join(f"{key}=…" for key in SLURM_OPTIONS)
            raise ValueError(f"--slurm {part!r} is not understood: allowed are {allowed}, joined by commas")
        name, kind = SLURM_OPTIONS[key]
        if kind is int and not (value.isdigit() and int(value)):
            raise ValueError(f"--slurm {part}: an integer of at least 1 is needed")
        options[name] = kind(value)
    return options
