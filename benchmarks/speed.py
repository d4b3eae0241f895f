"""How fast the Kronecker layers and folded models are beside dense ones: one command, one tidy CSV.

    PYTHONPATH=. python benchmarks/speed.py [--threads 2] [--repeats 15] [--out benchmarks/speed-cpu.csv] [--only ffn]

Variants of a case are timed in turns, so that a noisy machine hits all alike; `ratio` is the median over turns of dense / variant.
Both sides have the same activation function (gelu_pytorch_tanh), dtype, threads and attention backend (sdpa).
"""

import argparse
import csv
import platform
import statistics
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from kn import KroneckerLinear, KroneckerSpec, compress
from kn.store import device_name

CONFIG = {"activation_function": "gelu_pytorch_tanh", "attn_implementation": "sdpa", "bos_token_id": 0, "eos_token_id": 0}
SHAPES = {"768 to 768": (768, 768, (2, 1)), "768 to 3072": (768, 3072, (2, 1)), "3072 to 768": (3072, 768, (1, 2))}


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


def layers(rows: int, backward: bool) -> dict:
    """{case: {variant: a call}} for single layers."""
    found = {}
    for name, (n, m, b_shape) in SHAPES.items():
        dense = nn.Linear(n, m)
        ours = KroneckerLinear.from_linear(dense, b_shape)
        x = torch.randn(rows, n, requires_grad=backward)
        grad = torch.randn(rows, m)

        def call(module, x=x, grad=grad):
            if not backward:
                with torch.no_grad():
                    return module(x)
            module.zero_grad()
            x.grad = None
            return module(x).backward(grad)

        variants = {"dense": dense, "kronecker": ours, "torch.kron": Materialised(ours), "expand first": ExpandFirst(ours)}
        found[name] = {key: (lambda module=module, call=call: call(module)) for key, module in variants.items()}
    return found


def blocks(rows: int) -> dict:
    """Feed-forward and attention of one layer, dense, compressed, folded."""
    dense = GPT2LMHeadModel(GPT2Config(n_layer=1, vocab_size=64, **CONFIG)).eval()
    ours = compress(dense, KroneckerSpec(layers="all"))
    models = {"dense": dense, "kronecker": ours, "folded": ours.fold()}
    x = torch.randn(1, rows, 768)

    def run(module):
        with torch.no_grad():
            return module(x)

    return {
        "ffn block": {key: (lambda module=m.transformer.h[0].mlp: run(module)) for key, m in models.items()},
        "attention block": {key: (lambda module=m.transformer.h[0].attn: run(module)) for key, m in models.items()},
    }


def models() -> dict[str, nn.Module]:
    """Whole models at the paper's size, with random weights."""
    dense = GPT2LMHeadModel(GPT2Config(**CONFIG)).eval()
    paper, everything = compress(dense), compress(dense, KroneckerSpec(layers="all"))
    return {"dense": dense, "DistilGPT2's shape": GPT2LMHeadModel(GPT2Config(n_layer=6, **CONFIG)).eval(), "kronecker": paper, "folded": paper.fold(), "every layer, folded": everything.fold()}


@torch.no_grad()
def decode(model, batch: int, tokens: int) -> None:
    """Greedy decoding with cache after a prompt of 16 tokens."""
    ids = torch.ones(batch, 16, dtype=torch.long)
    cache = None
    for _ in range(tokens):
        output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, ids = output.past_key_values, output.logits[:, -1:].argmax(-1)


def whole(batch: int, tokens: int) -> dict:
    """Prefill of 1,024 tokens without the head, decoding with it."""
    made, ids = models(), torch.ones(batch, 1024, dtype=torch.long)

    def prefill(model):
        with torch.no_grad():
            model.transformer(input_ids=ids, use_cache=False)

    return {
        f"prefill {batch}x1024, no head": {key: (lambda model=m: prefill(model)) for key, m in made.items()},
        f"decode {batch}x{tokens}": {key: (lambda model=m: decode(model, batch, tokens)) for key, m in made.items()},
    }


def measure(variants: dict, repeats: int) -> dict[str, list[float]]:
    """Seconds of each variant, timed in turns after one warm-up."""
    for call in variants.values():
        call()
    times: dict[str, list[float]] = {key: [] for key in variants}
    for _ in range(repeats):
        for key, call in variants.items():
            started = time.perf_counter()
            call()
            times[key].append(time.perf_counter() - started)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("speed-cpu.csv"))
    parser.add_argument("--only", default="", help="cases whose name holds this")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    groups = [(f"layer, {'forward and backward' if b else 'forward'}, {rows} rows", lambda rows=rows, b=b: layers(rows, b), 3) for b in (False, True) for rows in (1, 64, 1024)]
    groups += [("block, 1024 rows", lambda: blocks(1024), 2), ("model", lambda: whole(1, 64), 1)]
    machine = {"device": device_name(), "threads": options.threads, "dtype": "float32", "torch": torch.__version__, "python": platform.python_version()}
    rows = []
    for group, make, more in groups:
        for case, variants in make().items():
            if options.only not in f"{group} {case}":
                continue
            times = measure(variants, max(5, options.repeats * more // (3 if group == "model" else 1)))
            for variant, seconds in times.items():
                ratios = [a / b for a, b in zip(times["dense"], seconds, strict=True)]
                low, middle, high = (q for q in statistics.quantiles(seconds, n=4))
                rows.append({"group": group, "case": case, "variant": variant, "milliseconds": f"{1000 * middle:.4g}", "low": f"{1000 * low:.4g}", "high": f"{1000 * high:.4g}",
                             "ratio": f"{statistics.median(ratios):.3f}", "n": len(seconds), **machine})  # fmt: skip
                print(f"{group:<40}{case:<24}{variant:<22}{1000 * middle:>10.3f} ms  {rows[-1]['ratio']:>7}x", flush=True)
    with options.out.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
