"""Records of the stages that tables read, made where the store lacks them; imports nothing heavy."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from kn.data import glue_submission
from kn.files import checkout
from kn.suite import launch
from kn.suite.devices import keep_off_gpus
from kn.suite.plan import TABLES, plan_stages, table_of
from kn.suite.planner import ROWS, TASKS
from kn.suite.profiles import load
from kn.suite.readings import SWITCHES, switched_stages
from kn.suite.store import Stage, Store, StoreError

# set for the notebooks of a run, which read finished stages and make none: JSON {path of a stage: its error}
READ_ONLY = "KN_READ_ONLY"


def make_records(
    profile: str = "mini", tables: Sequence[int | str] = TABLES, seeds: int = 1,
    only: Sequence[str] | None = None, overrides: tuple[str, ...] = (), jobs: int | None = None,
) -> list[dict]:
    """Records of the stages that the tables read; missing stages are run. `only` restricts the GLUE tasks.
    A notebook that ./run_all.sh executes ($KN_READ_ONLY) runs none: StoreError where a stage is missing."""
    settings = load(profile, overrides or environment_overrides())
    keep_off_gpus(settings.device)
    stages, read = plan_stages(settings, list(tables), seeds, tuple(only) if only else TASKS)
    store = Store().open()
    if (errors := os.environ.get(READ_ONLY)) and (missing := launch.missing_stages(stages, store)):
        first = next(iter(missing))
        reason = json.loads(errors).get(first, "it was not made")
        found = f"{len(missing)} of {len(stages)} stages are missing, first {first}: {reason}"
        raise StoreError(f"{found} (run ./run_all.sh again to make them)")
    launch.run(stages, store, jobs=jobs)
    return records(store, read)


def records(store: Store, stages: list[Stage]) -> list[dict]:
    """Records of finished stages; Table 6's test scores, ours or $KN_GLUE_SCORES', join the fine-tuning."""
    found = [store.record(stage) for stage in stages]
    scores = {(stage["row"], stage["seed"]): record["metrics"]["tasks"]
              for stage, record in zip(stages, found, strict=True) if stage.kind == "score"}
    if file := os.environ.get("KN_GLUE_SCORES"):
        for key, given in glue_submission.read_scores(file, ROWS).items():
            scores[key] = scores.get(key, {}) | {task: {"headline": value} for task, value in given.items()}
    for record in found:
        fields = record["fields"]
        if record["stage"] == "twin_check":
            fields["kind"] = fields.pop("check")
        row_scores = scores.get((fields.get("row"), fields.get("seed")), {})
        if record["stage"] == "finetune_glue" and fields["task"] in row_scores:
            record["metrics"]["test"] = row_scores[fields["task"]]
    return found


def switched_records(
    profile: str = "mini", seeds: int = 1, only: Sequence[str] | None = None, overrides: tuple[str, ...] = ()
) -> dict[str, list[dict]]:
    """{switched reading: records of its finished stages}; make_records(tables=["claims"]) makes them."""
    settings, store = load(profile, overrides or environment_overrides()), Store()
    stages = {name: switched_stages(settings, name, range(seeds), tuple(only or TASKS)) for name in SWITCHES}
    found = {name: records(store, list(filter(store.has, planned))) for name, planned in stages.items()}
    return {name: finished for name, finished in found.items() if finished}


def command(record: dict, profile: str) -> str:
    """The ./run_all.sh command that makes the stage of a record and its inputs."""
    fields = record["fields"]
    parts = ["./run_all.sh"] + [f"--profile {profile}"] * (profile != "mini")
    parts.append(f"--only {'claims' if 'reading' in fields else table_of(record['stage'], fields)}")
    if fields.get("seed"):
        parts.append(f"--seeds {fields['seed'] + 1}")
    return " ".join([*parts, *(f"--set {override}" for override in environment_overrides())])


def environment_overrides() -> tuple[str, ...]:
    """The `--set` values that ./run_all.sh hands to the notebooks in $KN_SET, one a line."""
    return tuple(line for line in os.environ.get("KN_SET", "").splitlines() if line)


def report_folder(profile: str) -> Path:
    """Folder of a profile's report: $KN_REPORTS (default reports/) / profile."""
    return Path(os.environ.get("KN_REPORTS") or checkout() / "reports") / profile
