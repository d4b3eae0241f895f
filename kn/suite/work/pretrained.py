"""Stages of models before any training of this run: pretrained ones, the SVD start, Table 1's shapes."""

import dataclasses
import itertools
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
    """A saved GPT-2 or KnGPT2, as classifier where `labels` > 0; ValueError where weights are missing."""
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
        problem = f"{folder} lacks {len(missing)} of the model's weights, such as {missing[0]}"
        raise ValueError(f"{problem}: save the whole model there again")
    model.config.update({"pad_token_id": model.config.eos_token_id, "use_cache": False})
    return model.to("cuda") if torch.cuda.is_available() else model


def load_teacher(context: StageContext):
    """The teacher that is an input of the stage."""
    return load_model(context.input_folder("pretrained", model="teacher") / "model")


def model_facts(model, folder: Path) -> dict:
    """Parameters, bytes and shapes of a saved model."""
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return {"parameters": count_parameters(model), "bytes": size, "shapes": evaluate.layer_shapes(model)}


def perplexities(model, rows: dict, precision: str, corpora=("web", "wiki"), splits=("valid", "test")):
    """{corpus: {split: perplexity}} on EVALUATION_WINDOWS windows, on all of wiki's test (Tables 4, 7)."""
    found: dict[str, dict[str, float]] = {corpus: {} for corpus in corpora}
    for corpus, split in itertools.product(corpora, splits):
        limit = None if (corpus, split) == ("wiki", "test") else EVALUATION_WINDOWS
        found[corpus][split] = evaluate.perplexity(model, rows[f"{corpus}_{split}"][:limit], precision)
    return found


def save_compressed(context: StageContext, model) -> dict:
    """Save a compressed model with its tokenizer and a card; returns its facts and its perplexities."""
    perplexity = perplexities(model, context.rows, context.settings["precision"])
    corpus = context.stage.input("corpus")
    tokenizer = stage_tokenizer(json.loads(corpus.settings), context.store.folder(corpus))
    evaluation: dict[str, Any] = {}
    for domain, splits in perplexity.items():
        evaluation |= {f"perplexity on {domain} {split} text": value for split, value in splits.items()}
    evaluation["made by stage"] = context.stage.path
    model.save_pretrained(context.folder / "model", tokenizer=tokenizer, evaluation=evaluation)
    return {**model_facts(model, context.folder / "model"), "perplexity": perplexity}


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
        facts = json.loads((source / "recipe.json").read_bytes())["measured"] | {"log": _read_log(source)}
    model.save_pretrained(context.folder / "model")
    found = perplexities(model, context.rows, settings["precision"])
    return {**model_facts(model, context.folder / "model"), **facts, "perplexity": found}


def _read_log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def _train_from_scratch(context: StageContext):
    """(model, its cost): the teacher from random weights, the baseline from every other layer of it."""
    settings, rows, scratch = context.settings, context.rows, context.scratch
    recipe = Recipe(**settings["recipe"])
    set_seed(recipe.seed)
    if context.stage["model"] == "teacher":
        teacher, model = None, pretrain_mini.random_gpt2(Model(**settings["model"]))
    else:
        teacher = load_teacher(context).eval().requires_grad_(False)
        model = pretrain_mini.every_other_layer(teacher)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    train, valid = rows["web_train"], rows["web_valid"][:EVALUATION_WINDOWS]
    pretrain_mini.train(model, train, valid, scratch, recipe, teacher)
    data_bytes = context.store.metrics(context.stage.input("corpus"))["web"]["train"]["bytes"]
    cost = pretrain_mini.training_cost(model, scratch / "log.jsonl", train, data_bytes, device_name())
    return model, cost | {"log": _read_log(scratch)}


def svd_start(context: StageContext) -> dict:
    """The SVD start: the teacher compressed (eq. 1), untrained; also with embedding or layers alone."""
    clock, teacher, alone = time.monotonic(), load_teacher(context), {}
    spec = KroneckerSpec(**context.settings["compression"])
    student = compress(teacher, spec)
    seconds = time.monotonic() - clock
    student.config.provenance["teacher"] = context.stage.input("pretrained", model="teacher").path
    saved = save_compressed(context, student)
    ablations = {"embedding": {"layers": ()}, "layers": {"embedding": False}} if spec.embedding else {}
    for name, fields in ablations.items():
        model = compress(teacher, dataclasses.replace(spec, **fields))
        alone[name] = perplexities(model, context.rows, context.settings["precision"], splits=("test",))
    return {**saved, "seconds": seconds, "alone": alone}


def shapes(context: StageContext) -> dict:
    """Table 1: shapes and parameter counts of models built on the meta device, at two sizes."""
    model, spec = context.settings["model"], context.settings["compression"]
    mini = {"vocab_size": model["vocabulary"], "n_positions": model["context"], "n_embd": model["width"],
            "n_layer": model["layers"], "n_head": model["heads"], "bos_token_id": 0, "eos_token_id": 0}
    metrics = {}
    for size, fields in (("paper_size", {}), ("mini_size", mini)):
        half = GPT2Config(**fields).n_layer // 2
        compressed = KnGPT2Config(**fields, tie_word_embeddings=False, kronecker=spec)
        with torch.device("meta"):
            models = {"GPT-2 Small": GPT2LMHeadModel(GPT2Config(**fields)),
                      "DistilGPT2": GPT2LMHeadModel(GPT2Config(**{**fields, "n_layer": half})),
                      "KnGPT2": KnGPT2LMHeadModel(compressed)}
        metrics[size] = {
            title: {**evaluate.layer_shapes(m), "layers": m.config.n_layer, "parameters": count_parameters(m)}
            for title, m in models.items()
        }
    return metrics
