"""The aligned start: exact symmetries of the teacher and least squares on calibration text, so that the
compressed model is near its teacher before any training."""

from kn.align.auto import equivalent_teacher, prepare
from kn.align.gpt2 import build_aligned_pair
from kn.align.low_rank import build_low_rank_pair

__all__ = ["build_aligned_pair", "build_low_rank_pair", "equivalent_teacher", "prepare"]
