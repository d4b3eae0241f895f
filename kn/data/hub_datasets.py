"""WikiText-103, OpenWebText and GLUE from a mirror of the hub, as token rows and GLUE's TSV files."""

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
from kn.data.documentation import PLAIN_TEXT
from kn.data.hub import SourceError, mirror_path, refetch_hint, rehearsal_notes, verify

TOKENIZER_BATCH = 512  # texts a call
# the hub's names for GLUE's columns; labels are numbers in the order of glue.TASKS[…].labels, −1 where hidden
GLUE_TEXTS = {"cola": ("sentence",), "sst2": ("sentence",), "mrpc": ("sentence1", "sentence2"),
              "rte": ("sentence1", "sentence2"), "mnli": ("premise", "hypothesis"),
              "qnli": ("question", "sentence"), "qqp": ("question1", "question2")}
WIKITEXT_SPLITS = {"train": "train", "valid": "validation", "test": "test"}


def parquet_files(mirror: Path, split: str, *folders: str) -> list[Path]:
    """Parquet files of a split below a folder of the mirror, in name order; SourceError for none."""
    folder = mirror.joinpath(*folders)
    files = sorted(folder.rglob("*.parquet"))
    parents = (split, f"partial-{split}")
    # <split>-00000-of-00002.parquet, <split>/0000.parquet or partial-<split>/0000.parquet
    found = [p for p in files if p.name.startswith(f"{split}-") or p.parent.name in parents]
    for path in found:
        mirror_path(mirror, path.relative_to(mirror).as_posix())
    if not found:
        splits = ", ".join(sorted({p.name.partition("-0")[0] for p in files})) or "nothing"
        raise SourceError(f"{folder} has no split {split!r} (found: {splits}): {refetch_hint(mirror)}")
    return found


def read_columns(path: Path, names: tuple[str, ...], batch: int = 4096) -> Iterator[dict[str, list]]:
    """Batches of a parquet file's columns as lists; SourceError where it cannot be read or lacks one."""
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if missing := [name for name in names if name not in file.schema_arrow.names]:
                found = ", ".join(file.schema_arrow.names)
                raise SourceError(f"{path}: column {missing[0]!r} is missing, found: {found}")
            for part in file.iter_batches(batch, columns=list(names)):
                yield part.to_pydict()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError, OverflowError, MemoryError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        remedy = "it may be cut short; fetch it again with `python -m kn mirror`"
        raise SourceError(f"{path} cannot be read as parquet ({reason}): {remedy}") from None


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
    begins at each title ` = Title = `, where GPT-2's pre-tokenizer splits anyway: the tokens are the same."""
    article: list[str] = []
    for path in parquet_files(mirror, WIKITEXT_SPLITS[split], "wikitext"):
        for line in read_texts(path):
            if article and line.startswith(" = ") and not line.startswith(" = = "):
                yield "\n\n".join([*article, ""])
                article = []
            article.append(line)
    if article:
        yield "\n\n".join(article)


def iter_openwebtext(mirror: Path, sample: float, held_out: tuple[float, float], seed: int):
    """(split, document) of a random part of OpenWebText: "sample", or "valid", "test" (shares `held_out`)."""
    generator = random.Random(seed)
    for path in parquet_files(mirror, "train", "openwebtext"):
        for text in read_texts(path):
            draw = generator.random()  # for every document: the same choice on every machine
            if draw < sample:
                yield "sample", text
            elif draw >= 1 - held_out[0]:
                yield "valid", text
            elif draw >= 1 - sum(held_out):
                yield "test", text


