"""How fast, how large and how hungry the Kronecker layers and folded models are beside dense ones: one command, one tidy CSV.

    PYTHONPATH=. python benchmarks/speed.py [--device cpu] [--dtype float32,bfloat16] [--compile] [--peers peers/bin/python]
                                            [--threads 2] [--repeats 15] [--only ffn] [--out benchmarks/speed-cpu.csv]

Variants of a case are timed in turns, so that a noisy machine hits all alike; `ratio` is the median over turns of dense / variant.
Both sides have the same activation function (gelu_pytorch_tanh), dtype, threads and attention backend (sdpa). The layers are
those of GPT-2 small; weights are random, which changes no timing.
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
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, __version__

from kn import KroneckerLinear, KroneckerSpec, compress, count_parameters
from kn.suite.devices import device_name

CONFIG = {"activation_function": "gelu_pytorch_tanh", "attn_implementation": "sdpa", "bos_token_id": 0, "eos_token_id": 0}
SHAPES = {"768 to 768": (768, 768, (2, 1)), "768 to 3072": (768, 3072, (2, 1)), "3072 to 768": (3072, 768, (1, 2))}
ALL = KroneckerSpec(layers="all")
MMAP = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # where memory is measured: what is freed goes back to the system at once


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


class Bench:
    """The options, and what every case needs."""

    def __init__(self, options, dtype: str):
        self.options, self.name, self.dtype, self.device = options, dtype, getattr(torch, dtype), options.device
        self.peer = None
        if options.peers and dtype == "float32" and options.device == "cpu":
            self.peer = subprocess.Popen([options.peers, Path(__file__).with_name("peers.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def to(self, module):
        """A module as it is timed."""
        return module.to(self.device, self.dtype)

    def variants(self, modules: dict) -> dict:
        """The modules, and each compiled as well where that was asked for."""
        return modules | ({f"{key}, compiled": torch.compile(module) for key, module in modules.items()} if self.options.compile else {})

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

            modules = {"dense": dense, "kronecker": ours, "torch.kron": Materialised(ours), "expand first": ExpandFirst(ours)}
            found[name] = {key: (lambda module=module, call=call: call(module)) for key, module in self.variants({k: self.to(v) for k, v in modules.items()}).items()}
            if self.peer:
                asked = {"inputs": n, "outputs": m, "b": b_shape, "rows": rows, "backward": backward, "threads": self.options.threads}
                found[name] |= {f"tensorly-torch, {how}": self.ask(asked, how) for how in ("factorized", "reconstructed")}
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
        cases = {"ffn block": {k: h.mlp for k, h in parts.items()}, "attention block": {k: h.attn for k, h in parts.items()}}
        return {case: {key: (lambda module=module: run(module)) for key, module in self.variants(modules).items()} for case, modules in cases.items()}

    def models(self, only: str = "") -> dict[str, nn.Module]:
        """Whole models at the paper's size, or one of them."""

        def dense(layers=12):
            torch.manual_seed(0)
            return GPT2LMHeadModel(GPT2Config(n_layer=layers, **CONFIG)).eval()

        make = {
            "dense": dense, "DistilGPT2's shape": lambda: dense(6), "kronecker": lambda: compress(dense()), "folded": lambda: compress(dense()).fold(),
            "tied head, folded": lambda: compress(dense(), KroneckerSpec(head="tied")).fold(), "every layer, folded": lambda: compress(dense(), ALL).fold(),
        }  # fmt: skip
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
            f"prefill {batch}x1024, no head": {key: (lambda model=m: prefill(model)) for key, m in self.variants(made).items()},
            f"decode {batch}x128": {key: (lambda model=m: self.decode(model, batch, 128)) for key, m in made.items()},
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
    """Which operation takes the time of the feed-forward block: milliseconds of each kind by torch's profiler, {kind: {variant: of each call}}."""
    kinds = {"aten::addmm": "products", "aten::mm": "products", "aten::addmv_": "products", "aten::bmm": "products", "aten::gelu": "gelu"}
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
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")) / 1e3


def footprint(options, variant: str) -> dict[str, float]:
    """In a fresh process: megabytes on disk, and peak megabytes above the weights of a prefill and of a training step of 1x1024."""
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
        Path("/proc/self/clear_refs").write_text("5")  # sets the mark to what is held now
        before = resident()
        call()
        return resident() - before

    return found | {"peak of a prefill": peak(prefill)} | ({} if "folded" in variant else {"peak of a training step": peak(train)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32,bfloat16")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--peers", default="", help="Python of an environment with tensorly-torch: see peers.py")
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
    machine = {"device": name, "threads": options.threads, "torch": torch.__version__, "transformers": __version__, "python": platform.python_version()}
    rows = []

    def add(group, case, variant, dtype, unit, values, ratio):
        low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
        rows.append({"group": group, "case": case, "variant": variant, "dtype": dtype, "unit": unit, "median": f"{middle:.4g}", "low": f"{low:.4g}", "high": f"{high:.4g}",
                     "ratio": f"{ratio:.3f}", "n": len(values), **machine})  # fmt: skip
        print(f"{group:<38}{case:<24}{dtype:<10}{variant:<30}{middle:>10.3f} {unit}  {ratio:>7.3f}x", flush=True)

    for dtype in options.dtype.split(","):
        bench = Bench(options, dtype)
        groups = {f"layer, {'forward and backward' if b else 'forward'}, {n} rows": (bench.layers, (n, b), 2 * options.repeats) for b in (False, True) for n in (1, 64, 1024)}
        groups |= {"block, 1024 rows": (bench.blocks, (1024,), 2 * options.repeats), "model, batch 1": (bench.whole, (1,), options.repeats // 2), "model, batch 8": (bench.whole, (8,), 3)}
        for group, (make, arguments, repeats) in groups.items():
            if group == "model, batch 8" and dtype != options.dtype.split(",")[0]:
                continue  # minutes; the first dtype says it
            if options.only and options.only not in group and not any(options.only in case for case in (*SHAPES, "ffn block", "attention block", "prefill", "decode")):
                continue
            for case, variants in make(*arguments).items():
                if options.only in f"{group} {case}":
                    times = bench.measure(variants, max(3, repeats))
                    for variant, seconds in times.items():
                        add(group, case, variant, dtype, "ms", [1000 * s for s in seconds], statistics.median(a / b for a, b in zip(times["dense"], seconds, strict=True)))
        if options.device == "cpu" and dtype == "float32" and options.only in "ffn block, operations":
            for kind, values in operations(bench, options.repeats).items():
                for variant, milliseconds in values.items():
                    add("ffn block, operations", kind, variant, dtype, "ms", milliseconds, statistics.median(values["dense"]) / statistics.median(milliseconds))
    if not options.only or options.only in "footprint":
        dense = {}
        for variant in ("dense", "DistilGPT2's shape", "kronecker", "folded", "tied head, folded", "every layer, folded"):
            done = subprocess.run([sys.executable, __file__, "--device", options.device, "--footprint", variant], env=os.environ | MMAP, capture_output=True, text=True, check=True)
            for case, value in json.loads(done.stdout.splitlines()[-1]).items():
                add("footprint", case, variant, "float32", "M" if case == "parameters" else "MB", [value], dense.setdefault(case, value) / value)
    with (options.out or Path(__file__).with_name(f"speed-{options.device}.csv")).open("w", newline="") as handle:
        writer = csv.DictWriter(handle, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
