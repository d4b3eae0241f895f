"""mini's text: the prose documentation inside the exactly pinned packages, so no download is needed.

Two groups of packages play the paper's two corpora: `web` stands for OpenWebText and `wiki` (another domain)
for WikiText-103. A file belongs to one split; a paragraph of training text that shares a 13-gram with any
held-out paragraph is dropped, wherever the training text comes from."""

import ast
import hashlib
import importlib.util
import json
import multiprocessing
import random
import re
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from kn.files import write_atomic

NGRAM = 13  # words; the usual length for contamination checks (GPT-3, appendix C)
MIN_WORDS = 8  # of a paragraph of prose
MIN_ALPHA = 0.8  # share of its characters that are letters or blanks
MIN_LITERAL = 60  # characters of a string literal that may hold documentation
PLAIN_TEXT = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}  # to a tokenizer
SKIP_FOLDERS = {"tests", "test", "testing", "_vendor", "externals", "vendor", "node_modules", "locale"}

_ROLE = re.compile(r":[a-zA-Z:+-]+:`~?\.?([^`<]+?)(?:\s*<[^>]*>)?`")
_LINK = re.compile(r"\[([^\]]*)\]\([^)]*\)|`([^`<]+?)\s*<[^>]*>`_{0,2}")
_CITE = re.compile(r"\s*\[[^\]\s]{1,20}\]_?")
_URL = re.compile(r"https?://\S+")
_MARKUP = re.compile(r"\*\*|``|`_?|\$|(?<!\w)\*(?=\w)|(?<=\w)\*(?!\w)")
_CODE = re.compile(r"[=<>{}\\|#@~^]|\w\(|\)\.|\w\[|::|\.\.\s|--|__|\w_\w|\w\.\w+\.\w|\w/\w+/")
_WORD = re.compile(r"[a-z0-9]+")
_ARGUMENT = re.compile(r"^[`*]*\w+[`*]*\s*(?:\([^()]*(?:\([^()]*\)[^()]*)*\))?\s*:\s+(?=[A-Z])")
_BULLET = re.compile(r"^\s*(?:[-*+•]|\d+[.)]|\(\w\))\s+")

Files = list[tuple[str, list[str]]]  # (file name, its paragraphs)


@dataclass(frozen=True)
class Corpus:
    """Cleaned documents of one domain; the paragraphs of a document are separated by a blank line."""

    train: tuple[str, ...]
    valid: tuple[str, ...]
    test: tuple[str, ...]
    fingerprint: str  # sha256 over all splits, first 16 hex digits


def package_root(name: str) -> Path:
    """Folder of an installed package; ModuleNotFoundError says which pin is missing."""
    # find_spec would import the parent of a dotted name
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        reason = "mini's corpus is made of its documentation: run ./run_all.sh to set up the pins"
        raise ModuleNotFoundError(f"package {name!r} is not installed, {reason}")
    return Path(next(iter(spec.submodule_search_locations)))


def string_literals(path: Path) -> list[str]:
    """Docstrings and other long string literals of a Python file (C extensions document there)."""
    try:
        with warnings.catch_warnings(action="ignore"):
            tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError, RecursionError):
        return []
    values = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
    return [text for text in values if isinstance(text, str) and len(text) >= MIN_LITERAL and " " in text]


def prose_paragraphs(docstring: str) -> list[str]:
    """Prose paragraphs of a docstring: markup removed; code, tables, argument lists, references dropped."""
    kept: list[str] = []
    block: list[str] = []
    code_indent: int | None = None  # of the line that opened a literal block
    block_indent: int | None = 0  # None: any
    for line in [*docstring.expandtabs().splitlines(), ""]:
        stripped, indent = line.strip(), len(line) - len(line.lstrip())
        if code_indent is not None and stripped and indent > code_indent:
            continue  # inside a literal block
        if stripped:
            code_indent = None
        if not stripped or _BULLET.match(line) or (stripped[0] in ">:.|+=-~^" and len(stripped) > 1):
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
        text = stripped if block else _ARGUMENT.sub("", stripped)
        block_indent = indent if text == stripped else None  # text after "name (type):" may be indented
        block.append(text)
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
    text = " ".join(s for s in re.split(r"(?<=[.!?:]) (?=[A-Z])", text) if not _CODE.search(s))
    if len(text.split()) < MIN_WORDS or not text[0].isupper() or text[-1] not in ".!?:" or not text.isascii():
        return ""
    alphabetic = sum(c.isalpha() or c == " " for c in text)
    capitals = sum(c.isupper() for c in text)
    return text if alphabetic >= MIN_ALPHA * len(text) and capitals < 0.15 * len(text) else ""


def extract_package(root: Path, name: str) -> Files:
    """(file name, prose paragraphs) of every documented Python file below root, in name order."""
    files = []
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        relative = path.relative_to(root)
        if relative.name.startswith(("test_", "conftest")) or SKIP_FOLDERS.intersection(relative.parts[:-1]):
            continue
        if paragraphs := [p for text in string_literals(path) for p in prose_paragraphs(text)]:
            files.append((f"{name}/{relative.as_posix()}", paragraphs))
    return files


def ngrams(text: str, n: int = NGRAM) -> set[int]:
    """64-bit hashes of all n-grams of lower-case words; a text shorter than n words is one n-gram."""
    words = _WORD.findall(text.lower())
    grams = [" ".join(words[i : i + n]) for i in range(max(1, len(words) - n + 1))]
    return {int.from_bytes(hashlib.blake2b(gram.encode(), digest_size=8).digest(), "big") for gram in grams}


