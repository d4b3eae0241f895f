"""Speed, size and memory of the Kronecker layers and folded models beside dense ones: one tidy CSV.

    PYTHONPATH=. python benchmarks/speed.py [--device cpu] [--dtype float32,bfloat16] [--compile]
                                            [--peers peers/bin/python] [--threads 2] [--repeats 15]
                                            [--only ffn] [--out benchmarks/speed-cpu.csv]

Variants of a case are timed in turns, so that a noisy machine hits all alike; `ratio` is the median over
turns of dense / variant. Both sides have the same activation function (gelu_pytorch_tanh), dtype, threads and
attention backend (sdpa). The layers are those of GPT-2 small; weights are random, which changes no timing.
"""

import argparse
import csv
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, __version__

from kn import KroneckerLinear, KroneckerSpec, compress, count_parameters
from kn.suite.devices import device_name

CONFIG = {"activation_function": "gelu_pytorch_tanh", "attn_implementation": "sdpa"}
CONFIG |= {"bos_token_id": 0, "eos_token_id": 0}
SHAPES = {
    "768 to 768": (768, 768, (2, 1)), "768 to 3072": (768, 3072, (2, 1)), "3072 to 768": (3072, 768, (1, 2)),
}
ALL = KroneckerSpec(layers="all")
MMAP = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # for measured memory: what is freed goes back to the system


class Materialised(nn.Module):
    """torch.kron at every call, as other libraries do it."""

    def __init__(self, layer: KroneckerLinear):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return F.linear(x, torch.kron(self.layer.A[0], self.layer.B[0]), self.layer.bias)


class ExpandFirst(nn.Module):
    """The B side first whatever it costs, then A: y = A (X Bᵀ)."""

    def __init__(self, layer: KroneckerLinear):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        a, b = self.layer.A[0], self.layer.B[0]
        z = torch.einsum("...kl,jl->...jk", x.unflatten(-1, (a.shape[1], -1)), b)
        return F.linear(z, a).transpose(-1, -2).flatten(-2) + self.layer.bias


def calls(function, modules: dict) -> dict:
    return {key: partial(function, module) for key, module in modules.items()}


