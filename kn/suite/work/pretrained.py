"""Stages of models before any training of this run: pretrained ones, the SVD start, Table 1's shapes."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, logging, set_seed

from kn.compression import compress
from kn.data import hub
from kn.files import ASSETS
from kn.models.base import count_parameters
from kn.models.config import KnGPT2Config, KroneckerSpec
from kn.models.gpt2 import KnGPT2ForSequenceClassification, KnGPT2LMHeadModel
from kn.models.loading import one_line_load_errors, validate_checkpoint
from kn.suite import evaluate, pretrain_mini
from kn.suite.devices import device_name
from kn.suite.settings import Model, Recipe
from kn.suite.work.context import StageContext
from kn.suite.work.datasets import stage_tokenizer

EAGER_MAX_TOKENS = 256  # on a CPU eager attention is 1.4 times as fast as SDPA at mini's 128
EVALUATION_WINDOWS = 256  # of `context` tokens: enough to choose recipes by, and quick
logging.set_verbosity_error()
logging.disable_progress_bar()


def load_model(folder: Path, labels: int = 0):
    """A saved GPT-2 or KnGPT2 as language model or, with a fresh head of `labels` outputs, as classifier.

    On the GPU where there is one, in float32. Raises ValueError where weights are missing.
    """
    config = validate_checkpoint(folder)
    classes: tuple[Any, Any] = (GPT2LMHeadModel, GPT2ForSequenceClassification)
    if config["model_type"] == "kngpt2":
        classes = (KnGPT2LMHeadModel, KnGPT2ForSequenceClassification)
    options: dict[str, Any] = {"num_labels": labels} if labels else {}
    if config.get("activation_function", "gelu_new") == "gelu_new":
        # the same function as one operation: faster, and one saved tensor instead of seven
        options["activation_function"] = "gelu_pytorch_tanh"
    sdpa = torch.cuda.is_available() or config.get("n_positions", 1024) > EAGER_MAX_TOKENS
    with one_line_load_errors(folder):
        model, info = classes[bool(labels)].from_pretrained(
            folder, attn_implementation="sdpa" if sdpa else "eager", dtype=torch.float32,
            local_files_only=True, use_safetensors=True, output_loading_info=True, **options,
        )
    if missing := sorted(name for name in info["missing_keys"] if not (labels and name == "score.weight")):
        raise ValueError(
            f"{folder} lacks {len(missing)} of the model's weights, such as {missing[0]}: save the whole "
            "model there again"
        )
    model.config.update({"pad_token_id": model.config.eos_token_id, "use_cache": False})
    return model.to("cuda") if torch.cuda.is_available() else model


def load_teacher(context: StageContext):
    """The teacher that is an input of the stage."""
    return load_model(context.input_folder("pretrained", model="teacher") / "model")


def model_facts(model, folder: Path) -> dict:
    """Parameters, bytes and shapes of a saved model."""
    return {
        "parameters": count_parameters(model), "bytes": evaluate.model_bytes(folder),
        "shapes": evaluate.layer_shapes(model),
    }


def perplexities(
    model, rows: dict, precision: str, corpora=("web", "wiki"), splits=("valid", "test")
) -> dict[str, dict[str, float]]:
    """{corpus: {split: perplexity}} on EVALUATION_WINDOWS windows, on all of wiki's test (Tables 4, 7)."""

    def windows(corpus: str, split: str) -> torch.Tensor:
        everything = (corpus, split) == ("wiki", "test")
        return rows[f"{corpus}_{split}"][: None if everything else EVALUATION_WINDOWS]

    return {c: {s: evaluate.perplexity(model, windows(c, s), precision) for s in splits} for c in corpora}


def save_compressed(context: StageContext, model, perplexity: dict) -> None:
    """Save a compressed model with its tokenizer, and its perplexities and the stage's name on the card."""
    corpus = context.input("corpus")
    tokenizer = stage_tokenizer(json.loads(corpus.settings), context.store.folder(corpus))
    evaluation = {
        f"perplexity on {domain} {split} text": value
        for domain, splits in perplexity.items()
        for split, value in splits.items()
    }
    evaluation["made by stage"] = context.stage.path
    model.save_pretrained(context.folder / "model", tokenizer=tokenizer, evaluation=evaluation)


