"""Text for every profile: extraction, cleaning, splits, fingerprint, tokenizer, packing.

mini reads the prose documentation inside the exactly pinned packages, so it needs no download.
Two groups of packages play the paper's two corpora: `web` stands for OpenWebText and `wiki` (another
domain) for WikiText-103. Files are split as a whole into train / valid / test; a paragraph of training
text that shares a 13-gram with any held-out paragraph is dropped, wherever the training text comes from.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import json
import multiprocessing
import re
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

NGRAM = 13  # words; the usual length for contamination checks (GPT-3, appendix C)
MIN_WORDS, MIN_ALPHA = 8, 0.8  # a paragraph of prose: at least 8 words, 80 % of its characters letters or blanks
SKIP_FOLDERS = frozenset({"tests", "test", "testing", "_vendor", "externals", "vendor", "node_modules", "locale"})

_ROLE = re.compile(r":[a-zA-Z:+-]+:`~?\.?([^`<]+?)(?:\s*<[^>]*>)?`")
_LINK = re.compile(r"\[([^\]]*)\]\([^)]*\)|`([^`<]+?)\s*<[^>]*>`_{0,2}")
_CITE = re.compile(r"\s*\[[^\]\s]{1,20}\]_?")
_URL = re.compile(r"https?://\S+")
_MARKUP = re.compile(r"\*\*|``|`_?|\$|(?<!\w)\*(?=\w)|(?<=\w)\*(?!\w)")
_CODE = re.compile(r"[=<>{}\\|#@~^]|\w\(|\)\.|\w\[|::|\.\.\s|--|__|\w_\w|\w\.\w+\.\w|\w/\w+/")
_WORD = re.compile(r"[a-z0-9]+")
_ARGUMENT = re.compile(r"^[`*]*\w+[`*]*\s*(?:\([^()]*(?:\([^()]*\)[^()]*)*\))?\s*:\s+(?=[A-Z])")
_BULLET = re.compile(r"^\s*(?:[-*+•]|\d+[.)]|\(\w\))\s+")


@dataclass(frozen=True)
class Corpus:
    """Cleaned documents of one domain: lists of strings, paragraphs parted by a blank line."""

    train: tuple[str, ...]
    valid: tuple[str, ...]
    test: tuple[str, ...]
    fingerprint: str  # sha256 over all splits, first 16 hex digits


def package_root(name: str) -> Path:
    """Folder of an installed package; ModuleNotFoundError says which pin is missing."""
    spec = importlib.util.find_spec(name) if name.isidentifier() else None  # a dotted name would import what stands before the dot
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"package {name!r} is not installed, mini's corpus is made of its documentation: run ./run_all.sh to set up the pins")
    return Path(next(iter(spec.submodule_search_locations)))


def strings_of(path: Path) -> list[str]:
    """Docstrings and other long string literals of a Python file (C extensions keep their documentation there)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError, RecursionError):
        return []
    found = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) >= 60]
    return [text for text in found if " " in text]


def paragraphs_of(text: str) -> list[str]:
    """Prose paragraphs of a docstring: markup removed; code, tables, argument lists, references dropped."""
    kept: list[str] = []
    block: list[str] = []
    code_indent: int | None = None
    block_indent: int | None = 0
    for line in [*text.expandtabs().splitlines(), ""]:
        stripped, indent = line.strip(), len(line) - len(line.lstrip())
        if code_indent is not None and stripped and indent > code_indent:
            continue  # inside a literal block
        if stripped:
            code_indent = None
        if not stripped or _BULLET.match(line) or (stripped[0] in ">:.|+=-~^" and len(stripped) > 1):
            if block:
                kept.append(" ".join(block))
            block = []
            if stripped.startswith((">", ".. code", ".. math", ".. plot", "```")):
                code_indent = indent if stripped.startswith("..") else None
            elif _BULLET.match(line):
                block, block_indent = [_ARGUMENT.sub("", _BULLET.sub("", line).strip())], None
            continue
        if block and block_indent is not None and indent != block_indent:  # a term, then its definition
            kept.append(" ".join(block))
            block = []
        plain = stripped if block else _ARGUMENT.sub("", stripped)
        block_indent = indent if plain == stripped else None  # what follows "name (type): Text" may be indented
        block.append(plain)
        if stripped.endswith("::"):
            code_indent = indent
    return [clean for paragraph in kept if (clean := clean_paragraph(paragraph))]


