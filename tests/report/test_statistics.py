"""Intervals against scipy's own, and how often they hold the truth."""

import math

import numpy
import pytest
from scipy import stats

from kn.report.statistics import interval, paired, two_way_interval


def drawn(generator, tasks=7, seeds=5, task_sd=2.0, seed_sd=1.0, rest_sd=1.0):
    """A table of values around 0 with effects of task, seed and neither, as {task: {seed: value}}."""
    table = generator.normal(0, task_sd, (tasks, 1)) + generator.normal(0, seed_sd, (1, seeds))
    table = table + generator.normal(0, rest_sd, (tasks, seeds))
    return {f"task {i}": dict(enumerate(map(float, row))) for i, row in enumerate(table)}


def test_interval_is_students():
    values = [1.0, 2.5, 0.5, 3.0, 2.0]
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert interval(values) == pytest.approx((numpy.mean(values), expected.low, expected.high))
    assert interval([2.0])[0] == 2.0 and all(math.isnan(end) for end in interval([2.0])[1:])


def test_crossed_is_interval_where_one_of_the_two_is_alone():
    seeds = dict(enumerate([1.0, 2.0, 4.0]))
    assert two_way_interval({"a": seeds}) == interval(list(seeds.values()))
    assert two_way_interval({"a": {0: 1.0}, "b": {0: 2.0}, "c": {0: 4.0}}) == interval([1.0, 2.0, 4.0])


def test_crossed_against_the_sums_of_squares_of_a_two_way_table():
    values = drawn(numpy.random.default_rng(0))
    table = numpy.array([list(row.values()) for row in values.values()])
    tasks, seeds = table.shape
    mean, rows, columns = table.mean(), table.mean(1, keepdims=True), table.mean(0, keepdims=True)
    by_task = seeds * ((rows - mean) ** 2).sum() / (tasks - 1)
    by_seed = tasks * ((columns - mean) ** 2).sum() / (seeds - 1)
    rest = ((table - rows - columns + mean) ** 2).sum() / ((tasks - 1) * (seeds - 1))
    spread = by_task + by_seed - rest
    assert spread > max(by_task, by_seed)  # the case in which nothing is cut off
    parts = by_task**2 / (tasks - 1) + by_seed**2 / (seeds - 1) + rest**2 / ((tasks - 1) * (seeds - 1))
    freedom = spread**2 / parts
    half = stats.t.ppf(0.975, freedom) * math.sqrt(spread / table.size)
    assert two_way_interval(values) == pytest.approx((mean, mean - half, mean + half))


@pytest.mark.parametrize(("task_sd", "seed_sd"), [(2.0, 1.0), (0.0, 1.0), (2.0, 0.0), (0.0, 0.0)])
def test_crossed_holds_the_truth_about_as_often_as_it_says(task_sd, seed_sd):
    generator, tries = numpy.random.default_rng(1), 1500
    held = sum(low <= 0 <= high
               for _, low, high in (two_way_interval(drawn(generator, task_sd=task_sd, seed_sd=seed_sd))
                                    for _ in range(tries)))
    # 95 % less 3.5 standard errors of 1,500 tries; more where an effect is absent and its mean square is
    # counted all the same
    assert 0.93 <= held / tries <= 1.0


def test_an_interval_over_seeds_alone_misses_other_tasks():
    generator, tries = numpy.random.default_rng(2), 500
    averages = [[sum(column) / 7
                 for column in zip(*(row.values() for row in drawn(generator).values()), strict=True)]
                 for _ in range(tries)]
    assert sum(low <= 0 <= high for _, low, high in map(interval, averages)) / tries < 0.8


def test_crossed_wants_the_same_seeds():
    with pytest.raises(ValueError, match=r"tasks must have the same seeds: \{'a': \[0, 1\], 'b': \[0\]\}"):
        two_way_interval({"a": {0: 1.0, 1: 2.0}, "b": {0: 1.0}})


def test_paired_sets_what_is_not_drawn_beside_every_seed():
    assert paired({0: 1.0, 1: 2.0}, {None: 5.0}) == {0: (1.0, 5.0), 1: (2.0, 5.0)}
    assert paired({0: 1.0, 2: 3.0}, {0: 4.0, 1: 9.0}) == {0: (1.0, 4.0)} and paired({}, {None: 1.0}) == {}
