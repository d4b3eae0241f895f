"""What a KnGPT2 is made of: KroneckerSpec, and the configuration that keeps it. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import AutoConfig, GPT2Config


@dataclass(frozen=True)
class KroneckerSpec:
    """What becomes a Kronecker product: defaults are the paper's configuration with the readings the README lists.

    layers: "odd" (1, 3, …, counted from 0), "even", "all", or a tuple of indices. factor: how many outputs (query, key,
    value, c_fc) or inputs (output projection, c_proj, embedding) share one entry of A. scale: see `nearest_kronecker`.
    """

    layers: str | tuple[int, ...] = "odd"
    factor: int = 2
    rank: int = 1
    embedding: bool = True
    out_proj: bool = True
    init: str = "svd"
    scale: str = "sqrt"

    def indices(self, n_layer: int) -> tuple[int, ...]:
        """Indices of the compressed layers; ValueError names what is allowed."""
        named = {"odd": range(1, n_layer, 2), "even": range(0, n_layer, 2), "all": range(n_layer)}
        if isinstance(self.layers, str):
            if self.layers not in named:
                raise ValueError(f"layers {self.layers!r} is unknown: allowed are 'odd', 'even', 'all' or a tuple of indices below {n_layer}")
            return tuple(named[self.layers])
        wrong = [i for i in self.layers if not 0 <= i < n_layer]
        if wrong:
            raise ValueError(f"layer {wrong[0]} does not exist: the model has layers 0 to {n_layer - 1}")
        return tuple(sorted(set(self.layers)))


class KnGPT2Config(GPT2Config):
    """GPT-2's configuration and, in `kronecker`, the fields of KroneckerSpec that shape the model."""

    model_type = "kngpt2"
    kronecker: dict | None = None
    folded: bool = False  # narrow inference: fold.py

    @property
    def spec(self) -> KroneckerSpec:
        """The KroneckerSpec this model was built with."""
        fields = dict(self.kronecker or {})
        if isinstance(fields.get("layers"), list):
            fields["layers"] = tuple(fields["layers"])
        return KroneckerSpec(**fields)


AutoConfig.register(KnGPT2Config.model_type, KnGPT2Config, exist_ok=True)