def deduplicated_documents(files: Files, seen: set[int], forbidden: set[int]) -> list[str]:
    """One document a file, without paragraphs that repeat or are contaminated.
    A paragraph repeats if half of its 13-grams are in `seen`, which this function extends, and is
    contaminated if any is in `forbidden`."""
    documents = []
    for _, paragraphs in files:
        fresh = []
        for paragraph in paragraphs:
            grams = ngrams(paragraph)
            if forbidden.isdisjoint(grams) and len(grams & seen) < 0.5 * len(grams):
                fresh.append(paragraph)
            seen |= grams
        if fresh:
            documents.append("\n\n".join(fresh))
    return documents


def build(groups: Mapping, fractions: Mapping, roots: dict | None = None, jobs: int = 1) -> dict[str, Corpus]:
    """Corpora {group: Corpus} from installed packages (or `roots`), decontaminated across groups and splits.
    `groups` {group: package names}, `fractions` {group: (valid, test)}; `jobs` processes parse. Held-out
    paragraphs are settled first, from the pinned packages alone, so that more training text can never change
    them; then training paragraphs that share a 13-gram with any of them are dropped."""
    packages, roots = [(group, name) for group, names in groups.items() for name in names], roots or {}
    paths = [roots.get(name) or package_root(name) for _, name in packages]
    files: defaultdict[tuple[str, str], Files] = defaultdict(list)
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        extracted = (pool.map if jobs > 1 else map)(extract_package, paths, (name for _, name in packages))
        for (group, _), package in zip(packages, extracted, strict=True):
            valid, test = fractions[group]
            for file in package:
                position = int(hashlib.sha256(file[0].encode()).hexdigest()[:8], 16) / 2**32  # in [0, 1)
                held_out = "valid" if position < valid else "test"
                files[group, held_out if position < valid + test else "train"].append(file)

    seen: set[int] = set()

    def select(group: str, split: str, forbidden: set[int]) -> tuple[str, ...]:
        return tuple(deduplicated_documents(files[group, split], seen, forbidden))

    tests = {group: select(group, "test", set()) for group in groups}
    valids = {group: select(group, "valid", set(seen)) for group in groups}  # free of all test text
    forbidden, corpora = set(seen), {}
    for group in groups:
        splits = (select(group, "train", forbidden), valids[group], tests[group])
        corpora[group] = Corpus(*splits, splits_fingerprint(splits))
    return corpora


def sample(docs: tuple[str, ...], fraction: float, seed: int) -> tuple[str, ...]:
    """Documents drawn at random until `fraction` of all characters is reached."""
    remaining, chosen = fraction * sum(map(len, docs)), []
    for doc in random.Random(seed).sample(docs, len(docs)):
        if remaining <= 0:
            break
        chosen.append(doc)
        remaining -= len(doc)
    return tuple(chosen)


def splits_fingerprint(splits: Sequence) -> str:
    """First 16 hex digits of a sha256 over the documents of (train, valid, test)."""
    return hashlib.sha256(json.dumps(splits).encode()).hexdigest()[:16]


def fingerprint(corpora: dict[str, Corpus]) -> str:
    """First 16 hex digits of a sha256 over the fingerprints of all corpora of a run."""
    return splits_fingerprint(sorted((group, corpus.fingerprint) for group, corpus in corpora.items()))


def write(corpora: dict[str, Corpus], path: Path) -> None:
    """Write the corpora as one JSON file, for a machine without the packages they were made from."""
    write_atomic(path, json.dumps({name: asdict(corpus) for name, corpus in corpora.items()}))


def read(path: Path) -> dict[str, Corpus]:
    """Read the file that `write` wrote; ValueError where its content or fingerprint is wrong."""
    corpora = {}
    try:
        for name, entry in json.loads(path.read_bytes()).items():
            splits: dict = {key: tuple(entry.pop(key)) for key in ("train", "valid", "test")}
            corpora[name] = Corpus(**splits, **entry)
        for name in ("web", "wiki"):
            corpus = corpora[name]
            if splits_fingerprint((corpus.train, corpus.valid, corpus.test)) != corpus.fingerprint:
                raise ValueError(f"the text of {name} is not the one of its fingerprint")
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        remedy = f"make it again with `python -m kn export-corpus {path}`"
        raise ValueError(f"{path} is no corpus file ({error}): {remedy}") from None
    return corpora


def train_tokenizer(docs: tuple[str, ...], vocab_size: int):
    """Byte-level BPE with GPT-2's pre-tokenization and `<|endoftext|>` as its one special token (id 0)."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast
    end = "<|endoftext|>"
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(docs, vocab_size=vocab_size, special_tokens=[end], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token=end, eos_token=end,
                                   pad_token=end, unk_token=end)


def pack(tokenizer, docs: tuple[str, ...], context: int):
    """Token ids of all documents, each followed by the end-of-text token, as rows: int64 (n, context)."""
    import torch
    ids = tokenizer(list(docs), **PLAIN_TEXT)["input_ids"]
    stream = [token for document in ids for token in (*document, tokenizer.eos_token_id)]
    rows = len(stream) // context
    return torch.tensor(stream[: rows * context]).view(rows, context)
