"""What each command of the command line does; kn/__main__.py reads the words, without these imports."""

import argparse
import os
import runpy
import shutil
import sys
from collections.abc import Callable

from kn.data import documentation, glue_submission, mirror
from kn.data.hub import SourceError
from kn.files import PROJECT_ROOT, checkout
from kn.report import compare, notebooks, publish
from kn.suite import cost, devices, doctor, executors, launch, profiles, timing
from kn.suite.plan import plan_stages
from kn.suite.planner import ROWS
from kn.suite.run import report_folder
from kn.suite.store import Store, StoreError

ERRORS = (launch.StageFailed, ValueError, StoreError, SourceError, cost.CostError, ImportError, OSError)


def run(options: argparse.Namespace) -> int:
    """Make the missing stages, then the report; or print the plan. ValueError for options that do not fit."""
    profile = profiles.load(options.profile, tuple(options.set))
    if options.glue_scores:
        if profile.source != "mirror":
            reason = f"{profile.name} scores its test sets itself"
            raise ValueError(f"--glue-scores is for the paper profile: {reason}")
        glue_submission.read_scores(options.glue_scores, ROWS)
        os.environ["KN_GLUE_SCORES"] = str(options.glue_scores.absolute())
    if hint := devices.keep_off_gpus(profile.device):
        print(hint)
    slurm = None if options.slurm is None else executors.slurm_options(options.slurm)
    if slurm is not None and not shutil.which("sbatch"):
        reason = "needs Slurm's sbatch on this machine: run it on a login node, or leave --slurm out"
        raise ValueError(f"--slurm {reason}")
    store = Store()
    stages, _ = plan_stages(profile, options.only, options.seeds, without_mirror=options.dry_run)
    if not options.dry_run:
        store.open()
        report_folder(profile.name).mkdir(parents=True, exist_ok=True)
        if options.fresh:
            store.forget(stages)
    speed = timing.measured_timing(profile, devices.precision(profile.device), store)
    jobs = options.jobs or devices.worker_count(speed["peak_bytes"])
    print(cost.describe_plan(stages, store, speed, jobs, len(options.only) + 1), flush=True)
    if options.dry_run:
        for kind, text in doctor.examine(profile.name):
            if kind != "ok":
                print(f"{kind}: {text}")
        return 0
    os.environ["KN_SET"] = "\n".join(options.set)
    cost.check_disk_space(stages, store, speed)
    errors: dict[str, str] = {}
    status, runner = 0, notebooks.NotebookRunner(profile.name, options.only, options.seeds, store)
    try:
        executor = None if slurm is None else executors.Submitit(store.home, slurm)
        launch.run(stages, store, jobs, executor=executor, on_progress=runner.update)
    except launch.StageFailed as error:  # the report shows what there is
        print(f"error: {error}", file=sys.stderr)
        status, errors = 1, error.errors
    except BaseException:
        runner.cancel()
        raise
    return max(status, runner.finish(stages, errors))


def fetch_mirror(options: argparse.Namespace) -> None:
    """Fetch the hub's models and data into a folder."""
    mirror.make(options.folder)
    if options.wheels:
        mirror.wheels(options.folder, PROJECT_ROOT / "requirements.txt")


def export_corpus(options: argparse.Namespace) -> None:
    """Write the documentation corpus to a file; ValueError for a path that cannot be one."""
    file, text = options.file, profiles.load(options.profile, tuple(options.set)).text
    if not str(file).isprintable() or file.is_dir() or not file.parent.is_dir():
        raise ValueError(f"export-corpus {str(file)!r}: a file in an existing folder is needed")
    packages = {"web": text.web, "wiki": text.wiki}
    shares = {"web": text.web_shares, "wiki": text.wiki_shares}
    documentation.write(documentation.build(packages, shares, jobs=devices.cores()), file)


def pretrain_mini(options: argparse.Namespace) -> int:
    """Train mini's committed teacher and baseline again; ValueError where --extra is no folder."""
    if options.extra and not options.extra.is_dir():
        raise ValueError(f"--extra {options.extra} is no folder: give one that holds unpacked packages")
    script = runpy.run_path(str(PROJECT_ROOT / "benchmarks" / "pretrain_mini.py"))
    return script["rebuild"](Store().open(), options.extra)


COMMANDS: dict[str, Callable[[argparse.Namespace], int | None]] = {
    "run": run, "plan": run, "mirror": fetch_mirror, "export-corpus": export_corpus,
    "pretrain-mini": pretrain_mini, "doctor": lambda o: doctor.main(profiles.load(o.profile).name),
    "compare": lambda o: print(compare.compare_reports(o.report, o.reference)),
    "publish": lambda o: print(publish.publish(o.report)),
}


def execute(options: argparse.Namespace) -> tuple[int, str]:
    """Run the command of these options; (exit status, what went wrong or "")."""
    devices.forget_launcher()
    try:
        checkout()
        return COMMANDS[options.command](options) or 0, ""
    except ERRORS as error:
        text = str(error)
        if isinstance(error, OSError) and not isinstance(error, ValueError):
            text = f"{error.filename or 'a file'} could not be written or read ({error.strerror or error})"
            text += ": free some space, or choose other folders with KN_HOME=… and KN_REPORTS=…"
        return 1 if isinstance(error, launch.StageFailed) else 2, text