class TokenRowBuilder:
    """Rows of `context` tokens (uint16) of one split; each text may end with the end-of-text token."""

    def __init__(self, tokenizer, context: int, end_of_text: bool):
        self.tokenizer, self.context = tokenizer, context
        self.suffix = [tokenizer.eos_token_id] if end_of_text else []
        self.texts: list[str] = []  # not tokenized yet
        self.parts = [numpy.zeros(0, numpy.uint16)]
        self.counts = {"documents": 0, "bytes": 0, "words": 0}

    def add(self, text: str) -> None:
        """Append a text."""
        self.texts.append(text)
        for name, number in (("documents", 1), ("bytes", len(text.encode())), ("words", len(text.split()))):
            self.counts[name] += number
        if len(self.texts) == TOKENIZER_BATCH:
            self._tokenize()

    def _tokenize(self) -> None:
        encoded = self.tokenizer(self.texts, **PLAIN_TEXT)["input_ids"]
        self.parts += [numpy.array([*ids, *self.suffix], dtype=numpy.uint16) for ids in encoded]
        self.texts = []

    def finish(self) -> tuple[torch.Tensor, dict]:
        """(rows (n, context) of uint16, counts); counts include the tokens after the last full row."""
        if self.texts:
            self._tokenize()
        stream = torch.from_numpy(numpy.concatenate(self.parts))
        full = len(stream) // self.context * self.context
        return stream[:full].view(-1, self.context), {**self.counts, "tokens": len(stream)}


def write_token_rows(mirror: Path, settings: dict, folder: Path, tokenizer) -> dict:
    """Tokenize WikiText-103 and a random part of OpenWebText into <folder>/rows.safetensors; returns counts.
    Raises ValueError for a vocabulary above 16 bits, SourceError for a split without a full row."""
    text, context = settings["text"], settings["context"]
    verify(mirror, settings["mirror"])
    if len(tokenizer) > 2**16:
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, rows of 16 bits hold 65,536")
    web = {"sample": "sample", "valid": "web_valid", "test": "web_test"}
    builders = {name: TokenRowBuilder(tokenizer, context, True) for name in web.values()}
    shares = tuple(text["web_shares"])
    for split, document in iter_openwebtext(mirror, text["sample"], shares, text["sample_seed"]):
        builders[web[split]].add(document)
    for split in WIKITEXT_SPLITS:
        builder = builders[f"wiki_{split}"] = TokenRowBuilder(tokenizer, context, False)
        for article in iter_wikitext(mirror, split):
            builder.add(article)
    source = json.dumps(settings["mirror"], sort_keys=True)
    metrics: dict[str, Any] = {"fingerprint": hashlib.sha256(source.encode()).hexdigest()[:16]}
    rows: dict[str, torch.Tensor] = {}
    for name, builder in builders.items():
        all_rows, counts = builder.finish()
        rows[name] = all_rows[: text["limit"]] if text["limit"] else all_rows
        corpus, _, split = name.partition("_")
        (metrics.setdefault(corpus, {}) if split else metrics)[split or name] = counts
        if not len(rows[name]):
            problem = f"{name} gave no full row of {context} tokens ({counts['tokens']} tokens)"
            remedy = "choose larger shares with --set text.sample or text.web_shares"
            raise SourceError(f"{problem}: {remedy}")
    save_file(rows, folder / "rows.safetensors")
    return metrics


def read_glue_task(mirror: Path, task: str) -> dict[str, list[dict]]:
    """{split: rows {"texts", "label" (None where hidden), "index"}} ; SourceError for a wrong value."""
    splits: dict[str, list[dict]] = {}
    names, labels = (*GLUE_TEXTS[task], "label"), range(len(glue.TASKS[task].labels))
    for split in glue.TASKS[task].splits:
        rows, hidden = splits.setdefault(split, []), split.startswith("test")
        for path in parquet_files(mirror, split.replace("dev", "validation"), "glue", task):
            parts = (zip(*map(part.get, names), strict=True) for part in read_columns(path, names))
            for *texts, label in itertools.chain.from_iterable(parts):
                place = f"{path}, row {len(rows)}"
                if any(not isinstance(text, str) for text in texts):
                    raise SourceError(f"{place}: {tuple(texts)!r} is not text")
                if not isinstance(label, int) or not (label in labels or hidden and label == -1):
                    allowed = f"0 to {labels[-1]}{' and -1 (hidden)' if hidden else ''}"
                    problem = f"label {label!r} is not a class of {task}"
                    raise SourceError(f"{place}: {problem}, allowed are {allowed}")
                # blanks for tabs and line breaks, as in GLUE's own files
                cleaned = tuple(" ".join(text.split()) for text in texts)
                # the hub has MRPC's test labels; the six other tasks' are hidden, so are these
                rows.append({"texts": cleaned, "label": None if hidden else label, "index": len(rows)})
    return splits


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
