"""Command line `python -m kn`, which ./run_all.sh calls; without a command word it is `run`.

Exit status: 0 done, 1 a stage or notebook failed, 2 an error in the call or the environment (one line).
"""

import argparse
import os
import re
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

try:
    from kn.data import documentation, glue_submission, mirror
    from kn.data.hub import SourceError
    from kn.files import PROJECT_ROOT
    from kn.report import compare, notebooks, publish
    from kn.suite import cost, devices, doctor, executors, launch, profiles, timing
    from kn.suite.plan import BEYOND, NOTEBOOKS, TABLES, plan_stages
    from kn.suite.planner import ROWS
    from kn.suite.run import report_folder
    from kn.suite.store import Store, StoreError
except ModuleNotFoundError as error:  # a wheel holds the method alone
    if not str(error.name).startswith("kn."):
        raise
    reason = "this installation holds the method alone; the suite needs a checkout: ./run_all.sh there"
    print(f"error: {reason}", file=sys.stderr)
    sys.exit(2)

TITLE = "Reproduces Tables 1-7 of 'Kronecker Decomposition for GPT Compression'; writes reports/<profile>/."
ERROR_STATUS: dict[type[BaseException], int] = {
    launch.StageFailed: 1, ValueError: 2, StoreError: 2, SourceError: 2, cost.CostError: 2,
    ModuleNotFoundError: 2, OSError: 2, KeyboardInterrupt: 130,
}


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
    print(cost.describe_plan(stages, store, speed, options.jobs), flush=True)
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
        launch.run(stages, store, options.jobs, executor=executor, on_progress=runner.update)
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


def table_list(text: str) -> list[int | str]:
    """ "4,5,beyond" as a list of notebooks; ArgumentTypeError unless of 1 to 7, beyond and claims."""
    names = {"beyond": BEYOND, **{str(notebook): (notebook,) for notebook in NOTEBOOKS}}
    tables: set[int | str] = set()
    for part in (part.strip() for part in text.split(",")):
        if part not in names:
            number = part.removeprefix("-").isdecimal()
            reason = f"table {part} does not exist" if number else f"{text!r} is not a list of table numbers"
            allowed = "allowed are 1 to 7, beyond and claims, as in --only 4,5,beyond"
            raise argparse.ArgumentTypeError(f"{reason}: {allowed}")
        tables.update(names[part])
    return sorted(tables, key=NOTEBOOKS.index)


