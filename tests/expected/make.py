"""Writes what is derived from the committed reports/mini and benchmarks/: tests/expected/mini.json and the README's results, what goes beyond them, and speeds.

PYTHONPATH=. python tests/expected/make.py      after a run with five seeds, or a benchmark; tests/test_readme.py sees that all are up to date
"""

import json
import math
import statistics
from pathlib import Path

import pandas

ROOT = Path(__file__).parents[2]
REPORTS, README, EXPECTED = ROOT / "reports" / "mini", ROOT / "README.md", Path(__file__).with_name("mini.json")
BEGIN, END = "<!-- results: written by tests/expected/make.py -->\n", "<!-- end of results -->\n"
SPEED, SPEED_BEGIN, SPEED_END = ROOT / "benchmarks" / "speed-cpu.csv", "<!-- speeds: written by tests/expected/make.py -->\n", "<!-- end of speeds -->\n"
BEYOND_BEGIN, BEYOND_END = "<!-- beyond: written by tests/expected/make.py -->\n", "<!-- end of beyond -->\n"
CLAIMS_BEGIN, CLAIMS_END = "<!-- claims: written by tests/expected/make.py -->\n", "<!-- end of claims -->\n"
STEPS, STEPS_BEGIN, STEPS_END = ROOT / "benchmarks" / "distill-cpu.csv", "<!-- steps: written by tests/expected/make.py -->\n", "<!-- end of steps -->\n"
LLAMA, LLAMA_BEGIN, LLAMA_END = ROOT / "benchmarks" / "smollm2-aligned.csv", "<!-- llama: written by tests/expected/make.py -->\n", "<!-- end of llama -->\n"
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


def speeds(file: Path = SPEED) -> str:
    """The README's tables of the benchmark: single layers, blocks and models, memory."""
    frame = pandas.read_csv(file, dtype=str, keep_default_na=False)
    first = frame.iloc[0]
    lines = [f"Times as fast as the dense layer or model (median of turns), {first.device}, {first.threads} threads, torch {first.torch}, {', '.join(dict.fromkeys(frame.dtype))}.", ""]

    def table(title: str, groups: tuple[str, ...], variants: dict[str, str], dtypes: list[str]) -> list[str]:
        made = [f"| {title} | " + " | ".join(variants.values()) + " |", "| --- |" + " --- |" * len(variants)]
        chosen = frame[frame["group"].isin(groups)]
        for group, case, dtype in dict.fromkeys(zip(chosen["group"], chosen["case"], chosen["dtype"], strict=True)):
            lines = chosen[(chosen["group"] == group) & (chosen["case"] == case) & (chosen["dtype"] == dtype)].set_index("variant")
            if dtype in dtypes:
                what = f"{case}, {group.rpartition(', ')[2]}".replace(" 1 rows", " 1 row") if group.startswith("layer") else case
                made.append(f"| {what}{', ' + dtype if len(dtypes) > 1 else ''} | " + " | ".join(f"{float(lines.ratio[v]):.2f}" if v in lines.index else "–" for v in variants) + " |")
        return [*made, ""]

    rows = [1, 64, 1024]
    layers = {"kronecker": "kn", "torch.kron": "torch.kron", "expand first": "expand first", "tensorly-torch, factorized": "tensorly-torch", "tensorly-torch, reconstructed": "… reconstructed"}
    lines += table("one layer, forward and backward", tuple(f"layer, forward and backward, {n} rows" for n in rows), layers, ["float32"])
    lines += table("one layer, forward", tuple(f"layer, forward, {n} rows" for n in rows), layers, ["float32"])
    whole = {"kronecker": "compressed", "folded": "folded", "tied head, folded": "tied head, folded", "every layer, folded": "every layer, folded", "DistilGPT2's shape": "DistilGPT2's shape"}
    lines += table("blocks of 1,024 rows, whole models", ("block, 1024 rows", "model, batch 1", "model, batch 8"), whole, list(dict.fromkeys(frame.dtype)))
    foot = frame[frame["group"] == "footprint"]
    columns = {"dense": "dense", **whole}
    lines += ["| memory | " + " | ".join(columns.values()) + " |", "| --- |" + " --- |" * len(columns)]
    for case in dict.fromkeys(foot["case"]):
        of = foot[foot["case"] == case].set_index("variant")
        lines.append(f"| {case}, {of.unit.iloc[0]} | " + " | ".join(f"{float(of['median'][v]):,.4g}" if v in of.index else "–" for v in columns) + " |")
    return "\n".join(lines) + "\n"


