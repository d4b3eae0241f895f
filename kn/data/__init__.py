"""Text and tasks, and the hub's files.

`documentation` is mini's text; `glue` and `glue_submission` are GLUE, `glue_twins` mini's stand-ins for it,
`glue_baselines` baselines without a model. `mirror` fetches the hub's files, `hub` verifies them and
`hub_datasets`, which alone imports torch, reads them."""

from kn.data.glue import TASKS, Task
from kn.data.hub import SourceError

__all__ = ["SourceError", "TASKS", "Task"]
