"""The pages beside the tables: the ledger of claims, how a report was made, what failed, and the front page over all profiles.

ledger(frame), readings(frame)   as tables for a page or a notebook
grid({profile: frame})           verdicts of every claim, by the table it rests on, profiles side by side
claims_page, how_page, failed_page, front_page
"""

from __future__ import annotations

import math
import re
from html import escape
from typing import TYPE_CHECKING, Any

from kn.report import site
from kn.report.site import quantity, region
from kn.report.style import TABLE_STYLE

if TYPE_CHECKING:
    import pandas

MARKS = {"reproduced": "good", "holds": "good", "not reproduced": "bad", "does not hold": "bad", "undecided": "open"}
SIGNS = {"good": "✓", "bad": "✗", "open": "?", "none": "–"}
UNITS = {"points": "points", "ratio": "times"}
NEGATIVE = "(−)"  # what LOG.md marks a negative result with


def show(body: str) -> Any:
    """A piece of a page as it looks there, for display in a notebook."""
    from IPython.display import HTML

    return HTML(f'<style>{TABLE_STYLE}</style><div class="kn">{body}</div>')


def verdict(word: str, label: str = "") -> str:
    """A verdict as a sign and a word, told apart without colour; with a label the word is for screen readers and the tool tip."""
    kind = MARKS.get(word, "none")
    text = escape(word) if not label else f'{escape(label)}<span class="unseen">: {escape(word)}</span>'
    return f'<span class="verdict {kind}" title="{escape(word)}"><span aria-hidden="true">{SIGNS[kind]}</span> {text}</span>'


def measured(line) -> str:
    """A value with its interval and number of seeds: 1.09 times, 1.09 … 1.10 (5 seeds)."""
    if math.isnan(line.value):
        return ""
    points, sign = line.unit in ("points", "%"), line.unit == "points"
    text = f"<b>{quantity(line.value, sign=sign, points=points)}</b> {escape(UNITS.get(line.unit, line.unit))}"
    counted = line.unit.startswith("of ") and not math.isnan(line.low)
    if counted and "pairs" not in line.unit and (line.low, line.high) != (line.value, line.value):
        text += f"<br><small>{line.low:.0f} for certain, at most {line.high:.0f}</small>"
    elif not math.isnan(line.low) and not line.unit.startswith("of "):
        text += f"<br><small>{quantity(line.low, sign=sign, points=points)} … {quantity(line.high, sign=sign, points=points)}</small>"
    return text + (f" <small>({line.n} {'turns' if line.unit == 'times dense' else 'seed' if line.n == 1 else 'seeds'})</small>" if line.n else "")


def ledger(frame: pandas.DataFrame) -> str:
    """The claims as a table whose rows become cards on a narrow screen."""
    rows = []
    for line in frame.itertuples():
        printed = (
            ""
            if math.isnan(line.paper_value)
            else f"<br><small>{quantity(line.paper_value, sign=line.unit == 'points', points=line.unit == 'points')} {escape(UNITS.get(line.unit, line.unit))}</small>"
        )
        note = f'<span class="note">{escape(line.note)}</span>' if line.note else ""
        rows.append(
            f'<tr id="{escape(line.id)}"><th scope="row">{escape(line.claim)}<q>{escape(line.quote)}</q><span class="note">{escape(_place(line.section))} · {_source(line)}</span>{note}</th>'
            f'<td data-label="printed numbers">{verdict(line.paper)}{printed}</td><td data-label="ours">{verdict(line.ours)}</td><td data-label="value">{measured(line)}</td></tr>'
        )
    head = "".join(f'<th scope="col">{word}</th>' for word in ("claim", "by the paper’s printed numbers", "by ours", "ours, 95 % interval"))
    return region("the ledger of claims", head, "".join(rows), outside="ledger")


def _place(section: str) -> str:
    return f"§ {section}" if section[0].isdigit() else section


def _source(line) -> str:
    """What the claim rests on, leading to the page of that table, whose numbers lead to their stages."""
    names = {"Beyond the paper": line.left.partition("/")[0]}
    page = f"{line.group.lower().replace(' ', '')}.html" if line.group.startswith("Table ") else f"{names[line.group]}.html" if line.group in names else ""
    return f'<a href="{escape(page)}">{escape(line.group)}</a>' if page and line.ours != "not run" else escape(line.group)


