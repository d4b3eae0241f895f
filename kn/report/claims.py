"""The ledger: every claim of the paper's text, judged from the paper's own printed numbers and from ours by the same rules.

    ledger(seeds)      one line per claim of kn/paper/claims.csv; `seeds` is report.by_seed(records), or its CSV read back
    printed_numbers()  what the paper printed, in the form of `seeds`

A verdict follows from a 95 % interval over seeds, paired by seed, that lies wholly on one side; numbers in which nothing is drawn
(counts, printed values) decide by themselves; a single seed leaves a claim undecided.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import permutations
from typing import TYPE_CHECKING, NamedTuple

from kn.files import BENCHMARKS
from kn.paper import claims, printed, value_of
from kn.report.statistics import Values, interval, paired
from kn.report.tables import GLUE_ROWS, SEED_COLUMNS, TASKS

if TYPE_CHECKING:
    import pandas

OURS = {True: "reproduced", False: "not reproduced", None: "undecided"}
PAPER = {True: "holds", False: "does not hold", None: "undecided"}
UNTESTABLE = "not testable here"
COLUMNS = ["id", "group", "section", "quote", "claim", "paper", "paper_value", "ours", "value", "low", "high", "n", "unit", "note", "judge", "left", "right", "bound", "variance"]


class Judged(NamedTuple):
    """A verdict (None: undecided) with what it was made from; n seeds, 0 where nothing is drawn."""

    holds: bool | None
    value: float
    low: float = math.nan
    high: float = math.nan
    n: int = 0
    unit: str = ""


class Missing(Exception):
    """A number that a claim needs is not there."""


class Numbers:
    """Values by seed (None where nothing is drawn) of every cell "table/row/column"; tasks that are uninformative are known."""

    def __init__(self, seeds: pandas.DataFrame):
        import pandas

        self.cells: dict[tuple[str, str, str], Values] = {}
        self.dull = set()
        for line in seeds.drop_duplicates(["table", "row", "column", "seed"]).itertuples():  # a cell's further metrics come after its own
            self.cells.setdefault((str(line.table), line.row, line.column), {})[None if pandas.isna(line.seed) else int(line.seed)] = float(line.value)
            if line.verdict == "uninformative":
                self.dull.add((str(line.table), line.column))

    def __call__(self, cell: str) -> Values:
        table, row, column = cell.split("/", 2)
        if not self.cells.get((table, row, column)):
            raise Missing(cell)
        return self.cells[table, row, column]

    def tasks(self, table: str) -> list[str]:
        """Columns of the tasks that are informative in a table."""
        return [task for task in TASKS.values() if (table, task) not in self.dull]


def printed_numbers() -> pandas.DataFrame:
    """Tables 3 to 7 as printed, with the columns of tables.SEED_COLUMNS; averages over the tasks are added up anew: the printed ones are truncated."""
    import pandas

    lines = []
    for number in range(3, 8):
        for cell in printed(number).itertuples():
            value = value_of(cell.value.removeprefix(">"))
            if value is not None and cell.column != "Average":
                lines.append([str(number), cell.row, cell.column, cell.metric, cell.unit, "", None, float(value), ""])
    for table in ("5", "6"):
        for row in GLUE_ROWS.values():
            scores = [line[7] for line in lines if line[:2] == [table, row]]
            lines.append([table, row, "Average (informative)", "mean of tasks", "%", "", None, math.fsum(scores) / len(scores), ""])
    return pandas.DataFrame(lines, columns=SEED_COLUMNS).astype({"seed": "Int64"})


def decide(values: Values, bound: float, side: int, ratio: bool = False, unit: str = "") -> Judged:
    """Are these values (with ratio: their exponentials) on the claimed side of a bound: +1 above it, −1 below?"""
    change = math.exp if ratio else float
    mean, low, high = interval(list(values.values()))
    if set(values) == {None}:
        return Judged(side * (change(mean) - bound) > 0, change(mean), unit=unit)
    holds = (
        None
        if math.isnan(low)
        else True
        if min(side * (change(low) - bound), side * (change(high) - bound)) > 0
        else False
        if max(side * (change(low) - bound), side * (change(high) - bound)) < 0
        else None
    )
    return Judged(holds, change(mean), change(low), change(high), len(values), unit)


def _differences(left: Values, right: Values, change: Callable[[float], float] = float) -> Values:
    pairs = paired(left, right)
    if not pairs:
        raise Missing("no seed in common")
    if change is math.log and min(value for pair in pairs.values() for value in pair) <= 0:
        raise Missing("a ratio to nothing: hours or bytes of a run cut short")
    return {seed: change(a) - change(b) for seed, (a, b) in pairs.items()}


def _above(numbers: Numbers, left: str, right: str, bound: str) -> Judged:
    return decide(_differences(numbers(left), numbers(right)), 0, 1, unit="points")


def _not_above(numbers: Numbers, left: str, right: str, bound: str) -> Judged:
    return decide(_differences(numbers(left), numbers(right)), 0, -1, unit="points")


def _ratio(side: int) -> Callable[[Numbers, str, str, str], Judged]:
    return lambda numbers, left, right, bound: decide(_differences(numbers(left), numbers(right), math.log), float(bound or 1), side, True, "ratio")


def _within(numbers: Numbers, left: str, right: str, bound: str) -> Judged:
    """Ours against the printed number itself: the right side is always the paper's."""
    wanted = Numbers(printed_numbers())(right)
    found = _differences(numbers(left), wanted)
    return decide({seed: abs(value) for seed, value in found.items()}, float(bound), -1, unit="million off")


def _above_bound(numbers: Numbers, left: str, right: str, bound: str) -> Judged:
    return decide(numbers(left), float(bound), 1, unit="times the teacher's")


