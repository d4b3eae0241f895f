"""Write the tables of README.md and docs/ between their markers, and README's picture.

Run `python benchmarks/docs_tables.py` after a benchmark or `python -m kn publish`.
"""

import io
import json
import math
from pathlib import Path

import matplotlib
import pandas
from matplotlib.figure import Figure

BENCHMARKS = Path(__file__).parent
DOCS = BENCHMARKS.parent / "docs"
PUBLISHED = BENCHMARKS.parent / "reports" / "published" / "mini"
PICTURE = DOCS / "paper-against-ours.svg"
LAYERS = {  # variants of speed-cpu.csv: the column of the table
    "kronecker": "kn",
    "torch.kron": "torch.kron",
    "expand first": "expand first",
    "tensorly-torch, factorized": "tensorly-torch",
    "tensorly-torch, reconstructed": "… reconstructed",
}
MODELS = {
    "kronecker": "compressed",
    "folded": "folded",
    "tied head, folded": "tied head, folded",
    "every layer, folded": "every layer, folded",
    "DistilGPT2's shape": "DistilGPT2's shape",
}


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


def read(name: str, folder: Path = BENCHMARKS) -> pandas.DataFrame:
    """A CSV as text."""
    return pandas.read_csv(folder / name, dtype=str, keep_default_na=False)


def number(text: str) -> str:
    """Two decimals, none from a thousand on; a dash for nothing."""
    value = float(text or "nan")
    return "–" if math.isnan(value) else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.2f}"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def ratio_table(
    frame: pandas.DataFrame, title: str, groups: tuple[str, ...], variants: dict[str, str], dtypes: list[str]
) -> str:
    """Times as fast as the dense layer or model, a row per case (and dtype, where there are several)."""
    rows = []
    chosen = frame[frame["group"].isin(groups) & frame["dtype"].isin(dtypes)]
    for (group, case, dtype), lines in chosen.groupby(["group", "case", "dtype"], sort=False):
        ratios = dict(zip(lines["variant"], lines["ratio"], strict=True))
        name = (
            f"{case}, {group.rpartition(', ')[2]}".replace(" 1 rows", " 1 row")
            if group.startswith("layer")
            else case
        )
        name += f", {dtype}" if len(dtypes) > 1 else ""
        rows.append(
            [name, *(f"{float(ratios[variant]):.2f}" if variant in ratios else "–" for variant in variants)]
        )
    return markdown([title, *variants.values()], rows) + "\n"


def speeds() -> str:
    """Single layers, blocks, whole models and memory, from speed-cpu.csv."""
    frame = read("speed-cpu.csv")
    first, dtypes = frame.iloc[0], list(dict.fromkeys(frame["dtype"]))
    text = (
        f"Times as fast as the dense layer or model (median of turns), {first.device}, "
        f"{first.threads} threads, "
        f"torch {first.torch}, {', '.join(dtypes)}.\n\n"
    )
    for passes in ("forward and backward", "forward"):
        groups = tuple(f"layer, {passes}, {n} rows" for n in (1, 64, 1024))
        text += ratio_table(frame, f"one layer, {passes}", groups, LAYERS, ["float32"])
    groups = ("block, 1024 rows", "model, batch 1", "model, batch 8")
    text += ratio_table(frame, "blocks of 1,024 rows, whole models", groups, MODELS, dtypes)
    memory, columns = frame[frame["group"] == "footprint"], {"dense": "dense", **MODELS}
    rows = []
    for case, lines in memory.groupby("case", sort=False):
        medians = dict(zip(lines["variant"], lines["median"], strict=True))
        cells = (f"{float(medians[v]):,.4g}" if v in medians else "–" for v in columns)
        rows.append([f"{case}, {lines['unit'].iloc[0]}", *cells])
    return text + markdown(["memory", *columns.values()], rows)


