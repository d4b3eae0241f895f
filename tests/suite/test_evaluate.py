"""Perplexity and predictions against loops over single positions and rows."""

import math

import pytest
import torch
from conftest import tiny_gpt2

from kn.suite import evaluate

ROWS = torch.randint(1, 50, (5, 9), generator=torch.Generator().manual_seed(0))


def test_perplexity_is_that_of_a_loop_over_positions():
    """Every token but the first of its window is predicted once, from the tokens before it."""
    model, total, count = tiny_gpt2(dtype=torch.float64), 0.0, 0
    with torch.no_grad():
        for row in ROWS:
            for place in range(1, len(row)):
                probabilities = model(input_ids=row[None, :place]).logits[0, -1].softmax(-1)
                total, count = total - math.log(probabilities[row[place]]), count + 1
    for batch in (1, 2, 32):
        # sums are float32
        assert evaluate.perplexity(model, ROWS, batch=batch) == pytest.approx(
            math.exp(total / count), rel=1e-5
        )


def test_perplexity_of_nothing_is_refused():
    with pytest.raises(ValueError, match="perplexity of an empty text is not defined"):
        evaluate.perplexity(tiny_gpt2(), ROWS[:0])


def test_per_word_spreads_the_same_loss():
    assert evaluate.word_perplexity(10.0, tokens=300, words=200) == pytest.approx(10.0**1.5)


def test_predictions_come_back_in_the_rows_order_whatever_the_padding():
    model = tiny_gpt2(labels=7)
    ids = [row[:length].tolist() for row, length in zip(ROWS, (4, 2, 6, 3, 5), strict=True)]
    with torch.no_grad():
        alone = [int(model(input_ids=torch.tensor([row])).logits.argmax()) for row in ids]
    # or another order would not show
    assert [alone[place] for place in (1, 3, 0, 4, 2)] != alone != [alone[place] for place in (2, 0, 4, 1, 3)]
    for batch in (1, 4, 64):
        assert evaluate.predict(model, ids, batch=batch) == alone


def test_a_model_whose_weights_are_no_numbers_gives_none():
    """Neither a perplexity nor an answer: the largest of values that are none would be class 0."""
    rows = torch.randint(1, 50, (2, 8))
    for value in (float("nan"), float("inf")):
        for labels in (0, 2):
            model = tiny_gpt2(labels=labels)
            with torch.no_grad():
                model.transformer.ln_f.weight[0] = value
            with pytest.raises(
                FloatingPointError,
                match=(
                    "not finite.*: its weights are not usable, lower the learning rate it was trained with "
                    "or use float32$"
                )
            ):
                evaluate.predict(model, rows.tolist()) if labels else evaluate.perplexity(model, rows)
