"""Baselines of a GLUE task without a language model: the best constant, and a bag of words and bigrams."""

from kn.data import glue


def dev_scores(task: str, predictions: dict[str, list[int]], splits: dict[str, list[dict]]):
    """GLUE's metrics on the dev split(s) of a task, from {split: class numbers}."""
    dev = glue.TASKS[task].dev
    first, *mismatched = ((predictions[name], [row["label"] for row in splits[name]]) for name in dev)
    return glue.score(task, *first, *mismatched)


def best_constant_scores(task: str, splits: dict[str, list[dict]]) -> dict[str, float]:
    """Dev scores of the constant answer that is best on the training rows: the majority class, but for F1."""
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
    options = {"ngram_range": (1, 2), "token_pattern": r"[\w'-]+"}
    columns = zip(*(row["texts"] for row in train), strict=True)
    vectorizers = [CountVectorizer(**options).fit(column) for column in columns]

    def features(rows: list[dict]):
        texts = ([row["texts"][i] for row in rows] for i in range(len(vectorizers)))
        return hstack([v.transform(t) for v, t in zip(vectorizers, texts, strict=True)]).tocsr()

    classifier = LogisticRegression(max_iter=1000).fit(features(train), [row["label"] for row in train])
    predictions = {name: classifier.predict(features(splits[name])).tolist() for name in glue.TASKS[task].dev}
    return dev_scores(task, predictions, splits)
