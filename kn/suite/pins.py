"""Installed packages compared with the exact pins of a requirements file; standard library alone.

`python kn/suite/pins.py requirements.txt`: exit status 1 where packages that kn imports are missing."""

import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

DIRECT = {  # imported by kn itself; the other pins are theirs
    "torch", "transformers", "datasets", "accelerate", "papermill", "pandas", "matplotlib", "scikit-learn",
    "scipy", "filelock", "tqdm", "nbconvert", "pydantic", "Jinja2",
}


def compare_pins(requirements: Path) -> tuple[list[str], list[str]]:
    """(missing packages, "name installed (pinned version)" of other versions)."""
    missing, different = [], []
    for line in requirements.read_text(encoding="utf-8").splitlines():
        pin, _, marker = line.partition(";")  # as in: triton==3.7.1; sys_platform == "linux"
        if "==" not in pin or marker and not _applies(marker):
            continue
        name, pinned = pin.strip().split("==")
        try:
            if (installed := version(name)).split("+")[0] != pinned:
                different.append(f"{name} {installed} (pinned {pinned})")
        except PackageNotFoundError:
            missing.append(name)
    return missing, different


def _applies(marker: str) -> bool:
    try:
        from packaging.markers import Marker
    except ImportError:  # nothing is installed yet
        return False
    return Marker(marker).evaluate()


def describe_differences(different: list[str]) -> str:
    """One line for packages of other versions than the pinned ones."""
    names = ", ".join(different[:5])
    return f"{len(different)} packages differ from the pins, so the corpus and the numbers may too: {names}"


def main(requirements: Path) -> int:
    """Print the differences to stderr; 1 where a package of DIRECT is missing, else 0."""
    missing, different = compare_pins(requirements)
    if different:
        print(f"warning: {describe_differences(different)}", file=sys.stderr)
    if direct := sorted(DIRECT & set(missing)):
        print(f"missing: {', '.join(direct)}", file=sys.stderr)
    return int(bool(direct))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
