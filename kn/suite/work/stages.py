"""The work of each stage: work(stage, folder, store) -> metrics. Files go into `folder`, nothing else is touched."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, logging, set_seed

from kn.compression import compress
from kn.data import documentation as corpora
from kn.data import glue
from kn.data import glue_baselines as shortcuts
from kn.data import hub as sources
from kn.data import hub_text as real
from kn.distill import DistillationConfig
from kn.files import ASSETS
from kn.models import loading
from kn.models.base import count_parameters
from kn.models.config import KnGPT2Config, KroneckerSpec
from kn.models.gpt2 import KnGPT2ForSequenceClassification, KnGPT2LMHeadModel
from kn.suite import evaluate, profiles
from kn.suite.devices import device_name
from kn.suite.store import Stage, Store
from kn.suite.training import TokenRows, distillation_of, lm_collate, run_trainer

SHORT = 256  # tokens: on a CPU eager attention is 1.4 times as fast as SDPA at mini's 128
WINDOWS = 256  # of `context` tokens: enough to choose recipes by, and quick
logging.set_verbosity_error()
logging.disable_progress_bar()


def settings_of(stage: Stage) -> dict:
    """The stage's settings as a dictionary."""
    return json.loads(stage.settings)


def needed(stage: Stage, kind: str, **fields) -> Stage:
    """The one input of this kind (and fields); RuntimeError for none or several."""
    found = [i for i in stage.inputs if i.kind == kind and all(i[k] == v for k, v in fields.items())]
    if len(found) != 1:
        raise RuntimeError(f"{stage.path} has {len(found)} inputs of kind {kind}, wanted one")
    return found[0]


def tasks_of(stage: Stage) -> Stage:
    """The input that holds GLUE's tasks: the real ones or mini's twins."""
    return next(i for i in stage.inputs if i.kind in ("glue", "twins"))


def load_model(folder: Path, task: str = "lm", labels: int = 0):
    """A saved GPT-2 or KnGPT2 as language model or, with a fresh head of `labels` outputs, as classifier; ValueError where weights are missing."""
    config = loading.validate_checkpoint(folder)
    compressed = config["model_type"] == "kngpt2"
    classes = (KnGPT2LMHeadModel, KnGPT2ForSequenceClassification) if compressed else (GPT2LMHeadModel, GPT2ForSequenceClassification)
    extra: dict[str, Any] = {"num_labels": labels} if task == "glue" else {}
    if config.get("activation_function", "gelu_new") == "gelu_new":
        extra["activation_function"] = "gelu_pytorch_tanh"  # the same function as one operation: faster, and keeps one tensor for the backward pass instead of seven
    attention = "sdpa" if torch.cuda.is_available() or config.get("n_positions", 1024) > SHORT else "eager"
    asked = {"attn_implementation": attention, "local_files_only": True, "dtype": torch.float32, "use_safetensors": True, "output_loading_info": True}
    with loading.one_line_load_errors(folder):
        model, found = classes[task == "glue"].from_pretrained(folder, **asked, **extra)
    if missing := sorted(name for name in found["missing_keys"] if not (task == "glue" and name == "score.weight")):
        raise ValueError(f"{folder} lacks {len(missing)} of the model's weights, such as {missing[0]}: save the whole model there again")
    model.config.update({"pad_token_id": model.config.eos_token_id, "use_cache": False})
    return model.to("cuda") if torch.cuda.is_available() else model


def rows_of(store: Store, stage: Stage) -> dict[str, torch.Tensor]:
    """Token rows of the corpus stage: name → (n, context)."""
    return load_file(store.folder(needed(stage, "corpus")) / "rows.safetensors")


def tokenizer_of(settings: dict, corpus: Path | None = None):
    """GPT-2's own from the mirror, the committed one, or the one that the corpus stage trained in its folder."""
    if "mirror" in settings:
        return loading.load_tokenizer(real.mirror_folder() / "gpt2")
    return loading.load_tokenizer((ASSETS / settings["assets"] if settings["assets"] else corpus) / "tokenizer")


