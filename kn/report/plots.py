"""The plots of a report: one figure per table, and its form as SVG that follows the page's colours.

figure(4, frame, records)    a matplotlib figure; says "not run" where there is nothing to draw
svg(plot, "table4")          the same as text to be put into a page
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import matplotlib.figure
    import pandas

INK = "#2b3038"  # the plots' text and axes; on pages it becomes the colour of the text
LOOK: dict[Any, Any] = {f"{part}color": INK for part in ("text.", "axes.label", "axes.edge", "xtick.", "ytick.")} | {
    "font.size": 9, "font.family": "sans-serif", "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "axes.grid": True,
    "axes.axisbelow": True, "grid.color": "#88888855", "grid.linewidth": 0.5,
}  # fmt: skip
PALETTE = ["#4c78a8", "#e08a3c", "#b7621b", "#54a08a", "#2c7563", "#8c8c8c", "#a3a3a3", "#bababa", "#d1d1d1"]


def svg(plot: matplotlib.figure.Figure, name: str) -> str:
    """A figure as inline SVG whose text and axes take the colour of the page; name keeps the ids of several apart."""
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context({**LOOK, "svg.fonttype": "none", "svg.hashsalt": name}):
        plot.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    return text[text.index("<svg") :].replace(INK, "currentColor").replace("<svg ", f'<svg role="img" aria-label="plot of {name}" ', 1)


def figure(number: int, frame: pandas.DataFrame, records: list[dict]) -> matplotlib.figure.Figure:
    """The plot of one table; says "not run" where there is nothing to draw."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(LOOK):
        plot = Figure(figsize=(9, 3.3), layout="constrained")
        axes = list(plot.subplots(1, {2: 4, 5: 1, 6: 1}.get(number, 2), squeeze=False).flatten())
        _draw(number, frame, records, axes)
        _say_not_run(axes)
    return plot


def speed(frame: pandas.DataFrame) -> matplotlib.figure.Figure:
    """What benchmarks/speed.py measured, as times the dense layer or model: single layers left, blocks and models right."""
    import matplotlib
    from matplotlib.figure import Figure

    timed = frame[(frame["unit"] == "ms") & (frame["dtype"] == frame["dtype"].iloc[0]) & (frame["variant"] != "dense")]
    single = timed["group"].str.startswith("layer, forward and backward, 1024")
    sides = [(timed[single], "one layer, 1,024 rows, forward and backward"), (timed[timed["group"].str.startswith(("block", "model"))], "blocks of 1,024 rows and whole models")]
    with matplotlib.rc_context(LOOK):
        plot = Figure(figsize=(9, 6), layout="constrained")
        for axis, (part, title) in zip(plot.subplots(1, 2), sides, strict=True):
            cases, variants = list(dict.fromkeys(part["case"])), list(dict.fromkeys(part["variant"]))
            height = 0.84 / max(1, len(variants))
            for at, variant in enumerate(variants):
                lines = part[part["variant"] == variant].drop_duplicates("case").set_index("case").reindex(cases)
                places = [-place - (at - (len(variants) - 1) / 2) * height for place in range(len(cases))]
                axis.barh(places, lines["ratio"].astype(float).fillna(0), 0.9 * height, color=PALETTE[at % len(PALETTE)], label=variant)
            axis.axvline(1, color=INK, lw=1)
            axis.set_yticks([-place for place in range(len(cases))], [case.replace(", no head", "\nno head") for case in cases])
            axis.set(xlabel="times as fast as dense", title=title)
            axis.title.set_fontsize(9)
            axis.legend(loc="upper center", bbox_to_anchor=(0.45, -0.12), ncols=2, fontsize=8)
    return plot


def beyond(name: str, frame: pandas.DataFrame) -> matplotlib.figure.Figure:
    """beyond_alignment: what each ingredient costs, and perplexity against tokens; beyond_compression: perplexity against size, as made and after a short training."""
    import matplotlib
    from matplotlib.figure import Figure

    known = frame[frame["ours"].notna()]
    with matplotlib.rc_context(LOOK):
        plot = Figure(figsize=(9, 3.8 if name == "beyond_alignment" else 4.6), layout="constrained")
        axes = plot.subplots(1, 2)
        if name == "beyond_alignment":
            _ingredients(axes[0], known)
            _training(axes[1], known)
        else:
            for axis, when in zip(axes, ("as made", "trained"), strict=True):
                _sizes(axis, known, when)
            if axes[0].has_data():
                plot.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=7.5, columnspacing=1.2, handletextpad=0.3)
        _say_not_run(axes)
    return plot


def _say_not_run(axes: Any) -> None:
    """On every one of these axes that shows nothing."""
    for axis in axes:
        if not axis.has_data():
            axis.text(0.5, 0.5, "not run", ha="center", va="center", transform=axis.transAxes)
            axis.set(xticks=[], yticks=[])


