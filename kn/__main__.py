"""Command line: python -m kn plan | run | doctor | mirror DIR | rebuild. `./run_all.sh` calls `run`; every refusal is one clear line and exit status 2."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
from pathlib import Path

from kn.data import documentation as corpora
from kn.data import glue_submission
from kn.data.hub import SourceError
from kn.files import PROJECT_ROOT
from kn.report import notebooks
from kn.suite import cost, devices, doctor, executors, launch, profiles
from kn.suite import plan as kinds
from kn.suite import run as stages
from kn.suite.store import Store, StoreError


def table_list(text: str) -> list[int | str]:
    """ "4,5,beyond" → [4, 5, "beyond_alignment", "beyond_compression"]; ArgumentTypeError for anything else than tables 1 to 7, beyond and claims."""
    found: set[int | str] = set()
    for part in (part.strip() for part in text.split(",")):
        if part in ("beyond", kinds.LEDGER, *kinds.BEYOND):
            found.update(kinds.BEYOND if part == "beyond" else [part])
        elif part.removeprefix("-").isdecimal() and part not in map(str, kinds.TABLES):
            raise argparse.ArgumentTypeError(f"table {part} does not exist: allowed are 1 to 7, beyond, claims")
        elif not part.isdecimal():
            raise argparse.ArgumentTypeError(f"{text!r} is not a list of table numbers: allowed are 1 to 7, beyond and claims, as in --only 4,5,beyond")
        else:
            found.add(int(part))
    return sorted(found, key=kinds.NOTEBOOKS.index)


def positive(text: str) -> int:
    """A whole number from 1 to 999: of seeds or processes nobody wants more; ArgumentTypeError for anything else."""
    if not re.fullmatch(r"0*[1-9]\d{0,2}", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a whole number of at least 1 and at most 999")
    return int(text)


def plain(text: str) -> str:
    """On one line, whatever a name or a value held: line breaks and what moves a terminal's cursor are spelt out."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class Parser(argparse.ArgumentParser):
    """With errors of one line."""

    def error(self, message):
        """Print the message on one line, exit with 2."""
        super().error(plain(message))


def from_here(item: str) -> str:
    """A `--set` whose file is named from the folder the command was given in: notebooks run in another."""
    key, _, value = item.partition("=")
    return f"text.file={Path(value.strip()).absolute()}" if key.strip() == "text.file" and value.strip() else item


def timed(profile: profiles.Profile, store: Store) -> dict:
    """What cost.timing measures, at the precision that the profile's stages will use."""
    return cost.timing(profile, devices.precision(profile.device), store)


def parser() -> argparse.ArgumentParser:
    """The options of ./run_all.sh."""
    top = Parser(prog="./run_all.sh", description="Reproduces Tables 1-7 of 'Kronecker Decomposition for GPT Compression' and writes reports/<profile>/.")
    commands = (
        "run (default); plan (same as --dry-run); doctor: find what would stop a run; mirror DIR: fetch the hub's models and data; "
        "corpus FILE: write the documentation corpus, for a machine without the packages; rebuild mini's pretrained models"
    )
    profile = "mini (default): documentation text, minutes on a CPU; midi: the same text, models trained within the run, for a GPU; paper: from a mirror of the hub; test: seconds"
    top.add_argument("command", nargs="?", default="run", choices=("run", "plan", "doctor", "mirror", "corpus", "rebuild"), help=commands)
    top.add_argument("folder", nargs="?", type=Path, default=None, metavar="PATH", help="mirror, corpus: where to")
    top.add_argument("--wheels", action="store_true", help="mirror: fetch the pinned packages too")
    top.add_argument("--profile", default="mini", metavar="NAME", help=profile)
    top.add_argument(
        "--only",
        type=table_list,
        default=list(kinds.TABLES),
        metavar="4,5",
        help="tables to make (default: all seven); beyond: the two notebooks that go beyond the paper; claims: every claim judged, and what each reading of the paper changes",
    )
    top.add_argument("--all", dest="only", action="store_const", const=list(kinds.NOTEBOOKS), help="the seven tables, what goes beyond them, and the claims")
    top.add_argument("--seeds", type=positive, default=1, metavar="N", help="seeds 0 to N-1 (default 1)")
    top.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change one setting, for example pretrain.batch_size=8; may be given several times")
    top.add_argument("--jobs", type=positive, default=None, metavar="N", help="processes of one thread each (default: all processors); with several GPUs each takes one in turn")
    top.add_argument("--slurm", default=None, metavar="KEY=VALUE,…", help="run the stages as Slurm jobs: partition=…, account=…, minutes=…, gpus=…, cpus=…, memory_gb=…, at_once=…")
    top.add_argument("--dry-run", action="store_true", help="print the plan with its costs and stop")
    top.add_argument("--fresh", action="store_true", help="make the asked-for stages again, even where the store has them")
    top.add_argument("--glue-scores", type=Path, default=None, metavar="FILE", help="paper: a CSV (row, seed, task, score) of what the GLUE server gave, for Table 6")
    top.add_argument("--extra", type=Path, default=None, metavar="DIR", help="rebuild: a folder of unpacked packages whose documentation joins the teacher's text")
    return top


