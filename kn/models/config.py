"""What a compressed model is made of: KroneckerSpec, and the configurations that keep it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from transformers import GPT2Config, LlamaConfig

NAMED_LAYERS = {"odd": "1::2", "even": "::2", "all": ":"}
Shape = tuple[int, int]


@dataclass(frozen=True)
class KroneckerSpec:
    """What becomes a Kronecker product (eq. 1): defaults are the paper's configuration (§3.2, Table 1) with the readings the README lists.

    layers: "odd" (1, 3, …, counted from 0), "even", "all", a tuple of indices, or indices and slices in a string ("0,2,6:",
    "-4:"). factor: how many outputs (query, key, value, c_fc) or inputs (output projection, c_proj, embedding) share one
    entry of A. shapes and ranks: exceptions by pattern, the last that matches counts; a pattern names a matrix ("mlp.*")
    or one layer's ("3.mlp.c_fc"), a shape is B's (rows, columns) or None to leave the matrix dense. embedding_factor:
    None is `factor`. head: "dense" (a clone of the teacher's, as in the paper) or "tied" (the embedding's own factors).
    scale: see `nearest_kronecker`. Raises TypeError or ValueError for values that no model can take.
    """

    layers: str | tuple[int, ...] = "odd"
    factor: int = 2
    rank: int = 1
    embedding: bool = True
    out_proj: bool = True
    init: str = "svd"
    scale: str = "sqrt"
    shapes: Mapping[str, Shape | None] = field(default_factory=dict)
    ranks: Mapping[str, int] = field(default_factory=dict)
    embedding_factor: int | None = None
    head: str = "dense"

    def __post_init__(self):
        if isinstance(self.layers, list):  # JSON has no tuples
            object.__setattr__(self, "layers", tuple(self.layers))
        for name, value in {"shapes": self.shapes, "ranks": self.ranks}.items():
            if not isinstance(value, Mapping) or not all(isinstance(pattern, str) for pattern in value):
                raise TypeError(f"{name} is {value!r}: a mapping from patterns such as 'mlp.*' wanted")
        if not isinstance(self.layers, str | tuple):
            raise TypeError(f"layers is {self.layers!r}: 'odd', 'even', 'all', indices and slices such as '0,2,6:', or a tuple of indices wanted")
        for name, value in {"embedding": self.embedding, "out_proj": self.out_proj}.items():
            if not isinstance(value, bool):
                raise TypeError(f"{name} is {value!r}: True or False wanted")
        for name, value, allowed in (("init", self.init, ("svd", "aligned")), ("scale", self.scale, ("sqrt", "unit_b"))):
            if value not in allowed:
                raise ValueError(f"{name} {value!r} is unknown: allowed are {' and '.join(map(repr, allowed))}")
        for pattern, shape in self.shapes.items():
            if shape is not None and not isinstance(shape, tuple | list):
                raise TypeError(f"shapes[{pattern!r}] {shape!r} is not allowed: give B's (rows, columns), such as (2, 1), or None to leave the matrix dense")
        object.__setattr__(self, "shapes", {pattern: shape if shape is None else tuple(shape) for pattern, shape in self.shapes.items()})
        for name, value in {"factor": self.factor, "rank": self.rank, "embedding_factor": self.embedding_factor, **{f"ranks[{p!r}]": r for p, r in self.ranks.items()}}.items():
            if not (value is None and name == "embedding_factor") and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{name} {value!r} is not allowed: give a whole number of at least 1")
        for pattern, shape in self.shapes.items():
            if shape is not None and (len(shape) != 2 or not all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in shape)):
                raise ValueError(f"shapes[{pattern!r}] {shape!r} is not allowed: give B's (rows, columns), such as (2, 1), or None to leave the matrix dense")
        if self.head not in ("dense", "tied"):
            raise ValueError(f"head {self.head!r} is unknown: allowed are 'dense' and 'tied'")
        if self.head == "tied" and not self.embedding:
            raise ValueError("head 'tied' is the embedding's factors used again: it needs embedding=True")

    def indices(self, n_layer: int) -> tuple[int, ...]:
        """Indices of the compressed layers; ValueError names what is allowed."""
        if not isinstance(self.layers, str):
            found = list(self.layers)
        else:
            found, exists = [], range(n_layer)
            for item in NAMED_LAYERS.get(self.layers, self.layers).replace(" ", "").split(","):
                if re.fullmatch(r"(-?\d+)?:(-?\d+)?(:[1-9]\d*)?", item):
                    found += exists[slice(*(int(end) if end else None for end in item.split(":")))]
                elif item.isdecimal():
                    found.append(int(item))
                else:
                    raise ValueError(f"layers {self.layers!r} is unknown: allowed are 'odd', 'even', 'all', indices and slices such as '0,2,6:', or a tuple of indices below {n_layer}")
            if not found:
                raise ValueError(f"layers {self.layers!r} matches nothing: the model has layers 0 to {n_layer - 1}")
        wrong = [i for i in found if not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < n_layer]
        if wrong:
            raise ValueError(f"layer {str(wrong[0])[:40]} does not exist: the model has layers 0 to {n_layer - 1}")
        return tuple(sorted(set(found)))

    def plan(self, n_layer: int, matrices: Mapping[str, str], out_proj: str) -> dict[str, tuple[Shape, int]]:
        """{"layer.matrix": (B's shape, rank)} for all that is compressed; `matrices` says which side of each is shared, "outputs" or "inputs". ValueError for patterns or layers that match nothing."""
        layers = self.indices(n_layer)
        sides = {path: side for path, side in matrices.items() if self.out_proj or path != out_proj}
        plan: dict[str, tuple[Shape | None, int]] = {}
        for index in layers:
            for path, side in sides.items():
                plan[f"{index}.{path}"] = (self.factor, 1) if side == "outputs" else (1, self.factor), self.rank

        def matching(kind: str, pattern: str) -> list[str]:
            names = [name for name in plan if fnmatchcase(name, pattern) or fnmatchcase(name.partition(".")[2], pattern)]
            if not names:
                where = f"{', '.join(sides)} in layers {', '.join(map(str, layers)) or '(none)'}"
                raise ValueError(f"{kind} pattern {pattern!r} matches nothing: compressed are {where}; write 'mlp.*', or '3.mlp.*' for layer 3")
            return names

        for pattern, shape in self.shapes.items():
            plan |= {name: (shape, plan[name][1]) for name in matching("shapes", pattern)}
        for pattern, rank in self.ranks.items():
            plan |= {name: (plan[name][0], rank) for name in matching("ranks", pattern)}
        kept = {name: (shape, rank) for name, (shape, rank) in plan.items() if shape is not None}
        if not kept and not self.embedding:
            raise ValueError(f"layers {self.layers!r} and embedding=False leave nothing to compress: the model has {', '.join(matrices)} in layers 0 to {n_layer - 1}")
        return kept


class _KroneckerConfig:
    """What the configurations share: the spec."""

    kronecker: dict | None

    def __post_init__(self, **kwargs):
        self.tie_word_embeddings = self.spec.head == "tied"
        super().__post_init__(**kwargs)

    @property
    def spec(self) -> KroneckerSpec:
        """The KroneckerSpec this model was built with."""
        return KroneckerSpec(**(self.kronecker or {}))


class KnGPT2Config(_KroneckerConfig, GPT2Config):
    """KnGPT2's configuration (§3.2 of the paper): GPT-2's and, in `kronecker`, the fields of KroneckerSpec that shape the model."""

    model_type = "kngpt2"
    kronecker: dict | None = None
    folded: bool = False  # narrow inference: fold.py
    provenance: dict | None = None  # of what it was made: card.py


class KnLlamaConfig(_KroneckerConfig, LlamaConfig):
    """Llama's configuration for Kronecker products (eq. 1): its own and, in `kronecker`, the fields of KroneckerSpec that shape the model."""

    model_type = "knllama"
    kronecker: dict | None = None
    folded: bool = False
    provenance: dict | None = None
