"""Writes what is derived from the committed reports/mini: tests/expected/mini.json and the README's results.

PYTHONPATH=. python tests/expected/make.py      after a run with five seeds; tests/test_readme.py sees that both are up to date
"""

import json
import math
import statistics
from pathlib import Path

import pandas

ROOT = Path(__file__).parents[2]
REPORTS, README, EXPECTED = ROOT / "reports" / "mini", ROOT / "README.md", Path(__file__).with_name("mini.json")
BEGIN, END = "<!-- results: written by tests/expected/make.py -->\n", "<!-- end of results -->\n"
GLUE = ["CoLA", "RTE", "MRPC", "SST-2", "MNLI", "QNLI", "QQP", "Average"]
MODELS = ["GPT-2 Small", "DistilGPT2", "KnGPT2"]
ROWS = ["GPT-2 Small", "DistilGPT2", "DistilGPT2 + KD", "KnGPT2", "KnGPT2 + ILKD"]
CHECKS = ["Majority class", "Word list", "Random initialisation", "One sentence only"]
ARMS = ["KnGPT2", "KnGPT2 + LM", "KnGPT2 + KD", "KnGPT2 + LM + KD"]
DEVIATIONS = 4  # another processor rounds otherwise, which training amplifies to about another seed: this many standard deviations of one
LEAST = 0.01  # relative: what has no spread over seeds (no training) still differs in rounding


def number(text: str) -> str:
    """Two decimals, thousands without; a dash for nothing."""
    if not text:
        return "–"
    try:
        value = float(text)
    except ValueError:
        return text
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.2f}"


class Tables:
    """The CSVs of a report folder."""

    def __init__(self, folder: Path):
        self.frames = {n: pandas.read_csv(folder / f"table{n}.csv", dtype=str, keep_default_na=False) for n in range(1, 8)}

    def line(self, table: int, row: str, column: str):
        """The first line of that row and column."""
        frame = self.frames[table]
        return frame[(frame["row"] == row) & (frame["column"] == column)].iloc[0]

    def cell(self, table: int, row: str, column: str) -> str:
        """paper / ours ± sd"""
        line = self.line(table, row, column)
        ours = number(line.ours) + (f" ± {number(line.sd)}" if line.sd and float(line.sd) else "")
        return f"{number(line.paper)} / {ours}" if line.paper else ours

    def markdown(self, table: int, title: str, rows: list[str], columns: list[str]) -> list[str]:
        """One Markdown table, a blank line after it."""
        lines = [f"| {title} | " + " | ".join(columns) + " |", "| --- |" + " --- |" * len(columns)]
        for row in rows:
            known = set(self.frames[table].loc[self.frames[table]["row"] == row, "column"])
            lines.append(f"| {row} | " + " | ".join(self.cell(table, row, c) if c in known else "–" for c in columns) + " |")
        return [*lines, ""]


def block(folder: Path = REPORTS) -> str:
    """The README's results: tables 4-7 and the trends."""
    tables, run = Tables(folder), json.loads((folder / "run.json").read_text())
    trends = pandas.read_csv(folder / "trends.csv", dtype=str, keep_default_na=False)
    lines = [f"{run['seeds']} seeds (`reports/mini`, {run['stages']} stages, {run['environment']['device']}); each cell: paper / ours ± standard deviation.", ""]
    lines += tables.markdown(4, "Table 4: WikiText-103 perplexity after fine-tuning", ["Perplexity"], MODELS)
    lines += tables.markdown(5, "Table 5: GLUE dev (ours: twins)", ROWS + CHECKS, GLUE)
    lines += tables.markdown(6, "Table 6: GLUE test (ours: twins)", ROWS, GLUE)
    lines += tables.markdown(7, "Table 7: ablation of the pre-training", ARMS, ["Wikitext-103 (pp.)", "MNLI (f1)"])
    lines += ["| trend | paper | ours | 95 % interval over seeds | verdict |", "| --- | --- | --- | --- | --- |"]
    for line in trends.itertuples():
        low, high = (number(value) if value not in ("", "nan") and math.isfinite(float(value)) else "–" for value in (line.low, line.high))
        lines.append(f"| {line.claim} | {number(line.paper)} | {number(line.ours)} | {low} to {high} | {line.verdict} |")
    return "\n".join(lines) + "\n"


def expected(folder: Path = REPORTS) -> list[dict]:
    """Value and tolerance of the headline numbers: DEVIATIONS standard deviations of one seed, pooled over perplexities, or over a GLUE row's dev and test."""
    tables = Tables(folder)
    groups = [("perplexity", [(4, "Perplexity", model) for model in MODELS] + [(7, arm, "Wikitext-103 (pp.)") for arm in ARMS])]
    groups += [("average", [(table, row, "Average") for table in (5, 6)]) for row in ROWS]
    found = []
    for kind, cells in groups:
        lines = [tables.line(*cell) for cell in cells]
        spread = [float(line.sd or 0) / (float(line.ours) if kind == "perplexity" else 1) for line in lines]
        pooled = math.sqrt(statistics.fmean(s * s for s in spread if s))
        for (table, row, column), line, own in zip(cells, lines, spread, strict=True):
            value = float(line.ours)
            tolerance = DEVIATIONS * (pooled if own else 0) * (value if kind == "perplexity" else 1)
            found.append({"table": table, "row": row, "column": column, "value": round(value, 3), "tolerance": round(max(tolerance, LEAST * value), 3)})
    return found


def main() -> None:
    """Write both."""
    text = README.read_text()
    head, rest = text.split(BEGIN)
    README.write_text(head + BEGIN + block() + END + rest.split(END)[1])
    EXPECTED.write_text("[\n" + ",\n".join(" " + json.dumps(line) for line in expected()) + "\n]\n")


if __name__ == "__main__":
    main()
