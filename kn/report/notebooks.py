"""Executes the notebooks with papermill, one after another, and renders them; what is unchanged is not executed again."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from pathlib import Path

from kn.files import PACKAGE, PROJECT_ROOT, file_sha256
from kn.report import site
from kn.report import write as report
from kn.suite import plan as kinds
from kn.suite import profiles
from kn.suite import run as stages
from kn.suite.devices import peak_bytes
from kn.suite.provenance import environment
from kn.suite.store import Stage, Store

SOURCE = PROJECT_ROOT / "notebooks"


def key_of(source: Path, parameters: dict, plan: list[Stage]) -> str:
    """Hash over the notebook's source cells, its parameters, its stages and the code that renders them."""
    cells = [cell["source"] for cell in json.loads(source.read_text())["cells"]]
    rooms = [path for room in ("paper", "report") for path in sorted((PACKAGE / room).rglob("*.*")) if path.suffix in (".py", ".csv", ".css", ".html")]
    code = [path.read_text(encoding="utf-8") for path in rooms]
    return hashlib.sha256(json.dumps([cells, parameters, [s.path for s in plan], code]).encode()).hexdigest()[:16]


def execute(source: Path, target: Path, parameters: dict) -> str | None:
    """Run one notebook into `target`; None, or the error's one line and a page with the traceback (<name>-failed.html)."""
    import nbformat
    import papermill
    from nbconvert import HTMLExporter

    known = papermill.inspect_notebook(str(source))
    unknown = [name for name in parameters if name not in known]
    if unknown:
        return f"{source.name} has no parameter {unknown[0]!r} in its cell tagged parameters: found {', '.join(known) or 'none'}"
    failure, part = None, target.with_suffix(f".{os.getpid()}.part.ipynb")  # of this run alone: another may write the same report
    try:
        quiet = ["--IPKernelApp.log_level=CRITICAL"]  # at ERROR it reports the interrupt that ends every kernel; a cell's error comes by another way
        papermill.execute_notebook(str(source), str(part), parameters, kernel_name="python3", progress_bar=False, cwd=str(SOURCE), extra_arguments=quiet)
    except papermill.PapermillExecutionError as error:
        failure = f"{source.name}: {error.ename}: {error.evalue}".splitlines()[0]
    except Exception as error:  # a kernel that dies raises many kinds
        lines = str(error).splitlines() or [""]
        failure = f"{source.name}: {type(error).__name__}: {lines[0]} (its kernel ended: out of memory, or killed; run the same command again, with --jobs 1 if it was memory)"
    if part.exists():
        notebook = nbformat.read(part, as_version=4)
        for name in ("input_path", "output_path"):  # of this machine, nobody else's
            notebook.metadata.get("papermill", {}).pop(name, None)
        nbformat.write(notebook, part)
        part.replace(target)
        page = target.with_name(f"{target.stem}-failed.html")
        page.unlink(missing_ok=True)
        if failure:
            page.write_text(HTMLExporter().from_notebook_node(notebook)[0], encoding="utf-8")
    return failure


def finished(path: Path) -> dict[str, str]:
    """{notebook: its key and the sha256 of its output} from a run.json; nothing from one that is missing or damaged."""
    try:
        return {str(name): str(key) for name, key in json.loads(path.read_text())["notebooks"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def run_all(profile: str, tables: list[int | str], seeds: int, plan: list[Stage], store: Store) -> int:
    """Execute the tables' notebooks, then write the index and run.json; 1 if any notebook failed, else 0."""
    folder = stages.report_folder(profile)
    folder.mkdir(parents=True, exist_ok=True)
    state_path = folder / "run.json"
    done, failures, parameters = finished(state_path), [], {"profile": profile, "seeds": seeds}
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(PROJECT_ROOT), os.environ.get("PYTHONPATH"))))
    started = time.monotonic()
    names = [site.file_of(n) for n in tables] + (["00_start_here"] if set(kinds.TABLES) <= set(tables) else [])
    overrides = stages.environment_overrides()
    scores = Path(os.environ["KN_GLUE_SCORES"]).read_text() if os.environ.get("KN_GLUE_SCORES") else ""
    for name in names:
        source, target = SOURCE / f"{name}.ipynb", folder / f"{name}.ipynb"
        key = key_of(source, {**parameters, "overrides": overrides, "scores": scores}, plan)
        if target.exists() and done.get(name) == f"{key} {file_sha256(target)}":
            print(f"notebook {name}: unchanged", flush=True)
            continue
        clock = time.monotonic()
        failure = execute(source, target, parameters)
        print(f"notebook {name}: {'FAILED' if failure else 'done'} in {time.monotonic() - clock:.0f} s", flush=True)
        if failure:
            failures.append(failure)
            done.pop(name, None)
        else:
            done[name] = f"{key} {file_sha256(target)}"
    found = [item for item in plan if store.has(item)]
    records = stages.records(store, found)
    settings = profiles.load(profile, overrides)
    everything, _ = stages.plan_stages(settings, (*kinds.TABLES, *kinds.BEYOND), seeds)  # the index shows what earlier runs made, too
    made = {"seeds": seeds, "tables": tables, "overrides": list(overrides), "corpus": next((r["metrics"]["fingerprint"] for r in records if r["stage"] == "corpus"), None)}
    known = stages.records(store, [item for item in everything if store.has(item)])
    page = report.write_index(known, profile, folder, stages.switched_records(profile, seeds), made)
    walls = [r["provenance"]["wall_seconds"] for r in records]
    peaks = [r["provenance"]["peak_bytes"] for r in records]
    summary = {
        "profile": profile, **made, "stages": len(plan), "finished": len(found),
        "stage_seconds": round(sum(walls), 1), "report_seconds": round(time.monotonic() - started, 1),
        "peak_bytes_of_a_stage": max(peaks, default=0), "peak_bytes_of_the_report": peak_bytes(),
        "environment": environment(), "notebooks": done,
    }  # fmt: skip
    part = state_path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(summary, indent=1))
    part.replace(state_path)
    report.write_front(folder.parent)
    for line in site.cautions(records, profile):
        print(f"note: {line}")
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    print(f"report: {page}")
    return 1 if failures else 0
