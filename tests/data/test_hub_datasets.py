"""Token rows and GLUE files of the paper profile, from a rehearsal mirror with GPT-2's real tokenizer."""

import pyarrow.parquet
import pytest
from safetensors.torch import load_file
from transformers import AutoTokenizer

from kn.data import glue, hub, hub_datasets

# GLUE's published sizes (train, and dev where the folder is whole) and the share of label 1 in training,
# counted from the files GLUE gives out
COLA_ACCEPTABLE, SST2_POSITIVE, MRPC_EQUIVALENT, RTE_ENTAILED = 6023, 37569, 2474, 1249


@pytest.fixture
def mirror(rehearsal_mirror, monkeypatch):
    monkeypatch.setenv("KN_MIRROR", str(rehearsal_mirror))
    return rehearsal_mirror


def settings(**text):
    """Of a corpus stage."""
    return {
        "text": {"sample": 0.5, "sample_seed": 0, "web_shares": (0.1, 0.1), "limit": 0, **text},
        "context": 1024, "mirror": hub.digest(hub.mirror_folder(), ("wikitext", "openwebtext"))
    }


def test_token_rows_of_the_real_texts(mirror, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(mirror / "gpt2", local_files_only=True)
    metrics = hub_datasets.write_token_rows(mirror, settings(), tmp_path, tokenizer)
    rows = load_file(tmp_path / "rows.safetensors")
    # the known counts
    assert metrics["wiki"]["test"]["tokens"] == 287_644 and metrics["wiki"]["valid"]["tokens"] == 251_048
    assert rows["wiki_test"].shape == (287_644 // 1024, 1024)
    whole = tokenizer("".join(hub_datasets.iter_wikitext(mirror, "valid")), verbose=False)["input_ids"]
    assert rows["wiki_valid"].long().flatten().tolist() == whole[: rows["wiki_valid"].numel()]
    parts = (metrics["sample"], metrics["web"]["valid"], metrics["web"]["test"])
    documents = sum(counts["documents"] for counts in parts)
    assert 0.6 * 1424 < documents < 0.8 * 1424  # 70 % of them, four standard deviations are 5 %
    assert (rows["sample"].long() == tokenizer.eos_token_id).sum() > 0.9 * metrics["sample"]["documents"]


def test_too_small_a_share_is_refused(mirror, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(mirror / "gpt2", local_files_only=True)
    with pytest.raises(
        hub.SourceError,
        match=r"web_valid gave no full row of 1024 tokens \(0 tokens\): choose larger shares with --set"
    ):
        hub_datasets.write_token_rows(mirror, settings(web_shares=(0.0, 0.1)), tmp_path, tokenizer)


def test_glue_files_have_the_published_sizes_and_balance(mirror, tmp_path):
    metrics = hub_datasets.write_glue_tasks(mirror, {"tasks": list(glue.TASKS), "limit": 0}, tmp_path)
    assert {task: metrics[task]["train"] for task in ("cola", "sst2", "mrpc", "rte")} == {
        "cola": 8551, "sst2": 67349, "mrpc": 3668, "rte": 2490
    }
    assert metrics["cola"]["classes"][1] == COLA_ACCEPTABLE and metrics["sst2"]["classes"][1] == SST2_POSITIVE
    assert metrics["mrpc"]["classes"][1] == MRPC_EQUIVALENT and metrics["rte"]["classes"][0] == RTE_ENTAILED
    # the majority of RTE's dev set
    assert metrics["rte"]["majority"]["headline"] == pytest.approx(100 * 146 / 277)
    for task in glue.TASKS:
        again = glue.read_task(tmp_path / task, task)
        assert {split: len(rows) for split, rows in again.items()} == {
            split: metrics[task][split] for split in again
        }


def test_a_rehearsal_says_that_it_is_one(mirror):
    state = hub.rehearsal_notes(mirror)
    assert state["weights"] == "random" and state["carved"]["qqp/test"] == "2000 training rows"


@pytest.mark.parametrize("task", glue.TASKS)
def test_test_labels_that_the_hub_has_stay_hidden(tmp_path, task):
    """The hub's MRPC has real test labels, the six others have -1: no local score for any."""
    names = hub_datasets.GLUE_TEXTS[task]
    for split in glue.TASKS[task].splits:
        folder = tmp_path / "mirror" / "glue" / task
        folder.mkdir(parents=True, exist_ok=True)
        columns = {name: ["A text.", "Another one."] for name in names} | {"label": [0, 1]}
        name = split.replace("dev", "validation")
        pyarrow.parquet.write_table(pyarrow.table(columns), folder / f"{name}-00000-of-00001.parquet")
    splits = hub_datasets.read_glue_task(tmp_path / "mirror", task)
    assert {split: [row["label"] for row in rows] for split, rows in splits.items()} == {
        split: [None, None] if split.startswith("test") else [0, 1] for split in glue.TASKS[task].splits
    }
    glue.write_task(tmp_path / task, task, splits)
    assert not (tmp_path / task / glue.LABELS_FILE).exists()
