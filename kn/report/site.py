"""The pages of a report: self-contained HTML, no script, nothing fetched, light or dark as the reader's system is.

fragment(frame)          a table (or the trends) alone, for a notebook
table_page(…)            one table with its plot and the stages behind it
index_page(…)            trends, all tables, all plots
records_page(…)          every stage: fields, metrics, provenance
"""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime
from html import escape
from typing import TYPE_CHECKING, Any

from kn.paper import printed
from kn.report.plots import svg
from kn.report.style import PAGE_STYLE, TABLE_STYLE
from kn.suite.plan import TABLES
from kn.suite.run import command

if TYPE_CHECKING:
    import matplotlib.figure
    import pandas

TITLES: dict[int | str, str] = {
    1: "Configuration of the models",
    2: "Hyper-parameters",
    3: "Cost of training",
    4: "Perplexity on WikiText-103, after fine-tuning on it",
    5: "GLUE, development sets",
    6: "GLUE, test sets",
    7: "Ablation of the pre-training",
}
SETTLED = ("shape", "count", "hyper-parameter", "parameters without the output embedding", "parameters", "steps", "weights")  # metrics in which nothing is drawn
SPREAD, WIDE = "± sd (n)", 8  # a line of its own in tables of more columns
NOTES: dict[int | str, str] = {
    1: "Shapes read off models that were really built. <em>Erratum</em>: two digits of the printed vocabulary are swapped, GPT-2 has 50257 tokens.",
    2: "Ours are the values that the training runs used, read back from their records.",
    3: "The paper's count (*) leaves out the output embedding, which KnGPT2 does not share with the input; both counts are given. The hours printed for DistilGPT2 are DistilBERT's (footnote 4).",
    4: "Test text, lower is better. Windows do not overlap; per word divides the same log-likelihood by the number of words.",
    5: "In per cent; the Average over all seven tasks is what the paper prints (truncated). A task is <em>uninformative</em> where the teacher leads the best "
    "of majority class (the one answer that scores best in training), a word list (logistic regression on the words and pairs of words of each text), random "
    "initialisation and one sentence only by less than 5 points; it is left out of the second average and of all verdicts.",
    6: "In per cent, predicted first and scored afterwards; the files for GLUE's server lie as submission.zip in each score stage. Uninformative tasks are those of Table 5.",
    7: "Pre-training on WikiText-103, perplexity directly after it, MNLI fine-tuned afterwards without distillation. The first row is the SVD start.",
}
BEYOND: dict[int | str, str] = {
    "beyond_alignment": "Beyond the paper: a start that needs no healing",
    "beyond_compression": "Beyond the paper: quality against size",
}
NOTES |= {
    "beyond_alignment": "The aligned start chooses, of all weight settings of one GPT-2, the one nearest to Kronecker form under real activations. Test text, lower is better; "
    "shares are of the light pre-training with LM + KD, beside the teacher (SVD start) or the teacher in the aligned basis (aligned start), each at its own learning rate. "
    "Scores are dev scores of the twins, fine-tuned without distillation. The calibration text is drawn anew for each seed.",
    "beyond_compression": "Each model as it was made and after a short LM + KD. <em>Narrow</em> is the aligned start with B left as it was, (1, 0, …): what pruning hidden units, low-rank "
    "heads and a low-rank embedding give, refitted. <em>Low-rank products</em> have two thin factors a matrix, activation-weighted, with the same corrections and calibration text. "
    "The embedding's factor is 2 throughout.",
}  # fmt: skip


def quantity(value: Any, sign: bool = False, points: bool = False) -> str:
    """A number for reading, three to five digits (percentage points: two decimals), with a real minus; text is returned as it is."""
    if isinstance(value, (str, bool)) or value is None:
        return "" if value is None else str(value)
    if math.isnan(value):
        return ""
    size = abs(value)
    whole = isinstance(value, int) or (float(value).is_integer() and size >= 100)
    if points:
        return ("−" if value < 0 else "+" if sign else "") + f"{size:.2f}"
    text = f"{size:,.0f}" if whole or size >= 1000 else f"{size:.1f}" if size >= 100 else f"{size:.2f}" if size >= 1 else f"{size:.3g}"
    text = f"{value:g}" if value == 0 else text
    text = text.replace("e-0", "e-")
    return ("−" if value < 0 else "+" if sign else "") + text


