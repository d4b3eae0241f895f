"""A report against another one of the same profile: which cells agree within what another machine moves.

    python -m kn compare reports/mini reports/published/mini

Training amplifies another processor's rounding until a number moves about as far as with another seed. So the
tolerance of a measured cell is DEVIATIONS standard deviations of one seed, pooled over cells of the same kind in the
reference, at least MIN_RELATIVE of the value; shapes, counts and hyper-parameters must be equal.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from kn.files import PROJECT_ROOT

if TYPE_CHECKING:
    import pandas

DEVIATIONS = 4
MIN_RELATIVE = 0.01  # what has no spread over seeds (nothing is trained) still differs in rounding
TABLES = range(1, 8)
COMPARISON = "comparison.txt"  # in a report's folder: how it compares with the published one
OF_THE_MACHINE = ("hours", "device")  # metrics that say where a run was made, not what it gave
EXACT = (
    "shape", "count", "hyper-parameter", "parameters", "parameters without the output embedding", "steps",
    "tokens",
    "data", "weights",
)
FOLLOWS_THE_PROCESSOR = "Precision"  # a hyper-parameter that is chosen by what the processor can do
OF_THE_SEEDS = ("Seed", "Average (informative)")  # columns that change with how many seeds were run


class Cell(NamedTuple):
    """One number of two reports. `tolerance` is 0 where they must be equal, NaN where the reference has no spread."""

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
        raise ValueError(
            f"{folder} is not a report folder (no readable run.json, {type(error).__name__}): "
            "give one that ./run_all.sh has written, such as reports/mini"
        ) from None


def tolerances(frame: pandas.DataFrame) -> list[float]:
    """The tolerance of each cell of the tables of a reference (columns of tableN.csv), in the cell's own unit."""
    groups: dict[tuple, list[float]] = defaultdict(list)  # standard deviations of cells of one kind
    kinds = [_kind(line) for line in frame.itertuples()]
    for line, kind in zip(frame.itertuples(), kinds, strict=True):
        if kind and _number(line.sd):
            groups[kind].append(float(line.sd) / (abs(float(line.ours)) if kind == ("perplexity",) else 1))
    pooled = {kind: math.sqrt(sum(sd * sd for sd in values) / len(values)) for kind, values in groups.items()}
    scores = [deviation for kind, deviation in pooled.items() if kind[0] == "task"]
    found = []
    for line, kind in zip(frame.itertuples(), kinds, strict=True):
        value = abs(_number(line.ours) or 0.0)
        if kind is None:
            found.append(0.0)
            continue
        spread = pooled.get(kind, 0.0) * (value if kind == ("perplexity",) else 1)
        if line.stage.startswith("twin_check"):  # trained once only: as far as any score moves
            spread = max(scores, default=math.nan)
        elif not _number(line.sd):  # nothing is drawn
            spread = 0.0
        found.append(max(DEVIATIONS * spread, MIN_RELATIVE * value))
    return found


def _kind(line) -> tuple | None:
    """What a measured cell is pooled with; None for one that must be equal."""
    if line.metric in EXACT or _number(line.ours) is None:
        return None
    if "perplexity" in (line.metric + line.unit):
        return ("perplexity",)
    if line.table == "7":
        return ("task", "ablation")
    return ("average" if line.column.startswith("Average") else "task", line.row)


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def read_tables(folder: Path) -> pandas.DataFrame:
    """All cells of Tables 1-7 that a report folder has a value for, as text; ValueError where it has no table."""
    import pandas

    files = [folder / f"table{number}.csv" for number in TABLES]
    frames = [pandas.read_csv(file, dtype=str, keep_default_na=False) for file in files if file.is_file()]
    if not frames:
        raise ValueError(f"{folder} holds no table (tableN.csv): run its profile again")
    frame = pandas.concat(frames, ignore_index=True)
    kept = (frame["ours"] != "") & ~frame["metric"].isin(OF_THE_MACHINE) & ~frame["column"].isin((FOLLOWS_THE_PROCESSOR, *OF_THE_SEEDS))
    return frame[kept].drop_duplicates(["table", "row", "column", "metric"]).reset_index(drop=True)