def readings(frame: pandas.DataFrame) -> str:
    """What each switched reading changes."""
    if frame.empty:
        return '<p class="soft">Not run yet: <code>./run_all.sh --only claims</code> switches the readings one at a time.</p>'
    rows, last = [], ""
    for line in frame.itertuples():
        points = not line.quantity.endswith(", perplexity")
        change = f"{quantity(line.low, sign=points, points=points)} … {quantity(line.high, sign=points, points=points)}" if not math.isnan(line.low) else "one seed"
        first = f'{escape(line.reading)}<span class="note"><code>{escape(line.switch)}</code></span>' if line.reading != last else '<span class="unseen">' + escape(line.reading) + "</span>"
        last = line.reading
        turned = verdict("not reproduced", "turned") if line.turned == "yes" else '<span class="tag">as before</span>'
        cells = [escape(line.quantity), quantity(line.default, sign=points, points=points), quantity(line.switched, sign=points, points=points)]
        cells += [f"<b>{quantity(line.effect, sign=points, points=points)}</b><br><small>{change}</small>", str(line.n), f"{escape(line._11)} → {escape(line._12)}", turned]
        rows.append(f'<tr><th scope="row">{first}</th><td class="claim">{cells[0]}</td>' + "".join(f"<td>{c}</td>" for c in cells[1:]) + "</tr>")
    head = "".join(f'<th scope="col">{word}</th>' for word in ("reading", "quantity", "default", "switched", "effect, 95 % interval", "seeds", "verdict", "turned?"))
    return region("readings of the paper", head, "".join(rows), "named")


def counts(words: list[str]) -> str:
    """ "25 hold · 4 do not": how often each verdict was given."""
    return " · ".join(f"{words.count(word)} {escape(word)}" for word in dict.fromkeys([*(w for w in MARKS if w in words), *words]))


def grid(ledgers: dict[str, pandas.DataFrame], link: str = "{profile}/claims.html") -> str:
    """Tables by rows, the paper's own numbers and every profile by columns; each chip is one claim and leads to it."""
    if not ledgers:
        return '<p class="soft">No profile has been run yet.</p>'
    first = next(iter(ledgers.values()))
    columns = {"the paper’s printed numbers": (first, "paper", next(iter(ledgers))), **{f"ours, {name}": (frame, "ours", name) for name, frame in ledgers.items()}}
    rows = []
    for group in dict.fromkeys(sorted(first["group"], key=lambda name: (not name.startswith("Table"), name))):
        cells = ""
        for frame, kind, profile in columns.values():
            lines = frame[frame["group"] == group]
            page, chips = escape(link.format(profile=profile)), zip(lines["id"], lines[kind], strict=True)
            cells += '<td class="chips">' + " ".join(f'<a class="chip" href="{page}#{escape(i)}">{verdict(word, i.replace("-", " "))}</a>' for i, word in chips) + "</td>"
        rows.append(f'<tr><th scope="row">{escape(group)}</th>{cells}</tr>')
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in columns)
    key = " ".join(verdict(word) for word in ("reproduced", "not reproduced", "undecided", "not testable here"))
    return region("verdicts", f'<th scope="col">rests on</th>{head}', "".join(rows), "verdicts") + f'<p class="soft">{key}</p>'


def claims_page(frame: pandas.DataFrame, effects: pandas.DataFrame, records: list[dict], profile: str) -> str:
    """The ledger, and what each reading changes."""
    turned = sorted(set(effects.loc[effects["turned"] == "yes", "reading"])) if len(effects) else []
    said = f"Verdicts that a switched reading turns: {escape('; '.join(turned))}." if turned else "No switched reading turned one of these verdicts." if len(effects) else ""
    body = (
        "<p>Every claim of the paper’s text, judged twice by one rule: from the numbers the paper prints, and from ours. Ours counts as reproduced where the 95 % interval of the seed-paired "
        "difference (Student’s t) lies wholly on the claimed side, as not reproduced where it lies wholly on the other, else as undecided. The paper prints one run without a variance: its "
        "orderings are taken as printed, claims of significance stay undecided.</p>"
        f'<p class="soft">Printed numbers: {counts(list(frame["paper"]))}. Ours, {escape(profile)}: {counts(list(frame["ours"]))}. '
        "<a href=claims.csv>CSV</a> · <a href=seeds.csv>the numbers of every seed</a>, from which every verdict and interval can be computed again</p>"
        f'<h2 id="ledger">The ledger</h2>{ledger(frame)}<h2 id="readings">What the readings change</h2>'
        "<p>The paper leaves some things open. Each row switches one reading and leaves the others at their defaults; the effect is the switched value against the default one, paired by seed "
        f"(perplexities: as a ratio). {said} <span class=soft><a href=readings.csv>CSV</a></span></p>{readings(effects)}"
    )
    return site.page("Claims, judged", body, profile, records, "claims.html")


