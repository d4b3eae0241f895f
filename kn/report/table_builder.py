"""The cells of one table: the printed value, ours over seeds, their difference and a verdict."""

import math
import statistics
from typing import Any

import pandas

from kn.paper import printed, value_of
from kn.report.metrics import SeedValues

COLUMNS = ["table", "row", "column", "metric", "paper", "ours", "sd", "n", "delta", "verdict", "unit",
           "stage"]
SEED_COLUMNS = ["table", "row", "column", "metric", "unit", "verdict", "seed", "value", "stage"]
METHOD_COLUMNS = ["method", "layers", "factor", "share"]  # machine-readable, for plots; not in the CSV
COUNT = "parameters without the output embedding"
MACHINE_INDEPENDENT = ("shape", "count", "hyper-parameter", COUNT, "parameters", "steps")  # metrics


class TableBuilder:
    """Collects the cells of one table; printed values are looked up by row and column.
    `table` is 1-7, or the name of a table of ours, which has no printed values."""

    def __init__(self, table: int | str):
        self.table, self.missing = table, "not run"  # the verdict of a cell without a value
        self.cells: list[list] = []
        self.seed_lines: list[list] = []
        self.methods: dict[str, dict[str, Any]] = {}  # row → its METHOD_COLUMNS
        cells = printed(table).itertuples() if isinstance(table, int) else ()
        self.paper = {(cell.row, cell.column): cell for cell in cells}

    def add(self, row: str, column: str, found: SeedValues, metric: str = "", unit: str = "",
            verdict: str = "", paper: Any = ...) -> None:
        """One cell: mean and standard deviation over seeds, with the printed value or `paper`."""
        cell = self.paper.get((row, column)) if paper is ... else None
        paper = None if paper is ... else paper
        if cell is not None:
            number = value_of(cell.value)
            paper = cell.value if number is None else number
            metric, unit = metric or cell.metric, unit or cell.unit
        values = list(found.values.values())
        numeric = bool(values) and all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
        ours, sd, delta = None, None, None
        if numeric:
            ours = values[0] if len(set(values)) == 1 else rounded(statistics.fmean(values))
            sd = rounded(statistics.stdev(values)) if len(values) > 1 else None
            delta = rounded(ours - paper) if isinstance(paper, int | float) else None
            ours = rounded(ours)
        elif values:
            ours = " / ".join(dict.fromkeys(map(str, values)))
        verdict = self.missing if ours is None else verdict or "recorded"
        self.cells.append([self.table, row, column, metric, paper, ours, sd, len(values), delta, verdict,
                           unit, ";".join(dict.fromkeys(found.stages))])
        # a value made of several stages names them in the table alone
        paths = found.stages if len(found.stages) == len(values) else [""] * len(values)
        for (seed, value), path in zip(found.values.items(), paths, strict=True):
            if numeric and not isinstance(seed, tuple):
                self.seed_lines.append([self.table, row, column, metric, unit, verdict, seed, value, path])

    def frame(self) -> pandas.DataFrame:
        """The table with the columns of its CSV (COLUMNS), a line per cell."""
        frame = pandas.DataFrame(self.cells, columns=COLUMNS)
        return frame.astype({"paper": object, "ours": object, "sd": float, "delta": float})

    def plot_frame(self) -> pandas.DataFrame:
        """The table with METHOD_COLUMNS, which say what made a row."""
        methods = [self.methods.get(row, {}) for _, row, *_ in self.cells]
        return self.frame().join(pandas.DataFrame(methods, columns=METHOD_COLUMNS))

    def seeds(self) -> pandas.DataFrame:
        """A line per number and seed, not rounded (SEED_COLUMNS); no seed where nothing is random."""
        frame = pandas.DataFrame(self.seed_lines, columns=SEED_COLUMNS)
        return frame.astype({"table": str, "seed": "Int64", "value": float})


def rounded(value: float) -> int | float:
    """Six significant digits; integers unchanged."""
    return value if isinstance(value, int) else float(f"{value:.6g}")


def machine_independent_facts(frame: pandas.DataFrame) -> dict[str, Any]:
    """What of a table is the same on every machine: names, printed values, shapes, counts, settings."""
    number = frame["table"].iloc[0]
    cells = [] if isinstance(number, str) else printed(int(number)).itertuples()
    in_paper = {(cell.row, cell.column) for cell in cells}
    paper = [line.paper for line in frame.drop_duplicates(["row", "column"]).itertuples()
             if (line.row, line.column) in in_paper]
    numbers = [value for value in paper if not isinstance(value, str)]
    facts = {"lines and columns": frame.shape, "columns": ", ".join(frame.columns),
             "rows": " | ".join(dict.fromkeys(frame["row"])),
             "cells per row": " | ".join(dict.fromkeys(frame["column"])),
             "printed": f"{len(paper)} cells, numbers add up to {round(math.fsum(numbers), 5):.10g}"}
    # the precision follows the processor
    independent = frame["metric"].isin(MACHINE_INDEPENDENT) & (frame["column"] != "Precision")
    for line in frame[independent & frame["ours"].notna()].itertuples():
        verdict = "" if line.verdict == "recorded" else f" ({line.verdict})"
        facts[f"{line.row}, {line.column}"] = f"{line.ours}{verdict}"
    return facts
