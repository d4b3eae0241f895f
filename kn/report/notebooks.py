"""Executes the notebooks with papermill as their stages finish, and writes a run's report around them."""

import hashlib
import json
import logging
import os
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from kn import report
from kn.files import PACKAGE, PROJECT_ROOT, file_sha256, write_atomic
from kn.report import publish
from kn.report.compare import COMPARISON, compare_reports
from kn.report.formatting import cautions, file_stem
from kn.suite import profiles, run
from kn.suite.devices import peak_bytes
from kn.suite.plan import BEYOND, TABLES, plan_stages
from kn.suite.provenance import environment
from kn.suite.store import Stage, Store

SOURCE = PROJECT_ROOT / "notebooks"
RENDERING = (".py", ".csv", ".css", ".html")  # kinds of files in kn/paper and kn/report that shape a report


def key_of(source: Path, parameters: dict, plan: list[Stage]) -> str:
    """Hash over the notebook's source cells, its parameters, its stages and the code that renders them."""
    cells = [cell["source"] for cell in json.loads(source.read_bytes())["cells"]]
    code = [path.read_text(encoding="utf-8") for room in ("paper", "report")
            for path in sorted((PACKAGE / room).rglob("*.*")) if path.suffix in RENDERING]
    content = [cells, parameters, [stage.path for stage in plan], code]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def execute(source: Path, target: Path, parameters: dict) -> str | None:
    """Run a notebook into `target`; None, or the error on one line and a page <name>-failed.html."""
    import nbformat
    import papermill

    from kn.report.kernel import START_SECONDS, OwnKernel

    known = papermill.inspect_notebook(str(source))
    unknown = [name for name in parameters if name not in known]
    if unknown:
        found = ", ".join(known) or "none"
        return f"{source.name} has no parameter {unknown[0]!r} in its cell tagged parameters: found {found}"
    # another process may write the same report
    failure, part = None, target.with_suffix(f".{os.getpid()}.part.ipynb")
    options = {"kernel_name": "python3", "kernel_manager_class": OwnKernel, "start_timeout": START_SECONDS}
    logging.getLogger("papermill").setLevel(logging.CRITICAL)  # what it says of a kernel is in our message
    try:
        papermill.execute_notebook(
            str(source), str(part), parameters, cwd=str(SOURCE), progress_bar=False, **options
        )
    except papermill.PapermillExecutionError as error:
        failure = f"{source.name}: {error.ename}: {error.evalue}".splitlines()[0]
    except OSError:  # a full disk: it ends the run
        raise
    except RuntimeError as error:  # of nbclient, whose words are "Kernel died" or "Kernel didn't respond"
        reason = OwnKernel.latest.why_ended() if str(error).startswith("Kernel ") else error
        failure = f"{source.name}: {reason}".splitlines()[0]
    except Exception as error:
        failure = f"{source.name}: {type(error).__name__}: {error}".splitlines()[0]
    if not part.exists():
        return failure
    notebook = nbformat.read(part, as_version=4)
    for name in ("input_path", "output_path"):  # paths of this machine
        notebook.metadata.get("papermill", {}).pop(name, None)
    page = target.with_name(f"{target.stem}-failed.html")
    page.unlink(missing_ok=True)
    if failure:
        write_atomic(page, report.failed_notebook_page(notebook, failure))
    if failure and target.exists():  # the earlier one stays
        part.unlink()
    else:
        nbformat.write(notebook, part)
        part.replace(target)
    return failure


