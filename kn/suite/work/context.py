"""StageContext: settings, inputs and folders of the stage that is being made."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from kn.suite.store import Stage, Store


@dataclass(frozen=True)
class StageContext:
    """One stage being made. Its function writes into `folder`, and checkpoints into `scratch`."""

    stage: Stage
    folder: Path  # temporary; becomes the result
    store: Store

    @cached_property
    def settings(self) -> dict:
        """Everything but the fields that changes the result."""
        return json.loads(self.stage.settings)

    @property
    def resources(self) -> dict:
        """Hardware settings, which change no result."""
        return json.loads(self.stage.resources)

    @cached_property
    def rows(self) -> dict[str, Tensor]:
        """Token rows of the corpus: name → (n, context)."""
        return load_file(self.input_folder("corpus") / "rows.safetensors")

    @property
    def scratch(self) -> Path:
        """A folder for checkpoints, which survives a killed run."""
        return self.store.scratch(self.stage)

    def input(self, *kinds: str, **fields) -> Stage:
        """The one input of these kinds and fields; RuntimeError for none or several."""
        return input_stage(self.stage, *kinds, **fields)

    def input_folder(self, *kinds: str, **fields) -> Path:
        """Folder of the one input of these kinds and fields."""
        return self.store.folder(self.input(*kinds, **fields))

    def input_metrics(self, *kinds: str, **fields) -> dict:
        """Metrics of the one input of these kinds and fields."""
        return self.store.metrics(self.input(*kinds, **fields))


def input_stage(stage: Stage, *kinds: str, **fields) -> Stage:
    """The one input of a stage of these kinds and fields; RuntimeError for none or several."""
    found = [i for i in stage.inputs if i.kind in kinds and all(i[k] == v for k, v in fields.items())]
    if len(found) != 1:
        raise RuntimeError(f"{stage.path} has {len(found)} inputs of kind {' or '.join(kinds)}, expected one")
    return found[0]
