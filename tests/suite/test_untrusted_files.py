"""Data that others wrote are never trusted: hostile or damaged mirrors, tables of texts, scores and corpus
files are refused in one line."""

import json
import random

import pytest
import rehearsal
from test_untrusted import refused

from kn.data import documentation, glue, glue_submission, hub, hub_datasets, mirror
from kn.suite import plan as kinds

SCRIPT = "<script>alert(1)</script>"


@pytest.fixture
def small(tmp_path):
    """A mirror of one task and one page of text."""
    folder = tmp_path / "mirror"
    rows = [{"texts": (f"a {i}", f"b {i}"), "label": i % 2} for i in range(6)]
    for split in ("train", "dev", "test"):
        rehearsal.write_glue(folder / "glue", "rte", split, rows)
    rehearsal.write(
        folder / "wikitext" / "train-00000-of-00001.parquet", {"text": [" = One = \n", " text \n"]}
    )
    items = {}
    for name in ("glue", "wikitext"):
        files = [p.relative_to(folder / name).as_posix() for p in (folder / name).rglob("*.parquet")]
        items[name] = {
            "repository": "r", "kind": "dataset", "revision": "main", "commit": "0" * 40,
            "files": mirror.file_records(folder / name, files)
        }
    mirror.write_manifest(folder, items)
    return folder


@pytest.mark.parametrize(
    "name", ["../../outside.parquet", "/etc/passwd", "..", "", "a\nb.parquet", "a/../../b"]
)
def test_names_that_lead_out_of_a_mirror(small, name):
    state = json.loads((small / "mirror.json").read_text())
    state["items"]["glue"]["files"] = {name: [1, "0" * 64]}
    (small / "mirror.json").write_text(json.dumps(state))
    for call in (lambda: hub.read_manifest(small), lambda: mirror.problems(small)):
        refused(call, f"{name!r} leads out of {small}: ", "put the file itself there", kind=hub.SourceError)


def test_links_that_lead_out_of_a_mirror(small, tmp_path):
    path = small / "glue" / "rte" / "train-00000-of-00001.parquet"
    path.rename(tmp_path / "outside.parquet")
    path.symlink_to(tmp_path / "outside.parquet")
    for call in (lambda: hub_datasets.read_glue_task(small, "rte"), lambda: mirror.problems(small)):
        refused(call, f"leads out of {small} by a link: ", kind=hub.SourceError)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"items": []}',
        '{"items": {"glue": 3}}',
        '{"items": {"glue": {"commit": 5, "files": {}}}}',
        '{"items": {"glue": {"commit": "0", "files": {"a": 3}}}}',
        "[" * 200_000,
        '{"items": {"glue": {"commit": "0", "files": {"a": ["x", 3]}}}}',
        '{"items": ' + "9" * 5000 + "}",
    ],
    ids=lambda c: c[:30],
)
def test_a_mirror_json_that_is_none(small, content):
    (small / "mirror.json").write_text(content)
    refused(
        lambda: hub.read_manifest(small), "mirror.json is damaged: fetch it again with `python -m kn mirror",
        kind=hub.SourceError
    )


def test_a_mirror_json_of_hundreds_of_megabytes_is_not_read(small):
    with (small / "mirror.json").open("wb") as file:
        file.truncate(hub.MAX_MANIFEST_BYTES + 1)  # without taking room
    refused(lambda: hub.read_manifest(small), "mirror.json is damaged", kind=hub.SourceError)


