"""Seven small stand-ins for GLUE's tasks, made from documentation text with GLUE's columns, labels and metrics.

All but CoLA compare two sentences, and are built so that no text alone is a shortcut: a sentence gets another version
(the same frame with other content words, or another sentence of its document; for MNLI its polarity turned too),
each side of the pair starts from one of the two by the throw of a coin, and the label says whether both sides
started from the same one. So neither text alone nor a sum over words tells the label: a model must learn to compare.
(Counting the words that both texts share tells it in about nine of ten rows: this is comparing, not reasoning.)
What a row needs (an end to ask for, say) is asked of both versions, or its absence would be a cue. CoLA is one sentence.
"""

# ruff: noqa: SIM905 (word lists are kept as one string each: "a b c" for words, "a,b|c,d" for groups)
from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from kn.glue import TASKS

MIN_WORDS, MAX_WORDS = 6, 14  # of a source sentence
LENGTHS = {"cola": (6, 14), "sst2": (6, 10), "mnli": (6, 12), "qqp": (6, 10)}  # the same for one task; (6, 12) for the others
SLIPS = 3  # pairs of words that trade places in an ungrammatical sentence
NEAR = 0.25  # share of rows whose other version keeps the sentence's frame; in the rest it is another sentence of the document
PASSES = 3  # how often the text is gone through when it holds few fitting sentences (MNLI's mismatched sets)
TEXT_WORDS = 30  # of any text in a row
LINKS = ("in other words", "that is", "in short", "put simply", "in a word")
QUESTIONS = ("Is it true that {}?", "Does it hold that {}?", "Can one say that {}?", "Who says that {}?")
Words = tuple[str, ...]

_SENTENCE = re.compile(r"(?<=[.!?:])\s+(?=[A-Z])")
_PLAIN = re.compile(r"[A-Z][A-Za-z',; -]*\.")
PREPOSITIONS = tuple("of in for to from with by on at as into over between through after before without under within".split())
FUNCTION = frozenset(PREPOSITIONS) | frozenset(
    "a an the this that these those it its they their there you your we our i is are was were be been being has have had do does did can could will would "
    "should may might must and or but if when while because since than then so not no nor only also which who whose what where how any all each every some "
    "one such same other more most very just own too up out about against during per via both either unless until whether although though however".split()
)
SYNONYMS = tuple(tuple(group.split(",")) for group in (
    "return,give back|returns,gives back|returned,given back|compute,calculate|computes,calculates|computed,calculated|computing,calculating|create,make|"
    "creates,makes|created,made|creating,making|use,employ|uses,employs|used,employed|using,by means of|check,verify|checks,verifies|checked,verified|"
    "get,obtain|gets,obtains|convert,transform|converts,transforms|converted,transformed|remove,delete|removes,deletes|removed,deleted|contains,holds|"
    "contain,hold|containing,holding|show,display|shows,displays|choose,select|chosen,selected|start,begin|starts,begins|change,alter|changes,alters|"
    "allows,lets|allow,let|provides,supplies|provided,supplied|needs,requires|need,require|needed,required|ensure,make sure|ensures,makes sure|"
    "specified,stated|specify,state|specifies,states|because,since|such as,like|each,every|must,has to|should,ought to|multiple,several|"
    "method,procedure|parameter,argument|parameters,arguments|large,big|larger,bigger|different,distinct|same,identical|current,present|entire,whole|"
    "function,routine|functions,routines|object,instance|objects,instances|error,failure|list,sequence|number,count|name,label|value,quantity|"
    "values,quantities|element,item|elements,items|default,standard|optional,not required|only,solely|usually,normally|automatically,by itself|"
    "possible,feasible|indicates,signals|defines,determines|define,determine|apply,carry out|applied,carried out|perform,do|performs,does|performed,done|"
    "corresponding,matching|additional,further|common,frequent|similar,alike|fast,quick|faster,quicker|slow,sluggish|simple,plain|often,frequently|"
    "support,handle|supports,handles|supported,handled|represents,stands for|represent,stand for|generate,produce|generates,produces|generated,produced|"
    "result,outcome|results,outcomes|implementation,realisation|initial,first|previous,preceding|specific,particular|directory,folder|size,extent|"
    "type,kind|types,kinds|text,writing|image,picture|images,pictures|find,locate|finds,locates|found,located|update,refresh|updates,refreshes|"
    "updated,refreshed"
).split("|"))  # fmt: skip
ANTONYMS = tuple(tuple(pair.split(",")) for pair in (
    "first,last|before,after|with,without|input,output|inputs,outputs|row,column|rows,columns|minimum,maximum|true,false|lower,upper|left,right|"
    "larger,smaller|large,small|greater,less|more,fewer|same,different|start,end|increase,decrease|always,never|all,none of the|enabled,disabled|"
    "enable,disable|positive,negative|forward,backward|internal,external|encoder,decoder|local,global|public,private|old,new|long,short|high,low|"
    "higher,lower|top,bottom|horizontal,vertical|open,closed|source,target|train,test|training,evaluation|add,remove|adds,removes|added,removed|"
    "real,complex|valid,invalid|known,unknown|client,server|read,write|reading,writing|load,save|loads,saves|loaded,saved|encode,decode|parent,child|"
    "above,below|inside,outside|single,multiple|even,odd|finite,infinite|exact,approximate|optional,required|success,failure|slower,faster|"
    "directed,undirected|next,previous|explicit,implicit|explicitly,implicitly|deprecated,recommended|static,dynamic|supported,unsupported|equal,unequal|"
    "lowercase,uppercase|ascending,descending|included,excluded|includes,excludes|continuous,discrete|dense,sparse|numerator,denominator|request,response|"
    "older,newer|ignored,respected|positional,keyword"
).split("|"))  # fmt: skip
DROPPABLE = frozenset(
    "actually additional already also always appropriate automatically corresponding current currently directly entire explicitly generally given "
    "internally just new only optionally original particular respective resulting simply single specific specified typically underlying usually various".split()
)
NEGATABLE = frozenset("is are was were can could should will must may does do would has have".split())


