"""Intervals and verdicts: 95 %, Student's t, differences paired by seed."""

import math
import statistics
from collections.abc import Callable
from typing import NamedTuple

from scipy import stats

Values = dict[int | None, float]  # by seed; None where nothing is random
LEVEL = 0.975  # quantile of a two-sided 95 % interval
HELD = {True: "held", False: "not held", None: "undecided"}
REPRODUCED = {True: "reproduced", False: "not reproduced", None: "undecided"}


class Verdict(NamedTuple):
    """Whether a claim holds (None: undecided), its value and 95 % interval, n seeds (0: nothing random)."""

    holds: bool | None
    value: float
    low: float = math.nan
    high: float = math.nan
    n: int = 0
    unit: str = ""


def interval(differences: list[float]) -> tuple[float, float, float]:
    """Mean and 95 % interval of seed-paired differences, by Student's t; NaN for fewer than two seeds."""
    mean, n = statistics.fmean(differences), len(differences)
    if n < 2:
        return mean, math.nan, math.nan
    return _t_interval(mean, statistics.variance(differences) / n, n - 1)


def two_way_interval(values: dict[str, Values]) -> tuple[float, float, float]:
    """Mean and 95 % interval of values by task and seed: two-way random effects without replication.
    The variance of the mean is (MS_task + MS_seed − MS_rest) / (tasks · seeds), but no smaller than either
    alone gives; degrees of freedom by Satterthwaite. One seed leaves the variance over tasks, one task that
    over seeds. Raises ValueError where the tasks do not have the same seeds."""
    rows = [list(by_seed.values()) for by_seed in values.values()]
    if len({tuple(by_seed) for by_seed in values.values()}) != 1 or not rows[0]:
        seeds_by_task = {task: list(by_seed) for task, by_seed in values.items()}
        raise ValueError(f"tasks must have the same seeds: {seeds_by_task}")
    tasks, seeds = len(rows), len(rows[0])
    task_means = [statistics.fmean(row) for row in rows]
    seed_means = [statistics.fmean(column) for column in zip(*rows, strict=True)]
    if tasks == 1 or seeds == 1:
        return interval(seed_means if tasks == 1 else task_means)
    mean = statistics.fmean(task_means)
    ms_task, ms_seed = seeds * statistics.variance(task_means), tasks * statistics.variance(seed_means)
    residuals = (value - task_mean - seed_mean + mean
                 for row, task_mean in zip(rows, task_means, strict=True)
                 for value, seed_mean in zip(row, seed_means, strict=True))
    ms_rest = sum(residual**2 for residual in residuals) / ((tasks - 1) * (seeds - 1))
    spread = max(ms_task + ms_seed - ms_rest, ms_task, ms_seed)
    parts = ms_task**2 / (tasks - 1) + ms_seed**2 / (seeds - 1) + ms_rest**2 / ((tasks - 1) * (seeds - 1))
    return _t_interval(mean, spread / (tasks * seeds), spread**2 / parts if parts else 1)


def _t_interval(mean: float, variance: float, degrees_of_freedom: float) -> tuple[float, float, float]:
    half = float(stats.t.ppf(LEVEL, degrees_of_freedom)) * math.sqrt(variance)
    return mean, mean - half, mean + half


def paired(left: Values, right: Values) -> dict[int | None, tuple[float, float]]:
    """The two values of every seed that both have; a value without a seed is paired with every seed."""
    if left and right and (set(left) == {None} or set(right) == {None}):
        seeds: list[int | None] = [seed for seed in {**left, **right} if seed is not None] or [None]
        left, right = ({seed: side[seed if seed in side else None] for seed in seeds}
                       for side in (left, right))
    return {seed: (left[seed], right[seed]) for seed in left if seed in right}


def paired_differences(left: Values, right: Values, ratio: bool = False) -> Values:
    """left − right of every seed that both have; with ratio the difference of their logarithms."""
    transform = math.log if ratio else float
    return {seed: transform(a) - transform(b) for seed, (a, b) in paired(left, right).items()}


def judge(differences: Values, bound: float | None = None, side: int = 1, *, ratio: bool = False,
          inclusive: bool = False, unit: str = "") -> Verdict:
    """The verdict on "the differences lie above the bound" (side +1) or below it (−1), by their interval.

    Held where the 95 % interval lies entirely on the claimed side, not held where it lies on the other, else
    undecided; so one seed decides nothing, but a value in which nothing is random decides by itself. With
    ratio the differences are of logarithms, and value, interval and bound (default 1, else 0) are ratios.
    inclusive: a value equal to the bound is on the claimed side.
    """
    transform: Callable[[float], float] = math.exp if ratio else float
    bound = float(ratio) if bound is None else bound
    value, low, high = map(transform, interval(list(differences.values())))
    fixed = set(differences) == {None}
    ends = [side * (end - bound) for end in ((value,) if fixed else (low, high))]
    if inclusive:  # up to rounding: means of equal values may differ in their last bits
        ends = [max(end, 1e-300) if math.isclose(end, 0, abs_tol=1e-6 * abs(bound)) else end for end in ends]
    holds = True if min(ends) > 0 else False if max(ends) < 0 or fixed else None
    return Verdict(holds, value, low, high, 0 if fixed else len(differences), unit)
