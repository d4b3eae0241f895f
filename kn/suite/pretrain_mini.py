"""Rebuilds mini's two pretrained models: a small GPT-2 (teacher) and a DistilGPT2-like baseline.

The paper starts from models it did not train; so does mini. `python -m kn rebuild` runs this recipe, resumably.
"""

from __future__ import annotations

import json
import platform
import time
from dataclasses import asdict
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, set_seed

from kn.data import documentation as corpora
from kn.files import file_sha256
from kn.models.base import count_parameters
from kn.suite import evaluate, profiles
from kn.suite.devices import cpu_name
from kn.suite.store import Store, environment


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


def train(model, rows, valid, folder: Path, recipe: profiles.Recipe, teacher=None, log_every=50, valid_every=500) -> None:
    """Train on rows (n, context) with checkpoints and log.jsonl in `folder`; with a teacher, adds logit KD."""
    folder.mkdir(parents=True, exist_ok=True)
    batch, temperature, kd_weight = recipe.batch, recipe.temperature, recipe.kd_weight
    steps, warmup, seed = recipe.steps or 3 * len(rows) // batch, recipe.warmup, recipe.seed
    opts, state, start, spent = optimizers(model, recipe.muon_lr, recipe.adam_lr, recipe.weight_decay), folder / "state.pt", 0, 0.0
    device = next(model.parameters()).device
    peaks = [group["lr"] for opt in opts for group in opt.param_groups]
    if state.exists():
        saved = torch.load(state, weights_only=True, map_location=device)
        model.load_state_dict(saved["model"])
        for opt, value in zip(opts, saved["optimizers"], strict=True):
            opt.load_state_dict(value)
        start, spent = saved["step"], saved["seconds"]
        set_random_state(saved["random"])
    log = folder / "log.jsonl"
    lines = [line for line in log.read_text().splitlines() if json.loads(line)["step"] <= start] if log.exists() else []
    log.write_text("".join(line + "\n" for line in lines))  # what came after the checkpoint is done again
    epoch_steps = len(rows) // batch
    clock, last = time.monotonic() - spent, {}
    model.train()
    for step in range(start, steps):
        epoch, within = divmod(step, epoch_steps)
        if step == start or within == 0:
            order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed * 1000 + epoch))
        x = rows[order[within * batch : (within + 1) * batch]].long().to(device)
        for peak, group in zip(peaks, [g for o in opts for g in o.param_groups], strict=True):
            group["lr"] = peak * learning_rate(step, steps, warmup)
        with evaluate.autocast(recipe.precision, device.type):
            logits = model(input_ids=x).logits[:, :-1]
        loss = cross_entropy = F.cross_entropy(logits.flatten(0, 1).float(), x[:, 1:].flatten())
        if teacher is not None:
            with torch.no_grad(), evaluate.autocast(recipe.precision, device.type):
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
                last["valid_perplexity"] = round(evaluate.perplexity(model, valid), 3)
                model.train()
                saved = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in opts], "step": done, "seconds": time.monotonic() - clock, "random": random_state()}
                torch.save(saved, folder / "state.tmp")
                (folder / "state.tmp").replace(state)
            with log.open("a") as handle:
                handle.write(json.dumps(last) + "\n")


def random_state() -> list[torch.Tensor]:
    """What dropout will draw next: the states of the CPU and of the GPUs."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])]


def set_random_state(states: list[torch.Tensor]) -> None:
    """Go on drawing where `random_state` was taken."""
    torch.set_rng_state(states[0].cpu())
    if torch.cuda.is_available() and len(states) == torch.cuda.device_count() + 1:
        torch.cuda.set_rng_state_all([state.cpu() for state in states[1:]])


def fresh(shape: profiles.Model) -> GPT2LMHeadModel:
    """A GPT-2 of this shape with its usual random weights."""
    config = GPT2Config(
        vocab_size=shape.vocabulary, n_positions=shape.context, n_embd=shape.width, n_layer=shape.layers, n_head=shape.heads, activation_function=shape.activation,
        resid_pdrop=shape.dropout, embd_pdrop=shape.dropout, attn_pdrop=shape.dropout, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    config._attn_implementation = "sdpa" if torch.cuda.is_available() else "eager"  # on a CPU eager is 1.4 times as fast at 128 tokens
    return GPT2LMHeadModel(config)


def halved(teacher) -> GPT2LMHeadModel:
    """A GPT-2 of every other layer of the teacher (0, 2, 4, …), weights copied: where DistilGPT2 starts."""
    config = GPT2Config(**{**teacher.config.to_dict(), "n_layer": teacher.config.n_layer // 2})
    config._attn_implementation = teacher.config._attn_implementation
    student, state = GPT2LMHeadModel(config), teacher.state_dict()
    for name in student.state_dict():
        parts = name.split(".")
        if parts[1] == "h":
            parts[2] = str(2 * int(parts[2]))
        student.state_dict()[name].copy_(state[".".join(parts)])
    return student


def pack(model, folder: Path, recipe: profiles.Recipe, measured: dict) -> None:
    """Write a committed asset: float16 weights, configuration, recipe with measured cost; the log is beside already."""
    folder.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    text = {"recipe": asdict(recipe), "measured": measured, "environment": {**environment(), "machine": platform.machine()}}
    (folder / "recipe.json").write_text(json.dumps(text, indent=1) + "\n")


def write_sums(folder: Path) -> None:
    """SHA256SUMS over all files of the assets: a damaged one is found before it is used."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "SHA256SUMS")
    (folder / "SHA256SUMS").write_text("".join(f"{file_sha256(p)}  {p.relative_to(folder).as_posix()}\n" for p in files))


