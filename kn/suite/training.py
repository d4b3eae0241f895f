"""One training run with transformers' Trainer: arguments, log, checkpoints that survive a killed process.

A process can be killed while it writes a checkpoint, and a disk can turn a bit in one. Either would end in an
error at every new start, or in other numbers without any error. So a checkpoint counts once its manifest is
written, and only while every byte is the one of the manifest.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from kn.distill import DistillationConfig, DistillTrainer
from kn.files import file_sha256, json_sha256

CHECKPOINT_STEPS = 500  # a longer run is saved about every so many steps
LOG_LINES = 25  # of a run
LOG_KEYS = ("step", "loss", "embedding", "attention", "hidden", "cross_entropy", "logits", "learning_rate")
MANIFEST = "checkpoint_manifest.json"


def write_checkpoint_manifest(folder: Path, seconds: float) -> None:
    """Declare a checkpoint complete: size and sha256 of its files, and the seconds of training up to it."""
    paths = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != MANIFEST]
    files = {p.relative_to(folder).as_posix(): [p.stat().st_size, file_sha256(p)] for p in paths}
    manifest = {"seconds": seconds, "files": files}
    part = folder.with_name(f"{folder.name}.part")
    part.write_text(json.dumps({**manifest, "digest": json_sha256(manifest)}))
    part.replace(folder / MANIFEST)


def checkpoint_seconds(folder: Path) -> float | None:
    """Seconds of training up to a checkpoint; None where it is incomplete or damaged."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        intact = manifest.pop("digest") == json_sha256(manifest) and all(
            (folder / name).stat().st_size == size and file_sha256(folder / name) == digest
            for name, (size, digest) in manifest["files"].items()
        )
        return float(manifest["seconds"]) if intact else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest intact checkpoint in a folder; damaged ones are removed."""
    found = [p for p in folder.glob("checkpoint-*") if p.is_dir() and re.fullmatch(r"checkpoint-\d+", p.name)]
    for checkpoint in sorted(found, key=lambda p: -int(p.name.rpartition("-")[2])):
        if checkpoint_seconds(checkpoint) is not None:
            return checkpoint
        shutil.rmtree(checkpoint, ignore_errors=True)
    return None


class CheckpointCallback(TrainerCallback):
    """Writes the manifest of each checkpoint, with the seconds of training over all resumptions."""

    def __init__(self, folder: Path, resumed_from: Path | None):
        self.folder, self.started = folder, time.monotonic()
        self.seconds_before = checkpoint_seconds(resumed_from) or 0.0 if resumed_from else 0.0

    def seconds(self) -> float:
        """Seconds of training so far, including those before the checkpoint."""
        return self.seconds_before + time.monotonic() - self.started

    def on_save(self, _, state, *__, **___):
        if state.is_world_process_zero:
            write_checkpoint_manifest(self.folder / f"checkpoint-{state.global_step}", self.seconds())


class TokenRows(torch.utils.data.Dataset):
    """Token rows (n, context) as language-model examples."""

    def __init__(self, rows: torch.Tensor):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        row = self.rows[index].long()
        return {"input_ids": row, "labels": row}


def collate_token_rows(items: list[dict]) -> dict[str, torch.Tensor]:
    """Stack token rows of one length to (b, context)."""
    return {key: torch.stack([item[key] for item in items]) for key in items[0]}


def distillation_config(settings: dict, method: str, alphas=None) -> DistillationConfig:
    """A stage's distillation settings for a method: "none", "vanilla" or "ilkd"."""
    r = settings["readings"]
    alphas = tuple(alphas or settings["training"]["alphas"])
    return DistillationConfig(
        method, alphas, r["direction"], r["hidden_point"], r["logit_term"], r["kd_weight"], r["temperature"]
    )


