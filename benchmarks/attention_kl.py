"""Eq. 3 alone, forward and with its backward pass, on a GPU, and how near its roofline it comes.

The Triton kernels are compared with the chunked form and with whole attention maps.

    PYTHONPATH=. python benchmarks/attention_kl.py [--device cpu] [--lengths 512,1024] [--heads 64x64,32x64]
                                                   [--out FILE]

triton   kn.attention_kl as a GPU takes it (kn/distill/attention_kl_triton.py) chunked  kn.attention_kl as
everything else takes it (kn/distill/attention_kl.py): a block of queries' scores at a time maps     both
models' softmax maps in float32 and F.kl_div on them

Losses and gradients are compared before anything is timed; ways take turns; times are medians. The roof of a
pass is the longer of bytes / bandwidth and FLOPs / peak, both measured on the card (a large copy, a large
product of the inputs' type). With T tokens, n = T (T + 1) / 2 pairs of a query and an allowed key, heads of
e_s and e_t numbers of w bytes, for each head of each sequence:

    forward    FLOPs n (2 e_s + 2 e_t)            bytes T (2 w (e_s + e_t) + 4)
               two products; q and k once, a row out
    backward   FLOPs n (2 e_s + 2 e_t + 4 e_s)    bytes T (2 w (e_s + e_t) + 2 w e_s + 4)
               scores again, then dq and dk

No way is counted as doing less: ours makes the scores twice in its backward pass, once for dq and once for
dk. The two exponentials of a pair are not in the roof, and at small heads they take longer than its products:
no kernel of this kind reaches it.
"""

import argparse
import csv
import statistics
import sys
import time
from importlib import import_module
from pathlib import Path

import torch
from torch.nn import functional as F

from kn.suite.devices import device_name

attention = import_module("kn.distill.attention_kl")  # kn.distill.attention_kl is the function
TINY = 1e-30  # below any probability that counts
# rounded slopes and products; float32 sums in another order
APART = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-4}
BUDGET = 0.5  # of the memory that is free: maps that need more are left out


def maps(q_s, k_s, q_t, k_t):
    """Eq. 3 as everybody writes it."""
    hidden = torch.ones(q_s.shape[2], q_s.shape[2], dtype=torch.bool, device=q_s.device).triu_(1)
    s, t = (
        (
            q @ k.transpose(-1, -2)
        ).float().mul(q.shape[-1] ** -0.5).masked_fill(hidden, -torch.inf).softmax(-1).clamp(min=TINY)
        for q, k in ((q_s, k_s), (q_t, k_t))
    )
    return F.kl_div(t.log(), s, reduction="sum") / q_s.shape[:3].numel()  # KL(S ‖ T)


def chunked(*inputs):
    chosen, attention.triton_backend = attention.triton_backend, lambda *_: None
    try:
        return attention.attention_kl(*inputs)
    finally:
        attention.triton_backend = chosen


def work(
    way: str, batch: int, heads: int, length: int, e_s: int, e_t: int, width: int
) -> tuple[float, float]:
    """(FLOPs, bytes) of "forward" or "forward and backward", by the formulas above."""
    pairs = length * (length + 1) / 2
    flops, moved = pairs * 2 * (e_s + e_t), length * (2 * width * (e_s + e_t) + 4)
    if way != "forward":
        flops, moved = 2 * flops + pairs * 4 * e_s, 2 * moved + length * 2 * width * e_s
    return batch * heads * flops, batch * heads * moved


def seconds(device: str, run) -> float:
    """Of one call."""
    if device == "cpu":
        started = time.perf_counter()
        run()
        return time.perf_counter() - started
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000