# ---------------------------------------------------------------- sentences and words


def _core(word: str) -> str:
    return word.rstrip(",;").lower()


def _like(word: str, new: str) -> str:
    """`new` with the comma that `word` carried."""
    return new + word[len(word.rstrip(",;")) :]


def render(words: Words, capital: bool = True) -> str:
    """Words as a sentence: one full stop, and a capital first letter unless it goes into another sentence."""
    text = " ".join(words).rstrip(",; ")
    return (text[:1].upper() if capital else text[:1]) + text[1:] + "."


def sentences(doc: str) -> Iterator[Words]:
    """The plain sentences of a document as words: letters, commas and hyphens only, first letter small unless it is a name."""
    for paragraph in doc.split("\n\n"):
        for text in _SENTENCE.split(paragraph):
            words = text[:-1].split()
            if MIN_WORDS <= len(words) <= MAX_WORDS and _PLAIN.fullmatch(text) and sum(any(c.isupper() for c in w) for w in words[1:]) <= 3:
                first = words[0] if any(c.isupper() for c in words[0][1:]) or words[0] == "I" else words[0].lower()
                yield (first, *words[1:])


class Lexicon:
    """Word counts and word classes learnt from the training sentences: words of a class stand between the same neighbours."""

    def __init__(self, train: list[Words], least: int = 12, nearest: int = 40, frame: int = 150):
        import numpy as np

        self.counts = Counter(_core(w) for s in train for w in s)
        self.synonyms = {w for group in SYNONYMS for phrase in group for w in phrase.split()}
        fixed = FUNCTION | DROPPABLE
        frames = {w: i for i, (w, _) in enumerate(sorted(self.counts.items(), key=lambda e: (-e[1], e[0]))[:frame])}
        words = sorted(w for w, n in self.counts.items() if n >= least and len(w) >= 4 and w.isalpha() and w not in fixed)
        place, edge = {w: i for i, w in enumerate(words)}, len(frames)  # `edge` stands for the sentence's start, end, or a comma
        table = np.zeros((len(words), 2 * edge + 2))  # how often each frame word stands before (first half) and after (second half)
        for s in train:
            cores = [_core(w) for w in s]
            for i, core in enumerate(cores):
                if (row := place.get(core)) is not None:
                    before = frames.get(cores[i - 1]) if i else edge
                    after = edge if i + 1 == len(cores) or s[i][-1] in ",;" else frames.get(cores[i + 1])
                    table[row, [half * (edge + 1) + c for half, c in enumerate((before, after)) if c is not None]] += 1
        table = np.rint(1000 * np.sqrt(table / np.maximum(table.sum(1, keepdims=True), 1)))
        near = table @ table.T  # Bhattacharyya's measure in millionths: whole numbers, so that every processor finds the same
        count = np.array([self.counts[w] for w in words])
        ratio = count[:, None] / count
        near[(ratio > 4) | (ratio < 0.25)] = -1  # about equally frequent, so that frequency is no cue
        np.fill_diagonal(near, -1)
        best = np.argsort(-near, axis=1, kind="stable")[:, :nearest]
        close = np.zeros(near.shape, bool)
        np.put_along_axis(close, best, True, axis=1)
        close &= close.T & (near > 0)  # mutual: a word that is near to many would otherwise be put in more often than taken out
        self.pools = {w: [words[j] for j in np.flatnonzero(close[i]) if not related(w, words[j])] for i, w in enumerate(words)}

    def draw(self, word: str, rng: random.Random, taken: set[str]) -> str | None:
        """Another word of the same class, none of `taken`, common words more often."""
        fresh = [w for w in self.pools.get(word, ()) if w not in taken]
        return rng.choices(fresh, [self.counts[w] for w in fresh])[0] if fresh else None

    def places(self, words: Words) -> list[int]:
        """Positions of words that have a class and stand in no synonym list, so that rewording never touches them."""
        return [i for i, w in enumerate(words) if w.islower() and self.pools.get(_core(w)) and _core(w) not in self.synonyms]