def deviation(sd: float, value: str) -> str:
    """A standard deviation with as many decimals as the value it stands beside has."""
    decimals = len(value.partition(".")[2])
    text = f"{sd:,.{decimals}f}"
    return text if text.strip("0.") else f"&lt;{10**-decimals:.{decimals}f}"


def anchor(record: dict, depth: int | None = None) -> str:
    """The name of a stage's place on records.html; seeds of one stage share it, and so does everything from a depth of fields on."""
    parts = [record["stage"], *(str(value) for key, value in record["fields"].items() if key != "seed")]
    return "-".join("".join(c if c.isalnum() or c == "_" else "_" for c in part) for part in parts[:depth])


def cell(line: Any, links: dict[str, str], keys: tuple[str, ...], paper: str) -> str:
    """One cell: of paper, ours ± sd (n) and delta those that its row shows, one under the other, and a verdict where there is one."""
    points = line.unit == "%"
    targets = list(dict.fromkeys(links[path] for path in line.stage.split(";") if path in links))
    if len(targets) > 1:  # an average: the place above the single tasks
        page, _, name = targets[0].partition("#")
        targets = [f"{page}#{'-'.join(name.split('-')[:2])}"]
    ours, spread = escape(quantity(line.ours, points=points)) or "not run", ""
    if line.n and not isinstance(line.ours, str) and line.metric not in SETTLED:
        spread = f"<small>{f'± {deviation(line.sd, ours)} ' if line.n > 1 and line.sd > 0 else ''}({line.n})</small>"
    beside = "" if SPREAD in keys or not spread else f" {spread}"
    shown = {"ours": f'<a class="ours" href="{escape(targets[0])}">{ours}{beside}</a>' if targets else f'<span class="ours">{ours}{beside}</span>'}
    shown[SPREAD] = f'<span class="delta">{spread or "–"}</span>'
    shown["paper"] = f'<span class="paper">{escape(paper) or "–"}</span>'
    shown["Δ"] = f'<span class="delta">{quantity(line.delta, sign=True, points=points) or "–"}</span>'
    tag = "" if line.verdict in ("recorded", "not run", "uninformative") else f'<span class="tag">{escape(line.verdict)}</span>'
    kind = ["text"] * isinstance(line.ours, str) * (len(keys) == 1) + ["faint"] * (line.verdict in ("uninformative", "not run"))
    return f'<td class="{" ".join(kind)}">' + "".join(shown[key] for key in keys) + tag + "</td>"


def fragment(frame: pandas.DataFrame, links: dict[str, str] | None = None, alone: bool = True) -> str:
    """A table, or the trends, as HTML; alone brings its own style sheet, for a notebook."""
    body = _claims(frame) if "claim" in frame else _grid(frame, links or {})
    if not alone:
        return body
    return f'<style>{TABLE_STYLE}</style><div class="kn">{body}</div>'


