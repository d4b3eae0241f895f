"""`python -m kn doctor`: whatever would stop a run, found before hours are spent, each with its remedy."""

import math
import os
import subprocess
import sys
from pathlib import Path

from kn.data import mirror
from kn.data.hub import SourceError, mirror_folder
from kn.files import ASSETS, PROJECT_ROOT
from kn.suite.devices import free_bytes, gpus, memory_bytes
from kn.suite.distributed import error_line
from kn.suite.input_digests import asset_digest
from kn.suite.pins import compare_pins, describe_differences
from kn.suite.store import Store, StoreError

# Bytes of disk for a profile's store. mini is measured (five seeds: 0.43 GB), midi and paper are estimated
# (paper: token rows 2 GB, checkpoints 3 GB, about 60 models of 0.5 GB).
STORE_BYTES = {"mini": 2e9, "test": 1e8, "midi": 10e9, "paper": 40e9}
MEMORY_BYTES = 4e9  # for two worker processes (measured: 1.9 GB each at most)
Finding = tuple[str, str]  # ("ok" | "warning" | "error", one line)


def check_python() -> Finding:
    """The Python version."""
    python = f"Python {sys.version_info.major}.{sys.version_info.minor}"
    tested = (3, 11) <= sys.version_info[:2] <= (3, 13)
    return ("ok", python) if tested else ("warning", f"{python}: 3.11 to 3.13 are the tested ones")


def check_pins(requirements: Path) -> Finding:
    """Installed versions against requirements.txt."""
    missing, different = compare_pins(requirements)
    if missing:
        install = f"{Path(sys.executable).name} -m pip install -r requirements.txt"
        return "error", f"{len(missing)} pinned packages are missing ({', '.join(missing[:3])}): {install}"
    if different:
        return "warning", describe_differences(different)
    return "ok", "packages are the pinned ones"


def check_disk(profile: str, home: Path) -> Finding:
    """Free disk space where the store is."""
    free, need = free_bytes(home), STORE_BYTES[profile]
    text = f"{free / 1e9:.1f} GB free at {home}, {need / 1e9:.1f} needed"
    if free < need:
        return "error", f"{text}: make room, or choose another folder with KN_HOME=…"
    return "ok", text


def check_memory() -> Finding:
    """Main memory, where the system says it."""
    total = memory_bytes()
    if total == math.inf:
        return "warning", "the system does not say how much memory it has"
    if total >= MEMORY_BYTES:
        return "ok", f"{total / 1e9:.0f} GB of memory"
    need = f"two processes need {MEMORY_BYTES / 1e9:.0f}"
    return "warning", f"{total / 1e9:.1f} GB of memory, {need}: run with --jobs 1"


def check_gpu(profile: str) -> Finding:
    """The GPU, if torch can use one; asked in a process of its own, since torch imports slowly."""
    if found := gpus():
        code = "import torch; print(round(torch.cuda.get_device_properties(0).total_memory / 1e9), 'GB')"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8")
        if done.returncode:
            return "warning", f"torch cannot use {found[0]}: {error_line(done.stderr)}"
        return "ok", f"{found[0]}, {done.stdout.strip()}"
    if profile == "paper":
        return "warning", "no GPU was found: the paper profile would take years (see --dry-run)"
    return "ok", "no GPU: none is needed"


def check_store(home: Path) -> Finding:
    """Whether the store can be written, without leaving a folder behind."""
    existed = home.exists()
    try:
        Store(home).open()
    except StoreError as error:
        return "error", str(error)
    if not existed:
        home.rmdir()
    return "ok", f"the store {home} can be written"


def check_asset(name: str) -> Finding:
    """The committed teacher, baseline or tokenizer."""
    try:
        asset_digest(ASSETS / "mini" / name)
    except StoreError as error:
        return "error", str(error)
    return "ok", f"kn/assets/mini/{name} is intact"


def check_mirror(folder: Path) -> list[Finding]:
    """Every file of a mirror, read and compared with its digest."""
    try:
        problems = mirror.problems(folder)
    except SourceError as error:
        problems = [str(error)]
    return [("error", text) for text in problems] or [("ok", f"the mirror {folder} is complete and intact")]


def examine(profile: str = "mini") -> list[Finding]:
    """Findings of all checks."""
    home, with_mirror = Store().home, profile == "paper" or os.environ.get("KN_MIRROR")
    return [check_python(), check_pins(PROJECT_ROOT / "requirements.txt"), check_store(home),
            check_disk(profile, home), check_memory(),
            *map(check_asset, ("teacher", "baseline", "tokenizer")), check_gpu(profile),
            *(check_mirror(mirror_folder()) if with_mirror else ())]


def main(profile: str = "mini") -> int:
    """Print the findings; 1 if there is an error, else 0."""
    findings = examine(profile)
    for kind, text in findings:
        print(f"{kind:<8}{text}")
    return int(any(kind == "error" for kind, _ in findings))
