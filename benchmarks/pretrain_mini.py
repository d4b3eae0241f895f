"""Trains mini's two committed models again, kn/assets/mini: `python -m kn pretrain-mini [--extra DIR]`."""

import json
import platform
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from transformers import set_seed

from kn.data import documentation
from kn.files import file_records, write_atomic
from kn.suite import pretrain_mini, profiles
from kn.suite.devices import cpu_name
from kn.suite.provenance import environment
from kn.suite.settings import Profile, Recipe
from kn.suite.store import Store

VALID_ROWS = 400


def save_asset(model, folder: Path, log: Path, recipe: Recipe, measured: dict) -> None:
    """Write a committed asset: float16 weights, configuration, log, recipe.json with its measured cost."""
    folder.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    machine = environment() | {"machine": platform.machine()}
    text = {"recipe": asdict(recipe), "measured": measured, "environment": machine}
    write_atomic(folder / "recipe.json", json.dumps(text, indent=1) + "\n")
    write_atomic(folder / "log.jsonl", log.read_text(encoding="utf-8"))


def held_out_ngrams(corpora: Iterable[documentation.Corpus]) -> set[int]:
    """Every 13-gram of the valid and test documents, for decontaminating further training text."""
    documents = [doc for corpus in corpora for doc in (*corpus.valid, *corpus.test)]
    return {gram for doc in documents for p in doc.split("\n\n") for gram in documentation.ngrams(p)}


def extra_documents(folder: Path | None, corpora: dict) -> tuple[str, ...]:
    """Documentation of further unpacked packages, without paragraphs that are held out or already there."""
    if folder is None:
        return ()
    forbidden = held_out_ngrams(corpora.values())
    paragraphs = [paragraph for doc in corpora["web"].train for paragraph in doc.split("\n\n")]
    seen = {gram for paragraph in paragraphs for gram in documentation.ngrams(paragraph)}
    packages = sorted(p for p in folder.iterdir() if p.is_dir() and p.name.isidentifier())
    files = (documentation.extract_package(package, package.name) for package in packages)
    return tuple(doc for f in files for doc in documentation.deduplicated_documents(f, seen, forbidden))


def rebuild(
    store: Store, extra: Path | None = None, profile: Profile = profiles.MINI,
    recipes: tuple[Recipe, Recipe] = (profiles.TEACHER, profiles.BASELINE),
) -> int:
    """Make mini's assets in <store>/rebuild/mini, resumably; `extra`: folder of more packages. Returns 0."""
    text, shape, work = profile.text, profile.model, store.home / "rebuild"
    assets, fractions = work / "mini", {"web": text.web_shares, "wiki": text.wiki_shares}
    corpora = documentation.build({"web": text.web, "wiki": text.wiki}, fractions)
    web, fingerprint = corpora["web"], documentation.fingerprint(corpora)
    texts = {"teacher": web.train + extra_documents(extra, corpora), "baseline": web.train}
    tokenizer = documentation.train_tokenizer(web.train, shape.vocabulary)
    tokenizer.save_pretrained(assets / "tokenizer")
    valid = documentation.pack(tokenizer, web.valid, shape.context)[:VALID_ROWS]
    set_seed(recipes[0].seed)
    model, teacher = pretrain_mini.random_gpt2(shape), None
    for (name, docs), recipe in zip(texts.items(), recipes, strict=True):
        model = model if teacher is None else pretrain_mini.every_other_layer(teacher)
        rows, log = documentation.pack(tokenizer, docs, shape.context), work / name / "log.jsonl"
        pretrain_mini.train(model, rows, valid, work / name, recipe, teacher)
        data_bytes = sum(len(doc.encode()) for doc in docs)
        cost = pretrain_mini.training_cost(model, log, rows, data_bytes, f"{cpu_name()}, one thread")
        save_asset(model, assets / name, log, recipe, {**cost, "corpus": fingerprint})
        teacher = model.float().eval().requires_grad_(False)
    sums, records = assets / "SHA256SUMS", file_records(assets)  # finds a damaged file before it is used
    write_atomic(sums, "".join(f"{records[name][1]}  {name}\n" for name in records if name != sums.name))
    print(f"{assets} is ready: compare it with kn/assets/mini")
    return 0
