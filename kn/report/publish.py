"""The committed report: a finished run becomes reports/published/<profile>; nothing else writes there."""

import json
import os
import shutil
from pathlib import Path

from kn.files import PROJECT_ROOT
from kn.report.compare import COMPARISON, read_run

PUBLISHED = PROJECT_ROOT / "reports" / "published"


def publish(folder: Path, published: Path = PUBLISHED) -> Path:
    """Copy a finished report of default settings into `published`; ValueError for one not fit for it."""
    run = read_run(folder)
    target = published / run["profile"]
    summary = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    if lacking := summary["stages"] - summary["finished"]:
        raise ValueError(f"{folder} lacks {lacking} stages: run its profile again first")
    # the same text from a file is no other setting: pages name it by its fingerprint
    if changed := [item for item in run["overrides"] if not item.startswith("text.file=")]:
        raise ValueError(f"{folder} was made with --set {' '.join(changed)}: publish a run of the "
                         "profile's own settings")
    if target.exists() and (before := read_run(target)["seeds"]) > run["seeds"]:
        raise ValueError(f"{target} has {before} seeds, {folder} has {run['seeds']}: run it with --seeds "
                         f"{before} first")
    part = published / f".{run['profile']}.{os.getpid()}.part"
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(folder, part, ignore=shutil.ignore_patterns("*-failed.html", ".*", COMPARISON))
    shutil.rmtree(target, ignore_errors=True)
    part.rename(target)
    from kn.report.write import write_front

    write_front(published)
    return target
