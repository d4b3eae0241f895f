"""The plan of a run: all stages that the asked-for tables need, in order. `make_records` makes what is missing and returns their records.

This file imports nothing heavy, so that planning and reading finished results is quick.
"""

from __future__ import annotations

import os
from pathlib import Path

from kn.suite import readings
from kn.suite.devices import keep_off_gpus
from kn.suite.plan import BEYOND, LEDGER, NOTEBOOKS, ROOT, ROWS, TABLES, TASKS, StagePlanner, table_of
from kn.suite.profiles import Profile, load
from kn.suite.store import Stage, Store


def plan(profile: Profile, tables=TABLES, seeds: int = 1, tasks: tuple[str, ...] = TASKS, without_mirror: bool = False) -> tuple[list[Stage], list[Stage]]:
    """(all stages in an order in which each comes after its inputs, those the tables read); `without_mirror` is for costs only. ValueError for what is unknown."""
    wrong = [t for t in tables if t not in NOTEBOOKS]
    if wrong:
        raise ValueError(f"table {wrong[0]} does not exist: allowed are 1 to 7, {', '.join(BEYOND)} and {LEDGER}")
    if not isinstance(seeds, int) or isinstance(seeds, bool) or not 1 <= seeds <= 999:
        raise ValueError(f"seeds is {seeds!r}: a whole number of at least 1 and at most 999 wanted")
    unknown = [t for t in tasks if t not in TASKS]
    if unknown:
        raise ValueError(f"task {unknown[0]!r} is unknown: allowed are {', '.join(TASKS)}")
    made, wanted, order = StagePlanner(profile, without_mirror), {}, {}

    def add(item: Stage) -> None:
        if item.path not in order:
            for need in item.inputs:
                add(need)
            order[item.path] = item

    for number in dict.fromkeys([*TABLES, *tables] if LEDGER in tables else tables):
        if number == LEDGER:
            for item in (item for name in readings.SWITCHES for item in readings.stages(profile, name, range(seeds), tuple(tasks), without_mirror)):
                add(item)
            continue
        for item in made.table(number, range(seeds), tuple(tasks)):
            wanted[item.path] = item
            add(item)
    return list(order.values()), list(wanted.values())


def records(store: Store, wanted: list[Stage]) -> list[dict]:
    """Records of finished stages; Table 6's test scores join the fine-tuning they belong to."""
    found = [store.record(item) for item in wanted]
    scores = {(r["fields"]["row"], r["fields"]["seed"]): r["metrics"]["tasks"] for r in found if r["stage"] == "score"}
    if os.environ.get("KN_GLUE_SCORES"):
        from kn.data import glue

        given = glue.read_scores(os.environ["KN_GLUE_SCORES"], ROWS)
        scores = {key: {task: {"headline": value} for task, value in values.items()} for key, values in given.items()}
    for record in found:
        fields = record["fields"]
        if record["stage"] == "twin_check":
            fields["kind"] = fields.pop("check")
        if record["stage"] == "finetune_glue" and fields["task"] in scores.get((fields["row"], fields["seed"]), {}):
            record["metrics"]["test"] = scores[fields["row"], fields["seed"]][fields["task"]]
    return found


def make_records(profile: str = "mini", tables=TABLES, seeds: int = 1, only=None, overrides: tuple[str, ...] = (), jobs: int | None = None) -> list[dict]:
    """Records of the stages the tables read, made where the store lacks them; `only` names the GLUE tasks to restrict to."""
    from kn.suite import launch

    tables, tasks = list(tables), tuple(only) if only else TASKS
    settings = load(profile, overrides or environment_overrides())
    keep_off_gpus(settings.device)
    stages, wanted = plan(settings, tables, seeds, tasks)
    store = Store().open()
    launch.run(stages, store, jobs=jobs)
    return records(store, wanted)


def switched(profile: str = "mini", seeds: int = 1, only=None, overrides: tuple[str, ...] = ()) -> dict[str, list[dict]]:
    """Records of what each switched reading made, of those stages that the store has: make_records() with "claims" makes them."""
    settings, store = load(profile, overrides or environment_overrides()), Store()
    found = {name: [item for item in readings.stages(settings, name, range(seeds), tuple(only or TASKS)) if store.has(item)] for name in readings.SWITCHES}
    return {name: records(store, items) for name, items in found.items() if items}


def command(record: dict, profile: str) -> str:
    """The command that makes the stage of a record, with what lies before it."""
    fields, asked = record["fields"], f"--only {table_of(record['stage'], record['fields'])}" if "reading" not in record["fields"] else "--only claims"
    seeds = f"--seeds {fields['seed'] + 1}" if fields.get("seed") else ""
    return " ".join(filter(None, ["./run_all.sh", f"--profile {profile}" if profile != "mini" else "", asked, seeds, *(f"--set {item}" for item in environment_overrides())]))


def environment_overrides() -> tuple[str, ...]:
    """The `--set` values ./run_all.sh hands to the notebooks, one a line."""
    return tuple(line for line in os.environ.get("KN_SET", "").splitlines() if line)


def report_folder(profile: str) -> Path:
    """Where a profile's tables go: $KN_REPORTS (default reports/) / profile."""
    return Path(os.environ.get("KN_REPORTS") or ROOT / "reports") / profile
