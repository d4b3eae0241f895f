"""What a run will cost on this machine: steps, tokens, FLOPs, hours, disk and memory, from a timing run of a few real steps.

`python -m kn.suite.cost` is the timing run: it trains models of the profile's size with random weights for a few steps, by the
same code as a real run, and prints seconds a step. The plan scales those by the FLOPs of each stage.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from kn.files import ASSETS, PACKAGE
from kn.suite.devices import cores, cpu_name, gpus, peak_bytes
from kn.suite.planner import STEP_FLOPS
from kn.suite.profiles import Model, Profile, Readings, Training
from kn.suite.store import Stage, Store

KINDS = {"lm": "none", "lm_ilkd": "ilkd", "glue": "none", "glue_ilkd": "ilkd"}  # what is timed: a training and how it distils
TITLES = {"lm": "language model", "lm_ilkd": "with ILKD", "glue": "GLUE", "glue_ilkd": "GLUE with ILKD"}
STEPS = 6  # of each; the first two are not counted
CPU_FLOPS = 1e11  # a timed step on a CPU is cut to about this much, so that the paper's sizes take seconds and not minutes


class CostError(Exception):
    """A run that cannot be paid for, or timed; the message is one line that says what to do."""


def kind_of(stage: Stage) -> str:
    """Which of KINDS a stage's speed is most like."""
    settings = json.loads(stage.settings)
    if stage.kind in ("finetune_glue", "twin_check"):
        return "glue_ilkd" if settings["method"] == "ilkd" else "glue"
    distils = settings.get("ilkd") or (stage.kind == "pretrain" and stage["objective"] != "lm")
    return "lm_ilkd" if distils else "lm"


def device() -> str:
    """What the run will use."""
    return (gpus() or [cpu_name()])[0]


def asked(profile: Profile, precision: str) -> dict:
    """What the timing run is asked: all that its answer depends on."""
    return {
        "model": dataclasses.asdict(profile.model), "compression": dataclasses.asdict(profile.compression), "hardware": {**dataclasses.asdict(profile.hardware), "processes": 1},
        "batches": {"lm": profile.pretrain.batch_size, "glue": profile.finetune_glue.batch_size}, "precision": precision, "device": device(),
        "version": 1,  # of what is measured and how
    }  # fmt: skip


def kept(question: dict, store: Store) -> Path:
    """Where the store keeps the answer."""
    return store.home / f"timing-{hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()[:12]}.json"


def timing(profile: Profile, precision: str, store: Store) -> dict:
    """{"seconds", "flops": {kind: of a step}, "peak_bytes", "bytes": of saved models}, seconds and FLOPs of a step, measured now or kept in the store; CostError where the timing run fails."""
    question = asked(profile, precision)
    file = kept(question, store)
    if answer := remembered(file):
        return answer
    done = subprocess.run([sys.executable, "-m", "kn.suite.cost", json.dumps(question)], capture_output=True, text=True)
    if done.returncode:
        why = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"it ended with status {done.returncode}, killed or out of memory"
        raise CostError(f"the timing run failed: {why} (a smaller model or batch is chosen with --set model.… and --set pretrain.batch_size=…)")
    found = json.loads(done.stdout.splitlines()[-1])
    if store.home.is_dir():
        part = file.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps(found))
        part.replace(file)
    return found


def remembered(file: Path) -> dict | None:
    """What the store keeps of an earlier timing run; None, and it is measured again, where that is not there or damaged."""
    try:
        found = json.loads(file.read_text())
        numbers = [found[name][kind] for name in ("seconds", "flops", "tokens") for kind in KINDS] + [found["bytes"][model] for model in ("teacher", "student", "baseline")]
        whole = all(isinstance(n, int | float) and 0 < n < float("inf") for n in (*numbers, found["tokenized"], found["peak_bytes"]))
        return found if whole and isinstance(found["device"], str) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def seconds(stage: Stage, timed: dict) -> float:
    """Expected seconds of one stage."""
    if stage.kind == "corpus" and stage.tokens:
        return stage.tokens / timed["tokenized"]
    kind = kind_of(stage)
    return stage.cost / (timed["flops"][kind] / timed["seconds"][kind])


def disk(stage: Stage, timed: dict) -> float:
    """Bytes a stage leaves, about: its model, or the corpus' token rows."""
    if stage.kind in ("pretrained", "decompose", "pretrain"):
        return timed["bytes"]["student" if stage.kind != "pretrained" else stage["model"]]
    if stage.kind == "finetune_glue" and json.loads(stage.settings)["keep_model"]:
        return timed["bytes"]["teacher"]
    return 2 * stage.tokens if stage.kind == "corpus" else 0.0


