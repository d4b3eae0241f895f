"""Runs a plan: what is missing, in dependency order, spread over processes with one thread each; prints the plan and its cost."""

from __future__ import annotations

import statistics
import sys

from .executors import Processes, WorkerDied, cores
from .store import Stage, Store

FLOPS_PER_SECOND = 4.5e10  # of one thread; only a first guess until this store holds a timed stage


class StageFailed(RuntimeError):
    """A stage raised; the message names the stage and the cause in one line."""


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


def run(stages: list[Stage], store: Store, jobs: int | None = None, stream=None, executor=None) -> list[str]:
    """Make every stage that the store lacks; returns the paths that ran. StageFailed after the rest is done where one raised."""
    missing = {item.path: item for item in stages if not store.has(item)}
    if not missing:
        return []
    from tqdm import tqdm

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
    executor = executor or Processes(min(jobs or cores(), len(missing)), store.home)
    try:
        waiting = dict(missing)
        while waiting or running:
            for path, item in list(waiting.items()):
                broken = next((n.path for n in item.inputs if n.path in failed), None)
                if broken:
                    failed[path] = f"needs {broken}, which failed"
                    del waiting[path]
            held = waiting.keys() | {item.path for item in running.values()}
            ready = sorted((i for i in waiting.values() if not any(n.path in held for n in i.inputs)), key=lambda i: -users[i.path])
            chosen = ready[: executor.slots - len(running)]
            for item in chosen:
                del waiting[item.path]
            running.update(executor.submit(chosen))
            if not running:
                break
            bar.set_postfix_str(" · ".join(sorted(item.path.rpartition("-")[0] for item in running.values()))[:48], refresh=out.isatty())
            for item, answer in executor.wait(running):
                if isinstance(answer, Exception):
                    failed[item.path] = f"{type(answer).__name__}: {answer}"
                elif answer:
                    ran.append(item.path)
                bar.update(round(item.cost / 1e9))
    except WorkerDied as error:
        raise StageFailed(str(error)) from None
    finally:
        bar.close()
        executor.close()
    if failed:
        first = next(iter(failed))
        raise StageFailed(f"{len(failed)} of {len(missing)} stages failed; first {first}: {failed[first]} (finished work is kept: run again to go on)")
    return ran
