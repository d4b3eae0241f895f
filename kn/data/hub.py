"""Where the paper profile's models and data come from, and how they are read: always from a mirror, a plain folder.

    <mirror>/mirror.json                  what was fetched: repository, commit, size and sha256 of every file
    <mirror>/gpt2, <mirror>/distilgpt2    model.safetensors, config.json, tokenizer files
    <mirror>/openwebtext, wikitext, glue  parquet files, at the paths they have in their repository

Nothing here executes what was fetched: weights are safetensors, data are parquet, tokenizers are JSON. One-line errors
name the file, the value and the command that mends it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kn.data import glue
from kn.files import file_sha256, safe_join


@dataclass(frozen=True)
class Item:
    """One repository of the hub and the files that are wanted from it."""

    repository: str
    kind: str  # "model" or "dataset"
    patterns: tuple[str, ...]
    fallback: str = ""  # revision to try where the main one holds no such file


MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json")
ITEMS = {
    "gpt2": Item("openai-community/gpt2", "model", MODEL_FILES),
    "distilgpt2": Item("distilbert/distilgpt2", "model", MODEL_FILES),
    "wikitext": Item("Salesforce/wikitext", "dataset", ("wikitext-103-raw-v1/*.parquet",)),
    # the main branch held a loading script for long; datasets 4 runs none, the hub's own conversion is parquet
    "openwebtext": Item("Skylion007/openwebtext", "dataset", ("*.parquet",), "refs/convert/parquet"),
    "glue": Item("nyu-mll/glue", "dataset", tuple(f"{task}/*.parquet" for task in glue.TASKS)),
}
# the hub's names for GLUE's columns; labels are class numbers in the order of glue.TASKS[...].labels, −1 where hidden
GLUE_TEXTS = {
    "cola": ("sentence",), "sst2": ("sentence",), "mrpc": ("sentence1", "sentence2"), "rte": ("sentence1", "sentence2"),
    "mnli": ("premise", "hypothesis"), "qnli": ("question", "sentence"), "qqp": ("question1", "question2"),
}  # fmt: skip
WIKITEXT_SPLITS = {"train": "train", "valid": "validation", "test": "test"}


class SourceError(Exception):
    """A mirror that cannot be used; the message is one line that says what to do."""


def refetch_hint(folder: Path) -> str:
    """The command that fetches what is missing or damaged."""
    return f"fetch it again with `python -m kn mirror {folder}`"


LARGEST = 64 * 2**20  # bytes of a mirror.json; a real one has some thousands


def manifest(mirror: Path) -> dict:
    """mirror.json; SourceError where there is none that can be read, or where it names files outside the mirror."""
    path = mirror / "mirror.json"
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError
        found = json.loads(path.read_text())
        names: list[tuple[str, ...]] = [(item,) for item in found["items"]]
        for item, entry in found["items"].items():
            if not (isinstance(entry["commit"], str) and all(isinstance(size, int) and isinstance(digest, str) for size, digest in entry["files"].values())):
                raise TypeError
            names += [(item, file) for file in entry["files"]]
    except FileNotFoundError:
        raise SourceError(f"{mirror} is no mirror (mirror.json is missing): make one with `python -m kn mirror {mirror}` where there is a network") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise SourceError(f"{path} is damaged: {refetch_hint(mirror)}") from None
    for parts in names:
        inside(mirror, *parts)
    return found


def inside(mirror: Path, *names: str) -> Path:
    """The path of a file, or of an item's folder, of the mirror; SourceError for a name, or a link, that leads out of it."""
    try:
        return safe_join(mirror, *names)
    except ValueError as error:
        raise SourceError(f"{error}: put the file itself there, or {refetch_hint(mirror)}") from None


def verify(mirror: Path, items: dict[str, dict]) -> None:
    """SourceError where a file of these items {name: {"files": {file: sha256}}} is missing or has another content."""
    for name, entry in items.items():
        for file, digest in entry["files"].items():
            path = inside(mirror, name, file)
            if not path.is_file() or file_sha256(path) != digest:
                raise SourceError(f"{path} is {'damaged (another content than mirror.json says)' if path.is_file() else 'missing'}: {refetch_hint(mirror)}")


