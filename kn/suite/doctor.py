"""`python -m kn doctor`: what would stop a run, found before hours are spent; each line says what mends it."""

from __future__ import annotations

import os
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from kn.data import mirror
from kn.data.hub import SourceError, mirror_folder
from kn.files import ASSETS, PROJECT_ROOT
from kn.suite.input_digests import asset_digest
from kn.suite.store import Store, StoreError

# bytes of free disk a store needs; mini measured (five seeds 0.43 GB), midi and paper estimated (paper: token rows 2 GB, checkpoints 3, about 60 models of 0.5)
ROOM = {"mini": 2e9, "test": 1e8, "midi": 10e9, "paper": 40e9}
MEMORY = 4e9  # bytes of main memory for two processes (measured: 1.9 GB each at most)
Finding = tuple[str, str]  # ("ok" | "warning" | "error", one line)


def pins(requirements: Path) -> Finding:
    """Installed versions against requirements.txt."""
    from packaging.markers import Marker  # transformers brings it

    other, missing = [], []
    for line in requirements.read_text().splitlines():
        pin, _, marker = line.partition(";")
        if "==" not in pin or (marker and not Marker(marker).evaluate()):  # triton: on Linux alone
            continue
        name, wanted = pin.strip().split("==")
        try:
            if version(name).split("+")[0] != wanted:
                other.append(f"{name} {version(name)} (pinned {wanted})")
        except PackageNotFoundError:
            missing.append(name)
    if missing:
        return "error", f"{len(missing)} pinned packages are missing ({', '.join(missing[:3])}): {Path(sys.executable).name} -m pip install -r requirements.txt"
    if other:
        return "warning", f"{len(other)} packages differ from the pins, so the corpus and the numbers may too: {', '.join(other[:3])}"
    return "ok", "packages are the pinned ones"


def room(profile: str, home: Path) -> Finding:
    """Free disk where the store is."""
    there = next(p for p in (home, *home.parents) if p.exists())
    free, need = shutil.disk_usage(there).free, ROOM[profile]
    text = f"{free / 1e9:.1f} GB free at {home}, {need / 1e9:.1f} wanted"
    return ("ok", text) if free >= need else ("error", f"{text}: make room, or choose another folder with KN_HOME=…")


def memory() -> Finding:
    """Main memory, where the system says it."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return "warning", "the system does not say how much memory it has"
    return ("ok", f"{total / 1e9:.0f} GB of memory") if total >= MEMORY else ("warning", f"{total / 1e9:.1f} GB of memory, two processes want {MEMORY / 1e9:.0f}: run with --jobs 1")


def accelerator(profile: str) -> Finding:
    """The GPU, if torch finds one."""
    import torch

    if not torch.cuda.is_available():
        return ("warning", "no GPU was found: the paper profile would take years (see --dry-run)") if profile == "paper" else ("ok", "no GPU: none is needed")
    facts = torch.cuda.get_device_properties(0)
    return "ok", f"{facts.name}, {facts.total_memory / 1e9:.0f} GB"


def store_state(home: Path) -> Finding:
    """Whether the store can be written, without leaving a folder behind."""
    try:
        existed = home.exists()
        Store(home).open()
        if not existed:
            home.rmdir()
        return "ok", f"the store {home} can be written"
    except StoreError as error:
        return "error", str(error)


def assets() -> list[Finding]:
    """The committed pretrained models."""
    found: list[Finding] = []
    for name in ("teacher", "baseline", "tokenizer"):
        try:
            asset_digest(ASSETS / "mini" / name)
            found.append(("ok", f"kn/assets/mini/{name} is intact"))
        except StoreError as error:
            found.append(("error", str(error)))
    return found


def mirror_state(folder: Path) -> list[Finding]:
    """Every file of a mirror, read and compared."""
    try:
        wrong = mirror.problems(folder)
    except SourceError as error:
        wrong = [str(error)]
    return [("error", text) for text in wrong] or [("ok", f"the mirror {folder} is complete and intact")]


def examine(profile: str = "mini") -> list[Finding]:
    """All findings, errors and warnings included."""
    home = Store().home
    python = ".".join(map(str, sys.version_info[:2]))
    first: Finding = ("ok", f"Python {python}") if (3, 11) <= sys.version_info[:2] <= (3, 13) else ("warning", f"Python {python}: 3.11 to 3.13 are the tested ones")
    found = [first, pins(PROJECT_ROOT / "requirements.txt"), store_state(home), room(profile, home), memory(), *assets(), accelerator(profile)]
    return found + (mirror_state(mirror_folder()) if profile == "paper" or os.environ.get("KN_MIRROR") else [])


def main(profile: str = "mini") -> int:
    """Print the findings; 1 if there is an error, else 0."""
    found = examine(profile)
    for kind, text in found:
        print(f"{kind:<8}{text}")
    return int(any(kind == "error" for kind, _ in found))