def related(a: str, b: str) -> bool:
    """Whether two words share their stem or a list of synonyms."""
    return a[:4] == b[:4] or any(a in group and b in group for group in SYNONYMS)


# ---------------------------------------------------------------- changes that matter


def exchange(words: Words, rng: random.Random, lexicon: Lexicon) -> Words | None:
    """The content words replaced by others of their class; None if fewer than two could be."""
    places, out = lexicon.places(words), list(words)
    for i in places:
        if new := lexicon.draw(_core(words[i]), rng, set(map(_core, out))):
            out[i] = _like(words[i], new)
    return tuple(out) if len(places) > 1 and tuple(out) != words else None


def trade(words: Words, rng: random.Random, lexicon: Lexicon) -> Words | None:
    """Two content words of different classes in each other's place (a noun and a verb, say), or None."""
    content = [i for i, w in enumerate(words) if w.islower() and w[0].isalpha() and _core(w) not in FUNCTION]
    cores = [_core(w) for w in words]
    pairs = [(i, j) for i in content for j in content if i < j and cores[i] != cores[j] and cores[j] not in lexicon.pools.get(cores[i], ())]
    if not pairs:
        return None
    out, (i, j) = list(words), rng.choice(pairs)
    out[i], out[j] = _like(words[i], cores[j]), _like(words[j], cores[i])
    return tuple(out)


_OPPOSITE = {a: b for pair in ANTONYMS for a, b in (pair, pair[::-1])}


def turn(words: Words, rng: random.Random) -> Words | None:
    """Polarity turned: an antonym, or a negation put in or taken out; None when nothing can be turned."""
    ways: list[Words] = []
    for i, w in enumerate(words):
        core = _core(w)
        if core in _OPPOSITE and w.islower():
            ways.append((*words[:i], _like(w, _OPPOSITE[core]), *words[i + 1 :]))
        elif core in NEGATABLE and i + 1 < len(words):
            ways.append((*words[: i + 1], *words[i + 2 :]) if words[i + 1] == "not" else (*words[: i + 1], "not", *words[i + 1 :]))
    return rng.choice(ways) if ways else None


# ---------------------------------------------------------------- changes that do not matter


