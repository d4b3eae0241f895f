"""The pages of a report, rendered from templates/*.html: self-contained, no script, nothing fetched."""

import re
from pathlib import Path
from typing import Any

import jinja2
import pandas
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from kn.report import views
from kn.report.formatting import anchor, cautions, distinct, file_stem
from kn.report.metrics import INFORMATIVE_MARGIN
from kn.report.plots import svg
from kn.report.table_registry import TABLES, training_settings

NEGATIVE = "(−)"  # marks a negative result in LOG.md
ANSI = re.compile(r"\x1b\[[0-9;]*m")
MENU = [("index.html", "Index"), ("claims.html", "Claims"),
        *((f"table{n}.html", f"Table {n}") for n in TABLES if isinstance(n, int)),
        ("records.html", "Stages"), ("how.html", "How it was made"), ("failed.html", "What failed"),
        ("../index.html", "All profiles")]
BENCHMARK_COLUMNS = ["group", "case", "dtype", "variant", "median", "low", "high", "unit", "ratio", "n"]


def inline(text: str) -> Markup:
    """Text with `code` and the mark of a negative result as HTML, all else escaped."""
    html = re.sub(r"`([^`]*)`", r"<code>\1</code>", str(escape(text)))
    return Markup(html.replace(NEGATIVE, f'<b class="not-held">{NEGATIVE}</b>'))


ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
    autoescape=True, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    undefined=jinja2.StrictUndefined,
)
ENVIRONMENT.filters["inline"] = inline
ENVIRONMENT.globals |= {"verdict_kinds": views.VERDICT_KINDS, "verdict_signs": views.VERDICT_SIGNS}


def _page(here: str, title: str, profile: str, records: list[dict], template: str = "", **data: Any) -> str:
    data = {"menu": MENU, "provenance": views.provenance(records), "title": title, "profile": profile,
            "here": here, "cautions": cautions(records, profile) if profile else [], **data}
    return ENVIRONMENT.get_template(template or here).render(data)


def fragment(frame: pandas.DataFrame) -> str:
    """A table, the trends, the ledger or the readings as HTML with its own style sheet, for a notebook."""
    return ENVIRONMENT.get_template("fragment.html").render(table=views.table_view(frame))


def section(key: int | str, frame: pandas.DataFrame, figure: Figure, records: list[dict],
            links: dict[str, str], averages: pandas.DataFrame | None = None,
            claims: pandas.DataFrame | None = None) -> dict[str, Any]:
    """The data of one table's part of a page: note, table, averages, claims, plot."""
    stem, table = file_stem(key), TABLES[key]
    note = ENVIRONMENT.get_template(f"notes/{stem}.html").render(informative_margin=f"{INFORMATIVE_MARGIN:g}")
    short = f"Table {key}" if isinstance(key, int) else table.title.rpartition(": ")[2].capitalize()
    return {"id": stem, "title": f"{short}. {table.title}" if isinstance(key, int) else table.title,
            "short": short, "note": Markup(note), "training": training_settings(key, records),
            "table": views.table_view(frame, links),
            "averages": [] if averages is None else views.averages_view(averages),
            "claims": None if claims is None else views.table_view(claims),
            "plot": Markup(svg(figure, stem))}


def table_page(key: int | str, frame: pandas.DataFrame, records: list[dict], profile: str, figure: Figure,
               **more: pandas.DataFrame | None) -> str:
    """The page of one table; the stages behind its numbers stand below it: every link stays on the page."""
    used = {path for stages in frame["stage"] for path in stages.split(";")}
    behind = [record for record in records if record["path"] in used]
    links = {record["path"]: f"#{anchor(record)}" for record in behind}
    shown = section(key, frame, figure, records, links, **more)
    return _page(f"{shown['id']}.html", shown["title"], profile, records, "table.html", section=shown,
                 provenance=views.provenance(behind), groups=views.stage_groups(behind, profile))


def index_page(sections: list[dict], trends: pandas.DataFrame, ledger: pandas.DataFrame,
               benchmarks: list[dict], records: list[dict], profile: str) -> str:
    """The page with verdicts, trends, all tables and their plots, and the benchmarks."""
    contents = [("verdicts", "Verdicts"), ("trends", "Trends"),
                *((part["id"], part["short"]) for part in sections), *[("speed", "Speed")] * bool(benchmarks)]
    return _page("index.html", f"KnGPT2, reproduced: {profile}", profile, records, contents=contents,
                 sections=sections, benchmarks=benchmarks, trends=views.table_view(trends),
                 matrix=views.verdict_matrix({profile: ledger}, "claims.html"))


def benchmark_view(frame: pandas.DataFrame, figure: Figure) -> dict[str, Any]:
    """What benchmarks/speed.py measured on one machine: the plot, and all its lines."""
    machine = {name: str(frame[name].iloc[0]) for name in ("device", "threads", "torch")}
    rows = [list(map(str, line)) for line in frame[BENCHMARK_COLUMNS].itertuples(index=False)]
    plot = Markup(svg(figure, "the speed of layers and models"))
    return {**machine, "plot": plot, "columns": BENCHMARK_COLUMNS, "rows": rows}


