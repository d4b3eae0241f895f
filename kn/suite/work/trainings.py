"""Stages of the paper's trainings: light pre-training, fine-tuning on the wiki corpus and on GLUE."""

from functools import partial

import torch
from transformers import GPT2ForSequenceClassification, set_seed

from kn.data import glue, glue_baselines, glue_submission
from kn.suite import evaluate
from kn.suite.devices import device_name
from kn.suite.training import distillation_config, run_training, token_row_batch
from kn.suite.work.context import StageContext
from kn.suite.work.datasets import encoded_task
from kn.suite.work.pretrained import load_model, load_teacher, perplexities, save_compressed

OBJECTIVES = {"lm": ("none", 1.0), "kd": ("ilkd", 0.0), "lm_kd": ("ilkd", 1.0)}  # method, factor on α4


def train_lm(context: StageContext, model, rows, settings: dict, distillation, teacher=None):
    """The TrainingResult of a language model on token rows (n, context)."""
    return run_training(model, range(len(rows)), partial(token_row_batch, rows), context.scratch, settings,
                        context.stage["seed"], distillation, teacher, context.resources)


def train_classifier(context: StageContext, model, encoded: dict, distillation, teacher=None):
    """The TrainingResult of a classifier on encoded["train"], in batches of similar length."""
    settings, train = {**context.settings, "group_by_length": True}, encoded["train"]

    def collate(items: list[dict]) -> dict[str, torch.Tensor]:
        inputs = evaluate.pad([item["input_ids"] for item in items], model.config.pad_token_id)
        return {**inputs, "labels": torch.tensor([item["label"] for item in items])}

    rows = [{"input_ids": i, "label": y} for i, y in zip(train["input_ids"], train["label"], strict=True)]
    return run_training(model, rows, collate, context.scratch, settings, context.stage["seed"], distillation,
                        teacher, context.resources)


def predictions(context: StageContext, model, encoded: dict, splits) -> dict[str, list[int]]:
    """{split: class numbers}."""
    precision = context.settings["precision"]
    return {split: evaluate.predict(model, encoded[split]["input_ids"], precision) for split in splits}


def light_pretraining(context: StageContext) -> dict:
    """Light pre-training of the SVD start (§3.3, §4.2), or one objective of the ablation (§4.4)."""
    settings, stage, rows = context.settings, context.stage, context.rows
    set_seed(stage["seed"])
    student = load_model(context.input_folder("decompose") / "model")
    method, factor = OBJECTIVES[stage["objective"]]
    *alphas, cross_entropy = settings["training"]["alphas"]
    alphas.append(cross_entropy * factor)
    teacher = load_teacher(context) if method == "ilkd" else None
    web, config = stage["on"] == "web", distillation_config(settings, method, alphas)
    data = rows["sample" if web else "wiki_train"]
    result = train_lm(context, student, data, settings, config, teacher)
    alphas = alphas if method == "ilkd" else [0.0, 0.0, 0.0, 1.0]
    hyper = {**result.hyperparameters, "alphas": alphas, "context": data.shape[1]}
    tokens = hyper["steps"] * hyper["batch_size"] * data.shape[1]
    corpus = context.store.metrics(context.stage.input("corpus"))
    data_bytes = (corpus["sample"] if web else corpus["wiki"]["train"])["bytes"]
    return {**save_compressed(context, student), "steps": hyper["steps"], "tokens": tokens,
            "hours": result.seconds / 3600, "data_bytes": round(data_bytes * min(1.0, tokens / data.numel())),
            "hardware": device_name(), "hyper": hyper, "log": result.log}


def finetune_lm(context: StageContext) -> dict:
    """Table 4: fine-tuning on the wiki corpus."""
    settings, rows, ilkd = context.settings, context.rows, context.settings["ilkd"]
    set_seed(context.stage["seed"])
    source = context.input_folder("pretrain") if ilkd else context.input_folder("pretrained", "pretrain")
    model = load_model(source / "model")
    teacher = load_teacher(context) if ilkd else None
    config = distillation_config(settings, "ilkd" if ilkd else "none")
    result = train_lm(context, model, rows["wiki_train"], settings, config, teacher)
    found = perplexities(model, rows, settings["precision"], ("wiki",))
    size = context.store.metrics(context.stage.input("corpus"))["wiki"]["test"]
    per_word = evaluate.word_perplexity(found["wiki"]["test"], size["tokens"], size["words"])
    return {"hyper": result.hyperparameters, "log": result.log, "perplexity": found,
            "hours": result.seconds / 3600, "word_perplexity": {"test": per_word}}


def finetune_glue(context: StageContext) -> dict:
    """Tables 5-7: a model fine-tuned on one task, scored on dev; predictions for test as submission files."""
    settings, stage = context.settings, context.stage
    task, teacher = glue.TASKS[stage["task"]], None
    set_seed(stage["seed"])
    source = context.input_folder("pretrained", "pretrain", "decompose", "aligned", "heal")
    model = load_model(source / "model", len(task.labels))
    splits, encoded = encoded_task(context)
    if any(item.kind == "finetune_glue" for item in stage.inputs):
        teacher = load_model(context.input_folder("finetune_glue") / "model", len(task.labels))
    config = distillation_config(settings, settings["method"])
    result = train_classifier(context, model, encoded, config, teacher)
    dev = predictions(context, model, encoded, task.dev)
    if not stage["row"].startswith("ablation"):  # Table 7 is about dev
        test = predictions(context, model, encoded, task.test)
        answers = test if len(test) > 1 else test[task.test[0]]
        glue_submission.write_submission(context.folder / "submission", task.name, answers)
    if settings["keep_model"]:
        model.save_pretrained(context.folder / "model")
    return {"hyper": result.hyperparameters, "log": result.log, "hours": result.seconds / 3600,
            "dev": glue_baselines.dev_scores(task.name, dev, splits)}


def shortcut_check(context: StageContext) -> dict:
    """Scores of a task without pretraining ("random"), or with only one of the two texts."""
    task, check = glue.TASKS[context.stage["task"]], context.stage["check"]
    set_seed(context.stage["seed"])
    model = load_model(context.input_folder("pretrained", model="teacher") / "model", len(task.labels))
    if check == "random":
        model = GPT2ForSequenceClassification(model.config)
    only_text = {"random": None, "first_sentence": 0, "second_sentence": 1}[check]
    splits, encoded = encoded_task(context, only_text)
    result = train_classifier(context, model, encoded, distillation_config(context.settings, "none"))
    dev = predictions(context, model, encoded, task.dev)
    return {"hyper": result.hyperparameters, "dev": glue_baselines.dev_scores(task.name, dev, splits)}
