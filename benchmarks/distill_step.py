"""A whole ILKD step (eq. 2-5, forward and backward) by the usual way and by ours.

Tokens a second and peak memory, GPT-2 of the usual width, random weights.

    PYTHONPATH=. python benchmarks/distill_step.py [--lengths 128,512,1024] [--device cuda] [--out FILE]

usual             Hugging Face's eager attention with output_attentions=True, F.kl_div on the maps, logits of
the student in one piece usual, fused GELU the same with PyTorch's fused tanh-GELU for GPT-2's gelu_new (the
same function), which ours takes, too ours              SDPA (on a CPU above 256 tokens), kn.attention_kl on
queries and keys, the cross-entropy without all logits plain             an LM step of the student and a
forward pass of the teacher: what cannot be saved Losses and gradients of the three are compared before
anything is timed. Ways take turns; a ratio is the median over turns of the usual way's time and theirs. Peak
memory is that of a fresh process above its weights, gradients included.
"""

import argparse
import csv
import json
import resource
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, __version__

from kn import capture, compress
from kn.distill.ilkd import streaming_ilkd_loss
from kn.suite.devices import device_name
from kn.suite.executors import release
from kn.suite.work.pretrained import EAGER_MAX_TOKENS

WAYS = ("usual", "usual, fused GELU", "ours", "plain")
ALPHAS = (0.5, 0.5, 0.5, 0.1)
TINY = 1e-30  # below any probability that counts
# on a CPU, by the longest length: beyond them the usual way needs more than 24 GB
LAYERS = {1024: 12, 2048: 6, 4096: 2}


def build(way: str, length: int, layers: int, device: str):
    """(student, teacher) with their weights from one seed.

    Dropout is off, or the usual way's maps would be compared after it.
    """
    torch.manual_seed(0)
    fused = "gelu_new" if way in ("usual", "plain") else "gelu_pytorch_tanh"
    config = GPT2Config(
        n_layer=layers, n_positions=length, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        activation_function=fused,
    )
    teacher = GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    student = compress(teacher)
    for model in (teacher, student):
        # as stages choose it
        model.set_attn_implementation(
            "eager" if way.startswith("usual") or (device == "cpu" and length <= EAGER_MAX_TOKENS) else "sdpa"
        )
        model.config.use_cache = False
    teacher.eval().requires_grad_(False)
    if device == "cuda" and way in ("ours", "plain"):
        teacher.to(torch.bfloat16)
    return student.to(device).train(), teacher.to(device)


