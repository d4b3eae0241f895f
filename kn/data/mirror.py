"""Fetch the hub's models and data once, into a mirror for runs without a network: `python -m kn mirror DIR`.

Commits are resolved when the mirror is made and recorded in mirror.json, with the size and sha256 of every
file. Intact files are not fetched again.
"""

from __future__ import annotations

import fnmatch
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from kn.data.hub import REPOSITORIES, HubRepository, SourceError, mirror_path, read_manifest, refetch_hint
from kn.files import file_sha256, write_atomic

DISK_MARGIN = 1.1  # free space that a download needs, as a multiple of its size
CODE_SUFFIXES = (".py", ".bin", ".pt", ".pkl", ".pickle")  # code and pickles are never fetched


def resolve_revision(item: HubRepository, api) -> tuple[str, str, dict[str, int]]:
    """(revision, its commit, {matching file: bytes}) of a repository; SourceError where no file matches."""
    for revision in filter(None, ("main", item.fallback)):
        info = api.repo_info(item.repository, repo_type=item.kind, revision=revision, files_metadata=True)
        sizes = {
            file.rfilename: file.size or 0
            for file in info.siblings
            if any(fnmatch.fnmatch(file.rfilename, pattern) for pattern in item.patterns)
            and not file.rfilename.endswith(CODE_SUFFIXES)
        }
        if sizes:
            return revision, info.sha, sizes
    raise SourceError(
        f"{item.repository} holds no file like {', '.join(item.patterns)}: its layout has changed, please "
        "report it"
    )


def file_records(folder: Path, names: list[str]) -> dict[str, list]:
    """{file: [bytes, sha256]}."""
    return {name: [(folder / name).stat().st_size, file_sha256(folder / name)] for name in sorted(names)}


def problems(mirror: Path, deep: bool = True, items: dict[str, HubRepository] = REPOSITORIES) -> list[str]:
    """Missing or damaged files of a mirror, a line each with the remedy; `deep` reads all contents."""
    known, found = read_manifest(mirror)["items"], []
    for name in items:
        if name not in known:
            found.append(f"{name} is not in the mirror {mirror}")
            continue
        for file, (size, digest) in known[name]["files"].items():
            path = mirror / name / file
            if not path.exists():
                found.append(f"{path} is missing")
            elif path.stat().st_size != size or deep and file_sha256(path) != digest:
                found.append(f"{path} is damaged (another content than mirror.json says)")
    return [f"{problem}: {refetch_hint(mirror)}" for problem in found]


def write_manifest(mirror: Path, items: dict) -> None:
    """Write mirror.json atomically."""
    made = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    write_atomic(mirror / "mirror.json", json.dumps({"made": made, "items": items}, indent=1) + "\n")


def make(mirror: Path, items: dict[str, HubRepository] = REPOSITORIES, api=None, download=None) -> int:
    """Fetch missing or damaged repositories into `mirror`; returns 0.

    Raises SourceError where the disk is too small or a repository cannot be reached.
    """
    from huggingface_hub import HfApi, snapshot_download

    api, download = api or HfApi(), download or snapshot_download
    mirror.mkdir(parents=True, exist_ok=True)
    known = read_manifest(mirror)["items"] if (mirror / "mirror.json").exists() else {}
    for name, item in items.items():
        if name in known and not problems(mirror, items={name: item}):
            print(f"{name}: there, {known[name]['repository']}@{known[name]['commit'][:12]}", flush=True)
            continue
        try:
            revision, commit, sizes = resolve_revision(item, api)
        except SourceError:
            raise
        except Exception as error:  # many kinds of network and hub errors
            raise SourceError(
                f"{item.repository} cannot be reached ({type(error).__name__}): is there a network, and is "
                "HF_HUB_OFFLINE unset?"
            ) from error
        for file in sizes:
            mirror_path(mirror, name, file)
        total, free = sum(sizes.values()), shutil.disk_usage(mirror).free
        if total * DISK_MARGIN > free:
            raise SourceError(
                f"{name} needs {total / 1e9:.1f} GB, {mirror} has {free / 1e9:.1f} GB free: make room or "
                "choose another folder"
            )
        source, files = f"{item.repository}@{commit[:12]}", list(sizes)
        print(f"{name}: {len(files)} files, {total / 1e9:.2f} GB of {source}", flush=True)
        download(
            item.repository, repo_type=item.kind, revision=commit, local_dir=mirror / name,
            allow_patterns=files,
        )
        known[name] = {
            "repository": item.repository, "kind": item.kind, "revision": revision, "commit": commit,
            "files": file_records(mirror / name, files),
        }
        write_manifest(mirror, known)
    return 0


def wheels(mirror: Path, requirements: Path) -> None:
    """Download the pinned packages as wheels into <mirror>/wheels; SourceError where pip fails."""
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
        "-r", str(requirements), "-d", str(mirror / "wheels"),
    ]
    if subprocess.run(command).returncode:
        raise SourceError(f"pip could not fetch the pins of {requirements.name}: see its message above")
