"""run_all.sh from where a user stands: any folder, a link, blanks; help and errors before any set-up."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, known_speed

from kn import __main__ as command
from kn.suite import executors, profiles

FAKE = """#!/bin/bash
[ "$*" = "-m venv $ROOT/.venv" ] || exec {python} "$@"
mkdir -p "$ROOT/.venv/bin"
printf '#!/bin/bash\\necho "(fake) $*" >&2; exit 1\\n' > "$ROOT/.venv/bin/python"
chmod +x "$ROOT/.venv/bin/python"
"""


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A checkout without .venv in a path with blanks, and a PATH whose Python 3.11 has no packages."""
    folder = tmp_path_factory.mktemp("a place")
    checkout = folder / "my clone"
    shutil.copytree(ROOT / "kn", checkout / "kn", ignore=shutil.ignore_patterns("__pycache__", "assets"))
    for name in ("run_all.sh", "requirements.txt"):
        shutil.copy(ROOT / name, checkout)
    (folder / "bin").mkdir()
    python = folder / "bin" / "python3.11"
    if sys.prefix == sys.base_prefix:
        pytest.skip("needs a virtual environment, whose base has no packages")
    base = f'"{Path(sys.executable).resolve()}"'
    python.write_text(FAKE.format(python=base).replace("$ROOT", str(checkout)), encoding="utf-8")
    python.chmod(0o755)
    return checkout, f"{folder / 'bin'}:/usr/bin:/bin"


def call(bare, *arguments, script=None, cwd=None, **environment):
    checkout, path = bare
    shutil.rmtree(checkout / ".venv", ignore_errors=True)
    return subprocess.run(
        [script or checkout / "run_all.sh", *arguments], cwd=cwd or checkout.parent, capture_output=True,
        text=True, env={"PATH": path, "HOME": str(checkout.parent), **environment},
    )


def test_help_needs_no_package(bare):
    done = call(bare, "--help")
    assert done.returncode == 0 and done.stdout.startswith("usage: ./run_all.sh") and not done.stderr
    assert not (bare[0] / ".venv").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dry-run"], "error: this needs the packages (about 3 GB): run ./run_all.sh setup first"),
        (["doctor"], "error: this needs the packages (about 3 GB): run ./run_all.sh setup first"),
        (["plan"], "error: this needs the packages (about 3 GB): run ./run_all.sh setup first"),
        (["--profile", "nonsense"],
         "error: profile 'nonsense' is unknown: allowed are mini, midi, paper, test"),
        (["--seeds", "none"], "./run_all.sh run: error: argument --seeds: 'none' is not a whole number of at "
                              "least 1 and at most 999"),
        (["--fast"], "./run_all.sh: error: unrecognized arguments: --fast"),
    ],
)
def test_errors_come_before_the_set_up(bare, arguments, message):
    done = call(bare, *arguments)
    assert done.returncode == 2 and done.stderr.splitlines()[-1] == message and not done.stdout
    assert not (bare[0] / ".venv").exists() and "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", [[], ["setup"], ["test"], ["--profile", "test", "--only", "1"]])
def test_what_needs_the_packages_sets_up(bare, arguments):
    done = call(bare, *arguments)
    assert done.returncode == 2 and done.stdout.startswith("setting up .venv with Python 3."), done.stderr
    assert f"(fake) -m pip install --disable-pip-version-check -r {bare[0]}/requirements.txt" in done.stderr
    assert "error: the pins could not be installed: see pip's message above" in done.stderr


