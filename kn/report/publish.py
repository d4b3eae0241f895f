"""The committed report: a finished run's folder becomes reports/published/<profile>, with README's table and
picture.

    python -m kn publish reports/mini

Nothing else writes reports/published, README.md's table or docs/paper-against-ours.svg.
"""

from __future__ import annotations

import io
import json
import math
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from kn.files import PROJECT_ROOT, write_atomic
from kn.paper import read_csv_as_text
from kn.report.compare import COMPARISON, read_run

if TYPE_CHECKING:
    import matplotlib.figure

PUBLISHED = PROJECT_ROOT / "reports" / "published"
README = PROJECT_ROOT / "README.md"
PICTURE = PROJECT_ROOT / "docs" / "paper-against-ours.svg"
BEGIN, END = "<!-- results: written by `python -m kn publish` -->\n", "<!-- end of results -->\n"
MAIN_CLAIMS = {  # ids of claims.csv that README shows: what README calls them
    "same-size": "KnGPT2 is as small as DistilGPT2 (parameters without the output embedding, ratio)",
    "drop": "Right after the SVD the perplexity is far worse than the teacher's (times)",
    "perplexity": "After fine-tuning its perplexity is below DistilGPT2's (Table 4, ratio)",
    "outperforms-dev": "KnGPT2 + ILKD is above DistilGPT2 on GLUE dev (Table 5, points)",
    "efficient": "… and above DistilGPT2 + KD (points)",
    "retrieve": "The light pre-training helps MNLI (Table 7, points)",
}
PANELS = (  # title, table, its cells, whether a line is named by its column or by its row
    ("Perplexity after fine-tuning (Table 4)", 4,
     [("Perplexity", model) for model in ("GPT-2 Small", "DistilGPT2", "KnGPT2")], 1),
    ("Perplexity after pre-training (Table 7)", 7,
     [(f"KnGPT2{arm}", "Wikitext-103 (pp.)") for arm in ("", " + LM", " + KD", " + LM + KD")], 0),
    ("GLUE dev, average in % (Table 5)", 5,
     [(row, "Average")
      for row in ("GPT-2 Small", "DistilGPT2", "DistilGPT2 + KD", "KnGPT2", "KnGPT2 + ILKD")], 0),
)
RING = {"markerfacecolor": "white", "markeredgecolor": "#656c75", "markersize": 7, "label": "paper"}
DOT = {"color": "#0b5c8a", "markersize": 6, "capsize": 2, "label": "ours, ± standard deviation of the seeds"}


def publish(folder: Path, published: Path = PUBLISHED) -> Path:
    """Copy a finished report of default settings into `published`; ValueError for one not fit for it."""
    run = read_run(folder)
    target = published / run["profile"]
    summary = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    if lacking := summary["stages"] - summary["finished"]:
        raise ValueError(f"{folder} lacks {lacking} stages: run its profile again first")
    if run["overrides"]:
        raise ValueError(f"{folder} was made with --set {' '.join(run['overrides'])}: publish a run of the "
                         "profile's own settings")
    if target.exists() and (before := read_run(target)["seeds"]) > run["seeds"]:
        raise ValueError(f"{target} has {before} seeds, {folder} has {run['seeds']}: run it with --seeds "
                         f"{before} first")
    part = published / f".{run['profile']}.{os.getpid()}.part"
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(folder, part, ignore=shutil.ignore_patterns("*-failed.html", ".*", COMPARISON))
    shutil.rmtree(target, ignore_errors=True)
    part.rename(target)
    from kn.report.write import write_front

    write_front(published)
    if published == PUBLISHED and run["profile"] == "mini":
        update_readme(target)
    return target


def update_readme(folder: Path) -> None:
    """Write README's table between its two markers, and the picture."""
    head, rest = README.read_text(encoding="utf-8").split(BEGIN)
    write_atomic(README, head + BEGIN + result_table(folder) + END + rest.split(END)[1])
    buffer = io.StringIO()
    picture(folder).savefig(buffer, format="svg", metadata={"Date": None})
    write_atomic(PICTURE, "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n")


def result_table(folder: Path) -> str:
    """README's table (Markdown): the main claims, the paper's value, ours with its 95 % interval."""
    ledger, run = read_csv_as_text(folder / "claims.csv"), read_run(folder)
    about = f"{run['profile']}, {run['seeds']} seeds, {run['environment']['device']}"
    lines = [f"| {about} | paper | ours (95 % interval) | |", "| --- | --- | --- | --- |"]
    for name, title in MAIN_CLAIMS.items():
        line = ledger[ledger["id"] == name].iloc[0]
        ours = _short(line.value) + (f" ({_short(line.low)} to {_short(line.high)})" if line.low else "")
        lines.append(f"| {title} | {_short(line.paper_value)} | {ours} | {line.ours} |")
    counts = ", ".join(f"{count} {verdict}" for verdict, count in ledger["ours"].value_counts().items())
    return "\n".join([*lines, f"| **All {len(ledger)} claims of the paper's text** | | | {counts} |"]) + "\n"


def picture(folder: Path) -> matplotlib.figure.Figure:
    """Paper (rings) against ours (dots, ± standard deviation): PANELS of Tables 4, 7 and 5."""
    import matplotlib

    matplotlib.rcdefaults()
    matplotlib.rcParams["svg.hashsalt"] = "kn"  # equal pictures are equal files
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 2.9), layout="constrained", facecolor="white")
    for axes, (title, number, cells, named_by) in zip(figure.subplots(1, 3), PANELS, strict=True):
        frame = read_csv_as_text(folder / f"table{number}.csv").drop_duplicates(["row", "column"])
        lines = frame.set_index(["row", "column"]).loc[cells[::-1]]
        for place, line in enumerate(lines.itertuples()):
            ours, paper = float(line.ours), float(line.paper.replace(",", ""))
            axes.plot([paper, ours], [place, place], color="#c9c5bb", linewidth=1.2, zorder=1)
            ring = axes.plot(paper, place, "o", zorder=2, **RING)[0]
            dot = axes.errorbar(ours, place, xerr=float(line.sd or 0), fmt="o", zorder=3, **DOT)
        axes.set_yticks(range(len(cells)), [cell[named_by] for cell in reversed(cells)], fontsize=8)
        axes.set_title(title, fontsize=9, loc="left")
        axes.tick_params(axis="x", labelsize=8)
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(-0.6, len(cells) - 0.4)
        axes.grid(axis="x", color="#eeebe4")
        axes.spines[["top", "right", "left"]].set_visible(False)
        if number == 7:
            axes.set_xscale("log")
    figure.legend(handles=[ring, dot], loc="outside lower right", ncols=2, frameon=False, fontsize=8)
    return figure


def _short(text: str) -> str:
    """Two decimals, none from a thousand on; a dash for nothing."""
    value = float(text or "nan")
    return "–" if math.isnan(value) else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.2f}"
