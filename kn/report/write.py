"""Tables, trends and pages from finished stages.

    table(4, records, "mini")                 one line per cell: paper, ours ± sd (n), delta, verdict
    trends(records)                           the paper's claims, each held / not held / undecided
    average(records, "student", "dev")        mean over the GLUE tasks, per seed
    informative(records)                      the tasks on which the teacher really beats the simple baselines
    plot(4, records)                          a matplotlib figure
    fixed(frame)                              what of a table cannot move between machines
    show(frame)                               a table or the trends, for display in a notebook
    write_table(…), write_beyond(…), write_index(…)    CSV and HTML, each file written whole or not at all

One rule everywhere: a difference holds if the 95 % interval of the seed-paired difference leaves 0 on the claimed side;
perplexities are compared as ratios, so by the difference of their logarithms.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kn.files import BENCHMARKS, PROJECT_ROOT
from kn.files import write_atomic as _write
from kn.paper import printed
from kn.report.statistics import interval
from kn.report.tables import COLUMNS, average, informative, sheet_of, table
from kn.report.trends import compare, trends

if TYPE_CHECKING:
    import matplotlib.figure
    import pandas

__all__ = [
    "COLUMNS", "average", "by_seed", "compare", "fixed", "informative", "interval", "plot", "plot_beyond", "show", "table", "trends", "write_beyond", "write_front", "write_index", "write_ledger",
    "write_table",
]  # fmt: skip

FIXED = ["shape", "count", "hyper-parameter", "parameters without the output embedding", "parameters", "steps"]  # metrics that no processor changes


def fixed(frame: pandas.DataFrame) -> dict[str, Any]:
    """What of a table cannot move between machines: its size, names, printed values, shapes, counts and hyper-parameters."""
    number = frame["table"].iloc[0]
    cells = set() if isinstance(number, str) else set(printed(int(number))[["row", "column"]].itertuples(index=False, name=None))
    paper = [line.paper for line in frame.drop_duplicates(["row", "column"]).itertuples() if (line.row, line.column) in cells]
    facts = {"lines and columns": frame.shape, "columns": ", ".join(frame.columns)}
    facts |= {"rows": " | ".join(dict.fromkeys(frame["row"])), "cells per row": " | ".join(dict.fromkeys(frame["column"]))}
    numbers = [value for value in paper if not isinstance(value, str)]
    facts["printed"] = f"{len(paper)} cells, numbers add up to {round(math.fsum(numbers), 5):.10g}"
    settled = frame[frame["metric"].isin(FIXED) & frame["ours"].notna() & (frame["column"] != "Precision")]  # that one follows the processor
    for line in settled.itertuples():
        facts[f"{line.row}, {line.column}"] = str(line.ours) if line.verdict == "recorded" else f"{line.ours} ({line.verdict})"
    return facts


def plot(number: int, records: list[dict]) -> matplotlib.figure.Figure:
    """The picture that goes with a table: parameters, loss terms, training logs, perplexities (log axis) or GLUE bars."""
    from kn.report import plots

    return plots.figure(number, table(number, records, ""), records)


def show(frame: pandas.DataFrame) -> Any:
    """A table or the trends as they look on the page, for display in a notebook."""
    from IPython.display import HTML

    from kn.report import site

    return HTML(site.fragment(frame))


def write_table(number: int, records: list[dict], profile: str, folder: str | os.PathLike) -> Path:
    """Writes tableN.csv and tableN.html into a folder, each by one atomic rename, and returns the path of the page."""
    from kn.report import plots

    frame = table(number, records, profile)
    return _write_table(number, frame, plots.figure(number, frame, records), records, profile, Path(folder), _averages(number, records))


def _averages(number: int, records: list[dict]) -> pandas.DataFrame | None:
    from kn.report import averages

    return averages.averages(number, records) if number in (5, 6) else None


def _write_table(number: int, frame: pandas.DataFrame, picture: matplotlib.figure.Figure, records: list[dict], profile: str, folder: Path, means: pandas.DataFrame | None) -> Path:
    from kn.report import site

    _write(folder / f"table{number}.csv", frame.to_csv(index=False))
    if means is not None:
        _write(folder / f"table{number}_averages.csv", means.to_csv(index=False))
    return _write(folder / f"table{number}.html", site.table_page(number, frame, records, profile, picture, below="" if means is None else site.averages_section(means)))


def plot_beyond(name: str, frame: pandas.DataFrame) -> matplotlib.figure.Figure:
    """The picture that goes with a notebook beyond the tables, of its table."""
    from kn.report import plots

    return plots.beyond(name, frame)


def write_beyond(name: str, records: list[dict], profile: str, folder: str | os.PathLike) -> Path:
    """Writes <name>.csv, <name>_claims.csv and <name>.html into a folder and returns the path of the page."""
    from kn.report import beyond as findings
    from kn.report import site

    frame, claims = findings.table(name, records), findings.claims(name, records)
    _write(Path(folder) / f"{name}.csv", frame.to_csv(index=False))
    _write(Path(folder) / f"{name}_claims.csv", claims.to_csv(index=False))
    return _write(Path(folder) / f"{name}.html", site.table_page(name, frame, records, profile, plot_beyond(name, frame), claims))


def by_seed(records: list[dict], profile: str) -> pandas.DataFrame:
    """Every number of Tables 1-7 and, where they ran, of the notebooks beyond them, a line per seed: what all means, deviations, intervals and verdicts are made of."""
    import pandas

    from kn.report import beyond as findings

    frames = [sheet_of(number, records, profile).seeds() for number in range(1, 8)] + [findings.sheet_of(name, records).seeds() for name in _ran(records)]
    return pandas.concat([frame for frame in frames if len(frame)] or frames[:1])


def _ran(records: list[dict]) -> list[str]:
    """The notebooks beyond the tables that left something."""
    stages = {"beyond_alignment": "aligned", "beyond_compression": "compressed"}
    return [name for name, stage in stages.items() if any(record["stage"] == stage for record in records)]


def write_ledger(records: list[dict], switched: dict[str, list[dict]], profile: str, folder: str | os.PathLike) -> tuple[pandas.DataFrame, pandas.DataFrame]:
    """Writes claims.csv, readings.csv, seeds.csv and claims.html into a folder; returns the ledger and the effects of the readings, whose records are in `switched`."""
    from kn.report import claims, pages, readings

    seeds = by_seed(records, profile)
    ledger, effects = claims.ledger(seeds), readings.effects(records, switched)
    for name, frame in (("seeds", seeds), ("claims", ledger), ("readings", effects)):
        _write(Path(folder) / f"{name}.csv", frame.to_csv(index=False))
    _write(Path(folder) / "claims.html", pages.claims_page(ledger, effects, records, profile))
    return ledger, effects


def write_index(records: list[dict], profile: str, folder: str | os.PathLike, switched: dict[str, list[dict]] | None = None, run: dict | None = None) -> Path:
    """Writes index.html, the page of every table and of what ran beyond them, claims.html, records.html, how.html, failed.html and their CSVs into a folder; returns the index's path."""
    import pandas

    from kn.report import beyond as findings
    from kn.report import pages, plots, site

    folder, claims = Path(folder), trends(records)
    ledger, _ = write_ledger(records, switched or {}, profile, folder)
    tables = {number: table(number, records, profile) for number in range(1, 8)}
    pictures = {number: plots.figure(number, frame, records) for number, frame in tables.items()}
    beyond = {name: (frame := findings.table(name, records), plots.beyond(name, frame), findings.claims(name, records)) for name in _ran(records)}
    means = {number: _averages(number, records) for number in tables}
    for number, frame in tables.items():
        _write_table(number, frame, pictures[number], records, profile, folder, means[number])
    for name, (frame, picture, held) in beyond.items():
        _write(folder / f"{name}.csv", frame.to_csv(index=False))
        _write(folder / f"{name}_claims.csv", held.to_csv(index=False))
        _write(folder / f"{name}.html", site.table_page(name, frame, records, profile, picture, held))
    everything = records + [{**record, "fields": {**record["fields"], "reading": name}} for name, found in (switched or {}).items() for record in found]
    _write(folder / "trends.csv", claims.to_csv(index=False))
    _write(folder / "records.html", site.records_page(everything, profile))
    _write(folder / "how.html", pages.how_page(records, profile, run or {}))
    log = PROJECT_ROOT / "LOG.md"
    _write(folder / "failed.html", pages.failed_page(log.read_text(encoding="utf-8") if log.exists() else "", records, profile))
    below = {number: site.averages_section(frame, 3) for number, frame in means.items() if frame is not None}
    measured = [pandas.read_csv(file) for file in sorted(BENCHMARKS.glob("speed-*.csv"))]
    speeds = "".join(site.speed_section(frame, plots.speed(frame)) for frame in measured)
    return _write(folder / "index.html", site.index_page(tables, pictures, claims, records, profile, speeds, beyond, pages.grid({profile: ledger}, "claims.html"), below))


