"""Runs the missing stages of a plan in dependency order, longest chains first, by several workers."""

import sys
from collections.abc import Callable, Iterable
from graphlib import TopologicalSorter
from typing import Any, TextIO

from kn.suite.devices import worker_count
from kn.suite.executors import Processes, WorkerDied
from kn.suite.store import Stage, Store

BRIEF_FLOPS = 1e11  # a stage of a second that nothing long waits for comes first: its table is shown at once


class StageFailed(RuntimeError):
    """A stage raised; the message names stage and cause in one line, `errors` is {path: cause} of all."""

    def __init__(self, message: str, errors: dict[str, str] | None = None):
        super().__init__(message)
        self.errors = errors or {}


def missing_stages(stages: list[Stage], store: Store) -> dict[str, Stage]:
    """{path: stage} that the store lacks, in order, and damaged results that these stages would read."""
    missing: dict[str, Stage] = {}
    read: set[str] = set()
    for stage in reversed(stages):
        if not store.has(stage) or stage.path in read and store.find_corruption(stage, deep=True):
            missing[stage.path] = stage
            read.update(need.path for need in stage.inputs)
    return dict(reversed(missing.items()))


class Scheduler:
    """Hands out stages whose inputs are finished: brief ones, longest chains; failures fail dependents."""

    def __init__(self, missing: dict[str, Stage]):
        """`missing`: {path: stage} in dependency order."""
        self.missing = missing
        self.ready: set[str] = set()
        self.failed: dict[str, str] = {}  # path: error
        needs = {path: [n.path for n in stage.inputs if n.path in missing] for path, stage in missing.items()}
        chain = dict.fromkeys(missing, 0.0)  # FLOPs of the longest chain that starts with a stage
        for path in reversed(missing):
            chain[path] += missing[path].cost
            for need in needs[path]:
                chain[need] = max(chain[need], chain[path])
        self.order = sorted(missing, key=lambda path: (chain[path] >= BRIEF_FLOPS, -chain[path]))
        self.sorter = TopologicalSorter(needs)
        self.sorter.prepare()

    def take(self, count: int) -> list[Stage]:
        """At most `count` stages to start now."""
        while paths := self.sorter.get_ready():
            for path in paths:
                stage = self.missing[path]
                if broken := [need.path for need in stage.inputs if need.path in self.failed]:
                    self.finish(stage, f"needs {broken[0]}, which failed")
                else:
                    self.ready.add(path)
        taken = [path for path in self.order if path in self.ready][:count]
        self.ready.difference_update(taken)
        return [self.missing[path] for path in taken]

    def finish(self, stage: Stage, error: str = "") -> None:
        """Report that a stage ended, with the line of its error if it failed."""
        if error:
            self.failed[stage.path] = error
        self.sorter.done(stage.path)


def work(stage: Stage) -> int:
    """Part of the progress bar that is a stage's: its estimated FLOPs in millions, at least 1."""
    return max(1, round(stage.cost / 1e6))


def progress_bar(stages: Iterable[Stage], stream: TextIO) -> Any:
    """A tqdm bar over the work of the stages."""
    from tqdm import tqdm
    layout = "{desc} {percentage:3.0f}%|{bar}| {elapsed} elapsed, {remaining} left{postfix}"
    total, interactive = sum(map(work, stages)), stream.isatty()
    return tqdm(
        total=total, desc="stages", file=stream, ncols=100, mininterval=0.5 if interactive else 30,
        bar_format=layout + "\n" * (not interactive),
    )


def run(
    stages: list[Stage], store: Store, jobs: int | None = None, stream: TextIO | None = None,
    executor: Any = None, on_progress: Callable[[set[str]], object] | None = None,
) -> list[str]:
    """Make every stage that the store lacks; returns the paths of those that ran.
    `on_progress` is called in this process after every finished stage with the paths of all finished ones.
    StageFailed after everything else is done where a stage failed."""
    missing = missing_stages(stages, store)
    finished = {stage.path for stage in stages} - missing.keys()
    for stage in stages:
        if stage.path in finished:
            store.tidy(stage)
    if not missing:
        return []
    executor = executor or Processes(min(jobs or worker_count(), len(missing)), store.home)
    stream = stream or sys.stderr
    scheduler, bar = Scheduler(missing), progress_bar(missing.values(), stream)
    running: dict[Any, Stage] = {}
    ran: list[str] = []
    try:
        while running := running | executor.submit(scheduler.take(executor.slots - len(running))):
            names = sorted(stage.path.rpartition("-")[0] for stage in running.values())
            bar.set_postfix_str(" · ".join(names)[:48], refresh=stream.isatty())
            for stage, result in executor.wait(running):
                bar.update(work(stage))
                if isinstance(result, BaseException):
                    error = f"{type(result).__name__}: {str(result).strip()}"
                    scheduler.finish(stage, error.splitlines()[0].removesuffix(": "))
                    continue
                scheduler.finish(stage)
                finished.add(stage.path)
                if result:
                    ran.append(stage.path)
                if on_progress:
                    on_progress(set(finished))
    except WorkerDied as died:
        raise StageFailed(str(died)) from None
    finally:
        bar.close()
        executor.close()
    if failed := scheduler.failed:
        path, reason = next(iter(failed.items()))
        first = f"{len(failed)} of {len(missing)} stages failed; first {path}: {reason}"
        raise StageFailed(f"{first} (finished work is kept: run again to go on)", failed)
    return ran
