"""The hub's repositories of the paper profile, and the verified local mirror that every run reads.

    <mirror>/mirror.json                  repository, commit, size and sha256 of every fetched file
    <mirror>/gpt2, <mirror>/distilgpt2    model.safetensors, config.json, tokenizer files
    <mirror>/openwebtext, wikitext, glue  parquet files, at the paths they have in their repository

Nothing that was fetched is executed: weights are safetensors, data are parquet, tokenizers are JSON."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kn.data import glue
from kn.files import file_sha256, safe_join, store_home


@dataclass(frozen=True)
class HubRepository:
    """A repository of the hub and the files to fetch from it."""

    repository: str
    kind: str  # "model" or "dataset"
    patterns: tuple[str, ...]
    fallback: str = ""  # revision to try where the main branch holds no matching file


TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json")
MODEL_FILES = ("config.json", "model.safetensors", *TOKENIZER_FILES)
REPOSITORIES = {
    "gpt2": HubRepository("openai-community/gpt2", "model", MODEL_FILES),
    "distilgpt2": HubRepository("distilbert/distilgpt2", "model", MODEL_FILES),
    "wikitext": HubRepository("Salesforce/wikitext", "dataset", ("wikitext-103-raw-v1/*.parquet",)),
    # the main branch held a loading script, which datasets 4 does not run; the hub's conversion is parquet
    "openwebtext": HubRepository("Skylion007/openwebtext", "dataset", ("*.parquet",), "refs/convert/parquet"),
    "glue": HubRepository("nyu-mll/glue", "dataset", tuple(f"{task}/*.parquet" for task in glue.TASKS)),
}
MAX_MANIFEST_BYTES = 64 * 2**20  # a real mirror.json has some thousands


class SourceError(Exception):
    """A mirror that cannot be used; the message is one line that says what to do."""


def mirror_folder() -> Path:
    """The default mirror: $KN_MIRROR, or the folder `mirror` of the store."""
    return Path(os.environ.get("KN_MIRROR") or store_home() / "mirror").absolute()


def refetch_hint(mirror: Path) -> str:
    """The command that fetches missing or damaged files."""
    return f"fetch it again with `python -m kn mirror {mirror}`"


def mirror_path(mirror: Path, *names: str) -> Path:
    """Path of a file of the mirror; SourceError for a name, or a link, that leads out of it."""
    try:
        return safe_join(mirror, *names)
    except ValueError as error:
        raise SourceError(f"{error}: put the file itself there, or {refetch_hint(mirror)}") from None


def read_manifest(mirror: Path) -> dict:
    """mirror.json: {"items": {name: {"repository", "commit", "files": {file: [bytes, sha256]}, …}}}.

    Raises SourceError where it is missing or damaged, or names a file outside the mirror."""
    path = mirror / "mirror.json"
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise ValueError
        manifest = json.loads(path.read_bytes())
        names: list[tuple[str, ...]] = [(item,) for item in manifest["items"]]
        for item, entry in manifest["items"].items():
            files = entry["files"].values()
            valid = all(isinstance(size, int) and isinstance(sha, str) for size, sha in files)
            if not (isinstance(entry["commit"], str) and valid):
                raise TypeError
            names += [(item, file) for file in entry["files"]]
    except FileNotFoundError:
        remedy = f"make one with `python -m kn mirror {mirror}` where there is a network"
        raise SourceError(f"{mirror} is no mirror (mirror.json is missing): {remedy}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise SourceError(f"{path} is damaged: {refetch_hint(mirror)}") from None
    for parts in names:
        mirror_path(mirror, *parts)
    return manifest


def digest(mirror: Path, names: tuple[str, ...]) -> dict[str, dict]:
    """Commit and sha256s of these repositories, for a stage's key; SourceError for one the mirror lacks."""
    items = read_manifest(mirror)["items"]
    if missing := [name for name in names if name not in items]:
        raise SourceError(f"{missing[0]} is not in the mirror {mirror}: {refetch_hint(mirror)}")
    digests = {}
    for name in names:
        files = {file: sha for file, (_, sha) in items[name]["files"].items()}
        digests[name] = {"commit": items[name]["commit"], "files": files}
    return digests


def file_problems(mirror: Path, digests: dict[str, dict]) -> Iterator[str]:
    """Missing or damaged files of `digests` (see `digest`), a line each with the remedy."""
    for name, entry in digests.items():
        for file, sha in entry["files"].items():
            path = mirror_path(mirror, name, file)
            if not path.is_file():
                yield f"{path} is missing: {refetch_hint(mirror)}"
            elif file_sha256(path) != sha:
                yield f"{path} is damaged (another content than mirror.json says): {refetch_hint(mirror)}"


def verify(mirror: Path, digests: dict[str, dict]) -> None:
    """SourceError where a file of `digests` (see `digest`) is missing or has another content."""
    for problem in file_problems(mirror, digests):
        raise SourceError(problem)


def rehearsal_notes(mirror: Path) -> dict:
    """The marks of a rehearsal mirror, made of stand-ins: {"carved", "weights"}; empty for the hub's."""
    state = json.loads((mirror / "mirror.json").read_bytes())
    return {key: state[key] for key in ("carved", "weights") if key in state}
