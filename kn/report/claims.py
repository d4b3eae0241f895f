"""The ledger: every claim of the paper's text, judged from its printed numbers and from ours.

A verdict follows from a 95 % interval over seeds, paired by seed, that lies entirely on one side. Numbers in
which nothing is random (counts, printed values) decide by themselves; a single seed leaves a claim undecided.
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Callable
from itertools import permutations, product

import pandas

from kn.files import BENCHMARKS
from kn.paper import claims, printed, value_of
from kn.report.labels import GLUE_ROWS, TASKS
from kn.report.statistics import REPRODUCED, Values, Verdict, judge, paired, paired_differences
from kn.report.table_builder import SEED_COLUMNS

HOLDS = {True: "holds", False: "does not hold", None: "undecided"}
OTHER_GROUPS = {"algebra": "Algebra", "untestable": "Text alone", "speed": "Benchmark"}  # resting on no table
UNTESTABLE, NO_VERDICT = "not testable here", Verdict(None, math.nan)
AVERAGE, PERPLEXITY, MNLI = "Average (informative)", "Wikitext-103 (pp.)", "MNLI (f1)"  # columns
COLUMNS = ["id", "group", "section", "quote", "claim", "paper", "paper_value", "ours", "value", "low", "high",
           "n", "unit", "note", "judge", "left", "right", "bound", "variance"]


class MissingNumber(Exception):
    """A number that a claim needs is not there."""


class Numbers:
    """Values by seed of every cell "table/row/column", and the informative tasks of each table."""

    def __init__(self, seeds: pandas.DataFrame):
        self.cells: dict[str, Values] = defaultdict(dict)
        self.uninformative = set()
        # the first metric of a cell is its own; further ones follow
        for line in seeds.drop_duplicates(["table", "row", "column", "seed"]).itertuples():
            seed = None if pandas.isna(line.seed) else int(line.seed)
            self.cells[f"{line.table}/{line.row}/{line.column}"][seed] = float(line.value)
            if line.verdict == "uninformative":
                self.uninformative.add((str(line.table), line.column))

    def __call__(self, cell: str) -> Values:
        if cell not in self.cells:
            raise MissingNumber(cell)
        return self.cells[cell]

    def difference(self, left: str, right: str, ratio: bool = False) -> Values:
        """left − right by seed; with ratio of logarithms; MissingNumber where there is none."""
        pairs = paired(self(left), self(right))
        if not pairs:
            raise MissingNumber("no seed in common")
        if ratio and min(value for pair in pairs.values() for value in pair) <= 0:
            raise MissingNumber("a ratio to zero: hours or bytes of a run cut short")
        return paired_differences(self(left), self(right), ratio)

    def tasks(self, table: str) -> list[str]:
        """Columns of the tasks that are informative in a table."""
        return [task for task in TASKS.values() if (table, task) not in self.uninformative]


def printed_numbers() -> pandas.DataFrame:
    """Tables 3 to 7 as printed (SEED_COLUMNS); averages are computed anew, the printed ones are truncated."""
    lines = [[str(number), cell.row, cell.column, cell.metric, cell.unit, "", None, float(value), ""]
             for number in range(3, 8) for cell in printed(number).itertuples()
             if (value := value_of(cell.value.removeprefix(">"))) is not None and cell.column != "Average"]
    for table, row in product(("5", "6"), GLUE_ROWS.values()):
        mean = statistics.fmean(line[7] for line in lines if line[:2] == [table, row])
        lines.append([table, row, AVERAGE, "mean of tasks", "%", "", None, mean, ""])
    return pandas.DataFrame(lines, columns=SEED_COLUMNS).astype({"seed": "Int64"})


Judge = Callable[[Numbers, str, str, str], Verdict]


def _difference_judge(side: int) -> Judge:
    return lambda numbers, left, right, _: judge(numbers.difference(left, right), side=side, unit="points")


def _ratio_judge(side: int) -> Judge:
    return lambda numbers, left, right, bound: judge(
        numbers.difference(left, right, ratio=True), float(bound or 1), side, ratio=True, unit="ratio")


def _within(numbers: Numbers, left: str, right: str, bound: str) -> Verdict:
    """Ours against the printed number itself: the right side is always the paper's."""
    differences = paired_differences(numbers(left), Numbers(printed_numbers())(right))
    return judge({seed: abs(value) for seed, value in differences.items()}, float(bound), -1,
                 unit="million off")


def _at_least(found: list[Verdict], needed: int) -> Verdict:
    """Whether at least `needed` hold; value: how many do by their means, low: surely, high: possibly."""
    surely, possibly = sum(v.holds is True for v in found), sum(v.holds is not False for v in found)
    holds = True if surely >= needed else False if possibly < needed else None
    by_means = sum(v.value > 0 for v in found)
    return Verdict(holds, by_means, surely, possibly, max(v.n for v in found), f"of {len(found)}")


