"""The plots of a report: a function per table that draws on a figure, and SVG in the colours of the page."""

import io
import textwrap
from collections.abc import Callable
from functools import partial
from typing import Any

import matplotlib.style
import numpy as np
import pandas
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

INK = "#2b3038"  # text and axes; on pages it becomes the colour of the text
GREY = "#888888"  # the paper's values
PALETTE = ["#4c78a8", "#e08a3c", "#b7621b", "#54a08a", "#2c7563", "#8c8c8c", "#a3a3a3", "#bababa", "#d1d1d1"]
METHOD_COLOURS = {"aligned": PALETTE[0], "svd": PALETTE[1], "narrow": PALETTE[5], "lowrank": PALETTE[4]}
METHOD_LABELS = {"aligned": "Aligned start", "svd": "SVD start", "narrow": "Narrow", "lowrank": "Low-rank"}
STYLE: dict[Any, Any] = {
    **{f"{part}color": INK for part in ("text.", "axes.label", "axes.edge", "xtick.", "ytick.")},
    "font.size": 9, "font.family": "sans-serif", "legend.frameon": False, "axes.titlesize": 9,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
    "grid.color": GREY + "55", "grid.linewidth": 0.5,
}
ABOVE: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderpad": 0}  # over the axes
HEIGHTS = {"alignment": 3.8, "compression": 4.6, "speed": 6}  # inches; the others have 3.3


def draw(function: Callable, frame: pandas.DataFrame, records: list[dict] | None = None) -> Figure:
    """The figure a plot function draws of a table; axes without data say "not run"."""
    with matplotlib.style.context(["default", STYLE]):
        figure = Figure(figsize=(9, HEIGHTS.get(function.__name__, 3.3)), layout="constrained")
        function(figure, frame, records)
        for axis in figure.axes:
            if not axis.has_data():
                axis.text(0.5, 0.5, "not run", ha="center", va="center", transform=axis.transAxes)
                axis.set(xticks=[], yticks=[])
    return figure


def svg(figure: Figure, name: str) -> str:
    """A figure as inline SVG whose text and axes take the colour of the page; the name keeps ids apart."""
    out = io.StringIO()
    with matplotlib.style.context(["default", STYLE, {"svg.fonttype": "none", "svg.hashsalt": name}]):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    return text.replace("<svg ", f'<svg role="img" aria-label="plot of {name}" ', 1)


def parameter_counts(figure: Figure, frame: pandas.DataFrame, records: list[dict]) -> None:
    """Table 1: both counts of parameters, a line per model."""
    counts = frame[frame["metric"] == "count"]
    for axis, column in zip(figure.subplots(1, 2), dict.fromkeys(counts["column"]), strict=True):
        _points(axis, counts[counts["column"] == column], "row", f"{column.lower()} (log axis)")


def loss_terms(figure: Figure, frame: pandas.DataFrame, records: list[dict]) -> None:
    """Table 2: the four terms of the loss during each pre-training of seed 0."""
    colours, lines = dict(zip(("lm", "kd", "lm_kd"), PALETTE, strict=False)), []
    for record in _logged(records, "pretrain"):
        on, objective = record["fields"]["on"], record["fields"]["objective"]
        label = f"{objective.upper().replace('_', ' + ')} on {on}"
        style = {"color": colours[objective], "ls": "--" if on == "wiki" else "-", "label": label}
        lines.append((record, style))
    _curves(figure, lines, "step", "step", ["embedding", "attention", "hidden", "cross_entropy"])


def training_logs(figure: Figure, frame: pandas.DataFrame, records: list[dict]) -> None:
    """Table 3: loss and validation perplexity of the two pretrained models."""
    lines = [(record, {"color": PALETTE[index % 5], "label": record["fields"]["model"]})
             for index, record in enumerate(_logged(records, "pretrained"))]
    _curves(figure, lines, "tokens", "tokens seen", ["loss", "valid_perplexity"])


def perplexities(figure: Figure, frame: pandas.DataFrame, records: list[dict]) -> None:
    """Table 4: perplexity after fine-tuning, and before it."""
    left, right = figure.subplots(1, 2)
    before = frame[frame["row"] == "Perplexity before this training"]
    _points(left, frame[frame["row"] == "Perplexity"], "column", "test perplexity (log axis)")
    _points(right, before, "column", "before fine-tuning (log axis)")


def glue_scores(figure: Figure, frame: pandas.DataFrame, records: list[dict]) -> None:
    """Tables 5 and 6: a group per column, a bar per row, the paper's values as dashes."""
    axis, frame = figure.subplots(), frame.drop_duplicates(["row", "column"])
    columns, rows = list(dict.fromkeys(frame["column"])), list(dict.fromkeys(frame["row"]))
    if frame["ours"].isna().all():
        return
    width = 0.84 / len(rows)
    for index, (row, colour) in enumerate(zip(rows, PALETTE, strict=False)):
        cells = frame[frame["row"] == row].set_index("column").reindex(columns)
        x = np.arange(len(columns)) + (index - (len(rows) - 1) / 2) * width
        error = {"yerr": cells["sd"].fillna(0), "error_kw": {"lw": 0.8, "ecolor": GREY}}
        axis.bar(x, cells["ours"].astype(float), 0.9 * width, color=colour, label=row, **error)
        axis.hlines(cells["paper"].astype(float), x - width / 2, x + width / 2, color=GREY, lw=1.4)
    axis.plot([], [], color=GREY, lw=1.4, label="printed in the paper")
    axis.set_xticks(range(len(columns)), [name.replace(" (", "\n(") for name in columns])
    axis.set_ylabel("score, %")
    axis.legend(**ABOVE, ncols=5)


