"""Reports on disk: CSV and HTML of tables, claims and stages, each file written atomically."""

import json
import os
from pathlib import Path
from typing import Any

import pandas
from IPython.display import HTML
from matplotlib.figure import Figure

from kn.files import BENCHMARKS, PROJECT_ROOT, write_atomic
from kn.paper import TABLES, read_csv_as_text
from kn.report import beyond, claims, pages, plots, readings, table_registry
from kn.report.averages import averages
from kn.report.compare import COMPARISON
from kn.report.formatting import anchor, file_stem
from kn.report.orderings import trends
from kn.suite.plan import BEYOND

STAGE_OF = dict(zip(BEYOND, ("aligned", "compressed"), strict=True))  # with it, a table beyond the paper ran


def show(frame: pandas.DataFrame) -> HTML:
    """A table, the trends, the ledger or the readings as they look on a page, for display in a notebook."""
    return HTML(pages.fragment(frame))


class _Table:
    """One table of the registry, computed once for its CSV, its page and the index."""

    def __init__(self, key: int | str, records: list[dict], profile: str):
        self.key, self.records, self.profile = key, records, profile
        self.figure: Figure = table_registry.plot(key, records, profile)
        self.extra: dict[str, pandas.DataFrame] = {}
        if isinstance(key, str):
            self.frame = table_registry.beyond_table(key, records)
            self.extra["claims"] = beyond.beyond_claims(key, records)
        else:
            self.frame = table_registry.table(key, records, profile)
            if key in (5, 6):
                self.extra["averages"] = averages(key, records)

    def write(self, folder: Path) -> Path:
        stem = file_stem(self.key)
        extra = {f"{stem}_{name}": frame for name, frame in self.extra.items()}
        _write_csvs(folder, {stem: self.frame, **extra})
        page = pages.table_page(self.key, self.frame, self.records, self.profile, self.figure, **self.extra)
        return write_atomic(folder / f"{stem}.html", page)

    def section(self) -> dict[str, Any]:
        """Its part of the index page, whose numbers lead to records.html."""
        links = {record["path"]: f"records.html#{anchor(record)}" for record in self.records}
        return pages.section(self.key, self.frame, self.figure, self.records, links, **self.extra)


def _write_csvs(folder: Path, frames: dict[str, pandas.DataFrame]) -> None:
    for name, frame in frames.items():
        write_atomic(folder / f"{name}.csv", frame.to_csv(index=False))


def write_table(number: int, records: list[dict], profile: str, folder: str | os.PathLike) -> Path:
    """Writes tableN.csv and tableN.html into a folder; returns the path of the page."""
    return _Table(number, records, profile).write(Path(folder))


def write_beyond(name: str, records: list[dict], profile: str, folder: str | os.PathLike) -> Path:
    """Writes <name>.csv, <name>_claims.csv and <name>.html into a folder; returns the path of the page."""
    return _Table(beyond.known(name), records, profile).write(Path(folder))


def by_seed(records: list[dict], profile: str) -> pandas.DataFrame:
    """Every number of Tables 1-7 and of the tables beyond them that ran, a line per seed."""
    frames = [table_registry.build(key, records, profile).seeds() for key in _tables(records)]
    return pandas.concat([frame for frame in frames if len(frame)] or frames[:1])


def _tables(records: list[dict]) -> list[int | str]:
    """Tables 1-7 and those beyond them that ran."""
    stages = {record["stage"] for record in records}
    return [*TABLES, *(name for name, stage in STAGE_OF.items() if stage in stages)]


def write_ledger(records: list[dict], switched: dict[str, list[dict]], profile: str,
                 folder: str | os.PathLike) -> tuple[pandas.DataFrame, pandas.DataFrame]:
    """Writes claims.csv, readings.csv, seeds.csv and claims.html into a folder.

    `switched` has the records of each switched reading. Returns the ledger and the effects of the readings.
    """
    folder, seeds = Path(folder), by_seed(records, profile)
    ledger, effects = claims.ledger(seeds), readings.effects(records, switched)
    _write_csvs(folder, {"seeds": seeds, "claims": ledger, "readings": effects})
    write_atomic(folder / "claims.html", pages.claims_page(ledger, effects, records, profile))
    return ledger, effects


def write_index(records: list[dict], profile: str, folder: str | os.PathLike,
                switched: dict[str, list[dict]] | None = None, run: dict | None = None) -> Path:
    """Writes index.html and every page and CSV it leads to into a folder; returns the path of the index.
    `switched` has the records of each switched reading, `run` is the report's run.json."""
    folder, switched = Path(folder), switched or {}
    ledger, _ = write_ledger(records, switched, profile, folder)
    orderings = trends(records)
    _write_csvs(folder, {"trends": orderings})
    tables = [_Table(key, records, profile) for key in _tables(records)]
    for table in tables:
        table.write(folder)
    other = [{**record, "fields": {**record["fields"], "reading": reading}}
             for reading, made in switched.items() for record in made]
    write_atomic(folder / "records.html", pages.records_page(records + other, profile))
    write_atomic(folder / "how.html", pages.how_page(records, profile, run or {}))
    log = PROJECT_ROOT / "LOG.md"
    text = log.read_text(encoding="utf-8") if log.exists() else ""
    write_atomic(folder / "failed.html", pages.failed_page(text, records, profile))
    measured = map(pandas.read_csv, sorted(BENCHMARKS.glob("speed-*.csv")))
    benchmarks = [pages.benchmark_view(frame, plots.draw(plots.speed, frame)) for frame in measured]
    sections = [table.section() for table in tables]
    page = pages.index_page(sections, orderings, ledger, benchmarks, records, profile)
    return write_atomic(folder / "index.html", page)


def write_front(folder: str | os.PathLike) -> Path:
    """Writes the page above all reports in a folder, from their claims.csv and run.json; returns its path."""
    folder = Path(folder)
    found = {path.parent.name: path for path in sorted(folder.glob("*/claims.csv"))}
    if len(found) > 1:
        found.pop("test", None)  # the profile of this suite's own tests
    reports = {name: (ledger, _read_run(path.with_name("run.json"))) for name, path in found.items()
               if (ledger := _read_ledger(path)) is not None}
    # the report of most seeds first
    reports = dict(sorted(reports.items(), key=lambda item: -item[1][1].get("seeds", 0)))
    comparisons = {name: path.read_text(encoding="utf-8") for name in reports
                   if (path := folder / name / COMPARISON).is_file()}
    return write_atomic(folder / "index.html", pages.front_page(reports, comparisons))


def _read_ledger(path: Path) -> pandas.DataFrame | None:
    """A claims.csv read back; None, with a note, for one that is damaged."""
    try:
        frame = read_csv_as_text(path).astype({"n": int})
        for name in ("paper_value", "value", "low", "high"):
            frame[name] = [float(text or "nan") for text in frame[name]]
        if missing := {"id", "group", "claim", "paper", "ours"} - set(frame):
            raise KeyError(*sorted(missing)[:1])
    except (OSError, ValueError, KeyError, OverflowError) as error:
        print(f"note: {path} cannot be read ({type(error).__name__}) and is left out of the page over all "
              "profiles: run its profile again")
        return None
    return frame


def _read_run(path: Path) -> dict:
    """Seeds and device of a run.json; nothing of one that is damaged."""
    try:
        found = json.loads(path.read_bytes())
        return {"seeds": int(found["seeds"]), "environment": {"device": str(found["environment"]["device"])}}
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return {}
