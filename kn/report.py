"""Tables, trends and pages from finished stages.

    table(4, records, "mini")                 one line per cell: paper, ours ± sd (n), delta, verdict
    trends(records)                           the paper's claims, each held / not held / undecided
    average(records, "student", "dev")        mean over the GLUE tasks, per seed
    informative(records)                      the tasks on which the teacher really beats the simple baselines
    plot(4, records)                          a matplotlib figure
    fixed(frame)                              what of a table cannot move between machines
    show(frame)                               a table or the trends, for display in a notebook
    write_table(…), write_beyond(…), write_index(…)    CSV and HTML, each file written whole or not at all

One rule everywhere: a difference holds if the 95 % interval of the seed-paired difference leaves 0 on the claimed side;
perplexities are compared as ratios, so by the difference of their logarithms.
"""

from __future__ import annotations

import math
import os
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kn.paper import printed, value_of
from kn.tables import ABLATION, COLUMNS, GLUE_ROWS, MODELS, TASKS, ablated, average, find, informative, rounded, table, untuned

if TYPE_CHECKING:
    import matplotlib.figure
    import pandas

__all__ = [
    "COLUMNS", "average", "compare", "fixed", "informative", "interval", "plot", "plot_beyond", "show", "table", "trends", "write_beyond", "write_index", "write_table",
]  # fmt: skip

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"  # speed-<device>.csv, shown on the index page
FAR_WORSE = 2.0  # ratio of perplexities from which the SVD start counts as far worse than the teacher
FIXED = ["shape", "count", "hyper-parameter", "parameters without the output embedding", "parameters", "steps"]  # metrics that no processor changes


def interval(differences: list[float]) -> tuple[float, float, float]:
    """Mean and 95 % interval of seed-paired differences, by Student's t; the interval is not a number for fewer than two seeds."""
    from scipy import stats

    mean = statistics.fmean(differences)
    if len(differences) < 2:
        return mean, math.nan, math.nan
    half = float(stats.t.ppf(0.975, len(differences) - 1)) * statistics.stdev(differences) / math.sqrt(len(differences))
    return mean, mean - half, mean + half


def compare(claim: str, left: dict, right: dict, paper: float | None, side: int, ratio: bool) -> dict:
    """One line of trends(): left against right, paired by seed; side is +1 where left is claimed to be the greater, −1 the smaller."""
    if set(left) == {None} or set(right) == {None}:  # one of the two draws nothing: it stands beside every seed of the other
        seeds = [seed for seed in {**left, **right} if seed is not None] or [None]
        left, right = ({seed: side_.get(seed, side_.get(None)) for seed in seeds} if side_ else {} for side_ in (left, right))
    change = math.log if ratio else float
    differences = [change(left[seed]) - change(right[seed]) for seed in left if seed in right]
    line = {"claim": claim, "paper": paper, "ours": math.nan, "low": math.nan, "high": math.nan, "n": len(differences)}
    if not differences:
        return {**line, "verdict": "not run"}
    ours = interval(differences)
    verdict = "undecided" if len(differences) > 1 else "one seed: undecided"
    if min(side * ours[1], side * ours[2]) > 0:
        verdict = "held"
    elif max(side * ours[1], side * ours[2]) < 0:
        verdict = "not held"
    values = [rounded(math.exp(value) if ratio else value) for value in ours]
    return {**line, **dict(zip(("ours", "low", "high"), values, strict=True)), "verdict": verdict}


def trends(records: list[dict]) -> pandas.DataFrame:
    """The paper's orderings on our numbers: claim, paper, ours, low, high, n, verdict; scores over the informative tasks alone."""
    import pandas

    paper = {number: {(cell.row, cell.column): value_of(cell.value) for cell in printed(number).itertuples()} for number in range(4, 8)}
    four = {model: paper[4]["Perplexity", name] for model, name in MODELS.items()}
    start, teacher = ablated(records, "none").values, untuned(records, "teacher").values
    seven = {key: paper[7][row, "Wikitext-103 (pp.)"] for key, row in ABLATION.items()}
    far = compare(f"SVD start: perplexity at least {FAR_WORSE:g} times the teacher's", start, teacher, seven["none"] / four["teacher"], 1, True)
    if far["n"]:  # nothing is drawn on either side, so the ratio itself decides
        far["verdict"] = "held" if far["ours"] >= FAR_WORSE else "not held"
    lines = [far]
    for less, more in (("lm", "lm_kd"), ("lm_kd", "kd"), ("kd", "none")):
        claim = f"Table 7, perplexity: {ABLATION[less]} below {ABLATION[more]}{' (SVD start)' if more == 'none' else ''}, ratio"
        lines.append(compare(claim, ablated(records, less).values, ablated(records, more).values, seven[less] / seven[more], -1, True))
    tuned = {model: find(records, "perplexity.wiki.test", "finetune_lm", model=model).values for model in MODELS}
    claim = "Table 4, perplexity: KnGPT2 below DistilGPT2, ratio"
    lines.append(compare(claim, tuned["student"], tuned["baseline"], four["student"] / four["baseline"], -1, True))
    tasks = informative(records)
    pairs = [("student", "baseline", 1, "above"), ("student_ilkd", "student", 1, "above"), ("baseline_kd", "baseline", -1, "not improving")]
    for left, right, side, word in pairs:
        for number, split in ((5, "dev"), (6, "test")):
            printed_mean = [statistics.fmean(paper[number][GLUE_ROWS[row], TASKS[task]] for task in tasks or TASKS) for row in (left, right)]
            claim = f"Table {number}, GLUE {split} average: {GLUE_ROWS[left]} {word} {'on ' if side < 0 else ''}{GLUE_ROWS[right]}, points"
            ours = [average(records, row, split, tasks) for row in (left, right)]
            lines.append(compare(claim, *ours, round(printed_mean[0] - printed_mean[1], 2), side, False))
    lm_kd, none = ({**find(records, "dev.f1", "finetune_glue", row=f"ablation_{key}", task="mnli").values} for key in ("lm_kd", "none"))
    known = "mnli" in tasks
    difference = round(paper[7][ABLATION["lm_kd"], "MNLI (f1)"] - paper[7][ABLATION["none"], "MNLI (f1)"], 2)
    claim = "Table 7, MNLI f1: KnGPT2 + LM + KD above KnGPT2 without pre-training, points"
    lines.append(compare(claim, lm_kd if known else {}, none if known else {}, difference, 1, False))
    return pandas.DataFrame(lines)