def usual(student, teacher, ids):
    """Eq. 5 as everybody writes it; hidden states are c_proj's outputs, as in ours."""
    kept = ([], [])
    hooks = [
        block.mlp.c_proj.register_forward_hook(lambda _m, _a, out, k=k: k.append(out))
        for model, k in zip((student, teacher), kept, strict=True) for block in model.transformer.h
    ]
    s = student(ids, labels=ids, output_attentions=True, output_hidden_states=True)
    with torch.no_grad():
        t = teacher(ids, output_attentions=True, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    rows = s.attentions[0].shape[:3].numel()
    maps = (
        (a.float().clamp(min=TINY), b.float().clamp(min=TINY))
        for a, b in zip(s.attentions, t.attentions, strict=True)
    )
    # KL(S ‖ T); without the clamp of a its masked zeros make every gradient NaN
    attention = sum(F.kl_div(b.log(), a, reduction="sum") / rows for a, b in maps)
    hidden = sum(F.mse_loss(a.float(), b.float()) for a, b in zip(*kept, strict=True))
    embedding = F.mse_loss(s.hidden_states[0], t.hidden_states[0])
    return ALPHAS[0] * embedding + ALPHAS[1] * attention + ALPHAS[2] * hidden + ALPHAS[3] * s.loss


def ours(student, teacher, ids):
    return streaming_ilkd_loss(
        capture(student, logits=False, input_ids=ids, labels=ids), teacher, ALPHAS, input_ids=ids
    )[0]


def plain(student, teacher, ids):
    with torch.no_grad():
        teacher.transformer(ids)
    return student(ids, labels=ids).loss


def flops(student, teacher, length: int) -> int:
    """Model FLOPs of one step at batch 1, recomputation not counted.

    6 a token and weight of the student, 2 of the teacher's blocks, and causal attention.
    """

    def products(model):
        return sum(
            p.numel() for name, p in model.named_parameters() if p.ndim >= 2 and "wte" not in name
            and "wpe" not in name
        )

    attention = 2 * length * student.config.n_embd * student.config.n_layer  # a token, forward
    blocks = sum(p.numel() for name, p in teacher.named_parameters() if p.ndim >= 2 and ".h." in name)
    return length * (6 * products(student) + 2 * blocks + (3 + 1) * attention)


def step(way: str, student, teacher, ids) -> tuple[float, float]:
    """(loss, seconds) of a forward and backward pass."""
    cuda = ids.device.type == "cuda"
    student.zero_grad(set_to_none=True)
    if cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    with torch.autocast("cuda", torch.bfloat16) if cuda else nullcontext():
        loss = {"ours": ours, "plain": plain}.get(way, usual)(student, teacher, ids)
    loss.backward()
    if cuda:
        torch.cuda.synchronize()
    return float(loss.detach()), time.perf_counter() - started


def peak(way: str, length: int, layers: int, device: str, threads: int) -> None:
    """In a process of its own: prints the peak in bytes above the weights."""
    torch.set_num_threads(threads)
    models = build(way, length, layers, device)
    ids = torch.randint(0, 50257, (1, length), generator=torch.Generator().manual_seed(1)).to(device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(way, *models, ids)
        print(torch.cuda.max_memory_allocated() - before)
        return
    before = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * resource.getpagesize()
    # the peak is counted from here, not from building the models
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    step(way, *models, ids)
    status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    now = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    print(now - before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", default="128,256,512,1024,2048,4096")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--peak", default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        way, length, layers = json.loads(options.peak)
        return peak(way, length, layers, options.device, options.threads)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error(
            "no GPU was found: run this command where there is one"
        )
    torch.set_num_threads(options.threads)
    facts = {
        "device": device_name() if options.device == "cpu" else torch.cuda.get_device_name(),
        "threads": options.threads,
        "torch": torch.__version__,
        "transformers": __version__,
        "command": "python benchmarks/distill_step.py " + " ".join(sys.argv[1:]),
    }
    file = options.out or Path(__file__).with_name(f"distill-{options.device}.csv")
    found = []
    for length in map(int, options.lengths.split(",")):
        layers = 12 if options.device == "cuda" else next(
            (deep for longest, deep in LAYERS.items() if length <= longest), 1
        )
        models = {way: build(way, length, layers, options.device) for way in WAYS}
        work = flops(*models["ours"], length)
        ids = torch.randint(
            0, 50257, (1, length), generator=torch.Generator().manual_seed(1)
        ).to(options.device)
        losses, slopes = {}, {}
        for way in WAYS:
            losses[way], _ = step(way, *models[way], ids)
            slopes[way] = torch.cat([
                p.grad.flatten() for p in models[way][0].parameters() if p.grad is not None
            ])
        apart = {
            way: float((slopes[way] - slopes["usual"]).norm() / slopes["usual"].norm()) for way in WAYS
            if way != "plain"
        }
        bound = 2e-2 if options.device == "cuda" else 1e-4  # bf16 products; float32 sums in another order
        # not a number is wrong, too
        wrong = [
            way for way in apart
            if not (apart[way] <= bound and abs(losses[way] / losses["usual"] - 1) <= bound)
        ]
        if wrong:
            raise SystemExit(
                f"{wrong[0]} is not the usual way's loss at {length} tokens: {losses}, "
                f"gradients apart by {apart}"
            )
        del slopes
        times = {way: [] for way in WAYS}
        for _ in range(options.turns):
            for way in WAYS:
                times[way].append(step(way, *models[way], ids)[1])
        del models
        release()  # the peaks are taken by other processes, which need the memory
        for way in WAYS:
            rates = sorted(length / t for t in times[way])
            ratio, of_plain = (
                statistics.median(a / b for a, b in zip(*pair, strict=True))
                for pair in ((times["usual"], times[way]), (times[way], times["plain"]))
            )
            command = [
                sys.executable, __file__, "--device", options.device, "--threads", str(options.threads),
                "--peak", json.dumps([way, length, layers]),
            ]
            size = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

            line = {
                "way": way, "length": length, "layers": layers,
                "tokens_per_second": round(statistics.median(rates), 1), "low": round(rates[0], 1),
                "high": round(rates[-1], 1), "n": options.turns, "ratio": round(ratio, 3),
                "time_of_plain": round(of_plain, 3),
                "model_gflops_per_second": round(work / statistics.median(times[way]) / 1e9, 1),
                "peak_mb": round(size / 1e6, 1), "loss": round(losses[way], 6),
                "gradient_apart": f"{apart.get(way, float('nan')):.1e}", **facts,
            }
            found.append(line)
            print(
                ", ".join(
                    f"{key} {line[key]}"
                    for key in (
                        "length", "layers", "way", "tokens_per_second", "ratio", "time_of_plain", "peak_mb",
                        "loss", "gradient_apart",
                    )
                ),
                flush=True,
            )
        # after each length: the longest may need more memory than there is
        with file.open("w", newline="", encoding="utf-8") as handle:
            writer = csv.DictWriter(handle, list(found[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(found)
    print(
        f"written to {file.name}" + (
            "" if options.device == "cuda"
            else "; for a GPU: the same command with --device cuda"
        )
    )


if __name__ == "__main__":
    main()