def compare_cells(folder: Path, reference: Path) -> list[Cell]:
    """Every cell that both reports have; ValueError for folders that are no reports, or reports of unlike runs."""
    ours, theirs = read_run(folder), read_run(reference)
    for name in ("profile", "corpus", "overrides"):
        if ours[name] != theirs[name]:
            shown = [", ".join(run[name]) or "none" if name == "overrides" else run[name]
                     for run in (ours, theirs)]
            raise ValueError(
                f"{folder} and {reference} are reports of unlike runs ({name} {shown[0]} against {shown[1]}): "
                "only reports of the same profile, text and settings can be compared"
            )
    expected = read_tables(reference)
    expected["tolerance"] = tolerances(expected)
    both = read_tables(folder).merge(expected, on=["table", "row", "column", "metric"],
                                     suffixes=("", "_reference"))
    return [
        Cell(int(line.table), line.row, line.column, line.metric, line.ours, line.ours_reference,
             line.tolerance)
        for line in both.itertuples()
    ]


def reasons(folder: Path, reference: Path) -> list[str]:
    """In what the two runs differ that may move numbers: processor, precision, versions, seeds."""
    ours, theirs = read_run(folder), read_run(reference)
    found = []
    here, there = (run["environment"] for run in (ours, theirs))
    for name in ("device", "python", "system"):
        if here.get(name) != there.get(name):
            found.append(f"{name} {here.get(name)} against {there.get(name)}")
    packages, others = here.get("packages", {}), there.get("packages", {})
    found += [f"{name} {packages[name]} against {others.get(name)}"
              for name in packages if packages[name] != others.get(name)]
    precisions = [_precision(path) for path in (folder, reference)]
    if precisions[0] != precisions[1]:
        found.append(f"precision {precisions[0]} against {precisions[1]}")
    if ours["seeds"] != theirs["seeds"]:
        found.append(f"means of {ours['seeds']} against {theirs['seeds']} seeds")
    return found


def _precision(folder: Path) -> str:
    import pandas

    file = folder / "table2.csv"
    if not file.is_file():
        return "unknown"
    frame = pandas.read_csv(file, dtype=str, keep_default_na=False)
    return " / ".join(dict.fromkeys(frame.loc[frame["column"] == FOLLOWS_THE_PROCESSOR, "ours"])) or "unknown"


def _shown(path: Path) -> str:
    """A path below the checkout without the checkout's folder."""
    path = path.absolute()
    return path.relative_to(PROJECT_ROOT).as_posix() if path.is_relative_to(PROJECT_ROOT) else str(path)


def compare_reports(folder: Path, reference: Path, most: int = 10) -> str:
    """The comparison as text of a few lines; ValueError for unlike reports (compare_cells)."""
    cells = compare_cells(folder, reference)
    outside = [cell for cell in cells if not cell.agrees]
    lines = [
        f"{len(cells) - len(outside)} of {len(cells)} cells of Tables 1-7 agree with {_shown(reference)} "
        f"(within {DEVIATIONS} standard deviations of one seed, at least {MIN_RELATIVE:.0%}; shapes and counts exactly)"
    ]
    for cell in outside[:most]:
        lines.append(
            f"  Table {cell.table}, {cell.row}, {cell.column} ({cell.metric}): {cell.ours} here, "
            f"{cell.reference} there, tolerance {cell.tolerance:.3g}"
        )
    if len(outside) > most:
        lines.append(f"  and {len(outside) - most} more")
    if why := reasons(folder, reference):
        lines.append(f"  {'they may differ because of' if outside else 'the runs differ in'}: {'; '.join(why)}")
    return "\n".join(lines)