def _ingredients(axis: Any, frame: pandas.DataFrame) -> None:
    """Perplexity before any training over the teacher's, the SVD start's too, one line each; two domains."""
    chosen = frame[frame["column"].str.startswith("times") & ~frame["row"].str.contains("pre-training|teacher")].iloc[::-1]
    rows = list(dict.fromkeys(chosen["row"]))
    for at, (column, lines) in enumerate(chosen.groupby("column", sort=True)):
        places = [rows.index(row) + 0.12 - 0.24 * at for row in lines["row"]]
        axis.errorbar(lines["ours"].astype(float), places, xerr=lines["sd"].fillna(0), fmt="os"[at], color=PALETTE[at], ms=5, capsize=2, label=column.rpartition(", ")[2])
    if rows:
        _plain_log(axis, "x")
        axis.axvline(1, color=INK, lw=1)
        axis.set_yticks(range(len(rows)), [row.removeprefix("Aligned: ").replace(": all, dense", ":\nall, dense").replace("feed-forward, attention", "feed-\nforward, attention") for row in rows])
        axis.set(xlabel="times the teacher's perplexity, no training (log axis)")
        axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderpad=0)


def _training(axis: Any, frame: pandas.DataFrame) -> None:
    """Perplexity on web text against the share of the light pre-training, from both starts."""
    chosen = frame[frame["column"].str.startswith("web text")]
    for at, start in enumerate(("SVD start", "Aligned start")):
        lines = chosen[chosen["row"].str.startswith(start)]
        shares = [row.partition(" + ")[2].partition(" ")[0] or "0" for row in lines["row"]]
        if shares:
            axis.errorbar(shares, lines["ours"].astype(float), yerr=lines["sd"].fillna(0), fmt="-" + "os"[at], color=PALETTE[at], ms=5, capsize=2, label=start)
    for value in chosen.loc[chosen["row"] == "GPT-2 (teacher)", "ours"]:
        axis.axhline(value, color=INK, lw=1, ls=":", label="teacher")
    if axis.has_data():
        _plain_log(axis, "y")
        axis.set(xlabel="share of the light pre-training (0: none)", ylabel="test perplexity, web text (log axis)")
        axis.legend(loc="upper right")


WAYS = {"Aligned start": PALETTE[0], "SVD start": PALETTE[1], "Narrow (pruned, refitted)": PALETTE[5], "Low-rank products": PALETTE[4]}


def _sizes(axis: Any, frame: pandas.DataFrame, when: str) -> None:
    """Perplexity on web text against parameters: a colour for each way, filled for odd layers, hollow for all; the factor beside each."""
    sizes = frame[frame["column"] == "parameters"].set_index("row")["ours"].astype(float)
    values = frame[frame["column"] == f"{when}, web"].set_index("row")[["ours", "sd"]].astype(float)
    for way, colour in WAYS.items():
        rows = [row for row in values.index if row.startswith(way + ", ")]
        for layers, mark in (("odd", "o"), ("all", "s")):
            part = [row for row in rows if f", {layers} layers" in row]
            if part:
                face = colour if layers == "odd" else "none"
                axis.errorbar(
                    sizes[part],
                    values.loc[part, "ours"],
                    yerr=values.loc[part, "sd"].fillna(0),
                    fmt=mark,
                    mfc=face,
                    color=colour,
                    ms=5,
                    capsize=2,
                    label=f"{way.partition(' (')[0].removesuffix(' products')}, {layers} layers",
                )
        for row in rows:
            note = row.partition("layers, ")[2].replace("factor ", "").replace(", rank", " rank").replace(", tied head", " tied")
            below = way == "Narrow (pruned, refitted)"  # it lies on the aligned start
            axis.annotate(note, (sizes[row], values.loc[row, "ours"]), xytext=(4, -9 if below else 3), textcoords="offset points", fontsize=7, color=colour)
    for at, row in enumerate(("GPT-2 (teacher)", "DistilGPT2")):
        if row in sizes.index:
            value = float(frame.loc[(frame["row"] == row) & (frame["column"] == "as made, web"), "ours"].iloc[0])
            axis.plot(sizes[row], value, "D" if at else "*", color=INK, ms=5 if at else 8)
            axis.annotate(row.partition(" (")[0], (sizes[row], value), xytext=(0, -10), textcoords="offset points", fontsize=7, ha="right" if not at else "center")
    if len(values):
        _plain_log(axis, "y")
        axis.set(xlabel="parameters without the output embedding, M", ylabel="test perplexity, web text (log axis)", title=when if when == "as made" else "after a short training")
        axis.title.set_fontsize(9)