_SWAPS = {phrase: [other for other in group if other != phrase] for group in SYNONYMS for phrase in group if " " not in phrase}


def reword(words: Words, rng: random.Random, share: float, move: bool = True) -> tuple[str, ...]:
    """The same said with synonyms, without some modifiers, with a clause moved to the front."""
    out: list[str] = []
    for i, w in enumerate(words):
        core = _core(w)
        if core in DROPPABLE and w.islower() and i and rng.random() < share / 2 and words[i - 1].lower() not in ("a", "an"):
            continue
        if core in _SWAPS and w.islower() and rng.random() < share:
            out += _like(w, rng.choice(_SWAPS[core])).split()
        else:
            out.append(w)
    return tuple(front(out) if move and rng.random() < share else out)


def front(words: list[str]) -> list[str]:
    """`X if Y` becomes `if Y, X` (also when, unless, for, in, to, …), where X and Y are long enough; otherwise unchanged."""
    for i in range(4, len(words) - 2):
        if words[i] in ("if", "when", "unless", "while", "because", "since", "for", "in", "by", "using", "to", "before", "after"):
            return [*words[i:-1], words[-1].rstrip(",;") + ",", *words[: i - 1], words[i - 1].rstrip(",;")]
    return words


def shorten(words: Words, rng: random.Random) -> Words | None:
    """The sentence up to a preposition, conjunction or comma, at least 5 words long and shorter than the whole, or None."""
    ends = (*PREPOSITIONS, "if", "when", "which", "and", "because", "that")
    cuts = [i for i in range(5, len(words) - 1) if (words[i] in ends or words[i - 1][-1] == ",") and _core(words[i - 1]) not in FUNCTION]
    return words[: rng.choice(cuts)] if cuts else None


# ---------------------------------------------------------------- the tasks

Texts = tuple[str, ...]


def sst2(a: Words, b: Words, rng: random.Random) -> Texts:
    """One sentence of two halves: the second speaks for the first (the same reworded) or not."""
    return (f"{render(a)[:-1]}; {rng.choice(LINKS)}, {render(reword(b, rng, 0.5), capital=False)}",)


def mrpc(a: Words, b: Words, rng: random.Random) -> Texts:
    """A sentence and a rewording of it or of its other version."""
    return render(a), render(reword(b, rng, 0.7))


def qqp(a: Words, b: Words, rng: random.Random) -> Texts:
    """Two questions in different forms about the same statement, or about two."""
    one, two = rng.sample(QUESTIONS, 2)
    return one.format(render(a, capital=False)[:-1]), two.format(render(reword(b, rng, 0.5), capital=False)[:-1])


def rte(a: Words, b: Words, rng: random.Random) -> Texts | None:
    """A sentence and the first part, reworded, of itself or of its other version."""
    part = shorten(a, rng) and shorten(b, rng)
    return part and (render(a), render(reword(part, rng, 0.5)))


def qnli(a: Words, b: Words, rng: random.Random) -> Texts | None:
    """A question for the end of a sentence, and that sentence or one that does not answer it."""
    cut, other = (max((i for i in range(4, len(side) - 1) if side[i] in PREPOSITIONS), default=0) for side in (a, b))
    return (f"{render(reword(a[:cut], rng, 0.3, move=False))[:-1]} {a[cut]} what?", render(b)) if cut and other else None


# task: (the texts made of two sides, label when both sides are the same version, label when they are not)
COMPARISONS: dict[str, tuple[Callable[[Words, Words, random.Random], Texts | None], int, int]] = {
    "rte": (rte, 0, 1), "mrpc": (mrpc, 1, 0), "sst2": (sst2, 1, 0), "qnli": (qnli, 0, 1), "qqp": (qqp, 1, 0),
}  # fmt: skip


def cola(words: Words, rng: random.Random, lexicon: Lexicon) -> tuple[Texts, int] | None:
    """Grammatical (1), or content words of different classes have traded places; small words stay, so that no pair of them gives it away."""
    label, broken = rng.randrange(2), words
    for _ in range(SLIPS):
        broken = broken and trade(broken, rng, lexicon)
    return broken and ((render(words if label else broken),), label)  # both classes from sentences that could be broken


