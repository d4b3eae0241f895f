"""Metrics of finished stages, selected by stage and fields and kept per seed: what every table is made of.

A record is {"stage", "fields", "metrics", "path", "provenance"}, as Store.record gives it. Scores are
percentages, perplexities plain numbers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from kn.report.labels import TASKS
from kn.report.statistics import Values

INFORMATIVE_MARGIN = 5.0  # points by which the teacher must lead the best simple baseline of a task


def nested(value: Any, path: str) -> Any:
    """The entry at a dotted path of nested dictionaries, None where there is none."""
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


@dataclass
class SeedValues:
    """A metric by seed, and the paths of the stages it comes from.
    The seed is None where nothing is random. Of several stages of one seed the last counts; where all GLUE
    tasks are kept, the keys are (task, seed)."""

    values: dict[Any, Any] = field(default_factory=dict)
    stages: list[str] = field(default_factory=list)

    def map(self, function: Callable[[Any], Any]) -> SeedValues:
        """The function applied to every value."""
        return SeedValues({seed: function(value) for seed, value in self.values.items()}, self.stages)

    def get(self, path: str) -> SeedValues:
        """The entries at a dotted path of values that are dictionaries; empty where none has one."""
        entries = {seed: nested(value, path) for seed, value in self.values.items()}
        found = {seed: entry for seed, entry in entries.items() if entry is not None}
        return SeedValues(found, self.stages if found else [])

    def mean(self) -> float | None:
        """The mean over seeds; None without a value."""
        return statistics.fmean(self.values.values()) if self.values else None


def select_metric(records: Iterable[dict], path: str, stage: str, **fields: object) -> SeedValues:
    """The metric at a dotted path, of the records of a stage whose fields match; others are skipped.

    A path that begins with "provenance." reads the provenance instead. Raises ValueError for a number that
    is not finite.
    """
    found = SeedValues()
    for record in records:
        if record["stage"] != stage or any(record["fields"].get(key) != fields[key] for key in fields):
            continue
        value = nested(record, path if path.startswith("provenance.") else f"metrics.{path}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{record['path']}: {path} is {value}, no number for a table")
        if value is not None:
            found.values[record["fields"].get("seed")] = value
            found.stages.append(record["path"])
    return found


def before_finetuning(records: list[dict], model: str, path: str = "perplexity.wiki.test") -> SeedValues:
    """A metric of the "teacher", "baseline" or "student" before it is fine-tuned."""
    if model == "student":
        return select_metric(records, path, "pretrain", on="web", objective="lm_kd")
    return select_metric(records, path, "pretrained", model=model)


def after_ablation(records: list[dict], objective: str, path: str = "perplexity.wiki.test") -> SeedValues:
    """A metric right after the pre-training on WikiText-103 (Table 7); objective "none" is the SVD start."""
    if objective == "none":
        return select_metric(records, path, "decompose")
    return select_metric(records, path, "pretrain", on="wiki", objective=objective)


def glue_score(records: list[dict], row: str, task: str, split: str = "dev") -> SeedValues:
    """The headline score of a task in percent; the split is "dev" or "test"."""
    return select_metric(records, f"{split}.headline", "finetune_glue", row=row, task=task)


def simple_baselines(records: list[dict], task: str) -> dict[str, SeedValues]:
    """Dev scores of methods without a pre-trained model; of the two one-sentence models the better one."""
    random, *single = (select_metric(records, "dev.headline", "twin_check", task=task, kind=kind)
                       for kind in ("random", "first_sentence", "second_sentence"))
    return {"Majority class": select_metric(records, f"{task}.majority.headline", "twins"),
            "Word list": select_metric(records, f"{task}.word_list.headline", "twins"),
            "Random initialisation": random,
            "One sentence only": max(single, key=lambda found: (bool(found.values), found.mean()))}


def informative(records: list[dict]) -> list[str]:
    """The GLUE tasks on which the teacher leads the best simple baseline by INFORMATIVE_MARGIN."""
    result = []
    for task in TASKS:
        teacher = glue_score(records, "teacher", task).mean()
        means = (found.mean() for found in simple_baselines(records, task).values())
        scores = [mean for mean in means if mean is not None]
        if teacher is None or not scores or teacher - max(scores) >= INFORMATIVE_MARGIN:
            result.append(task)
    return result


def average(records: list[dict], row: str, split: str = "dev", tasks: Iterable[str] = tuple(TASKS)) -> Values:
    """The mean headline score over the tasks in percent, for each seed that has them all."""
    return mean_over([glue_score(records, row, task, split).values for task in tasks])


def mean_over(scores: list[Values]) -> Values:
    """The mean of several metrics for each seed that has them all."""
    seeds = [seed for seed in scores[0] if all(seed in other for other in scores)] if scores else []
    return {seed: statistics.fmean(values[seed] for values in scores) for seed in seeds}