def _each_task(numbers: Numbers, left: str, right: str) -> list[Judged]:
    table = left.partition("/")[0]
    return [decide(_differences(numbers(f"{left}/{task}"), numbers(f"{right}/{task}")), 0, 1) for task in numbers.tasks(table)]


def _count(found: list[Judged], needed: int) -> Judged:
    """At least `needed` of these hold; the value is how many do by their means."""
    sure, never = sum(f.holds is True for f in found), sum(f.holds is False for f in found)
    holds = True if sure >= needed else False if len(found) - never < needed else None
    return Judged(holds, sum(f.value > 0 for f in found), sure, len(found) - never, max(f.n for f in found), f"of {len(found)}")


def _most(numbers: Numbers, left: str, right: str, bound: str) -> Judged:
    found = _each_task(numbers, left, right)
    return _count(found, len(found) // 2 + 1)


def _all(numbers: Numbers, left: str, right: str, bound: str) -> Judged:
    found = _each_task(numbers, left, right)
    return _count(found, len(found))


def _above_each(numbers: Numbers, left: str, right: str, bound: str) -> Judged:
    found = [decide(_differences(numbers(cell), numbers(right)), 0, 1) for cell in left.split(";")]
    return _count(found, len(found))


def _recovers(numbers: Numbers, left: str, right: str, bound: str) -> Judged:
    table, column = left.partition("/")[0], "Average (informative)"
    student, base, teacher = (numbers(f"{row}/{column}") for row in (left, right, f"{table}/GPT-2 Small"))
    gained, lacking = _differences(student, base), _differences(teacher, base)
    return decide({seed: gained[seed] / lacking[seed] for seed in gained if lacking.get(seed)}, float(bound), 1, unit="of the gap")


def _reversed(numbers: Numbers, left: str, right: str, bound: str) -> Judged:
    """Is there a pair of which one has the lower perplexity and the lower score?"""
    found, values = [], []
    for a, b in permutations(left.split(";"), 2):
        easier = decide(_differences(numbers(f"{a}/Wikitext-103 (pp.)"), numbers(f"{b}/Wikitext-103 (pp.)"), math.log), 0, -1)
        worse = decide(_differences(numbers(f"{a}/MNLI (f1)"), numbers(f"{b}/MNLI (f1)")), 0, -1)
        found.append(Judged(False if False in (easier.holds, worse.holds) else True if easier.holds and worse.holds else None, 0, n=worse.n))
        values.append(easier.value < 0 and worse.value < 0)
    return _count(found, 1)._replace(value=sum(values), unit=f"of {len(found) // 2} pairs")


def _speed(numbers: Numbers, left: str, right: str, bound: str) -> Judged:
    import pandas

    case, variant = left.split("/")
    found = [frame[(frame["case"] == case) & (frame["variant"] == variant)] for frame in map(pandas.read_csv, sorted(BENCHMARKS.glob("speed-cpu.csv")))]
    if not found or found[0].empty:
        raise Missing(left)
    return Judged(bool(found[0]["ratio"].iloc[0] > 1), float(found[0]["ratio"].iloc[0]), n=int(found[0]["n"].iloc[0]), unit="times dense")


def _algebra(numbers: Numbers, left: str, right: str, bound: str) -> Judged:
    from kn.report import identities

    holds, value, unit = identities.CHECKS[left]()
    return Judged(holds, value, unit=unit)


JUDGES: dict[str, Callable[[Numbers, str, str, str], Judged]] = {
    "above": _above, "not above": _not_above, "below": _ratio(-1), "at most": _ratio(-1), "at least": _ratio(1), "within": _within, "above bound": _above_bound, "most": _most, "all": _all,
    "above each": _above_each, "recovers": _recovers, "reversed": _reversed, "speed": _speed, "algebra": _algebra,
}  # fmt: skip


def ledger(seeds: pandas.DataFrame) -> pandas.DataFrame:
    """Every claim with its quote, the verdict from the printed numbers and from ours (COLUMNS); what has not run says so."""
    import pandas

    ours, paper, lines = Numbers(seeds), Numbers(printed_numbers()), []
    for claim in claims().itertuples():
        by_paper, theirs = _judge(claim, paper, PAPER, "not printed")
        if claim.judge == "speed" or claim.judge == "untestable":
            by_paper, theirs = UNTESTABLE, Judged(None, math.nan)
        elif claim.variance and theirs.holds:
            by_paper = PAPER[None]  # on the claimed side, by one run without a variance
        by_ours, found = _judge(claim, ours, OURS, "not run")
        rule = [claim.note, claim.judge, claim.left, claim.right, claim.bound, claim.variance]
        lines.append([claim.id, _group(claim), claim.section, claim.quote, claim.claim, by_paper, theirs.value, by_ours, *found[1:], *rule])
    return pandas.DataFrame(lines, columns=COLUMNS)


def _group(claim) -> str:
    """What a claim rests on: a table of the paper, or something else."""
    if claim.judge in ("algebra", "untestable", "speed"):
        return {"algebra": "Algebra", "untestable": "Text alone", "speed": "Benchmark"}[claim.judge]
    table = claim.left.partition("/")[0]
    return f"Table {table}" if table.isdigit() else "Beyond the paper"


def _judge(claim, numbers: Numbers, words: dict, missing: str) -> tuple[str, Judged]:
    if claim.judge == "untestable":
        return UNTESTABLE, Judged(None, math.nan)
    try:
        found = JUDGES[claim.judge](numbers, claim.left, claim.right, claim.bound)
    except Missing:
        return missing, Judged(None, math.nan)
    return words[found.holds], found
