"""Tables 1-7 of the paper: each function fills a TableBuilder with the cells of its table."""

import math
import re
import statistics
from operator import itemgetter
from typing import Any

from kn.paper import number_of
from kn.report.labels import ABLATION, GLUE_ROWS, MODELS, TASKS
from kn.report.metrics import (
    SeedValues,
    after_ablation,
    average,
    before_finetuning,
    glue_score,
    informative,
    select_metric,
    simple_baselines,
)
from kn.report.table_builder import COUNT, TableBuilder

ALPHAS = {"α1": 0, "α2": 1, "α3": 2, "α4": 3}
WITHOUT_HEAD = "parameters.without_head"


def configuration(builder: TableBuilder, records: list[dict], profile: str) -> None:
    """Table 1: shapes and parameter counts of models at the paper's size and at the profile's."""
    columns = {"embedding": "Embedding", "qkv": "Q, K, V", "ffn": "FFN", "out_proj": "Output projection",
               WITHOUT_HEAD: "Parameters without the output embedding", "parameters.total": "Parameters"}
    for size, suffix in {"paper_size": "", "mini_size": f", {profile} size"}.items():
        if suffix and (profile == "paper" or not select_metric(records, size, "shapes").values):
            continue
        for name in MODELS.values():
            model = select_metric(records, f"{size}.{name}", "shapes")
            for key, column in columns.items():
                cell, shape = builder.paper.get((name + suffix, column)), model.get(key)
                verdict = _shape_verdict(shape, cell) if cell is not None else ""
                metric = "count" if column.startswith("Parameters") else "shape"
                builder.add(name + suffix, column, shape, metric=metric, verdict=verdict)


def _shape_verdict(shape: SeedValues, cell: Any) -> str:
    """Compares the sizes alone: A 384×768 and A : 384× 768 are the same shape."""
    sizes = {tuple(re.findall(r"\d+", value)) for value in shape.values.values()}
    erratum = re.match(r"erratum: (\d+) stands for (\d+)", cell.note)
    if sizes == {tuple(re.findall(r"\d+", cell.value))}:
        return "as printed"
    if erratum and sizes == {tuple(re.findall(r"\d+", cell.value.replace(*erratum.groups())))}:
        return "erratum"
    return "differs"


def hyperparameters(builder: TableBuilder, records: list[dict], profile: str) -> None:
    """Table 2: the hyper-parameters that the training runs used; those the paper does not print come last."""
    by_task = [select_metric(records, "hyper", "finetune_glue", row="student_ilkd", task=task)
               for task in TASKS]
    glue = {(task, seed): hyper for task, found in zip(TASKS, by_task, strict=True)
            for seed, hyper in found.values.items()}
    rows = {"Pre-training": select_metric(records, "hyper", "pretrain", on="web", objective="lm_kd"),
            "Fine-tuning": SeedValues(glue, [path for found in by_task for path in found.stages]),
            "Fine-tuning on WikiText-103": select_metric(records, "hyper", "finetune_lm", model="student")}
    names = {"batch_size": "Batch size", "learning_rate": "Learning rate"}
    keys = dict.fromkeys(key for found in rows.values() for hyper in found.values.values() for key in hyper)
    for row, found in rows.items():
        settings = {column: found.get(key) for key, column in names.items()}
        settings |= {column: found.get("alphas").map(itemgetter(index)) for column, index in ALPHAS.items()}
        more = [key for key in keys if key not in (*names, "alphas")]
        settings |= {key.replace("_", " ").capitalize(): found.get(key) for key in more}
        for column, setting in settings.items():
            values, cell, verdict = _joined(setting), builder.paper.get((row, column)), ""
            if cell is not None:
                same = all(isinstance(value, int | float) and math.isclose(value, float(cell.value))
                           for value in values.values.values())
                verdict = "as printed" if same else f"{profile}'s own"
            if values.values or cell is not None:
                builder.add(row, column, values, metric="hyper-parameter", verdict=verdict)


def _joined(found: SeedValues) -> SeedValues:
    """A setting that all runs share as one value; settings that differ, joined as text."""
    values = list(dict.fromkeys(", ".join(map(str, value)) if isinstance(value, list) else value
                                for value in found.values.values()))
    shown = values[0] if len(values) == 1 else " / ".join(map(str, values))
    return SeedValues({None: shown} if values else {}, found.stages[:1])