def _task_judge(needed: Callable[[int], int]) -> Judge:
    """Of n informative tasks, left is above right in at least needed(n)."""
    def judge_tasks(numbers: Numbers, left: str, right: str, bound: str) -> Verdict:
        tasks = numbers.tasks(left.partition("/")[0])
        found = [judge(numbers.difference(f"{left}/{task}", f"{right}/{task}")) for task in tasks]
        if not found:  # the teacher learned none of them: nothing can be said
            return Verdict(None, 0, 0, 0, 0, "of 0")
        return _at_least(found, needed(len(found)))

    return judge_tasks


def _above_each(numbers: Numbers, left: str, right: str, bound: str) -> Verdict:
    found = [judge(numbers.difference(cell, right)) for cell in left.split(";")]
    return _at_least(found, len(found))


def _recovers(numbers: Numbers, left: str, right: str, bound: str) -> Verdict:
    """The share of the gap between `right` and the teacher that `left` closes."""
    teacher = f"{left.partition('/')[0]}/GPT-2 Small/{AVERAGE}"
    gained = numbers.difference(f"{left}/{AVERAGE}", f"{right}/{AVERAGE}")
    gap = numbers.difference(teacher, f"{right}/{AVERAGE}")
    return judge({seed: gained[seed] / gap[seed] for seed in gained if gap.get(seed)}, float(bound),
                 unit="of the gap")


def _reversed(numbers: Numbers, left: str, right: str, bound: str) -> Verdict:
    """Is there a pair of which one has the lower perplexity and the lower score?"""
    found, by_means = [], 0
    for a, b in permutations(left.split(";"), 2):
        fluent = judge(numbers.difference(f"{a}/{PERPLEXITY}", f"{b}/{PERPLEXITY}", ratio=True), side=-1,
                       ratio=True)
        worse = judge(numbers.difference(f"{a}/{MNLI}", f"{b}/{MNLI}"), side=-1)
        both = (fluent.holds, worse.holds)
        found.append(Verdict(False if False in both else None if None in both else True, 0, n=worse.n))
        by_means += fluent.value < 1 and worse.value < 0
    return _at_least(found, 1)._replace(value=by_means, unit=f"of {len(found) // 2} pairs")


def _speed(numbers: Numbers, left: str, right: str, bound: str) -> Verdict:
    path = BENCHMARKS / "speed-cpu.csv"
    for line in pandas.read_csv(path).to_dict("records") if path.exists() else []:
        if f"{line['case']}/{line['variant']}" == left:
            return Verdict(line["ratio"] > 1, float(line["ratio"]), n=int(line["n"]), unit="times dense")
    raise MissingNumber(left)


def _algebra(numbers: Numbers, left: str, right: str, bound: str) -> Verdict:
    from kn.report.identities import CHECKS

    holds, value, unit = CHECKS[left]()
    return Verdict(holds, value, unit=unit)


TIMES_TEACHER = "times the teacher's"
JUDGES: dict[str, Judge] = {
    "above": _difference_judge(1), "not above": _difference_judge(-1), "above each": _above_each,
    "above bound": lambda numbers, left, right, bound: judge(numbers(left), float(bound), unit=TIMES_TEACHER),
    "below": _ratio_judge(-1), "at most": _ratio_judge(-1),
    "at least": _ratio_judge(1), "within": _within, "most": _task_judge(lambda n: n // 2 + 1),
    "all": _task_judge(lambda n: n), "recovers": _recovers, "reversed": _reversed, "speed": _speed,
    "algebra": _algebra,
}


def ledger(seeds: pandas.DataFrame) -> pandas.DataFrame:
    """A line per claim of kn/paper/claims.csv, judged by printed numbers and by report.by_seed(records)."""
    ours, paper, lines = Numbers(seeds), Numbers(printed_numbers()), []
    for claim in claims().itertuples():
        table = claim.left.partition("/")[0]
        group = f"Table {table}" if table.isdigit() else "Beyond the paper"
        by_paper, theirs = _judge_claim(claim, paper, HOLDS, "not printed")
        if claim.judge == "speed":
            by_paper, theirs = UNTESTABLE, NO_VERDICT
        elif claim.variance and theirs.holds:
            by_paper = HOLDS[None]  # on the claimed side, but by one run without a variance
        by_ours, found = _judge_claim(claim, ours, REPRODUCED, "not run")
        lines.append([claim.id, OTHER_GROUPS.get(claim.judge, group), claim.section, claim.quote, claim.claim,
                      by_paper, theirs.value, by_ours, *found[1:],
                      claim.note, claim.judge, claim.left, claim.right, claim.bound, claim.variance])
    return pandas.DataFrame(lines, columns=COLUMNS)


def _judge_claim(claim, numbers: Numbers, words: dict, missing: str) -> tuple[str, Verdict]:
    """The word for a claim's verdict, and the verdict; `missing` where a number that it needs is missing."""
    if claim.judge == "untestable":
        return UNTESTABLE, NO_VERDICT
    try:
        verdict = JUDGES[claim.judge](numbers, claim.left, claim.right, claim.bound)
    except MissingNumber:
        return missing, NO_VERDICT
    return words[verdict.holds], verdict
