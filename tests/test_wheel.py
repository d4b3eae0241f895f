"""A plain wheel holds the method; what needs the checkout says so in one line."""

import os
import shutil
import subprocess
import sys
import zipfile

import pytest
from conftest import ROOT

METHOD = {"kronecker", "models", "distill", "align"}


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """(folder with the unpacked wheel, names in it); built of a copy: nothing is left in the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(
        ROOT / "kn", folder / "source" / "kn", ignore=shutil.ignore_patterns("__pycache__", "assets")
    )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        str(folder),
        str(folder / "source"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
        names = archive.namelist()
    return folder / "site", names


def run(site, *arguments):
    variables = {name: value for name, value in os.environ.items() if name != "KN_QUICK_IMPORT"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=site,
        env={**variables, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )


def test_it_holds_the_method_alone(installed):
    _, names = installed
    rooms = {name.split("/")[1] for name in names if name.startswith("kn/") and name.count("/") > 1}
    assert (
        rooms == METHOD
        and "kn/compression.py" in names
        and any(name.endswith("entry_points.txt") for name in names)
    )
    assert sum(name.endswith(".py") for name in names) > 20


def test_the_method_works(installed):
    site, _ = installed
    code = (
        "import kn, torch; from transformers import GPT2Config, GPT2LMHeadModel\n"
        "teacher = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=8, n_embd=8, n_layer=2, n_head=2))\n"
        "student = kn.compress(teacher); ids = torch.tensor([[1, 2, 3, 4]])\n"
        "s, t = kn.capture(student, input_ids=ids, labels=ids), kn.capture(teacher, input_ids=ids)\n"
        "loss, terms = kn.ilkd_loss(s, t, (0.5, 0.5, 0.5, 0.1))\n"
        "loss.backward(); student.save_pretrained('model'); print(kn.__file__, float(loss) > 0)"
    )
    done = run(site, "-c", code)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (
        done.stdout.split() == [str(site / "kn" / "__init__.py"), "True"]
        and (site / "model" / "README.md").is_file()
    )


@pytest.mark.parametrize(
    "arguments",
    [("-m", "kn"), ("-m", "kn", "--profile", "test", "--dry-run"), ("-m", "kn", "doctor")],
    ids=" ".join,
)
def test_the_suite_says_what_it_needs(installed, arguments):
    site, _ = installed
    done = run(site, *arguments)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr[-2000:]
    assert done.stderr.startswith("error: ") and "checkout" in done.stderr and "./run_all.sh" in done.stderr
