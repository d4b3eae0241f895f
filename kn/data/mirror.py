"""Fetch the hub's models and data once, into a mirror for runs without a network: `python -m kn mirror DIR`.

mirror.json records commits, and size and sha256 of every file. Intact files are not fetched again."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from kn.data import hub
from kn.data.hub import REPOSITORIES, HubRepository, SourceError
from kn.files import file_records, write_atomic

DISK_MARGIN = 1.1  # free space that a download needs, as a multiple of its size
CODE_PATTERNS = ["*.py", "*.bin", "*.pt", "*.pkl", "*.pickle"]  # code and pickles are never fetched


def resolve_revision(item: HubRepository, api) -> tuple[str, str, dict[str, int]]:
    """(revision, its commit, {matching file: bytes}) of a repository; SourceError where no file matches."""
    from huggingface_hub.utils import filter_repo_objects
    for revision in filter(None, ("main", item.fallback)):
        info = api.repo_info(item.repository, repo_type=item.kind, revision=revision, files_metadata=True)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings}
        names = filter_repo_objects(sizes, allow_patterns=list(item.patterns), ignore_patterns=CODE_PATTERNS)
        if files := {name: sizes[name] for name in names}:
            return revision, info.sha, files
    problem = f"{item.repository} holds no file like {', '.join(item.patterns)}"
    raise SourceError(f"{problem}: its layout has changed, please report it")


def problems(mirror: Path, items: dict[str, HubRepository] = REPOSITORIES) -> list[str]:
    """Missing or damaged files of a mirror, a line each with the remedy."""
    known, hint = hub.read_manifest(mirror)["items"], hub.refetch_hint(mirror)
    missing = [f"{name} is not in the mirror {mirror}: {hint}" for name in items if name not in known]
    present = tuple(name for name in items if name in known)
    return [*missing, *hub.file_problems(mirror, hub.digest(mirror, present))]


def write_manifest(mirror: Path, items: dict) -> None:
    """Write mirror.json."""
    made = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    write_atomic(mirror / "mirror.json", json.dumps({"made": made, "items": items}, indent=1) + "\n")


def make(mirror: Path, items: dict[str, HubRepository] = REPOSITORIES, api=None, download=None) -> int:
    """Fetch missing or damaged repositories into `mirror`; SourceError for too small a disk or no network."""
    from huggingface_hub import HfApi, snapshot_download
    api, download = api or HfApi(), download or snapshot_download
    mirror.mkdir(parents=True, exist_ok=True)
    known = hub.read_manifest(mirror)["items"] if (mirror / "mirror.json").exists() else {}
    for name, item in items.items():
        if name in known and not problems(mirror, items={name: item}):
            print(f"{name}: there, {known[name]['repository']}@{known[name]['commit'][:12]}", flush=True)
            continue
        try:
            revision, commit, sizes = resolve_revision(item, api)
        except SourceError:
            raise
        except Exception as error:  # many kinds of network and hub errors
            problem = f"{item.repository} cannot be reached ({type(error).__name__})"
            raise SourceError(f"{problem}: is there a network, and is HF_HUB_OFFLINE unset?") from error
        for file in sizes:
            hub.mirror_path(mirror, name, file)
        total, free = sum(sizes.values()), shutil.disk_usage(mirror).free
        if total * DISK_MARGIN > free:
            problem = f"{name} needs {total / 1e9:.1f} GB, {mirror} has {free / 1e9:.1f} GB free"
            raise SourceError(f"{problem}: make room or choose another folder")
        source, files, folder = f"{item.repository}@{commit[:12]}", list(sizes), mirror / name
        print(f"{name}: {len(files)} files, {total / 1e9:.2f} GB of {source}", flush=True)
        options = {"repo_type": item.kind, "revision": commit, "local_dir": folder, "allow_patterns": files}
        download(item.repository, **options)
        record = {"repository": item.repository, "kind": item.kind, "revision": revision, "commit": commit}
        known[name] = {**record, "files": file_records(folder, files)}
        write_manifest(mirror, known)
    return 0


def wheels(mirror: Path, requirements: Path) -> None:
    """Download the pinned packages as wheels into <mirror>/wheels; SourceError where pip fails."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    if subprocess.run([*command, "-r", str(requirements), "-d", str(mirror / "wheels")]).returncode:
        raise SourceError(f"pip could not fetch the pins of {requirements.name}: see its message above")
