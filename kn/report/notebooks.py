"""Executes the notebooks with papermill, one after another, and renders them; what is unchanged is not executed again."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from pathlib import Path

from kn import report
from kn.files import PACKAGE, PROJECT_ROOT, file_sha256, write_atomic
from kn.report.formatting import cautions, file_stem
from kn.suite import profiles, run
from kn.suite.devices import peak_bytes
from kn.suite.plan import BEYOND, TABLES, plan_stages
from kn.suite.provenance import environment
from kn.suite.store import Stage, Store

SOURCE = PROJECT_ROOT / "notebooks"
KERNEL_DIED = "its kernel ended: out of memory, or killed; run the same command again, with --jobs 1 if it was memory"
RENDERING = (".py", ".csv", ".css", ".html")  # kinds of files in kn/paper and kn/report that shape a report


def key_of(source: Path, parameters: dict, plan: list[Stage]) -> str:
    """Hash over the notebook's source cells, its parameters, its stages and the code that renders them."""
    cells = [cell["source"] for cell in json.loads(source.read_text())["cells"]]
    files = [path for room in ("paper", "report") for path in sorted((PACKAGE / room).rglob("*.*")) if path.suffix in RENDERING]
    code = [path.read_text(encoding="utf-8") for path in files]
    stages = [stage.path for stage in plan]
    return hashlib.sha256(json.dumps([cells, parameters, stages, code]).encode()).hexdigest()[:16]


def execute(source: Path, target: Path, parameters: dict) -> str | None:
    """Run one notebook into `target`; None, or the error on one line and a page with the traceback (<name>-failed.html)."""
    import nbformat
    import papermill

    known = papermill.inspect_notebook(str(source))
    unknown = [name for name in parameters if name not in known]
    if unknown:
        found = ", ".join(known) or "none"
        return f"{source.name} has no parameter {unknown[0]!r} in its cell tagged parameters: found {found}"
    failure, part = None, target.with_suffix(f".{os.getpid()}.part.ipynb")  # another process may write the same report
    # at level ERROR the kernel reports the interrupt that ends every kernel; a cell's error is raised here anyway
    options = {"kernel_name": "python3", "progress_bar": False, "extra_arguments": ["--IPKernelApp.log_level=CRITICAL"]}
    try:
        papermill.execute_notebook(str(source), str(part), parameters, cwd=str(SOURCE), **options)
    except papermill.PapermillExecutionError as error:
        failure = f"{source.name}: {error.ename}: {error.evalue}".splitlines()[0]
    except Exception as error:  # a kernel that dies raises many kinds
        first = (str(error).splitlines() or [""])[0]
        failure = f"{source.name}: {type(error).__name__}: {first} ({KERNEL_DIED})"
    if part.exists():
        notebook = nbformat.read(part, as_version=4)
        for name in ("input_path", "output_path"):  # paths of this machine
            notebook.metadata.get("papermill", {}).pop(name, None)
        nbformat.write(notebook, part)
        part.replace(target)
        page = target.with_name(f"{target.stem}-failed.html")
        page.unlink(missing_ok=True)
        if failure:
            write_atomic(page, report.failed_notebook_page(notebook, failure))
    return failure


def finished(path: Path) -> dict[str, str]:
    """{notebook: its key and the sha256 of its output} of a run.json; nothing from one that is missing or damaged."""
    try:
        return {str(name): str(key) for name, key in json.loads(path.read_text())["notebooks"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def run_all(profile: str, tables: list[int | str], seeds: int, plan: list[Stage], store: Store) -> int:
    """Execute the tables' notebooks, then write the index, run.json and the front page; 1 if any notebook failed, else 0."""
    folder = run.report_folder(profile)
    folder.mkdir(parents=True, exist_ok=True)
    started, overrides = time.monotonic(), run.environment_overrides()
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(PROJECT_ROOT), os.environ.get("PYTHONPATH"))))
    done, failures = _execute_changed(folder, profile, tables, seeds, plan, overrides)
    found = [stage for stage in plan if store.has(stage)]
    records = run.records(store, found)
    fingerprint = next((record["metrics"]["fingerprint"] for record in records if record["stage"] == "corpus"), None)
    made = {"seeds": seeds, "tables": tables, "overrides": list(overrides), "corpus": fingerprint}
    everything, _ = plan_stages(profiles.load(profile, overrides), (*TABLES, *BEYOND), seeds)  # of earlier runs, too
    known = run.records(store, [stage for stage in everything if store.has(stage)])
    page = report.write_index(known, profile, folder, run.switched_records(profile, seeds), made)
    provenance = [record["provenance"] for record in records]
    summary = {
        "profile": profile, **made, "stages": len(plan), "finished": len(found),
        "stage_seconds": round(sum(entry["wall_seconds"] for entry in provenance), 1),
        "report_seconds": round(time.monotonic() - started, 1),
        "peak_bytes_of_a_stage": max((entry["peak_bytes"] for entry in provenance), default=0),
        "peak_bytes_of_the_report": peak_bytes(), "environment": environment(), "notebooks": done,
    }
    write_atomic(folder / "run.json", json.dumps(summary, indent=1))
    if profile != "test":
        report.write_interface(folder.parent)
    report.write_front(folder.parent)
    for line in cautions(records, profile):
        print(f"note: {line}")
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    print(f"report: {page}")
    return 1 if failures else 0


def _execute_changed(
    folder: Path, profile: str, tables: list[int | str], seeds: int, plan: list[Stage], overrides: tuple[str, ...]
) -> tuple[dict[str, str], list[str]]:
    """Execute the notebooks that are new or changed; returns {notebook: key and sha256} of all that are done, and failures."""
    done, failures = finished(folder / "run.json"), []
    parameters = {"profile": profile, "seeds": seeds}
    names = [file_stem(key) for key in tables] + ["00_start_here"] * (set(TABLES) <= set(tables))
    scores = os.environ.get("KN_GLUE_SCORES")
    inputs = {**parameters, "overrides": overrides, "scores": Path(scores).read_text() if scores else ""}
    for name in names:
        source, target = SOURCE / f"{name}.ipynb", folder / f"{name}.ipynb"
        key = key_of(source, inputs, plan)
        if target.exists() and done.get(name) == f"{key} {file_sha256(target)}":
            print(f"notebook {name}: unchanged", flush=True)
            continue
        started = time.monotonic()
        failure = execute(source, target, parameters)
        print(f"notebook {name}: {'FAILED' if failure else 'done'} in {time.monotonic() - started:.0f} s", flush=True)
        if failure:
            failures.append(failure)
            done.pop(name, None)
        else:
            done[name] = f"{key} {file_sha256(target)}"
    return done, failures
