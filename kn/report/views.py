"""What the page templates show, as plain data: tables of cells, claims, stages. Nothing here knows HTML."""

import json
import math
from datetime import UTC, datetime
from typing import Any

import pandas

from kn.paper import claims, printed
from kn.report.formatting import anchor, distinct, file_stem, format_deviation, format_number, format_range
from kn.report.table_builder import MACHINE_INDEPENDENT
from kn.report.table_registry import TABLES
from kn.suite.run import command

TABLE_KEYS = {str(key): key for key in TABLES}
WIDE = 8  # columns; the standard deviations of wider tables stand on a line of their own
SPREAD = "± sd (n)"
VERDICT_SIGNS = {"good": "✓", "bad": "✗", "open": "?", "none": "–"}
VERDICT_KINDS = {"reproduced": "good", "holds": "good", "not reproduced": "bad", "does not hold": "bad",
                 "undecided": "open"}


def table_view(frame: pandas.DataFrame, links: dict[str, str] | None = None) -> dict[str, Any]:
    """The data of the macro "table" for any frame; `links` leads from stages to their records."""
    if "quote" in frame:
        return {"kind": "ledger", "rows": [_claim(line) for line in frame.itertuples()]}
    if "switch" in frame:
        return {"kind": "effects", "rows": _effects(frame)}
    if "claim" in frame:
        return {"kind": "trends", "compared": bool(frame["paper"].notna().any()),
                "rows": [_trend(line) for line in frame.itertuples()]}
    return comparison(frame, links or {})


def comparison(frame: pandas.DataFrame, links: dict[str, str]) -> dict[str, Any]:
    """Rows and columns of a table; each row has lines (paper, ours, Δ) with a cell per column."""
    first = frame.drop_duplicates(["row", "column"])  # further metrics of a cell are in the CSV
    key, columns = first["table"].iloc[0], list(dict.fromkeys(first["column"]))
    key = key if key in TABLES else int(key)
    cells = {(line.row, line.column): line for line in first.itertuples()}
    paper = {place: "" if pandas.isna(line.paper) else str(line.paper) for place, line in cells.items()}
    if isinstance(key, int):  # 65.0 and not 65
        paper |= {(cell.row, cell.column): cell.value for cell in printed(key).itertuples()}
    compared, rows = bool(first["paper"].notna().any()), []
    for row, present in first.groupby("row", sort=False):
        lines = ["paper"] * bool(present["paper"].notna().any()) + ["ours"]
        lines += [SPREAD] * (len(columns) > WIDE) + ["Δ"] * bool(present["delta"].notna().any())
        made = {cell.column: _cell(cell, links, lines, paper[row, cell.column],
                                   TABLES[key].not_applicable.get((row, cell.column)))
                for cell in present.itertuples()}
        units = set(present["unit"])
        unit = units.pop() if len(units) == 1 and units <= {"M", "MB"} else ""
        rows.append({"name": row, "unit": unit, "lines": lines,
                     "cells": [made.get(column) for column in columns]})
    uninformative = set(first.loc[first["verdict"] == "uninformative", "column"])
    return {"kind": "comparison", "name": f"table {key}".replace("table beyond_", ""), "compared": compared,
            "style": "wide" if len(columns) > WIDE else "" if compared else "named", "rows": rows,
            "columns": [{"name": column, "uninformative": column in uninformative} for column in columns]}


def _cell(cell: Any, links: dict[str, str], lines: list[str], paper: str,
          not_applicable: str | None) -> dict[str, Any]:
    points = cell.unit == "%"
    targets = list(dict.fromkeys(links[path] for path in cell.stage.split(";") if path in links))
    if len(targets) > 1:  # an average leads to the anchor above its tasks
        page, _, name = targets[0].partition("#")
        targets = [f"{page}#{'-'.join(name.split('-')[:2])}"]
    ours, spread = format_number(cell.ours, points=points), ""
    if cell.n and not isinstance(cell.ours, str) and cell.metric not in (*MACHINE_INDEPENDENT, "weights"):
        deviation = f"± {format_deviation(cell.sd, ours)} " if cell.n > 1 and cell.sd > 0 else ""
        spread = f"{deviation}({cell.n})"
    faint = cell.verdict in ("uninformative", "not run")
    is_text = isinstance(cell.ours, str) and lines == ["ours"] or not ours and not_applicable
    return {"paper": paper or "–", "ours": ours or not_applicable or "not run", SPREAD: spread or "–",
            "Δ": format_number(cell.delta, sign=True, points=points) or "–",
            "spread": "" if SPREAD in lines else spread, "href": targets[0] if targets else "",
            "style": "text" if is_text else "", "faint": faint,
            "tag": "" if faint or cell.verdict == "recorded" else cell.verdict}