def _draw(number: int, frame: pandas.DataFrame, records: list[dict], axes: list) -> None:
    if number == 1:
        counts = frame[frame["metric"] == "count"]
        for axis, column in zip(axes, dict.fromkeys(counts["column"]), strict=True):
            _points(axis, counts[counts["column"] == column], "row", f"{column.lower()} (log axis)", log=True)
    elif number in (2, 3):
        _curves(axes, records, number)
    elif number == 4:
        _points(axes[0], frame[frame["row"] == "Perplexity"], "column", "test perplexity (log axis)", log=True)
        _points(axes[1], frame[frame["row"] == "Perplexity before this training"], "column", "before fine-tuning (log axis)", log=True)
    elif number in (5, 6):
        _bars(axes[0], frame.drop_duplicates(["row", "column"]))
    else:
        _points(axes[0], frame[frame["column"] == "Wikitext-103 (pp.)"], "row", "test perplexity (log axis)", log=True)
        _points(axes[1], frame[frame["column"] == "MNLI (f1)"], "row", "MNLI f1, %", log=False)


def _points(axis: Any, frame: pandas.DataFrame, names: str, label: str, log: bool) -> None:
    """Ours as a dot with its standard deviation, the paper's as a ring, one line per model."""
    frame = frame.iloc[::-1]
    known = frame[frame["ours"].notna()]
    if known.empty:
        return
    axis.plot(frame["paper"].astype(float), frame[names], "o", mfc="none", mec="#888888", ms=8, label="paper" if frame["paper"].notna().any() else None)
    axis.errorbar(known["ours"].astype(float), known[names], xerr=known["sd"].fillna(0), fmt="o", color=PALETTE[0], ms=6, capsize=3, label="ours")
    if log:
        _plain_log(axis, "x")
    axis.set(xlabel=label, ylim=(-0.6, len(frame) - 0.4))
    axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderpad=0)


def _plain_log(axis: Any, which: str) -> None:
    """A log axis labelled 20, 50, 100; in-between ticks are labelled only where it spans less than two decades."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    getattr(axis, f"set_{which}scale")("log")
    low, high = sorted(getattr(axis, f"get_{which}lim")())
    plain, line = FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}"), getattr(axis, f"{which}axis")
    line.set_major_formatter(plain)
    line.set_minor_locator(LogLocator(subs=(2, 3, 4, 5, 6, 8) if high < 10 * low else (2, 5)))
    line.set_minor_formatter(plain if high < 100 * low else NullFormatter())
    axis.tick_params(axis=which, which="minor", labelsize=8)


def _bars(axis: Any, frame: pandas.DataFrame) -> None:
    """One group per column, one bar per row, standard deviations as whiskers, the paper's values as short dashes."""
    columns, rows = list(dict.fromkeys(frame["column"])), list(dict.fromkeys(frame["row"]))
    if frame["ours"].isna().all():
        return
    width = 0.84 / len(rows)
    for at, (row, colour) in enumerate(zip(rows, PALETTE, strict=False)):
        lines = frame[frame["row"] == row].set_index("column").reindex(columns)
        places = [place + (at - (len(rows) - 1) / 2) * width for place in range(len(columns))]
        whiskers = {"yerr": lines["sd"].fillna(0), "error_kw": {"lw": 0.8, "ecolor": "#888888"}}
        axis.bar(places, lines["ours"].astype(float), 0.9 * width, color=colour, label=row, **whiskers)
        axis.hlines(lines["paper"].astype(float), [p - width / 2 for p in places], [p + width / 2 for p in places], color="#888888", lw=1.4)
    axis.plot([], [], color="#888888", lw=1.4, label="printed in the paper")
    axis.set_xticks(range(len(columns)), [name.replace(" (", "\n(") for name in columns])
    axis.set_ylabel("score, %")
    axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=5, borderpad=0)


def _curves(axes: list, records: list[dict], number: int) -> None:
    """Table 2: the four terms of the loss while pre-training; Table 3: loss and validation perplexity of the two pretrained models."""
    objectives = ["lm", "kd", "lm_kd"]
    kinds = {2: ("pretrain", "step", ["embedding", "attention", "hidden", "cross_entropy"]), 3: ("pretrained", "tokens", ["loss", "valid_perplexity"])}
    kind, across, terms = kinds[number]
    chosen = [r for r in records if r["stage"] == kind and r["metrics"].get("log") and r["fields"].get("seed") in (None, 0)]
    for axis, term in zip(axes, terms, strict=True):
        for at, record in enumerate(chosen):
            entries = [entry for entry in record["metrics"]["log"] if entry.get(term)]
            name = record["fields"].get("model") or f"{record['fields']['objective'].upper().replace('_', ' + ')} on {record['fields']['on']}"
            colour = PALETTE[at % 5] if number == 3 else PALETTE[objectives.index(record["fields"]["objective"])]
            style = "--" if record["fields"].get("on") == "wiki" else "-"
            if entries:
                axis.plot([entry[across] for entry in entries], [entry[term] for entry in entries], style, color=colour, lw=1.2, label=name)
        axis.set_title(term.replace("_", " "), fontsize=9)
        axis.set(xlabel={"step": "step", "tokens": "tokens seen"}[across])
        if axis.has_data():
            _plain_log(axis, "y")
    shown = max(axes, key=lambda axis: len(axis.lines))
    if shown.lines:
        shown.figure.legend(*shown.get_legend_handles_labels(), loc="outside lower center", ncols=4)
