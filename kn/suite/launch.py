"""Runs a plan: what is missing, in dependency order, spread over processes with one thread each; prints the plan and its cost."""

from __future__ import annotations

import sys
from typing import Any

from kn.suite import cost
from kn.suite.devices import cores, gpus
from kn.suite.executors import Processes, WorkerDied
from kn.suite.store import Stage, Store


class StageFailed(RuntimeError):
    """A stage raised; the message names the stage and the cause in one line."""


def clock(seconds: float) -> str:
    """1 h 02 min, 3 min 20 s or 5 s."""
    seconds = round(seconds)
    if seconds >= 3600:
        return f"{seconds // 3600:,} h {seconds % 3600 // 60:02d} min"
    return f"{seconds // 60} min {seconds % 60:02d} s" if seconds >= 60 else f"{seconds} s"


def describe(stages: list[Stage], store: Store, timed: dict, jobs: int | None = None) -> str:
    """The plan as text: per kind, how many stages are done and to do, their steps, tokens and FLOPs, and about how long the rest takes; disk and memory."""
    jobs = jobs or slots()
    head = ("stage", "done", "to do", "steps", "tokens", "FLOP", "about")
    lines, total, room = ["{:<14}{:>6}{:>7}{:>11}{:>9}{:>9}{:>17}".format(*head)], 0.0, 0.0
    for kind in dict.fromkeys(item.kind for item in stages):
        mine = [item for item in stages if item.kind == kind]
        todo = [item for item in mine if not store.has(item)]
        spent = sum(cost.seconds(item, timed) for item in todo)
        total, room = total + spent, room + sum(cost.disk(item, timed) for item in todo)
        steps, tokens, flops = sum(i.steps for i in todo), sum(i.tokens for i in todo), sum(i.cost for i in todo)
        cells = (f"{steps:,}" if steps else "-", short(tokens) if tokens else "-", short(flops) if flops else "-", clock(spent) if todo else "-")
        lines.append("{:<14}{:>6}{:>7}{:>11}{:>9}{:>9}{:>17}".format(kind, len(mine) - len(todo), len(todo), *cells))
    chain = longest(stages, store, timed)
    about = clock(max(total / jobs, chain)) if total else "nothing"
    lines.append(f"in all about {about} with {jobs} {'process' if jobs == 1 else 'processes'} ({clock(total)} of work, the longest chain {clock(chain)})")
    lines.append(f"about {room / 1e9:.2g} GB of disk in {store.home}, {timed['peak_bytes'] / 1e9:.2g} GB of memory a training; timed on {timed['device']} by a few steps of each kind of training")
    rates = ", ".join(f"{name} {timed['tokens'][kind] / timed['seconds'][kind]:,.0f}" for kind, name in cost.TITLES.items())
    lines.append(f"tokens a second and process: {rates}")
    return "\n".join(lines)


def slots() -> int:
    """Processes side by side: one a GPU, or one a processor."""
    return len(gpus()) or cores()


def longest(stages: list[Stage], store: Store, timed: dict) -> float:
    """Seconds of the longest chain of missing stages that need one another."""
    ends: dict[str, float] = {}
    for item in stages:
        mine = 0.0 if store.has(item) else cost.seconds(item, timed)
        ends[item.path] = mine + max((ends[need.path] for need in item.inputs), default=0.0)
    return max(ends.values(), default=0.0)


def short(number: float) -> str:
    """1.2 M, 3.4 G."""
    unit = next((u for u in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")) if number >= u[0]), (1, ""))
    return f"{number / unit[0]:.3g} {unit[1]}".strip()


def missing_stages(stages: list[Stage], store: Store) -> dict[str, Stage]:
    """What the store lacks, in order, and what of its files these stages would read and find changed."""
    found: dict[str, Stage] = {}
    read: set[str] = set()
    for item in reversed(stages):
        if not store.has(item) or item.path in read and store.find_corruption(item, deep=True):
            found[item.path] = item
            read.update(need.path for need in item.inputs)
    return dict(reversed(found.items()))


def one_line(error: BaseException) -> str:
    """Kind and first line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def run(stages: list[Stage], store: Store, jobs: int | None = None, stream=None, executor=None) -> list[str]:
    """Make every stage that the store lacks; returns the paths that ran. StageFailed after the rest is done where one raised."""
    missing = missing_stages(stages, store)
    for item in stages:
        if item.path not in missing:
            store.tidy(item)
    if not missing:
        return []
    from tqdm import tqdm

    users = {path: 0.0 for path in missing}  # cost of the longest chain that starts with this stage: long chains first
    for item in reversed(list(missing.values())):
        users[item.path] += item.cost
        for need in item.inputs:
            if need.path in users:
                users[need.path] = max(users[need.path], users[item.path])
    failed: dict[str, str] = {}
    running: dict[Any, Stage] = {}
    ran: list[str] = []
    out = stream or sys.stderr
    bar = tqdm(
        total=round(sum(i.cost for i in missing.values()) / 1e9), desc="stages", file=out, mininterval=0.5 if out.isatty() else 30, ncols=100,
        bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed} elapsed, {remaining} left{postfix}" + ("" if out.isatty() else "\n"),
    )  # fmt: skip
    executor = executor or Processes(min(jobs or slots(), len(missing)), store.home)
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
                if isinstance(answer, BaseException):
                    failed[item.path] = one_line(answer)
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
