"""The code itself: linters, lengths, arrows of imports, printed values, docstrings, no machine paths."""

import ast
import csv
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
KN = sorted((ROOT / "kn").rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in KN}
LONGEST, MOST = 350, 11_000  # lines of a file, of kn/
HOOKS = {
    "forward",
    "backward",
    "setup",
    "log",
    "compute_loss",
    "on_save",
    "extra_repr",
    "post_init",
}  # a framework's names, documented there
FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef


def run(*command: str) -> None:
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_ruff():
    run("ruff", "check", ".")


def test_mypy():
    run("mypy", "kn")


def test_lengths():
    """No file above LONGEST lines (ruff's E501 keeps them at 110 characters), all of kn/ below MOST."""
    files = [path for folder in ("kn", "tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    counts = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert len(counts) > 100 and not {path: count for path, count in counts.items() if count > LONGEST}
    assert sum(counts[path] for path in KN) < MOST


# ---------------------------------------------------------------- imports


def test_arrows_run_one_way():
    """import-linter's contracts in pyproject.toml: layers of rooms, and no circle between any two files."""
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


# ---------------------------------------------------------------- printed values


def numbers(text: str) -> set[str]:
    return {
        number.replace(",", "") for number in re.findall(r"(?<![\w.])\d[\d,]*(?:\.\d+)?(?!\w|\.\d)", text)
    }


def results() -> set[str]:
    """Numbers of Tables 3 to 7 of three digits or more; Tables 1 and 2 are settings, in profiles.py."""
    values = [
        line["value"]
        for number in range(3, 8)
        for line in csv.DictReader((ROOT / "kn" / "paper" / f"table{number}.csv").open(encoding="utf-8"))
    ]
    return {number for value in values for number in numbers(value) if len(number.replace(".", "")) >= 3}


def test_printed_values_stand_in_the_paper_alone():
    known = results()
    assert len(known) > 80 and {"18.8", "79.25"} <= known
    found = {}
    for path in KN:
        code = "\n".join(
            line.split("  # ")[0] for line in path.read_text(encoding="utf-8").splitlines()
        )  # a comment may show how a value is printed
        if wrong := numbers(code) & known:
            found[path.name] = wrong
    assert not found


# ---------------------------------------------------------------- docstrings


def caught(node: ast.Try) -> set[str]:
    """Names of the errors that a try statement deals with."""
    types = [handler.type for handler in node.handlers if handler.type is not None]
    return {
        ast.unparse(one).rpartition(".")[2]
        for kind in types
        for one in (kind.elts if isinstance(kind, ast.Tuple) else [kind])
    }


def raised(node: ast.AST) -> set[str]:
    """Names of the errors that are raised directly in a function, those that it catches again left out."""
    if isinstance(node, ast.Raise) and node.exc is not None:
        error = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
        name = ast.unparse(error).rpartition(".")[2]
        return {name} if name[0].isupper() else set()
    if isinstance(node, ast.Try):
        inside = set().union(*map(raised, node.body)) - caught(node)
        return inside.union(*map(raised, (*node.handlers, *node.orelse, *node.finalbody)))
    return set().union(*map(raised, ast.iter_child_nodes(node)))


def faults(tree: ast.Module) -> list[str]:
    """What the public names of a file lack: a docstring, or an error's name in it."""
    found = []

    def look(name: str, node: FUNCTION | ast.ClassDef, errors: set[str]) -> None:
        text = ast.get_docstring(node) or ""
        found.extend(
            [f"{name} has no docstring"]
            if not text
            else [f"{name} does not name {error}" for error in sorted(errors) if error not in text]
        )

    for node in tree.body:
        if not isinstance(node, FUNCTION | ast.ClassDef) or node.name.startswith("_"):
            continue
        if isinstance(node, FUNCTION):
            look(node.name, node, raised(node))
            continue
        methods = [
            item
            for item in node.body
            if isinstance(item, FUNCTION)
            and not any(ast.unparse(mark).endswith(".setter") for mark in item.decorator_list)
        ]
        look(
            node.name,
            node,
            set().union(*(raised(item) for item in methods if item.name in ("__init__", "__post_init__"))),
        )
        for item in methods:
            if not item.name.startswith("_") and item.name not in HOOKS:
                look(f"{node.name}.{item.name}", item, raised(item))
    return found


@pytest.mark.parametrize("path", TREES, ids=lambda path: str(path.relative_to(ROOT / "kn")))
def test_docstrings(path):
    assert not faults(TREES[path])


def test_faults_are_found():
    body = 'def f():\n    "Gives 1."\n    try:\n        raise KeyError\n'
    body += '    except KeyError:\n        raise ValueError("x") from None\n'
    body += 'class A:\n    "A."\n    def forward(self): ...\n    def more(self): ...\n'
    assert faults(ast.parse(body)) == ["f does not name ValueError", "A.more has no docstring"]


def test_the_public_interface_names_its_source():
    import kn

    for name in kn.__all__:
        tree = TREES[(ROOT / "kn").joinpath(*kn._MODULE_OF[name].split(".")).with_suffix(".py")]
        text = next(
            ast.get_docstring(node) or ""
            for node in tree.body
            if isinstance(node, FUNCTION | ast.ClassDef) and node.name == name
        )
        assert re.search(r"[Ee]q\. [1-5]|§3|Table \d|Hinton", text), (
            f"{name} does not say what of the paper it is"
        )


# ---------------------------------------------------------------- nothing of a machine


def test_nothing_of_a_machine():
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("needs a git checkout: the tracked files are asked for")
    places = re.compile(
        "|".join(
            (
                r"(?<!\w)/ro" + "ot/",
                r"(?<!\w)/wo" + "rk/",
                "/ho" + "me/" + r"\w",
                "file:" + "///",
                r"(?:index|extra-index)-u" + "rl",
                "pythonhosted" + r"\.org",
                r"https?://pypi" + r"[.\w]*",
            )
        )
    )
    found = {}
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        if (
            path.is_file()
            and path.suffix != ".safetensors"
            and (match := places.search(path.read_text(encoding="utf-8", errors="replace")))
        ):
            found[name] = match.group()
    assert len(listed.stdout) > 1000 and not found
