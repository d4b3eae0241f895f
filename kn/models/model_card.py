"""The model card (README.md) that every compressed model is saved with: what it is, how to use it, evaluation, provenance, limits."""

from __future__ import annotations

import re
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from kn.kronecker.layers import KroneckerEmbedding, KroneckerHead, KroneckerLinear

PACKAGES = ("kn", "torch", "transformers")
START = {
    "svd": "An SVD start without training after it has lost most of the teacher's quality: train it, then trust it.",
    "aligned": "An aligned start without training after it is somewhat worse than the teacher, more so far from its calibration text: measure it there.",
}  # what is said of a model that may not have been trained yet


def provenance(teacher) -> dict[str, str | int]:
    """Of what a compressed model is made: the teacher's class, name (a local folder's last part) and parameters, and the packages' versions."""
    found = {"teacher": Path(teacher.config.name_or_path or "unnamed").name if Path(teacher.config.name_or_path).is_absolute() else teacher.config.name_or_path or "unnamed"}
    found |= {"teacher_class": type(teacher).__name__, "teacher_parameters": sum(p.numel() for p in teacher.parameters())}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from a clone
            found[name] = "not installed as a package"
    return found


def plain(value: object) -> str:
    """A value as text that can neither start markup nor end a table's cell."""
    return " ".join(re.sub(r"[^\w .,:;+/()=%@×-]", " ", str(value)).split())[:200]


def table(head: tuple[str, ...], rows: list[tuple]) -> str:
    """A Markdown table, its cells made plain."""
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(plain(cell) for cell in row) + " |" for row in rows)])


def factors(model) -> list[tuple[str, str, str]]:
    """(matrix, factors, where) of all that is a Kronecker product, equal ones of several layers in one row."""
    found: dict[tuple[str, str], list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, (KroneckerLinear, KroneckerEmbedding, KroneckerHead)):
            layer, _, path = name.partition(".h.")[2].partition(".") if ".h." in name else name.partition(".layers.")[2].partition(".")
            a, b = ("x".join(map(str, p.shape[-2:])) for p in (module.A, module.B))
            more = ""
            if isinstance(module, KroneckerLinear):
                more = (f", {module.parts} of them side by side" if module.parts > 1 else "") + (f", sum of {module.rank}" if module.rank > 1 else "")
            found.setdefault((path or name, f"A {a}, B {b}{more}"), []).append(layer)
    return [(*key, f"layers {', '.join(layers)}" if layers[0] else "once") for key, layers in found.items()]


def text(model, parameters: dict[str, int], evaluation: dict[str, object] | None = None) -> str:
    """The card as Markdown; `parameters` is what count_parameters gives."""
    config, spec, made = model.config, model.config.spec, model.config.provenance or {}
    measured = "None was given to `save_pretrained(..., evaluation={what: value})`. Measure before you rely on it."
    if evaluation:
        measured = table(("What", "Value"), [(k, f"{v:.4g}" if isinstance(v, float) else v) for k, v in evaluation.items()])
    form = "It is folded: its compressed layers run narrow. It is for inference; keep the model from before `fold()` to train it or to make it dense." if config.folded else (
        "`model.fold()` gives the same function for inference with narrower compressed layers, `model.to_dense()` a stock transformers model with equal logits for any server."
    )  # fmt: skip
    return f"""---
library_name: transformers
tags: [kronecker, compression, {config.model_type}]
---

# {type(model).__name__}: {plain(made.get("teacher", "a model"))} with Kronecker products for weights

{parameters["total"]:,} parameters, {parameters["without_head"]:,} without an untied output head{f" (the teacher has {made['teacher_parameters']:,})" if made.get("teacher_parameters") else ""}.
Method: Kronecker Decomposition for GPT Compression; implementation: the Python package `kn`.

## Use

```python
import kn
from transformers import AutoModelFor{"CausalLM" if model.can_generate() else "SequenceClassification"}
model = AutoModelFor{"CausalLM" if model.can_generate() else "SequenceClassification"}.from_pretrained("this folder")
```

{form}

## What is compressed

{table(("Matrix", "Factors", "Where"), factors(model)) if factors(model) else "The narrow form keeps no factors; the specification below says what was compressed."}

`KroneckerSpec` fields: {"; ".join(f"{plain(k)} {plain(v)}" for k, v in asdict(spec).items())}

## Evaluation

{measured}

## Made from

{table(("What", "Value"), list(made.items())) if made else "Not recorded."}

## Limits

- {START.get(spec.init, "Not known how near to the teacher its start is: measure it.")}
- It has the teacher's language, biases and gaps, and its context of {config.max_position_embeddings} tokens.
- Without `import kn`, transformers does not know the architecture; a stock class given this folder would silently start its compressed layers at random.
"""


def write(model, folder: str | Path, parameters: dict[str, int], evaluation: dict[str, object] | None = None) -> None:
    """Write README.md; one that is there and was not written here is left alone."""
    path = Path(folder) / "README.md"
    if not path.exists() or "implementation: the Python package `kn`" in path.read_text():
        path.write_text(text(model, parameters, evaluation))