def records_page(records: list[dict], profile: str) -> str:
    """Every stage with its fields, metrics, provenance and path; the seeds of one stage side by side."""
    kinds = list(dict.fromkeys(record["stage"] for record in records))
    return _page("records.html", "Stages", profile, records, kinds=kinds,
                 groups=views.stage_groups(records, profile))


def claims_page(ledger: pandas.DataFrame, effects: pandas.DataFrame, records: list[dict],
                profile: str) -> str:
    """The ledger of claims, and what each reading of the paper changes."""
    printed, ours = (views.count_verdicts(list(ledger[column])) for column in ("paper", "ours"))
    turned = sorted(set(effects.loc[effects["turned"] == "yes", "reading"]))
    return _page("claims.html", "Claims, judged", profile, records, ledger=views.table_view(ledger),
                 effects=views.table_view(effects), printed=printed, ours=ours, turned=turned)


def how_page(records: list[dict], profile: str, run: dict) -> str:
    """Commands, versions, hardware and settings behind a report; `run` is its run.json."""
    seeds, overrides, tables = run.get("seeds", 1), run.get("overrides", []), run.get("tables") or []
    only = "" if tables == list(range(1, 8)) else f"--only {','.join(map(str, tables))}"
    words = ["./run_all.sh", f"--profile {profile}" if profile != "mini" else "",
             "--all" if "claims" in tables and len(tables) > 7 else only,
             f"--seeds {seeds}" if seeds != 1 else "", *(f"--set {item}" for item in overrides)]
    command = " ".join(filter(None, words))
    known = [record["provenance"] for record in records]
    packages = {name: version for entry in known
                for name, version in (entry.get("packages") or {}).items() if version}
    minutes = sum(entry.get("wall_seconds") or 0 for entry in known) / 60
    facts = {"last command": command, "profile": profile, "seeds": str(seeds),
             "settings changed": ", ".join(overrides) or "none",
             **{key: distinct(entry.get(key) for entry in known)
                for key in ("device", "system", "python", "commit")},
             "packages": ", ".join(f"{name} {version}" for name, version in sorted(packages.items())),
             "corpus": str(run.get("corpus") or ""),
             "work": f"{len(records)} stages, {minutes:.0f} minutes of one process"}
    rows = []
    for kind in dict.fromkeys(record["stage"] for record in records):
        made = [record["provenance"] for record in records if record["stage"] == kind]
        seconds = [entry.get("wall_seconds") or 0 for entry in made]
        rows.append({"kind": kind, "cells": [len(made), f"{sum(seconds) / 60:.1f}", f"{max(seconds):.0f}",
                                             distinct(entry.get("device") for entry in made)]})
    facts = {key: value for key, value in facts.items() if value}
    return _page("how.html", "How this was made", profile, records, facts=facts, command=command, rows=rows)


def negative_results(log: str) -> list[tuple[str, list[str]]]:
    """(dated heading, its points marked as negative results) of LOG.md."""
    found = []
    for part in re.split(r"^## ", log, flags=re.MULTILINE)[1:]:
        title, _, text = part.partition("\n")
        points = [" ".join(point.split()) for point in re.split(r"^- ", text, flags=re.MULTILINE)[1:]]
        if marked := [point for point in points if NEGATIVE in point]:
            found.append((title, marked))
    return found


def failed_page(log: str, records: list[dict], profile: str) -> str:
    """What was tried and did not help, by date, from the text of LOG.md."""
    return _page("failed.html", "What failed", profile, records, entries=negative_results(log), mark=NEGATIVE)


def front_page(reports: dict[str, tuple[pandas.DataFrame, dict]], comparisons: dict[str, str]) -> str:
    """The page above the profiles, {profile: (ledger, run.json)}; each against the published one."""
    cards = []
    for name, (ledger, run) in reports.items():
        seeds, device = run.get("seeds", "?"), run.get("environment", {}).get("device", "")
        cards.append({"name": name, "run": f"{seeds} {'seed' if seeds == 1 else 'seeds'}, {device}",
                      "verdicts": views.count_verdicts(list(ledger["ours"]))})
    menu = [(f"{name}/index.html", name) for name in reports]
    matrix = views.verdict_matrix({name: ledger for name, (ledger, _) in reports.items()})
    return _page("", "KnGPT2: does the paper hold?", "", [], "front.html", menu=menu, cards=cards,
                 matrix=matrix, comparisons=comparisons)


def failed_notebook_page(notebook: Any, failure: str) -> str:
    """A notebook that raised: its cells, their text output and the traceback."""
    cells = []
    for cell in notebook.cells:
        outputs = []
        for output in cell.get("outputs", []):
            text = output.get("text") or output.get("data", {}).get("text/plain", "")
            lines = output.get("traceback") or [text]
            outputs.append({"text": ANSI.sub("", "\n".join(lines)), "failed": "traceback" in output})
        cells.append({"source": cell.source, "code": cell.cell_type == "code", "outputs": outputs})
    return _page("", "A notebook that failed", "", [], "failed_notebook.html", cells=cells, failure=failure)