class Bench:
    """The options, and what every case needs."""

    def __init__(self, options, dtype: str):
        self.options, self.name, self.device = options, dtype, options.device
        self.dtype = getattr(torch, dtype)
        self.peer = None
        if options.peers and dtype == "float32" and options.device == "cpu":
            command = [options.peers, Path(__file__).with_name("peers.py")]
            pipe = subprocess.PIPE
            self.peer = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)

    def to(self, module):
        """A module as it is timed."""
        return module.to(self.device, self.dtype)

    def variants(self, modules: dict) -> dict:
        """The modules, and each compiled as well where that was asked for."""
        if not self.options.compile:
            return modules
        return modules | {f"{key}, compiled": torch.compile(module) for key, module in modules.items()}

    def layers(self, rows: int, backward: bool) -> dict:
        """{case: {variant: a call}} for single layers."""
        found = {}
        for name, (n, m, b_shape) in SHAPES.items():
            dense = nn.Linear(n, m)
            ours = KroneckerLinear.from_linear(dense, b_shape)
            x = torch.randn(rows, n, device=self.device, dtype=self.dtype, requires_grad=backward)
            grad = torch.randn(rows, m, device=self.device, dtype=self.dtype)

            def call(module, x=x, grad=grad):
                if not backward:
                    with torch.no_grad():
                        return module(x)
                module.zero_grad()
                x.grad = None
                return module(x).backward(grad)

            modules = {"dense": dense, "kronecker": ours, "torch.kron": Materialised(ours)}
            modules["expand first"] = ExpandFirst(ours)
            variants = self.variants({key: self.to(module) for key, module in modules.items()})
            found[name] = calls(call, variants)
            if self.peer:
                asked = {"inputs": n, "outputs": m, "b": b_shape, "rows": rows, "backward": backward}
                asked["threads"] = self.options.threads
                for how in ("factorized", "reconstructed"):
                    found[name][f"tensorly-torch, {how}"] = self.ask(asked, how)
        return found

    def ask(self, asked: dict, how: str):
        """A call that lets the other environment time itself."""

        def call() -> float:
            if getattr(self, "asked", None) != asked:
                self.asked = asked
                self.peer.stdin.write(json.dumps(asked) + "\n")
            self.peer.stdin.write(how + "\n")
            self.peer.stdin.flush()
            return float(self.peer.stdout.readline())

        return call

    def blocks(self, rows: int) -> dict:
        """Feed-forward and attention of one layer, dense, compressed, folded."""
        dense = GPT2LMHeadModel(GPT2Config(n_layer=1, vocab_size=64, **CONFIG)).eval()
        ours = compress(dense, ALL)
        models = {"dense": dense, "kronecker": ours, "folded": ours.fold()}
        x = torch.randn(1, rows, 768, device=self.device, dtype=self.dtype)

        @torch.no_grad()
        def run(module):
            module(x)

        parts = {key: self.to(model).transformer.h[0] for key, model in models.items()}
        cases = {
            "ffn block": {key: block.mlp for key, block in parts.items()},
            "attention block": {key: block.attn for key, block in parts.items()},
        }
        return {case: calls(run, self.variants(modules)) for case, modules in cases.items()}

    def models(self, only: str = "") -> dict[str, nn.Module]:
        """Whole models at the paper's size, or one of them."""

        def dense(layers=12):
            torch.manual_seed(0)
            return GPT2LMHeadModel(GPT2Config(n_layer=layers, **CONFIG)).eval()

        make = {
            "dense": dense, "DistilGPT2's shape": lambda: dense(6),
            "kronecker": lambda: compress(dense()), "folded": lambda: compress(dense()).fold(),
            "tied head, folded": lambda: compress(dense(), KroneckerSpec(head="tied")).fold(),
            "every layer, folded": lambda: compress(dense(), ALL).fold(),
        }
        return {key: self.to(build()) for key, build in make.items() if only in ("", key)}

    @torch.no_grad()
    def decode(self, model, batch: int, tokens: int) -> None:
        """Greedy decoding with cache after a prompt of 16 tokens."""
        ids, cache = torch.ones(batch, 16, dtype=torch.long, device=self.device), None
        for _ in range(tokens):
            output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, ids = output.past_key_values, output.logits[:, -1:].argmax(-1)

    def whole(self, batch: int) -> dict:
        """Prefill of 1,024 tokens without the head, decoding of 128 with it."""
        made, ids = self.models(), torch.ones(batch, 1024, dtype=torch.long, device=self.device)

        @torch.no_grad()
        def prefill(model):
            model.transformer(input_ids=ids, use_cache=False)

        return {
            f"prefill {batch}x1024, no head": calls(prefill, self.variants(made)),
            f"decode {batch}x128": calls(partial(self.decode, batch=batch, tokens=128), made),
        }

    def seconds(self, call) -> float:
        """Of one call, by its own word or by the clock."""
        if self.device != "cpu":
            torch.cuda.synchronize()
        started = time.perf_counter()
        own = call()
        if self.device != "cpu":
            torch.cuda.synchronize()
        return own if isinstance(own, float) else time.perf_counter() - started

    def measure(self, variants: dict, repeats: int) -> dict[str, list[float]]:
        """Seconds of each variant, timed in turns after two warm-ups."""
        for call in (*variants.values(), *variants.values()):
            call()
        times: dict[str, list[float]] = {key: [] for key in variants}
        for _ in range(repeats):
            for key, call in variants.items():
                times[key].append(self.seconds(call))
        return times


def operations(bench: Bench, repeats: int) -> dict[str, dict[str, list[float]]]:
    """Milliseconds of the feed-forward block by kind of operation (torch's profiler), of each call."""
    kinds = dict.fromkeys(("aten::addmm", "aten::mm", "aten::addmv_", "aten::bmm"), "products")
    kinds["aten::gelu"] = "gelu"
    found: dict[str, dict[str, list[float]]] = {kind: {} for kind in ("products", "gelu", "the rest")}
    for variant, call in bench.blocks(1024)["ffn block"].items():
        call()
        for _ in range(repeats):
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                call()
            sums = dict.fromkeys(found, 0.0)
            for event in profile.key_averages():
                sums[kinds.get(event.key, "the rest")] += event.self_cpu_time_total / 1000
            for kind, value in sums.items():
                found[kind].setdefault(variant, []).append(value)
    return found


def resident() -> float:
    """Most megabytes this process has held since the mark was last set."""
    status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1e3