def check_disk_space(stages: list[Stage], store: Store, timed: dict) -> None:
    """CostError if what the missing stages leave on disk does not fit where the store is."""
    need = sum(disk(item, timed) for item in stages if not store.has(item))
    there = next(p for p in (store.home, *store.home.parents) if p.exists())
    if (free := shutil.disk_usage(there).free) < need:
        raise CostError(f"{need / 1e9:.1f} GB will be written to {store.home}, {free / 1e9:.1f} GB are free there: make room, or choose another folder with KN_HOME=…")


# ---------------------------------------------------------------- the timing run


def measure(asked: dict) -> dict:
    """Time STEPS steps of each kind; see `timing`."""
    import torch
    from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

    from kn.compression import compress
    from kn.models.config import KroneckerSpec
    from kn.suite import training as fit

    torch.set_num_threads(1)
    model, on_gpu = Model(**asked["model"]), torch.cuda.is_available()
    config = GPT2Config(  # type: ignore[call-arg]  # the stub knows GPT-2's own fields, not those of every configuration
        vocab_size=model.vocabulary, n_positions=model.context, n_embd=model.width, n_layer=model.layers, n_head=model.heads, activation_function=model.activation,
        resid_pdrop=model.dropout, embd_pdrop=model.dropout, attn_pdrop=model.dropout, bos_token_id=0, eos_token_id=0, pad_token_id=0, use_cache=False, num_labels=2,
        attn_implementation="sdpa" if on_gpu else "eager",
    )  # fmt: skip
    blocks, head = 12 * model.layers * model.width**2, model.vocabulary * model.width
    found: dict[str, Any] = {"seconds": {}, "flops": {}, "tokens": {}, "bytes": {}}
    for kind, method in KINDS.items():
        name = kind.partition("_")[0]
        teacher = (GPT2LMHeadModel if name == "lm" else GPT2ForSequenceClassification)(config)
        student = compress(teacher, KroneckerSpec(**asked["compression"]))
        length = model.context if name == "lm" else min(model.context, 32)
        batch = asked["hardware"]["micro_batch"] or asked["batches"][name]
        per_token = 2 * (blocks + (head if name == "lm" else 0)) * STEP_FLOPS[kind]
        if not on_gpu and per_token * batch * length > CPU_FLOPS:
            length = min(length, 64)
            batch = max(1, round(CPU_FLOPS / per_token / length))
        rows = torch.randint(0, model.vocabulary, (STEPS * batch, length))
        clock: list[float] = []

        def collate(items, rows=rows, clock=clock, name=name):
            if on_gpu:
                torch.cuda.synchronize()
            clock.append(time.monotonic())
            ids = torch.stack([rows[i] for i in items])
            return {"input_ids": ids, "labels": ids} if name == "lm" else {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 2}

        how = dataclasses.asdict(Training(batch_size=batch, learning_rate=1e-5, epochs=1, max_steps=STEPS))
        settings = {"training": how, "readings": dataclasses.asdict(Readings()), "precision": asked["precision"]}
        hardware = {"checkpointing": asked["hardware"]["checkpointing"]}
        with tempfile.TemporaryDirectory() as scratch:
            fit.run_training(fit.TrainingJob(student, list(range(len(rows))), collate, Path(scratch), settings, 0, fit.distillation_config(settings, method), None if method == "none" else teacher, hardware))
        step = [b - a for a, b in zip(clock, clock[1:], strict=False)]
        found["seconds"][kind] = statistics.median(step[1:])
        found["tokens"][kind] = batch * length
        found["flops"][kind] = per_token * batch * length
        if name == "lm":
            found["bytes"] = {"teacher": 4 * teacher.num_parameters(), "student": 4 * student.num_parameters()}
    found["bytes"]["baseline"] = found["bytes"]["teacher"] - 4 * (blocks // 2)
    found["tokenized"] = tokenized()
    found["peak_bytes"] = torch.cuda.max_memory_allocated() if on_gpu else peak_bytes()
    return found


def tokenized() -> float:
    """Tokens a second of a byte-pair tokenizer, on this repository's own text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "mini" / "tokenizer", local_files_only=True)
    texts = [path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py"))]
    started = time.monotonic()
    return sum(map(len, tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"])) / (time.monotonic() - started)


def main(text: str) -> None:
    """Print the measurement as one line of JSON."""
    asked = json.loads(text)
    print(json.dumps({**measure(asked), "device": asked["device"], "cores": cores()}))


if __name__ == "__main__":
    main(sys.argv[1])
