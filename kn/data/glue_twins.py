"""Stand-ins for GLUE's seven tasks, made from documentation text with GLUE's columns, labels and metrics.

Every task tests word order: a row holds text as it was written, or with some of its words permuted and
nothing else, so that a bag of words, word overlap or negations tell nothing. Which words move differs from
task to task (`TWIN_TASKS`). In a pair only one of the two texts is permuted, drawn at random (MNLI's label
says which), so that a model that reads one text misses half of the permutations."""

# ruff: noqa: SIM905 (word lists are kept as one string each)
import itertools
import random
import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from kn.data.glue import task_of

Words = tuple[str, ...]
Texts = tuple[Words, ...]
Permutation = Callable[[Words, random.Random], Words | None]  # None where a text has too little to move

SENTENCE_WORDS = (5, 14)  # least and most words of a sentence
PAIR_WORDS = (5, 10)  # of each of two sentences in one row
MIN_MOVED_WORDS = 3  # words that must change their place

_SENTENCE = re.compile(r"(?<=[.!?:])\s+(?=[A-Z])")
_PLAIN = re.compile(r"[A-Z][A-Za-z',; -]*\.")
PREPOSITIONS = frozenset(
    "of in for to from with by on at as into over between through after before without under within".split()
)
FUNCTION_WORDS = PREPOSITIONS | frozenset(  # words that keep their place when content words move
    "a an the this that these those it its it's they their there you your we our i is are was were be "
    "been being has have had do does did don't can could will would should may might must and or but if "
    "when while because since than then so not no nor only also which who whose what where how any all "
    "each every some one such same other more most very just own too up out about against during per via "
    "both either unless until whether although though however".split()
)


def sentences(doc: str) -> Iterator[Words]:
    """The plain sentences of a document as words: letters, commas, hyphens; names alone keep capitals."""
    for paragraph in doc.split("\n\n"):
        for text in _SENTENCE.split(paragraph):
            words = text[:-1].split()
            if not SENTENCE_WORDS[0] <= len(words) <= SENTENCE_WORDS[1] or not _PLAIN.fullmatch(text):
                continue
            first, *rest = words
            if sum(any(c.isupper() for c in word) for word in rest) <= 3:
                is_name = any(c.isupper() for c in first[1:]) or first == "I"
                yield (first if is_name else first.lower(), *rest)


def render(words: Words, template: str) -> str:
    """Words in a template such as "{}.", with a capital first letter."""
    text = template.format(" ".join(words).rstrip(",; "))
    return text[:1].upper() + text[1:]


def bag_of_words(words: Words) -> Words:
    """The words in alphabetical order: the same for every permutation of a text."""
    return tuple(sorted(word.rstrip(",;").lower() for word in words))


def permute_words(words: Words, places: list[int], rng: random.Random) -> Words | None:
    """`words` with those at `places` permuted, commas staying; None where fewer than MIN_MOVED_WORDS move."""
    old = [words[i].rstrip(",;") for i in places]
    for _ in range(20):
        new = rng.sample(old, len(old))
        if sum(a != b for a, b in zip(old, new, strict=True)) >= max(MIN_MOVED_WORDS, len(old) - 1):
            moved = dict(zip(places, new, strict=True))
            commas = [word[len(word.rstrip(",;")) :] for word in words]
            return tuple(moved[i] + commas[i] if i in moved else word for i, word in enumerate(words))
    return None


def permute_content_words(words: Words, rng: random.Random) -> Words | None:
    """The content words permuted: neither function words nor names, which have capitals."""
    is_content = [w.islower() and w[0].isalpha() and w.rstrip(",;") not in FUNCTION_WORDS for w in words]
    return permute_words(words, [place for place, content in enumerate(is_content) if content], rng)


def permute_window(length: int) -> Permutation:
    """The permutation of a random window of `length` adjacent words (or of all of a shorter text)."""
    def permute(words: Words, rng: random.Random) -> Words | None:
        start = rng.randint(0, max(0, len(words) - length))
        return permute_words(words, list(range(start, min(start + length, len(words)))), rng)

    return permute


def single_sentences(doc: list[Words], rng: random.Random) -> Iterable[Texts]:
    """Each sentence of at least six words."""
    return ((words,) for words in doc if len(words) >= 6)


