"""Provenance of a result: package versions, device and commit; recorded, not hashed."""

import os
import platform
import subprocess
from functools import lru_cache
from pathlib import Path

from kn.files import PROJECT_ROOT, installed_version
from kn.suite.devices import device_name

PACKAGES = "torch", "transformers", "datasets", "accelerate", "tokenizers", "numpy", "scikit-learn", "pandas"


def git_commit(checkout: Path = PROJECT_ROOT) -> str:
    """12 digits of a checkout's commit, "+" where tracked files were changed; "" where it is no checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(checkout), *arguments]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    try:
        top = git("rev-parse", "--show-toplevel")
        own = top and Path(top).resolve() == checkout.resolve()  # a copy may be inside another repository
        return git("describe", "--always", "--exclude=*", "--abbrev=12", "--dirty=+") if own else ""
    except OSError:  # no git on this machine
        return ""


@lru_cache
def environment() -> dict:
    """Versions, device, system and commit of this process."""
    return {
        "packages": {name: installed_version(name) for name in PACKAGES},
        "python": platform.python_version(), "device": device_name(), "cores": os.cpu_count(),
        "system": platform.system(), "commit": git_commit(),
    }
