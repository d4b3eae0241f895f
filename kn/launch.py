"""Runs a plan: what is missing, in dependency order, spread over processes with one thread each; prints the plan and its cost."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import os
import statistics
import sys
import threading
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool

from .store import Stage, Store

FLOPS_PER_SECOND = 4.5e10  # of one thread; only a first guess until this store holds a timed stage
THREAD_VARIABLES = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "false"}
# glibc gives large tensors back to the system after every operation; keeping them saves page faults: evaluation 1.45 times, training
# 1.4 times as fast with these (256 windows in bf16: 2.3 s and 1.5 s). Other C libraries ignore them.
THREAD_VARIABLES |= {"MALLOC_MMAP_THRESHOLD_": "2147483648", "MALLOC_TRIM_THRESHOLD_": "4294967296", "MALLOC_TOP_PAD_": "268435456"}


class StageFailed(RuntimeError):
    """A stage raised; the message names the stage and the cause in one line."""


def cores() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def speed(stages: list[Stage], store: Store) -> float:
    """FLOPs a second and process: the median over finished stages of this store, or the first guess."""
    seen = []
    for item in stages:
        if item.cost > 1e11 and store.has(item):
            seconds = store.record(item)["provenance"]["wall_seconds"]
            seen.append(item.cost / max(seconds, 0.01))
    return statistics.median(seen) if len(seen) >= 3 else FLOPS_PER_SECOND


def clock(seconds: float) -> str:
    """1 h 02 min, 3 min 20 s or 5 s."""
    seconds = round(seconds)
    if seconds >= 3600:
        return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
    return f"{seconds // 60} min {seconds % 60:02d} s" if seconds >= 60 else f"{seconds} s"


def describe(stages: list[Stage], store: Store, jobs: int | None = None) -> str:
    """The plan as text: per kind, how many stages are done and to do, and about how long the rest takes."""
    jobs, rate = jobs or cores(), speed(stages, store)
    lines, total = [f"{'stage':<16}{'done':>6}{'to do':>7}{'about':>14}"], 0.0
    for kind in dict.fromkeys(item.kind for item in stages):
        mine = [item for item in stages if item.kind == kind]
        open_ones = [item for item in mine if not store.has(item)]
        seconds = sum(item.cost for item in open_ones) / rate
        total += seconds
        lines.append(f"{kind:<16}{len(mine) - len(open_ones):>6}{len(open_ones):>7}{clock(seconds) if open_ones else '-':>14}")
    lines.append(f"in all about {clock(total / jobs)} with {jobs} processes of one thread (the seconds above are of one process); store {store.home}")
    return "\n".join(lines)


def _begin_worker(parent: int) -> None:
    """A worker ends itself when its parent is gone, so that a killed run leaves nothing behind."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _work(item: Stage, home: str) -> tuple[str, bool, float]:
    """In a worker: make one stage."""
    import torch

    torch.set_num_threads(1)
    from . import ranks
    from .train import WORK

    if not gc.get_freeze_count():
        gc.freeze()  # what the imports left is never garbage: a collection takes 0.01 instead of 0.27 s, and Trainer asks for one in each run
    started = time.monotonic()
    try:
        return item.path, Store(home).make(item, ranks.work if ranks.wanted(item) > 1 else WORK[item.kind]), time.monotonic() - started
    finally:
        release()


def release() -> None:
    """Give freed memory back to the system between stages: a worker of many stages grew from 1.0 to 3.1 GB without it."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # other C libraries have no malloc_trim
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def run(stages: list[Stage], store: Store, jobs: int | None = None, stream=None) -> list[str]:
    """Make every stage that the store lacks; returns the paths that ran. StageFailed after the rest is done where one raised."""
    missing = {item.path: item for item in stages if not store.has(item)}
    if not missing:
        return []
    from tqdm import tqdm

    jobs = min(jobs or cores(), len(missing))
    for name, value in THREAD_VARIABLES.items():
        os.environ.setdefault(name, value)
    users = {path: 0.0 for path in missing}  # cost of the longest chain that starts with this stage: long chains first
    for item in reversed(list(missing.values())):
        users[item.path] += item.cost
        for need in item.inputs:
            if need.path in users:
                users[need.path] = max(users[need.path], users[item.path])
    failed, ran, running = {}, [], {}
    out = stream or sys.stderr
    bar = tqdm(
        total=round(sum(i.cost for i in missing.values()) / 1e9), desc="stages", file=out, mininterval=0.5 if out.isatty() else 30, ncols=100,
        bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed} elapsed, {remaining} left{postfix}" + ("" if out.isatty() else "\n"),
    )  # fmt: skip
    # spawn, not fork: torch's threads do not survive a fork
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _begin_worker, (os.getpid(),))
    try:
        waiting = dict(missing)
        while waiting or running:
            for path, item in list(waiting.items()):
                broken = next((n.path for n in item.inputs if n.path in failed), None)
                if broken:
                    failed[path] = f"needs {broken}, which failed"
                    del waiting[path]
            ready = [i for i in waiting.values() if not any(n.path in waiting or n.path in running.values() for n in i.inputs)]
            for item in sorted(ready, key=lambda i: -users[i.path])[: jobs - len(running)]:
                del waiting[item.path]
                running[pool.submit(_work, item, str(store.home))] = item.path
            if not running:
                break
            bar.set_postfix_str(" · ".join(path.rpartition("-")[0] for path in sorted(running.values()))[:48], refresh=out.isatty())
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                path = running.pop(future)
                try:
                    _, did, _ = future.result()
                    ran += [path] if did else []
                except BrokenProcessPool:
                    raise StageFailed(f"{path}: its process died (out of memory, or killed): run again with --jobs 1") from None
                except Exception as error:
                    failed[path] = f"{type(error).__name__}: {error}"
                bar.update(round(missing[path].cost / 1e9))
    finally:
        bar.close()
        pool.shutdown(wait=True, cancel_futures=True)
    if failed:
        first = next(iter(failed))
        raise StageFailed(f"{len(failed)} of {len(missing)} stages failed; first {first}: {failed[first]} (finished work is kept: run again to go on)")
    return ran