def how_page(records: list[dict], profile: str, run: dict) -> str:
    """Commands, versions, hardware and settings behind a report."""
    seeds, sets = run.get("seeds", 1), "".join(f" --set {item}" for item in run.get("overrides", []))
    only = run.get("tables") or []
    asked = "--all" if "claims" in only and len(only) > 7 else "" if only == list(range(1, 8)) else "--only " + ",".join(str(item) for item in only)
    command = " ".join(filter(None, ["./run_all.sh", "" if profile == "mini" else f"--profile {profile}", asked, f"--seeds {seeds}" if seeds != 1 else ""])) + sets
    known = [record["provenance"] for record in records]
    facts = {"last command": command, "profile": profile, "seeds": str(seeds), "settings changed": ", ".join(run.get("overrides", [])) or "none"}
    facts |= {key: ", ".join(dict.fromkeys(str(entry[key]) for entry in known if entry.get(key))) for key in ("device", "system", "python", "commit")}
    packages = {name: version for entry in known for name, version in (entry.get("packages") or {}).items() if version}
    facts |= {"packages": ", ".join(f"{name} {version}" for name, version in sorted(packages.items())), "corpus": str(run.get("corpus") or "")}
    facts["work"] = f"{len(records)} stages, {sum(entry.get('wall_seconds') or 0 for entry in known) / 60:.0f} minutes of one process"
    lines = "".join(f'<tr><th scope="row">{escape(key)}</th><td>{escape(value)}</td></tr>' for key, value in facts.items() if value)
    kinds: dict[str, list[dict]] = {}
    for record in records:
        kinds.setdefault(record["stage"], []).append(record)
    rows = ""
    for kind, members in kinds.items():
        walls = [record["provenance"].get("wall_seconds") or 0 for record in members]
        on = ", ".join(dict.fromkeys(str(record["provenance"].get("device")) for record in members))
        name = f'<a href="records.html#{escape(kind)}">{escape(kind.replace("_", " "))}</a>'
        rows += f'<tr><th scope="row">{name}</th><td>{len(members)}</td><td>{sum(walls) / 60:.1f}</td><td>{max(walls):.0f}</td><td>{escape(on)}</td></tr>'
    body = (
        "<p>A report is made of stages; each leaves its metrics, its settings and where it ran in the store, and every number of a table leads to the stage behind it. "
        "The commands below make it again.</p>"
        + region("this report", "", lines, outside="record")
        + "<h2>From nothing</h2><pre>git clone …   # this repository\n./run_all.sh doctor   # what would stop a run\n"
        f"{escape(command)}\n./run_all.sh test     # the tests, the notebooks against their committed outputs</pre>"
        "<h2>Stages</h2>" + region("stages by kind", "".join(f'<th scope="col">{word}</th>' for word in ("kind", "stages", "minutes in all", "longest, s", "hardware")), rows, "named")
    )
    return site.page("How this was made", body, profile, records, "how.html")


def negatives(log: str) -> list[tuple[str, list[str]]]:
    """(dated heading, its points that are marked as negative results) of LOG.md."""
    found = []
    for part in re.split(r"^## ", log, flags=re.MULTILINE)[1:]:
        title, _, text = part.partition("\n")
        points = [" ".join(point.split()) for point in re.split(r"^- ", text, flags=re.MULTILINE)[1:]]
        if marked := [point for point in points if NEGATIVE in point]:
            found.append((title, marked))
    return found


def failed_page(log: str, records: list[dict], profile: str) -> str:
    """What was tried and did not help, by date, from the log."""
    parts = "".join(
        f"<h2>{inline(title)}</h2><ul>" + "".join(f"<li>{inline(point).replace(NEGATIVE, '<b class=not-held>(−)</b>')}</li>" for point in points) + "</ul>" for title, points in negatives(log)
    )
    body = f"<p>Taken from the log of this repository (LOG.md): every entry that holds a negative result, marked {NEGATIVE}. Figures are of the day they were taken on.</p>{parts}"
    return site.page("What failed", body, profile, records, "failed.html")


def inline(text: str) -> str:
    """Text with `code` as HTML, escaped."""
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", escape(text, quote=False))


def front_page(reports: dict[str, tuple[pandas.DataFrame, dict]]) -> str:
    """The page above the profiles: {profile: (ledger, run.json)}, side by side."""
    cards = ""
    for name, (frame, run) in reports.items():
        where = run.get("environment", {}).get("device", "")
        cards += (
            f'<li><a href="{escape(name)}/index.html"><b>{escape(name)}</b></a><span>{escape(str(run.get("seeds", "?")))} {"seed" if run.get("seeds") == 1 else "seeds"}, {escape(str(where))}</span>'
            f"<span>{counts(list(frame['ours']))}</span></li>"
        )
    body = (
        "<p>“Kronecker Decomposition for GPT Compression” compresses GPT-2 with Kronecker products. Does what it claims hold? Each chip below is one claim of its text, judged by its own "
        "printed numbers and by our runs; it leads to the quote, the numbers and the seeds behind the verdict.</p>"
        f'<ul class="cards">{cards}</ul><h2 id="verdicts">Verdicts</h2>{grid({name: frame for name, (frame, _) in reports.items()})}'
        "<p>mini and midi replace the paper’s data by documentation text: they can judge orderings, never the paper’s values. A profile that is missing here has not been run.</p>"
    )
    return site.page("KnGPT2: does the paper hold?", body, "", [], menu=[*((f"{name}/index.html", name) for name in reports), ("api.html", "Interface")])
