"""The averages of Tables 5 and 6 and their differences, with intervals over seeds and over tasks."""

import pandas

from kn.report.labels import GLUE_ROWS
from kn.report.metrics import glue_score, informative, mean_over
from kn.report.statistics import interval, two_way_interval

DIFFERENCES = (("student", "baseline"), ("student_ilkd", "student"), ("student_ilkd", "baseline"),
               ("student_ilkd", "baseline_kd"), ("baseline_kd", "baseline"))
COLUMNS = ["table", "average", "value", "low", "high", "low_tasks", "high_tasks", "n", "tasks"]


def averages(number: int, records: list[dict]) -> pandas.DataFrame:
    """Averages over the informative tasks of Table 5 or 6, then differences paired by task and seed."""
    split, tasks = {5: "dev", 6: "test"}[number], informative(records)
    scores = {row: {task: glue_score(records, row, task, split).values for task in tasks}
              for row in GLUE_ROWS}
    compared = {GLUE_ROWS[row]: by_task for row, by_task in scores.items()}
    for left, right in DIFFERENCES:
        compared[f"{GLUE_ROWS[left]} − {GLUE_ROWS[right]}"] = {
            task: {seed: score - scores[right][task][seed]
                   for seed, score in by_seed.items() if seed in scores[right][task]}
            for task, by_seed in scores[left].items()
        }
    lines = []
    for name, by_task in compared.items():
        if seeds := list(mean_over(list(by_task.values()))):  # those that have all tasks
            kept = {task: {seed: values[seed] for seed in seeds} for task, values in by_task.items()}
            means = [sum(values[seed] for values in kept.values()) / len(kept) for seed in seeds]
            lines.append([number, name, *interval(means), *two_way_interval(kept)[1:], len(seeds), len(kept)])
    return pandas.DataFrame(lines, columns=COLUMNS)
