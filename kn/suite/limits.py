"""What a setting may be: the words and ranges that `--set` takes, and which settings must fit one another.

Refused here in one line, before hours are spent, is what a stage would fail on, or worse: what it would take as something else.
"""

from __future__ import annotations

TASKS = ("cola", "rte", "mrpc", "sst2", "mnli", "qnli", "qqp")
WORDS = {  # by the last part of the key; of a tuple each entry
    "direction": ("student_teacher", "teacher_student"), "hidden_point": ("c_proj", "block"), "scale": ("sqrt", "unit_b"), "compression.layers": ("odd", "even", "all"),
    "schedule": ("linear", "cosine", "constant", "constant_with_warmup"), "optimizer": ("adamw_torch_fused", "adamw_torch", "adafactor", "sgd"), "precision": ("bf16", "fp32"),
    "activation": ("gelu_pytorch_tanh", "gelu_new", "gelu", "relu", "silu"), "tasks": TASKS, "checks": ("random", "first_sentence", "second_sentence"),
}  # fmt: skip
RANGES = {  # least and greatest; sizes far beyond any machine are slips of the keyboard
    "batch_size": (1, 2**20), "batch": (1, 2**20), "max_length": (3, 2**17), "factor": (1, 2**16), "rank": (1, 2**16), "processes": (1, 1024), "vocabulary": (256, 2**24), "context": (2, 2**17),
    "width": (1, 2**16), "model.layers": (1, 1024), "heads": (1, 1024), "dropout": (0, 0.99), "warmup": (0, 1), "recipe.warmup": (0, 2**31 - 1), "epochs": (0, 1e6), "sample": (1e-9, 1),
    "web_shares": (0, 1), "wiki_shares": (0, 1), "kd_weight": (0, 1), "temperature": (1e-6, 1e6), "calibration": (1, 2**31 - 1), "shares": (1e-6, 1000),
    "glue_shares": (0, 1000), "share": (1e-6, 1000), "seeds": (1, 999),
}  # fmt: skip
WHOLE = (0, 2**31 - 1)  # any other whole number


def _of(table: dict, key: str):
    """The entry for a key, by its last two parts or its last; the recipes of whole models count their warm-up in steps."""
    group, _, name = key.rpartition(".")
    group = "recipe" if group in ("teacher", "baseline") else group
    return table.get(f"{group}.{name}", table.get(name))


def check(key: str, text: str, value: object) -> None:
    """ValueError where one parsed value is none that this key may have; `text` is what was written."""
    words = _of(WORDS, key)
    if words and value not in words:
        raise ValueError(f"--set {key}={text}: allowed are {', '.join(words)}")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    if not 0 <= value < float("inf"):
        raise ValueError(f"--set {key}={text}: a finite number that is not negative wanted")
    low, high = _of(RANGES, key) or (WHOLE if isinstance(value, int) else (0, float("inf")))
    if value < low:
        raise ValueError(f"--set {key}={text}: at least {low:g} wanted")
    if value > high:
        raise ValueError(f"--set {key}={text}: at most {high:,} wanted")


def together(profile) -> None:
    """ValueError where settings of a profile do not fit one another."""
    for name in ("pretrain", "ablation", "finetune_lm", "finetune_glue"):
        training = getattr(profile, name)
        if not training.max_steps and not training.epochs:
            raise ValueError(f"--set {name}.epochs=0 and {name}.max_steps=0 leave no step to train: set one of them")
    if profile.model.width % profile.model.heads:
        raise ValueError(f"--set model.heads={profile.model.heads} does not divide model.width={profile.model.width}")
    for name in ("web_shares", "wiki_shares"):
        if sum(getattr(profile.text, name)) >= 1:
            raise ValueError(f"--set text.{name}: the shares of valid and test add up to {sum(getattr(profile.text, name)):g}, nothing is left to train on")
    for name in ("web", "wiki"):
        if profile.source == "documentation" and not getattr(profile.text, name):
            raise ValueError(f"--set text.{name}: at least one package wanted")