def pretrained_model(context: StageContext) -> dict:
    """A pretrained model as float32, its cost and perplexities: the mirror's, committed, or trained here."""
    settings, name = context.settings, context.stage["model"]
    if "mirror" in settings:
        mirror = hub.mirror_folder()
        hub.verify(mirror, settings["mirror"])
        model = load_model(mirror / settings["name"])
        facts = {"commit": settings["mirror"][settings["name"]]["commit"], **hub.rehearsal_notes(mirror)}
    elif "recipe" in settings:
        model, facts = _train_from_scratch(context)
    else:
        source = ASSETS / settings["assets"] / name
        model = load_model(source)
        facts = json.loads((source / "recipe.json").read_text())["measured"] | {"log": _read_log(source)}
    model.save_pretrained(context.folder / "model")
    found = perplexities(model, context.rows, settings["precision"])
    return {**model_facts(model, context.folder / "model"), **facts, "perplexity": found}


def _read_log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def _train_from_scratch(context: StageContext):
    """(model, its cost): the teacher from random weights, the baseline from every other layer of it."""
    settings, rows, scratch = context.settings, context.rows, context.scratch
    recipe, device = Recipe(**settings["recipe"]), "cuda" if torch.cuda.is_available() else "cpu"
    set_seed(recipe.seed)
    if context.stage["model"] == "teacher":
        teacher, model = None, pretrain_mini.random_gpt2(Model(**settings["model"]))
    else:
        teacher = load_teacher(context).eval().requires_grad_(False)
        model = pretrain_mini.every_other_layer(teacher)
    model.to(device)
    valid = rows["web_valid"][:EVALUATION_WINDOWS]
    pretrain_mini.train(model, rows["web_train"], valid, scratch, recipe, teacher)
    data_bytes = context.input_metrics("corpus")["web"]["train"]["bytes"]
    log, device = scratch / "log.jsonl", device_name()
    cost = pretrain_mini.training_cost(model, log, rows["web_train"], data_bytes, device)
    return model, cost | {"log": _read_log(scratch)}


def svd_start(context: StageContext) -> dict:
    """The SVD start: the teacher compressed (eq. 1), untrained; also with embedding or layers alone."""
    settings, clock = context.settings, time.monotonic()
    teacher, rows, precision = load_teacher(context), context.rows, settings["precision"]
    spec = KroneckerSpec(**settings["compression"])
    student = compress(teacher, spec)
    seconds = time.monotonic() - clock
    student.config.provenance["teacher"] = context.input("pretrained", model="teacher").path
    found = perplexities(student, rows, precision)
    save_compressed(context, student, found)
    ablations = {}
    if spec.embedding:
        ablations = {"embedding": {"layers": ()}, "layers": {"embedding": False}}
    alone = {}
    for name, fields in ablations.items():
        model = compress(teacher, dataclasses.replace(spec, **fields))
        alone[name] = perplexities(model, rows, precision, splits=("test",))
    facts = model_facts(student, context.folder / "model")
    return {**facts, "seconds": seconds, "perplexity": found, "alone": alone}


def shapes(context: StageContext) -> dict:
    """Table 1: shapes and parameter counts of models built on the meta device, at two sizes."""
    model, spec = context.settings["model"], context.settings["compression"]
    mini = {
        "vocab_size": model["vocabulary"], "n_positions": model["context"], "n_embd": model["width"],
        "n_layer": model["layers"], "n_head": model["heads"], "bos_token_id": 0, "eos_token_id": 0,
    }
    metrics = {}
    for size, fields in (("paper_size", {}), ("mini_size", mini)):
        half = GPT2Config(**fields).n_layer // 2
        compressed = KnGPT2Config(**fields, tie_word_embeddings=False, kronecker=spec)
        with torch.device("meta"):
            models = {
                "GPT-2 Small": GPT2LMHeadModel(GPT2Config(**fields)),
                "DistilGPT2": GPT2LMHeadModel(GPT2Config(**{**fields, "n_layer": half})),
                "KnGPT2": KnGPT2LMHeadModel(compressed),
            }
        metrics[size] = {
            title: {**evaluate.layer_shapes(m), "layers": m.config.n_layer, "parameters": count_parameters(m)}
            for title, m in models.items()
        }
    return metrics
