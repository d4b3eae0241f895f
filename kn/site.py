"""The pages of a report: self-contained HTML, no script, nothing fetched, light or dark as the reader's system is.

fragment(frame)          a table (or the trends) alone, for a notebook
table_page(…)            one table with its plot and the stages behind it
index_page(…)            trends, all tables, all plots
records_page(…)          every stage: fields, metrics, provenance
"""

from __future__ import annotations

import json
import math
from html import escape
from typing import TYPE_CHECKING, Any

from kn.paper import printed
from kn.plots import svg

if TYPE_CHECKING:
    import matplotlib.figure
    import pandas

TITLES = {
    1: "Configuration of the models",
    2: "Hyper-parameters",
    3: "Cost of training",
    4: "Perplexity on WikiText-103, after fine-tuning on it",
    5: "GLUE, development sets",
    6: "GLUE, test sets",
    7: "Ablation of the pre-training",
}
NOTES = {
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
BEYOND = {
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
TABLE_STYLE = """
.kn{color-scheme:light dark;--page:#fbfaf7;--ink:#22262b;--soft:#656c75;--line:#dedbd3;--rule:#22262b;--link:#0b5c8a;--banner:#fff3d6;--edge:#d9a520;
--held:#1e6b3a;--failed:#a52a2a;--mark:#e8f1f7;--sans:system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;
background:var(--page);color:var(--ink)}
@media(prefers-color-scheme:dark){.kn{--page:#15181b;--ink:#e4e1da;--soft:#9aa1a9;--line:#33383e;--rule:#b9b6af;--link:#7cb9e0;--banner:#3a2f12;--edge:#b58a1c;
--held:#7ccb97;--failed:#ef8f8f;--mark:#1f2a33}}
.kn .scroll{overflow-x:auto;margin:.8rem 0;border-top:2px solid var(--rule);border-bottom:2px solid var(--rule);font:.84rem/1.5 var(--sans)}
.kn table{border-collapse:collapse;font-variant-numeric:tabular-nums;min-width:100%;margin:0;border:0}
.kn th,.kn td{padding:.45rem .45rem;text-align:right;vertical-align:top;white-space:nowrap;border:0;font-size:inherit}
.kn thead th.key{min-width:0!important}
.kn thead th{white-space:normal;min-width:4.6rem;max-width:10rem;border-bottom:1px solid var(--rule);font-weight:600;vertical-align:bottom}
.kn tbody tr+tr>*{border-top:1px solid var(--line)}
.kn table.wide{font-size:.93em}.kn .named th:first-child{min-width:13rem;max-width:20rem}
.kn tbody tr:nth-child(n){background:none}.kn th:first-child{position:sticky;left:0;z-index:1;background:var(--page);text-align:left;font-weight:600;
white-space:normal;hyphens:auto;min-width:7.6rem;max-width:13rem}.kn td>span,.kn td>a{display:block}.kn .key,.kn .paper,.kn .delta{color:var(--soft)}
.kn td.key{font-size:.92em;line-height:1.63;text-align:left;padding-left:.2rem;padding-right:0}.kn .ours{font-weight:600;color:var(--ink);text-decoration:none}
.kn a.ours{text-decoration:underline;text-decoration-color:var(--line);text-underline-offset:.2em}.kn a.ours:hover{text-decoration-color:currentColor}
.kn .ours small{font-weight:400;font-size:.85em;color:var(--soft)}.kn .tag{font-size:.9em;font-style:italic;color:var(--soft);font-weight:400}
.kn td.text{white-space:normal;min-width:7rem;max-width:18rem}.kn td.claim{text-align:left;white-space:normal;min-width:10.5rem;max-width:34rem}
.kn .faint .ours{font-weight:400;color:var(--soft)}.kn .held{color:var(--held);font-weight:600}.kn .not-held{color:var(--failed);font-weight:600}
"""
PAGE_STYLE = """
*{box-sizing:border-box}html{-webkit-text-size-adjust:100%;scroll-padding-top:3.5rem}
body{margin:0;font:17px/1.55 Charter,"Iowan Old Style",Palatino,Georgia,"DejaVu Serif",serif}
main,nav>div{max-width:76rem;margin:0 auto;padding:0 1.25rem}main{padding-bottom:4rem}
h1{font-size:1.9rem;line-height:1.2;margin:2rem 0 .3rem;font-weight:600}h2{font-size:1.35rem;line-height:1.3;margin:3.2rem 0 .4rem;font-weight:600}
h3{font-size:1.05rem;margin:2rem 0 .3rem}p{max-width:44rem;margin:.4rem 0 .9rem}a{color:var(--link)}
.soft,figcaption{font:.84rem/1.5 var(--sans);color:var(--soft)}
.banner{background:var(--banner);border-bottom:2px solid var(--edge);text-align:center;padding:.5rem 1rem;font:600 .9rem/1.4 var(--sans)}
nav{position:sticky;top:0;z-index:3;background:var(--page);border-bottom:1px solid var(--line);font:.86rem/1.5 var(--sans)}
nav>div{display:flex;gap:1.1rem;overflow-x:auto;padding-top:.55rem;padding-bottom:.55rem;white-space:nowrap}nav a{text-decoration:none}
figure{margin:1.2rem 0 0}figure>div{overflow-x:auto}figure svg{display:block;width:100%;min-width:34rem;max-width:52rem;height:auto}
.kn .record table{min-width:0}.kn .record th:first-child{min-width:9rem}
.record td{text-align:left!important;white-space:normal!important;overflow-wrap:anywhere;min-width:6rem;max-width:34rem}
.record tbody th{max-width:none!important;overflow-wrap:anywhere;font-weight:400!important;color:var(--soft)}
:target{background:var(--mark)}@media(max-width:600px){body{font-size:16px}.kn th,.kn td{padding:.4rem .5rem}
.kn th:first-child,.kn .named th:first-child{min-width:5.2rem;max-width:6.2rem}h1{font-size:1.5rem}main,nav>div{padding-left:.9rem;padding-right:.9rem}}
"""


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
    ours = escape(quantity(line.ours, points=points)) or "not run"
    if line.n > 1 and line.sd > 0:
        ours += f" <small>± {deviation(line.sd, ours)} ({line.n})</small>"
    shown = {"ours": f'<a class="ours" href="{escape(targets[0])}">{ours}</a>' if targets else f'<span class="ours">{ours}</span>'}
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
        keys = ("paper",) * beside + ("ours",) + ("Δ",) * any(line.delta == line.delta for line in lines_here)
        key = "".join(f"<span>{word}</span>" for word in keys) if compared else ""
        units = {line.unit for line in lines_here}
        unit = f" <span class=tag>{escape(*units)}</span>" if len(units) == 1 and units <= {"M", "MB"} else ""
        cells = "".join("<td></td>" if line is None else cell(line, links, keys, paper[row, line.column]) for line in present)
        rows.append(f'<tr><th scope="row">{escape(row)}{unit}</th><td class="key">{key}</td>{cells}</tr>')
    wide = ' class="wide"' if len(columns) > 8 else "" if compared else ' class="named"'
    head = f'<thead><tr><th></th><th class="key"></th>{head}</tr></thead>'
    return f'<div class="scroll" tabindex="0"><table{wide}>{head}<tbody>{"".join(rows)}</tbody></table></div>'


def _claims(frame: pandas.DataFrame) -> str:
    rows, compared = [], bool(frame["paper"].notna().any())
    for line in frame.itertuples():
        points = line.claim.endswith("points")
        paper, ours, low, high = (quantity(value, points=points) for value in (line.paper, line.ours, line.low, line.high))
        values = [*[paper] * compared, f"<b>{ours}</b>", f"{low} … {high}" if low else "", str(line.n)]
        name = line.verdict.replace(" ", "-") if line.verdict in ("held", "not held") else "tag"
        cells = "".join(f"<td>{value}</td>" for value in values)
        rows.append(f'<tr><td class="claim">{escape(line.claim)}</td><td class="{name}">{escape(line.verdict)}</td>{cells}</tr>')
    head = "".join(f"<th>{word}</th>" for word in ("claim", "verdict", *["paper"] * compared, "ours", "95 % interval", "n"))
    return f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def cautions(records: list[dict], profile: str) -> list[str]:
    """What a reader must know before any number: stand-in data, another corpus than the committed one, a rehearsal."""
    found = [] if profile == "paper" else [f"{profile}: documentation text, not the paper's data"]
    metrics = [record["metrics"] for record in records]
    if any(m.get("as_committed") is False for m in metrics):
        found.append("the text of this run is not the committed corpus (other package versions?): numbers may differ from the committed ones")
    if any(m.get("weights") == "random" for m in metrics):
        found.append("a rehearsal: models with random weights and partly carved data, the numbers mean nothing")
    return found


def _page(title: str, body: str, profile: str, links: list[tuple[str, str]], records: list[dict]) -> str:
    banner = "".join(f'<div class="banner">{escape(line, quote=False)}</div>' for line in cautions(records, profile))
    menu = "".join(f'<a href="{escape(target)}">{escape(name)}</a>' for target, name in links)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{TABLE_STYLE}{PAGE_STYLE}</style></head>\n"
        f'<body class="kn">{banner}<nav><div>{menu}</div></nav><main><h1>{escape(title)}</h1>\n{body}\n</main></body></html>\n'
    )


def file_of(number: int | str) -> str:
    """The name of a table's files: table4, beyond_alignment."""
    return number if number in BEYOND else f"table{number}"


def _section(number: int | str, frame: pandas.DataFrame, plot: matplotlib.figure.Figure, links: dict[str, str]) -> str:
    name = file_of(number)
    note = f"<p>{NOTES[number]} <span class=soft><a href={name}.csv>CSV with every metric</a></span></p>"
    picture = f'<figure><div tabindex="0">{svg(plot, name)}</div></figure>'
    return f"{note}{fragment(frame, links, alone=False)}{picture}"


def _provenance(records: list[dict]) -> str:
    known = [record["provenance"] for record in records]
    said = {key: ", ".join(dict.fromkeys(str(entry[key]) for entry in known if entry.get(key))) for key in ("device", "commit")}
    seconds, peak = sum(entry.get("wall_seconds") or 0 for entry in known), max((entry.get("peak_bytes") or 0 for entry in known), default=0)
    parts = [f"{len(records)} stages", f"{seconds / 60:.1f} minutes of work", f"at most {peak / 1e9:.2f} GB of memory"] if records else ["nothing has run yet"]
    return f'<p class="soft">{escape(" · ".join([*parts, said["device"], said["commit"] and "commit " + said["commit"]]).strip(" ·"))}</p>'


def table_page(number: int | str, frame: pandas.DataFrame, records: list[dict], profile: str, plot: matplotlib.figure.Figure, claims: pandas.DataFrame | None = None) -> str:
    """The page of one table, with its claims if it has some; the stages behind its numbers follow below it, so that every link stays on the page."""
    used = {path for stages in frame["stage"] for path in stages.split(";")}
    behind = [record for record in records if record["path"] in used]
    links = {record["path"]: f"#{anchor(record)}" for record in behind}
    menu = [("index.html", "Index"), *((f"table{n}.html", f"Table {n}") for n in TITLES), ("records.html", "Stages")]
    held = "" if claims is None else f"<h2>Claims</h2>{fragment(claims, alone=False)}"
    body = _provenance(behind) + _section(number, frame, plot, links) + held + "<h2>The stages behind these numbers</h2>" + _groups(behind)
    return _page(BEYOND.get(number) or f"Table {number}. {TITLES[number]}", body, profile, menu, records)


def speed_section(frame: pandas.DataFrame, plot: matplotlib.figure.Figure) -> str:
    """What benchmarks/speed.py measured on one machine: the plot, and all its lines to open."""
    first = frame.iloc[0]
    columns = ["group", "case", "dtype", "variant", "median", "low", "high", "unit", "ratio", "n"]
    head = "".join(f'<th scope="col">{name}</th>' for name in columns)
    lines = "".join(f'<tr><th scope="row">{escape(str(row[0]))}</th>' + "".join(f"<td>{escape(str(value))}</td>" for value in row[1:]) + "</tr>" for row in frame[columns].itertuples(index=False))
    return (
        f"<p>Measured by <code>benchmarks/speed.py</code> on {escape(str(first['device']))}, {first['threads']} threads, torch {escape(str(first['torch']))}, the sizes of GPT-2 small; not "
        "by this run. Variants take turns; a ratio is the median over turns of the dense one's time and theirs.</p>"
        f'<figure><div tabindex="0">{svg(plot, "the speed of layers and models")}</div></figure>'
        f'<details><summary>All {len(frame)} lines</summary><div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div></details>'
    )


def index_page(tables: dict, plots: dict, claims: pandas.DataFrame, records: list[dict], profile: str, speeds: str = "", beyond: dict | None = None) -> str:
    """One page with the trends, all seven tables and their plots, what goes beyond them {name: (table, plot, claims)}, and the benchmark's section; numbers link to records.html."""
    links = {record["path"]: f"records.html#{anchor(record)}" for record in records}
    body = (
        "<p>“Kronecker Decomposition for GPT Compression”: each cell shows the value the paper prints, ours with its standard deviation and number of seeds, "
        "and the difference. Numbers lead to the stage that made them. Values of another profile than the paper's are never judged equal to the paper's; "
        "what can be judged are orderings.</p>" + _provenance(records) + '<h2 id="trends">Trends</h2>'
        "<p>A difference holds if the 95 % interval of the seed-paired difference leaves 0 (a ratio: leaves 1) on the claimed side.</p>"
    )
    body += fragment(claims, alone=False)
    for number, frame in tables.items():
        body += f'\n<h2 id="table{number}">Table {number}. {TITLES[number]}</h2>{_section(number, frame, plots[number], links)}'
    for name, (frame, plot, held) in (beyond or {}).items():
        body += f'\n<h2 id="{name}">{BEYOND[name]}</h2>{_section(name, frame, plot, links)}{fragment(held, alone=False)}'
    if speeds:
        body += f'\n<h2 id="speed">How fast the layers and the model are</h2>{speeds}'
    menu = [
        ("#trends", "Trends"),
        *((f"#table{number}", f"Table {number}") for number in tables),
        *((f"#{name}", BEYOND[name].rpartition(": ")[2].capitalize()) for name in beyond or {}),
        *([("#speed", "Speed")] if speeds else []),
        ("records.html", "Stages"),
    ]
    return _page(f"KnGPT2, reproduced: {profile}", body, profile, menu, records)


def records_page(records: list[dict], profile: str) -> str:
    """Every stage with its fields, metrics, provenance and path; the seeds of one stage stand side by side."""
    menu = [("index.html", "Index"), *((f"#{kind}", kind.replace("_", " ")) for kind in dict.fromkeys(record["stage"] for record in records))]
    return _page("Stages", _provenance(records) + _groups(records), profile, menu, records)


def _groups(records: list[dict]) -> str:
    groups: dict[str, list[dict]] = {}
    for record in records:
        groups.setdefault(anchor(record), []).append(record)
    parts, seen = [], set()
    for name, members in groups.items():
        marks = [mark for mark in (anchor(members[0], 1), anchor(members[0], 2)) if mark not in seen and mark != name]
        seen.update([*marks, name])
        rows = [dict(_flat({"path": m["path"], **m["fields"], **m["metrics"], **m["provenance"]})) for m in members]
        lines = ""
        for key in dict.fromkeys(key for row in rows for key in row):
            lines += f"<tr><th>{escape(key)}</th>" + "".join(f"<td>{escape(row.get(key, ''))}</td>" for row in rows) + "</tr>"
        marked = "".join(f'<span id="{escape(mark)}"></span>' for mark in marks)
        title = escape(" · ".join(name.split("-"))).replace("_", " ")
        parts.append(f'{marked}<h3 id="{escape(name)}">{title}</h3><div class="scroll record" tabindex="0"><table><tbody>{lines}</tbody></table></div>')
    return "\n".join(parts)


def _flat(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Nested dictionaries as dotted names; a log is told by its length and last entry."""
    if isinstance(value, dict):
        return [pair for key, inner in value.items() for pair in _flat(inner, f"{prefix}.{key}" if prefix else str(key))]
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [(prefix, f"{len(value)} entries, the last: {json.dumps(value[-1], ensure_ascii=False)}")]
    return [(prefix, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))]