def write_front(folder: str | os.PathLike) -> Path:
    """Writes the page above all profiles' reports in a folder, from their claims.csv and run.json, and the page of the interface, api.html."""
    from kn.report import api, pages

    found = {path.parent.name: path for path in sorted(Path(folder).glob("*/claims.csv"))}
    found = {name: path for name, path in found.items() if name != "test" or len(found) == 1}  # the suite's own profile stands alone or not at all
    ledgers = {name: (_ledger(path), _run(path.with_name("run.json"))) for name, path in found.items()}
    reports = {name: pair for name, pair in ledgers.items() if pair[0] is not None}
    _write(Path(folder) / "api.html", api.page())
    return _write(Path(folder) / "index.html", pages.front_page(reports))


def _ledger(path: Path) -> pandas.DataFrame | None:
    """A claims.csv read back; None, with a note, for one that is damaged: the next run of its profile writes it again."""
    import pandas

    numbers = ("paper_value", "value", "low", "high")
    try:
        frame = pandas.read_csv(path, dtype=str, keep_default_na=False).astype({"n": int})
        for name in numbers:
            frame[name] = [float(text or "nan") for text in frame[name]]
        if missing := {"id", "group", "claim", "paper", "ours"} - set(frame):
            raise KeyError(*sorted(missing)[:1])
    except (OSError, ValueError, KeyError, OverflowError) as error:
        print(f"note: {path} cannot be read ({type(error).__name__}) and is left out of the page over all profiles: run its profile again")
        return None
    return frame


def _run(path: Path) -> dict:
    """What a page shows of a run.json: its seeds and its machine; nothing of one that is damaged."""
    try:
        found = json.loads(path.read_text())
        return {"seeds": int(found["seeds"]), "environment": {"device": str(found["environment"]["device"])}}
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return {}