def adjacent_sentences(doc: list[Words], rng: random.Random) -> Iterable[Texts]:
    """Each short sentence with the next short one of its document."""
    return itertools.pairwise(words for words in doc if PAIR_WORDS[0] <= len(words) <= PAIR_WORDS[1])


def split_at_preposition(doc: list[Words], rng: random.Random) -> Iterable[Texts]:
    """Each longer sentence cut after a preposition, as question and answer."""
    for words in doc:
        if cuts := [i for i in range(5, len(words) - 3) if words[i - 1] in PREPOSITIONS]:
            cut = rng.choice(cuts)
            yield words[:cut], words[cut:]


class TwinTask(NamedTuple):
    """How the rows of one task's stand-in are made."""

    texts: Callable[[list[Words], random.Random], Iterable[Texts]]  # of a document
    templates: tuple[str, ...]  # of each text
    permutations: tuple[Permutation, ...]  # one: of one text, drawn at random; two: the i-th of the i-th text
    labels: tuple[int, ...]  # of a row as written, with the first permutation, with the second


_PAIR, _QUESTIONS = ("{}.", "{}."), ("Who says {}?", "Who says {}?")
TWIN_TASKS = {
    "cola": TwinTask(single_sentences, ("{}.",), (permute_content_words,), (1, 0)),
    "rte": TwinTask(adjacent_sentences, _PAIR, (permute_window(14),), (0, 1)),
    "mrpc": TwinTask(adjacent_sentences, _PAIR, (permute_window(8),), (1, 0)),
    "sst2": TwinTask(single_sentences, ("{}.",), (permute_window(4),), (1, 0)),
    "mnli": TwinTask(adjacent_sentences, _PAIR, (permute_window(14), permute_window(14)), (0, 1, 2)),
    "qnli": TwinTask(split_at_preposition, ("{} what?", "{}."), (permute_window(5),), (0, 1)),
    "qqp": TwinTask(adjacent_sentences, _QUESTIONS, (permute_window(6),), (1, 0)),
}


def make_rows(name: str, docs: list[list[Words]], size: int, used: set[Words], rng: random.Random):
    """Up to `size` rows, labels balanced, of sentences whose bags of words `used` lacks (it is extended)."""
    rows: list[dict] = []
    task, seen = TWIN_TASKS[name], set()
    unused = ([words for words in doc if bag_of_words(words) not in used] for doc in docs)
    items = [texts for doc in unused for texts in task.texts(doc, rng)]
    for texts in rng.sample(items, len(items)):
        if len(rows) == size:
            break
        # every version is made whatever the label, so that which texts are taken does not depend on the label
        versions = [[w for t in texts if (w := permute(t, rng))] for permute in task.permutations]
        if texts in seen or any(len(version) < len(texts) for version in versions):
            continue
        label = len(rows) % len(task.labels)
        row = list(texts)
        if label:
            side = label - 1 if len(task.permutations) > 1 else rng.randrange(len(texts))
            row[side] = versions[label - 1][side]
        rows.append({"texts": tuple(map(render, row, task.templates)), "label": task.labels[label]})
        seen.add(texts)
        originals = [texts[0] + texts[1]] if task.texts is split_at_preposition else texts
        used |= set(map(bag_of_words, originals))
    return [{**row, "index": index} for index, row in enumerate(rng.sample(rows, len(rows)))]


def build_twins(docs: dict[str, Iterable[str]], sizes: dict, seed: int = 0) -> dict[str, dict]:
    """{task: {split: rows}} with rows {"texts", "label", "index"}.

    `docs` are the documents of train, dev, test, dev_mismatched and test_mismatched (MNLI): no sentence of a
    task is in two splits. Sizes {task: (train, dev, test)} are upper bounds. ValueError: unknown task."""
    split_docs = {split: [list(dict.fromkeys(sentences(d))) for d in group] for split, group in docs.items()}
    split_docs |= {"dev_matched": split_docs["dev"], "test_matched": split_docs["test"]}
    twins = {}
    for name, (train, dev, test) in sizes.items():
        task, rows = task_of(name), {}
        used: set[Words] = set()
        # held-out splits choose first
        for split in (*task.test, *task.dev, "train"):
            size = train if split == "train" else dev if split in task.dev else test
            rng = random.Random(f"{seed} {name} {split}")
            rows[split] = make_rows(name, split_docs[split], size, used, rng)
        twins[name] = {split: rows[split] for split in task.splits}
    return twins
