"""Model card (README.md) of a compressed model; its text is the template model_card.md.jinja."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import jinja2
from huggingface_hub import ModelCard

from kn.files import PACKAGE, installed_version
from kn.kronecker.layers import KroneckerLayer

TEMPLATE = PACKAGE / "models" / "model_card.md.jinja"
SIGNATURE = "implementation: the Python package `kn`"  # stands in every card written here
STOCK = "This model card has been automatically generated"  # in transformers' own, which says nothing


def provenance(teacher) -> dict[str, str | int]:
    """The teacher's name (last part of a local path), class and parameter count, and package versions."""
    name = teacher.config.name_or_path or "unnamed"
    found: dict[str, str | int] = {
        "teacher": Path(name).name if Path(name).is_absolute() else name,
        "teacher_class": type(teacher).__name__,
        "teacher_parameters": sum(p.numel() for p in teacher.parameters()),
    }
    for package in ("kn", "torch", "transformers"):
        found[package] = installed_version(package) or "not installed as a package"  # run from a clone
    return found


def plain(value: object) -> str:
    """A value as text that cannot start markup or end a table cell; floats with four digits."""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(re.sub(r"[^\w .,:;+/()=%@×-]", " ", text).split())[:200]


def factors(model) -> list[tuple[str, str, str]]:
    """(matrix, factors, layers) of every Kronecker product, equal ones of several layers in one row."""
    layers_of: dict[tuple[str, str], list[str]] = {}
    for name, module in model.named_modules():
        if not isinstance(module, KroneckerLayer):
            continue
        block = re.search(r"(?:^|\.)(?:h|layers)\.(\d+)\.(.+)", name)
        layer, path = block.groups() if block else ("", name)
        a_shape, b_shape = ("x".join(map(str, p.shape[-2:])) for p in (module.A, module.B))
        fused = f", {module.num_fused} fused" if module.num_fused > 1 else ""
        terms = f", sum of {module.rank}" if module.rank > 1 else ""
        layers_of.setdefault((path, f"A {a_shape}, B {b_shape}{fused}{terms}"), []).append(layer)
    where = [f"layers {', '.join(layers)}" if layers[0] else "once" for layers in layers_of.values()]
    return [(*key, layers) for key, layers in zip(layers_of, where, strict=True)]


def write(model, folder: str | Path, parameters: dict[str, int], evaluation: dict | None = None) -> None:
    """Write the card to README.md, unless somebody else's README.md is there; an old card's tags stay.
    `parameters` is count_parameters' result, `evaluation` {metric: value}."""
    path = Path(folder) / "README.md"
    old = path.read_bytes().decode(errors="replace") if path.exists() else SIGNATURE
    if SIGNATURE not in old and STOCK not in old:
        return
    environment = jinja2.Environment(keep_trailing_newline=True)
    environment.filters["plain"] = plain
    card = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        config=model.config, spec=asdict(model.config.spec), provenance=model.config.provenance or {},
        class_name=type(model).__name__, parameters=parameters, evaluation=evaluation, factors=factors(model),
        auto_class=f"AutoModelFor{'CausalLM' if model.can_generate() else 'SequenceClassification'}",
    )
    tags = ModelCard(old).data.tags if path.exists() else []  # without metadata it would warn
    if more := [tag for tag in tags or [] if tag not in ModelCard(card).data.tags]:
        card = card.replace("tags: [", f"tags: [{', '.join(map(json.dumps, more))}, ", 1)
    path.write_text(card, encoding="utf-8")
