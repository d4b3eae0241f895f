"""Stages of text and tasks: the corpus as token rows, GLUE or its stand-ins, Table 6's submissions."""

import itertools
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from kn.data import documentation, glue, glue_baselines, glue_submission, hub_datasets
from kn.data import glue_twins as twins
from kn.data.hub import mirror_folder
from kn.files import ASSETS
from kn.models.loading import load_tokenizer
from kn.suite.work.context import StageContext

JOBS = 2  # processes that extract documentation
TWIN_TEXTS = {  # split of the stand-ins for GLUE: its documents
    "train": "web_train", "dev": "web_valid", "test": "web_test",
    "dev_mismatched": "wiki_valid", "test_mismatched": "wiki_test",
}


def stage_tokenizer(settings: dict, corpus: Path | None = None):
    """GPT-2's tokenizer from the mirror, mini's committed one, or the one that the corpus stage trained."""
    if "mirror" in settings:
        return load_tokenizer(mirror_folder() / "gpt2")
    return load_tokenizer((ASSETS / settings["assets"] if settings["assets"] else corpus) / "tokenizer")


def corpus(context: StageContext) -> dict:
    """Text → documents, token rows, counts and fingerprint."""
    settings, folder = context.settings, context.folder
    if "mirror" in settings:
        return hub_datasets.write_token_rows(mirror_folder(), settings, folder, stage_tokenizer(settings))
    text = settings["text"]
    if file := context.resources.get("file"):
        corpora = documentation.read(Path(file))
    else:
        fractions = {"web": text["web_shares"], "wiki": text["wiki_shares"]}
        corpora = documentation.build({group: text[group] for group in fractions}, fractions, jobs=JOBS)
    if not settings["assets"]:
        tokenizer = documentation.train_tokenizer(corpora["web"].train, settings["vocabulary"])
        tokenizer.save_pretrained(folder / "tokenizer")
    tokenizer = stage_tokenizer(settings, folder)
    metrics: dict[str, Any] = {"fingerprint": documentation.fingerprint(corpora)}
    metrics["as_committed"] = text["fingerprint"] in ("", metrics["fingerprint"])
    splits = {}
    for group, split in itertools.product(corpora, ("train", "valid", "test")):
        splits[f"{group}_{split}"] = getattr(corpora[group], split)[: text["limit"] or None]
    splits["sample"] = documentation.sample(splits["web_train"], text["sample"], text["sample_seed"])
    rows: dict[str, torch.Tensor] = {}
    for name, docs in splits.items():
        rows[name] = documentation.pack(tokenizer, docs, settings["context"]).to(torch.int32)
        counts = {
            "documents": len(docs), "bytes": sum(len(doc.encode()) for doc in docs),
            "words": sum(len(doc.split()) for doc in docs), "tokens": rows[name].numel(),
        }
        group, _, split = name.partition("_")
        (metrics.setdefault(group, {}) if split else metrics)[split or name] = counts
        (folder / f"{name}.json").write_text(json.dumps(docs), encoding="utf-8")
    save_file(rows, folder / "rows.safetensors")
    return metrics


def glue_tasks(context: StageContext) -> dict:
    """GLUE's own seven tasks, from the mirror."""
    return hub_datasets.write_glue_tasks(mirror_folder(), context.settings, context.folder)


def glue_twins(context: StageContext) -> dict:
    """Stand-ins for the seven tasks, made of documentation text."""
    settings, folder, metrics = context.settings, context.input_folder("corpus"), {}
    docs = {split: json.loads((folder / f"{name}.json").read_bytes()) for split, name in TWIN_TEXTS.items()}
    for task, splits in twins.build_twins(docs, settings["sizes"], settings["seed"]).items():
        glue.write_task(context.folder / task, task, splits)
        counts: Counter[str] = Counter()
        for name, rows in splits.items():  # MNLI's matched and mismatched sets count together
            counts[name.partition("_")[0]] += len(rows)
        metrics[task] = {**counts, "majority": glue_baselines.best_constant_scores(task, splits),
                         "word_list": glue_baselines.bag_of_words_scores(task, splits)}
    return metrics


def glue_scores(context: StageContext) -> dict:
    """Table 6: a row's submission files, zipped for the server and scored where the test labels are known."""
    labels, submission, metrics = context.input_folder("glue", "twins"), context.folder / "submission", {}
    for item in context.stage.inputs:
        if item.kind == "finetune_glue":
            task, source = item["task"], context.store.folder(item) / "submission"
            shutil.copytree(source, submission, dirs_exist_ok=True)
            if (labels / task / glue.LABELS_FILE).is_file():  # the server alone has those of the real tasks
                metrics[task] = glue_submission.grade(source, task, labels / task)
    _, filled = glue_submission.zip_submission(submission)
    return {"tasks": metrics, "filled_with_a_constant": filled}


def encoded_task(context: StageContext, only_text: int | None = None) -> tuple[dict, dict]:
    """(splits, tokenized splits) of the stage's task; `only_text` keeps the first (0) or second text."""
    settings, task, source = context.settings, context.stage["task"], context.stage.input("glue", "twins")
    splits = glue.read_task(context.store.folder(source) / task, task)
    if only_text is not None:
        for row in (row for rows in splits.values() for row in rows):
            row["texts"] = row["texts"][only_text : only_text + 1]
    trained = settings.get("assets") == ""  # the tokenizer is the corpus stage's
    corpus = context.store.folder(source.input("corpus")) if trained else None
    tokenizer, length = stage_tokenizer(settings, corpus), settings["max_length"]
    return splits, {name: glue.encode(tokenizer, rows, length) for name, rows in splits.items()}