def files_of(mirror: Path, split: str, *folders: str) -> list[Path]:
    """Parquet files of one split below a folder of the mirror, in name order: <split>-00000-of-00002.parquet or <split>/0000.parquet; SourceError for none."""
    folder = mirror.joinpath(*folders)
    found = sorted(p for p in folder.rglob("*.parquet") if p.name.startswith(f"{split}-") or p.parent.name in (split, f"partial-{split}"))
    for path in found:
        inside(mirror, path.relative_to(mirror).as_posix())
    if not found:
        there = sorted({p.name.partition("-0")[0] for p in folder.rglob("*.parquet")})
        raise SourceError(f"{folder} has no split {split!r} (found: {', '.join(there) or 'nothing'}): {refetch_hint(mirror)}")
    return found


def columns(path: Path, names: tuple[str, ...], batch: int = 4096) -> Iterator[dict[str, list]]:
    """Batches of a parquet file's columns as lists; SourceError for a file or column that is not there or not readable."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            missing = [name for name in names if name not in file.schema_arrow.names]
            if missing:
                raise SourceError(f"{path}: column {missing[0]!r} is missing, found: {', '.join(file.schema_arrow.names)}")
            for part in file.iter_batches(batch, columns=list(names)):
                yield part.to_pydict()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError, OverflowError, MemoryError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise SourceError(f"{path} cannot be read as parquet ({reason}): it may be cut short; fetch it again with `python -m kn mirror`") from None


def texts_of(path: Path, column: str = "text") -> Iterator[str]:
    """The strings of one column; SourceError for what is no text."""
    for part in columns(path, (column,)):
        for text in part[column]:
            if not isinstance(text, str):
                raise SourceError(f"{path}: column {column!r} holds {type(text).__name__}, text wanted")
            yield text


def wikitext(mirror: Path, split: str) -> Iterator[str]:
    """WikiText-103 (raw) in pieces whose concatenation is its lines joined by blank lines, as is usual for GPT-2; split is train, valid or test.

    A new piece begins at each title ` = Title = `, where GPT-2's tokenizer parts the text anyway: tokens are those of the whole.
    """
    piece: list[str] = []
    for path in files_of(mirror, WIKITEXT_SPLITS[split], "wikitext"):
        for line in texts_of(path):
            if piece and line.startswith(" = ") and not line.startswith(" = = "):
                yield "\n\n".join([*piece, ""])
                piece = []
            piece.append(line)
    if piece:
        yield "\n\n".join(piece)


def openwebtext(mirror: Path, share: float, held: tuple[float, float], seed: int) -> Iterator[tuple[str, str]]:
    """(split, document) of OpenWebText: each document falls into "sample" with probability `share`, into "valid" and "test" with those of `held`.

    One generator, seeded once, a draw for every document: the same choice on every machine. Documents of no split are passed over.
    """
    import random

    draw = random.Random(seed)
    for path in files_of(mirror, "train", "openwebtext"):
        for text in texts_of(path):
            where = draw.random()
            split = "sample" if where < share else "valid" if where >= 1 - held[0] else "test" if where >= 1 - sum(held) else None
            if split:
                yield split, text


def glue_rows(mirror: Path, task: str) -> dict[str, list[dict]]:
    """All splits of a task as rows {"texts", "label" (None where hidden), "index"}."""
    made: dict[str, list[dict]] = {}
    names = GLUE_TEXTS[task]
    for split in glue.TASKS[task].splits:
        rows = made.setdefault(split, [])
        for path in files_of(mirror, split.replace("dev", "validation"), "glue", task):
            for part in columns(path, (*names, "label")):
                for *texts, label in zip(*(part[name] for name in (*names, "label")), strict=True):
                    rows.append(_row(path, task, split, tuple(texts), label, len(rows)))
    return made


def _row(path: Path, task: str, split: str, texts: tuple, label, index: int) -> dict:
    """One checked row; tabs and line breaks inside a text become blanks, as in GLUE's own files."""
    if any(not isinstance(text, str) for text in texts):
        raise SourceError(f"{path}, row {index}: {texts!r} is not text")
    classes = len(glue.TASKS[task].labels)
    hidden = split.startswith("test")
    if not isinstance(label, int) or not (0 <= label < classes or hidden and label == -1):
        raise SourceError(f"{path}, row {index}: label {label!r} is not a class of {task}, allowed are 0 to {classes - 1}{' and -1 (hidden)' if hidden else ''}")
    return {"texts": tuple(" ".join(text.split()) for text in texts), "label": None if label == -1 else label, "index": index}
