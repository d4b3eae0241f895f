"""Stages of text and tasks: the corpus as token rows, GLUE or its stand-ins, Table 6's submissions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from kn.data import documentation, glue, glue_baselines, glue_submission, hub_datasets
from kn.data import glue_twins as twins
from kn.data.hub import mirror_folder
from kn.files import ASSETS
from kn.models.loading import load_tokenizer
from kn.suite.work.context import StageContext, input_stage

JOBS = 2  # processes that extract documentation


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
        groups = {group: tuple(text[group]) for group in ("web", "wiki")}
        fractions = {group: tuple(text[f"{group}_shares"]) for group in groups}
        corpora = documentation.build(groups, fractions, jobs=JOBS)
    if not settings["assets"]:
        tokenizer = documentation.train_tokenizer(corpora["web"].train, settings["vocabulary"])
        tokenizer.save_pretrained(folder / "tokenizer")
    tokenizer = stage_tokenizer(settings, folder)
    fingerprint = documentation.fingerprint(corpora)
    expected = text["fingerprint"] or fingerprint
    metrics: dict[str, Any] = {"fingerprint": fingerprint, "as_committed": fingerprint == expected}

    limit = text["limit"] or None
    splits = {
        f"{group}_{split}": getattr(corpora[group], split)[:limit]
        for group in corpora
        for split in ("train", "valid", "test")
    }
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
        (folder / f"{name}.json").write_text(json.dumps(docs))
    save_file(rows, folder / "rows.safetensors")
    return metrics


def glue_tasks(context: StageContext) -> dict:
    """GLUE's own seven tasks, from the mirror."""
    return hub_datasets.write_glue_tasks(mirror_folder(), context.settings, context.folder)


def glue_twins(context: StageContext) -> dict:
    """Stand-ins for the seven tasks, made of documentation text."""
    settings, source = context.settings, context.input_folder("corpus")

    def documents(name: str) -> tuple[str, ...]:
        return tuple(json.loads((source / f"{name}.json").read_text()))

    made = twins.build_twins(
        documents("web_train"), documents("web_valid"), documents("web_test"),
        {task: tuple(size) for task, size in settings["sizes"].items()},
        settings["seed"], documents("wiki_valid"), documents("wiki_test"),
    )
    metrics = {}
    for task, splits in made.items():
        glue.write_task(context.folder / task, task, splits)
        counts: dict[str, int] = {}
        for name, rows in splits.items():  # MNLI's matched and mismatched sets count together
            kind = name.partition("_")[0]
            counts[kind] = counts.get(kind, 0) + len(rows)
        metrics[task] = {
            **counts,
            "majority": glue_baselines.best_constant_scores(task, splits),
            "word_list": glue_baselines.bag_of_words_scores(task, splits),
        }
    return metrics


def glue_scores(context: StageContext) -> dict:
    """Table 6: a row's submission files, zipped for the server and scored where the test labels are known."""
    labels, metrics = context.input_folder("glue", "twins"), {}
    submission = context.folder / "submission"
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
    settings, task, source = context.settings, context.stage["task"], context.input("glue", "twins")
    store = context.store
    splits = glue.read_task(store.folder(source) / task, task)
    if only_text is not None:
        splits = {
            name: [{**row, "texts": row["texts"][only_text : only_text + 1]} for row in rows]
            for name, rows in splits.items()
        }
    trained = settings.get("assets") == ""  # the tokenizer is the corpus stage's
    tokenizer = stage_tokenizer(settings, store.folder(input_stage(source, "corpus")) if trained else None)
    length = settings["max_length"]
    return splits, {name: glue.encode(tokenizer, rows, length) for name, rows in splits.items()}