def beyond(folder: Path = REPORTS) -> str:
    """The README's tables of beyond_alignment and beyond_compression, and their claims."""
    frames = {name: pandas.read_csv(folder / f"{name}.csv", dtype=str, keep_default_na=False) for name in ("beyond_alignment", "beyond_compression")}
    held = {name: pandas.read_csv(folder / f"{name}_claims.csv", dtype=str, keep_default_na=False) for name in frames}

    def cell(name: str, row: str, column: str) -> str:
        found = frames[name][(frames[name]["row"] == row) & (frames[name]["column"] == column)]
        if not len(found):
            return "–"
        line = found.iloc[0]
        return number(line.ours) + (f" ± {number(line.sd)}" if line.sd and float(line.sd) >= 0.005 else "")

    def rows(name: str, title: str, names: dict[str, str], columns: dict[str, str]) -> list[str]:
        lines = [f"| {title} | " + " | ".join(columns.values()) + " |", "| --- |" + " --- |" * len(columns)]
        return [*lines, *(f"| {shown} | " + " | ".join(cell(name, row, column) for column in columns) + " |" for row, shown in names.items()), ""]

    frame, columns = frames["beyond_alignment"], {"web text (calibration)": "web (calibration)", "wiki text (another domain)": "wiki (another domain)"}
    ratios = {f"times the teacher's, {domain} text": f"times the teacher's, {domain}" for domain in ("web", "wiki")}
    names = list(dict.fromkeys(frame["row"]))
    seeds = frame[frame["row"].str.startswith("Aligned start")]["n"].astype(int).max()  # the teacher's and SVD start's may be the tables', of more seeds
    lines = [f"{seeds} seeds (another calibration text and another order of training for each); test perplexity ± standard deviation.", ""]
    lines += rows("beyond_alignment", "no training at all", {row: row for row in names if "pre-training" not in row}, {**columns, **ratios})
    tasks = {column: column for column in dict.fromkeys(frame["column"]) if column.endswith("fine-tuned")}
    starts = {row: row.replace(": all, dense layers corrected", "") for row in names if row.startswith(("SVD start", "Aligned start"))}
    lines += rows("beyond_alignment", "with shares of the light pre-training (LM + KD)", {"GPT-2 (teacher)": "GPT-2 (teacher)", **starts}, {**columns, **tasks})
    sizes = {row: row for row in dict.fromkeys(frames["beyond_compression"]["row"])}
    lines += rows("beyond_compression", "quality against size", sizes, {column: column for column in dict.fromkeys(frames["beyond_compression"]["column"])})
    lines += ["| claim | ours | 95 % interval | verdict |", "| --- | --- | --- | --- |"]
    others = held["beyond_compression"]
    unheld = others[others["verdict"] != "held"]
    for line in [*held["beyond_alignment"].itertuples(), *unheld.itertuples()]:
        low, high = (number(value) if value not in ("", "nan") else "–" for value in (line.low, line.high))
        lines.append(f"| {line.claim} | {number(line.ours)} | {low} to {high} | {line.verdict} |")
    return "\n".join([*lines, "", f"Of beyond_compression's {len(others)} claims {len(others) - len(unheld)} held; the other {len(unheld)} stand above."]) + "\n"


def span(line) -> str:
    """Value, 95 % interval and seeds of a claim, with its unit."""
    if not line.value:
        return "–"
    text = f"{number(line.value)} {line.unit}".strip()
    if line.low and not line.unit.startswith("of "):
        text += f", {number(line.low)} to {number(line.high)}"
    return text + (f" ({line.n})" if line.n != "0" else "")


