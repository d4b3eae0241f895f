"""Write the tables of docs/speed.md and docs/beyond.md from the benchmarks' CSVs, between their markers.

python benchmarks/docs_tables.py       after a benchmark; tests/test_docs.py checks that they are up to date
"""

from __future__ import annotations

from pathlib import Path

import pandas

BENCHMARKS = Path(__file__).parent
DOCS = BENCHMARKS.parent / "docs"
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


def read(name: str) -> pandas.DataFrame:
    """A benchmark's CSV as text."""
    return pandas.read_csv(BENCHMARKS / name, dtype=str, keep_default_na=False)


def number(text: str) -> str:
    """Two decimals, none from a thousand on."""
    value = float(text)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.2f}"


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


BLOCKS = {"speeds": ("speed.md", speeds), "steps": ("speed.md", steps), "llama": ("beyond.md", llama)}


def markers(name: str) -> tuple[str, str]:
    """The lines before and after a block."""
    return f"<!-- {name}: written by benchmarks/docs_tables.py -->\n", f"<!-- end of {name} -->\n"


def main() -> None:
    """Write every block into its page."""
    for name, (page, make) in BLOCKS.items():
        begin, end = markers(name)
        head, rest = (DOCS / page).read_text(encoding="utf-8").split(begin)
        (DOCS / page).write_text(head + begin + make() + end + rest.split(end)[1], encoding="utf-8")


if __name__ == "__main__":
    main()