def main(arguments: list[str] | None = None) -> int:
    """Run one command line; exit status: 0 done, 1 a stage or notebook failed, 2 something is wrong with what was asked for."""
    options = parser().parse_args(arguments)
    for name in ("KN_HOME", "KN_REPORTS", "KN_MIRROR"):  # workers and notebooks run in other folders
        if os.environ.get(name):
            os.environ[name] = str(Path(os.environ[name]).absolute())
    options.set = [from_here(item) for item in options.set]
    try:
        for option, command in (("wheels", "mirror"), ("extra", "rebuild")):
            if getattr(options, option) and options.command != command:
                raise ValueError(f"--{option} goes with `{command}` only, not with `{options.command}`")
        if options.command == "rebuild":
            from kn.suite.pretrain_mini import rebuild

            if options.extra and not options.extra.is_dir():
                raise ValueError(f"--extra {options.extra} is no folder: give one that holds unpacked packages")
            return rebuild(Store().open(), options.extra)
        if options.command == "mirror":
            from kn.data import mirror

            if options.folder is None:
                raise ValueError("mirror needs a folder: python -m kn mirror DIR")
            mirror.make(options.folder)
            if options.wheels:
                mirror.wheels(options.folder, PROJECT_ROOT / "requirements.txt")
            return 0
        if options.command == "corpus":
            if options.folder is None:
                raise ValueError("corpus needs a file: python -m kn corpus FILE")
            if not str(options.folder).isprintable() or options.folder.is_dir() or not options.folder.parent.is_dir():
                raise ValueError(f"corpus {str(options.folder)!r}: a file in a folder that exists wanted: python -m kn corpus FILE")
            text = profiles.load(options.profile, tuple(options.set)).text
            corpora.write(corpora.build({"web": text.web, "wiki": text.wiki}, {"web": text.web_shares, "wiki": text.wiki_shares}, jobs=devices.cores()), options.folder)
            return 0
        if options.folder is not None:
            raise ValueError(f"{str(options.folder)!r} is not understood: a path goes with `mirror` and `corpus` only")
        if options.command == "doctor":
            return doctor.main(profiles.load(options.profile).name)
        profile = profiles.load(options.profile, tuple(options.set))
        if options.glue_scores:
            if profile.source != "mirror":
                raise ValueError(f"--glue-scores is for the paper profile: {profile.name} scores its test sets itself")
            glue_submission.read_scores(options.glue_scores, kinds.ROWS)
            os.environ["KN_GLUE_SCORES"] = str(options.glue_scores.absolute())
        if hint := devices.keep_off_gpus(profile.device):
            print(hint)
        slurm = None if options.slurm is None else executors.slurm_options(options.slurm)
        if slurm is not None and not shutil.which("sbatch"):
            raise ValueError("--slurm needs Slurm's sbatch on this machine: run it on a login node, or leave --slurm out")
        dry, store = options.dry_run or options.command == "plan", Store()
        plan, _ = stages.plan_stages(profile, options.only, options.seeds, without_mirror=dry)
        if dry:
            print(launch.describe(plan, store, timed(profile, store), options.jobs))
            for kind, said in doctor.examine(profile.name):
                if kind != "ok":
                    print(f"{kind}: {said}")
            return 0
        store.open()
        stages.report_folder(profile.name).mkdir(parents=True, exist_ok=True)
        if options.fresh:
            store.forget(plan)
        os.environ["KN_SET"] = "\n".join(options.set)
        measured = timed(profile, store)
        print(launch.describe(plan, store, measured, options.jobs), flush=True)
        cost.check_disk_space(plan, store, measured)
        status = 0
        try:
            launch.run(plan, store, options.jobs, executor=None if slurm is None else executors.Submitit(store.home, slurm))
        except launch.StageFailed as error:
            print(f"error: {error}", file=sys.stderr)
            status = 1
        return max(status, notebooks.run_all(profile.name, options.only, options.seeds, plan, store))
    except (ValueError, StoreError, SourceError, cost.CostError, ModuleNotFoundError) as error:
        print(f"error: {plain(str(error))}", file=sys.stderr)
        return 2
    except launch.StageFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        where = plain(str(error.filename or "a file"))
        print(f"error: {where} could not be written or read ({error.strerror or error}): free some space, or choose other folders with KN_HOME=… and KN_REPORTS=…", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; finished stages are kept: run the same command again to go on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
