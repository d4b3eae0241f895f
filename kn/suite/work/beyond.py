"""The work of the stages beyond the paper: the aligned start, training from either start, and models of other sizes and kinds."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from pathlib import Path

import torch
from transformers import set_seed

from kn.align import gpt2 as aligned
from kn.align import low_rank as lowrank
from kn.compression import compress, factorize
from kn.models.base import count_parameters
from kn.models.config import KroneckerSpec
from kn.suite.devices import device_name
from kn.suite.store import Stage, Store
from kn.suite.training import TokenRows, distillation_of, lm_collate, run_trainer
from kn.suite.work import stages as train
from kn.suite.work.stages import describe, load_model, needed, perplexities, rows_of, save, settings_of

ALONE = {  # what is measured beside the whole: (is the embedding compressed, other ingredients)
    "embedding alone": (True, ()), "attention alone": (False, ("attention",)), "feed-forward alone": (False, ("feed_forward",)),
    "embedding and feed-forward": (True, ("feed_forward",)), "embedding, feed-forward, attention": (True, ("attention", "feed_forward")),
}  # fmt: skip


def calibration(rows: dict[str, torch.Tensor], count: int, seed: int) -> torch.Tensor:
    """Token ids (count, context) drawn from the web training text."""
    pool = rows.get("web_train", rows["sample"])
    return pool[torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))[:count]].long()


def with_equivalent(model, spec: KroneckerSpec, ids: torch.Tensor):
    """(the equivalent teacher, the aligned start)."""
    same, dense = aligned.pair(model, spec, ids)
    return same, factorize(dense, spec)


def aligned_start(stage: Stage, folder: Path, store: Store) -> dict:
    """The aligned start and the equivalent teacher, and what each ingredient costs in perplexity."""
    settings, rows, guide = settings_of(stage), rows_of(store, stage), needed(stage, "pretrained", model="teacher")
    teacher = load_model(store.folder(guide) / "model").eval()
    spec, ids, clock = KroneckerSpec(**settings["compression"]), calibration(rows, settings["calibration"], stage["seed"]), time.monotonic()
    same, student = with_equivalent(teacher, spec, ids)
    seconds = time.monotonic() - clock
    student.config.provenance = {"teacher": guide.path}
    found = perplexities(student, rows, settings["precision"])
    save(student, folder / "model", stage, store, found)
    same.save_pretrained(folder / "teacher")
    alone = {}
    for name, (embedding, ingredients) in ALONE.items():
        _, dense = aligned.pair(teacher, dataclasses.replace(spec, embedding=embedding), ids, ingredients)
        alone[name] = perplexities(dense, rows, settings["precision"], splits=("test",))
    return {**describe(student, folder / "model"), "seconds": seconds, "calibration_tokens": ids.numel(), "perplexity": found, "ingredients": alone}


def text_of(rows: dict[str, torch.Tensor], share: float) -> TokenRows:
    """The light pre-training's text; for more than one epoch of it, so much of all web training text instead, none of it twice where there is enough."""
    sample = rows["sample"]
    if share <= 1 or "web_train" not in rows:
        return TokenRows(sample)
    pool = rows["web_train"]
    return TokenRows(pool[torch.randperm(len(pool), generator=torch.Generator().manual_seed(0))[: round(share * len(sample))]])


def trained(student, teacher, stage: Stage, settings: dict, rows: dict, share: float, store: Store, splits=("valid", "test")) -> dict:
    """Train with LM + KD (eq. 5) for a share of the light pre-training; its log, tokens and perplexities."""
    how, sample = settings["training"], len(rows["sample"])
    steps = max(1, math.ceil(share * (how["max_steps"] or how["epochs"] * sample / how["batch_size"])))
    settings = {**settings, "training": {**how, "max_steps": steps}}
    distillation = distillation_of(settings, "ilkd")
    log, hyper, seconds = run_trainer(student, text_of(rows, share), lm_collate, store.scratch(stage), settings, stage["seed"], distillation, teacher, json.loads(stage.resources))
    tokens, found = steps * how["batch_size"] * rows["sample"].shape[1], perplexities(student, rows, settings["precision"], splits=splits)
    return {"steps": steps, "tokens": tokens, "hours": seconds / 3600, "hyper": hyper, "log": log, "perplexity": found}


def heal(stage: Stage, folder: Path, store: Store) -> dict:
    """A share of the light pre-training from the SVD or the aligned start, the latter beside the equivalent teacher."""
    settings, rows = settings_of(stage), rows_of(store, stage)
    set_seed(stage["seed"])
    start = next(i for i in stage.inputs if i.kind in ("decompose", "aligned"))
    student = load_model(store.folder(start) / "model")
    teacher = load_model(store.folder(start) / "teacher" if start.kind == "aligned" else store.folder(needed(stage, "pretrained")) / "model")
    found = trained(student, teacher, stage, settings, rows, stage["share"], store)
    save(student, folder / "model", stage, store, found["perplexity"])
    return {**describe(student, folder / "model"), **found, "hardware": device_name()}


def compressed(stage: Stage, folder: Path, store: Store) -> dict:
    """A model of one size: parameters and perplexities as it was made, and after a short LM + KD.

    "narrow" is the aligned start with B left at (1, 0, …): the narrow model that structured pruning and low-rank heads give, refitted.
    """
    settings, rows, method = settings_of(stage), rows_of(store, stage), stage["method"]
    set_seed(stage["seed"])
    made = {item.kind: item for item in stage.inputs if item.kind not in ("corpus", "pretrained")}
    if after := made.get("heal") or made.get("pretrain"):  # the profile's own configuration: beyond_alignment has trained it
        start = made["decompose" if method == "svd" else "aligned"]
        return {**store.metrics(after), "start": {"perplexity": store.metrics(start)["perplexity"]}}
    spec, teacher, before = KroneckerSpec(**settings["compression"]), load_model(store.folder(needed(stage, "pretrained", model="teacher")) / "model").eval(), None
    student: torch.nn.Module
    if method == "svd":
        student = compress(teacher, spec)
    elif method == "narrow":
        (start,) = made.values()
        teacher, student = (load_model(store.folder(start) / name) for name in ("teacher", "model"))
        before = store.metrics(start).get("start", store.metrics(start))["perplexity"]  # the same model, until it is trained
        for name, parameter in student.named_parameters():
            parameter.requires_grad_(not name.endswith(".B"))
    else:
        make = lowrank.start if method == "lowrank" else with_equivalent
        teacher, student = make(teacher, spec, calibration(rows, settings["calibration"], stage["seed"]))
    if settings["keep_model"]:
        student.save_pretrained(folder / "model")
        teacher.save_pretrained(folder / "teacher")
    before = before or perplexities(student, rows, settings["precision"], splits=("test",))
    found = trained(student, teacher, stage, settings, rows, settings["share"], store, splits=("test",))
    return {"parameters": count_parameters(student), "start": {"perplexity": before}, **found}


WORK = train.WORK | {"aligned": aligned_start, "heal": heal, "compressed": compressed}
