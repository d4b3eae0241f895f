"""Pretraining of a small GPT-2 (the teacher) and a baseline made as DistilGPT2 was, resumably."""

import json
import time
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from kn.models.base import count_parameters
from kn.suite import evaluate
from kn.suite.settings import Model, Recipe

DECAY = 0.6  # of the steps, at the end


def random_gpt2(shape: Model) -> GPT2LMHeadModel:
    """A GPT-2 of this shape with its usual random weights."""
    config = GPT2Config(vocab_size=shape.vocabulary, n_positions=shape.context, n_embd=shape.width,
                        n_layer=shape.layers, n_head=shape.heads, activation_function=shape.activation,
                        resid_pdrop=shape.dropout, embd_pdrop=shape.dropout, attn_pdrop=shape.dropout,
                        bos_token_id=0, eos_token_id=0)
    # on a CPU eager attention is 1.4 times as fast at 128 tokens
    config._attn_implementation = "sdpa" if torch.cuda.is_available() else "eager"
    return GPT2LMHeadModel(config)


def every_other_layer(teacher) -> GPT2LMHeadModel:
    """A GPT-2 of every other layer of the teacher (0, 2, 4, …), weights copied: where DistilGPT2 starts."""
    config = GPT2Config(**{**teacher.config.to_dict(), "n_layer": teacher.config.n_layer // 2})
    config._attn_implementation = teacher.config._attn_implementation
    student, state = GPT2LMHeadModel(config), teacher.state_dict()
    for name, weight in student.state_dict().items():
        parts = name.split(".")
        if parts[1] == "h":
            parts[2] = str(2 * int(parts[2]))
        weight.copy_(state[".".join(parts)])
    return student


def learning_rate_factor(step: int, steps: int, warmup: int) -> float:
    """Factor on the peak rate: linear warm-up, constant, linear decay over the last DECAY of the steps."""
    if step < warmup:
        return (step + 1) / warmup
    return min(1.0, (steps - step) / (DECAY * steps))


def optimizers(model, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for embeddings, gains and biases."""
    blocks = {name: p for name, p in model.named_parameters() if p.ndim == 2 and ".h." in name}
    rest = [p for name, p in model.named_parameters() if name not in blocks]
    return [
        torch.optim.Muon(
            blocks.values(), lr=recipe.muon_lr, weight_decay=recipe.weight_decay, momentum=0.95,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(rest, lr=recipe.adam_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def train(model, rows, valid, folder: Path, recipe: Recipe, teacher=None, log_every=50, valid_every=500):
    """Train on token rows (n, context), resumably (state.pt, log.jsonl in `folder`); a teacher adds KD."""
    folder.mkdir(parents=True, exist_ok=True)
    steps, batch, device = recipe.steps or 3 * len(rows) // recipe.batch, recipe.batch, model.device
    opts, checkpoint, start, seconds_before = optimizers(model, recipe), folder / "state.pt", 0, 0.0
    peak_rates = [group["lr"] for opt in opts for group in opt.param_groups]
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location=device)
        model.load_state_dict(state["model"])
        for opt, value in zip(opts, state["optimizers"], strict=True):
            opt.load_state_dict(value)
        start, seconds_before = state["step"], state["seconds"]
        cpu, *gpus = (generator.cpu() for generator in state["random"])
        torch.set_rng_state(cpu)
        torch.cuda.set_rng_state_all(gpus[: torch.cuda.device_count()])
    groups, log = [group for opt in opts for group in opt.param_groups], folder / "log.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines(keepends=True) if log.exists() else []
    # what came after the checkpoint is done again
    log.write_text("".join(line for line in lines if json.loads(line)["step"] <= start), encoding="utf-8")
    epoch_steps, clock = len(rows) // batch, time.monotonic() - seconds_before
    model.train()
    for step in range(start, steps):
        epoch, position = divmod(step, epoch_steps)
        if step == start or position == 0:
            generator = torch.Generator().manual_seed(recipe.seed * 1000 + epoch)
            order = torch.randperm(len(rows), generator=generator)
        x = rows[order[position * batch : (position + 1) * batch]].long().to(device)
        for peak, group in zip(peak_rates, groups, strict=True):
            group["lr"] = peak * learning_rate_factor(step, steps, recipe.warmup)
        loss, cross_entropy = distillation_loss(model, x, recipe, teacher)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad()
        done = step + 1
        if done % log_every == 0 or done == steps:
            line = {"step": done, "tokens": done * batch * rows.shape[1],
                    "loss": round(cross_entropy.item(), 4), "seconds": round(time.monotonic() - clock, 1)}
            if done % valid_every == 0 or done == steps:
                line["valid_perplexity"] = round(evaluate.perplexity(model, valid), 3)
                model.train()
                generators = [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]  # of dropout
                state = {
                    "model": model.state_dict(), "optimizers": [opt.state_dict() for opt in opts],
                    "step": done, "seconds": time.monotonic() - clock, "random": generators,
                }
                torch.save(state, folder / "state.tmp")
                (folder / "state.tmp").replace(checkpoint)
            with log.open("a", encoding="utf-8") as handle:
                handle.write(json.dumps(line) + "\n")


def distillation_loss(model, x: torch.Tensor, recipe: Recipe, teacher=None):
    """(loss, cross-entropy) of token ids x (b, context); with a teacher, the loss includes a KL of logits."""
    with evaluate.autocast(recipe.precision, x.device.type):
        logits = model(input_ids=x).logits[:, :-1]  # (b, context - 1, vocabulary)
    cross_entropy = F.cross_entropy(logits.flatten(0, 1).float(), x[:, 1:].flatten())
    if teacher is None:
        return cross_entropy, cross_entropy
    with torch.no_grad(), evaluate.autocast(recipe.precision, x.device.type):
        target = teacher(input_ids=x).logits[:, :-1]
    student_log = F.log_softmax(logits.flatten(0, 1).float() / recipe.temperature, -1)
    teacher_log = F.log_softmax(target.flatten(0, 1).float() / recipe.temperature, -1)
    kl = F.kl_div(student_log, teacher_log, reduction="batchmean", log_target=True)
    weight = recipe.kd_weight
    return (1 - weight) * cross_entropy + weight * recipe.temperature**2 * kl, cross_entropy


def training_cost(model, log: Path, rows, data_bytes: int, hardware: str) -> dict:
    """Hours, steps, tokens and validation perplexity of a finished training, from its log.jsonl."""
    last = json.loads(log.read_text(encoding="utf-8").splitlines()[-1])
    return {"hours": round(last["seconds"] / 3600, 4), "steps": last["step"], "tokens": last["tokens"],
            "epochs": round(last["tokens"] / rows.numel(), 2), "data_bytes": data_bytes, "hardware": hardware,
            "valid_perplexity": last["valid_perplexity"],
            "parameters_trained": count_parameters(model)["total"]}