def _trend(line: Any) -> dict[str, Any]:
    points = line.claim.endswith("points")
    paper, ours = (format_number(value, points=points) for value in (line.paper, line.ours))
    style = line.verdict.replace(" ", "-") if line.verdict in ("held", "not held") else "tag"
    return {"claim": line.claim, "verdict": line.verdict, "style": style, "paper": paper, "ours": ours,
            "span": format_range(line.low, line.high, points=points), "n": line.n}


def averages_view(frame: pandas.DataFrame) -> list[dict[str, Any]]:
    """Averages of Table 5 or 6 and their differences, with both intervals."""
    rows = []
    for line in frame.itertuples():
        style = {"sign": "−" in line.average, "points": True}
        spans = [format_range(*ends, **style) or "–"
                 for ends in ((line.low, line.high), (line.low_tasks, line.high_tasks))]
        rows.append({"name": line.average, "value": format_number(line.value, **style),
                     "cells": [*spans, line.n, line.tasks]})
    return rows


def _claim(line: Any) -> dict[str, Any]:
    """A claim of the ledger: its words, the table it rests on, both verdicts, our value with its interval."""
    sign, points = line.unit == "points", line.unit in ("points", "%")
    unit = {"ratio": "times"}.get(line.unit, line.unit)
    span = format_range(line.low, line.high, sign, points)
    if line.unit.startswith("of "):  # tasks or pairs; low and high are those that surely and possibly do
        exact = "pairs" in line.unit or math.isnan(line.low) or line.low == line.value == line.high
        span = "" if exact else f"{line.low:.0f} for certain, at most {line.high:.0f}"
    ours = {}
    if not math.isnan(line.value):
        kind = "turns" if line.unit == "times dense" else "seed" if line.n == 1 else "seeds"
        number = format_number(line.value, sign, points)
        ours = {"number": number, "unit": unit, "span": span, "n": f"({line.n} {kind})" if line.n else ""}
    printed_value, page = format_number(line.paper_value, sign, sign), ""
    if line.ours != "not run" and line.group.startswith(("Table ", "Beyond the paper")):
        page = f"{file_stem(TABLE_KEYS[line.left.partition('/')[0]])}.html"
    return {"id": line.id, "claim": line.claim, "quote": line.quote, "note": line.note, "group": line.group,
            "page": page, "place": f"§ {line.section}" if line.section[0].isdigit() else line.section,
            "paper": line.paper, "printed": printed_value and f"{printed_value} {unit}", "verdict": line.ours,
            "ours": ours}


def _effects(frame: pandas.DataFrame) -> list[dict[str, Any]]:
    """Each switched reading's effect on each quantity."""
    rows, last = [], ""
    for line in frame.to_dict("records"):
        points = not line["quantity"].endswith(", perplexity")
        style = {"sign": points, "points": points}
        rows.append({
            **{name: line[name] for name in ("reading", "switch", "quantity", "n")},
            **{name: format_number(line[name], **style) for name in ("default", "switched", "effect")},
            "span": format_range(line["low"], line["high"], **style) or "one seed",
            "verdicts": f"{line['verdict by default']} → {line['verdict switched']}",
            "turned": line["turned"] == "yes", "repeated": line["reading"] == last,
        })
        last = line["reading"]
    return rows


def count_verdicts(words: list[str]) -> str:
    """How often each verdict was reached: "25 holds · 4 does not hold"."""
    ordered = dict.fromkeys([*(word for word in VERDICT_KINDS if word in words), *words])
    return " · ".join(f"{words.count(word)} {word}" for word in ordered)


