"""Scores without a model: the best constant and the word list."""

import random

import pytest

from kn.data import glue, glue_baselines


def splits_of(task, rows):
    return {split: rows for split in ("train", *glue.TASKS[task].dev)}


def test_the_constant_is_the_one_that_scores_best_in_training():
    rows = [{"texts": ("a", "b"), "label": label} for label in (0, 0, 0, 1, 1)]
    # F1 of always "yes", though "no" is more frequent
    assert glue_baselines.best_constant_scores(
        "mrpc", splits_of("mrpc", rows)
    )["headline"] == pytest.approx(100 * 4 / 7)
    assert glue_baselines.best_constant_scores("rte", splits_of("rte", rows))["headline"] == 60.0
    assert glue_baselines.best_constant_scores("cola", splits_of("cola", rows))["headline"] == 0.0


def test_a_word_list_sees_words_and_pairs_of_words_and_nothing_else():
    draw, words = random.Random(0), "ant bee cat dog elk fox gnu hen ibis jay".split()  # noqa: SIM905
    keyword, order, compare = [], [], []
    for _ in range(400):
        label, five = draw.randrange(2), draw.sample(words[1:], 5)
        keyword.append({"texts": (" ".join(five), "ant" if label else "bee"), "label": label})
        order.append(
            {
                "texts": ("x", " ".join([*five, "ant", "kiwi"] if label else ["ant", *five, "kiwi"])),
                "label": label
            }
        )
        # same word or not: no list can tell
        compare.append({"texts": (five[0], five[0] if label else five[1]), "label": label})
    assert glue_baselines.bag_of_words_scores("rte", splits_of("rte", keyword))["headline"] == 100.0
    assert glue_baselines.bag_of_words_scores("rte", splits_of("rte", order))["headline"] == 100.0
    assert glue_baselines.bag_of_words_scores("rte", splits_of("rte", compare))["headline"] < 60
