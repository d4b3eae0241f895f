"""Stages beyond the paper: the aligned start, training from either start, models of other sizes and kinds."""

import dataclasses
import math
import time

import torch
from transformers import set_seed

from kn.align import build_aligned_pair, build_low_rank_pair
from kn.compression import compress, factorize
from kn.models.base import count_parameters
from kn.models.config import KroneckerSpec
from kn.suite.devices import device_name
from kn.suite.training import distillation_config
from kn.suite.work.context import StageContext
from kn.suite.work.pretrained import load_model, load_teacher, perplexities, save_compressed
from kn.suite.work.trainings import train_lm

ABLATIONS = {  # parts of the aligned start, measured apart: (is the embedding compressed, other ingredients)
    "embedding alone": (True, ()), "attention alone": (False, ("attention",)),
    "feed-forward alone": (False, ("feed_forward",)), "embedding and feed-forward": (True, ("feed_forward",)),
    "embedding, feed-forward, attention": (True, ("attention", "feed_forward")),
}


def calibration_ids(context: StageContext) -> torch.Tensor:
    """Token ids (count, context) drawn from the web training text."""
    pool = context.rows.get("web_train", context.rows["sample"])
    generator = torch.Generator().manual_seed(context.stage["seed"])
    return pool[torch.randperm(len(pool), generator=generator)[: context.settings["calibration"]]].long()


def aligned_start(context: StageContext) -> dict:
    """The aligned start and the equivalent teacher, and the perplexity that each part of it costs."""
    settings, rows, precision = context.settings, context.rows, context.settings["precision"]
    teacher = load_teacher(context).eval()
    spec, ids, clock = KroneckerSpec(**settings["compression"]), calibration_ids(context), time.monotonic()
    equivalent, dense = build_aligned_pair(teacher, spec, ids)
    student = factorize(dense, spec)
    seconds = time.monotonic() - clock
    student.config.provenance = {"teacher": context.stage.input("pretrained", model="teacher").path}
    saved = save_compressed(context, student)
    equivalent.save_pretrained(context.folder / "teacher")
    alone = {}
    for name, (embedding, ingredients) in ABLATIONS.items():
        part = dataclasses.replace(spec, embedding=embedding)
        _, dense = build_aligned_pair(teacher, part, ids, ingredients)
        alone[name] = perplexities(dense, rows, precision, splits=("test",))
    return {**saved, "seconds": seconds, "calibration_tokens": ids.numel(), "ingredients": alone}


def training_rows(rows: dict[str, torch.Tensor], fraction: float) -> torch.Tensor:
    """Token rows for a fraction of the light pre-training; above 1 from all web training text, none twice."""
    sample = rows["sample"]
    if fraction <= 1 or "web_train" not in rows:
        return sample
    pool = rows["web_train"]
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(0))
    return pool[order[: round(fraction * len(sample))]]


def pretrain_fraction(context: StageContext, student, teacher, fraction: float) -> dict:
    """Train with LM + KD (eq. 5) on a fraction of the light pre-training's tokens."""
    rows, training = context.rows, context.settings["training"]
    sample, batch = rows["sample"], training["batch_size"]
    all_steps = training["max_steps"] or training["epochs"] * len(sample) / batch
    steps = max(1, math.ceil(fraction * all_steps))
    settings = {**context.settings, "training": {**training, "max_steps": steps}}
    config = distillation_config(settings, "ilkd")
    result = train_lm(context, student, training_rows(rows, fraction), settings, config, teacher)
    return {"steps": steps, "tokens": steps * batch * sample.shape[1], "hours": result.seconds / 3600,
            "hyper": result.hyperparameters, "log": result.log}


def partial_pretraining(context: StageContext) -> dict:
    """A fraction of the light pre-training from the SVD start, or the aligned one with its teacher."""
    set_seed(context.stage["seed"])
    start = context.stage.input("decompose", "aligned")
    folder, aligned = context.store.folder(start), start.kind == "aligned"
    student = load_model(folder / "model")
    teacher = load_model(folder / "teacher") if aligned else load_teacher(context)
    trained = pretrain_fraction(context, student, teacher, context.stage["share"])
    return {**trained, **save_compressed(context, student), "hardware": device_name()}


def compressed_model(context: StageContext) -> dict:
    """A model of one method and size: parameters, perplexities before and after a short LM + KD training."""
    settings, store, method = context.settings, context.store, context.stage["method"]
    set_seed(context.stage["seed"])
    made = {item.kind: item for item in context.stage.inputs if item.kind not in ("corpus", "pretrained")}
    if done := made.get("heal") or made.get("pretrain"):  # beyond_alignment has trained this model
        start = made["decompose" if method == "svd" else "aligned"]
        return {**store.metrics(done), "start": {"perplexity": store.metrics(start)["perplexity"]}}

    spec, teacher, before = KroneckerSpec(**settings["compression"]), load_teacher(context).eval(), None
    student: torch.nn.Module
    if method == "svd":
        student = compress(teacher, spec)
    elif method == "narrow":
        (start,) = made.values()
        teacher, student = (load_model(store.folder(start) / name) for name in ("teacher", "model"))
        metrics = store.metrics(start)  # the same model, until it is trained
        before = metrics.get("start", metrics)["perplexity"]
        # B fixed at (1, 0, …): the narrow model that structured pruning and low-rank heads give, refitted
        for name, parameter in student.named_parameters():
            parameter.requires_grad_(not name.endswith(".B"))
    elif method == "lowrank":
        teacher, student = build_low_rank_pair(teacher, spec, calibration_ids(context))
    else:
        teacher, dense = build_aligned_pair(teacher, spec, calibration_ids(context))
        student = factorize(dense, spec)
    if settings["keep_model"]:
        student.save_pretrained(context.folder / "model")
        teacher.save_pretrained(context.folder / "teacher")
    before = before or perplexities(student, context.rows, settings["precision"], splits=("test",))
    trained = pretrain_fraction(context, student, teacher, settings["share"])
    after = perplexities(student, context.rows, settings["precision"], splits=("test",))
    facts = {"parameters": count_parameters(student), "start": {"perplexity": before}}
    return {**facts, **trained, "perplexity": after}
