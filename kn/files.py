"""Paths of the checkout, SHA-256 digests, atomic writes and safe paths, for every room."""

import hashlib
import json
import os
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath

PACKAGE = Path(__file__).parent
PROJECT_ROOT = PACKAGE.parent
ASSETS = PACKAGE / "assets"
BENCHMARKS = PROJECT_ROOT / "benchmarks"  # speed-<device>.csv, for the index page and the ledger of claims


def checkout() -> Path:
    """PROJECT_ROOT; ValueError where kn was copied or installed elsewhere: nothing is written there."""
    if not (PROJECT_ROOT / "notebooks").is_dir():
        reason = f"the suite needs a whole checkout, and {PACKAGE} lies in none: run ./run_all.sh in a clone"
        raise ValueError(f"{reason} (make_records: name folders with KN_HOME=… and KN_REPORTS=…)")
    return PROJECT_ROOT


def store_home() -> Path:
    """The folder of the store: $KN_HOME, or artifacts/ in the checkout."""
    return Path(os.environ.get("KN_HOME") or checkout() / "artifacts").absolute()


def installed_version(package: str) -> str | None:
    """Version of an installed package, None for one that is missing."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def file_sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def json_sha256(value: object) -> str:
    """Hex digest of a JSON value with sorted keys: equal values give equal digests."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def file_records(folder: Path, names: Iterable[str] | None = None) -> dict[str, list]:
    """{file: [bytes, sha256]}, by default of all files below a folder, in name order."""
    names = names or (p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return {name: [(folder / name).stat().st_size, file_sha256(folder / name)] for name in sorted(names)}


def write_atomic(path: Path, text: str) -> Path:
    """Write UTF-8 text by one atomic rename: a reader sees the old file or the new one. Returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8", newline="\n")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


def safe_join(folder: Path, *names: str) -> Path:
    """The path of a file below a folder; ValueError for a name, or a symbolic link, that leads out of it."""
    for name in names:
        parts = PurePosixPath(name)
        if not name or parts.is_absolute() or ".." in parts.parts or not name.isprintable():
            raise ValueError(f"{name!r} leads out of {folder}")
    path = folder.joinpath(*names)
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{path} leads out of {folder} by a link")
    return path