def finished(path: Path) -> dict[str, str]:
    """{notebook: its key and the sha256 of its output} of a run.json; empty for one that cannot be read."""
    try:
        return {str(name): str(key) for name, key in json.loads(path.read_bytes())["notebooks"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


class NotebookRunner:
    """Executes a run's notebooks in a thread of its own, one by one, each as soon as its stages are finished.
    `update` takes the paths of the finished stages while the run goes on; `finish` executes the rest, writes
    the index, run.json and the front page. A notebook unchanged since the last run is not executed again."""

    def __init__(self, profile: str, tables: list[int | str], seeds: int, store: Store):
        self.profile, self.tables, self.seeds, self.store = profile, tables, seeds, store
        self.folder, self.overrides = run.report_folder(profile), run.environment_overrides()
        self.settings = profiles.load(profile, self.overrides)
        self.done = finished(self.folder / "run.json")
        self.failures: list[str] = []
        self.seconds = 0.0  # of execution
        os.environ[run.READ_ONLY] = "{}"
        # a kernel of an environment without kn finds it
        search = (str(PROJECT_ROOT), os.environ.get("PYTHONPATH"))
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, search))
        self.folder.mkdir(parents=True, exist_ok=True)
        scores = os.environ.get("KN_GLUE_SCORES")
        inputs = {"profile": profile, "seeds": seeds, "overrides": self.overrides,
                  "scores": Path(scores).read_text(encoding="utf-8") if scores else ""}
        notebooks: dict[str, list[int | str]] = {file_stem(key): [key] for key in tables}
        if set(TABLES) <= set(tables):
            notebooks["00_start_here"] = list(TABLES)
        self.waiting: dict[str, tuple[str, set[str]]] = {}  # notebook: (key, paths of its stages)
        for name, keys in notebooks.items():
            stages, _ = plan_stages(self.settings, keys, seeds)
            key = key_of(SOURCE / f"{name}.ipynb", inputs, stages)
            self.waiting[name] = key, {stage.path for stage in stages}
        self.thread = ThreadPoolExecutor(1)
        self.started: list[Future] = []

    def update(self, paths: set[str]) -> None:
        """Execute the notebooks whose stages are all among these finished ones."""
        for name in [name for name, (_, needed) in self.waiting.items() if needed <= paths]:
            self.started.append(self.thread.submit(self._execute, name, self.waiting.pop(name)[0]))

    def cancel(self) -> None:
        """Start no other notebook, for a run that was stopped."""
        self.thread.shutdown(wait=False, cancel_futures=True)

    def _execute(self, name: str, key: str) -> None:
        """Execute one notebook unless it is unchanged; what happened is printed beside the progress bar."""
        started, target = time.monotonic(), self.folder / f"{name}.ipynb"
        if target.exists() and self.done.get(name) == f"{key} {file_sha256(target)}":
            _say(f"notebook {name}: unchanged")
            return
        failure = execute(SOURCE / target.name, target, {"profile": self.profile, "seeds": self.seeds})
        seconds = time.monotonic() - started
        self.seconds += seconds
        if failure:
            self.failures.append(failure)
            self.done.pop(name, None)
        else:
            self.done[name] = f"{key} {file_sha256(target)}"
        page = "" if failure or name == "00_start_here" else f": {self.folder / name}.html"
        _say(f"notebook {name}: {'FAILED' if failure else 'done'} in {seconds:.0f} s{page}")

    def finish(self, plan: list[Stage], errors: dict[str, str] | None = None) -> int:
        """Execute the other notebooks, which tell the errors of stages {path: error}, then write the pages.
        Returns 1 if any notebook failed, else 0."""
        os.environ[run.READ_ONLY] = json.dumps(errors or {})
        self.update({path for _, needed in self.waiting.values() for path in needed})
        for execution in self.started:
            execution.result()  # what no notebook can raise, a full disk say, ends the run
        del os.environ[run.READ_ONLY]
        started = time.monotonic()
        records = run.records(self.store, [stage for stage in plan if self.store.has(stage)])
        fingerprint = next((r["metrics"]["fingerprint"] for r in records if r["stage"] == "corpus"), None)
        made = {"seeds": self.seeds, "tables": self.tables, "overrides": list(self.overrides),
                "corpus": fingerprint}
        everything, _ = plan_stages(self.settings, (*TABLES, *BEYOND), self.seeds)  # of earlier runs, too
        known = run.records(self.store, [stage for stage in everything if self.store.has(stage)])
        switched = run.switched_records(self.profile, self.seeds)
        page = report.write_index(known, self.profile, self.folder, switched, made)
        provenance = [record["provenance"] for record in records]
        summary = {
            "profile": self.profile, **made, "stages": len(plan), "finished": len(records),
            "stage_seconds": round(sum(entry["wall_seconds"] for entry in provenance), 1),
            "report_seconds": round(self.seconds + time.monotonic() - started, 1),
            "peak_bytes_of_a_stage": max((entry["peak_bytes"] for entry in provenance), default=0),
            "peak_bytes_of_the_report": peak_bytes(), "environment": environment(), "notebooks": self.done,
        }
        write_atomic(self.folder / "run.json", json.dumps(summary, indent=1))
        comparison = compare_with_published(self.folder)
        report.write_front(self.folder.parent)
        for line in cautions(records, self.profile):
            print(f"note: {line}")
        for failure in self.failures:
            print(f"error: {failure}", file=sys.stderr)
        print(f"report: {page}")
        if comparison:
            print(comparison)
        return 1 if self.failures else 0


def _say(text: str) -> None:
    """Print a line without tearing the progress bar that another thread draws."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        tqdm.write(text)
    else:
        print(text, flush=True)


def compare_with_published(folder: Path) -> str:
    """How a report compares with the published one, also left in its folder; "" where there is none."""
    reference = publish.PUBLISHED / folder.name
    if not reference.is_dir():
        return ""
    try:
        text = compare_reports(folder, reference)
    except ValueError as error:
        text = f"not compared with the published report: {error}"
    write_atomic(folder / COMPARISON, text + "\n")
    return text
