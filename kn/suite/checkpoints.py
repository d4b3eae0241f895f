"""Checkpoints of a training that was stopped: it goes on from one only where every byte is as it was written.

A process can be killed while it writes a checkpoint, and a disk can turn a bit in one. Either would end in an error at
every new start, or in other numbers without any error. So a checkpoint counts from the moment its seal is written.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from kn.files import file_sha256, json_sha256

SEAL = "seal.json"


def seal(folder: Path, seconds: float) -> None:
    """Declare a checkpoint whole: size and sha256 of its files, and the seconds of training up to it."""
    files = {p.relative_to(folder).as_posix(): [p.stat().st_size, file_sha256(p)] for p in sorted(folder.rglob("*")) if p.is_file() and p.name != SEAL}
    part = folder.with_name(f"{folder.name}.part")
    said = {"seconds": seconds, "files": files}
    part.write_text(json.dumps({**said, "digest": json_sha256(said)}))
    part.replace(folder / SEAL)


def seconds(folder: Path) -> float | None:
    """The seconds of training up to a checkpoint; None where it is not whole."""
    try:
        sealed = json.loads((folder / SEAL).read_text())
        if sealed.pop("digest") == json_sha256(sealed) and all((folder / name).stat().st_size == size and file_sha256(folder / name) == digest for name, (size, digest) in sealed["files"].items()):
            return float(sealed["seconds"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    return None


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint in a folder; those that are not whole are removed."""
    found = sorted((p for p in folder.glob("checkpoint-*") if p.is_dir() and re.fullmatch(r"checkpoint-\d+", p.name)), key=lambda p: -int(p.name.rpartition("-")[2]))
    for checkpoint in found:
        if seconds(checkpoint) is not None:
            return checkpoint
        shutil.rmtree(checkpoint, ignore_errors=True)
    return None
