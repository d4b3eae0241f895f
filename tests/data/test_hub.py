"""Reading the hub's files from a mirror, making and checking a mirror; on tiny files written here, and on
real ones where they are."""

import json
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import rehearsal
from transformers import AutoTokenizer

from kn.data import glue, hub, hub_datasets, mirror

ARTICLES = [
    "", " = One = \n", "", " Text of one . \n", " = = Part = = \n", " More . \n", " = Two = \n",
    " Text of two . \n"
]


@pytest.fixture
def tiny(tmp_path):
    """A mirror of a few rows: every task, both texts, two empty model folders."""
    target = tmp_path / "mirror"
    for task, facts in glue.TASKS.items():
        for split in facts.splits:
            rows = [
                {
                    "texts": tuple(f"text {i} of {name}" for name in hub_datasets.GLUE_TEXTS[task]),
                    "label": None if split.startswith("test") else i % len(facts.labels)
                }
                for i in range(6)
            ]
            rehearsal.write_glue(target / "glue", task, split, rows)
    for split in ("train", "validation", "test"):
        rehearsal.write(
            target / "wikitext" / "wikitext-103-raw-v1" / f"{split}-00000-of-00001.parquet",
            {"text": ARTICLES}
        )
    for part in range(2):
        documents = {"text": [f"document {part} {i}" for i in range(500)]}
        rehearsal.write(
            target / "openwebtext" / "plain_text" / f"train-{part:05d}-of-00002.parquet", documents
        )
    items = {}
    for name, item in hub.REPOSITORIES.items():
        (target / name).mkdir(exist_ok=True)
        found = [p.relative_to(target / name).as_posix() for p in (target / name).rglob("*") if p.is_file()]
        items[name] = {
            "repository": item.repository, "kind": item.kind, "revision": "main", "commit": "0" * 40,
            "files": mirror.file_records(target / name, found)
        }
    mirror.write_manifest(target, items)
    return target


def test_glue_rows_have_texts_labels_and_hidden_test_labels(tiny):
    for task, facts in glue.TASKS.items():
        rows = hub_datasets.read_glue_task(tiny, task)
        assert tuple(rows) == facts.splits and all(len(part) == 6 for part in rows.values())
        assert all(len(row["texts"]) == len(facts.texts) for part in rows.values() for row in part)
        assert [row["label"] for row in rows["train"]] == [i % len(facts.labels) for i in range(6)]
        assert all(row["label"] is None for split in facts.test for row in rows[split])


def test_wikitext_pieces_add_up_to_the_whole(tiny):
    found = list(hub_datasets.iter_wikitext(tiny, "valid"))
    assert "".join(found) == "\n\n".join(ARTICLES)
    # at titles, not at sections
    assert [piece.split("\n")[0] for piece in found] == ["", " = One = ", " = Two = "]


def test_openwebtext_is_drawn_the_same_way_each_time(tiny):
    first, again, other = (
        list(hub_datasets.iter_openwebtext(tiny, 0.1, (0.05, 0.05), seed)) for seed in (0, 0, 1)
    )
    assert first == again != other
    counts = Counter(split for split, _ in first)
    # of 1,000: four standard deviations
    assert 60 < counts["sample"] < 140 and all(22 < counts[split] < 78 for split in ("valid", "test"))
    assert len({text for _, text in first}) == len(first)
    assert len(list(hub_datasets.iter_openwebtext(tiny, 1.0, (0.0, 0.0), 0))) == 1000


def damage(folder, what):
    """One fault in the mirror."""
    path = folder / "glue" / "rte" / "train-00000-of-00001.parquet"
    row = {"texts": ("a", "b"), "label": 0}
    if what == "column":
        rehearsal.write(path, {"premise": ["a"], "sentence2": ["b"], "label": [0]})
    elif what == "label":
        rehearsal.write_glue(folder / "glue", "rte", "train", [row, {**row, "label": 2}])
    elif what == "hidden":
        rehearsal.write_glue(folder / "glue", "rte", "train", [row, {**row, "label": None}])
    elif what == "type":
        rehearsal.write(path, {"sentence1": [1], "sentence2": ["b"], "label": [0]})
    elif what == "short":
        path.write_bytes(path.read_bytes()[:200])
    elif what == "split":
        path.unlink()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("column", "column 'sentence1' is missing, found: premise, sentence2, label"),
        ("label", "row 1: label 2 is not a class of rte, allowed are 0 to 1"),
        ("hidden", "row 1: label -1 is not a class of rte, allowed are 0 to 1"),
        ("type", "row 0: (1, 'b') is not text"),
        ("short", "cannot be read as parquet"),
        ("split", "has no split 'train' (found: test, validation): fetch it again with `python -m kn mirror"),
    ],
)
def test_faults_are_named_in_one_line(tiny, what, message):
    damage(tiny, what)
    with pytest.raises(hub.SourceError) as caught:
        hub_datasets.read_glue_task(tiny, "rte")
    assert message in str(caught.value) and "\n" not in str(caught.value) and "rte" in str(caught.value)


