"""Builds a mirror for a rehearsal of the paper profile, from a folder of real public data and models with
random weights.

    PYTHONPATH=. python tests/rehearsal.py DATA MIRROR [--tiny]

DATA holds GLUE's TSVs (glue/<task>/*.tsv), WikiText (wikitext/), OpenWebText (text/openwebtext*.txt) and
GPT-2's tokenizer (gpt2_tokenizer/). Files get the names, columns and formats they have on the hub. Splits
that DATA lacks are carved from training rows and named in mirror.json under "carved", so that nobody takes a
rehearsal for a result.
"""

import argparse
import csv
import json
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet

from kn.data import glue, hub, hub_datasets, mirror

CARVED = 2000  # rows of a split that is carved out of the training rows
# with --tiny; GPT-2's own vocabulary and 1,024 positions stay
TINY = {"n_embd": 32, "n_layer": 2, "n_head": 2}


def write(path: Path, table: dict[str, list], schema=None) -> None:
    """One parquet file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(table, schema=schema), path)


def write_glue(target: Path, task: str, split: str, rows: list[dict]) -> None:
    """A split as the hub has it: <task>/<split>-00000-of-00001.parquet with the hub's columns, label −1 where
    hidden."""
    names = hub_datasets.GLUE_TEXTS[task]
    table = {name: [row["texts"][at] for row in rows] for at, name in enumerate(names)}
    table |= {
        "label": [-1 if row["label"] is None else row["label"] for row in rows], "idx": list(range(len(rows)))
    }
    types = [(name, pyarrow.string()) for name in names] + [
        ("label", pyarrow.int64()), ("idx", pyarrow.int32())
    ]
    write(
        target / task / f"{split.replace('dev', 'validation')}-00000-of-00001.parquet", table,
        pyarrow.schema(types)
    )


def build_glue(data: Path, target: Path) -> dict[str, str]:
    """All seven tasks; returns {split that was carved: from what}."""
    carved = {}
    for task in glue.TASKS:
        splits = {}
        for split in glue.TASKS[task].splits:
            path = data / "glue" / task / f"{split}.tsv"
            if path.exists():
                splits[split] = glue.read_split(path, task, split)
        for split in glue.TASKS[task].splits:
            if split not in splits:
                splits[split], splits["train"] = splits["train"][-CARVED:], splits["train"][:-CARVED]
                carved[f"{task}/{split}"] = f"{CARVED} training rows"
                if split.startswith("test"):
                    splits[split] = [{**row, "label": None} for row in splits[split]]
        for split, rows in splits.items():
            write_glue(target, task, split, rows)
    return carved


def build_text(data: Path, target: Path) -> dict[str, str]:
    """wikitext-103-raw-v1 (train: WikiText-2's, in two files) and openwebtext, one column `text` each."""
    folder = target / "wikitext" / "wikitext-103-raw-v1"
    lines = (data / "wikitext" / "train.txt").read_text(encoding="utf-8").split("\n")[:-1]
    for part, half in enumerate((lines[: len(lines) // 2], lines[len(lines) // 2 :])):
        write(
            folder / f"train-{part:05d}-of-00002.parquet",
            {"text": [line + "\n" if line.strip() else "" for line in half]}
        )
    for split, name in (("validation", "valid"), ("test", "test")):
        lines = (data / "wikitext" / f"wiki.{name}.raw").read_text(encoding="utf-8").split("\n")[:-1]
        write(
            folder / f"{split}-00000-of-00001.parquet",
            {"text": [line + "\n" if line.strip() else "" for line in lines]}
        )
    documents = []
    for path in sorted((data / "text").glob("openwebtext*.txt")):
        documents += [d.strip() for d in path.read_text(encoding="utf-8").split("<|endoftext|>") if d.strip()]
    write(target / "openwebtext" / "plain_text" / "train-00000-of-00001.parquet", {"text": documents})
    return {"wikitext/train": "WikiText-2's training text"}


def build_models(data: Path, target: Path, tiny: bool) -> None:
    """gpt2 and distilgpt2 at full size with random weights, tokenizer files beside."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, GPT2TokenizerFast

    torch.manual_seed(0)
    for name, layers in (("gpt2", 12), ("distilgpt2", 6)):
        fields = {**TINY, "n_layer": 2 if name == "gpt2" else 1} if tiny else {"n_layer": layers}
        GPT2LMHeadModel(GPT2Config(**fields)).save_pretrained(target / name)
        (target / name / "vocab.json").write_bytes((data / "gpt2_tokenizer" / "encoder.json").read_bytes())
        (target / name / "merges.txt").write_bytes((data / "gpt2_tokenizer" / "vocab.bpe").read_bytes())
        GPT2TokenizerFast.from_pretrained(target / name).save_pretrained(target / name)


def build(data: Path, target: Path, tiny: bool = False) -> Path:
    """The whole mirror with its mirror.json; the folder must be new."""
    csv.field_size_limit(sys.maxsize)
    target.mkdir(parents=True)
    carved = {**build_glue(data, target / "glue"), **build_text(data, target)}
    build_models(data, target, tiny)
    items = {}
    for name, item in hub.REPOSITORIES.items():
        found = [p.relative_to(target / name).as_posix() for p in (target / name).rglob("*") if p.is_file()]
        items[name] = {
            "repository": item.repository, "kind": item.kind, "revision": "rehearsal",
            "commit": "rehearsal: not the hub's", "files": mirror.file_records(target / name, found)
        }
    mirror.write_manifest(target, items)
    state = json.loads((target / "mirror.json").read_text())
    (target / "mirror.json").write_text(
        json.dumps({**state, "carved": carved, "weights": "random"}, indent=1) + "\n"
    )
    return target


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("mirror", type=Path)
    parser.add_argument("--tiny", action="store_true", help="models of two and one layers, width 32")
    options = parser.parse_args()
    print(build(options.data, options.mirror, options.tiny))
