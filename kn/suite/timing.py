"""Timing run, `python -m kn.suite.timing`: seconds of a training step on this machine, kept in the store.

A few steps of each kind of training, by the code of a real run, on random models of the profile's size."""

import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kn.files import ASSETS, PACKAGE, json_sha256, write_atomic
from kn.suite.cost import CostError
from kn.suite.devices import cpu_name, gpus, peak_bytes
from kn.suite.planner import STEP_FLOPS, TOKEN_ESTIMATES
from kn.suite.settings import Model, Profile, Readings, Training
from kn.suite.store import Store

METHODS = {"lm": "none", "lm_ilkd": "ilkd", "glue": "none", "glue_ilkd": "ilkd"}  # training: its distillation
STEPS = {"lm": 6, "lm_ilkd": 6, "glue": 16, "glue_ilkd": 16}  # of each kind; the first two are not counted
CPU_FLOPS = 1e11  # a step on a CPU is cut to about this much: the paper's sizes take seconds, not minutes


def timing_request(profile: Profile, precision: str) -> dict:
    """Everything that the answer of the timing run depends on."""
    batches = {"lm": profile.pretrain.batch_size, "glue": profile.finetune_glue.batch_size}
    return {
        "model": asdict(profile.model), "compression": asdict(profile.compression), "batches": batches,
        "hardware": {**asdict(profile.hardware), "processes": 1}, "precision": precision,
        "row": TOKEN_ESTIMATES[profile.source]["row"],
        "device": (gpus() or [cpu_name()])[0], "version": 2,  # of the timing run's code
    }


def timing_file(request: dict, store: Store) -> Path:
    """Where the store keeps the answer to a request."""
    return store.home / f"timing-{json_sha256(request)[:12]}.json"


def measured_timing(profile: Profile, precision: str, store: Store) -> dict:
    """Timing of the profile's trainings, measured now or kept in the store; CostError where the run fails.

    {"seconds", "flops", "tokens": {kind: of a step}, "around": {kind: a training's seconds beside its steps},
    "start": seconds of a process until it works, "bytes": {model: of its file}, "tokenized": tokens per
    second, "peak_bytes", "device"}
    """
    request = timing_request(profile, precision)
    file = timing_file(request, store)
    if timing := load_timing(file):
        return timing
    command = [sys.executable, "-m", "kn.suite.timing", json.dumps(request)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
    if done.returncode:
        killed = f"it ended with status {done.returncode}, killed or out of memory"
        reason = (done.stderr.strip().splitlines() or [killed])[-1]
        remedy = "a smaller model or batch is chosen with --set model.… and --set pretrain.batch_size=…"
        raise CostError(f"the timing run failed: {reason} ({remedy})")
    timing = json.loads(done.stdout.splitlines()[-1])
    if store.home.is_dir():
        write_atomic(file, json.dumps(timing))
    return timing


def load_timing(file: Path) -> dict | None:
    """An earlier timing; None for a missing or damaged file, and it is measured again."""
    try:
        timing = json.loads(file.read_bytes())
        parts = ("seconds", "flops", "tokens", "around")
        numbers = [timing[name][kind] for name in parts for kind in METHODS]
        numbers += [timing["bytes"][model] for model in ("teacher", "student", "baseline")]
        numbers += [timing[name] for name in ("tokenized", "peak_bytes", "start")]
        valid = all(isinstance(n, int | float) and 0 < n < float("inf") for n in numbers)
        return timing if valid and isinstance(timing["device"], str) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def measure(request: dict) -> dict:
    """Time STEPS steps of each kind of training; see `measured_timing`."""
    import psutil
    import torch
    from transformers import AutoTokenizer, GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

    from kn.compression import compress
    from kn.models.config import KroneckerSpec
    from kn.suite.training import distillation_config, run_training

    start = time.time() - psutil.Process().create_time()
    torch.set_num_threads(1)
    model, hardware, on_gpu = Model(**request["model"]), request["hardware"], torch.cuda.is_available()
    config = GPT2Config(  # type: ignore[call-arg]  # the stub lacks the fields of every configuration
        vocab_size=model.vocabulary, n_positions=model.context, n_embd=model.width, n_layer=model.layers,
        n_head=model.heads, activation_function=model.activation, resid_pdrop=model.dropout,
        embd_pdrop=model.dropout, attn_pdrop=model.dropout, bos_token_id=0, eos_token_id=0, pad_token_id=0,
        use_cache=False, num_labels=2, attn_implementation="sdpa" if on_gpu else "eager",
    )
    blocks, head = 12 * model.layers * model.width**2, model.vocabulary * model.width
    timing: dict[str, Any] = {"start": start, "seconds": {}, "around": {}, "flops": {}, "tokens": {}}
    for kind, method in METHODS.items():
        is_lm = kind.startswith("lm")
        teacher = (GPT2LMHeadModel if is_lm else GPT2ForSequenceClassification)(config)
        student = compress(teacher, KroneckerSpec(**request["compression"]))
        # shorter rows than real ones would hide what a step costs whatever its length
        length = model.context if is_lm else min(model.context, request["row"])
        batch = hardware["micro_batch"] or request["batches"]["lm" if is_lm else "glue"]
        token_flops = 2 * (blocks + (head if is_lm else 0)) * STEP_FLOPS[kind]
        if not on_gpu and token_flops * batch * length > CPU_FLOPS:
            length = min(length, 64)
            batch = max(1, round(CPU_FLOPS / token_flops / length))
        started: list[float] = []

        def collate(items, started=started, is_lm=is_lm):
            if on_gpu:
                torch.cuda.synchronize()
            started.append(time.monotonic())
            ids = torch.stack(items)
            if is_lm:
                return {"input_ids": ids, "labels": ids}
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 2}

        training = asdict(Training(batch_size=batch, learning_rate=1e-5, epochs=1, max_steps=STEPS[kind]))
        settings = {"training": training, "readings": asdict(Readings()), "precision": request["precision"]}
        rows = list(torch.randint(0, model.vocabulary, (STEPS[kind] * batch, length)))
        before = time.monotonic()
        with tempfile.TemporaryDirectory() as scratch:
            run_training(
                student, rows, collate, Path(scratch), settings, 0, distillation_config(settings, method),
                None if method == "none" else teacher, {"checkpointing": hardware["checkpointing"]},
            )
        steps = [end - start for start, end in itertools.pairwise(started)]
        timing["seconds"][kind] = statistics.median(steps[1:])
        timing["around"][kind] = max(1e-3, time.monotonic() - before - sum(steps) - timing["seconds"][kind])
        timing["tokens"][kind] = batch * length
        timing["flops"][kind] = token_flops * batch * length
        if is_lm:
            sizes = {"teacher": 4 * teacher.num_parameters(), "student": 4 * student.num_parameters()}
            timing["bytes"] = {**sizes, "baseline": sizes["teacher"] - 4 * (blocks // 2)}
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "mini" / "tokenizer", local_files_only=True)
    texts = [path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py"))]
    start = time.monotonic()
    tokens = sum(map(len, tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]))
    timing["tokenized"] = tokens / (time.monotonic() - start)
    timing["peak_bytes"] = torch.cuda.max_memory_allocated() if on_gpu else peak_bytes()
    return {**timing, "device": request["device"]}


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