def corpus(stage: Stage, folder: Path, store: Store) -> dict:
    """Documentation text → documents, token rows, fingerprint."""
    settings = settings_of(stage)
    if "mirror" in settings:
        return real.corpus(settings, folder, tokenizer_of(settings))
    text = settings["text"]
    groups = {"web": tuple(text["web"]), "wiki": tuple(text["wiki"])}
    carried = json.loads(stage.resources).get("file")
    built = corpora.read(Path(carried)) if carried else corpora.build(groups, {g: tuple(text[f"{g}_shares"]) for g in groups}, jobs=2)
    if not settings["assets"]:
        corpora.train_tokenizer(built["web"].train, settings["vocabulary"]).save_pretrained(folder / "tokenizer")
    tokenizer = tokenizer_of(settings, folder)
    rows: dict[str, torch.Tensor] = {}
    metrics: dict[str, Any] = {"fingerprint": corpora.fingerprint(built)}
    metrics["as_committed"] = not text["fingerprint"] or metrics["fingerprint"] == text["fingerprint"]
    splits = {f"{g}_{s}": getattr(c, s) for g, c in built.items() for s in ("train", "valid", "test")}
    splits = {name: docs[: text["limit"]] if text["limit"] else docs for name, docs in splits.items()}
    splits["sample"] = corpora.sample(splits["web_train"], text["sample"], text["sample_seed"])
    for name, docs in splits.items():
        rows[name] = corpora.pack(tokenizer, docs, settings["context"]).to(torch.int32)
        counts = {"documents": len(docs), "bytes": sum(len(d.encode()) for d in docs), "words": sum(len(d.split()) for d in docs), "tokens": rows[name].numel()}
        group, _, split = name.partition("_")
        (metrics.setdefault(group, {}) if split else metrics)[split or name] = counts
        (folder / f"{name}.json").write_text(json.dumps(docs))
    save_file(rows, folder / "rows.safetensors")
    return metrics


def real_glue(stage: Stage, folder: Path, store: Store) -> dict:
    """GLUE's own seven tasks, from the mirror."""
    return real.tasks(settings_of(stage), folder)


def twins(stage: Stage, folder: Path, store: Store) -> dict:
    """The seven tasks made of documentation text, in GLUE's layout; test labels in files of their own."""
    from kn.data.glue_twins import build_twins

    settings, source = settings_of(stage), store.folder(needed(stage, "corpus"))
    docs = {name: tuple(json.loads((source / f"{name}.json").read_text())) for name in ("web_train", "web_valid", "web_test", "wiki_valid", "wiki_test")}
    sizes = {task: tuple(size) for task, size in settings["sizes"].items()}
    made = build_twins(docs["web_train"], docs["web_valid"], docs["web_test"], sizes, settings["seed"], docs["wiki_valid"], docs["wiki_test"])
    metrics = {}
    for task, splits in made.items():
        glue.write_task(folder / task, task, splits)
        counts = {name.partition("_")[0]: 0 for name in splits}
        for name, rows in splits.items():
            counts[name.partition("_")[0]] += len(rows)
        metrics[task] = {**counts, "majority": shortcuts.constant(task, splits), "word_list": shortcuts.word_list(task, splits)}
    return metrics


def pretrained(stage: Stage, folder: Path, store: Store) -> dict:
    """A committed pretrained model (float16) as float32, its recipe's cost, and its perplexities."""
    settings, name = settings_of(stage), stage["model"]
    if "mirror" in settings:
        sources.verify(real.mirror_folder(), settings["mirror"])
        model = load_model(real.mirror_folder() / settings["name"])
        model.save_pretrained(folder / "model")
        commit = settings["mirror"][settings["name"]]["commit"]
        return {**describe(model, folder / "model"), "commit": commit, **real.carved(), "perplexity": perplexities(model, rows_of(store, stage), settings["precision"])}
    if "recipe" in settings:
        return trained(stage, folder, store)
    source = ASSETS / settings["assets"] / name
    model = load_model(source)
    model.save_pretrained(folder / "model")
    recipe = json.loads((source / "recipe.json").read_text())
    log = [json.loads(line) for line in (source / "log.jsonl").read_text().splitlines()]
    return {**describe(model, folder / "model"), **recipe["measured"], "log": log, "perplexity": perplexities(model, rows_of(store, stage), settings["precision"])}


