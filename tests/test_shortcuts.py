"""Scores without language: the best constant and the tree on surface features."""

import random

import pytest

from kn import glue, shortcuts


def splits_of(task, rows):
    return {split: rows for split in ("train", *glue.TASKS[task].dev)}


def test_features_count_shared_words_lengths_and_negations():
    assert shortcuts.features(("The cat is not here.", "The cat never slept here at all.")) == [3 / 7, -2, 1, 1]
    assert shortcuts.features(("The cat sat; in short, the cat slept.",)) == [2 / 5, -2, 0, 0]
    assert shortcuts.features(("One text only.",)) == [0.0, 3, 0, 0]


def test_the_constant_is_the_one_that_scores_best_in_training():
    rows = [{"texts": ("a", "b"), "label": label} for label in (0, 0, 0, 1, 1)]
    assert shortcuts.constant("mrpc", splits_of("mrpc", rows))["headline"] == pytest.approx(100 * 4 / 7)  # F1 of always "yes", though "no" is more frequent
    assert shortcuts.constant("rte", splits_of("rte", rows))["headline"] == 60.0
    assert shortcuts.constant("cola", splits_of("cola", rows))["headline"] == 0.0


def test_the_tree_solves_overlap_and_nothing_that_it_cannot_see():
    draw, words = random.Random(0), "ant bee cat dog elk fox gnu hen ibis jay".split()  # noqa: SIM905
    rows, blind = [], []
    for _ in range(400):
        a, b, label = " ".join(draw.sample(words[:5], 3)), " ".join(draw.sample(words[5:], 3)), draw.randrange(2)
        rows.append({"texts": (a, a if label else b), "label": label})
        blind.append({"texts": (a, b), "label": label})
    assert shortcuts.surface("rte", splits_of("rte", rows))["headline"] == 100.0
    assert shortcuts.surface("rte", splits_of("rte", blind))["headline"] < 60
