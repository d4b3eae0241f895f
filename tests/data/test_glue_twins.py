"""The documentation-made tasks: same rows every time, nothing shared between splits, no shortcut that a word
list could take."""

# ruff: noqa: SIM905 (word lists read better as one string)
import random
from collections import Counter

import pytest

from kn.data import glue
from kn.data import glue_twins as twins
from kn.suite import plan as kinds
from kn.suite import profiles
from kn.suite.store import Store
from kn.suite.work import WORK

SIZES = dict.fromkeys(glue.TASKS, (240, 80, 80))
NOUNS = (
    "matrix vector window button folder server client column record packet filter buffer cursor kernel "
    "signal socket thread widget module branch"
).split()
VERBS = "stores updates reads writes copies moves sorts merges splits loads".split()
ADJECTIVES = "nested hidden shared stable empty sorted cached remote linear static".split()


def made_up_docs(count, seed):
    """Documents of sentences like `The hidden buffer reads the first column of a nested matrix again.`"""
    rng, docs = random.Random(seed), []
    for _ in range(count):
        lines = []
        for _ in range(24):
            verb, (a, b) = rng.choice(VERBS), rng.sample(ADJECTIVES, 2)
            one, two, three, four = rng.sample(NOUNS, 4)
            form = rng.choice(
                (
                    "The {a} {one} {verb} a {two} of the {b} {three} again.",
                    "This {one} {verb} every {two} with {three} and {four}.",
                    "A {two} in the {one} is not {b} without the {four}.",
                    "The {two} in a {one} is {a} if the {three} is {b}.",
                )
            )
            lines.append(form.format(a=a, b=b, one=one, two=two, three=three, four=four, verb=verb))
        docs.append("\n\n".join(" ".join(lines[i : i + 3]) for i in range(0, len(lines), 3)))
    return tuple(docs)


DOCS = {"train": made_up_docs(60, 1), "dev": made_up_docs(20, 2), "test": made_up_docs(20, 3),
        "dev_mismatched": made_up_docs(20, 4), "test_mismatched": made_up_docs(20, 5)}


@pytest.fixture(scope="module")
def made():
    return twins.build_twins(DOCS, SIZES, seed=0)


@pytest.fixture(scope="module")
def real():
    """The twins of mini's own text, as its stage made them; the mini run at the end of the suite takes them
    from the store."""
    plan = kinds.StagePlanner(profiles.MINI)
    store = Store().open()
    for item in (plan.corpus, plan.glue_tasks):
        store.make(item, WORK[item.kind])
    return {
        name: glue.read_task(store.folder(plan.glue_tasks) / name, name, ("train", *task.dev))
        for name, task in glue.TASKS.items()
    }


def words_accuracy(splits, dev):
    """Accuracy in percent on the dev splits of a logistic regression on the words of each text."""
    from scipy.sparse import hstack
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    sides = range(len(splits["train"][0]["texts"]))
    counters = [CountVectorizer(min_df=2).fit([row["texts"][i] for row in splits["train"]]) for i in sides]

    def features(rows):
        return hstack(
            [counter.transform([row["texts"][i] for row in rows]) for i, counter in enumerate(counters)]
        ).tocsr()

    fitted = LogisticRegression(C=0.1, max_iter=200).fit(
        features(splits["train"]), [row["label"] for row in splits["train"]]
    )
    rows = [row for split in dev for row in splits[split]]
    return 100 * fitted.score(features(rows), [row["label"] for row in rows])


def sentences_of(name, texts):
    """The sentences of a row, each as its words in alphabetical order: the same for every version of it."""
    parts = [" ".join(texts)] if name == "qnli" else texts  # QNLI's two texts are one sentence
    return {
        " ".join(
            sorted(
                word.lower().strip(".,?")
                for word in part.removeprefix("Who says ").replace(" what?", "").split()
            )
        )
        for part in parts
    }


def test_the_same_inputs_give_the_same_rows(made):
    assert twins.build_twins(DOCS, SIZES, seed=0) == made
    assert twins.build_twins(DOCS, SIZES, seed=1) != made


def test_each_task_has_glue_s_splits_and_the_sizes_asked_for(made):
    assert set(made) == set(glue.TASKS) == set(profiles.SIZES)
    for name, splits in made.items():
        assert tuple(splits) == glue.TASKS[name].splits
        assert {split: len(rows) for split, rows in splits.items()} == {
            split: 240 if split == "train" else 80 for split in splits
        }, name
        assert all([row["index"] for row in rows] == list(range(len(rows))) for rows in splits.values())
    assert sum(train for train, _, _ in profiles.SIZES.values()) <= 16_000