def test_a_mirror_knows_what_is_missing_or_damaged(tiny):
    assert mirror.problems(tiny) == []
    damage(tiny, "short")
    (tiny / "wikitext" / "wikitext-103-raw-v1" / "test-00000-of-00001.parquet").unlink()
    found = mirror.problems(tiny)
    assert len(found) == 2 and "test-00000-of-00001.parquet is missing" in found[0]
    assert "is damaged" in found[1]
    (tiny / "mirror.json").write_text("{")
    with pytest.raises(hub.SourceError, match=r"mirror.json is damaged: fetch it again"):
        mirror.problems(tiny)
    (tiny / "mirror.json").unlink()
    with pytest.raises(hub.SourceError, match=r"is no mirror \(mirror.json is missing\)"):
        mirror.problems(tiny)


class Hub:
    """A hub with the files of a folder: what HfApi and snapshot_download are asked for."""

    def __init__(self, folder, script_only=()):
        self.folder, self.script_only, self.fetched = folder, script_only, []

    def repo_info(self, repository, repo_type, revision, files_metadata):
        name = next(n for n, item in hub.REPOSITORIES.items() if item.repository == repository)
        files = [p for p in (self.folder / name).rglob("*") if p.is_file()]
        found = [
            SimpleNamespace(rfilename=p.relative_to(self.folder / name).as_posix(), size=p.stat().st_size)
            for p in files
        ]
        if name in self.script_only and revision == "main":
            found = [SimpleNamespace(rfilename=f"{name}.py", size=10)]
        return SimpleNamespace(
            sha=f"{revision}-commit",
            siblings=[*found, SimpleNamespace(rfilename="pytorch_model.bin", size=10)]
        )

    def download(self, repository, repo_type, revision, local_dir, allow_patterns):
        name = next(n for n, item in hub.REPOSITORIES.items() if item.repository == repository)
        self.fetched.append((name, revision))
        for file in allow_patterns:
            (Path(local_dir) / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.folder / name / file, Path(local_dir) / file)


ITEMS = {name: item for name, item in hub.REPOSITORIES.items() if item.kind == "dataset"}


def test_making_a_mirror_resumes_and_mends(tiny, tmp_path):
    server, target = Hub(tiny, script_only=("openwebtext",)), tmp_path / "new"
    assert mirror.make(target, ITEMS, server, server.download) == 0
    assert server.fetched == [
        ("wikitext", "main-commit"), ("openwebtext", "refs/convert/parquet-commit"), ("glue", "main-commit")
    ]
    state = json.loads((target / "mirror.json").read_text())["items"]
    assert state["openwebtext"]["revision"] == "refs/convert/parquet"
    assert state["glue"]["commit"] == "main-commit"
    assert not list(target.rglob("*.bin")) and not list(target.rglob("*.py"))
    # nothing is fetched twice
    assert mirror.make(target, ITEMS, server, server.download) == 0 and len(server.fetched) == 3
    (target / "wikitext" / "wikitext-103-raw-v1" / "test-00000-of-00001.parquet").write_bytes(b"x")
    assert mirror.make(target, ITEMS, server, server.download) == 0
    assert server.fetched[3:] == [("wikitext", "main-commit")]
    assert mirror.problems(target, items=ITEMS) == []


def test_making_a_mirror_without_network_or_room(tiny, tmp_path, monkeypatch):
    class Down(Hub):
        def repo_info(self, *_, **__):
            raise ConnectionError("no route")

    down, server = Down(tiny), Hub(tiny)
    with pytest.raises(
        hub.SourceError,
        match=r"Salesforce/wikitext cannot be reached \(ConnectionError\): is there a network"
    ):
        mirror.make(tmp_path / "new", ITEMS, down, down.download)
    monkeypatch.setattr(mirror.shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(
        hub.SourceError, match=r"wikitext needs .* GB, .* has 0.0 GB free: make room or choose another folder"
    ):
        mirror.make(tmp_path / "new", ITEMS, server, server.download)


def test_a_rehearsal_mirror_of_real_data_reads_back(rehearsal_mirror):
    target = rehearsal_mirror
    assert mirror.problems(target) == []
    sizes = {
        task: {split: len(rows) for split, rows in hub_datasets.read_glue_task(target, task).items()}
        for task in glue.TASKS
    }
    assert sizes["cola"] == {"train": 8551, "dev": 1043, "test": 1063}
    assert sizes["sst2"] == {"train": 67349, "dev": 872, "test": 1821}
    assert sizes["mrpc"] == {"train": 3668, "dev": 408, "test": 1725}
    assert sizes["rte"] == {"train": 2490, "dev": 277, "test": 3000}
    assert sizes["qnli"] == {"train": 9999, "dev": 5463, "test": 5463}
    assert sizes["mnli"]["dev_matched"] == 9815
    assert set(json.loads((target / "mirror.json").read_text())["carved"]) == {
        "mnli/dev_mismatched", "mnli/test_mismatched", "qqp/dev", "qqp/test", "wikitext/train"
    }
    tokenizer = AutoTokenizer.from_pretrained(target / "gpt2", local_files_only=True)
    counts = {
        split: sum(
            map(len, tokenizer(list(hub_datasets.iter_wikitext(target, split)), verbose=False)["input_ids"])
        )
        for split in ("valid", "test")
    }
    # the numbers transformers' guide on perplexity and its users print
    assert counts == {"valid": 251_048, "test": 287_644}
    assert len(list(hub_datasets.iter_openwebtext(target, 1.0, (0.0, 0.0), 0))) > 1400