def roofs(dtype: torch.dtype) -> tuple[float, float]:
    """(bytes a second of a copy, FLOPs a second of a product) of this GPU, the best of ten."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    square = torch.randn(8192, 8192, device="cuda").to(dtype)
    target, product = torch.empty_like(source), torch.empty_like(square)
    copy = min(seconds("cuda", lambda: target.copy_(source)) for _ in range(10))
    return 2 * 2**30 / copy, 2 * 8192**3 / min(
        seconds("cuda", lambda: torch.mm(square, square, out=product)) for _ in range(10)
    )


def measure(
    options, length: int, e_s: int, e_t: int, dtype: torch.dtype, roof: tuple[float, float] | None
) -> list[dict]:
    """A line for each way and pass at one length and pair of head sizes."""
    cuda = options.device == "cuda"
    torch.manual_seed(0)
    inputs = [
        torch.randn(options.batch, options.attention_heads, length, e, device=options.device).to(dtype)
        for e in (e_s, e_s, e_t, e_t)
    ]
    for x in inputs[:2]:
        x.requires_grad_()
    ways = {"triton": attention.attention_kl} if cuda else {}
    ways |= {"chunked": chunked}
    room = torch.cuda.mem_get_info()[0] if cuda else options.memory * 1e9
    # about twelve float32 maps at once
    if 12 * 4 * options.batch * options.attention_heads * length**2 <= BUDGET * room:
        ways["maps"] = maps
    if cuda and attention.triton_backend(*inputs) is None:
        raise SystemExit(
            "the kernels cannot be used here: Triton, an NVIDIA GPU of Ampere or newer, and heads of 16, 32, "
            "64 or 128 are needed"
        )

    def both(way):
        return torch.autograd.grad(ways[way](*inputs), inputs[:2])

    @torch.no_grad()
    def forward(way):
        return ways[way](*inputs)

    losses = {way: float(forward(way)) for way in ways}
    slopes = {way: torch.cat([g.float().flatten() for g in both(way)]) for way in ways}
    apart = {way: float((slopes[way] - slopes["chunked"]).norm() / slopes["chunked"].norm()) for way in ways}
    # not a number is wrong, too
    wrong = [
        way for way in ways
        if not (apart[way] <= APART[dtype] and abs(losses[way] / losses["chunked"] - 1) <= APART[dtype])
    ]
    if wrong:
        raise SystemExit(
            f"{wrong[0]} is not the chunked form's loss at {length} tokens: {losses}, "
            f"gradients apart by {apart}"
        )
    del slopes
    found = []
    for name, call in (("forward", forward), ("forward and backward", both)):
        times, peaks = {way: [] for way in ways}, dict.fromkeys(ways, "")
        for _ in range(options.turns):
            for way in ways:
                if cuda:
                    torch.cuda.reset_peak_memory_stats()
                    before = torch.cuda.memory_allocated()
                times[way].append(seconds(options.device, lambda way=way, call=call: call(way)))
                if cuda:
                    peaks[way] = round((torch.cuda.max_memory_allocated() - before) / 1e6, 1)
        flops, moved = work(
            name, options.batch, options.attention_heads, length, e_s, e_t, inputs[0].element_size()
        )
        for way in ways:
            middle = statistics.median(times[way])

            line = {
                "way": way, "pass": name, "length": length, "student_head": e_s, "teacher_head": e_t,
                "dtype": options.dtype, "batch": options.batch, "heads": options.attention_heads,
                "ms": round(1e3 * middle, 4), "low": round(1e3 * min(times[way]), 4),
                "high": round(1e3 * max(times[way]), 4), "n": options.turns,
                "ratio": round(
                    statistics.median(a / b for a, b in zip(times["chunked"], times[way], strict=True)), 3
                ),
                "peak_mb": peaks[way], "gflops": round(flops / 1e9, 3), "mb_moved": round(moved / 1e6, 3),
                "tflops_per_second": round(flops / middle / 1e12, 3),
                "of_roof": round(max(moved / roof[0], flops / roof[1]) / middle, 4) if roof else "",
                "gradient_apart": f"{apart[way]:.1e}",
            }
            found.append(line)
            print(
                ", ".join(
                    f"{key} {line[key]}"
                    for key in (
                        "length", "student_head", "teacher_head", "pass", "way", "ms", "ratio", "peak_mb",
                        "of_roof",
                    )
                    if line[key] != ""
                ),
                flush=True,
            )
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument(
        "--dtype", default=None, choices=["bfloat16", "float16", "float32"],
        help="bfloat16 on a GPU, float32 on a CPU",
    )
    parser.add_argument("--lengths", default=None, help="512 to 8192 on a GPU, 256 to 1024 on a CPU")
    parser.add_argument("--heads", default="64x64,32x64", help="head sizes, student x teacher")
    parser.add_argument("--batch", type=int, default=None, help="8 on a GPU, 1 on a CPU")
    parser.add_argument("--attention-heads", type=int, default=12)
    parser.add_argument("--turns", type=int, default=None, help="20 on a GPU, 5 on a CPU")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory", type=float, default=16, help="GB that may be used on a CPU")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args(arguments)
    cuda = options.device == "cuda"
    if cuda and not torch.cuda.is_available():
        print(
            "no GPU was found, and these timings need one "
            "(--device cpu compares the chunked form with maps)",
            file=sys.stderr,
        )
        return 2
    for name, on_gpu, on_cpu in (
        ("dtype", "bfloat16", "float32"), ("lengths", "512,1024,2048,4096,8192", "256,512,1024"),
        ("batch", 8, 1), ("turns", 20, 5),
    ):
        if getattr(options, name) is None:
            setattr(options, name, on_gpu if cuda else on_cpu)
    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    roof = roofs(dtype) if cuda else None
    measured = {
        "bandwidth_gb_per_second": round(roof[0] / 1e9, 1) if roof else "",
        "peak_tflops_per_second": round(roof[1] / 1e12, 1) if roof else "",
    }

    facts = {
        "device": device_name(), "torch": torch.__version__, **measured,
        "threads": "" if cuda else options.threads,
        "command": "python benchmarks/attention_kl.py " + " ".join(
            sys.argv[1:] if arguments is None else arguments
        ),
    }
    sizes = [tuple(map(int, pair.split("x"))) for pair in options.heads.split(",")]
    found = [
        line | facts for length in map(int, options.lengths.split(",")) for e_s, e_t in sizes
        for line in measure(options, length, e_s, e_t, dtype, roof)
    ]
    file = options.out or Path(__file__).with_name(f"attention-{options.device}.csv")
    with file.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, list(found[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(found)
    print(
        f"written to {file.name}" + (
            "" if cuda
            else "; for a GPU: the same command without --device cpu"
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
