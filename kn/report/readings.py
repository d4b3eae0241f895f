"""How each open reading of the paper, switched alone, moves the numbers and the verdicts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pandas

from kn.report.metrics import TASKS, after_ablation, average, select_metric
from kn.report.statistics import HELD, Values, interval, judge, paired, paired_differences
from kn.suite.readings import SWITCHES

COLUMNS = [
    "reading", "switch", "quantity", "default", "switched", "effect", "low", "high", "n", "moved",
    "verdict by default", "verdict switched", "turned",
]
Measure = Callable[[list[dict], tuple[str, ...]], Values]  # of records and GLUE tasks


@dataclass(frozen=True)
class Quantity:
    """A difference between two methods that a reading may move."""

    name: str
    side: int  # the sign the paper claims for it
    ratio: bool  # a difference of logarithms
    values: Measure
    reads: Callable[[dict], bool]  # does a record enter it


def _perplexity(model: str) -> Measure:
    return lambda records, _: select_metric(records, "perplexity.wiki.test", "finetune_lm",
                                            model=model).values


def _ablation(objective: str) -> Measure:
    return lambda records, _: after_ablation(records, objective).values


def _mnli(objective: str) -> Measure:
    return lambda records, _: select_metric(records, "dev.f1", "finetune_glue", row=f"ablation_{objective}",
                                            task="mnli").values


def _glue(row: str) -> Measure:
    return lambda records, tasks: average(records, row, "dev", tasks)


def _difference(left: Measure, right: Measure, ratio: bool = False) -> Measure:
    return lambda records, tasks: paired_differences(left(records, tasks), right(records, tasks), ratio)


def _glue_of(prefix: str) -> Callable[[dict], bool]:
    return lambda record: record["stage"] == "finetune_glue" and record["fields"]["row"].startswith(prefix)


def _finetune_lm(record: dict) -> bool:
    return record["stage"] == "finetune_lm"


def _pretrain_wiki(record: dict) -> bool:
    return record["stage"] == "pretrain" and record["fields"]["on"] == "wiki"


QUANTITIES = (
    Quantity(
        "Table 4: KnGPT2 / DistilGPT2, perplexity", -1, True,
        _difference(_perplexity("student"), _perplexity("baseline"), True), _finetune_lm,
    ),
    Quantity(
        "Table 7: LM / LM + KD, perplexity", -1, True, _difference(_ablation("lm"), _ablation("lm_kd"), True),
        _pretrain_wiki,
    ),
    Quantity(
        "Table 5: KnGPT2 − DistilGPT2", 1, False, _difference(_glue("student"), _glue("baseline")),
        _glue_of("student"),
    ),
    Quantity(
        "Table 5: KnGPT2 + ILKD − KnGPT2", 1, False, _difference(_glue("student_ilkd"), _glue("student")),
        _glue_of("student"),
    ),
    Quantity(
        "Table 7, MNLI f1: LM + KD − none", 1, False, _difference(_mnli("lm_kd"), _mnli("none")),
        _glue_of("ablation"),
    ),
)


def effects(records: list[dict], switched: dict[str, list[dict]]) -> pandas.DataFrame:
    """A line per reading and quantity that it moves (COLUMNS); `switched` has the records of each reading."""
    lines = [line for reading, changed in switched.items() for line in _lines(records, reading, changed)]
    return pandas.DataFrame(lines, columns=COLUMNS)


def _lines(records: list[dict], reading: str, changed: list[dict]) -> Iterator[list]:
    """The lines of one reading, at the seeds and GLUE tasks it was run with."""
    seeds = {record["fields"].get("seed") for record in changed}
    tasks = tuple(
        task for task in TASKS
        if any(record["fields"].get("task") == task and _glue_of("student")(record) for record in changed)
    )
    default = [record for record in records if record["fields"].get("seed") in seeds | {None}]
    replaced = {_identity(record): record for record in (*default, *changed)}
    section, field, value = SWITCHES[reading]
    for quantity in QUANTITIES:
        before, after = (quantity.values(chosen, tasks) for chosen in (default, list(replaced.values())))
        if not any(map(quantity.reads, changed)) or not before or not after:
            continue
        pairs = paired(after, before)
        moved = judge({seed: a - b for seed, (a, b) in pairs.items()}, ratio=quantity.ratio)
        verdicts = [HELD[judge(values, side=quantity.side, ratio=quantity.ratio).holds]
                    for values in (before, after)]
        transform = math.exp if quantity.ratio else float
        means = [transform(interval(list(values.values()))[0]) for values in (before, after)]
        on_tasks = f" ({' and '.join(TASKS[task] for task in tasks)})" if "Table 5" in quantity.name else ""
        yield [
            reading, f"{section}.{field}={value}", quantity.name + on_tasks, *means, *moved[1:4], len(pairs),
            "undecided" if moved.holds is None else "yes", *verdicts,
            "yes" if verdicts[0] != verdicts[1] else "no",
        ]


def _identity(record: dict) -> tuple:
    return record["stage"], tuple(sorted(record["fields"].items(), key=str))
