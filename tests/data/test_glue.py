"""GLUE's layout, metrics, model input and submission, against scikit-learn and hand-made files."""

import zipfile

import pytest
from conftest import ROOT
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from kn.data import glue, glue_submission

# real GLUE files, where somebody put them beside the repository
REAL = ROOT.parent / "shared" / "data" / "glue"


def rows_of(name, count=7, labelled=True):
    task = glue.TASKS[name]
    texts = [
        tuple(f'{"ab"[side]} sentence, number {i}\u2028\x85 "quoted' for side in range(len(task.texts)))
        for i in range(count)
    ]
    return [
        {"texts": t, "label": i % len(task.labels) if labelled else None, "index": i}
        for i, t in enumerate(texts)
    ]


class Words:
    """A tokenizer of whole words, ids from 1; 0 is the end of a text."""

    eos_token_id = 0

    def __call__(self, texts, add_special_tokens, split_special_tokens, verbose):
        assert not add_special_tokens and split_special_tokens
        return {"input_ids": [[int(word) for word in text.split()] for text in texts]}


def test_the_paper_s_seven_columns_in_order():
    assert [task.title for task in glue.TASKS.values()] == [
        "CoLA", "RTE", "MRPC", "SST-2", "MNLI", "QNLI", "QQP"
    ]
    assert {name: task.headline for name, task in glue.TASKS.items()} == {
        "cola": "matthews", "rte": "accuracy", "mrpc": "f1", "sst2": "accuracy", "mnli": "accuracy",
        "qnli": "accuracy", "qqp": "accuracy",
    }


def test_metrics_are_scikit_learn_s():
    labels, guess = [0, 1, 1, 0, 1, 1, 0, 1], [0, 1, 0, 0, 1, 1, 1, 1]
    assert glue.score("cola", guess, labels)["headline"] == pytest.approx(
        100 * matthews_corrcoef(labels, guess)
    )
    assert glue.score("rte", guess, labels) == pytest.approx({"accuracy": 75.0, "headline": 75.0})
    pair = {"f1": 100 * f1_score(labels, guess), "accuracy": 75.0}
    assert glue.score("mrpc", guess, labels) == pytest.approx(pair | {"headline": pair["f1"]})
    assert glue.score("qqp", guess, labels) == pytest.approx(pair | {"headline": 75.0})


def test_mnli_averages_matched_and_mismatched():
    labels, guess, other = [0, 1, 2, 0, 1, 2], [0, 1, 2, 1, 1, 0], [0, 1, 2, 0, 1, 0]
    found = glue.score("mnli", guess, labels, pair=(other, labels))
    assert found["accuracy_matched"] == pytest.approx(100 * accuracy_score(labels, guess))
    assert found["accuracy_mismatched"] == pytest.approx(100 * accuracy_score(labels, other))
    assert found["headline"] == found["accuracy"] == pytest.approx(
        (found["accuracy_matched"] + found["accuracy_mismatched"]) / 2
    )
    assert found["f1"] == pytest.approx(
        50 * (f1_score(labels, guess, average="macro") + f1_score(labels, other, average="macro"))
    )
    assert glue.score("mnli", guess, labels)["headline"] == found["accuracy_matched"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("wnli", [0], [0]), "unknown task 'wnli', allowed: cola, rte, mrpc, sst2, mnli, qnli, qqp"),
        (("rte", [0], [0, 1]), "rte: 1 predictions for 2 labels"),
        (("rte", [], []), "rte: nothing to score"),
        (("rte", [2], [0]), "rte: class 2 is out of range, allowed: 0 to 1"),
        (("rte", [1], [0], ([1], [0])), "rte has no mismatched set, pair is for mnli only"),
    ],
)
def test_score_says_what_is_wrong(arguments, message):
    with pytest.raises(ValueError) as error:
        glue.score(*arguments)
    assert str(error.value) == message


@pytest.mark.parametrize("name", glue.TASKS)
def test_what_is_written_is_read_back(name, tmp_path):
    task = glue.TASKS[name]
    glue.write_task(tmp_path, name, {split: rows_of(name) for split in task.splits})
    read = glue.read_task(tmp_path, name)
    assert tuple(read) == task.splits
    for split, rows in read.items():
        assert rows == rows_of(name, labelled=split not in task.test)
    for split in task.test:  # no label may reach a test file, not even as an empty column
        assert task.label_column not in (tmp_path / f"{split}.tsv").read_text().split("\n")[0].split("\t")
    assert (tmp_path / "test_labels.tsv").read_text().startswith(
        "split\tindex\tlabel\n" + f"{task.test[0]}\t0\t{task.labels[0]}\n"
    )


