"""GLUE's seven tasks as the paper uses them: columns, labels, metrics, reading and writing, the server's submission.

`read_task` and `write_task` speak GLUE's own TSV layout, so the real data and mini's twins go the same way.
Test labels are never part of a test file: `write_task` keeps them aside in test_labels.tsv, where only
`grade` looks, and `grade` reads a submission file that must already be on disk.
"""

from __future__ import annotations

import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path

LABELS_FILE = "test_labels.tsv"  # columns split, index, label; not part of GLUE, whose test labels are hidden


@dataclass(frozen=True)
class Task:
    """One GLUE task: what its files are called, which columns hold texts and label, how it is scored."""

    name: str
    title: str
    texts: tuple[str, ...]  # columns of the one or two texts
    labels: tuple[str, ...]  # as the server wants them; a label's number is its place here
    metrics: tuple[str, ...]  # every metric GLUE defines for the task
    headline: str  # the metric a table shows
    files: tuple[str, ...]  # submission files, one for each test split
    label_column: str = "label"
    train_columns: tuple[str, ...] = ()  # GLUE's columns of train and dev, in order
    test_columns: tuple[str, ...] = ()
    header: bool = True  # CoLA's train and dev have none
    dev: tuple[str, ...] = ("dev",)
    test: tuple[str, ...] = ("test",)

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of all splits, train first."""
        return ("train", *self.dev, *self.test)


_YES_NO = ("0", "1")
_MNLI_TEST = ("index", "promptID", "pairID", "genre", "sentence1_binary_parse", "sentence2_binary_parse",
              "sentence1_parse", "sentence2_parse", "sentence1", "sentence2")  # fmt: skip
_ENTAIL = ("entailment", "not_entailment")
_TASKS = (
    Task("cola", "CoLA", ("sentence",), _YES_NO, ("matthews",), "matthews", ("CoLA.tsv",), "label",
         ("source", "label", "mark", "sentence"), ("index", "sentence"), header=False),
    Task("rte", "RTE", ("sentence1", "sentence2"), _ENTAIL, ("accuracy",), "accuracy", ("RTE.tsv",), "label",
         ("index", "sentence1", "sentence2", "label"), ("index", "sentence1", "sentence2")),
    Task("mrpc", "MRPC", ("#1 String", "#2 String"), _YES_NO, ("f1", "accuracy"), "f1", ("MRPC.tsv",), "Quality",
         ("Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"), ("index", "#1 ID", "#2 ID", "#1 String", "#2 String")),
    Task("sst2", "SST-2", ("sentence",), _YES_NO, ("accuracy",), "accuracy", ("SST-2.tsv",), "label",
         ("sentence", "label"), ("index", "sentence")),
    Task("mnli", "MNLI", ("sentence1", "sentence2"), ("entailment", "neutral", "contradiction"), ("accuracy",), "accuracy",
         ("MNLI-m.tsv", "MNLI-mm.tsv"), "gold_label", (*_MNLI_TEST, "label1", "gold_label"), _MNLI_TEST,
         dev=("dev_matched", "dev_mismatched"), test=("test_matched", "test_mismatched")),
    Task("qnli", "QNLI", ("question", "sentence"), _ENTAIL, ("accuracy",), "accuracy", ("QNLI.tsv",), "label",
         ("index", "question", "sentence", "label"), ("index", "question", "sentence")),
    Task("qqp", "QQP", ("question1", "question2"), _YES_NO, ("f1", "accuracy"), "accuracy", ("QQP.tsv",), "is_duplicate",
         ("id", "qid1", "qid2", "question1", "question2", "is_duplicate"), ("id", "question1", "question2")),
)  # fmt: skip
TASKS: dict[str, Task] = {task.name: task for task in _TASKS}  # the paper's column order

# Every file of a submission: (lines of the real test set, constant for a task that was not predicted)
SUBMISSION = {
    "CoLA.tsv": (1063, "0"), "SST-2.tsv": (1821, "0"), "MRPC.tsv": (1725, "0"), "STS-B.tsv": (1379, "0.0"),
    "MNLI-m.tsv": (9796, "entailment"), "MNLI-mm.tsv": (9847, "entailment"), "QNLI.tsv": (5463, "entailment"),
    "RTE.tsv": (3000, "entailment"), "WNLI.tsv": (146, "0"), "QQP.tsv": (390965, "0"), "AX.tsv": (1104, "entailment"),
}  # fmt: skip


def task_of(name: str) -> Task:
    """The task called `name`; ValueError lists the known names."""
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}, allowed: {', '.join(TASKS)}")
    return TASKS[name]


# ---------------------------------------------------------------- files


def _cells(path: Path) -> list[list[str]]:
    """A TSV's lines as cells: no quoting, lines end at '\\n' only (texts may hold other line-break characters)."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text (byte {error.start}): it is damaged, or of another encoding") from None
    lines = text.removeprefix("\ufeff").split("\n")
    return [line.removesuffix("\r").split("\t") for line in lines if line.strip("\r")]