def _grid(frame: pandas.DataFrame, links: dict[str, str]) -> str:
    first = frame.drop_duplicates(["row", "column"])  # further metrics of a cell are in the CSV
    columns = list(dict.fromkeys(first["column"]))
    dull = {column for column in columns if (first[first["column"] == column]["verdict"] == "uninformative").any()}
    head = "".join(f'<th scope="col">{escape(c)}{"<br><span class=tag>uninformative</span>" if c in dull else ""}</th>' for c in columns)
    lines = {(line.row, line.column): line for line in first.itertuples()}
    paper = {(line.row, line.column): "" if line.paper is None or line.paper != line.paper else str(line.paper) for line in first.itertuples()}
    if first["table"].iloc[0] not in BEYOND:
        paper |= {(source.row, source.column): source.value for source in printed(int(first["table"].iloc[0])).itertuples()}  # 65.0 and not 65
    rows, compared = [], bool(first["paper"].notna().any())
    for row in dict.fromkeys(first["row"]):
        present = [lines.get((row, column)) for column in columns]
        lines_here = [line for line in present if line is not None]
        beside = any(line.paper is not None and line.paper == line.paper for line in lines_here)
        keys = ("paper",) * beside + ("ours",) + (SPREAD,) * (len(columns) > WIDE) + ("Δ",) * any(line.delta == line.delta for line in lines_here)
        key = "".join(f"<span>{word}</span>" for word in keys) if compared else ""
        units = {line.unit for line in lines_here}
        unit = f" <span class=tag>{escape(*units)}</span>" if len(units) == 1 and units <= {"M", "MB"} else ""
        cells = "".join("<td></td>" if line is None else cell(line, links, keys, paper[row, line.column]) for line in present)
        rows.append(f'<tr><th scope="row">{escape(row)}{unit}</th><td class="key">{key}</td>{cells}</tr>')
    wide = "wide" if len(columns) > WIDE else "" if compared else "named"
    name = f"table {first['table'].iloc[0]}".replace("table beyond_", "").replace("_", " ")
    return region(name, f'<td></td><td class="key"></td>{head}', "".join(rows), wide)


def _claims(frame: pandas.DataFrame) -> str:
    rows, compared = [], bool(frame["paper"].notna().any())
    for line in frame.itertuples():
        points = line.claim.endswith("points")
        paper, ours, low, high = (quantity(value, points=points) for value in (line.paper, line.ours, line.low, line.high))
        values = [*[paper] * compared, f"<b>{ours}</b>", f"{low} … {high}" if low else "", str(line.n)]
        name = line.verdict.replace(" ", "-") if line.verdict in ("held", "not held") else "tag"
        cells = "".join(f"<td>{value}</td>" for value in values)
        rows.append(f'<tr><td class="claim">{escape(line.claim)}</td><td class="{name}">{escape(line.verdict)}</td>{cells}</tr>')
    head = "".join(f'<th scope="col">{word}</th>' for word in ("claim", "verdict", *["paper"] * compared, "ours", "95 % interval", "n"))
    return region(f"claims: {frame['claim'].iloc[0]}" if len(frame) else "claims", head, "".join(rows))  # several stand on one page


def cautions(records: list[dict], profile: str) -> list[str]:
    """What a reader must know before any number: stand-in data, another corpus than the committed one, a rehearsal."""
    found = [] if profile == "paper" else [f"{profile}: documentation text, not the paper's data"]
    metrics = [record["metrics"] for record in records]
    if any(m.get("as_committed") is False for m in metrics):
        found.append("the text of this run is not the committed corpus (other package versions?): numbers may differ from the committed ones")
    if any(m.get("weights") == "random" for m in metrics):
        found.append("a rehearsal: models with random weights and partly carved data, the numbers mean nothing")
    for name in ("torch", "transformers"):
        used = sorted({str(packages[name]) for record in records if (packages := record["provenance"].get("packages") or {}).get(name)})
        if len(used) > 1:
            found.append(f"stages were made with {name} {' and '.join(used)}: numbers of one table may differ for that alone; make all with one, in a store of its own (KN_HOME=…)")
    return found


def region(name: str, head: str, rows: str, kind: str = "", outside: str = "") -> str:
    """A table that scrolls sideways where it must, which a keyboard reaches and a screen reader names."""
    top = f"<thead><tr>{head}</tr></thead>" if head else ""
    return (
        f'<div class="{" ".join(filter(None, ("scroll", outside)))}" tabindex="0" role="region" aria-label="{escape(name)}">'
        f"<table{f' class={kind}' if kind else ''}>{top}<tbody>{rows}</tbody></table></div>"
    )


