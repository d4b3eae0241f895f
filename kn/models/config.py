"""KroneckerSpec, which says what is compressed and how, and the model configurations that store it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from transformers import GPT2Config, LlamaConfig

from kn.kronecker import checks
from kn.kronecker.nearest import SCALES, Shape

INITS, HEADS = ("svd", "aligned"), ("dense", "tied")
NAMED_LAYERS = {"odd": "1::2", "even": "::2", "all": ":"}
LAYER_SYNTAX = "'odd', 'even', 'all', indices and slices such as '0,2,6:', or a tuple of indices"
Target = tuple[str, int]
FactorShapes = dict[str, tuple[Shape, int]]  # "layer.path" or, for one block, "path": B's shape and the rank


@dataclass(frozen=True)
class KroneckerSpec:
    """What becomes a Kronecker product (eq. 1); the defaults are the paper's configuration (§3.2, Table 1).
    Raises TypeError or ValueError for values that no model can take."""

    layers: str | tuple[int, ...] = "odd"  # "odd" (from 0), "even", "all", "0,2,6:", "-4:", or indices
    factor: int = 2  # outputs (q, k, v, c_fc) or inputs (out_proj, c_proj, embedding) per entry of A
    rank: int = 1  # number of Kronecker products that are summed
    embedding: bool = True  # whether the token embedding is compressed
    out_proj: bool = True  # whether the attention's output projection is
    init: str = "svd"  # start: "svd" (nearest Kronecker products) or "aligned" (needs calibration text)
    scale: str = "sqrt"  # how singular values are shared out: see nearest_kronecker
    # Exceptions by pattern, the last that matches counts. A pattern names a matrix ("mlp.*") or one layer's
    # ("3.mlp.c_fc"); a shape is B's (rows, columns), or None to leave the matrix dense.
    shapes: Mapping[str, Shape | None] = field(default_factory=dict)
    ranks: Mapping[str, int] = field(default_factory=dict)
    embedding_factor: int | None = None  # None: factor
    head: str = "dense"  # "dense" (a clone of the teacher's, as in the paper) or "tied" to the embedding

    def __post_init__(self):
        if isinstance(self.layers, list):  # JSON has no tuples
            object.__setattr__(self, "layers", tuple(self.layers))
        if not isinstance(self.layers, str | tuple):
            raise TypeError(f"layers is {checks.describe_value(self.layers)}: expected {LAYER_SYNTAX}")
        for name, value in {"shapes": self.shapes, "ranks": self.ranks}.items():
            if not isinstance(value, Mapping) or not all(isinstance(pattern, str) for pattern in value):
                problem = f"{name} is {checks.describe_value(value)}"
                raise TypeError(f"{problem}: expected a mapping from patterns such as 'mlp.*'")
        shapes, alternative = dict(self.shapes), ", or None to leave the matrix dense"
        for pattern, shape in self.shapes.items():
            if shape is not None:
                shapes[pattern] = checks.require_shape(f"shapes[{pattern!r}]", shape, alternative)
        object.__setattr__(self, "shapes", shapes)
        numbers = {"factor": self.factor, "rank": self.rank, "embedding_factor": self.embedding_factor}
        for name, value in (numbers | {f"ranks[{p!r}]": rank for p, rank in self.ranks.items()}).items():
            if value is not None or name != "embedding_factor":
                checks.require_positive_int(name, value)
        for name in ("embedding", "out_proj"):
            checks.require_bool(name, getattr(self, name))
        for name, allowed in {"init": INITS, "scale": SCALES, "head": HEADS}.items():
            checks.require_choice(name, getattr(self, name), allowed)
        if self.head == "tied" and not self.embedding:
            raise ValueError("head 'tied' is the embedding's factors used again: it needs embedding=True")

    def indices(self, n_layer: int) -> tuple[int, ...]:
        """Indices of the compressed layers of `n_layer`. Raises ValueError for layers that do not exist."""
        exists = f"the model has layers 0 to {n_layer - 1}"
        found = self._parse_layers(n_layer) if isinstance(self.layers, str) else self.layers
        if not found and isinstance(self.layers, str):
            raise ValueError(f"layers {self.layers!r} matches nothing: {exists}")
        for index in found:
            if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < n_layer:
                raise ValueError(f"layer {str(index)[:40]} does not exist: {exists}")
        return tuple(sorted(set(found)))

    def _parse_layers(self, n_layer: int) -> list[int]:
        found: list[int] = []
        for item in NAMED_LAYERS.get(self.layers, self.layers).replace(" ", "").split(","):
            if re.fullmatch(r"(-?\d+)?:(-?\d+)?(:[1-9]\d*)?", item):
                found += range(n_layer)[slice(*(int(bound) if bound else None for bound in item.split(":")))]
            elif item.isdecimal():
                found.append(int(item))
            else:
                allowed = f"{LAYER_SYNTAX} below {n_layer}"
                raise ValueError(f"layers {self.layers!r} is unknown: allowed are {allowed}")
        return found

    def factor_shapes(self, n_layer: int, targets: Mapping[str, Target], out_proj: str) -> FactorShapes:
        """{"layer.path": (B's shape, rank)} of every compressed matrix of the blocks.

        `targets` maps the path of each matrix in a block to the side that shares an entry of A, "outputs" or
        "inputs", and its number of fused maps. Raises ValueError for patterns or layers that match nothing.
        """
        layers = self.indices(n_layer)
        paths = [path for path in targets if self.out_proj or path != out_proj]
        shapes = {"outputs": (self.factor, 1), "inputs": (1, self.factor)}
        found: dict[str, list] = {
            f"{index}.{path}": [shapes[targets[path][0]], self.rank] for index in layers for path in paths
        }
        for position, kind in enumerate(("shapes", "ranks")):
            for pattern, value in getattr(self, kind).items():
                names = [n for n in found if any(fnmatchcase(s, pattern) for s in (n, n.partition(".")[2]))]
                if not names:
                    choices = f"{', '.join(paths)} in layers {', '.join(map(str, layers)) or '(none)'}"
                    problem = f"{kind} pattern {pattern!r} matches nothing: compressed are {choices}"
                    raise ValueError(f"{problem}; write 'mlp.*', or '3.mlp.*' for layer 3")
                for name in names:
                    found[name][position] = value
        compressed = {name: (shape, rank) for name, (shape, rank) in found.items() if shape is not None}
        if not compressed and not self.embedding:
            problem = f"layers {self.layers!r} and embedding=False leave nothing to compress"
            raise ValueError(f"{problem}: the model has {', '.join(targets)} in layers 0 to {n_layer - 1}")
        return compressed


class _KroneckerConfig:
    """Mixin before a transformers configuration: ties the embeddings as the spec says."""

    kronecker: dict | None

    def __post_init__(self, **kwargs):
        self.tie_word_embeddings = self.spec.head == "tied"
        super().__post_init__(**kwargs)

    @property
    def spec(self) -> KroneckerSpec:
        """The KroneckerSpec this model was built with."""
        return KroneckerSpec(**(self.kronecker or {}))


class KnGPT2Config(_KroneckerConfig, GPT2Config):
    """KnGPT2's configuration (§3.2 of the paper): GPT-2's and, in `kronecker`, KroneckerSpec's fields."""

    model_type = "kngpt2"
    kronecker: dict | None = None
    folded: bool = False  # whether compressed layers run at 1/factor of their width: fold.py
    provenance: dict | None = None  # teacher and package versions: model_card.py


class KnLlamaConfig(_KroneckerConfig, LlamaConfig):
    """KnLlama's configuration (eq. 1): Llama's and, in `kronecker`, KroneckerSpec's fields."""

    model_type = "knllama"
    kronecker: dict | None = None
    folded: bool = False
    provenance: dict | None = None