def steps() -> str:
    """The step of ILKD by length, from distill-cpu.csv."""
    frame = read("distill-cpu.csv")
    first, ways = frame.iloc[0], list(dict.fromkeys(frame["way"]))
    rows = []
    for length, lines in frame.groupby("length", sort=False):
        of = lines.set_index("way")
        speed = [f"{float(of.tokens_per_second[way]):.0f} ({float(of.ratio[way]):.2f})" for way in ways]
        memory = [f"{float(of.peak_mb[way]):,.0f}" for way in ways]
        rows.append([f"{int(length):,} ({of.layers.iloc[0]})", *speed, *memory])
    header = ["tokens (layers)", *(f"{way}, tokens/s" for way in ways), *(f"{way}, MB" for way in ways)]
    return (
        f"{first.device}, {first.threads} threads, float32, torch {first.torch}; medians of {first.n} turns; "
        f"in brackets times the usual way's tokens a second.\n\n" + markdown(header, rows)
    )


def llama() -> str:
    """The aligned start of SmolLM2-135M: perplexity, and times the teacher's, from smollm2-aligned.csv."""
    frame = read("smollm2-aligned.csv")
    teacher, last = frame[frame["start"] == "teacher"].iloc[0], frame.iloc[-1]
    texts = {"near": "other OpenWebText", "far": "WikiText test (another domain)"}
    names = {"teacher": "teacher", "SVD start, all": "SVD start", "all": "Aligned start"}
    rows = []
    for line in frame.to_dict("records"):
        values = [(line[f"perplexity_{key}"], teacher[f"perplexity_{key}"]) for key in texts]
        cells = [f"{number(value)} ({number(str(float(value) / float(of)))})" for value, of in values]
        name = names.get(line["start"], f"Aligned: {line['start']} alone")
        seconds = line["seconds"] if line["seconds"] != "0" else "–"
        rows.append([name, f"{int(line['without_head']) / 1e6:.1f}", *cells, seconds])
    header = ["SmolLM2-135M, no training", "parameters without head, M", *texts.values(), "made in, s"]
    return (
        markdown(header, rows)
        + f"\n{last.device}, {last.threads} thread; "
        f"{int(last.tokens_run):,} tokens of OpenWebText looked at; "
        f"in brackets times the teacher's; {last.windows} windows of 1,024 tokens.\n"
    )


def results() -> str:
    """README's table: the main claims, the paper's value, ours with its 95 % interval."""
    ledger = read("claims.csv", PUBLISHED).set_index("id")
    run = json.loads((PUBLISHED / "run.json").read_text(encoding="utf-8"))
    rows = []
    for name, title in MAIN_CLAIMS.items():
        line = ledger.loc[name]
        interval = f" ({number(line.low)} to {number(line.high)})" if line.low else ""
        rows.append([title, number(line.paper_value), number(line.value) + interval, line.ours])
    counts = ", ".join(f"{count} {verdict}" for verdict, count in ledger["ours"].value_counts().items())
    rows.append([f"**All {len(ledger)} claims of the paper's text**", "", "", counts])
    about = f"{run['profile']}, {run['seeds']} seeds, {run['environment']['device']}"
    return markdown([about, "paper", "ours (95 % interval)", ""], rows)


def picture() -> Figure:
    """Paper (rings) against ours (dots, ± standard deviation): PANELS of Tables 4, 7 and 5."""
    matplotlib.rcdefaults()
    matplotlib.rcParams["svg.hashsalt"] = "kn"  # equal pictures are equal files
    figure = Figure(figsize=(9.6, 2.9), layout="constrained", facecolor="white")
    for axes, (title, number, cells, named_by) in zip(figure.subplots(1, 3), PANELS, strict=True):
        frame = read(f"table{number}.csv", PUBLISHED).drop_duplicates(["row", "column"])
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


BLOCKS = {
    "results": ("../README.md", results), "speeds": ("speed.md", speeds), "steps": ("speed.md", steps),
    "llama": ("beyond.md", llama),
}


def markers(name: str) -> tuple[str, str]:
    """The lines before and after a block."""
    return f"<!-- {name}: written by benchmarks/docs_tables.py -->\n", f"<!-- end of {name} -->\n"


def main() -> None:
    """Write every block into its page, and the picture."""
    for name, (page, make) in BLOCKS.items():
        begin, end = markers(name)
        head, rest = (DOCS / page).read_text(encoding="utf-8").split(begin)
        (DOCS / page).write_text(head + begin + make() + end + rest.split(end)[1], encoding="utf-8")
    buffer = io.StringIO()
    picture().savefig(buffer, format="svg", metadata={"Date": None})
    text = "\n".join(line.rstrip() for line in buffer.getvalue().splitlines())
    PICTURE.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