def averages_section(frame: pandas.DataFrame, level: int = 2) -> str:
    """The averages of Table 5 or 6 with both intervals (kn.averages), below a heading of this level."""
    if frame.empty:
        return ""

    def span(low: float, high: float, sign: bool) -> str:
        return f"{quantity(low, sign, points=True)} … {quantity(high, sign, points=True)}" if low == low else "–"

    rows = ""
    for line in frame.itertuples():
        sign = "−" in line.average
        cells = (f"<b>{quantity(line.value, sign, points=True)}</b>", span(line.low, line.high, sign), span(line.low_tasks, line.high_tasks, sign), str(line.n), str(line.tasks))
        rows += f'<tr><th scope="row">{escape(line.average)}</th>' + "".join(f"<td>{value}</td>" for value in cells) + "</tr>"
    head = "".join(f'<th scope="col">{word}</th>' for word in ("average, points", "ours", "95 % over seeds", "95 % over tasks and seeds", "seeds", "tasks"))
    number = frame["table"].iloc[0]
    return (
        f"<h{level}>Averages and differences</h{level}><p>Over the informative tasks, differences paired by task and seed. The interval over seeds is about these tasks; the one over tasks and seeds "
        "takes the tasks for drawn too (two-way random effects, Student’s t): what would hold for other tasks of the kind. "
        + f'<span class=soft><a href="table{number}_averages.csv">CSV</a></span></p>'
        + region(f"averages of table {number}", head, rows, "named")
    )


MENU = [
    ("index.html", "Index"), ("claims.html", "Claims"), *((f"table{number}.html", f"Table {number}") for number in TABLES),
    ("records.html", "Stages"), ("how.html", "How it was made"), ("failed.html", "What failed"), ("../index.html", "All profiles"), ("../api.html", "Interface"),
]  # fmt: skip


def page(title: str, body: str, profile: str, records: list[dict], here: str = "", menu: list[tuple[str, str]] | None = None) -> str:
    """A whole page with its style sheet, cautions and menu; `here` is the menu's entry that it is."""
    banner = "".join(f'<div class="banner">{escape(line)}</div>' for line in cautions(records, profile)) if profile else ""
    banner = f"<header>{banner}</header>" if banner else ""
    links = "".join(f'<a href="{escape(target)}"{" aria-current=page" if target == here else ""}>{escape(name)}</a>' for target, name in (MENU if menu is None else menu))
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{TABLE_STYLE}{PAGE_STYLE}</style></head>\n"
        f'<body class="kn"><a class="skip" href="#main">To the content</a>{banner}<nav aria-label="pages"><div>{links}</div></nav>'
        f'<main id="main"><h1>{escape(title)}</h1>\n{body}\n</main></body></html>\n'
    )


def file_of(number: int | str) -> str:
    """The name of a table's files: table4, beyond_alignment, claims."""
    return number if isinstance(number, str) else f"table{number}"


def _section(number: int | str, frame: pandas.DataFrame, plot: matplotlib.figure.Figure, links: dict[str, str], below: str = "") -> str:
    name = file_of(number)
    note = f"<p>{NOTES[number]} <span class=soft><a href={name}.csv>CSV with every metric</a></span></p>"
    picture = f'<figure><div tabindex="0" role="region" aria-label="plot of {escape(name)}">{svg(plot, name)}</div></figure>'
    return f"{note}{fragment(frame, links, alone=False)}{below}{picture}"


def _provenance(records: list[dict]) -> str:
    known = [record["provenance"] for record in records]
    said = {key: ", ".join(dict.fromkeys(str(entry[key]) for entry in known if entry.get(key))) for key in ("device", "commit")}
    seconds, peak = sum(entry.get("wall_seconds") or 0 for entry in known), max((entry.get("peak_bytes") or 0 for entry in known), default=0)
    parts = [f"{len(records)} stages", f"{seconds / 60:.1f} minutes of work", f"at most {peak / 1e9:.2f} GB of memory"] if records else ["nothing has run yet"]
    return f'<p class="soft">{escape(" · ".join([*parts, said["device"], said["commit"] and "commit " + said["commit"]]).strip(" ·"))}</p>'


