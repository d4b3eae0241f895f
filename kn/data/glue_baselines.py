"""Baselines of a GLUE task without a language model: the best constant, and a bag of words and bigrams.

Printed beside the scores, so that a reader sees how much of them needs a model.
"""

from __future__ import annotations

from kn.data import glue


def dev_scores(
    task: str, predictions: dict[str, list[int]], splits: dict[str, list[dict]]
) -> dict[str, float]:
    """GLUE's metrics on the dev split(s) of a task, from {split: class numbers}."""
    parts = [(predictions[name], [row["label"] for row in splits[name]]) for name in glue.TASKS[task].dev]
    return glue.score(task, *parts[0], pair=parts[1] if len(parts) > 1 else None)


def best_constant_scores(task: str, splits: dict[str, list[dict]]) -> dict[str, float]:
    """Dev scores of the constant answer that scores best on the training rows.

    The majority class, but for F1: always "yes" has 66.7 where half of the rows are "yes".
    """
    labels = [row["label"] for row in splits["train"]]

    def quality(guess: int) -> tuple[float, int]:
        return glue.score(task, [guess] * len(labels), labels)["headline"], labels.count(guess)

    best = max(range(len(glue.TASKS[task].labels)), key=quality)
    return dev_scores(task, {name: [best] * len(splits[name]) for name in glue.TASKS[task].dev}, splits)


def bag_of_words_scores(task: str, splits: dict[str, list[dict]]) -> dict[str, float]:
    """Dev scores of a logistic regression on counts of words and bigrams, fitted on the training rows."""
    from scipy.sparse import hstack
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    train = splits["train"]
    vectorizers = [
        CountVectorizer(ngram_range=(1, 2), token_pattern=r"[\w'-]+").fit([row["texts"][i] for row in train])
        for i in range(len(train[0]["texts"]))
    ]

    def features(rows: list[dict]):
        texts = ([row["texts"][i] for row in rows] for i in range(len(vectorizers)))
        return hstack([v.transform(t) for v, t in zip(vectorizers, texts, strict=True)]).tocsr()

    classifier = LogisticRegression(max_iter=1000).fit(features(train), [row["label"] for row in train])
    predictions = {name: classifier.predict(features(splits[name])).tolist() for name in glue.TASKS[task].dev}
    return dev_scores(task, predictions, splits)
