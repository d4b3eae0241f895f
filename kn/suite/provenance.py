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
    """12 digits of a checkout's own commit, "" where it has none; "+": changed files, or new code in kn/."""
    # neither a repository around an unpacked archive nor one that the environment names is ours; that
    # another user owns the files is no matter, since their code runs already
    variables = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    variables["GIT_CEILING_DIRECTORIES"] = str(checkout.resolve().parent)

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(checkout), "-c", "safe.directory=*", *arguments]
        return subprocess.run(command, env=variables, capture_output=True).stdout.decode().strip()

    try:
        commit = git("describe", "--always", "--exclude=*", "--abbrev=12", "--dirty=+")
        new = commit and git("ls-files", "--others", "--exclude-standard", "--", "kn/*.py")
    except OSError:  # no git on this machine
        return ""
    return commit.removesuffix("+") + "+" if new else commit


@lru_cache
def environment() -> dict:
    """Versions, device, system and commit of this process."""
    return {
        "packages": {name: installed_version(name) for name in PACKAGES},
        "python": platform.python_version(), "device": device_name(), "cores": os.cpu_count(),
        "system": platform.system(), "commit": git_commit(),
    }