def test_random_damage_of_parquet_is_one_line_and_never_reaches_a_stage(small, monkeypatch):
    """Forty files: what pyarrow cannot read is named, and what it reads wrongly is found by its sha256 before
    a stage begins."""
    draw, path = random.Random(0), small / "glue" / "rte" / "train-00000-of-00001.parquet"
    content, wanted = path.read_bytes(), hub_datasets.read_glue_task(small, "rte")["train"]
    monkeypatch.setenv("KN_MIRROR", str(small))
    settings = hub.digest(hub.mirror_folder(), ("glue",))
    hub.verify(small, settings)
    for _ in range(40):
        made = bytearray(content)
        for _ in range(draw.randint(1, 6)):
            made[draw.randrange(len(made))] = draw.randrange(256)
        path.write_bytes(made[: draw.choice([len(made), len(made) // 2])])
        try:
            assert all(
                isinstance(text, str)
                for row in hub_datasets.read_glue_task(small, "rte")["train"]
                for text in row["texts"]
            )
        except hub.SourceError as error:
            assert "\n" not in str(error) and str(path) in str(error)
        if path.read_bytes() != content:
            refused(
                lambda: hub.verify(small, settings),
                f"{path} is damaged (another content than mirror.json says): fetch it again",
                kind=hub.SourceError
            )
    path.write_bytes(content)
    assert hub_datasets.read_glue_task(small, "rte")["train"] == wanted


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe", "is no UTF-8 text (byte 0): it is damaged"),
        (b"", "is empty, expected a header line"),
        (b"index\tsentence1\n", "column 'sentence2' is missing, found: index, sentence1"),
        (b"index\tsentence1\tsentence2\tlabel\n0\ta\tb\tmaybe\n", "line 2: unknown label 'maybe'"),
        (b"index\tsentence1\tsentence2\tlabel\n0\ta\n", "line 2: 2 columns instead of 4"),
    ],
)
def test_damaged_tsv(tmp_path, content, message):
    (tmp_path / "dev.tsv").write_bytes(content)
    refused(lambda: glue.read_split(tmp_path / "dev.tsv", "rte", "dev"), str(tmp_path / "dev.tsv"), message)


SCORES = "row,seed,task,score\n"


@pytest.mark.parametrize(
    "content",
    [
        b"\xff",
        b"",
        b"row\n1\n",
        (SCORES + "teacher,0,cola,nan\n").encode(),
        (SCORES + "teacher,0,cola,50,9\n").encode(),
        (SCORES + f"{SCRIPT},0,cola,50\n").encode(),
        (SCORES + "teacher,=1+1,cola,50\n").encode(),
        (SCORES + '"' + "x" * 200_000 + '",0,cola,5\n').encode(),
        (SCORES + "teacher,0,cola,50\nteacher,0,cola,60\n").encode(),
        (SCORES + "teacher,0,cola\n").encode(),
        b"\0" * 100,
    ],
    ids=lambda c: repr(c[-20:]),
)
def test_damaged_glue_scores(tmp_path, content):
    (tmp_path / "scores.csv").write_bytes(content)
    refused(
        lambda: glue_submission.read_scores(tmp_path / "scores.csv", kinds.ROWS), str(tmp_path / "scores.csv")
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.pop("wiki"),
        lambda c: c["web"].update(train=[7]),
        lambda c: c["web"].update(train=["changed"]),
        lambda c: c["web"].update(fingerprint="0" * 16),
        lambda c: c["web"].update(evil=1),
        lambda c: c.update(web=3),
        lambda c: c["web"].update(train="text"),
    ],
)
def test_a_corpus_file_that_is_none(tmp_path, change):
    """Its fingerprint covers every letter, so a changed one is no corpus of that name."""
    splits = (("a",), ("b",), ("c",))
    one = documentation.Corpus(*splits, documentation.splits_fingerprint(splits))
    documentation.write({"web": one, "wiki": one}, tmp_path / "corpus.json")
    content = json.loads((tmp_path / "corpus.json").read_text())
    assert documentation.read(tmp_path / "corpus.json") == {"web": one, "wiki": one}
    change(content)
    (tmp_path / "corpus.json").write_text(json.dumps(content))
    refused(
        lambda: documentation.read(tmp_path / "corpus.json"), "is no corpus file (",
        "make it again with `python -m kn export-corpus"
    )
