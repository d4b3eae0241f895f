"""Model card (README.md) of a compressed model; its text is the template model_card.md.jinja."""

from __future__ import annotations

import re
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import jinja2

from kn.files import PACKAGE
from kn.kronecker.layers import KRONECKER_MODULES, KroneckerLinear

TEMPLATE = PACKAGE / "models" / "model_card.md.jinja"
SIGNATURE = "implementation: the Python package `kn`"  # stands in every card written here
PACKAGES = ("kn", "torch", "transformers")


def provenance(teacher) -> dict[str, str | int]:
    """The teacher's name (last part of a local path), class and parameter count, and package versions."""
    name = teacher.config.name_or_path or "unnamed"
    found: dict[str, str | int] = {
        "teacher": Path(name).name if Path(name).is_absolute() else name,
        "teacher_class": type(teacher).__name__,
        "teacher_parameters": sum(p.numel() for p in teacher.parameters()),
    }
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from a clone
            found[package] = "not installed as a package"
    return found


def plain(value: object) -> str:
    """A value as text that cannot start markup or end a table cell; floats with four digits."""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(re.sub(r"[^\w .,:;+/()=%@×-]", " ", text).split())[:200]


def factors(model) -> list[tuple[str, str, str]]:
    """(matrix, factors, layers) of every Kronecker product, equal ones of several layers in one row."""
    layers_of: dict[tuple[str, str], list[str]] = {}
    for name, module in model.named_modules():
        if not isinstance(module, KRONECKER_MODULES):
            continue
        block = re.search(r"(?:^|\.)(?:h|layers)\.(\d+)\.(.+)", name)
        layer, path = block.groups() if block else ("", name)
        a_shape, b_shape = ("x".join(map(str, p.shape[-2:])) for p in (module.A, module.B))
        description = f"A {a_shape}, B {b_shape}"
        if isinstance(module, KroneckerLinear) and module.num_fused > 1:
            description += f", {module.num_fused} fused"
        if isinstance(module, KroneckerLinear) and module.rank > 1:
            description += f", sum of {module.rank}"
        layers_of.setdefault((path, description), []).append(layer)
    where = {key: f"layers {', '.join(layers)}" if layers[0] else "once" for key, layers in layers_of.items()}
    return [(path, description, layers) for (path, description), layers in where.items()]


def render(model, parameters: dict[str, int], evaluation: dict | None = None) -> str:
    """The card as Markdown; `parameters` is count_parameters' result, `evaluation` {metric: value}."""
    environment = jinja2.Environment(keep_trailing_newline=True)
    environment.filters["plain"] = plain
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        config=model.config, spec=asdict(model.config.spec), provenance=model.config.provenance or {},
        class_name=type(model).__name__, parameters=parameters, evaluation=evaluation, factors=factors(model),
        auto_class=f"AutoModelFor{'CausalLM' if model.can_generate() else 'SequenceClassification'}",
    )


def write(model, folder: str | Path, parameters: dict[str, int], evaluation: dict | None = None) -> None:
    """Write the card to README.md, unless somebody else's README.md is there."""
    path = Path(folder) / "README.md"
    if not path.exists() or SIGNATURE in path.read_text(encoding="utf-8"):
        path.write_text(render(model, parameters, evaluation), encoding="utf-8")
