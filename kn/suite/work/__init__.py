"""The work of the stages: one function a kind (part of stage keys), from a StageContext to the metrics."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from kn.suite.store import Stage, Store, Work
from kn.suite.work import beyond, datasets, pretrained, trainings
from kn.suite.work.context import StageContext

STAGE_FUNCTIONS: dict[str, Callable[[StageContext], dict]] = {
    "corpus": datasets.corpus, "glue": datasets.glue_tasks, "twins": datasets.glue_twins,
    "score": datasets.glue_scores, "shapes": pretrained.shapes, "pretrained": pretrained.pretrained_model,
    "decompose": pretrained.svd_start, "pretrain": trainings.light_pretraining,
    "finetune_lm": trainings.finetune_lm, "finetune_glue": trainings.finetune_glue,
    "twin_check": trainings.shortcut_check, "aligned": beyond.aligned_start,
    "heal": beyond.partial_pretraining, "compressed": beyond.compressed_model,
}


def _run_stage(function: Callable[[StageContext], dict], stage: Stage, folder: Path, store: Store) -> dict:
    return function(StageContext(stage, folder, store))


WORK: dict[str, Work] = {kind: partial(_run_stage, function) for kind, function in STAGE_FUNCTIONS.items()}