def table_page(number: int | str, frame: pandas.DataFrame, records: list[dict], profile: str, plot: matplotlib.figure.Figure, claims: pandas.DataFrame | None = None, below: str = "") -> str:
    """The page of one table, with its claims if it has some and what stands `below` the table; the stages behind its numbers follow below it, so that every link stays on the page."""
    used = {path for stages in frame["stage"] for path in stages.split(";")}
    behind = [record for record in records if record["path"] in used]
    links = {record["path"]: f"#{anchor(record)}" for record in behind}
    held = "" if claims is None else f"<h2>Claims</h2>{fragment(claims, alone=False)}"
    body = _provenance(behind) + _section(number, frame, plot, links, below) + held + "<h2>The stages behind these numbers</h2>" + _groups(behind, profile)
    return page(BEYOND.get(number) or f"Table {number}. {TITLES[number]}", body, profile, records, f"{file_of(number)}.html")


def speed_section(frame: pandas.DataFrame, plot: matplotlib.figure.Figure) -> str:
    """What benchmarks/speed.py measured on one machine: the plot, and all its lines to open."""
    first = frame.iloc[0]
    columns = ["group", "case", "dtype", "variant", "median", "low", "high", "unit", "ratio", "n"]
    head = "".join(f'<th scope="col">{name}</th>' for name in columns)
    lines = "".join(f'<tr><th scope="row">{escape(str(row[0]))}</th>' + "".join(f"<td>{escape(str(value))}</td>" for value in row[1:]) + "</tr>" for row in frame[columns].itertuples(index=False))
    return (
        f"<p>Measured by <code>benchmarks/speed.py</code> on {escape(str(first['device']))}, {escape(str(first['threads']))} threads, torch {escape(str(first['torch']))}, the sizes of GPT-2 small; "
        "not by this run. Variants take turns; a ratio is the median over turns of the dense one's time and theirs.</p>"
        f'<figure><div tabindex="0" role="region" aria-label="plot of speeds">{svg(plot, "the speed of layers and models")}</div></figure>'
        f"<details><summary>All {len(frame)} lines</summary>{region('all lines of the benchmark', head, lines)}</details>"
    )


def index_page(tables: dict, plots: dict, claims: pandas.DataFrame, records: list[dict], profile: str, speeds: str = "", beyond: dict | None = None, verdicts: str = "",
               below: dict[int, str] | None = None) -> str:  # fmt: skip
    """One page with the trends, all seven tables and their plots, what goes beyond them {name: (table, plot, claims)}, and the benchmark's section; numbers link to records.html."""
    links = {record["path"]: f"records.html#{anchor(record)}" for record in records}
    body = (
        "<p>“Kronecker Decomposition for GPT Compression”: each cell shows the value the paper prints, ours with its standard deviation and number of seeds, "
        "and the difference. Numbers lead to the stage that made them. Values of another profile than the paper's are never judged equal to the paper's; "
        "what can be judged are orderings.</p>"
        + _provenance(records)
        + _contents(tables, beyond or {}, bool(speeds), bool(verdicts))
        + (f'<h2 id="verdicts">Verdicts</h2><p>Each chip is one claim of the paper’s text and leads to its quote and the numbers behind the verdict.</p>{verdicts}' if verdicts else "")
        + '<h2 id="trends">Trends</h2>'
        "<p>A difference holds if the 95 % interval of the seed-paired difference leaves 0 (a ratio: leaves 1) on the claimed side.</p>"
    )
    body += fragment(claims, alone=False)
    for number, frame in tables.items():
        body += f'\n<h2 id="table{number}">Table {number}. {TITLES[number]}</h2>{_section(number, frame, plots[number], links, (below or {}).get(number, ""))}'
    for name, (frame, plot, held) in (beyond or {}).items():
        body += f'\n<h2 id="{name}">{BEYOND[name]}</h2>{_section(name, frame, plot, links)}{fragment(held, alone=False)}'
    if speeds:
        body += f'\n<h2 id="speed">How fast the layers and the model are</h2>{speeds}'
    return page(f"KnGPT2, reproduced: {profile}", body, profile, records, "index.html")


