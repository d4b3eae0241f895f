"""Command line `python -m kn`, which ./run_all.sh calls; without a command word it is `run`.

--help and errors of the words need the standard library alone; what the commands do is in kn/commands.py.
Exit status: 0 done, 1 a stage or notebook failed, 2 an error in the call or the environment (one line)."""

import argparse
import os
import re
import sys
from pathlib import Path

try:
    from kn.paper import BEYOND, NOTEBOOKS, TABLES
except ModuleNotFoundError:
    reason = "this installation holds the method alone; the suite needs a checkout: ./run_all.sh there"
    print(f"error: {reason}", file=sys.stderr)
    sys.exit(2)

TITLE = "Reproduces Tables 1-7 of 'Kronecker Decomposition for GPT Compression'; writes reports/<profile>/."
PROFILES = ("mini", "midi", "paper", "test")
QUICK = ("plan", "doctor", "compare", "publish")  # commands for which ./run_all.sh does not set up first


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
    text = """run the stages as Slurm jobs: partition=…, account=…, qos=…, constraint=…, minutes=…, gpus=…,
              cpus=…, memory_gb=…, at_once=…"""
    parser.add_argument("--slurm", metavar="KEY=VALUE,…", help=text)
    parser.add_argument("--dry-run", action="store_true", help="print the plan with its costs and stop")
    parser.add_argument("--fresh", action="store_true", help="make the stages again, even finished ones")
    text = "paper: a CSV (row, seed, task, score) of the GLUE server's scores, for Table 6"
    parser.add_argument("--glue-scores", type=Path, metavar="FILE", help=text)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options of a command line, with the name of its `command`."""
    top = Parser(prog="./run_all.sh", description=TITLE)
    add_run_options(top)  # shown by --help: the options of `run`, which needs no command word
    commands = top.add_subparsers(title="commands", metavar="COMMAND", dest="command")

    def add_command(name: str, text: str, *paths: str) -> argparse.ArgumentParser:
        parser = commands.add_parser(name, help=text, description=text)
        for path in paths:
            parser.add_argument(path, type=Path, metavar="FILE" if path == "file" else "DIR")
        return parser

    add_run_options(add_command("run", "make the report (default)"))
    add_run_options(command := add_command("plan", "print the plan with its costs (--dry-run)"))
    command.set_defaults(dry_run=True)
    add_profile(add_command("doctor", "find whatever would stop a run"))
    command = add_command("mirror", "fetch the hub's models and data, for the paper profile", "folder")
    command.add_argument("--wheels", action="store_true", help="fetch the pinned packages too")
    text = "write the documentation corpus, for a machine without the packages"
    add_profile(add_command("export-corpus", text, "file"))
    command = add_command("pretrain-mini", "train mini's committed models again")
    text = "a folder of unpacked packages whose documentation joins the teacher's text"
    command.add_argument("--extra", type=Path, metavar="DIR", help=text)
    add_command("compare", "compare two reports cell by cell", "report", "reference")
    add_command("publish", "make a finished report the committed one", "report")
    named = arguments and (arguments[0] in commands.choices or arguments[0] in ("-h", "--help"))
    return top.parse_args(arguments if named else ["run", *arguments])


def one_line(text: str) -> str:
    """Text on one line, with line breaks and other control characters as escapes."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def main(arguments: list[str] | None = None) -> int:
    """Run one command line; returns its exit status. With $KN_CHECK it stops where packages are needed:
    10, or 11 for a command that is no reason to install them."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    for name in ("KN_HOME", "KN_REPORTS", "KN_MIRROR"):  # workers and notebooks run in other folders
        if os.environ.get(name):
            os.environ[name] = str(Path(os.environ[name]).absolute())
    os.environ["PYTHONUTF8"] = "1"  # of workers and kernels, whatever the locale
    status, profile = 2, getattr(options, "profile", PROFILES[0])
    try:
        if profile not in PROFILES:
            problem = f"profile {profile!r} is unknown: allowed are {', '.join(PROFILES)}"
        elif os.environ.get("KN_CHECK"):
            return 11 if options.command in QUICK or getattr(options, "dry_run", False) else 10
        else:
            from kn import commands
            status, problem = commands.execute(options)
    except KeyboardInterrupt:
        print("stopped; finished stages are kept: run the same command again to go on", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        problem = f"the package {error.name} is missing: run ./run_all.sh setup, or install requirements.txt"
    if problem:
        print(f"error: {one_line(problem)}", file=sys.stderr)
    return status


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):  # what the locale cannot show stands there as an escape
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    sys.exit(main())