def fixed(frame: pandas.DataFrame) -> dict[str, Any]:
    """What of a table cannot move between machines: its size, names, printed values, shapes, counts and hyper-parameters."""
    number = frame["table"].iloc[0]
    cells = set() if isinstance(number, str) else set(printed(int(number))[["row", "column"]].itertuples(index=False, name=None))
    paper = [line.paper for line in frame.drop_duplicates(["row", "column"]).itertuples() if (line.row, line.column) in cells]
    facts = {"lines and columns": frame.shape, "columns": ", ".join(frame.columns)}
    facts |= {"rows": " | ".join(dict.fromkeys(frame["row"])), "cells per row": " | ".join(dict.fromkeys(frame["column"]))}
    numbers = [value for value in paper if not isinstance(value, str)]
    facts["printed"] = f"{len(paper)} cells, numbers add up to {round(math.fsum(numbers), 5):.10g}"
    settled = frame[frame["metric"].isin(FIXED) & frame["ours"].notna() & (frame["column"] != "Precision")]  # that one follows the processor
    for line in settled.itertuples():
        facts[f"{line.row}, {line.column}"] = str(line.ours) if line.verdict == "recorded" else f"{line.ours} ({line.verdict})"
    return facts


def plot(number: int, records: list[dict]) -> matplotlib.figure.Figure:
    """The picture that goes with a table: parameters, loss terms, training logs, perplexities (log axis) or GLUE bars."""
    from kn import plots

    return plots.figure(number, table(number, records, ""), records)


def show(frame: pandas.DataFrame) -> Any:
    """A table or the trends as they look on the page, for display in a notebook."""
    from IPython.display import HTML

    from kn import site

    return HTML(site.fragment(frame))


def write_table(number: int, records: list[dict], profile: str, folder: str | os.PathLike) -> Path:
    """Writes tableN.csv and tableN.html into a folder, each by one atomic rename, and returns the path of the page."""
    from kn import site

    frame = table(number, records, profile)
    _write(Path(folder) / f"table{number}.csv", frame.to_csv(index=False))
    return _write(Path(folder) / f"table{number}.html", site.table_page(number, frame, records, profile, plot(number, records)))


def plot_beyond(name: str, frame: pandas.DataFrame) -> matplotlib.figure.Figure:
    """The picture that goes with a notebook beyond the tables, of its table."""
    from kn import plots

    return plots.beyond(name, frame)


def write_beyond(name: str, records: list[dict], profile: str, folder: str | os.PathLike) -> Path:
    """Writes <name>.csv, <name>_claims.csv and <name>.html into a folder and returns the path of the page."""
    from kn import findings, site

    frame, claims = findings.table(name, records), findings.claims(name, records)
    _write(Path(folder) / f"{name}.csv", frame.to_csv(index=False))
    _write(Path(folder) / f"{name}_claims.csv", claims.to_csv(index=False))
    return _write(Path(folder) / f"{name}.html", site.table_page(name, frame, records, profile, plot_beyond(name, frame), claims))


def write_index(records: list[dict], profile: str, folder: str | os.PathLike) -> Path:
    """Writes index.html (trends, all tables, plots), records.html and trends.csv into a folder and returns the index's path."""
    import pandas

    from kn import findings, plots, site

    claims = trends(records)
    tables = {number: table(number, records, profile) for number in range(1, 8)}
    pictures = {number: plots.figure(number, frame, records) for number, frame in tables.items()}
    _write(Path(folder) / "trends.csv", claims.to_csv(index=False))
    _write(Path(folder) / "records.html", site.records_page(records, profile))
    measured = [pandas.read_csv(file) for file in sorted(BENCHMARKS.glob("speed-*.csv"))]
    speeds = "".join(site.speed_section(frame, plots.speed(frame)) for frame in measured)
    run = {"beyond_alignment": "aligned", "beyond_compression": "compressed"}  # what is there only where the notebook has run
    beyond = {name: findings.table(name, records) for name, stage in run.items() if any(record["stage"] == stage for record in records)}
    shown = {name: (frame, plots.beyond(name, frame), findings.claims(name, records)) for name, frame in beyond.items()}
    return _write(Path(folder) / "index.html", site.index_page(tables, pictures, claims, records, profile, speeds, shown))


def _write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path