def claims(folder: Path = REPORTS) -> str:
    """The README's part of the ledger: how often each verdict was given, every claim that does not hold or is not reproduced, and the readings that move a number."""
    ledger, effects = (pandas.read_csv(folder / f"{name}.csv", dtype=str, keep_default_na=False) for name in ("claims", "readings"))

    def counts(words) -> str:
        return ", ".join(f"{count} {word}" for word, count in words.value_counts().items())

    lines = [f"{len(ledger)} claims. By the paper's own printed numbers: {counts(ledger['paper'])}. By ours: {counts(ledger['ours'])}. Those that do not simply hold:", ""]
    lines += ["| claim | printed numbers | ours | value, 95 % interval (seeds) |", "| --- | --- | --- | --- |"]
    good = {"holds", "reproduced", "not printed", "not testable here"}
    for line in ledger[~(ledger["paper"].isin(good) & ledger["ours"].isin(good))].itertuples():
        lines.append(f"| {line.claim} (§ {line.section}) | {line.paper} | {line.ours} | {span(line)} |".replace("§ Abstract", "abstract"))
    moved = effects[effects["moved"] == "yes"]
    lines += ["", f"Readings switched one at a time: {len(effects)} effects on {effects['quantity'].nunique()} quantities, of which {len(moved)} are told from 0:", ""]
    lines += ["| reading | quantity | default → switched | effect, 95 % interval (seeds) | verdict |", "| --- | --- | --- | --- | --- |"]
    for line in moved.to_dict("records"):
        verdict = f"{line['verdict by default']} → {line['verdict switched']}" if line["turned"] == "yes" else line["verdict switched"]
        values = [number(line[key]) for key in ("default", "switched", "effect", "low", "high", "n")]
        lines.append(f"| {line['reading']} (`{line['switch']}`) | {line['quantity']} | {values[0]} → {values[1]} | {values[2]}, {values[3]} to {values[4]} ({line['n']}) | {verdict} |")
    return "\n".join(lines) + "\n"


def steps(file: Path = STEPS) -> str:
    """The README's table of the ILKD step, by length."""
    frame = pandas.read_csv(file, dtype=str, keep_default_na=False)
    first = frame.iloc[0]
    ways = list(dict.fromkeys(frame["way"]))
    lines = [f"{first.device}, {first.threads} threads, float32, torch {first.torch}; medians of {first.n} turns; in brackets times the usual way's tokens a second.", ""]
    lines += ["| tokens (layers) | " + " | ".join(f"{way}, tokens/s" for way in ways) + " | " + " | ".join(f"{way}, MB" for way in ways) + " |", "| --- |" + " --- |" * 2 * len(ways)]
    for length in dict.fromkeys(frame["length"]):
        of = frame[frame["length"] == length].set_index("way")
        speed = " | ".join(f"{float(of.tokens_per_second[way]):.0f} ({float(of.ratio[way]):.2f})" for way in ways)
        lines.append(f"| {int(length):,} ({of.layers.iloc[0]}) | {speed} | " + " | ".join(f"{float(of.peak_mb[way]):,.0f}" for way in ways) + " |")
    return "\n".join(lines) + "\n"


def llama(file: Path = LLAMA) -> str:
    """The README's table of the aligned start of a real Llama-type model: perplexity, and times the teacher's."""
    frame = pandas.read_csv(file, dtype=str, keep_default_na=False)
    first, teacher = frame.iloc[-1], frame[frame["start"] == "teacher"].iloc[0]
    texts = {"near": "other OpenWebText", "far": "WikiText test (another domain)"}
    lines = ["| SmolLM2-135M, no training | parameters without head, M | " + " | ".join(texts.values()) + " | made in, s |", "| --- |" + " --- |" * (len(texts) + 2)]
    for line in frame.to_dict("records"):
        cells = (f"{number(line[f'perplexity_{key}'])} ({number(str(float(line[f'perplexity_{key}']) / float(teacher[f'perplexity_{key}'])))})" for key in texts)
        name = {"teacher": "teacher", "SVD start, all": "SVD start", "all": "Aligned start"}.get(line["start"], f"Aligned: {line['start']} alone")
        lines.append(f"| {name} | {int(line['without_head']) / 1e6:.1f} | " + " | ".join(cells) + f" | {line['seconds'] if line['seconds'] != '0' else '–'} |")
    said = f"{first.device}, {first.threads} thread; {int(first.tokens_run):,} tokens of OpenWebText looked at; in brackets times the teacher's; {first.windows} windows of 1,024 tokens."
    return "\n".join([*lines, "", said]) + "\n"


def blocks() -> list[tuple[str, str, str]]:
    """(its beginning, its text, its end) of every part of the README that is written here."""
    return [
        (BEGIN, block(), END), (CLAIMS_BEGIN, claims(), CLAIMS_END), (BEYOND_BEGIN, beyond(), BEYOND_END), (LLAMA_BEGIN, llama(), LLAMA_END),
        (SPEED_BEGIN, speeds(), SPEED_END), (STEPS_BEGIN, steps(), STEPS_END),
    ]  # fmt: skip


def main() -> None:
    """Write them all."""
    text = README.read_text()
    for begin, made, end in blocks():
        head, rest = text.split(begin)
        text = head + begin + made + end + rest.split(end)[1]
    README.write_text(text)
    EXPECTED.write_text("[\n" + ",\n".join(" " + json.dumps(line) for line in expected()) + "\n]\n")


if __name__ == "__main__":
    main()
