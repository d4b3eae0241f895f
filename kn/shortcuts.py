"""What a GLUE task gives away without language: the best constant answer, and a small tree on surface features.

Printed beside the scores, so that a reader sees how far counting shared words goes. Nothing is trained here but
scikit-learn's decision tree on four numbers a row.
"""

from __future__ import annotations

import re

from . import glue

_WORD = re.compile(r"[a-z']+")
NEGATIONS = frozenset(("not", "no", "never", "without", "cannot", "none"))
DEPTH = 4  # of the tree: enough for the exclusive or of two negation counts beside a threshold on the overlap


def features(texts: tuple[str, ...]) -> list[float]:
    """[share of the second text's words that the first has too, difference of their lengths, negations in each]; of one text its two halves."""
    first, second = texts if len(texts) == 2 else (texts[0].partition(";")[0], texts[0].partition(";")[2])
    a, b = _WORD.findall(first.lower()), _WORD.findall(second.lower())
    shared = sum(word in a for word in b) / max(len(b), 1)
    return [shared, len(a) - len(b), sum(word in NEGATIONS for word in a), sum(word in NEGATIONS for word in b)]


def dev_scores(task: str, predictions: dict[str, list[int]], splits: dict[str, list[dict]]) -> dict[str, float]:
    """GLUE's metrics on the dev split(s) of a task, from {split: class numbers}."""
    parts = [(predictions[name], [row["label"] for row in splits[name]]) for name in glue.TASKS[task].dev]
    return glue.score(task, *parts[0], pair=parts[1] if len(parts) > 1 else None)


def constant(task: str, splits: dict[str, list[dict]]) -> dict[str, float]:
    """Dev scores of the one answer that scores best on the training rows (F1 of always "yes" is 66.7 where half are "yes")."""
    labels = [row["label"] for row in splits["train"]]
    best = max(range(len(glue.TASKS[task].labels)), key=lambda guess: (glue.score(task, [guess] * len(labels), labels)["headline"], labels.count(guess)))
    return dev_scores(task, {name: [best] * len(splits[name]) for name in glue.TASKS[task].dev}, splits)


def surface(task: str, splits: dict[str, list[dict]]) -> dict[str, float]:
    """Dev scores of a decision tree on `features`, fitted on the training rows."""
    from sklearn.tree import DecisionTreeClassifier

    tree = DecisionTreeClassifier(max_depth=DEPTH, random_state=0)
    tree.fit([features(row["texts"]) for row in splits["train"]], [row["label"] for row in splits["train"]])
    return dev_scores(task, {name: tree.predict([features(row["texts"]) for row in splits[name]]).tolist() for name in glue.TASKS[task].dev}, splits)