def test_cola_has_no_header_as_in_glue(tmp_path):
    glue.write_task(tmp_path, "cola", {"train": [{"texts": ("A fine line.",), "label": 1, "index": 0}]})
    assert (tmp_path / "train.tsv").read_text() == "twin\t1\t\tA fine line.\n"


def test_reading_says_what_is_wrong(tmp_path):
    path = tmp_path / "train.tsv"
    with pytest.raises(FileNotFoundError) as error:
        glue.read_task(tmp_path, "rte", ("train",))
    assert str(error.value) == f"{path} is missing"
    for text, message in (
        (
            "index\tsentence1\tlabel\n0\ta\tentailment\n",
            f"{path}: column 'sentence2' is missing, found: index, sentence1, label"
        ),
        (
            "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tmaybe\n",
            f"{path}, line 2: unknown label 'maybe', allowed: entailment, not_entailment"
        ),
        ("", f"{path} is empty, expected a header line"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError) as error:
            glue.read_task(tmp_path, "rte", ("train",))
        assert str(error.value) == message
    with pytest.raises(ValueError) as error:
        glue.read_task(tmp_path, "rte", ("valid",))
    assert str(error.value) == "rte has no split 'valid', allowed: train, dev, test"


def test_broken_lines_are_left_out_of_train_only(tmp_path):
    text = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n0\t-1\t-1\ta\tb\t1\n1\t-1\t-1\tbroken\n"
    for split in ("train", "dev"):
        (tmp_path / f"{split}.tsv").write_text(text)
    with pytest.warns(UserWarning, match="1 incomplete lines left out"):
        assert len(glue.read_task(tmp_path, "qqp", ("train",))["train"]) == 1
    with pytest.raises(ValueError) as error:
        glue.read_task(tmp_path, "qqp", ("dev",))
    assert str(error.value) == f"{tmp_path / 'dev.tsv'}, line 3: 4 columns instead of 6"


def test_a_text_with_a_tab_is_not_written(tmp_path):
    with pytest.raises(ValueError) as error:
        glue.write_task(tmp_path, "sst2", {"train": [{"texts": ("a\tb",), "label": 1, "index": 0}]})
    assert str(error.value) == "train.tsv: tab or line break in the text 'a\\tb'"
    assert not (tmp_path / "train.tsv").exists()


def test_encode_joins_by_end_of_text_and_shortens_the_longer_text():
    def ids(first, second, length):
        row = {"texts": (" ".join(map(str, first)), " ".join(map(str, second))), "label": 1, "index": 0}
        found = glue.encode(Words(), [row], length)
        assert found["attention_mask"] == [[1] * len(found["input_ids"][0])] and found["label"] == [1]
        return found["input_ids"][0]

    assert ids([1, 2], [3], 9) == [1, 2, 0, 3]
    assert ids([1] * 9, [2] * 2, 8) == [1] * 5 + [0] + [2] * 2
    assert ids([1] * 2, [2] * 9, 8) == [1] * 2 + [0] + [2] * 5
    assert ids([1] * 9, [2] * 9, 8) == [1] * 3 + [0] + [2] * 4
    for length in range(3, 12):
        assert len(ids([1] * 9, [2] * 7, length)) == length
    assert glue.encode(Words(), [{"texts": ("1 2 3 4",), "label": None, "index": 0}], 3) == {
        "input_ids": [[1, 2, 3]],
        "attention_mask": [[1] * 3],
        "label": [None],
    }
    with pytest.raises(ValueError, match="max_length is 2, must be at least 3"):
        glue.encode(Words(), [], 2)


@pytest.mark.parametrize("name", glue.TASKS)
def test_predicted_first_and_scored_after(name, tmp_path):
    task = glue.TASKS[name]
    glue.write_task(tmp_path / "data", name, {split: rows_of(name) for split in task.test})
    guess = [i % 2 for i in range(7)]
    paths = glue_submission.write_submission(
        tmp_path / "out", name, dict.fromkeys(task.test, guess) if name == "mnli" else guess
    )
    assert tuple(path.name for path in paths) == task.files
    assert paths[0].read_text().split("\n")[:2] == ["index\tprediction", f"0\t{task.labels[0]}"]
    labels = [row["label"] for row in rows_of(name)]
    assert glue_submission.grade(tmp_path / "out", name, tmp_path / "data") == glue.score(
        name, guess, labels, pair=(guess, labels) if name == "mnli" else None
    )


def test_grading_says_what_is_wrong(tmp_path):
    glue.write_task(tmp_path, "rte", {"test": rows_of("rte", 2)})
    for text, message in (
        ("index\tlabel\n", "the header must be index, prediction, found: index, label"),
        ("index\tprediction\n1\tentailment\n", "line 2: expected index 0 and a label, found '1 entailment'"),
        ("index\tprediction\n0\tyes\n", "line 2: unknown label 'yes', allowed: entailment, not_entailment"),
        ("index\tprediction\n0\tentailment\n", "rte: 1 predictions for 2 labels"),
    ):
        (tmp_path / "RTE.tsv").write_text(text)
        with pytest.raises(ValueError) as error:
            glue_submission.grade(tmp_path, "rte", tmp_path)
        assert str(error.value).endswith(message)
    with pytest.raises(ValueError, match="mnli needs predictions for each of test_matched, test_mismatched"):
        glue_submission.write_submission(tmp_path, "mnli", [0, 1])


def test_the_zip_has_all_eleven_files(tmp_path):
    glue_submission.write_submission(tmp_path, "rte", [1] * 3000)
    target, filled = glue_submission.zip_submission(tmp_path)
    with zipfile.ZipFile(target) as archive:
        assert archive.namelist() == list(glue_submission.SUBMISSION)
        assert archive.read("RTE.tsv").decode().split("\n")[1] == "0\tnot_entailment"
        for name, (lines, _) in glue_submission.SUBMISSION.items():
            text = archive.read(name).decode()
            assert text.startswith("index\tprediction\n0\t") and text.count("\n") == lines + 1
    assert len(glue_submission.SUBMISSION) == 11
    assert filled == [name for name in glue_submission.SUBMISSION if name != "RTE.tsv"]
    first = target.read_bytes()
    assert glue_submission.zip_submission(tmp_path)[0].read_bytes() == first


@pytest.mark.skipif(not REAL.is_dir(), reason="real GLUE files are not beside the repository")
@pytest.mark.parametrize(
    ("name", "split", "count"),
    [("cola", "train", 8551), ("cola", "dev", 1043), ("cola", "test", 1063), ("sst2", "train", 67349),
     ("sst2", "dev", 872), ("mrpc", "train", 3668),
     ("mrpc", "dev", 408), ("mrpc", "test", 1725), ("rte", "train", 2490), ("rte", "dev", 277),
     ("rte", "test", 3000), ("qnli", "dev", 5463),
     ("mnli", "dev_matched", 9815), ("mnli", "test_matched", 9796)],
)
def test_the_real_files_have_their_known_sizes(name, split, count):
    rows = glue.read_task(REAL / name, name, (split,))[split]
    assert len(rows) == count and all(all(row["texts"]) for row in rows)
    assert all((row["label"] is None) == split.startswith("test") for row in rows)


def test_scores_of_the_server_are_read(tmp_path):
    path = tmp_path / "scores.csv"
    path.write_text("row,seed,task,score\nteacher,0,cola,44.0\nteacher,0,rte,63.2\nstudent,1,cola,-1.5\n")
    assert glue_submission.read_scores(path, ("teacher", "student")) == {
        ("teacher", 0): {"cola": 44.0, "rte": 63.2}, ("student", 1): {"cola": -1.5}
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "row,task,score\nteacher,cola,44\n",
            "the columns must be row, seed, task, score, found: row, task, score"
        ),
        ("row,seed,task,score\nteacher,0,cola,much\n", "line 2: seed '0' and score 'much' must be numbers"),
        (
            "row,seed,task,score\ngpt3,0,cola,4\n",
            "line 2: 'gpt3' / 'cola' is unknown, rows are teacher, tasks cola, rte"
        ),
        ("row,seed,task,score\nteacher,0,stsb,4\n", "line 2: 'teacher' / 'stsb' is unknown"),
        ("row,seed,task,score\nteacher,0,cola,400\n", "line 2: score 400.0 is not a percentage"),
        ("row,seed,task,score\n", "holds no scores"),
    ],
)
def test_wrong_scores_are_named(tmp_path, text, message):
    path = tmp_path / "scores.csv"
    path.write_text(text)
    with pytest.raises(ValueError) as caught:
        glue_submission.read_scores(path, ("teacher",))
    assert message in str(caught.value) and "\n" not in str(caught.value)