def ablation(figure: Figure, frame: pandas.DataFrame, records: list[dict]) -> None:
    """Table 7: perplexity and MNLI score after each pre-training."""
    left, right = figure.subplots(1, 2)
    _points(left, frame[frame["column"] == "Wikitext-103 (pp.)"], "row", "test perplexity (log axis)")
    _points(right, frame[frame["column"] == "MNLI (f1)"], "row", "MNLI f1, %", log=False)


def alignment(figure: Figure, frame: pandas.DataFrame, records: list[dict]) -> None:
    """beyond_alignment: the cost of each ingredient; perplexity against shares of the training."""
    known = frame[frame["ours"].notna()]
    left, right = figure.subplots(1, 2)
    untrained = known[known["column"].str.startswith("times") & (known["share"] == 0)].iloc[::-1]
    rows = list(dict.fromkeys(untrained["row"]))
    for index, (column, cells) in enumerate(untrained.groupby("column", sort=True)):
        y = [rows.index(row) + 0.12 - 0.24 * index for row in cells["row"]]
        style = {"fmt": "os"[index], "color": PALETTE[index], "label": column.rpartition(", ")[2]}
        _errorbar(left, cells["ours"].astype(float), y, xerr=cells["sd"], **style)
    if rows:
        _log_axis(left, "x", "times the teacher's perplexity, no training (log axis)")
        left.axvline(1, color=INK, lw=1)
        left.set_yticks(range(len(rows)), [textwrap.fill(row.removeprefix("Aligned: "), 24) for row in rows])
        left.legend(**ABOVE, ncols=2)
    web = known[known["column"].str.startswith("web text")]
    for index, start in enumerate(("svd", "aligned")):
        cells = web[web["method"] == start]
        style = {"fmt": "-" + "os"[index], "color": PALETTE[index], "label": METHOD_LABELS[start]}
        if len(cells):
            shares = [f"{share:g}" for share in cells["share"]]
            _errorbar(right, shares, cells["ours"].astype(float), yerr=cells["sd"], **style)
    for value in web.loc[web["method"] == "teacher", "ours"]:
        right.axhline(value, color=INK, lw=1, ls=":", label="teacher")
    if right.has_data():
        _log_axis(right, "y", "test perplexity, web text (log axis)")
        right.set_xlabel("share of the light pre-training (0: none)")
        right.legend(loc="upper right")


def compression(figure: Figure, frame: pandas.DataFrame, records: list[dict]) -> None:
    """beyond_compression: perplexity on web text against size, as made and after a short training."""
    axes = figure.subplots(1, 2)
    for axis, when in zip(axes, ("as made", "trained"), strict=True):
        _size_against_perplexity(axis, frame[frame["ours"].notna()], when)
    if axes[0].has_data():
        small = {"fontsize": 7.5, "columnspacing": 1.2, "handletextpad": 0.3}
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, **small)


def _size_against_perplexity(axis: Any, frame: pandas.DataFrame, when: str) -> None:
    """A colour for each method, filled for odd layers, hollow for all layers, the factor as a label."""
    sizes = frame[frame["column"] == "parameters"].set_index("row")["ours"].astype(float)
    cells = frame[frame["column"] == f"{when}, web"].set_index("row")
    note = partial(axis.annotate, textcoords="offset points", fontsize=7)
    for method, colour in METHOD_COLOURS.items():
        offset = -9 if method == "narrow" else 3  # the narrow model lies on the aligned start
        for layers, marker, fill in (("odd", "o", colour), ("all", "s", "none")):
            part = cells[(cells["method"] == method) & (cells["layers"] == layers)]
            style = {"color": colour, "mfc": fill, "fmt": marker,
                     "label": f"{METHOD_LABELS[method]}, {layers} layers"}
            if len(part):
                _errorbar(axis, sizes[part.index], part["ours"].astype(float), yerr=part["sd"], **style)
            for cell in part.itertuples():
                note(cell.factor, (sizes[cell.Index], cell.ours), xytext=(4, offset), color=colour)
    reference = frame[frame["column"] == "as made, web"].set_index("row")
    for method, marker, size, align in (("teacher", "*", 8, "right"), ("baseline", "D", 5, "center")):
        for cell in reference[reference["method"] == method].itertuples():
            axis.plot(sizes[cell.Index], cell.ours, marker, color=INK, ms=size)
            note(cell.Index.partition(" (")[0], (sizes[cell.Index], cell.ours), xytext=(0, -10), ha=align)
    if len(cells):
        _log_axis(axis, "y", "test perplexity, web text (log axis)")
        axis.set(xlabel="parameters without the output embedding, M",
                 title={"trained": "after a short training"}.get(when, when))


