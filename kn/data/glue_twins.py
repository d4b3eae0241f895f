"""Seven small stand-ins for GLUE's tasks, made from documentation text with GLUE's columns, labels and metrics.

Every task asks what a language model should know: do the words stand where English puts them? A row holds text as
it was written, or with some of its words in other places and nothing else, so that counting words, words in common
or negations tells nothing. What is moved differs from task to task (`RECIPES`). In a pair only one of the two texts
is changed, by the throw of a coin (MNLI's label says which), so that a reader of one text misses half of the changes.
"""

# ruff: noqa: SIM905 (word lists are kept as one string each)
from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from kn.data.glue import TASKS

Words = tuple[str, ...]
Texts = tuple[Words, ...]
Change = Callable[[Words, random.Random], Words | None]  # None where a text does not suit

SENTENCE_WORDS = (5, 14)  # a sentence has at least and at most
PAIR_WORDS = (5, 10)  # each of two sentences in one row
MOVED = 3  # words that must stand elsewhere, at least

_SENTENCE = re.compile(r"(?<=[.!?:])\s+(?=[A-Z])")
_PLAIN = re.compile(r"[A-Z][A-Za-z',; -]*\.")
PREPOSITIONS = frozenset("of in for to from with by on at as into over between through after before without under within".split())
FUNCTION = PREPOSITIONS | frozenset(  # words that stay where they are when content words move
    "a an the this that these those it its it's they their there you your we our i is are was were be been being has have had do does did don't can could "
    "will would should may might must and or but if when while because since than then so not no nor only also which who whose what where how any all each "
    "every some one such same other more most very just own too up out about against during per via both either unless until whether although though "
    "however".split()
)


# ---------------------------------------------------------------- sentences and words


def sentences(doc: str) -> Iterator[Words]:
    """The plain sentences of a document as words: letters, commas and hyphens only, first letter small unless it is a name."""
    for paragraph in doc.split("\n\n"):
        for text in _SENTENCE.split(paragraph):
            words = text[:-1].split()
            if SENTENCE_WORDS[0] <= len(words) <= SENTENCE_WORDS[1] and _PLAIN.fullmatch(text) and sum(any(c.isupper() for c in w) for w in words[1:]) <= 3:
                first = words[0] if any(c.isupper() for c in words[0][1:]) or words[0] == "I" else words[0].lower()
                yield (first, *words[1:])


def render(words: Words, end: str = ".") -> str:
    """Words as a sentence: a capital first letter and one mark at the end."""
    text = " ".join(words).rstrip(",; ")
    return text[:1].upper() + text[1:] + end


def bare(word: str) -> str:
    """The word without the comma it may carry."""
    return word.rstrip(",;")


def bag(words: Words) -> Words:
    """The words in alphabetical order: the same for every version of a text."""
    return tuple(sorted(bare(word).lower() for word in words))


def is_content(word: str) -> bool:
    """Whether a word carries meaning and no capital letter (names keep their place)."""
    return word.islower() and word[0].isalpha() and bare(word) not in FUNCTION


# ---------------------------------------------------------------- moving words


def move(words: Words, places: list[int], rng: random.Random) -> Words | None:
    """`words` with those at `places` dealt anew among them, commas staying; None where fewer than MOVED would differ."""
    old = [bare(words[i]) for i in places]
    for _ in range(20):
        new = rng.sample(old, len(old))
        if sum(a != b for a, b in zip(old, new, strict=True)) >= max(MOVED, len(old) - 1):
            dealt = dict(zip(places, new, strict=True))
            return tuple(dealt[i] + word[len(bare(word)) :] if i in dealt else word for i, word in enumerate(words))
    return None


def content(words: Words, rng: random.Random) -> Words | None:
    """The content words in other places, the small words where they were."""
    return move(words, [i for i, word in enumerate(words) if is_content(word)], rng)


def window(length: int) -> Change:
    """The change that puts `length` neighbouring words (or all of a shorter text) in another order."""

    def change(words: Words, rng: random.Random) -> Words | None:
        start = rng.randint(0, max(0, len(words) - length))
        return move(words, list(range(start, min(start + length, len(words)))), rng)

    return change


# ---------------------------------------------------------------- the tasks


def alone(doc: list[Words], rng: random.Random) -> Iterator[Texts]:
    """Each sentence of at least six words."""
    yield from ((words,) for words in doc if len(words) >= 6)


def neighbours(doc: list[Words], rng: random.Random) -> Iterator[Texts]:
    """Each short sentence with the next short one of its document."""
    short = [words for words in doc if PAIR_WORDS[0] <= len(words) <= PAIR_WORDS[1]]
    yield from zip(short, short[1:], strict=False)