def training_arguments(
    settings: dict, steps: int, seed: int, folder: Path, resources: dict
) -> TrainingArguments:
    """TrainingArguments of a run; `resources` changes speed and memory, but no result.

    Raises ValueError where the batch cannot be split over processes or into micro-batches.
    """
    training = settings["training"]
    batch, processes = training["batch_size"], int(os.environ.get("WORLD_SIZE", "1"))  # torchrun's count
    if batch % processes:
        raise ValueError(f"hardware.processes {processes} does not divide the batch of {batch}")
    process_batch = batch // processes
    micro = resources.get("micro_batch") or process_batch
    if process_batch % micro:
        over = f" over {processes} processes" if processes > 1 else ""
        raise ValueError(f"hardware.micro_batch {micro} does not divide the batch of {batch}{over}")
    logging_steps = max(1, steps // LOG_LINES)
    save_steps = math.ceil(CHECKPOINT_STEPS / logging_steps) * logging_steps  # no logged mean is cut in two
    cuda = torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(folder), max_steps=steps, seed=seed,
        per_device_train_batch_size=micro, gradient_accumulation_steps=process_batch // micro,
        learning_rate=training["learning_rate"], lr_scheduler_type=training["schedule"],
        warmup_steps=round(training["warmup"] * steps), optim=training["optimizer"],
        weight_decay=training["weight_decay"], max_grad_norm=training["clip"],
        bf16=settings["precision"] == "bf16", use_cpu=not cuda, dataloader_pin_memory=cuda,
        ddp_backend="gloo" if processes > 1 and not cuda else None,
        activation_checkpointing=bool(resources.get("checkpointing")),
        train_sampling_strategy="group_by_length" if settings.get("group_by_length") else "random",
        remove_unused_columns=False,
        save_strategy="steps" if steps > save_steps else "no", save_steps=save_steps,
        save_total_limit=2,  # the one before, until the new one has its manifest
        logging_steps=logging_steps, logging_nan_inf_filter=False, report_to="none", disable_tqdm=True,
    )


@dataclass(frozen=True)
class TrainingJob:
    """Everything one training run depends on; `resources` (micro_batch, checkpointing) changes no result."""

    model: torch.nn.Module
    dataset: Any  # a torch Dataset or a list
    collate: Callable[[list], dict[str, torch.Tensor]]
    scratch: Path  # checkpoints go here
    settings: dict  # of the stage: training, readings, precision; group_by_length
    seed: int
    distillation: DistillationConfig
    teacher: torch.nn.Module | None = None
    resources: dict = field(default_factory=dict)


@dataclass(frozen=True)
class TrainingResult:
    """Log lines with LOG_KEYS, the hyper-parameters as they were used, and seconds over all resumptions."""

    log: list[dict]
    hyperparameters: dict
    seconds: float


def run_training(job: TrainingJob) -> TrainingResult:
    """Train `job.model` in place, from the last intact checkpoint in `job.scratch` if there is one.

    Raises MemoryError where a GPU's memory does not suffice, with what to set, and FloatingPointError where
    loss or weights are not finite.
    """
    training, distillation = job.settings["training"], job.distillation
    folder = job.scratch / "trainer"
    steps = training["max_steps"] or math.ceil(len(job.dataset) / training["batch_size"] * training["epochs"])
    arguments = training_arguments(job.settings, steps, job.seed, folder, job.resources)
    trainer = DistillTrainer(
        model=job.model, args=arguments, train_dataset=job.dataset, data_collator=job.collate,
        distillation=distillation, teacher=job.teacher,
    )
    trainer.remove_callback(PrinterCallback)
    checkpoint = latest_checkpoint(folder)
    clock = CheckpointCallback(folder, checkpoint)
    trainer.add_callback(clock)
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except torch.OutOfMemoryError:
        rows = arguments.per_device_train_batch_size
        remedy = "--set hardware.checkpointing=true recomputes instead of keeping"
        if rows > 1:
            batch = training["batch_size"]
            remedy = f"--set hardware.micro_batch={rows // 2} keeps the effective batch of {batch}"
        raise MemoryError(f"out of GPU memory with {rows} rows at a time: {remedy}") from None
    seconds = clock.seconds()
    if trainer.is_world_process_zero():
        shutil.rmtree(folder, ignore_errors=True)
    lines = [line for line in trainer.state.log_history if "loss" in line]
    log = [{k: line[k] for k in LOG_KEYS if k in line} for line in lines]
    not_finite = [line["step"] for line in log if not math.isfinite(line["loss"])]
    if not all(parameter.isfinite().all() for parameter in job.model.parameters()):
        not_finite.append(steps)  # the last steps may be in no line of the log
    if not_finite:
        raise FloatingPointError(
            f"the loss is not finite at step {not_finite[0]}: lower the learning rate "
            f"({training['learning_rate']}) or use float32"
        )
    hyperparameters = {
        **training, "steps": steps, "method": distillation.method, "direction": distillation.direction,
        "hidden_point": distillation.hidden_point, "precision": job.settings["precision"], "seed": job.seed,
    }
    return TrainingResult(log, hyperparameters, seconds)
