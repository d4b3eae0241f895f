"""One rule for every interval: differences paired by seed, Student's t, 95 %."""

from __future__ import annotations

import math
import statistics

Values = dict[int | None, float]  # by seed; None where nothing is drawn


def interval(differences: list[float]) -> tuple[float, float, float]:
    """Mean and 95 % interval of seed-paired differences, by Student's t; the interval is not a number for fewer than two seeds."""
    from scipy import stats

    mean = statistics.fmean(differences)
    if len(differences) < 2:
        return mean, math.nan, math.nan
    half = float(stats.t.ppf(0.975, len(differences) - 1)) * statistics.stdev(differences) / math.sqrt(len(differences))
    return mean, mean - half, mean + half


def paired(left: Values, right: Values) -> dict[int | None, tuple[float, float]]:
    """The two values of every seed that both have; where nothing is drawn on one side its value stands beside every seed of the other."""
    if left and right and (set(left) == {None} or set(right) == {None}):
        seeds = [seed for seed in {**left, **right} if seed is not None] or [None]
        left, right = ({seed: side.get(seed, side.get(None)) for seed in seeds} for side in (left, right))
    return {seed: (left[seed], right[seed]) for seed in left if seed in right}