def test_a_python_without_the_packages_gives_help_and_then_says_what_it_lacks(bare):
    python = str(bare[0].parent / "bin" / "python3.11")
    assert call(bare, "--help", KN_PYTHON=python).returncode == 0
    done = call(bare, "--dry-run", KN_PYTHON=python)
    assert done.returncode == 2 and done.stderr.splitlines()[-1] == (
        f"error: KN_PYTHON={python} lacks packages: {python} -m pip install -r requirements.txt"
    )
    done = subprocess.run([python, "-m", "kn", "doctor"], cwd=bare[0], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.endswith(
        "is missing: run ./run_all.sh setup, or install requirements.txt\n"
    ) and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("how", ["from another folder", "through links", "with CDPATH"])
def test_it_is_found_from_any_folder(bare, tmp_path, how):
    folder, script, environment = tmp_path / "somewhere else", bare[0] / "run_all.sh", {}
    (folder / "kn").mkdir(parents=True)
    (folder / "argparse.py").write_text("raise SystemExit('a file of the user took a module\\'s place')")
    if how == "through links":
        (folder / "link").symlink_to(script)
        script = folder / "second"
        script.symlink_to("link")
    elif how == "with CDPATH":
        script, environment = "my clone/run_all.sh", {"CDPATH": str(bare[0].parent)}
        folder = bare[0].parent
    done = call(bare, "--help", script=script, cwd=folder, **environment)
    assert done.returncode == 0 and done.stdout.startswith("usage: ./run_all.sh"), done.stderr


def test_relative_paths_mean_the_caller_s_folder(tmp_path):
    """The whole way with an environment that has the packages, named by a relative path, too."""
    known_speed(tmp_path, profiles.TEST)
    (tmp_path / "python").symlink_to(sys.executable)
    variables = {name: value for name, value in os.environ.items() if not name.startswith("KN_")}
    variables |= {"KN_HOME": "store", "KN_REPORTS": "reports", "KN_MIRROR": "hub"}
    variables["KN_PYTHON"] = os.path.relpath(sys.executable, tmp_path)

    def called(*arguments):
        return subprocess.run([ROOT / "run_all.sh", *arguments], cwd=tmp_path, env=variables,
                              capture_output=True, text=True)

    done = called("plan", "--profile", "test")
    assert done.returncode == 0 and f"of disk in {tmp_path}/store" in done.stdout, done.stderr
    done = called("plan", "--profile", "paper", "--glue-scores", "scores.csv")
    assert "error: scores.csv cannot be read (No such file or directory)" in done.stderr
    (tmp_path / "scores.csv").write_text("row,seed,task,score\n")
    assert "error: scores.csv holds no scores" in called(
        "plan", "--profile", "paper", "--glue-scores", "scores.csv").stderr
    done = called("--profile", "paper")
    assert f"error: {tmp_path}/hub is no mirror" in done.stderr
    done = called("export-corpus", "corpus.json", "--profile", "test")
    assert done.returncode == 0 and (tmp_path / "corpus.json").stat().st_size > 1000, done.stderr
    done = called("plan", "--profile", "test", "--set", "text.file=corpus.json")
    assert done.returncode == 0, done.stderr
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    assert "error: one is not a report folder" in called("compare", "one", "two").stderr
    assert "error: one is not a report folder" in called("publish", "one").stderr


def test_names_that_the_parser_repeats_are_the_settings_own():
    assert tuple(profiles.PROFILES) == command.PROFILES
    (text,) = (a.help for a in shown()._actions if a.dest == "slurm")
    assert [word.partition("=")[0] for word in text.split(": ")[1].split()] == list(executors.SLURM_OPTIONS)


def shown():
    parser = command.Parser()
    command.add_run_options(parser)
    return parser


@pytest.mark.parametrize(("command", "offline"), [("mirror", ""), ("plan", "1")])
def test_the_mirror_alone_may_use_the_network(tmp_path, command, offline):
    """It could never fetch a file: the hub's library was told that there is no network."""
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/bash\ncase "$KN_CHECK $*" in\n" -P -m kn "*) echo "offline: $HF_HUB_OFFLINE" ;;\n'
        f'*) exec {sys.executable} "$@" ;;\nesac\n', encoding="utf-8",
    )
    python.chmod(0o755)
    settings = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    done = subprocess.run(
        [ROOT / "run_all.sh", command, *(["files"] if command == "mirror" else [])], cwd=tmp_path,
        env={**settings, "KN_PYTHON": str(python)}, capture_output=True, text=True,
    )
    assert done.stdout.splitlines()[-1:] == [f"offline: {offline}"], done.stderr
