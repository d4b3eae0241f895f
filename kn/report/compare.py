"""A report against another one of the same profile: which cells agree within what another machine moves.

Training amplifies another processor's rounding until a number moves about as far as with another seed. So
the tolerance of a measured cell is DEVIATIONS standard deviations of one seed, pooled over cells of the same
kind in the reference, at least MIN_RELATIVE of the value; shapes, counts and hyper-parameters must be equal.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from kn.files import PROJECT_ROOT
from kn.paper import TABLES, read_csv_as_text, value_of

if TYPE_CHECKING:
    import pandas

KEYS = ["table", "row", "column", "metric"]  # columns that name a cell
DEVIATIONS = 4
MIN_RELATIVE = 0.01  # what has no spread over seeds (nothing is trained) still differs in rounding
COMPARISON = "comparison.txt"  # in a report's folder: how it compares with the published one
OF_THE_MACHINE = ("hours", "device")  # metrics that say where a run was made, not what it gave
EXACT = ("shape", "count", "hyper-parameter", "parameters", "parameters without the output embedding",
         "steps", "tokens", "data", "weights")
PRECISION = "Precision"  # a hyper-parameter that is chosen by what the processor can do
PERPLEXITY = ("perplexity",)  # the kind of all perplexities, whose spread is relative
OF_THE_SEEDS = ("Seed", "Average (informative)")  # columns that change with how many seeds were run


class Cell(NamedTuple):
    """One number of two reports; its tolerance is 0 where they must be equal, NaN without a known spread."""

    table: int
    row: str
    column: str
    metric: str
    ours: str
    reference: str
    tolerance: float

    @property
    def agrees(self) -> bool:
        """Whether the two are equal, or numbers no further apart than the tolerance."""
        if self.ours == self.reference:
            return True
        try:
            return abs(float(self.ours) - float(self.reference)) <= self.tolerance
        except ValueError:  # one of them is text
            return False


def read_run(folder: Path) -> dict:
    """run.json of a report folder; ValueError where there is none."""
    try:
        run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        return {key: run[key] for key in ("profile", "seeds", "overrides", "corpus", "environment")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"no readable run.json, {type(error).__name__}"
        raise ValueError(f"{folder} is not a report folder ({reason}): give one that ./run_all.sh has "
                         "written, such as reports/mini") from None


def tolerances(frame: pandas.DataFrame) -> list[float]:
    """The tolerance of each cell of a reference's tables (columns of tableN.csv), in the cell's own unit."""
    cells = [(line, _kind(line), abs(_number(line.ours) or 0.0)) for line in frame.itertuples()]
    groups: dict[tuple, list[float]] = defaultdict(list)  # standard deviations of cells of one kind
    for line, kind, value in cells:
        if kind and _number(line.sd):
            groups[kind].append(float(line.sd) / (value if kind == PERPLEXITY else 1))
    pooled = {kind: math.sqrt(sum(sd * sd for sd in values) / len(values)) for kind, values in groups.items()}
    largest = max((sd for kind, sd in pooled.items() if kind[0] == "task"), default=math.nan)
    found = []
    for line, kind, value in cells:
        spread = 0.0  # nothing is drawn
        if line.stage.startswith("twin_check"):  # trained once only: as far as any score moves
            spread = largest
        elif kind and _number(line.sd):
            spread = pooled[kind] * (value if kind == PERPLEXITY else 1)
        found.append(max(DEVIATIONS * spread, MIN_RELATIVE * value) if kind else 0.0)
    return found


def _kind(line) -> tuple | None:
    """What a measured cell is pooled with; None for one that must be equal."""
    if line.metric in EXACT or _number(line.ours) is None:
        return None
    if "perplexity" in (line.metric + line.unit):
        return PERPLEXITY
    if line.table == "7":
        return ("task", "ablation")
    return ("average" if line.column.startswith("Average") else "task", line.row)


def _number(text: str) -> float | None:
    value = value_of(text)
    return float(value) if value is not None and math.isfinite(value) else None


def read_tables(folder: Path) -> pandas.DataFrame:
    """All cells of Tables 1-7 that a report folder has a value for, as text; ValueError without a table."""
    import pandas

    files = [folder / f"table{number}.csv" for number in TABLES]
    frames = [read_csv_as_text(file) for file in files if file.is_file()]
    if not frames:
        raise ValueError(f"{folder} holds no table (tableN.csv): run its profile again")
    frame = pandas.concat(frames, ignore_index=True)
    left_out = frame["metric"].isin(OF_THE_MACHINE) | frame["column"].isin((PRECISION, *OF_THE_SEEDS))
    kept = frame[(frame["ours"] != "") & ~left_out]
    return kept.drop_duplicates(KEYS).reset_index(drop=True)


def compare_cells(folder: Path, reference: Path) -> list[Cell]:
    """Every cell that both reports have; ValueError for no reports, or for reports of unlike runs."""
    ours, theirs = ({**run, "overrides": ", ".join(run["overrides"]) or "none"}
                    for run in map(read_run, (folder, reference)))
    for name in ("profile", "corpus", "overrides"):
        if ours[name] != theirs[name]:
            raise ValueError(
                f"{folder} and {reference} are reports of unlike runs ({name} {ours[name]} against "
                f"{theirs[name]}): only reports of the same profile, text and settings can be compared")
    expected = read_tables(reference)
    expected["tolerance"] = tolerances(expected)
    both = read_tables(folder).merge(expected, on=KEYS, suffixes=("", "_there"))
    return [Cell(int(line.table), line.row, line.column, line.metric, line.ours, line.ours_there,
                 line.tolerance) for line in both.itertuples()]


def reasons(folder: Path, reference: Path) -> list[str]:
    """In what the two runs differ that may move numbers: processor, precision, versions, seeds."""
    ours, theirs = read_run(folder), read_run(reference)
    here, there = (
        {**{name: run["environment"].get(name) for name in ("device", "python", "system")},
         **run["environment"].get("packages", {}), "precision": _precision(path)}
        for run, path in ((ours, folder), (theirs, reference)))
    found = [f"{name} {value} against {there.get(name)}"
             for name, value in here.items() if value != there.get(name)]
    seeds = f"means of {ours['seeds']} against {theirs['seeds']} seeds"
    return found + [seeds] * (ours["seeds"] != theirs["seeds"])


def _precision(folder: Path) -> str:
    file = folder / "table2.csv"
    if not file.is_file():
        return "unknown"
    frame = read_csv_as_text(file)
    return " / ".join(dict.fromkeys(frame.loc[frame["column"] == PRECISION, "ours"])) or "unknown"


def compare_reports(folder: Path, reference: Path, most: int = 10) -> str:
    """The comparison as text of a few lines; ValueError for unlike reports (compare_cells)."""
    cells = compare_cells(folder, reference)
    outside = [cell for cell in cells if not cell.agrees]
    shown = reference.absolute()  # below the checkout without the checkout's folder
    if shown.is_relative_to(PROJECT_ROOT):
        shown = shown.relative_to(PROJECT_ROOT)
    left_out = len(read_tables(reference)) - len(cells)
    lines = [f"{len(cells) - len(outside)} of {len(cells)} cells of Tables 1-7 agree with {shown.as_posix()} "
             f"(within {DEVIATIONS} standard deviations of one seed, at least {MIN_RELATIVE:.0%}; shapes and "
             "counts exactly)" + f"; {left_out} of its cells are not in this run" * bool(left_out)]
    lines += [f"  Table {cell.table}, {cell.row}, {cell.column} ({cell.metric}): {cell.ours} here, "
              f"{cell.reference} there, tolerance {cell.tolerance:.3g}" for cell in outside[:most]]
    if len(outside) > most:
        lines.append(f"  and {len(outside) - most} more")
    if why := "; ".join(reasons(folder, reference)):
        lines.append(f"  {'they may differ because of' if outside else 'the runs differ in'}: {why}")
    return "\n".join(lines)