def speed(figure: Figure, frame: pandas.DataFrame, records: list[dict] | None = None) -> None:
    """benchmarks/speed.py, as times the dense layer or model: single layers left, blocks and models right."""
    first = frame["dtype"] == frame["dtype"].iloc[0]
    timed = frame[first & (frame["unit"] == "ms") & (frame["variant"] != "dense")]
    layers = timed[timed["group"].str.startswith("layer, forward and backward, 1024")]
    models = timed[timed["group"].str.startswith(("block", "model"))]
    titles = ("one layer, 1,024 rows, forward and backward", "blocks of 1,024 rows and whole models")
    for axis, part, title in zip(figure.subplots(1, 2), (layers, models), titles, strict=True):
        cases, variants = list(dict.fromkeys(part["case"])), list(dict.fromkeys(part["variant"]))
        height = 0.84 / max(1, len(variants))
        for index, variant in enumerate(variants):
            cells = part[part["variant"] == variant].drop_duplicates("case").set_index("case").reindex(cases)
            y = -np.arange(len(cases)) - (index - (len(variants) - 1) / 2) * height
            colour = PALETTE[index % len(PALETTE)]
            axis.barh(y, cells["ratio"].astype(float).fillna(0), 0.9 * height, color=colour, label=variant)
        axis.axvline(1, color=INK, lw=1)
        axis.set_yticks(-np.arange(len(cases)), [case.replace(", no head", "\nno head") for case in cases])
        axis.set(xlabel="times as fast as dense", title=title)
        axis.legend(loc="upper center", bbox_to_anchor=(0.45, -0.12), ncols=2, fontsize=8)


def _errorbar(axis: Any, x: Any, y: Any, xerr: Any = None, yerr: Any = None, **style) -> None:
    errors = {name: sd.fillna(0) for name, sd in (("xerr", xerr), ("yerr", yerr)) if sd is not None}
    axis.errorbar(x, y, **errors, **{"ms": 5, "capsize": 2, **style})


def _points(axis: Any, frame: pandas.DataFrame, names: str, label: str, log: bool = True) -> None:
    """Ours as a dot with its standard deviation, the paper's value as a ring, a line per entry of `names`."""
    frame = frame.iloc[::-1]
    known = frame[frame["ours"].notna()]
    if known.empty:
        return
    in_paper = "paper" if frame["paper"].notna().any() else None
    axis.plot(frame["paper"].astype(float), frame[names], "o", mfc="none", mec=GREY, ms=8, label=in_paper)
    style = {"fmt": "o", "color": PALETTE[0], "ms": 6, "capsize": 3, "label": "ours"}
    _errorbar(axis, known["ours"].astype(float), known[names], xerr=known["sd"], **style)
    if log:
        _log_axis(axis, "x")
    axis.set(xlabel=label, ylim=(-0.6, len(frame) - 0.4))
    axis.legend(**ABOVE, ncols=2)


def _log_axis(axis: Any, which: str, label: str = "") -> None:
    """A log axis labelled 20, 50, 100; minor ticks are labelled only where it spans less than two decades."""
    axis.set(**{f"{which}scale": "log", f"{which}label": label})
    low, high = sorted(getattr(axis, f"get_{which}lim")())
    plain = FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}")
    ticks = getattr(axis, f"{which}axis")
    ticks.set_major_formatter(plain)
    ticks.set_minor_locator(LogLocator(subs=(2, 3, 4, 5, 6, 8) if high < 10 * low else (2, 5)))
    ticks.set_minor_formatter(plain if high < 100 * low else NullFormatter())
    axis.tick_params(axis=which, which="minor", labelsize=8)


def _logged(records: list[dict], stage: str) -> list[dict]:
    """The records of a stage that have a training log, of seed 0."""
    return [record for record in records if record["stage"] == stage and record["metrics"].get("log")
            and record["fields"].get("seed") in (None, 0)]


def _curves(figure: Figure, lines: list[tuple[dict, dict]], key: str, label: str, terms: list[str]) -> None:
    """A panel per term of the training logs; `lines` are records and how their lines look."""
    for axis, term in zip(figure.subplots(1, len(terms)), terms, strict=True):
        for record, style in lines:
            entries = [entry for entry in record["metrics"]["log"] if entry.get(term)]
            if entries:
                axis.plot(*([entry[name] for entry in entries] for name in (key, term)), lw=1.2, **style)
        axis.set(title=term.replace("_", " "), xlabel=label)
        if axis.has_data():
            _log_axis(axis, "y")
    fullest = max(figure.axes, key=lambda axis: len(axis.lines))
    if fullest.lines:
        figure.legend(*fullest.get_legend_handles_labels(), loc="outside lower center", ncols=4)
