"""One training run with transformers' Trainer: arguments, log, checkpoints that survive a killed process.

A process can be killed while it writes a checkpoint, and a disk can turn a bit in one: a checkpoint counts
once its manifest is written, and only while every byte is the one of the manifest."""

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from kn.distill import DistillationConfig, DistillTrainer
from kn.files import file_records, file_sha256, json_sha256, write_atomic

CHECKPOINT_STEPS = 500  # a longer run is saved about every so many steps
LOG_LINES = 25  # of a run
LOG_KEYS = ("step", "loss", "embedding", "attention", "hidden", "cross_entropy", "logits", "learning_rate")
MANIFEST = "checkpoint_manifest.json"


def write_checkpoint_manifest(folder: Path, seconds: float) -> None:
    """Declare a checkpoint complete: size and sha256 of its files, and the seconds of training up to it."""
    (folder / MANIFEST).unlink(missing_ok=True)
    manifest = {"seconds": seconds, "files": file_records(folder)}
    write_atomic(folder / MANIFEST, json.dumps({**manifest, "digest": json_sha256(manifest)}))


def checkpoint_seconds(folder: Path) -> float | None:
    """Seconds of training up to a checkpoint; None where it is incomplete or damaged."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        intact = manifest.pop("digest") == json_sha256(manifest) and all(
            (folder / name).stat().st_size == size and file_sha256(folder / name) == digest
            for name, (size, digest) in manifest["files"].items()
        )
        return float(manifest["seconds"]) if intact else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest intact checkpoint in a folder; damaged ones are removed."""
    suffixes = [path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*")]
    for step in sorted((int(suffix) for suffix in suffixes if suffix.isdecimal()), reverse=True):
        checkpoint = folder / f"checkpoint-{step}"
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


def token_row_batch(rows: torch.Tensor, indices: list[int]) -> dict[str, torch.Tensor]:
    """Language-model batch of the token rows (n, context) at `indices`: input_ids and labels (b, context)."""
    ids = rows[indices].long()
    return {"input_ids": ids, "labels": ids}


def distillation_config(settings: dict, method: str, alphas=None) -> DistillationConfig:
    """A stage's distillation settings for a method: "none", "vanilla" or "ilkd"."""
    names = ("direction", "hidden_point", "logit_term", "kd_weight", "temperature")
    readings = {name: settings["readings"][name] for name in names}
    return DistillationConfig(method, tuple(alphas or settings["training"]["alphas"]), **readings)


def training_arguments(settings: dict, steps: int, seed: int, folder: Path, resources: dict):
    """TrainingArguments of a run; ValueError where processes or micro-batches do not divide the batch."""
    training = settings["training"]
    batch, processes = training["batch_size"], int(os.environ.get("WORLD_SIZE", "1"))  # torchrun's count
    if batch % processes:
        raise ValueError(f"hardware.processes {processes} does not divide the batch of {batch}")
    process_batch = batch // processes
    micro = resources.get("micro_batch") or process_batch
    if process_batch % micro:
        over = f" over {processes} processes" if processes > 1 else ""
        raise ValueError(f"hardware.micro_batch {micro} does not divide the batch of {batch}{over}")
    cuda, logging_steps = torch.cuda.is_available(), max(1, steps // LOG_LINES)
    save_steps = math.ceil(CHECKPOINT_STEPS / logging_steps) * logging_steps  # no logged mean is cut in two
    return TrainingArguments(
        output_dir=str(folder), max_steps=steps, seed=seed, per_device_train_batch_size=micro,
        gradient_accumulation_steps=process_batch // micro, learning_rate=training["learning_rate"],
        lr_scheduler_type=training["schedule"], warmup_steps=round(training["warmup"] * steps),
        optim=training["optimizer"], weight_decay=training["weight_decay"], max_grad_norm=training["clip"],
        bf16=settings["precision"] == "bf16", use_cpu=not cuda, dataloader_pin_memory=cuda,
        ddp_backend="gloo" if processes > 1 and not cuda else None,
        activation_checkpointing=bool(resources.get("checkpointing")), remove_unused_columns=False,
        train_sampling_strategy="group_by_length" if settings.get("group_by_length") else "random",
        save_strategy="steps" if steps > save_steps else "no", save_steps=save_steps,
        save_total_limit=2,  # the one before, until the new one has its manifest
        logging_steps=logging_steps, logging_nan_inf_filter=False, report_to="none", disable_tqdm=True,
    )


@dataclass(frozen=True)
class TrainingResult:
    """Log lines with LOG_KEYS, the hyper-parameters as they were used, and seconds over all resumptions."""

    log: list[dict]
    hyperparameters: dict
    seconds: float


def run_training(
    model, dataset: Sequence, collate: Callable[[list], dict], scratch: Path, settings: dict, seed: int,
    distillation: DistillationConfig, teacher=None, resources: dict | None = None,
) -> TrainingResult:
    """Train `model` in place, from the last intact checkpoint in `scratch` if there is one.
    `collate` makes a batch of items of `dataset`; `resources` (micro_batch, checkpointing) changes no result.
    Raises MemoryError with what to set on a GPU, FloatingPointError where loss or weights are not finite."""
    training, folder = settings["training"], scratch / "trainer"
    steps = training["max_steps"] or math.ceil(len(dataset) / training["batch_size"] * training["epochs"])
    arguments = training_arguments(settings, steps, seed, folder, resources or {})
    trainer = DistillTrainer(
        model=model, args=arguments, train_dataset=dataset, data_collator=collate, distillation=distillation,
        teacher=teacher,
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
            kept = f"keeps the effective batch of {training['batch_size']}"
            remedy = f"--set hardware.micro_batch={rows // 2} {kept}"
        raise MemoryError(f"out of GPU memory with {rows} rows at a time: {remedy}") from None
    seconds = clock.seconds()
    if trainer.is_world_process_zero():
        shutil.rmtree(folder, ignore_errors=True)
    history = trainer.state.log_history
    log = [{key: line[key] for key in LOG_KEYS if key in line} for line in history if "loss" in line]
    not_finite = [line["step"] for line in log if not math.isfinite(line["loss"])]
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        not_finite.append(steps)  # the last steps may be in no line of the log
    if not_finite:
        remedy = f"lower the learning rate ({training['learning_rate']}) or use float32"
        raise FloatingPointError(f"the loss is not finite at step {not_finite[0]}: {remedy}")
    hyperparameters = {
        **training, "steps": steps, "method": distillation.method, "direction": distillation.direction,
        "hidden_point": distillation.hidden_point, "precision": settings["precision"], "seed": seed,
    }
    return TrainingResult(log, hyperparameters, seconds)