def count(text: str) -> int:
    """An integer from 1 to 999, of seeds or processes; ArgumentTypeError for anything else."""
    if not re.fullmatch(r"0*[1-9]\d{0,2}", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a whole number of at least 1 and at most 999")
    return int(text)


def setting(text: str) -> str:
    """A `--set` override; the path of text.file is made absolute, since notebooks run in another folder."""
    key, _, value = (part.strip() for part in text.partition("="))
    return f"text.file={Path(value).absolute()}" if key == "text.file" and value else text


class Parser(argparse.ArgumentParser):
    """An argument parser with errors of one line."""

    def error(self, message):
        """Exit with status 2."""
        super().error(one_line(message))


def add_profile(parser: argparse.ArgumentParser) -> None:
    """--profile and --set."""
    text = """mini (default): documentation text, minutes on a CPU; midi: the same text, models trained
              within the run, for a GPU; paper: from a mirror of the hub; test: seconds"""
    parser.add_argument("--profile", default="mini", metavar="NAME", help=text)
    text = "change one setting, for example pretrain.batch_size=8; may be given several times"
    parser.add_argument("--set", action="append", type=setting, default=[], metavar="KEY=VALUE", help=text)


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Options of `run` and `plan`."""
    add_profile(parser)
    text = """tables to make (default: all seven); beyond: the two notebooks that go beyond the paper;
              claims: every claim judged, and the effect of each reading of the paper"""
    parser.add_argument("--only", type=table_list, default=list(TABLES), metavar="4,5", help=text)
    text = "the seven tables, the notebooks beyond them, and the claims"
    parser.add_argument("--all", dest="only", action="store_const", const=list(NOTEBOOKS), help=text)
    parser.add_argument("--seeds", type=count, default=1, metavar="N", help="seeds 0 to N-1 (default 1)")
    text = "processes of one thread each (default: all processors); several GPUs are taken in turn"
    parser.add_argument("--jobs", type=count, metavar="N", help=text)
    text = f"run the stages as Slurm jobs: {', '.join(f'{key}=…' for key in executors.SLURM_OPTIONS)}"
    parser.add_argument("--slurm", metavar="KEY=VALUE,…", help=text)
    parser.add_argument("--dry-run", action="store_true", help="print the plan with its costs and stop")
    parser.add_argument("--fresh", action="store_true", help="make the stages again, even finished ones")
    text = "paper: a CSV (row, seed, task, score) of the GLUE server's scores, for Table 6"
    parser.add_argument("--glue-scores", type=Path, metavar="FILE", help=text)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options of a command line, with its function as `func`."""
    top = Parser(prog="./run_all.sh", description=TITLE)
    add_run_options(top)  # shown by --help: the options of `run`, which needs no command word
    commands = top.add_subparsers(title="commands", metavar="COMMAND")

    def add_command(name: str, func: Callable, text: str, **paths: str) -> argparse.ArgumentParser:
        parser = commands.add_parser(name, help=text, description=text)
        parser.set_defaults(func=func)
        for path, shown in paths.items():
            parser.add_argument(path, type=Path, metavar=shown)
        return parser

    add_run_options(add_command("run", run, "make the report (default)"))
    add_run_options(command := add_command("plan", run, "print the plan with its costs (--dry-run)"))
    command.set_defaults(dry_run=True)
    text = "find whatever would stop a run"
    add_profile(add_command("doctor", lambda o: doctor.main(profiles.load(o.profile).name), text))
    text = "fetch the hub's models and data, for the paper profile"
    command = add_command("mirror", fetch_mirror, text, folder="DIR")
    command.add_argument("--wheels", action="store_true", help="fetch the pinned packages too")
    text = "write the documentation corpus, for a machine without the packages"
    add_profile(add_command("export-corpus", export_corpus, text, file="FILE"))
    command = add_command("pretrain-mini", pretrain_mini, "train mini's committed models again")
    text = "a folder of unpacked packages whose documentation joins the teacher's text"
    command.add_argument("--extra", type=Path, metavar="DIR", help=text)
    text = "compare two reports cell by cell"
    add_command("compare", lambda o: print(compare.compare_reports(o.report, o.reference)), text,
                report="DIR", reference="DIR")
    text = "make a finished report the committed one"
    add_command("publish", lambda o: print(publish.publish(o.report)), text, report="DIR")
    named = arguments and (arguments[0] in commands.choices or arguments[0] in ("-h", "--help"))
    return top.parse_args(arguments if named else ["run", *arguments])


def one_line(text: str) -> str:
    """Text on one line, with line breaks and other control characters as escapes."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def describe_error(error: BaseException) -> str:
    """The line for an error of ERROR_STATUS."""
    if isinstance(error, KeyboardInterrupt):
        return "stopped; finished stages are kept: run the same command again to go on"
    if isinstance(error, OSError) and not isinstance(error, ValueError):
        reason = f"{error.filename or 'a file'} could not be written or read ({error.strerror or error})"
        return f"error: {reason}: free some space, or choose other folders with KN_HOME=… and KN_REPORTS=…"
    return f"error: {error}"


def main(arguments: list[str] | None = None) -> int:
    """Run one command line; returns its exit status."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    for name in ("KN_HOME", "KN_REPORTS", "KN_MIRROR"):  # workers and notebooks run in other folders
        if os.environ.get(name):
            os.environ[name] = str(Path(os.environ[name]).absolute())
    try:
        return options.func(options) or 0
    except tuple(ERROR_STATUS) as error:
        print(one_line(describe_error(error)), file=sys.stderr)
        return next(status for kind, status in ERROR_STATUS.items() if isinstance(error, kind))


if __name__ == "__main__":
    sys.exit(main())
