"""Micro-batches and processes give the whole batch's loss and gradient, whatever padding each part has."""

import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, tiny_gpt2
from torch.nn import functional as F
from transformers import TrainerCallback, TrainingArguments

from kn.distill import DistillationConfig, DistillTrainer
from kn.suite import evaluate

EXACT = 1e-10  # float64: sums in another order
LENGTHS = (2, 15, 9, 4)
CONFIGS = {
    "none": DistillationConfig(),
    "ilkd": DistillationConfig("ilkd"),
    "ilkd without cross-entropy": DistillationConfig("ilkd", (0.5, 0.5, 0.5, 0.0)),
    "ilkd with logits": DistillationConfig("ilkd", logit_term=0.7),
    "ilkd, MiniLM's direction": DistillationConfig("ilkd", direction="teacher_student"),
    "vanilla": DistillationConfig("vanilla"),
}


class KeepGradients(TrainerCallback):
    """The gradients before the first optimizer step."""

    def on_pre_optimizer_step(self, *_, model, **__):
        found = ((p, p.grad) for p in model.parameters())
        self.gradients = [torch.zeros_like(p) if grad is None else grad.clone() for p, grad in found]


def rows(kind, padded=True, last_labels=None, last_mask=1):
    generator = torch.Generator().manual_seed(1)
    found = []
    for index, length in enumerate(LENGTHS if padded else (9, 9, 9, 9)):
        ids = torch.randint(1, 50, (length,), generator=generator).tolist()
        found.append({"input_ids": ids, "label": index % 3, "labels": list(ids)})
    found[1]["labels"][3:9] = [-100] * 6
    found[3]["mask"] = last_mask
    if last_labels is not None:
        found[3] |= {"label": last_labels, "labels": [last_labels] * LENGTHS[3]}
    return found


def step(folder, kind, config, micro, data, processes=1):
    """(gradients, loss, log) of one step over four rows in micro-batches of `micro`."""
    labels = 3 if kind == "classifier" else 0
    model, teacher = (tiny_gpt2(labels=labels, seed=seed).double() for seed in (0, 1))
    if not labels:  # transformers' own makes the logits float32
        model.loss_function = lambda logits, labels, **_: F.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        )

    def collate(items):
        inputs = evaluate.pad([item["input_ids"] for item in items], 0)
        inputs["attention_mask"] *= torch.tensor([[item.get("mask", 1)] for item in items])
        if labels:
            return {**inputs, "labels": torch.tensor([item["label"] for item in items])}
        targets = [torch.tensor(item["labels"]) for item in items]
        return {**inputs, "labels": torch.nn.utils.rnn.pad_sequence(targets, True, -100)}

    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=1, per_device_train_batch_size=micro, logging_steps=1, use_cpu=True,
        gradient_accumulation_steps=4 // micro // processes, max_grad_norm=0.0, report_to="none",
        remove_unused_columns=False, save_strategy="no", ddp_backend="gloo" if processes > 1 else None,
    )
    kept, teacher = KeepGradients(), None if config.method == "none" else copy.deepcopy(teacher)
    trainer = DistillTrainer(
        model=model, args=arguments, train_dataset=data, data_collator=collate, distillation=config,
        teacher=teacher, callbacks=[kept],
    )
    trainer.train()
    return kept.gradients, trainer.state.log_history[0]


def worst(gradients, others):
    return max(float((a - b).abs().max()) for a, b in zip(gradients, others, strict=True))


@pytest.mark.parametrize("kind", ["language model", "classifier"])
@pytest.mark.parametrize("name", CONFIGS)
def test_micro_batches_give_the_gradient_of_the_whole_batch(tmp_path, kind, name):
    whole, log = step(tmp_path, kind, CONFIGS[name], 4, rows(kind))
    assert max(float(g.abs().max()) for g in whole) > 1e-3
    for micro in (1, 2):
        parts, again = step(tmp_path, kind, CONFIGS[name], micro, rows(kind))
        assert worst(whole, parts) < EXACT
        for term in set(log) - {"epoch", "step"}:
            assert again[term] == pytest.approx(log[term], abs=1e-4)  # Trainer rounds what it logs


@pytest.mark.parametrize("last_mask", [1, 0])
@pytest.mark.parametrize("kind", ["language model", "classifier"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_micro_batch_without_a_label_counts_for_nothing(tmp_path, kind, name, last_mask):
    data = rows(kind, last_labels=-100, last_mask=last_mask)
    whole, _ = step(tmp_path, kind, CONFIGS[name], 4, data)
    parts, log = step(tmp_path, kind, CONFIGS[name], 1, data)
    assert worst(whole, parts) < EXACT and all(math.isfinite(value) for value in log.values())


@pytest.mark.parametrize("micro", [1, 4])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_batch_without_a_label_is_refused(tmp_path, name, micro):
    data = [{**row, "labels": [-100] * len(row["labels"])} for row in rows("language model")]
    if name == "ilkd without cross-entropy":
        gradients, _ = step(tmp_path, "language model", CONFIGS[name], micro, data)
        assert all(g.isfinite().all() for g in gradients)
        return
    message = r"^a batch of 4 rows has no label to predict \(all are -100, or of rows of one token\): there"
    with pytest.raises(ValueError, match=message):
        step(tmp_path, "language model", CONFIGS[name], micro, data)


def test_equal_parts_weigh_exactly_one(tmp_path, monkeypatch):
    """So that results of unpadded rows stay what they were, bit for bit."""
    seen, get = [], DistillTrainer.get_batch_samples

    def record(*arguments):
        batches, shares = get(*arguments)
        seen.append(list(shares))
        return batches, iter(seen[-1])

    monkeypatch.setattr(DistillTrainer, "get_batch_samples", record)
    data = [{**row, "labels": row["input_ids"]} for row in rows("language model", padded=False)]
    for micro in (1, 2, 4):
        step(tmp_path, "language model", CONFIGS["ilkd"], micro, data)
    assert seen == [[[1.0] * 3] * 4, [[1.0] * 3] * 2, [[1.0] * 3]]


def one_of_two_processes(folder):
    """What torchrun starts twice: the largest difference to the gradient of one process."""
    worst_of = {}
    for kind in ("language model", "classifier"):
        for name, config in CONFIGS.items():
            for last in (None, -100):
                gradients, _ = step(folder, kind, config, 1, rows(kind, last_labels=last), processes=2)
                whole = torch.load(Path(folder) / f"{kind} {name} {last}.pt")
                worst_of[f"{kind} {name} {last}"] = worst(whole, gradients)
    (Path(folder) / f"{os.environ['RANK']}.json").write_text(json.dumps(worst_of))


def test_two_processes_give_the_gradient_of_one(tmp_path):
    for kind in ("language model", "classifier"):
        for name, config in CONFIGS.items():
            for last in (None, -100):
                gradients, _ = step(tmp_path, kind, config, 4, rows(kind, last_labels=last))
                torch.save(gradients, tmp_path / f"{kind} {name} {last}.pt")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    variables, command = {**os.environ, "PYTHONPATH": paths}, [*command, __file__, str(tmp_path)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in (0, 1):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert len(found) == 24 and max(found.values()) < EXACT, found


if __name__ == "__main__":
    one_of_two_processes(sys.argv[1])
