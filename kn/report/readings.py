"""Every reading of the paper that could turn a verdict, switched one at a time: which stages that changes, and what it does to the numbers.

stages(profile, name, seeds, tasks)   the stages of one switched reading that are not those of the default
effects(records, switched)            per reading and quantity: by default, switched, the difference paired by seed, the two verdicts
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from kn.report.statistics import Values, interval, paired
from kn.report.tables import TASKS, ablated, average, find
from kn.suite.readings import SWITCHES

if TYPE_CHECKING:
    import pandas

COLUMNS = ["reading", "switch", "quantity", "default", "switched", "effect", "low", "high", "n", "moved", "verdict by default", "verdict switched", "turned"]


def _ratio(left: Values, right: Values) -> Values:
    return {seed: math.log(a) - math.log(b) for seed, (a, b) in paired(left, right).items()}


def _points(left: Values, right: Values) -> Values:
    return {seed: a - b for seed, (a, b) in paired(left, right).items()}


def _glue(left: str, right: str) -> Callable[[list[dict], tuple[str, ...]], Values]:
    return lambda records, tasks: _points(*(average(records, row, "dev", tasks) for row in (left, right)))


QUANTITIES: dict[str, tuple[int, bool, Callable[[list[dict], tuple[str, ...]], Values]]] = {  # (claimed side, ratio, values by seed)
    "Table 4: KnGPT2 / DistilGPT2, perplexity": (-1, True, lambda r, _: _ratio(*(find(r, "perplexity.wiki.test", "finetune_lm", model=m).values for m in ("student", "baseline")))),
    "Table 7: LM / LM + KD, perplexity": (-1, True, lambda r, _: _ratio(ablated(r, "lm").values, ablated(r, "lm_kd").values)),
    "Table 5: KnGPT2 − DistilGPT2": (1, False, _glue("student", "baseline")),
    "Table 5: KnGPT2 + ILKD − KnGPT2": (1, False, _glue("student_ilkd", "student")),
    "Table 7, MNLI f1: LM + KD − none": (1, False, lambda r, _: _points(*(find(r, "dev.f1", "finetune_glue", row=f"ablation_{a}", task="mnli").values for a in ("lm_kd", "none")))),
}


def effects(records: list[dict], others: dict[str, list[dict]]) -> pandas.DataFrame:
    """A line per reading and quantity that it moves (COLUMNS); `others` are the records of stages() by reading, joined over the default ones by what they are of."""
    import pandas

    lines = []
    for name, changed in others.items():
        seeds = {record["fields"].get("seed") for record in changed}
        tasks = tuple(task for task in TASKS if any(record["fields"].get("task") == task and record["fields"]["row"].startswith("student") for record in changed))
        default = [record for record in records if record["fields"].get("seed") in seeds | {None}]
        named = {_name(record): record for record in default} | {_name(record): record for record in changed}
        for quantity, (side, ratio, values) in QUANTITIES.items():
            before, after = values(default, tasks), values(list(named.values()), tasks)
            if not _touches(quantity, changed) or not before or not after:
                continue
            both = paired(after, before)
            moved = interval([a - b for a, b in both.values()])
            kind = math.exp if ratio else float
            verdicts = [_verdict(values, side) for values in (before, after)]
            means = [interval(list(values.values()))[0] for values in (before, after)]
            shown = f"{quantity} ({' and '.join(TASKS[t] for t in tasks)})" if "Table 5" in quantity else quantity
            lines.append([name, "=".join((".".join(SWITCHES[name][:2]), str(SWITCHES[name][2]))), shown, *map(kind, means), *map(kind, moved), len(both),
                          "yes" if min(moved[1:]) > 0 or max(moved[1:]) < 0 else "undecided", *verdicts, "yes" if verdicts[0] != verdicts[1] else "no"])  # fmt: skip
    return pandas.DataFrame(lines, columns=COLUMNS)


def _name(record: dict) -> tuple:
    return record["stage"], tuple(sorted(record["fields"].items(), key=str))


def _verdict(values: Values, side: int) -> str:
    _, low, high = interval(list(values.values()))
    if math.isnan(low):
        return "undecided"
    return "held" if min(side * low, side * high) > 0 else "not held" if max(side * low, side * high) < 0 else "undecided"


def _touches(quantity: str, changed: list[dict]) -> bool:
    """Do these stages enter the quantity at all?"""
    wanted = {
        "Table 4": lambda r: r["stage"] == "finetune_lm", "Table 7: LM": lambda r: r["stage"] == "pretrain" and r["fields"]["on"] == "wiki",
        "Table 5": lambda r: r["stage"] == "finetune_glue" and r["fields"]["row"].startswith("student"),
        "Table 7, MNLI": lambda r: r["stage"] == "finetune_glue" and r["fields"]["row"].startswith("ablation"),
    }  # fmt: skip
    return any(test(record) for key, test in wanted.items() if quantity.startswith(key) for record in changed)