def clean_paragraph(text: str) -> str:
    """One paragraph without markup, or '' when it is not prose (see MIN_WORDS, MIN_ALPHA)."""
    text = _ROLE.sub(r"\1", text)
    text = _LINK.sub(lambda m: m.group(1) or m.group(2) or "", text)
    text = _URL.sub("", _CITE.sub("", text))
    text = re.sub(r"\s+", " ", _MARKUP.sub("", text)).strip()
    text = text[:-2] + "." if text.endswith("::") else text
    sentences = [s for s in re.split(r"(?<=[.!?:]) (?=[A-Z])", text) if not _CODE.search(s)]
    text = " ".join(sentences)
    if len(text.split()) < MIN_WORDS or not text[0].isupper() or text[-1] not in ".!?:" or not text.isascii():
        return ""
    plain = sum(c.isalpha() or c == " " for c in text)
    return text if plain >= MIN_ALPHA * len(text) and sum(c.isupper() for c in text) < 0.15 * len(text) else ""


def ngrams(text: str, n: int = NGRAM) -> set[int]:
    """Hashes of all n-grams of lower-case words; the whole text is one n-gram when it is shorter."""
    words = _WORD.findall(text.lower())
    grams = [" ".join(words[i : i + n]) for i in range(max(1, len(words) - n + 1))]
    return {int.from_bytes(hashlib.blake2b(gram.encode(), digest_size=8).digest(), "big") for gram in grams}


def split_of(name: str, shares: tuple[float, float]) -> str:
    """'train', 'valid' or 'test' from a hash of the file's name; shares = (valid, test)."""
    where = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 2**32
    return "valid" if where < shares[0] else "test" if where < sum(shares) else "train"


def raw_files(root: Path, name: str) -> list[tuple[str, list[str]]]:
    """(file name, prose paragraphs) of every documented Python file below root, in name order."""
    found = []
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        relative = path.relative_to(root)
        if SKIP_FOLDERS.isdisjoint(relative.parts[:-1]) and not relative.name.startswith(("test_", "conftest")):
            paragraphs = [p for text in strings_of(path) for p in paragraphs_of(text)]
            if paragraphs:
                found.append((f"{name}/{relative.as_posix()}", paragraphs))
    return found


def documents(files: list[tuple[str, list[str]]], seen: set[int], forbidden: set[int]) -> list[str]:
    """One document a file, without paragraphs that repeat (half of their 13-grams `seen`) or touch `forbidden`; adds to `seen`."""
    kept = []
    for _, paragraphs in files:
        fresh = []
        for paragraph in paragraphs:
            grams = ngrams(paragraph)
            if forbidden.isdisjoint(grams) and len(grams & seen) < 0.5 * len(grams):
                fresh.append(paragraph)
            seen |= grams
        if fresh:
            kept.append("\n\n".join(fresh))
    return kept


def extract(packages: list[tuple[str, Path]], jobs: int) -> list[list[tuple[str, list[str]]]]:
    """raw_files of every package, in order, spread over `jobs` processes (parsing takes most of the time)."""
    if jobs < 2:
        return [raw_files(root, name) for name, root in packages]
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(raw_files, root, name) for name, root in packages]
        return [future.result() for future in futures]


