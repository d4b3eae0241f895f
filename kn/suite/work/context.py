"""StageContext: settings, inputs and folders of the stage that is being made."""

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

    def input_folder(self, *kinds: str, **fields) -> Path:
        """Folder of the one input of these kinds and fields."""
        return self.store.folder(self.stage.input(*kinds, **fields))
