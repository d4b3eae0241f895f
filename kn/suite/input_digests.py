"""Digests of what stages read from outside the store: committed models, corpus files, installed packages."""

import functools
import os
from importlib.metadata import packages_distributions, version
from pathlib import Path

from kn.files import PROJECT_ROOT, file_sha256
from kn.suite.store import StoreError


@functools.cache
def asset_digest(folder: Path) -> str:
    """SHA-256 over all files of a committed model; StoreError for a missing or damaged file."""
    restore = f"restore it with `git checkout -- {os.path.relpath(folder, PROJECT_ROOT)}`"
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    if not any(p.suffix in (".safetensors", ".json") for p in files):
        raise StoreError(f"the pretrained model {folder} is missing: {restore}")
    sums = folder.parent / "SHA256SUMS"
    lines = sums.read_text(encoding="utf-8").splitlines() if sums.exists() else []
    known = {name: digest for digest, name in map(str.split, lines)}
    for path in files:
        if known.pop(path.relative_to(folder.parent).as_posix(), None) != file_sha256(path):
            raise StoreError(f"{path} is damaged (its sha256 is not the one in SHA256SUMS): {restore}")
    if missing := [name for name in known if name.startswith(folder.name + "/")]:
        raise StoreError(f"{folder.parent / missing[0]} is missing: {restore}")
    return file_sha256(sums)


def corpus_file_digest(file: str) -> str:
    """SHA-256 of a file that `python -m kn export-corpus FILE` wrote; StoreError where there is none."""
    if Path(file).is_file():
        return file_sha256(Path(file))
    remedy = f"make it with `python -m kn export-corpus {file}` in an environment with the pins"
    raise StoreError(f"text.file={file} is not there: {remedy}")


@functools.cache
def package_versions(names: tuple[str, ...]) -> dict[str, str]:
    """Installed versions of packages by import name; StoreError for one that is not installed."""
    distributions = packages_distributions()
    if missing := [name for name in names if name not in distributions]:
        reason = "mini's corpus is made of its documentation: run ./run_all.sh to set up the pins"
        raise StoreError(f"package {missing[0]!r} is not installed, {reason}")
    return {name: version(distributions[name][0]) for name in names}