def build(groups: dict[str, tuple[str, ...]], shares: dict[str, tuple[float, float]], roots: dict[str, Path] | None = None, jobs: int = 1) -> dict[str, Corpus]:
    """Corpora by group name from installed packages (or `roots`), contamination-free across all groups and splits.

    Held-out paragraphs are settled first, from the pinned packages alone, so that more training text can
    never change them; then training paragraphs that share a 13-gram with any of them are dropped.
    """
    roots = roots or {}
    packages = [(name, roots.get(name) or package_root(name)) for names in groups.values() for name in names]
    found = dict(zip([name for name, _ in packages], extract(packages, jobs), strict=True))
    raw = {group: [file for name in names for file in found[name]] for group, names in groups.items()}
    held: dict[tuple[str, str], list[str]] = {}
    seen: set[int] = set()
    for split in ("test", "valid"):
        for group, files in raw.items():
            chosen = [f for f in files if split_of(f[0], shares[group]) == split]
            held[group, split] = documents(chosen, seen, set(seen) if split == "valid" else set())
    forbidden = set(seen)
    corpora = {}
    for group, files in raw.items():
        train = documents([f for f in files if split_of(f[0], shares[group]) == "train"], seen, forbidden)
        splits = (tuple(train), tuple(held[group, "valid"]), tuple(held[group, "test"]))
        corpora[group] = Corpus(*splits, fingerprint=fingerprint_of(splits))
    return corpora


def fingerprint_of(splits: tuple[tuple[str, ...], ...]) -> str:
    """One name for the documents of train, valid and test, 16 hex digits."""
    return hashlib.sha256(json.dumps(splits).encode()).hexdigest()[:16]


def write(corpora: dict[str, Corpus], path: Path) -> None:
    """The corpora as one JSON file, for a machine without the packages they were made from."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps({name: asdict(corpus) for name, corpus in corpora.items()}))
    part.replace(path)


def read(path: Path) -> dict[str, Corpus]:
    """What `write` wrote; ValueError where it is not that."""
    try:
        known: dict[str, dict[str, Any]] = json.loads(path.read_text())
        fields: dict[str, dict[str, Any]] = {name: {key: value if key == "fingerprint" else tuple(value) for key, value in entry.items()} for name, entry in known.items()}
        found = {name: Corpus(**entry) for name, entry in fields.items()}
        for name in ("web", "wiki"):
            if fingerprint_of((found[name].train, found[name].valid, found[name].test)) != found[name].fingerprint:
                raise ValueError(f"the text of {name} is not the one of its fingerprint")
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise ValueError(f"{path} is no corpus file ({error}): make it again with `python -m kn corpus {path}`") from None
    return found


@functools.cache
def held_out_ngrams(corpora: tuple[Corpus, ...]) -> frozenset[int]:
    """Every 13-gram of the valid and test documents, for cleaning further training text."""
    return frozenset(gram for corpus in corpora for doc in (*corpus.valid, *corpus.test) for p in doc.split("\n\n") for gram in ngrams(p))


def train_tokenizer(docs: tuple[str, ...], vocabulary: int):
    """Byte-level BPE with GPT-2's pre-tokenisation and `<|endoftext|>` as its one special token (id 0)."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(docs, vocab_size=vocabulary, special_tokens=["<|endoftext|>"], show_progress=False)
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token=end, eos_token=end, pad_token=end, unk_token=end)


def pack(tokenizer, docs: tuple[str, ...], context: int):
    """Token ids of all documents, each followed by the end-of-text token, cut into rows: int64 (n, context)."""
    import torch

    ids = tokenizer(list(docs), add_special_tokens=False, verbose=False)["input_ids"]
    stream = [token for document in ids for token in (*document, tokenizer.eos_token_id)]
    rows = len(stream) // context
    return torch.tensor(stream[: rows * context]).view(rows, context)


def fingerprint(corpora: dict[str, Corpus]) -> str:
    """One name for all texts of a run, 16 hex digits."""
    return hashlib.sha256(json.dumps(sorted((g, c.fingerprint) for g, c in corpora.items())).encode()).hexdigest()[:16]


def sample(docs: tuple[str, ...], share: float, seed: int) -> tuple[str, ...]:
    """Documents drawn at random until `share` of all characters is reached."""
    import random

    order = random.Random(seed).sample(range(len(docs)), len(docs))
    goal, chosen = share * sum(map(len, docs)), []
    for index in order:
        if goal <= 0:
            break
        chosen.append(docs[index])
        goal -= len(docs[index])
    return tuple(chosen)
