"""Text and tasks: documentation text (`documentation`), GLUE (`glue`, `glue_submission`), mini's stand-ins for it
(`glue_twins`) and baselines without a model (`glue_baselines`), and the hub's files (`mirror` fetches them, `hub`
verifies them, `hub_datasets` reads them). Only `hub_datasets` imports torch."""

from kn.data.glue import TASKS, Task
from kn.data.hub import SourceError

__all__ = ["SourceError", "TASKS", "Task"]
