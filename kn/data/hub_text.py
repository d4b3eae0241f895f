"""The stages of the paper profile that read a mirror: text into token rows, GLUE into its files, the two pretrained models.

The counterparts for mini are in train.py; everything after them is the same code.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors.torch import save_file

from kn.data import glue
from kn.data import glue_baselines as shortcuts
from kn.data import hub as sources
from kn.files import store_home

BATCH = 512  # texts handed to the tokenizer at once


def mirror_folder() -> Path:
    """$KN_MIRROR, or the folder `mirror` of the store."""
    return Path(os.environ.get("KN_MIRROR") or store_home() / "mirror").absolute()


def digest(items: tuple[str, ...]) -> dict[str, dict]:
    """What of the mirror a stage depends on: commit and the sha256 of every file, by item; SourceError for an item that is not there."""
    known = sources.manifest(mirror_folder())["items"]
    missing = [name for name in items if name not in known]
    if missing:
        raise sources.SourceError(f"{missing[0]} is not in the mirror {mirror_folder()}: {sources.refetch_hint(mirror_folder())}")
    return {name: {"commit": known[name]["commit"], "files": {file: sha for file, (_, sha) in known[name]["files"].items()}} for name in items}


class Rows:
    """Token rows of one split, gathered text by text: 16 bits a token."""

    def __init__(self, tokenizer, context: int, end: bool):
        self.tokenizer, self.context, self.end = tokenizer, context, end
        self.parts: list[numpy.ndarray] = []
        self.counts = {"documents": 0, "bytes": 0, "words": 0}

    def add(self, texts: list[str]) -> None:
        """Tokenise some texts, each followed by the end-of-text token if `end`."""
        if not texts:
            return
        for text, ids in zip(texts, self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"], strict=True):
            self.parts.append(numpy.array([*ids, self.tokenizer.eos_token_id] if self.end else ids, dtype=numpy.uint16))
            self.counts["documents"] += 1
            self.counts["bytes"] += len(text.encode())
            self.counts["words"] += len(text.split())

    def finish(self) -> tuple[torch.Tensor, dict]:
        """(rows (n, context) of uint16, counts); what does not fill a row is left out of the rows, not of the counts."""
        stream = numpy.concatenate(self.parts) if self.parts else numpy.zeros(0, numpy.uint16)
        n = len(stream) // self.context
        return torch.from_numpy(stream[: n * self.context].reshape(n, self.context)), {**self.counts, "tokens": len(stream)}


def corpus(settings: dict, folder: Path, tokenizer) -> dict:
    """WikiText-103 whole and a random share of OpenWebText as token rows; counts of documents, bytes, words and tokens.

    ValueError for a tokenizer of more than 16 bits, SourceError for a split without a full row.
    """
    mirror, text, context = mirror_folder(), settings["text"], settings["context"]
    sources.verify(mirror, settings["mirror"])
    if len(tokenizer) > 2**16:
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, rows of 16 bits hold 65,536")
    rows: dict[str, torch.Tensor] = {}
    metrics: dict[str, Any] = {"fingerprint": hashlib.sha256(json.dumps(settings["mirror"], sort_keys=True).encode()).hexdigest()[:16]}

    def keep(name: str, made: Rows) -> None:
        whole, counts = made.finish()
        rows[name] = whole[: text["limit"]] if text["limit"] else whole
        group, _, split = name.partition("_")
        (metrics.setdefault(group, {}) if split else metrics)[split or name] = counts
        if not len(rows[name]):
            raise sources.SourceError(f"{name} gave no full row of {context} tokens ({counts['tokens']} tokens): choose larger shares with --set text.sample or text.web_shares")

    web = {name: Rows(tokenizer, context, True) for name in ("sample", "valid", "test")}
    for part in batched(sources.openwebtext(mirror, text["sample"], tuple(text["web_shares"]), text["sample_seed"]), BATCH):
        for split, made in web.items():
            made.add([document for name, document in part if name == split])
    for split, made in web.items():
        keep(split if split == "sample" else f"web_{split}", made)
    for split in sources.WIKITEXT_SPLITS:
        made = Rows(tokenizer, context, False)
        for part in batched(sources.wikitext(mirror, split), BATCH):
            made.add(list(part))
        keep(f"wiki_{split}", made)
    save_file(rows, folder / "rows.safetensors")
    return metrics


def batched(items, size: int):
    """Tuples of up to `size` items (itertools.batched came with Python 3.12)."""
    iterator = iter(items)
    while part := tuple(itertools.islice(iterator, size)):
        yield part


def tasks(settings: dict, folder: Path) -> dict:
    """GLUE's seven tasks in their TSV layout; row counts, class balance and the best constant."""
    sources.verify(mirror_folder(), settings.get("mirror", {}))
    metrics = carved()
    for task in settings["tasks"]:
        splits = sources.glue_rows(mirror_folder(), task)
        limit = settings["limit"]
        splits = {name: rows[:limit] if limit else rows for name, rows in splits.items()}
        glue.write_task(folder / task, task, splits)
        counts = {name: len(rows) for name, rows in splits.items()}
        balance = [sum(row["label"] == label for row in splits["train"]) for label in range(len(glue.TASKS[task].labels))]
        metrics[task] = {**counts, "classes": balance, "majority": shortcuts.constant(task, splits)}
    return metrics


def carved() -> dict:
    """What a rehearsal mirror says of itself (empty for the hub's)."""
    state = json.loads((mirror_folder() / "mirror.json").read_text())
    return {key: state[key] for key in ("carved", "weights") if key in state}
