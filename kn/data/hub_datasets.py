"""WikiText-103, OpenWebText and GLUE from a mirror of the hub, as token rows and GLUE's TSV files.

The counterparts for mini are `documentation` and `glue_twins`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pyarrow
import pyarrow.parquet
import torch
from safetensors.torch import save_file

from kn.data import glue, glue_baselines
from kn.data.hub import SourceError, mirror_path, refetch_hint, rehearsal_notes, verify

TOKENIZER_BATCH = 512  # texts a call
# the hub's names for GLUE's columns; labels are numbers in the order of glue.TASKS[…].labels, −1 where hidden
GLUE_TEXTS = {
    "cola": ("sentence",), "sst2": ("sentence",), "mrpc": ("sentence1", "sentence2"),
    "rte": ("sentence1", "sentence2"), "mnli": ("premise", "hypothesis"), "qnli": ("question", "sentence"),
    "qqp": ("question1", "question2"),
}
WIKITEXT_SPLITS = {"train": "train", "valid": "validation", "test": "test"}


def parquet_files(mirror: Path, split: str, *folders: str) -> list[Path]:
    """Parquet files of a split below a folder of the mirror, in name order; SourceError for none.

    Named <split>-00000-of-00002.parquet, <split>/0000.parquet or partial-<split>/0000.parquet.
    """
    folder = mirror.joinpath(*folders)
    files = sorted(folder.rglob("*.parquet"))
    parents = (split, f"partial-{split}")
    found = [p for p in files if p.name.startswith(f"{split}-") or p.parent.name in parents]
    for path in found:
        mirror_path(mirror, path.relative_to(mirror).as_posix())
    if not found:
        splits = sorted({p.name.partition("-0")[0] for p in files})
        raise SourceError(
            f"{folder} has no split {split!r} (found: {', '.join(splits) or 'nothing'}): "
            f"{refetch_hint(mirror)}"
        )
    return found


def read_columns(path: Path, names: tuple[str, ...], batch: int = 4096) -> Iterator[dict[str, list]]:
    """Batches of a parquet file's columns as lists; SourceError where it cannot be read or lacks one."""
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if missing := [name for name in names if name not in file.schema_arrow.names]:
                raise SourceError(
                    f"{path}: column {missing[0]!r} is missing, found: {', '.join(file.schema_arrow.names)}"
                )
            for part in file.iter_batches(batch, columns=list(names)):
                yield part.to_pydict()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError, OverflowError, MemoryError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise SourceError(
            f"{path} cannot be read as parquet ({reason}): it may be cut short; fetch it again with "
            "`python -m kn mirror`"
        ) from None


def read_texts(path: Path, column: str = "text") -> Iterator[str]:
    """The strings of one column; SourceError for a value of another type."""
    for part in read_columns(path, (column,)):
        for text in part[column]:
            if not isinstance(text, str):
                raise SourceError(f"{path}: column {column!r} holds {type(text).__name__}, must be text")
            yield text


def iter_wikitext(mirror: Path, split: str) -> Iterator[str]:
    """WikiText-103 (raw) of a split ("train", "valid", "test"), article by article.

    Concatenated, the articles are the file's lines joined by blank lines, as is usual for GPT-2. A new one
    begins at each title ` = Title = `, where GPT-2's pre-tokenizer splits anyway: the tokens are the same.
    """
    article: list[str] = []
    for path in parquet_files(mirror, WIKITEXT_SPLITS[split], "wikitext"):
        for line in read_texts(path):
            if article and line.startswith(" = ") and not line.startswith(" = = "):
                yield "\n\n".join([*article, ""])
                article = []
            article.append(line)
    if article:
        yield "\n\n".join(article)


def iter_openwebtext(
    mirror: Path, sample: float, held_out: tuple[float, float], seed: int
) -> Iterator[tuple[str, str]]:
    """(split, document) of a random part of OpenWebText.

    The split is "sample", or "valid" or "test" with the probabilities `held_out`. One draw for every document
    from one generator: the same choice on every machine.
    """
    generator = random.Random(seed)
    for path in parquet_files(mirror, "train", "openwebtext"):
        for text in read_texts(path):
            draw = generator.random()
            if draw < sample:
                yield "sample", text
            elif draw >= 1 - held_out[0]:
                yield "valid", text
            elif draw >= 1 - sum(held_out):
                yield "test", text


class TokenRowBuilder:
    """Rows of `context` tokens (uint16) of one split, filled text by text."""

    def __init__(self, tokenizer, context: int, end_of_text: bool):
        self.tokenizer, self.context = tokenizer, context
        self.suffix = [tokenizer.eos_token_id] if end_of_text else []
        self.parts: list[numpy.ndarray] = []
        self.counts = {"documents": 0, "bytes": 0, "words": 0}

    def add(self, texts: list[str]) -> None:
        """Tokenize texts and append them, each followed by the end-of-text token if `end_of_text`."""
        if not texts:
            return
        encoded = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        for text, ids in zip(texts, encoded, strict=True):
            self.parts.append(numpy.array([*ids, *self.suffix], dtype=numpy.uint16))
            self.counts["documents"] += 1
            self.counts["bytes"] += len(text.encode())
            self.counts["words"] += len(text.split())

    def finish(self) -> tuple[torch.Tensor, dict]:
        """(rows (n, context) of uint16, counts); counts include the tokens after the last full row."""
        stream = numpy.concatenate(self.parts) if self.parts else numpy.zeros(0, numpy.uint16)
        n = len(stream) // self.context
        rows = stream[: n * self.context].reshape(n, self.context)
        return torch.from_numpy(rows), {**self.counts, "tokens": len(stream)}