def test_no_sentence_stands_in_two_splits_in_any_version(made):
    for name, splits in made.items():
        seen = Counter(
            text
            for rows in splits.values()
            for text in {text for row in rows for text in sentences_of(name, row["texts"])}
        )
        assert max(seen.values()) == 1, name


def test_labels_are_even(made):
    for name, splits in made.items():
        for split, rows in splits.items():
            counts = Counter(row["label"] for row in rows)
            assert set(counts) == set(range(len(glue.TASKS[name].labels))), (name, split)
            assert max(counts.values()) - min(counts.values()) <= 1, (name, split)


def test_texts_are_short_and_not_empty(made):
    for name, splits in made.items():
        for row in (row for rows in splits.values() for row in rows):
            assert len(row["texts"]) == len(glue.TASKS[name].texts)
            assert all(
                3 <= len(text.split()) <= 30 and "\t" not in text and "\n" not in text
                for text in row["texts"]
            ), row


def test_no_label_has_more_negations_or_longer_texts(made):
    for name, splits in made.items():
        share, length = {}, {}
        for label in range(len(glue.TASKS[name].labels)):
            rows = [row for rows in splits.values() for row in rows if row["label"] == label]
            texts = [text for row in rows for text in row["texts"]]
            share[label] = sum(
                "not" in text.split() or "without" in text.split() for text in texts
            ) / len(texts)
            length[label] = sum(len(text.split()) for text in texts) / len(texts)
        # two standard deviations at about 140 rows a label
        assert max(share.values()) - min(share.values()) <= 0.10, (name, share)
        assert max(length.values()) - min(length.values()) <= 0.8, (name, length)  # words


def test_an_unknown_task_is_refused():
    with pytest.raises(ValueError) as error:
        twins.build_twins(dict.fromkeys(DOCS, ()), {"wnli": (1, 1, 1)})
    assert str(error.value) == "unknown task 'wnli', allowed: cola, rte, mrpc, sst2, mnli, qnli, qqp"


def test_too_little_text_gives_fewer_rows_and_no_error():
    docs = {**dict.fromkeys(DOCS, ()), "train": ("Only one short sentence stands in this document.",)}
    rows = twins.build_twins(docs, {"rte": (5, 5, 5)})["rte"]
    assert rows == {"train": [], "dev": [], "test": []}


def test_what_the_label_says_is_what_was_moved(made):
    """Texts labelled as written stand in the documents; of the others exactly one text of the row does not,
    in MNLI the one that the label names."""
    written = " ".join(" ".join(doc.split()).lower() for docs in DOCS.values() for doc in docs)
    for name, splits in made.items():
        whole, *moved = twins.TWIN_TASKS[name].labels
        for row in (row for rows in splits.values() for row in rows):
            stands = [
                text.lower().removeprefix("who says ").removesuffix(" what?").rstrip("?") in written
                for text in row["texts"]
            ]
            if row["label"] == whole:
                assert all(stands), (name, row)
            else:
                assert stands.count(False) == 1, (name, row)
                assert name != "mnli" or stands.index(False) == moved.index(row["label"]), row


@pytest.mark.parametrize(
    "change", [twins.permute_content_words, twins.permute_window(4), twins.permute_window(14)]
)
def test_a_change_keeps_all_words_and_the_places_of_commas(change):
    words = tuple("if the nested buffer, once sorted, reads every packet of a stream".split())
    for seed in range(50):
        changed = change(words, random.Random(seed))
        assert sorted(w.rstrip(",;") for w in changed) == sorted(w.rstrip(",;") for w in words)
        assert [word[-1] == "," for word in changed] == [word[-1] == "," for word in words]
        assert sum(a != b for a, b in zip(changed, words, strict=True)) >= twins.MIN_MOVED_WORDS
        if change is twins.permute_content_words:
            assert [w for w in changed if w in twins.FUNCTION_WORDS] == [
                w for w in words if w in twins.FUNCTION_WORDS
            ]


def test_a_text_with_too_little_to_move_is_left_out():
    assert twins.permute_content_words(tuple("it is not in the stream".split()), random.Random(0)) is None
    assert twins.permute_window(4)(tuple("the the the the end".split()), random.Random(0)) is None


@pytest.mark.parametrize("name", glue.TASKS)
def test_a_list_of_words_learns_nothing_from_the_real_text(real, name):
    """Every version has the same words, so what is above chance is chance: three standard deviations at 700
    rows."""
    assert words_accuracy(real[name], glue.TASKS[name].dev) <= 100 / len(glue.TASKS[name].labels) + 5.7
