"""Provenance of a result: package versions, device and commit; recorded, not hashed."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from kn.files import PROJECT_ROOT
from kn.suite.devices import device_name

PACKAGES = (
    "torch", "transformers", "datasets", "accelerate", "tokenizers", "numpy", "scikit-learn", "pandas"
)


def installed_version(package: str) -> str | None:
    """Version of an installed package, None for one that is missing."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def git_commit(checkout: Path = PROJECT_ROOT) -> str:
    """12 digits of the checkout's commit, "+" behind them where tracked files were changed.

    "" where `checkout` is no git checkout of its own: a copy inside another repository has not that one's
    commit.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(checkout), *arguments]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    try:
        top = git("rev-parse", "--show-toplevel")
        if not top or Path(top).resolve() != checkout.resolve():
            return ""
        return git("describe", "--always", "--exclude=*", "--abbrev=12", "--dirty=+")
    except OSError:  # no git on this machine
        return ""


@lru_cache
def environment() -> dict:
    """Versions, device, system and commit of this process."""
    return {
        "packages": {name: installed_version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "device": device_name(),
        "cores": os.cpu_count(),
        "system": platform.system(),
        "commit": git_commit(),
    }
