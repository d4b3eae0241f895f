"""`python -m kn mirror DIR`: everything the paper profile needs, fetched once where there is a network, and checked.

A run with KN_MIRROR=DIR then needs none. What is there and intact is not fetched again; commits are resolved when the
mirror is made and recorded in mirror.json, with the size and sha256 of every file.
"""

from __future__ import annotations

import fnmatch
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from kn.data.hub import ITEMS, Item, SourceError, inside, manifest, refetch_hint
from kn.files import file_sha256

ROOM = 1.1  # free space wanted, as a multiple of what is to be fetched


def wanted(names: list[str], patterns: tuple[str, ...]) -> list[str]:
    """The repository's files that match, code and pickles never."""
    return [n for n in names if any(fnmatch.fnmatch(n, p) for p in patterns) and not n.endswith((".py", ".bin", ".pt", ".pkl", ".pickle"))]


def resolve(item: Item, api) -> tuple[str, str, dict[str, int]]:
    """(revision asked for, commit, {file: bytes}) of a repository on the hub; SourceError where no file is as wanted."""
    for revision in filter(None, ("main", item.fallback)):
        info = api.repo_info(item.repository, repo_type=item.kind, revision=revision, files_metadata=True)
        sizes = {s.rfilename: s.size or 0 for s in info.siblings}
        found = {name: sizes[name] for name in wanted(list(sizes), item.patterns)}
        if found:
            return revision, info.sha, found
    raise SourceError(f"{item.repository} holds no file like {', '.join(item.patterns)}: its layout has changed, please report it")


def record(folder: Path, names: list[str]) -> dict[str, list]:
    """{file: [bytes, sha256]}."""
    return {name: [(folder / name).stat().st_size, file_sha256(folder / name)] for name in sorted(names)}


def problems(mirror: Path, deep: bool = True, items: dict[str, Item] = ITEMS) -> list[str]:
    """What is missing or damaged in a mirror, one line each with the command that mends it; all contents are read if `deep`."""
    known, found = manifest(mirror)["items"], []
    for name in items:
        if name not in known:
            found.append(f"{name} is not in the mirror {mirror}: {refetch_hint(mirror)}")
            continue
        for file, (size, digest) in known[name]["files"].items():
            path = mirror / name / file
            if not path.exists():
                found.append(f"{path} is missing: {refetch_hint(mirror)}")
            elif path.stat().st_size != size or deep and file_sha256(path) != digest:
                found.append(f"{path} is damaged (another content than mirror.json says): {refetch_hint(mirror)}")
    return found


def write_manifest(mirror: Path, items: dict) -> None:
    """mirror.json, whole or not at all."""
    part = mirror / "mirror.json.part"
    part.write_text(json.dumps({"made": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()), "items": items}, indent=1) + "\n")
    part.replace(mirror / "mirror.json")


def make(mirror: Path, items: dict[str, Item] = ITEMS, api=None, download=None) -> int:
    """Fetch what is missing; resumes. Returns 0; SourceError for too little room or a repository that cannot be reached."""
    from huggingface_hub import HfApi, snapshot_download

    api, download = api or HfApi(), download or snapshot_download
    mirror.mkdir(parents=True, exist_ok=True)
    known = manifest(mirror)["items"] if (mirror / "mirror.json").exists() else {}
    for name, item in items.items():
        if name in known and not problems(mirror, items={name: item}):
            print(f"{name}: there, {known[name]['repository']}@{known[name]['commit'][:12]}", flush=True)
            continue
        try:
            revision, commit, sizes = resolve(item, api)
        except SourceError:
            raise
        except Exception as error:  # many kinds of network and hub errors
            raise SourceError(f"{item.repository} cannot be reached ({type(error).__name__}): is there a network, and is HF_HUB_OFFLINE unset?") from error
        for file in sizes:
            inside(mirror, name, file)
        total, free = sum(sizes.values()), shutil.disk_usage(mirror).free
        if total * ROOM > free:
            raise SourceError(f"{name} needs {total / 1e9:.1f} GB, {mirror} has {free / 1e9:.1f} GB free: make room or choose another folder")
        print(f"{name}: {len(sizes)} files, {total / 1e9:.2f} GB of {item.repository}@{commit[:12]}", flush=True)
        download(item.repository, repo_type=item.kind, revision=commit, local_dir=mirror / name, allow_patterns=list(sizes))
        known[name] = {"repository": item.repository, "kind": item.kind, "revision": revision, "commit": commit, "files": record(mirror / name, list(sizes))}
        write_manifest(mirror, known)
    return 0


def wheels(mirror: Path, requirements: Path) -> None:
    """The pinned packages as wheels in <mirror>/wheels, for an installation without a network; SourceError where pip fails."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "-r", str(requirements), "-d", str(mirror / "wheels")]
    if subprocess.run(command).returncode:
        raise SourceError(f"pip could not fetch the pins of {requirements.name}: see its message above")