def cost(builder: TableBuilder, records: list[dict], profile: str) -> None:
    """Table 3: parameters, hours, hardware, bytes and tokens behind each model."""

    def row(name: str, path: str, stage: str, student_path: str = "", scale: float = 1, metric: str = "",
            unit: str = "") -> None:
        """The metric of both pretrained models, and of the student's SVD start or pre-training."""
        fields = {} if stage == "decompose" else {"on": "web", "objective": "lm_kd"}
        found = [select_metric(records, path, "pretrained", model=model) for model in ("teacher", "baseline")]
        found.append(select_metric(records, student_path or path, stage, **fields))
        for column, values in zip(MODELS.values(), found, strict=True):
            builder.add(name, column, values if scale == 1 else values.map(lambda v: v * scale), metric, unit)

    row("Parameters*", WITHOUT_HEAD, "decompose", scale=1e-6)
    row("Training time (hrs)", "hours", "pretrain")
    row("Hardware", "hardware", "pretrain", "provenance.device", metric="device")
    row("Dataset size (GB)", "data_bytes", "pretrain", scale=1e-9)
    for column in MODELS.values():
        count = select_metric(records, f"paper_size.{column}.{WITHOUT_HEAD}", "shapes")
        full = count.map(lambda value: value / 1e6)
        paper = number_of(builder.paper["Parameters*", column].value)
        verdict = "as printed" if all(abs(value - paper) < 1 for value in full.values.values()) else "differs"
        builder.add("Parameters* at the paper's size", column, full, COUNT, "M", verdict, paper)
    with_head = "Parameters with the output embedding"
    row(with_head, "parameters.total", "decompose", scale=1e-6, metric="parameters", unit="M")
    for column in MODELS.values():
        total = select_metric(records, f"paper_size.{column}.parameters.total", "shapes")
        builder.add(f"{with_head} at the paper's size", column, total.map(lambda value: value * 1e-6),
                    "parameters", "M")
    row("Size on disk", "bytes", "decompose", scale=1e-6, metric="weights", unit="MB")
    row("Tokens seen", "tokens", "pretrain", scale=1e-6, metric="tokens", unit="M")
    row("Steps", "steps", "pretrain", metric="steps")


def perplexity(builder: TableBuilder, records: list[dict], profile: str) -> None:
    """Table 4: perplexity after fine-tuning on WikiText-103, and before it."""
    for row, path, metric in (
        ("Perplexity", "perplexity.wiki.test", ""),
        ("Perplexity, validation", "perplexity.wiki.valid", "validation perplexity"),
        ("Perplexity per word", "word_perplexity.test", "test perplexity per word"),
    ):
        for model, column in MODELS.items():
            values = select_metric(records, path, "finetune_lm", model=model)
            builder.add(row, column, values, metric, "perplexity")
    for model, column in MODELS.items():
        values = before_finetuning(records, model)
        builder.add("Perplexity before this training", column, values, "test perplexity", "perplexity")


def glue(builder: TableBuilder, records: list[dict], profile: str) -> None:
    """Table 5 (development sets) or 6 (test sets): scores, averages and, in Table 5, the simple baselines."""
    split, known = "dev" if builder.table == 5 else "test", informative(records)
    if split == "test" and profile == "paper":
        builder.missing = "server only"  # hidden labels: the submission files are in the score stages
    verdicts = {task: "" if task in known else "uninformative" for task in TASKS}
    more_metrics = []
    for key, row in GLUE_ROWS.items():
        for task, column in TASKS.items():
            builder.add(row, column, glue_score(records, key, task, split), verdict=verdicts[task])
            scores = select_metric(records, split, "finetune_glue", row=key, task=task)
            names = dict.fromkeys(name for metrics in scores.values.values() for name in metrics)
            more_metrics += [(row, column, scores.get(name), name, "%", verdicts[task], None)
                             for name in names if name not in ("headline", builder.paper[row, column].metric)]
        stages = select_metric(records, f"{split}.headline", "finetune_glue", row=key).stages
        means = [average(records, key, split, chosen) for chosen in (TASKS, known)]
        overall, chosen = (SeedValues(mean, stages if mean else []) for mean in means)
        printed = [float(builder.paper[row, TASKS[task]].value) for task in known]
        paper = round(statistics.fmean(printed), 2) if printed else None
        builder.add(row, "Average", overall)
        builder.add(row, "Average (informative)", chosen, "mean of informative tasks", "%", paper=paper)
    if split == "dev" and profile != "paper":
        baselines = {task: simple_baselines(records, task) for task in TASKS}
        for row in baselines["cola"]:
            for task, column in TASKS.items():
                metric = builder.paper["GPT-2 Small", column].metric
                builder.add(row, column, baselines[task][row], metric, "%", verdicts[task])
    for cell in more_metrics:
        builder.add(*cell)


def ablation(builder: TableBuilder, records: list[dict], profile: str) -> None:
    """Table 7: perplexity and MNLI after pre-training with LM, KD and both, and of the SVD start."""
    verdict = "" if "mnli" in informative(records) else "uninformative"
    mnli = {(key, metric): select_metric(records, f"dev.{metric}", "finetune_glue", row=f"ablation_{key}",
                                         task="mnli")
            for key in ABLATION for metric in ("f1", "headline")}
    for key, row in ABLATION.items():
        builder.add(row, "Wikitext-103 (pp.)", after_ablation(records, key))
        builder.add(row, "MNLI (f1)", mnli[key, "f1"], verdict=verdict)
    for key, row in ABLATION.items():
        for column, path, metric in (
            ("Wikitext-103, validation (pp.)", "perplexity.wiki.valid", "validation perplexity"),
            ("OpenWebText (pp.)", "perplexity.web.test", "test perplexity"),
        ):
            builder.add(row, column, after_ablation(records, key, path), metric, "perplexity")
        builder.add(row, "MNLI (accuracy)", mnli[key, "headline"], "accuracy", "%", verdict)
    for part in ("layers", "embedding"):  # only this part replaced by its SVD start
        values = select_metric(records, f"alone.{part}.wiki.test", "decompose")
        builder.add(f"{ABLATION['none']}, {part} alone", "Wikitext-103 (pp.)", values, "test perplexity",
                    "perplexity")
