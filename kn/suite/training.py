"""One training run with transformers' Trainer: its arguments, its checkpoints, its log."""

from __future__ import annotations

import math
import os
import shutil
import time
from pathlib import Path

import torch
from transformers import TrainerCallback, TrainingArguments

from kn.distill import DistillationConfig, DistillTrainer
from kn.suite import checkpoints

CHECKPOINT = 500  # a run of more steps is saved about every so many, and goes on from there when it was stopped
LOGGED = ("step", "loss", "embedding", "attention", "hidden", "cross_entropy", "logits", "learning_rate")


class TokenRows(torch.utils.data.Dataset):
    """Rows of token ids as language-model examples."""

    def __init__(self, rows: torch.Tensor):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        row = self.rows[index].long()
        return {"input_ids": row, "labels": row}


def lm_collate(items: list[dict]) -> dict[str, torch.Tensor]:
    """Stack equally long token rows."""
    return {key: torch.stack([item[key] for item in items]) for key in items[0]}


def distillation_of(settings: dict, method: str, alphas=None) -> DistillationConfig:
    """A DistillationConfig from the stage's readings."""
    r = settings["readings"]
    return DistillationConfig(method, tuple(alphas or settings["training"]["alphas"]), r["direction"], r["hidden_point"], r["logit_term"], r["kd_weight"], r["temperature"])


class Clock(TrainerCallback):
    """Seconds of training over all resumptions, and the seal of each checkpoint, which holds those before it."""

    def __init__(self, folder: Path, resumed: Path | None):
        self.folder, self.before, self.started = folder, checkpoints.seconds(resumed) or 0.0 if resumed else 0.0, time.monotonic()

    def seconds(self) -> float:
        """Seconds so far, those before the checkpoint too."""
        return self.before + time.monotonic() - self.started

    def on_save(self, _, state, *__, **___):
        if state.is_world_process_zero:
            checkpoints.seal(self.folder / f"checkpoint-{state.global_step}", self.seconds())


def arguments_of(settings: dict, steps: int, seed: int, folder: Path, hardware: dict) -> TrainingArguments:
    """TrainingArguments for a run of `steps` steps; `hardware` holds what changes speed and memory but no result. ValueError where the batch cannot be split as asked."""
    how = settings["training"]
    ranks = int(os.environ.get("WORLD_SIZE", "1"))  # torchrun's count of processes
    if how["batch_size"] % ranks:
        raise ValueError(f"hardware.processes {ranks} does not divide the batch of {how['batch_size']}")
    share = how["batch_size"] // ranks
    micro = hardware.get("micro_batch") or share
    if share % micro:
        raise ValueError(f"hardware.micro_batch {micro} does not divide the batch of {how['batch_size']}" + (f" over {ranks} processes" if ranks > 1 else ""))
    logging_steps = max(1, steps // 25)
    saved = math.ceil(CHECKPOINT / logging_steps) * logging_steps  # at a logged step, so that no mean of losses is cut in two
    cuda = torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=micro, gradient_accumulation_steps=share // micro, ddp_backend="gloo" if ranks > 1 and not cuda else None,
        activation_checkpointing=bool(hardware.get("checkpointing")), learning_rate=how["learning_rate"], max_steps=steps, warmup_steps=round(how["warmup"] * steps),
        weight_decay=how["weight_decay"], lr_scheduler_type=how["schedule"], optim=how["optimizer"], max_grad_norm=how["clip"],
        bf16=settings["precision"] == "bf16", use_cpu=not cuda, seed=seed, save_strategy="steps" if steps > saved else "no", save_steps=saved, 
        save_total_limit=2,  # the one before, until the new one is sealed
        logging_steps=logging_steps, logging_nan_inf_filter=False, report_to="none", disable_tqdm=True, remove_unused_columns=False,
        dataloader_pin_memory=cuda, train_sampling_strategy="group_by_length" if settings.get("group_by_length") else "random",
    )  # fmt: skip


def run_trainer(model, data, collate, scratch: Path, settings: dict, seed: int, distillation: DistillationConfig, teacher=None, hardware: dict | None = None) -> tuple[list[dict], dict, float]:
    """Train, from the last checkpoint in `scratch` if there is one; returns the log, the hyper-parameters as they were used, and the seconds it took in all.

    MemoryError where a GPU's memory does not suffice, with what to set; FloatingPointError where the loss is not finite.
    """
    how, folder, hardware = settings["training"], scratch / "trainer", hardware or {}
    steps = how["max_steps"] or math.ceil(len(data) / how["batch_size"] * how["epochs"])
    arguments = arguments_of(settings, steps, seed, folder, hardware)
    trainer = DistillTrainer(model=model, args=arguments, train_dataset=data, data_collator=collate, distillation=distillation, teacher=teacher)
    trainer.remove_callback(next(c for c in (type(c) for c in trainer.callback_handler.callbacks) if c.__name__ in ("PrinterCallback", "ProgressCallback")))
    last = checkpoints.latest(folder)
    clock = Clock(folder, last)
    trainer.add_callback(clock)
    try:
        trainer.train(resume_from_checkpoint=str(last) if last else None)
    except torch.OutOfMemoryError:
        micro = arguments.per_device_train_batch_size
        advice = f"--set hardware.micro_batch={micro // 2} keeps the effective batch of {how['batch_size']}" if micro > 1 else "--set hardware.checkpointing=true recomputes instead of keeping"
        raise MemoryError(f"out of GPU memory with {micro} rows at a time: {advice}") from None
    seconds = clock.seconds()
    if trainer.is_world_process_zero():
        shutil.rmtree(folder, ignore_errors=True)
    log = [{k: line[k] for k in LOGGED if k in line} for line in trainer.state.log_history if "loss" in line]
    bad = [line["step"] for line in log if not math.isfinite(line["loss"])]
    if not bad and not all(parameter.isfinite().all() for parameter in model.parameters()):  # the last steps are in no line of the log
        bad = [steps]
    if bad:
        raise FloatingPointError(f"the loss is not finite at step {bad[0]}: lower the learning rate ({how['learning_rate']}) or use float32")
    used = {**how, "steps": steps, "method": distillation.method, "direction": distillation.direction, "hidden_point": distillation.hidden_point, "precision": settings["precision"], "seed": seed}
    return log, used, seconds
