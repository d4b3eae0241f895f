"""The rules for every interval: 95 %, Student's t, differences paired by seed.

    interval(values)    mean and interval over seeds, the tasks being those that they are
    two_way_interval(values)     mean and interval over tasks and seeds, both taken for drawn: what would hold for other tasks of the kind
    paired(left, right) the two values of every seed that both have
"""

from __future__ import annotations

import math
import statistics

Values = dict[int | None, float]  # by seed; None where nothing is drawn
LEVEL = 0.975  # of a two-sided 95 % interval


def interval(differences: list[float]) -> tuple[float, float, float]:
    """Mean and 95 % interval of seed-paired differences, by Student's t; the interval is not a number for fewer than two seeds."""
    mean = statistics.fmean(differences)
    if len(differences) < 2:
        return mean, math.nan, math.nan
    return _around(mean, statistics.variance(differences) / len(differences), len(differences) - 1)


def two_way_interval(values: dict[str, Values]) -> tuple[float, float, float]:
    """Mean and 95 % interval of values by task and seed: two-way random effects without replication, degrees of freedom by Satterthwaite.

    The variance of the mean is (MS_task + MS_seed − MS_rest) / (tasks · seeds), and no smaller than either alone gives. One seed leaves the
    variance over tasks, one task that over seeds. Raises ValueError where a task lacks a seed of another.
    """
    rows = [list(by_seed.values()) for by_seed in values.values()]
    if len({tuple(by_seed) for by_seed in values.values()}) != 1 or not rows[0]:
        raise ValueError(f"tasks must have the same seeds: {({task: list(by_seed) for task, by_seed in values.items()})}")
    tasks, seeds = len(rows), len(rows[0])
    means, columns = [statistics.fmean(row) for row in rows], [statistics.fmean(column) for column in zip(*rows, strict=True)]
    if tasks == 1 or seeds == 1:
        return interval(columns if tasks == 1 else means)
    mean = statistics.fmean(means)
    by_task, by_seed = seeds * statistics.variance(means), tasks * statistics.variance(columns)
    rest = sum((v - m - c + mean) ** 2 for row, m in zip(rows, means, strict=True) for v, c in zip(row, columns, strict=True)) / ((tasks - 1) * (seeds - 1))
    spread = max(by_task + by_seed - rest, by_task, by_seed)
    parts = by_task**2 / (tasks - 1) + by_seed**2 / (seeds - 1) + rest**2 / ((tasks - 1) * (seeds - 1))
    return _around(mean, spread / (tasks * seeds), spread**2 / parts if parts else 1)


def _around(mean: float, variance: float, freedom: float) -> tuple[float, float, float]:
    from scipy import stats

    half = float(stats.t.ppf(LEVEL, freedom)) * math.sqrt(variance)
    return mean, mean - half, mean + half


def paired(left: Values, right: Values) -> dict[int | None, tuple[float, float]]:
    """The two values of every seed that both have; where nothing is drawn on one side its value stands beside every seed of the other."""
    if left and right and (set(left) == {None} or set(right) == {None}):
        seeds: list[int | None] = [seed for seed in {**left, **right} if seed is not None] or [None]
        left, right = ({seed: side[seed if seed in side else None] for seed in seeds} for side in (left, right))
    return {seed: (left[seed], right[seed]) for seed in left if seed in right}
