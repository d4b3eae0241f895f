"""What a GLUE task gives away without a language model: the best constant answer, and a list of words and pairs of words.

Printed beside the scores, so that a reader sees how much of them needs a model. Nothing is trained here but
scikit-learn's logistic regression.
"""

from __future__ import annotations

from kn.data import glue


def dev_scores(task: str, predictions: dict[str, list[int]], splits: dict[str, list[dict]]) -> dict[str, float]:
    """GLUE's metrics on the dev split(s) of a task, from {split: class numbers}."""
    parts = [(predictions[name], [row["label"] for row in splits[name]]) for name in glue.TASKS[task].dev]
    return glue.score(task, *parts[0], pair=parts[1] if len(parts) > 1 else None)


def constant(task: str, splits: dict[str, list[dict]]) -> dict[str, float]:
    """Dev scores of the one answer that scores best on the training rows (F1 of always "yes" is 66.7 where half are "yes")."""
    labels = [row["label"] for row in splits["train"]]
    best = max(range(len(glue.TASKS[task].labels)), key=lambda guess: (glue.score(task, [guess] * len(labels), labels)["headline"], labels.count(guess)))
    return dev_scores(task, {name: [best] * len(splits[name]) for name in glue.TASKS[task].dev}, splits)


def word_list(task: str, splits: dict[str, list[dict]]) -> dict[str, float]:
    """Dev scores of a logistic regression on the words and pairs of neighbouring words of each text, fitted on the training rows."""
    from scipy.sparse import hstack
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    def side(rows: list[dict], i: int) -> list[str]:
        return [row["texts"][i] for row in rows]

    train = splits["train"]
    counters = [CountVectorizer(ngram_range=(1, 2), token_pattern=r"[\w'-]+").fit(side(train, i)) for i in range(len(train[0]["texts"]))]

    def features(rows: list[dict]):
        return hstack([counter.transform(side(rows, i)) for i, counter in enumerate(counters)]).tocsr()

    fitted = LogisticRegression(max_iter=1000).fit(features(train), [row["label"] for row in train])
    return dev_scores(task, {name: fitted.predict(features(splits[name])).tolist() for name in glue.TASKS[task].dev}, splits)