def mnli(words: Words, peer: Words, rng: random.Random) -> tuple[Texts, int] | None:
    """A sentence against its rewording (0 entailment), another of the document (1 neutral), its opposite (2 contradiction)."""
    label, opposite, other_opposite = rng.randrange(3), turn(words, rng), turn(peer, rng)
    if not opposite or not other_opposite:
        return None
    versions = {(0, 0): words, (1, 0): peer, (0, 1): opposite, (1, 1): other_opposite}
    a = (rng.randrange(2), rng.randrange(2))  # the premise may be turned itself, so a negation says nothing
    b = (a[0] ^ (label == 1), a[1] ^ (label == 2))
    return (render(versions[a]), render(reword(versions[b], rng, 0.4))), label


def make(name: str, words: Words, peer: Words, rng: random.Random, lexicon: Lexicon) -> tuple[Texts, int] | None:
    """(texts, label) of one row from a sentence and another of its document, or None where they do not suit."""
    if name == "cola":
        return cola(words, rng, lexicon)
    if name == "mnli":
        return mnli(words, peer, rng)
    texts_of, same_label, other_label = COMPARISONS[name]
    same = rng.random() < 0.5
    if not (changed := exchange(words, rng, lexicon) if rng.random() < NEAR else peer):
        return None
    first, second = (words, changed) if rng.random() < 0.5 else (changed, words)
    texts = texts_of(first, first if same else second, rng)
    return texts and (texts, same_label if same else other_label)


# ---------------------------------------------------------------- rows


def make_rows(name: str, lexicon: Lexicon, docs: list[list[Words]], size: int, used: set[str], rng: random.Random) -> list[dict]:
    """Up to `size` rows from documents (lists of sentences), labels as even as the text allows; avoids the texts in `used` and adds its own."""
    least, most = LENGTHS.get(name, (6, 12))
    order: dict[Words, Words] = {}  # sentence: the next one of its document (the first after the last)
    for doc in docs:
        found = [words for words in doc if least <= len(words) <= most and words not in order]
        order |= dict(zip(found, [*found[1:], *found[:1]], strict=True)) if len(found) > 1 else {}
    order = dict(rng.sample(list(order.items()), len(order)))
    rows, mine, counts, each = [], set(), Counter(), -(-size // len(TASKS[name].labels))
    for words, peer in [*order.items()] * PASSES:
        if len(rows) == size:
            break
        made = make(name, words, peer, rng, lexicon)
        if not made or counts[made[1]] >= each or mine.issuperset(made[0]) or not used.isdisjoint(made[0]) or any(t.count(" ") >= TEXT_WORDS for t in made[0]):
            continue  # two equal texts may stay: only one label has them, so leaving them out would make a cue of what cannot be reworded
        rows.append({"texts": made[0], "label": made[1], "index": len(rows)})
        counts[made[1]] += 1
        mine.update(made[0])
    used |= mine
    return rows


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

    Each split is made from its own documents; no text of a task stands in two splits. MNLI's mismatched sets come from the `other` documents.
    """
    if unknown := [name for name in sizes if name not in TASKS]:
        raise ValueError(f"unknown task {unknown[0]!r}, allowed: {', '.join(TASKS)}")
    given = {"train": train_docs, "dev": dev_docs, "test": test_docs, "dev_mismatched": other_dev_docs, "test_mismatched": other_test_docs}
    docs = {split: [list(dict.fromkeys(sentences(doc))) for doc in group] for split, group in given.items()}
    docs |= {"dev_matched": docs["dev"], "test_matched": docs["test"]}
    lexicon, twins = Lexicon([words for doc in docs["train"] for words in doc]), {}
    for name, (train, dev, test) in sizes.items():
        task, used = TASKS[name], set()
        wanted = dict.fromkeys(task.test, test) | dict.fromkeys(task.dev, dev) | {"train": train}  # held-out splits choose first
        rows = {split: make_rows(name, lexicon, docs[split], n, used, random.Random(f"{seed} {name} {split}")) for split, n in wanted.items()}
        twins[name] = {split: rows[split] for split in task.splits}
    return twins
