"""The averages of Tables 5 and 6 and their differences, with intervals over seeds and over tasks."""

from __future__ import annotations

import pandas

from kn.report.metrics import GLUE_ROWS, glue_score, informative, mean_over
from kn.report.statistics import Values, interval, two_way_interval

DIFFERENCES = (
    ("student", "baseline"), ("student_ilkd", "student"), ("student_ilkd", "baseline"),
    ("student_ilkd", "baseline_kd"),
    ("baseline_kd", "baseline"),
)
COLUMNS = ["table", "average", "value", "low", "high", "low_tasks", "high_tasks", "n", "tasks"]


def averages(number: int, records: list[dict]) -> pandas.DataFrame:
    """Averages over the informative tasks of Table 5 or 6, then differences paired by task and seed."""
    split, tasks = {5: "dev", 6: "test"}[number], informative(records)
    scores = {row: {task: glue_score(records, row, task, split).values for task in tasks}
              for row in GLUE_ROWS}
    lines = [_line(number, GLUE_ROWS[row], by_task) for row, by_task in scores.items()]
    for left, right in DIFFERENCES:
        differences = {
            task: {seed: a - scores[right][task][seed]
                   for seed, a in by_seed.items() if seed in scores[right][task]}
            for task, by_seed in scores[left].items()
        }
        lines.append(_line(number, f"{GLUE_ROWS[left]} − {GLUE_ROWS[right]}", differences))
    return pandas.DataFrame([line for line in lines if line], columns=COLUMNS)


def _line(number: int, name: str, by_task: dict[str, Values]) -> list | None:
    """A line of COLUMNS; None where no seed has all tasks."""
    seeds = list(mean_over(list(by_task.values())))
    if not seeds:
        return None
    kept = {task: {seed: values[seed] for seed in seeds} for task, values in by_task.items()}
    mean, low, high = interval([sum(values[seed] for values in kept.values()) / len(kept) for seed in seeds])
    return [number, name, mean, low, high, *two_way_interval(kept)[1:], len(seeds), len(kept)]
