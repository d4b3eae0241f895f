"""How each open reading of the paper, switched alone, moves the numbers and the verdicts."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pandas

from kn.report.labels import TASKS
from kn.report.metrics import after_ablation, average, select_metric
from kn.report.statistics import HELD, Values, interval, judge, paired_differences
from kn.suite.readings import SWITCHES

COLUMNS = ["reading", "switch", "quantity", "default", "switched", "effect", "low", "high", "n", "moved",
           "verdict by default", "verdict switched", "turned"]
Measure = Callable[[list[dict], str, tuple[str, ...]], Values]  # of records, a method and GLUE tasks


def _perplexity(records: list[dict], model: str, tasks: tuple[str, ...]) -> Values:
    return select_metric(records, "perplexity.wiki.test", "finetune_lm", model=model).values


def _dev_average(records: list[dict], row: str, tasks: tuple[str, ...]) -> Values:
    return average(records, row, "dev", tasks)


def _mnli(records: list[dict], objective: str, tasks: tuple[str, ...]) -> Values:
    return select_metric(records, "dev.f1", "finetune_glue", row=f"ablation_{objective}", task="mnli").values


@dataclass(frozen=True)
class Quantity:
    """A difference between two methods that a reading may move."""

    name: str
    side: int  # the sign the paper claims for it
    ratio: bool  # a difference of logarithms
    measure: Measure
    left: str
    right: str
    stage: str  # a record enters it if it is of this stage,
    prefix: str = ""  # and its row, or the text it is pre-trained on, begins so

    def values(self, records: list[dict], tasks: tuple[str, ...]) -> Values:
        """left − right by seed."""
        left, right = (self.measure(records, method, tasks) for method in (self.left, self.right))
        return paired_differences(left, right, self.ratio)

    def reads(self, record: dict) -> bool:
        """Whether a record enters it."""
        fields = record["fields"]
        name = fields.get("row") or fields.get("on") or ""
        return record["stage"] == self.stage and name.startswith(self.prefix)


QUANTITIES = (
    Quantity("Table 4: KnGPT2 / DistilGPT2, perplexity", -1, True,
             _perplexity, "student", "baseline", "finetune_lm"),
    Quantity("Table 7: LM / LM + KD, perplexity", -1, True,
             lambda records, arm, _: after_ablation(records, arm).values, "lm", "lm_kd", "pretrain", "wiki"),
    Quantity("Table 5: KnGPT2 − DistilGPT2", 1, False,
             _dev_average, "student", "baseline", "finetune_glue", "student"),
    Quantity("Table 5: KnGPT2 + ILKD − KnGPT2", 1, False,
             _dev_average, "student_ilkd", "student", "finetune_glue", "student"),
    Quantity("Table 7, MNLI f1: LM + KD − none", 1, False,
             _mnli, "lm_kd", "none", "finetune_glue", "ablation"),
)


def effects(records: list[dict], switched: dict[str, list[dict]]) -> pandas.DataFrame:
    """A line per reading and quantity that it moves (COLUMNS); `switched` has the records of each reading."""
    lines = [line for reading, changed in switched.items() for line in _lines(records, reading, changed)]
    return pandas.DataFrame(lines, columns=COLUMNS)


def _lines(records: list[dict], reading: str, changed: list[dict]) -> Iterator[list]:
    """The lines of one reading, at the seeds and GLUE tasks it was run with."""
    seeds = {record["fields"].get("seed") for record in changed}
    tuned = {record["fields"]["task"] for record in changed
             if record["stage"] == "finetune_glue" and record["fields"]["row"].startswith("student")}
    tasks = tuple(task for task in TASKS if task in tuned)
    default = [record for record in records if record["fields"].get("seed") in seeds | {None}]
    replaced = {(record["stage"], *sorted(record["fields"].items())): record
                for record in (*default, *changed)}
    section, field, value = SWITCHES[reading]
    for quantity in QUANTITIES:
        before, after = (quantity.values(chosen, tasks) for chosen in (default, list(replaced.values())))
        if not any(map(quantity.reads, changed)) or not before or not after:
            continue
        differences = paired_differences(after, before)
        moved = judge(differences, ratio=quantity.ratio)
        transform = math.exp if quantity.ratio else float
        means = [transform(interval(list(values.values()))[0]) for values in (before, after)]
        verdicts = [HELD[judge(values, side=quantity.side, ratio=quantity.ratio).holds]
                    for values in (before, after)]
        on_tasks = f" ({' and '.join(TASKS[task] for task in tasks)})" if "Table 5" in quantity.name else ""
        yield [reading, f"{section}.{field}={value}", quantity.name + on_tasks, *means, *moved[1:4],
               len(differences), "undecided" if moved.holds is None else "yes", *verdicts,
               "yes" if verdicts[0] != verdicts[1] else "no"]