def verdict_matrix(ledgers: dict[str, pandas.DataFrame],
                   link: str = "{profile}/claims.html") -> dict[str, Any]:
    """Verdicts of every claim: a row per table it rests on, a column per profile and one for the paper."""
    if not ledgers:
        return {}
    labels = dict(claims()[["id", "label"]].itertuples(index=False, name=None))
    profile, first = next(iter(ledgers.items()))
    columns = [("the paper’s printed numbers", first, "paper", profile)]
    columns += [(f"ours, {name}", frame, "ours", name) for name, frame in ledgers.items()]
    rows = []
    for group in dict.fromkeys(sorted(first["group"], key=lambda name: (not name.startswith("Table"), name))):
        cells = []
        for _, frame, verdicts, name in columns:
            chosen, page = frame[frame["group"] == group], link.format(profile=name)
            cells.append([
                {"href": f"{page}#{claim}", "word": word, "label": labels.get(claim, claim.replace("-", " "))}
                for claim, word in zip(chosen["id"], chosen[verdicts], strict=True)
            ])
        rows.append({"name": group, "cells": cells})
    return {"columns": [name for name, *_ in columns], "rows": rows}


def provenance(records: list[dict]) -> str:
    """Number of stages, time, memory, device and commit behind some records, on one line."""
    if not records:
        return "nothing has run yet"
    known = [record["provenance"] for record in records]
    minutes = sum(entry.get("wall_seconds") or 0 for entry in known) / 60
    peak = max(entry.get("peak_bytes") or 0 for entry in known)
    device, commit = (distinct(entry.get(key) for entry in known) for key in ("device", "commit"))
    parts = [f"{len(records)} stages", f"{minutes:.1f} minutes of work",
             f"at most {peak / 1e9:.2f} GB of memory", device, commit and f"commit {commit}"]
    return " · ".join(parts).strip(" ·")


def stage_groups(records: list[dict], profile: str) -> list[dict[str, Any]]:
    """Stages that differ in their seed alone, side by side: fields, metrics, provenance, path."""
    groups: dict[str, list[dict]] = {}
    for record in records:
        groups.setdefault(anchor(record), []).append(record)
    views, seen = [], set()
    for name, members in groups.items():
        anchors = [mark for mark in (anchor(members[0], 1), anchor(members[0], 2))
                   if mark not in seen and mark != name]
        seen.update([*anchors, name])
        columns, rows = [_stage(record, profile) for record in members], []
        for key in dict.fromkeys(key for column in columns for key in column):
            values = [column.get(key, "") for column in columns]
            shared = all(value == values[0] for value in values)  # shown once
            rows.append({"key": key, "values": values[:1] if shared else values,
                         "span": len(members) if shared else 1})
        title = name.replace("-", " · ").replace("_", " ")
        views.append({"id": name, "anchors": anchors, "title": title, "rows": rows})
    return views


def _stage(record: dict, profile: str) -> dict[str, Any]:
    """What is shown of one stage: nested dictionaries by dotted names, a training log as its entries."""
    shown = {"path": record["path"], "command": command(record, profile),
             **record["fields"], **record["metrics"], **record["provenance"]}
    return {**dict(_flat(shown)), "settings": _json(record.get("settings", {})),
            "inputs": ", ".join(record.get("inputs", [])) or "none"}


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _flat(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [pair for key, inner in value.items()
                for pair in _flat(inner, f"{prefix}.{key}" if prefix else str(key))]
    entries = value if prefix == "log" and isinstance(value, list) else []
    if entries and all(isinstance(entry, dict) for entry in entries):
        return [(prefix, {"entries": len(value), "text": _log(value)})]
    if prefix == "started":
        return [(prefix, f"{datetime.fromtimestamp(value, UTC):%Y-%m-%d %H:%M:%S} UTC")]
    return [(prefix, value if isinstance(value, str) else _json(value))]


def _log(entries: list[dict]) -> str:
    """A training log as lines of text, a column per quantity."""
    keys = list(dict.fromkeys(key for entry in entries for key in entry))
    rows = ((entry.get(key, "–") for key in keys) for entry in entries)
    return "\n".join([" ".join(keys), *(
        " ".join(format_number(v) if isinstance(v, int | float) else str(v) for v in row) for row in rows)])