def write_token_rows(mirror: Path, settings: dict, folder: Path, tokenizer) -> dict:
    """Tokenize WikiText-103 and a random part of OpenWebText into <folder>/rows.safetensors; returns counts.

    Raises ValueError for a vocabulary above 16 bits, SourceError for a split without a full row.
    """
    text, context = settings["text"], settings["context"]
    verify(mirror, settings["mirror"])
    if len(tokenizer) > 2**16:
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, rows of 16 bits hold 65,536")
    web = ("sample", "web_valid", "web_test")
    builders = {name: TokenRowBuilder(tokenizer, context, True) for name in web}
    documents = iter_openwebtext(mirror, text["sample"], tuple(text["web_shares"]), text["sample_seed"])
    for part in batched(documents, TOKENIZER_BATCH):
        for name, builder in builders.items():
            builder.add([document for split, document in part if split == name.removeprefix("web_")])
    for split in WIKITEXT_SPLITS:
        builder = builders[f"wiki_{split}"] = TokenRowBuilder(tokenizer, context, False)
        for part in batched(iter_wikitext(mirror, split), TOKENIZER_BATCH):
            builder.add(list(part))

    source = json.dumps(settings["mirror"], sort_keys=True)
    metrics: dict[str, Any] = {"fingerprint": hashlib.sha256(source.encode()).hexdigest()[:16]}
    rows: dict[str, torch.Tensor] = {}
    for name, builder in builders.items():
        all_rows, counts = builder.finish()
        rows[name] = all_rows[: text["limit"]] if text["limit"] else all_rows
        corpus, _, split = name.partition("_")
        (metrics.setdefault(corpus, {}) if split else metrics)[split or name] = counts
        if not len(rows[name]):
            raise SourceError(
                f"{name} gave no full row of {context} tokens ({counts['tokens']} tokens): choose larger "
                "shares with --set text.sample or text.web_shares"
            )
    save_file(rows, folder / "rows.safetensors")
    return metrics


def batched(items, size: int) -> Iterator[tuple]:
    """Tuples of up to `size` items (itertools.batched came with Python 3.12)."""
    iterator = iter(items)
    while part := tuple(itertools.islice(iterator, size)):
        yield part


def read_glue_task(mirror: Path, task: str) -> dict[str, list[dict]]:
    """All splits of a task as rows {"texts", "label" (None where hidden), "index"}.

    Tabs and line breaks inside a text become blanks, as in GLUE's own files. Raises SourceError for a wrong
    value.
    """
    splits: dict[str, list[dict]] = {}
    names = (*GLUE_TEXTS[task], "label")
    for split in glue.TASKS[task].splits:
        rows = splits.setdefault(split, [])
        for path in parquet_files(mirror, split.replace("dev", "validation"), "glue", task):
            for columns in read_columns(path, names):
                for *texts, label in zip(*(columns[name] for name in names), strict=True):
                    _check_glue_row(f"{path}, row {len(rows)}", task, split, tuple(texts), label)
                    cleaned = tuple(" ".join(text.split()) for text in texts)
                    label = None if label == -1 else label
                    rows.append({"texts": cleaned, "label": label, "index": len(rows)})
    return splits


def _check_glue_row(place: str, task: str, split: str, texts: tuple, label) -> None:
    if any(not isinstance(text, str) for text in texts):
        raise SourceError(f"{place}: {texts!r} is not text")
    largest, hidden = len(glue.TASKS[task].labels) - 1, split.startswith("test")
    if not isinstance(label, int) or not (0 <= label <= largest or hidden and label == -1):
        allowed = f"0 to {largest}{' and -1 (hidden)' if hidden else ''}"
        raise SourceError(f"{place}: label {label!r} is not a class of {task}, allowed are {allowed}")


def write_glue_tasks(mirror: Path, settings: dict, folder: Path) -> dict:
    """Write the tasks as GLUE's TSV files into <folder>/<task>; returns counts and best constants."""
    verify(mirror, settings.get("mirror", {}))
    metrics = rehearsal_notes(mirror)
    for task in settings["tasks"]:
        limit = settings["limit"] or None
        splits = {name: rows[:limit] for name, rows in read_glue_task(mirror, task).items()}
        glue.write_task(folder / task, task, splits)
        labels = [row["label"] for row in splits["train"]]
        metrics[task] = {
            **{name: len(rows) for name, rows in splits.items()},
            "classes": [labels.count(label) for label in range(len(glue.TASKS[task].labels))],
            "majority": glue_baselines.best_constant_scores(task, splits),
        }
    return metrics