def _lines(path: Path, rows: list[tuple]) -> None:
    """Writes tuples as tab-separated lines; ValueError for a cell that would break the layout."""
    for row in rows:
        if bad := next((str(cell) for cell in row if "\t" in str(cell) or "\n" in str(cell)), None):
            raise ValueError(f"{path.name}: tab or line break in the text {bad!r}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join("\t".join(map(str, row)) + "\n" for row in rows).encode("utf-8"))


def _label(task: Task, value: str, path: Path, number: int) -> int:
    if value not in task.labels:
        raise ValueError(f"{path}, line {number}: unknown label {value!r}, allowed: {', '.join(task.labels)}")
    return task.labels.index(value)


def read_split(path: Path | str, name: str, split: str) -> list[dict]:
    """Rows {"texts", "label" (None in a test file), "index"} of one TSV; ValueError names file, line and value."""
    task, path = task_of(name), Path(path)
    lines, hidden = _cells(path), split in task.test
    if hidden or task.header:
        if not lines:
            raise ValueError(f"{path} is empty, expected a header line")
        columns, first = lines[0], 1
    else:
        columns, first = list(task.train_columns), 0
    wanted = [*task.texts, *([] if hidden else [task.label_column])]
    if missing := [column for column in wanted if column not in columns]:
        raise ValueError(f"{path}: column {missing[0]!r} is missing, found: {', '.join(columns)}")
    rows: list[dict] = []
    places, incomplete = [columns.index(column) for column in wanted], 0
    for number, cells in enumerate(lines[first:], start=first + 1):
        if len(cells) <= max(places):
            if split != "train":
                raise ValueError(f"{path}, line {number}: {len(cells)} columns instead of {len(columns)}")
            incomplete += 1  # GLUE's own QQP train file holds a few broken lines
            continue
        values = [cells[place] for place in places]
        label = None if hidden else _label(task, values[-1], path, number)
        rows.append({"texts": tuple(values[: len(task.texts)]), "label": label, "index": len(rows)})
    if incomplete:
        warnings.warn(f"{path}: {incomplete} incomplete lines left out", stacklevel=2)
    return rows


def read_task(folder: Path | str, name: str, splits: tuple[str, ...] | None = None) -> dict[str, list[dict]]:
    """All splits (or those named) of the task whose TSVs lie in `folder`, as lists of rows; ValueError for a split it does not have."""
    task = task_of(name)
    if unknown := [split for split in splits or () if split not in task.splits]:
        raise ValueError(f"{name} has no split {unknown[0]!r}, allowed: {', '.join(task.splits)}")
    return {split: read_split(Path(folder) / f"{split}.tsv", name, split) for split in splits or task.splits}


def write_task(folder: Path | str, name: str, splits: dict[str, list[dict]]) -> None:
    """Writes GLUE's layout into `folder`; test files carry no labels, those go to test_labels.tsv. ValueError for a split it does not have, or a row without a label."""
    kept: list[tuple] = [("split", "index", "label")]
    task, folder = task_of(name), Path(folder)
    for split, rows in splits.items():
        if split not in task.splits:
            raise ValueError(f"{name} has no split {split!r}, allowed: {', '.join(task.splits)}")
        hidden = split in task.test
        columns = task.test_columns if hidden else task.train_columns
        lines = [columns] if hidden or task.header else []
        for index, row in enumerate(rows):
            known = dict(zip(task.texts, row["texts"], strict=True)) | {"index": index, "id": index, "source": "twin"}
            if row["label"] is not None:
                label = task.labels[row["label"]]
                if hidden:
                    kept.append((split, index, label))
                else:
                    known |= {task.label_column: label, "label1": label} if name == "mnli" else {task.label_column: label}
            elif not hidden:
                raise ValueError(f"{name} {split}, row {index}: a row without a label")
            lines.append(tuple(known.get(column, "") for column in columns))
        _lines(folder / f"{split}.tsv", lines)
    if len(kept) > 1:
        _lines(folder / LABELS_FILE, kept)


# ---------------------------------------------------------------- model input


def _shares(first: int, second: int, room: int) -> tuple[int, int]:
    """How many tokens each text keeps when both must fit into `room`: the longer one gives way first."""
    if first + second <= room:
        return first, second
    short = min(first, second, room // 2)
    return (short, min(second, room - short)) if first <= second else (min(first, room - short), short)


def encode(tokenizer, rows: list[dict], max_length: int) -> dict[str, list]:
    """input_ids, attention_mask (lists of at most max_length tokens, unpadded) and label; two texts are joined by the end-of-text token. ValueError for a max_length below 3."""
    if max_length < 3:
        raise ValueError(f"max_length is {max_length}, must be at least 3: a token of each text and the one between")
    ids = []
    if rows:
        columns = [tokenizer(list(texts), add_special_tokens=False)["input_ids"] for texts in zip(*(row["texts"] for row in rows), strict=True)]
        if len(columns) == 1:
            ids = [text[:max_length] for text in columns[0]]
        else:
            for a, b in zip(*columns, strict=True):
                keep_a, keep_b = _shares(len(a), len(b), max_length - 1)
                ids.append([*a[:keep_a], tokenizer.eos_token_id, *b[:keep_b]])
    return {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids], "label": [row["label"] for row in rows]}


# ---------------------------------------------------------------- scores


def _checked(task: Task, predictions, labels) -> tuple[list[int], list[int]]:
    predictions, labels = [int(p) for p in predictions], [int(y) for y in labels]
    if len(predictions) != len(labels):
        raise ValueError(f"{task.name}: {len(predictions)} predictions for {len(labels)} labels")
    if not labels:
        raise ValueError(f"{task.name}: nothing to score")
    if bad := [value for value in (*predictions, *labels) if not 0 <= value < len(task.labels)]:
        raise ValueError(f"{task.name}: class {bad[0]} is out of range, allowed: 0 to {len(task.labels) - 1}")
    return predictions, labels


def score(name: str, predictions, labels, pair=None) -> dict[str, float]:
    """GLUE's metrics in percent with "headline", from class numbers; `pair` = (predictions, labels) of MNLI's mismatched set. ValueError for classes out of range, or a pair for another task."""
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    task = task_of(name)
    predictions, labels = _checked(task, predictions, labels)
    if name == "mnli":  # Table 7 says "f1": macro F1 over the three classes
        sets = {"matched": (predictions, labels)}
        if pair is not None:
            sets["mismatched"] = _checked(task, *pair)
        found = {f"accuracy_{key}": 100 * accuracy_score(y, p) for key, (p, y) in sets.items()}
        found |= {f"f1_{key}": 100 * f1_score(y, p, average="macro", labels=[0, 1, 2], zero_division=0) for key, (p, y) in sets.items()}
        found |= {metric: sum(found[f"{metric}_{key}"] for key in sets) / len(sets) for metric in ("accuracy", "f1")}
    else:
        if pair is not None:
            raise ValueError(f"{name} has no mismatched set, pair is for mnli only")
        found = {
            "matthews": lambda: {"matthews": 100 * matthews_corrcoef(labels, predictions)},
            "accuracy": lambda: {"accuracy": 100 * accuracy_score(labels, predictions)},
            "f1": lambda: {"f1": 100 * f1_score(labels, predictions, zero_division=0)},
        }
        found = {key: value for metric in task.metrics for key, value in found[metric]().items()}
    found = {key: float(value) for key, value in found.items()}
    return found | {"headline": found[task.headline]}


# ---------------------------------------------------------------- submission


def write_submission(folder: Path | str, name: str, predictions) -> list[Path]:
    """Writes the server's TSV (index, prediction as label name) from class numbers; for mnli `predictions` is {test split: numbers}. ValueError for classes out of range or a missing split."""
    task, written = task_of(name), []
    if len(task.test) == 1:
        predictions = {task.test[0]: predictions}
    elif not isinstance(predictions, dict) or set(predictions) != set(task.test):
        raise ValueError(f"{name} needs predictions for each of {', '.join(task.test)}")
    for split, file in zip(task.test, task.files, strict=True):
        numbers = [int(p) for p in predictions[split]]
        if bad := [p for p in numbers if not 0 <= p < len(task.labels)]:
            raise ValueError(f"{name}: class {bad[0]} is out of range, allowed: 0 to {len(task.labels) - 1}")
        _lines(Path(folder) / file, [("index", "prediction"), *((i, task.labels[p]) for i, p in enumerate(numbers))])
        written.append(Path(folder) / file)
    return written


def zip_submission(folder: Path | str) -> tuple[Path, list[str]]:
    """(path of submission.zip with all eleven GLUE files, names of those filled with a constant because `folder` lacks them)."""
    folder, filled = Path(folder), []
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / "submission.zip"
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for file, (lines, constant) in SUBMISSION.items():
            if (folder / file).is_file():
                text = (folder / file).read_text(encoding="utf-8")
            else:
                text = "index\tprediction\n" + "".join(f"{i}\t{constant}\n" for i in range(lines))
                filled.append(file)
            archive.writestr(zipfile.ZipInfo(file, (1980, 1, 1, 0, 0, 0)), text, zipfile.ZIP_DEFLATED)  # fixed date: same predictions, same bytes
    return target, filled


def read_submission(path: Path | str, name: str) -> list[int]:
    """Class numbers of one submission file, ordered by index; ValueError names the line and the value."""
    task, path = task_of(name), Path(path)
    lines = _cells(path)
    if not lines or lines[0] != ["index", "prediction"]:
        raise ValueError(f"{path}: the header must be index, prediction, found: {', '.join(lines[0]) if lines else 'nothing'}")
    found = []
    for number, cells in enumerate(lines[1:], start=2):
        if len(cells) != 2 or cells[0] != str(number - 2):
            raise ValueError(f"{path}, line {number}: expected index {number - 2} and a label, found {' '.join(cells)!r}")
        found.append(_label(task, cells[1], path, number))
    return found


def grade(submission: Path | str, name: str, folder: Path | str) -> dict[str, float]:
    """Scores the submission files in `submission` against test_labels.tsv in `folder`, after the fact; ValueError names a line that is wrong."""
    task, path = task_of(name), Path(folder) / LABELS_FILE
    labels: dict[str, list[int]] = {split: [] for split in task.test}
    for number, cells in enumerate(_cells(path)[1:], start=2):
        if len(cells) != 3 or cells[0] not in labels:
            raise ValueError(f"{path}, line {number}: expected split, index and label, found {' '.join(cells)!r}")
        labels[cells[0]].append(_label(task, cells[2], path, number))
    pairs = [(read_submission(Path(submission) / file, name), labels[split]) for split, file in zip(task.test, task.files, strict=True)]
    return score(name, *pairs[0], pair=pairs[1] if len(pairs) > 1 else None)


def read_scores(path: Path | str, rows: tuple[str, ...]) -> dict[tuple[str, int], dict[str, float]]:
    """Scores the GLUE server gave, from a CSV with the columns row, seed, task, score (percent): {(row, seed): {task: score}}; ValueError names what is wrong."""
    import csv

    found: dict[tuple[str, int], dict[str, float]] = {}
    path = Path(path)
    try:
        lines = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read ({getattr(error, 'strerror', None) or 'it is no CSV in UTF-8'})") from None
    for number, line in enumerate(lines, start=2):
        if set(line) != {"row", "seed", "task", "score"}:
            raise ValueError(f"{path}: the columns must be row, seed, task, score, found: {', '.join(map(str, line))}")
        try:
            seed, value = int(line["seed"]), float(line["score"])
        except (TypeError, ValueError):
            raise ValueError(f"{path}, line {number}: seed {line['seed']!r} and score {line['score']!r} must be numbers") from None
        if line["row"] not in rows or line["task"] not in TASKS:
            raise ValueError(f"{path}, line {number}: {line['row']!r} / {line['task']!r} is unknown, rows are {', '.join(rows)}, tasks {', '.join(TASKS)}")
        if not -100 <= value <= 100:
            raise ValueError(f"{path}, line {number}: score {value} is not a percentage")
        if line["task"] in found.setdefault((line["row"], seed), {}):
            raise ValueError(f"{path}, line {number}: {line['row']} / {line['task']} of seed {seed} is there twice")
        found[line["row"], seed][line["task"]] = value
    if not found:
        raise ValueError(f"{path} holds no scores")
    return found