def trained(stage: Stage, folder: Path, store: Store) -> dict:
    """A model trained within the run: the teacher from nothing, the baseline from every other layer of it."""
    from kn.suite import pretrain_mini as rebuild

    settings, rows, name = settings_of(stage), rows_of(store, stage), stage["model"]
    recipe, device = profiles.Recipe(**settings["recipe"]), "cuda" if torch.cuda.is_available() else "cpu"
    set_seed(recipe.seed)
    teacher = None if name == "teacher" else load_model(store.folder(needed(stage, "pretrained", model="teacher")) / "model").eval().requires_grad_(False)
    model = (rebuild.fresh(profiles.Model(**settings["model"])) if teacher is None else rebuild.halved(teacher)).to(device)
    work = store.scratch(stage)
    rebuild.train(model, rows["web_train"], rows["web_valid"][:WINDOWS], work, recipe, teacher)
    model.save_pretrained(folder / "model")
    log = [json.loads(line) for line in (work / "log.jsonl").read_text().splitlines()]
    measured = rebuild.cost_of(model, work / "log.jsonl", rows["web_train"], store.metrics(needed(stage, "corpus"))["web"]["train"]["bytes"], device_name())
    return {**describe(model, folder / "model"), **measured, "log": log, "perplexity": perplexities(model, rows, settings["precision"])}


def describe(model, folder: Path) -> dict:
    """Parameters, bytes and shapes of a saved model."""
    return {"parameters": count_parameters(model), "bytes": evaluate.disk_bytes(folder), "shapes": evaluate.shapes(model)}


def perplexities(model, rows: dict, precision: str, groups=("web", "wiki"), splits=("valid", "test")) -> dict:
    """Perplexity on valid and test of each domain; all of wiki's test text (Tables 4 and 7), else the first WINDOWS windows."""
    return {g: {s: evaluate.perplexity(model, rows[f"{g}_{s}"][: None if (g, s) == ("wiki", "test") else WINDOWS], precision) for s in splits} for g in groups}


def save(student, folder: Path, stage: Stage, store: Store, found: dict) -> None:
    """Save a compressed model with its tokenizer, and its perplexities and this stage's name on the card."""
    corpus = needed(stage, "corpus")
    tokenizer = tokenizer_of(settings_of(corpus), store.folder(corpus))
    evaluation = {f"perplexity on {domain} {split} text": value for domain, splits in found.items() for split, value in splits.items()}
    student.save_pretrained(folder, tokenizer=tokenizer, evaluation={**evaluation, "made by stage": stage.path})


def decompose(stage: Stage, folder: Path, store: Store) -> dict:
    """The SVD start: compress the teacher, no training."""
    settings, clock = settings_of(stage), time.monotonic()
    teacher = load_model(store.folder(needed(stage, "pretrained", model="teacher")) / "model")
    spec, rows = KroneckerSpec(**settings["compression"]), rows_of(store, stage)
    student = compress(teacher, spec)
    seconds = time.monotonic() - clock
    student.config.provenance["teacher"] = needed(stage, "pretrained", model="teacher").path
    found = perplexities(student, rows, settings["precision"])
    save(student, folder / "model", stage, store, found)
    alone = {"embedding": dataclasses.replace(spec, layers=()), "layers": dataclasses.replace(spec, embedding=False)} if spec.embedding else {}
    parts = {name: perplexities(compress(teacher, part), rows, settings["precision"], splits=("test",)) for name, part in alone.items()}
    return {**describe(student, folder / "model"), "seconds": seconds, "perplexity": found, "alone": parts}