def extra_documents(folder: Path | None, built: dict) -> tuple[str, ...]:
    """Documentation of further unpacked packages, cleaned of everything that is held out or already there."""
    if folder is None:
        return ()
    forbidden = set(corpora.held_out_ngrams(tuple(built.values())))
    seen = {gram for doc in built["web"].train for paragraph in doc.split("\n\n") for gram in corpora.ngrams(paragraph)}
    packages = sorted(p for p in folder.iterdir() if p.is_dir() and p.name.isidentifier())
    return tuple(doc for p in packages for doc in corpora.documents(corpora.raw_files(p, p.name), seen, forbidden))


def rebuild(store: Store, extra: Path | None = None, profile: profiles.Profile = profiles.MINI, recipes: tuple[profiles.Recipe, profiles.Recipe] = (profiles.TEACHER, profiles.BASELINE)) -> int:
    """Corpus, tokenizer, teacher, baseline from nothing into <store>/rebuild/mini; resumes where it was stopped. Returns 0."""
    text, shape, work = profile.text, profile.model, store.home / "rebuild"
    assets = work / "mini"
    groups = {"web": text.web, "wiki": text.wiki}
    built = corpora.build(groups, {"web": text.web_shares, "wiki": text.wiki_shares})
    more = extra_documents(extra, built)
    tokenizer = corpora.train_tokenizer(built["web"].train, shape.vocabulary)
    tokenizer.save_pretrained(assets / "tokenizer")
    web = corpora.pack(tokenizer, built["web"].train, shape.context)
    every = corpora.pack(tokenizer, built["web"].train + more, shape.context)
    valid = corpora.pack(tokenizer, built["web"].valid, shape.context)[:400]
    set_seed(recipes[0].seed)
    teacher, texts = fresh(shape), {"teacher": (every, built["web"].train + more), "baseline": (web, built["web"].train)}
    for name, recipe in zip(("teacher", "baseline"), recipes, strict=True):
        model = teacher if name == "teacher" else halved(teacher)
        rows, docs = texts[name]
        train(model, rows, valid, work / name, recipe, None if name == "teacher" else teacher)
        finish(model, assets / name, work / name / "log.jsonl", recipe, rows, docs, corpora.fingerprint(built))
        teacher = model.float().eval().requires_grad_(False) if name == "teacher" else teacher
    write_sums(assets)
    print(f"{assets} is ready: compare it with kn/assets/mini")
    return 0


def finish(model, folder: Path, log: Path, recipe: profiles.Recipe, rows, docs, fingerprint: str) -> None:
    """Pack a trained model with its log and what it cost."""
    pack(model, folder, recipe, cost_of(model, log, rows, sum(len(d.encode()) for d in docs), f"{cpu_name()}, one thread") | {"corpus": fingerprint})
    (folder / "log.jsonl").write_text(log.read_text())


def cost_of(model, log: Path, rows, data_bytes: int, hardware: str) -> dict:
    """Hours, steps, tokens and the like of a finished training."""
    last = json.loads(log.read_text().splitlines()[-1])
    return {
        "hours": round(last["seconds"] / 3600, 4), "steps": last["step"], "tokens": last["tokens"], "epochs": round(last["tokens"] / rows.numel(), 2), "data_bytes": data_bytes,
        "hardware": hardware, "valid_perplexity": last["valid_perplexity"], "parameters_trained": count_parameters(model)["total"],
    }  # fmt: skip