def halves(doc: list[Words], rng: random.Random) -> Iterator[Texts]:
    """Each longer sentence cut after a preposition: what is asked for, and the rest."""
    for words in doc:
        if cuts := [i for i in range(5, len(words) - 3) if words[i - 1] in PREPOSITIONS]:
            cut = rng.choice(cuts)
            yield words[:cut], words[cut:]


def plain(texts: Texts) -> tuple[str, ...]:
    """As sentences."""
    return tuple(map(render, texts))


def question_and_answer(texts: Texts) -> tuple[str, ...]:
    """The first text asks for the second."""
    return render(texts[0], " what?"), render(texts[1])


def questions(texts: Texts) -> tuple[str, ...]:
    """Each as a question."""
    return tuple(f"Who says {' '.join(text).rstrip(',; ')}?" for text in texts)


class Recipe(NamedTuple):
    """How a task's rows are made."""

    texts: Callable[[list[Words], random.Random], Iterator[Texts]]  # of a document
    write: Callable[[Texts], tuple[str, ...]]
    changes: tuple[Change, ...]  # one: in one of the texts, drawn at random; two: the first in the first text, the second in the second
    labels: tuple[int, ...]  # of a row as written, of one with the first change, of one with the second


RECIPES = {
    "cola": Recipe(alone, plain, (content,), (1, 0)),
    "rte": Recipe(neighbours, plain, (window(14),), (0, 1)),
    "mrpc": Recipe(neighbours, plain, (window(8),), (1, 0)),
    "sst2": Recipe(alone, plain, (window(4),), (1, 0)),
    "mnli": Recipe(neighbours, plain, (window(14), window(14)), (0, 1, 2)),
    "qnli": Recipe(halves, question_and_answer, (window(5),), (0, 1)),
    "qqp": Recipe(neighbours, questions, (window(6),), (1, 0)),
}


def make_rows(name: str, docs: list[list[Words]], size: int, used: set[Words], rng: random.Random) -> list[dict]:
    """Up to `size` rows from documents (lists of sentences), labels even; avoids the sentences in `used` and adds its own."""
    rows: list[dict] = []
    recipe, seen = RECIPES[name], set()
    items = [texts for doc in docs for texts in recipe.texts([words for words in doc if bag(words) not in used], rng)]
    for texts in rng.sample(items, len(items)):
        if len(rows) == size:
            break
        changed = [[words for text in texts if (words := change(text, rng)) is not None] for change in recipe.changes]
        if any(len(versions) < len(texts) for versions in changed) or texts in seen:
            continue  # every version is made first: which rows there are must not hang on the label
        label = len(rows) % len(recipe.labels)
        row = list(texts)
        if label:
            side = label - 1 if len(recipe.changes) > 1 else rng.randrange(len(texts))
            row[side] = changed[label - 1][side]
        rows.append({"texts": recipe.write(tuple(row)), "label": recipe.labels[label]})
        seen.add(texts)
        used |= {bag(texts[0] + texts[1])} if recipe.texts is halves else set(map(bag, texts))
    return [{**row, "index": index} for index, row in enumerate(rng.sample(rows, len(rows)))]


def build_twins(
    train_docs: Iterable[str],
    dev_docs: Iterable[str],
    test_docs: Iterable[str],
    sizes: dict[str, tuple[int, int, int]],
    seed: int = 0,
    other_dev_docs: Iterable[str] = (),
    other_test_docs: Iterable[str] = (),
) -> dict[str, dict[str, list[dict]]]:
    """{task: {split: rows}} with rows {"texts", "label", "index"}; sizes {task: (train, dev, test)}, the latter two of each set, are upper bounds.

    Each split is made from its own documents; no sentence of a task stands in two splits. MNLI's mismatched sets come from the `other` documents.
    Raises ValueError for an unknown task.
    """
    if unknown := [name for name in sizes if name not in TASKS]:
        raise ValueError(f"unknown task {unknown[0]!r}, allowed: {', '.join(TASKS)}")
    given = {"train": train_docs, "dev": dev_docs, "test": test_docs, "dev_mismatched": other_dev_docs, "test_mismatched": other_test_docs}
    docs = {split: [list(dict.fromkeys(sentences(doc))) for doc in group] for split, group in given.items()}
    docs |= {"dev_matched": docs["dev"], "test_matched": docs["test"]}
    twins = {}
    for name, (train, dev, test) in sizes.items():
        used: set[Words] = set()
        task = TASKS[name]
        wanted = dict.fromkeys(task.test, test) | dict.fromkeys(task.dev, dev) | {"train": train}  # held-out splits choose first
        rows = {split: make_rows(name, docs[split], n, used, random.Random(f"{seed} {name} {split}")) for split, n in wanted.items()}
        twins[name] = {split: rows[split] for split in task.splits}
    return twins