def shapes(stage: Stage, folder: Path, store: Store) -> dict:
    """Table 1 and parameter counts read off models that are really built (without memory for weights), at two sizes."""
    settings, found = settings_of(stage), {}
    model, spec = settings["model"], settings["compression"]
    mini = {"vocab_size": model["vocabulary"], "n_positions": model["context"], "n_embd": model["width"], "n_layer": model["layers"], "n_head": model["heads"], "bos_token_id": 0, "eos_token_id": 0}
    for name, fields in (("paper_size", {}), ("mini_size", mini)):
        layers = GPT2Config(**fields).n_layer
        with torch.device("meta"):
            built = {
                "GPT-2 Small": GPT2LMHeadModel(GPT2Config(**fields)),
                "DistilGPT2": GPT2LMHeadModel(GPT2Config(**{**fields, "n_layer": layers // 2})),
                "KnGPT2": KnGPT2LMHeadModel(KnGPT2Config(**fields, tie_word_embeddings=False, kronecker=spec)),
            }
        found[name] = {title: {**evaluate.shapes(m), "layers": m.config.n_layer, "parameters": count_parameters(m)} for title, m in built.items()}
    return found


OBJECTIVES = {"lm": ("none", None), "kd": ("ilkd", 0.0), "lm_kd": ("ilkd", 1.0)}  # method, factor on α4


def pretrain(stage: Stage, folder: Path, store: Store) -> dict:
    """Light pre-training of the SVD start (§4.2), or one arm of the ablation (§4.4)."""
    settings, rows = settings_of(stage), rows_of(store, stage)
    set_seed(stage["seed"])
    student = load_model(store.folder(needed(stage, "decompose")) / "model")
    method, factor = OBJECTIVES[stage["objective"]]
    alphas = list(settings["training"]["alphas"])
    alphas[3] *= 1.0 if factor is None else factor
    teacher = load_model(store.folder(needed(stage, "pretrained", model="teacher")) / "model") if method == "ilkd" else None
    data = TokenRows(rows["sample" if stage["on"] == "web" else "wiki_train"])
    log, hyper, seconds = run_trainer(student, data, lm_collate, store.scratch(stage), settings, stage["seed"], distillation_of(settings, method, alphas), teacher, json.loads(stage.resources))
    found = perplexities(student, rows, settings["precision"])
    save(student, folder / "model", stage, store, found)
    tokens = hyper["steps"] * hyper["batch_size"] * data.rows.shape[1]
    share = min(1.0, tokens / data.rows.numel())
    corpus_metrics = store.metrics(needed(stage, "corpus"))
    seen = corpus_metrics["sample"] if stage["on"] == "web" else corpus_metrics["wiki"]["train"]
    hyper = {**hyper, "alphas": alphas if method == "ilkd" else [0.0, 0.0, 0.0, 1.0], "context": data.rows.shape[1]}
    return {**describe(student, folder / "model"), "steps": hyper["steps"], "tokens": tokens, "hours": seconds / 3600, "data_bytes": round(seen["bytes"] * share),
            "hardware": device_name(), "hyper": hyper, "log": log, "perplexity": found}  # fmt: skip


def finetune_lm(stage: Stage, folder: Path, store: Store) -> dict:
    """Fine-tuning on the wiki corpus for Table 4."""
    settings, rows = settings_of(stage), rows_of(store, stage)
    set_seed(stage["seed"])
    source = next(i for i in stage.inputs if i.kind in ("pretrained", "pretrain"))
    model = load_model(store.folder(source) / "model")
    ilkd = settings["ilkd"]
    teacher = load_model(store.folder(needed(stage, "pretrained", model="teacher")) / "model") if ilkd else None
    data = TokenRows(rows["wiki_train"])
    log, hyper, seconds = run_trainer(model, data, lm_collate, store.scratch(stage), settings, stage["seed"], distillation_of(settings, "ilkd" if ilkd else "none"), teacher, json.loads(stage.resources))
    found = perplexities(model, rows, settings["precision"], ("wiki",))
    size = store.metrics(needed(stage, "corpus"))["wiki"]["test"]
    return {"hyper": hyper, "log": log, "perplexity": found, "hours": seconds / 3600, "word_perplexity": {"test": evaluate.per_word(found["wiki"]["test"], size["tokens"], size["words"])}}


def glue_data(store: Store, stage: Stage, settings: dict, only: int | None = None):
    """(splits, encoded splits) of the stage's task; `only` keeps one of the two sentences."""
    splits = glue.read_task(store.folder(tasks_of(stage)) / stage["task"], stage["task"])
    if only is not None:
        splits = {name: [{**row, "texts": row["texts"][only : only + 1]} for row in rows] for name, rows in splits.items()}
    tokenizer = tokenizer_of(settings, store.folder(needed(tasks_of(stage), "corpus")) if settings.get("assets") == "" else None)
    return splits, {name: glue.encode(tokenizer, rows, settings["max_length"]) for name, rows in splits.items()}


def train_classifier(stage: Stage, scratch: Path, settings: dict, model, encoded: dict, distillation: DistillationConfig, teacher=None):
    """Fine-tune a classifier on encoded["train"] in batches of similar length."""
    pad_id = model.config.pad_token_id

    def collate(items: list[dict]) -> dict[str, torch.Tensor]:
        return {**evaluate.pad([item["input_ids"] for item in items], pad_id), "labels": torch.tensor([item["label"] for item in items])}

    data = [{"input_ids": ids, "label": label} for ids, label in zip(encoded["train"]["input_ids"], encoded["train"]["label"], strict=True)]
    return run_trainer(model, data, collate, scratch, {**settings, "group_by_length": True}, stage["seed"], distillation, teacher, json.loads(stage.resources))


def finetune_glue(stage: Stage, folder: Path, store: Store) -> dict:
    """One row and one task of Tables 5-7: fine-tune, score on dev, predict test into submission files."""
    settings, task = settings_of(stage), stage["task"]
    set_seed(stage["seed"])
    source = next(i for i in stage.inputs if i.kind in ("pretrained", "pretrain", "decompose", "aligned", "heal"))
    labels = len(glue.TASKS[task].labels)
    model = load_model(store.folder(source) / "model", "glue", labels)
    splits, encoded = glue_data(store, stage, settings)
    guides = [i for i in stage.inputs if i.kind == "finetune_glue"]
    teacher = load_model(store.folder(guides[0]) / "model", "glue", labels) if guides else None
    log, hyper, seconds = train_classifier(stage, store.scratch(stage), settings, model, encoded, distillation_of(settings, settings["method"]), teacher)
    tests = () if stage["row"].startswith("ablation") else glue.TASKS[task].test  # Table 7 is about dev
    answers = {name: evaluate.predict(model, encoded[name], settings["precision"]) for name in (*glue.TASKS[task].dev, *tests)}
    if tests:
        glue.write_submission(folder / "submission", task, {n: answers[n] for n in tests} if len(tests) > 1 else answers[tests[0]])
    if settings["keep_model"]:
        model.save_pretrained(folder / "model")
    return {"hyper": hyper, "log": log, "hours": seconds / 3600, "dev": shortcuts.dev_scores(task, {n: a for n, a in answers.items() if n.startswith("dev")}, splits)}


def twin_check(stage: Stage, folder: Path, store: Store) -> dict:
    """What a task gives away: a random-initialised model, or the teacher with only one of the two sentences."""
    settings, task = settings_of(stage), stage["task"]
    set_seed(stage["seed"])
    labels = len(glue.TASKS[task].labels)
    model = load_model(store.folder(needed(stage, "pretrained", model="teacher")) / "model", "glue", labels)
    if stage["check"] == "random":
        model = GPT2ForSequenceClassification(model.config)
    only = {"random": None, "first_sentence": 0, "second_sentence": 1}[stage["check"]]
    splits, encoded = glue_data(store, stage, settings, only)
    _, hyper, _ = train_classifier(stage, store.scratch(stage), settings, model, encoded, distillation_of(settings, "none"))
    answers = {name: evaluate.predict(model, encoded[name], settings["precision"]) for name in encoded if name.startswith("dev")}
    return {"hyper": hyper, "dev": shortcuts.dev_scores(task, answers, splits)}


def score(stage: Stage, folder: Path, store: Store) -> dict:
    """Table 6: submission files, written earlier, zipped for the server and, where the test labels were kept aside, scored."""
    labels, metrics = store.folder(tasks_of(stage)), {}
    for item in stage.inputs:
        if item.kind == "finetune_glue":
            source = store.folder(item) / "submission"
            shutil.copytree(source, folder / "submission", dirs_exist_ok=True)
            if (labels / item["task"] / glue.LABELS_FILE).is_file():  # GLUE's server has those of the real tasks
                metrics[item["task"]] = glue.grade(source, item["task"], labels / item["task"])
    _, filled = glue.zip_submission(folder / "submission")
    return {"tasks": metrics, "filled_with_a_constant": filled}


WORK = {"glue": real_glue} | {f.__name__: f for f in (corpus, twins, pretrained, decompose, shapes, pretrain, finetune_lm, finetune_glue, twin_check, score)}