def footprint(options, variant: str) -> dict[str, float]:
    """Megabytes on disk and, above the weights, at the peak of a prefill and a training step of 1x1024."""
    bench = Bench(options, "float32")
    model = bench.models(variant)[variant]
    gc.collect()
    ids, found = torch.ones(1, 1024, dtype=torch.long, device=options.device), {}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        found["on disk"] = sum(p.stat().st_size for p in Path(folder).glob("*.safetensors")) / 1e6
    found["parameters"] = count_parameters(model)["total"] / 1e6

    def prefill():
        with torch.no_grad():
            model.transformer(input_ids=ids, use_cache=False)

    def train():
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    def peak(call) -> float:
        if options.device != "cpu":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            call()
            return (torch.cuda.max_memory_allocated() - before) / 1e6
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # sets the mark to what is held now
        before = resident()
        call()
        return resident() - before

    peaks = {"peak of a prefill": peak(prefill)}
    return found | peaks | ({} if "folded" in variant else {"peak of a training step": peak(train)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32,bfloat16")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--peers", default="", help="Python with tensorly-torch: see peers.py")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--footprint", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.footprint:
        print(json.dumps(footprint(options, options.footprint)))
        return
    name = torch.cuda.get_device_name() if options.device == "cuda" else device_name()
    machine = {
        "device": name, "threads": options.threads, "torch": torch.__version__, "transformers": __version__,
        "python": platform.python_version(),
    }
    rows = []

    def add(group, case, variant, dtype, unit, values, ratio):
        low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
        rows.append({
            "group": group, "case": case, "variant": variant, "dtype": dtype, "unit": unit,
            "median": f"{middle:.4g}", "low": f"{low:.4g}", "high": f"{high:.4g}",
            "ratio": f"{ratio:.3f}", "n": len(values), **machine,
        })
        line = f"{group:<38}{case:<24}{dtype:<10}{variant:<30}{middle:>10.3f} {unit}  {ratio:>7.3f}x"
        print(line, flush=True)

    for dtype in options.dtype.split(","):
        bench, repeats = Bench(options, dtype), options.repeats
        groups = {
            f"layer, forward{' and backward' if backward else ''}, {rows} rows": (
                bench.layers, (rows, backward), 2 * repeats,
            )
            for backward in (False, True) for rows in (1, 64, 1024)
        }
        groups |= {
            "block, 1024 rows": (bench.blocks, (1024,), 2 * repeats),
            "model, batch 1": (bench.whole, (1,), repeats // 2), "model, batch 8": (bench.whole, (8,), 3),
        }
        for group, (make, arguments, turns) in groups.items():
            if group == "model, batch 8" and dtype != options.dtype.split(",")[0]:
                continue  # minutes; the first dtype says it
            cases = (group, *SHAPES, "ffn block", "attention block", "prefill", "decode")
            if options.only and not any(options.only in case for case in cases):
                continue
            for case, variants in make(*arguments).items():
                if options.only in f"{group} {case}":
                    times = bench.measure(variants, max(3, turns))
                    for variant, seconds in times.items():
                        ratios = [a / b for a, b in zip(times["dense"], seconds, strict=True)]
                        milliseconds = [1000 * s for s in seconds]
                        add(group, case, variant, dtype, "ms", milliseconds, statistics.median(ratios))
        if options.device == "cpu" and dtype == "float32" and options.only in "ffn block, operations":
            for kind, values in operations(bench, options.repeats).items():
                for variant, milliseconds in values.items():
                    ratio = statistics.median(values["dense"]) / statistics.median(milliseconds)
                    add("ffn block, operations", kind, variant, dtype, "ms", milliseconds, ratio)
    if not options.only or options.only in "footprint":
        dense = {}
        variants = (
            "dense", "DistilGPT2's shape", "kronecker", "folded", "tied head, folded", "every layer, folded",
        )
        for variant in variants:
            command = [sys.executable, __file__, "--device", options.device, "--footprint", variant]
            done = subprocess.run(command, env=os.environ | MMAP, stdout=subprocess.PIPE, check=True)
            for case, value in json.loads(done.stdout.splitlines()[-1]).items():
                unit, ratio = "M" if case == "parameters" else "MB", dense.setdefault(case, value) / value
                add("footprint", case, variant, "float32", unit, [value], ratio)
    out = options.out or Path(__file__).with_name(f"speed-{options.device}.csv")
    with out.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
