"""Cleaning, splits, contamination and packing of the documentation text."""

import random

import pytest

from kn.data import documentation

DOC = '''
def f(x):
    """Return the smallest value of the array that is not masked.

    Parameters
    ----------
    x : array_like
        The values that are searched, in any order you like.
    **kwargs : dict

    See :func:`numpy.amin` for the function that does not know about masks at all.

    >>> f([1, 2])
    1

    Example::

        f([3, 4]) is what you would write in your own program

    The result keeps the type of the input, whatever its shape may be.
    """
'''


def test_prose_is_kept_code_and_argument_lists_are_dropped(tmp_path):
    (tmp_path / "module.py").write_text(DOC)
    ((name, paragraphs),) = documentation.extract_package(tmp_path, "pkg")
    assert name == "pkg/module.py"
    assert paragraphs == [
        "Return the smallest value of the array that is not masked.",
        "The values that are searched, in any order you like.",
        "See numpy.amin for the function that does not know about masks at all.",
        "The result keeps the type of the input, whatever its shape may be.",
    ]


def package(root, name, files):
    for file, text in files.items():
        path = root / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'"""{text}"""\n')
    return root / name


def sentence(i):
    """A sentence of 14 words that shares no 13-gram with that of another number."""
    words = [
        "alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu",
        "nu", "xi", "omicron", "pi", "rho", "sigma", "tau", "upsilon"
    ]
    return "The " + " ".join(random.Random(i).choices(words, k=14)) + "."


def build(tmp_path, extra=None):
    files = {f"m{i}.py": "\n\n".join(sentence(10 * i + j) for j in range(4)) for i in range(12)}
    web = package(tmp_path, "webby", files)
    wiki = package(tmp_path, "wikky", {"a.py": sentence(3) + " " + sentence(300), **(extra or {})})
    return documentation.build(
        {"web": ("webby",), "wiki": ("wikky",)}, {"web": (0.3, 0.3), "wiki": (0.0, 0.0)},
        {"webby": web, "wikky": wiki}
    )


def test_no_13_gram_of_held_out_text_is_in_any_training_text(tmp_path):
    built = build(tmp_path)
    docs = [doc for corpus in built.values() for doc in (*corpus.valid, *corpus.test)]
    held = {g for doc in docs for p in doc.split("\n\n") for g in documentation.ngrams(p)}
    assert built["web"].valid and built["web"].test and built["web"].train
    for group in built.values():
        for doc in group.train:
            for paragraph in doc.split("\n\n"):
                assert held.isdisjoint(documentation.ngrams(paragraph))
    tests = {g for d in built["web"].test for p in d.split("\n\n") for g in documentation.ngrams(p)}
    assert tests.isdisjoint(
        {g for d in built["web"].valid for p in d.split("\n\n") for g in documentation.ngrams(p)}
    )


def test_more_training_text_does_not_change_what_is_held_out(tmp_path):
    small = build(tmp_path / "a")
    large = build(tmp_path / "b", {"more.py": sentence(400)})
    assert (small["web"].valid, small["web"].test) == (large["web"].valid, large["web"].test)
    assert small["wiki"].fingerprint != large["wiki"].fingerprint
    assert small["web"].fingerprint == large["web"].fingerprint


def test_sample_is_random_and_close_to_its_share():
    docs = tuple(str(i) * 50 for i in range(1000, 1400))
    drawn = documentation.sample(docs, 0.1, 0)
    assert drawn == documentation.sample(docs, 0.1, 0) != documentation.sample(docs, 0.1, 1)
    assert 0.1 <= sum(map(len, drawn)) / sum(map(len, docs)) < 0.11 and drawn[0] != docs[0]


def test_a_missing_package_says_what_to_do():
    with pytest.raises(
        ModuleNotFoundError, match="package 'no_such_thing' is not installed.*run ./run_all.sh"
    ):
        documentation.package_root("no_such_thing")


def test_tokenizer_and_packing_lose_nothing():
    tokenizer = documentation.train_tokenizer(tuple(sentence(i) for i in range(50)), 400)
    rows = documentation.pack(tokenizer, (sentence(1), sentence(2)), 4)
    text = tokenizer.decode(rows.flatten())
    assert rows.shape[1] == 4 and text.startswith(sentence(1) + "<|endoftext|>" + sentence(2)[:20])