def _contents(tables: dict, beyond: dict, speeds: bool, verdicts: bool) -> str:
    names = [*[("verdicts", "Verdicts")] * verdicts, ("trends", "Trends"), *((f"table{n}", f"Table {n}") for n in tables)]
    names += [*((name, BEYOND[name].rpartition(": ")[2].capitalize()) for name in beyond), *[("speed", "Speed")] * speeds]
    return '<p class="soft">On this page: ' + " · ".join(f'<a href="#{name}">{escape(text)}</a>' for name, text in names) + "</p>"


def records_page(records: list[dict], profile: str) -> str:
    """Every stage with its fields, metrics, provenance and path; the seeds of one stage stand side by side."""
    kinds = "".join(f'<a href="#{escape(kind)}">{escape(kind.replace("_", " "))}</a> ' for kind in dict.fromkeys(record["stage"] for record in records))
    return page("Stages", f'{_provenance(records)}<p class="soft">{kinds}</p>{_groups(records, profile)}', profile, records, "records.html")


def _groups(records: list[dict], profile: str) -> str:
    groups: dict[str, list[dict]] = {}
    for record in records:
        groups.setdefault(anchor(record), []).append(record)
    parts, seen = [], set()
    for name, members in groups.items():
        marks = [mark for mark in (anchor(members[0], 1), anchor(members[0], 2)) if mark not in seen and mark != name]
        seen.update([*marks, name])
        rows = [dict(_flat({"path": m["path"], "command": command(m, profile), **m["fields"], **m["metrics"], **m["provenance"]})) for m in members]
        rows = [{**row, "settings": json.dumps(m.get("settings", {}), ensure_ascii=False), "inputs": ", ".join(m.get("inputs", [])) or "none"} for row, m in zip(rows, members, strict=True)]
        lines = ""
        for key in dict.fromkeys(key for row in rows for key in row):
            values = [row.get(key, "") for row in rows]
            values = values[:1] if len(set(values)) == 1 else values  # what all seeds share is said once
            span = f' colspan="{len(rows)}"' if len(values) < len(rows) else ""
            lines += f'<tr><th scope="row">{escape(key)}</th>' + "".join(f"<td{span}>{value if key == 'log' else escape(value)}</td>" for value in values) + "</tr>"
        marked = "".join(f'<span id="{escape(mark)}"></span>' for mark in marks)
        title = escape(" · ".join(name.split("-"))).replace("_", " ")
        parts.append(f'{marked}<h3 id="{escape(name)}">{title}</h3>{region(" · ".join(name.split("-")).replace("_", " "), "", lines, outside="record")}')
    return "\n".join(parts)


def _flat(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Nested dictionaries as dotted names; a training log is HTML already, to be opened."""
    if isinstance(value, dict):
        return [pair for key, inner in value.items() for pair in _flat(inner, f"{prefix}.{key}" if prefix else str(key))]
    if prefix == "log":
        return [(prefix, _log(value))]
    if prefix == "started":
        return [(prefix, f"{datetime.fromtimestamp(value, UTC):%Y-%m-%d %H:%M:%S} UTC")]
    return [(prefix, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))]


def _log(entries: Any) -> str:
    if not (isinstance(entries, list) and entries and all(isinstance(entry, dict) for entry in entries)):
        return escape(json.dumps(entries, ensure_ascii=False, default=str))
    keys = list(dict.fromkeys(key for entry in entries for key in entry))
    lines = [" ".join(keys), *(" ".join(quantity(entry[key]) if isinstance(entry.get(key), int | float) else str(entry.get(key, "–")) for key in keys) for entry in entries)]
    return f"<details><summary>{len(entries)} entries</summary><pre>{escape(chr(10).join(lines))}</pre></details>"
