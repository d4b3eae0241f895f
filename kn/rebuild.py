"""Rebuilds mini's two pretrained models: a small GPT-2 (teacher) and a DistilGPT2-like baseline.

The paper starts from models it did not train; so does mini. `python -m kn rebuild` runs this recipe, resumably.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import torch
from torch.nn import functional as F


def learning_rate(step: int, steps: int, warmup: int, floor: float = 0.0) -> float:
    """Factor on the peak rate: linear warm-up, constant, then linear decay over the last 60 % of the steps."""
    if step < warmup:
        return (step + 1) / warmup
    return max(floor, min(1.0, (steps - step) / (0.6 * steps)))


def optimizers(model, muon_lr: float, adam_lr: float, weight_decay: float):
    """Muon for the matrices of the blocks, AdamW for embeddings, gains and biases."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and ".h." in n]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=muon_lr, weight_decay=weight_decay, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=adam_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def perplexity(model, rows: torch.Tensor, batch: int = 32) -> float:
    """exp(mean next-token NLL) over rows (n, context), no overlap."""
    total = count = 0
    model.eval()
    with torch.no_grad():
        for part in rows.split(batch):
            logits = model(input_ids=part).logits[:, :-1].float()
            total += F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum").item()
            count += part[:, 1:].numel()
    model.train()
    return math.exp(total / count)


def train(model, rows, valid, folder: Path, *, steps, batch, muon_lr, adam_lr, weight_decay, warmup, seed, teacher=None, kd_weight=0.5, temperature=2.0, log_every=100, valid_every=500):
    """Train on rows (n, context) with checkpoints in `folder`; with a teacher, adds logit KD. Returns the log's last line."""
    folder.mkdir(parents=True, exist_ok=True)
    opts, state, start, spent = optimizers(model, muon_lr, adam_lr, weight_decay), folder / "state.pt", 0, 0.0
    peaks = [group["lr"] for opt in opts for group in opt.param_groups]
    if state.exists():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        for opt, value in zip(opts, saved["optimizers"], strict=True):
            opt.load_state_dict(value)
        start, spent = saved["step"], saved["seconds"]
    epoch_steps = len(rows) // batch
    clock, last = time.monotonic() - spent, {}
    model.train()
    for step in range(start, steps):
        epoch, within = divmod(step, epoch_steps)
        if step == start or within == 0:
            order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed * 1000 + epoch))
        x = rows[order[within * batch : (within + 1) * batch]].long()
        for peak, group in zip(peaks, [g for o in opts for g in o.param_groups], strict=True):
            group["lr"] = peak * learning_rate(step, steps, warmup)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=x).logits[:, :-1]
        loss = cross_entropy = F.cross_entropy(logits.flatten(0, 1).float(), x[:, 1:].flatten())
        if teacher is not None:
            with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
                target = teacher(input_ids=x).logits[:, :-1]
            soft = F.kl_div(F.log_softmax(logits.flatten(0, 1).float() / temperature, -1), F.log_softmax(target.flatten(0, 1).float() / temperature, -1), reduction="batchmean", log_target=True)
            loss = (1 - kd_weight) * cross_entropy + kd_weight * temperature**2 * soft
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad()
        done = step + 1
        if done % log_every == 0 or done == steps:
            last = {"step": done, "tokens": done * batch * rows.shape[1], "loss": round(cross_entropy.item(), 4), "seconds": round(time.monotonic() - clock, 1)}
            if done % valid_every == 0 or done == steps:
                last["valid_perplexity"] = round(perplexity(model, valid), 3)
                saved = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in opts], "step": done, "seconds": time.monotonic() - clock}
                torch.save(saved, folder / "state.tmp")
                (folder / "state.tmp").replace(state)
            with (folder / "log.jsonl").open("a") as log:
                log.write(json.dumps(last) + "\n")
    return last
