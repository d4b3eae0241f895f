"""The averages of Tables 5 and 6 and their differences, with two intervals: over seeds (these tasks), and over tasks and seeds (other tasks of the kind)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kn.report.statistics import Values, interval, two_way_interval
from kn.report.tables import GLUE_ROWS, find, informative

if TYPE_CHECKING:
    import pandas

DIFFERENCES = (("student", "baseline"), ("student_ilkd", "student"), ("student_ilkd", "baseline"), ("student_ilkd", "baseline_kd"), ("baseline_kd", "baseline"))
COLUMNS = ["table", "average", "value", "low", "high", "low_tasks", "high_tasks", "n", "tasks"]


def averages(number: int, records: list[dict]) -> pandas.DataFrame:
    """Lines (COLUMNS) of Table 5 (dev) or 6 (test), in points: each row's average over the informative tasks, then the differences of rows, paired by task and seed."""
    import pandas

    split, tasks = {5: "dev", 6: "test"}[number], informative(records)
    scores = {row: {task: find(records, f"{split}.headline", "finetune_glue", row=row, task=task).values for task in tasks} for row in GLUE_ROWS}
    lines = [_line(number, GLUE_ROWS[row], by_task) for row, by_task in scores.items()]
    for left, right in DIFFERENCES:
        apart = {task: {seed: a - scores[right][task][seed] for seed, a in by_seed.items() if seed in scores[right][task]} for task, by_seed in scores[left].items()}
        lines.append(_line(number, f"{GLUE_ROWS[left]} − {GLUE_ROWS[right]}", apart))
    return pandas.DataFrame([line for line in lines if line], columns=COLUMNS)


def _line(number: int, name: str, by_task: dict[str, Values]) -> list | None:
    """None where no seed has all tasks."""
    seeds = [seed for seed in next(iter(by_task.values()), {}) if all(seed in values for values in by_task.values())]
    if not seeds:
        return None
    kept = {task: {seed: values[seed] for seed in seeds} for task, values in by_task.items()}
    mean, low, high = interval([sum(values[seed] for values in kept.values()) / len(kept) for seed in seeds])
    return [number, name, mean, low, high, *two_way_interval(kept)[1:], len(seeds), len(kept)]
