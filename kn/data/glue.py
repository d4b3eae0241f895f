"""GLUE's seven tasks as the paper uses them: columns, labels, TSV files, model input, metrics.

Real data and mini's twins have GLUE's own TSV layout; only `glue_submission.grade` reads the test labels."""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from kn.data.documentation import PLAIN_TEXT

LABELS_FILE = "test_labels.tsv"  # columns split, index, label; not part of GLUE, whose test labels are hidden


@dataclass(frozen=True)
class Task:
    """One GLUE task: its files, its columns of texts and label, its metrics."""

    name: str
    title: str
    texts: tuple[str, ...]  # columns of the one or two texts
    labels: tuple[str, ...]  # names as the server expects them; a label's number is its index here
    metrics: tuple[str, ...]  # every metric GLUE defines for the task
    headline: str  # the metric a table shows
    files: tuple[str, ...]  # submission files, one for each test split
    label_column: str
    train_columns: tuple[str, ...]  # GLUE's columns of train and dev, in order
    test_columns: tuple[str, ...]
    header: bool = True  # CoLA's train and dev have none
    dev: tuple[str, ...] = ("dev",)
    test: tuple[str, ...] = ("test",)

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of all splits, train first."""
        return ("train", *self.dev, *self.test)


_YES_NO = ("0", "1")
_ENTAIL = ("entailment", "not_entailment")
_SENTENCES, _QUESTIONS = ("sentence1", "sentence2"), ("question1", "question2")
_STRINGS = ("#1 String", "#2 String")
_MNLI_TEST = ("index", "promptID", "pairID", "genre", "sentence1_binary_parse", "sentence2_binary_parse",
              "sentence1_parse", "sentence2_parse", "sentence1", "sentence2")
TASKS: dict[str, Task] = {task.name: task for task in (  # in the paper's column order
    Task("cola", "CoLA", ("sentence",), _YES_NO, ("matthews",), "matthews", ("CoLA.tsv",), "label",
         ("source", "label", "mark", "sentence"), ("index", "sentence"), header=False),
    Task("rte", "RTE", _SENTENCES, _ENTAIL, ("accuracy",), "accuracy", ("RTE.tsv",), "label",
         ("index", *_SENTENCES, "label"), ("index", *_SENTENCES)),
    Task("mrpc", "MRPC", _STRINGS, _YES_NO, ("f1", "accuracy"), "f1", ("MRPC.tsv",), "Quality",
         ("Quality", "#1 ID", "#2 ID", *_STRINGS), ("index", "#1 ID", "#2 ID", *_STRINGS)),
    Task("sst2", "SST-2", ("sentence",), _YES_NO, ("accuracy",), "accuracy", ("SST-2.tsv",), "label",
         ("sentence", "label"), ("index", "sentence")),
    Task("mnli", "MNLI", _SENTENCES, ("entailment", "neutral", "contradiction"), ("accuracy",), "accuracy",
         ("MNLI-m.tsv", "MNLI-mm.tsv"), "gold_label", (*_MNLI_TEST, "label1", "gold_label"), _MNLI_TEST,
         dev=("dev_matched", "dev_mismatched"), test=("test_matched", "test_mismatched")),
    Task("qnli", "QNLI", ("question", "sentence"), _ENTAIL, ("accuracy",), "accuracy", ("QNLI.tsv",), "label",
         ("index", "question", "sentence", "label"), ("index", "question", "sentence")),
    Task("qqp", "QQP", _QUESTIONS, _YES_NO, ("f1", "accuracy"), "accuracy", ("QQP.tsv",), "is_duplicate",
         ("id", "qid1", "qid2", *_QUESTIONS, "is_duplicate"), ("id", *_QUESTIONS)),
)}


def task_of(name: str, splits: Iterable[str] = ()) -> Task:
    """The task called `name`; ValueError for an unknown one, or an unknown split of it."""
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}, allowed: {', '.join(TASKS)}")
    task = TASKS[name]
    if unknown := [split for split in splits if split not in task.splits]:
        raise ValueError(f"{name} has no split {unknown[0]!r}, allowed: {', '.join(task.splits)}")
    return task


def read_cells(path: Path) -> list[list[str]]:
    """A TSV's lines (ended by "\\n" alone) as cells; FileNotFoundError, or ValueError if not UTF-8."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        problem = f"{path} is no UTF-8 text (byte {error.start})"
        raise ValueError(f"{problem}: it is damaged, or of another encoding") from None
    lines = text.removeprefix("\ufeff").split("\n")
    return [line.removesuffix("\r").split("\t") for line in lines if line.strip("\r")]


def write_cells(path: Path, rows: list[tuple]) -> None:
    """Write tuples as tab-separated lines; ValueError for a cell that would break the layout."""
    for row in rows:
        if bad := next((str(cell) for cell in row if "\t" in str(cell) or "\n" in str(cell)), None):
            raise ValueError(f"{path.name}: tab or line break in the text {bad!r}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join("\t".join(map(str, row)) + "\n" for row in rows).encode("utf-8"))


def label_number(task: Task, value: str, path: Path, number: int) -> int:
    """Class number of a label's name; ValueError names the file and its line `number`."""
    if value not in task.labels:
        raise ValueError(f"{path}, line {number}: unknown label {value!r}, allowed: {', '.join(task.labels)}")
    return task.labels.index(value)


def read_split(path: Path | str, name: str, split: str) -> list[dict]:
    """Rows {"texts", "label" (None in a test file), "index"} of a TSV; ValueError names file, line, value."""
    task, path = task_of(name), Path(path)
    lines, hidden = read_cells(path), split in task.test
    has_header = hidden or task.header
    if has_header and not lines:
        raise ValueError(f"{path} is empty, expected a header line")
    columns = lines.pop(0) if has_header else list(task.train_columns)
    needed = [*task.texts, *([] if hidden else [task.label_column])]
    if missing := [column for column in needed if column not in columns]:
        raise ValueError(f"{path}: column {missing[0]!r} is missing, found: {', '.join(columns)}")
    rows: list[dict] = []
    places, incomplete = [columns.index(column) for column in needed], 0
    for number, cells in enumerate(lines, start=1 + has_header):
        if len(cells) <= max(places):
            if split != "train":
                raise ValueError(f"{path}, line {number}: {len(cells)} columns instead of {len(columns)}")
            incomplete += 1  # GLUE's own QQP train file holds a few broken lines
            continue
        values = [cells[place] for place in places]
        label = None if hidden else label_number(task, values[-1], path, number)
        rows.append({"texts": tuple(values[: len(task.texts)]), "label": label, "index": len(rows)})
    if incomplete:
        warnings.warn(f"{path}: {incomplete} incomplete lines left out", stacklevel=2)
    return rows


def read_task(folder: Path | str, name: str, splits: tuple[str, ...] | None = None) -> dict[str, list[dict]]:
    """{split: rows} of a task from its TSVs in `folder`, by default all; ValueError for an unknown split."""
    splits = splits or task_of(name).splits
    task_of(name, splits)
    return {split: read_split(Path(folder) / f"{split}.tsv", name, split) for split in splits}


def write_task(folder: Path | str, name: str, splits: dict[str, list[dict]]) -> None:
    """Write {split: rows} as TSVs, test labels into test_labels.tsv; ValueError for a missing label."""
    test_labels: list[tuple] = [("split", "index", "label")]
    task, folder = task_of(name, splits), Path(folder)
    for split, rows in splits.items():
        hidden = split in task.test
        columns = task.test_columns if hidden else task.train_columns
        lines = [columns] if hidden or task.header else []
        for index, row in enumerate(rows):
            texts = dict(zip(task.texts, row["texts"], strict=True))
            cells = {**texts, "index": index, "id": index, "source": "twin"}
            label = None if row["label"] is None else task.labels[row["label"]]
            if label is None and not hidden:
                raise ValueError(f"{name} {split}, row {index}: a row without a label")
            if label is not None and hidden:
                test_labels.append((split, index, label))
            elif label is not None:
                cells |= {task.label_column: label, **({"label1": label} if name == "mnli" else {})}
            lines.append(tuple(cells.get(column, "") for column in columns))
        write_cells(folder / f"{split}.tsv", lines)
    if len(test_labels) > 1:
        write_cells(folder / LABELS_FILE, test_labels)


def _kept_lengths(first: int, second: int, budget: int) -> tuple[int, int]:
    """How many tokens each text keeps when both must fit into `budget`: the longer one is truncated first."""
    if first + second <= budget:
        return first, second
    short = min(first, second, budget // 2)
    return (short, min(second, budget - short)) if first <= second else (min(first, budget - short), short)


def encode(tokenizer, rows: list[dict], max_length: int) -> dict[str, list]:
    """{"input_ids", "attention_mask", "label"}: lists of at most max_length tokens, unpadded.

    Two texts are joined by the end-of-text token; an empty one is a blank, as classifiers read the last
    token that is no padding. Raises ValueError for a max_length below 3."""
    if max_length < 3:
        reason = "a token of each text and the one between"
        raise ValueError(f"max_length is {max_length}, must be at least 3: {reason}")
    columns = zip(*(row["texts"] for row in rows), strict=True)
    tokenized = [tokenizer([text or " " for text in texts], **PLAIN_TEXT)["input_ids"] for texts in columns]
    ids, *second = tokenized or [[]]
    if second:
        pairs, ids = zip(ids, *second, strict=True), []
        for a, b in pairs:
            keep_a, keep_b = _kept_lengths(len(a), len(b), max_length - 1)
            ids.append([*a[:keep_a], tokenizer.eos_token_id, *b[:keep_b]])
    ids = [row[:max_length] for row in ids]
    labels = [row["label"] for row in rows]
    return {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids], "label": labels}


def class_numbers(task: Task, values) -> list[int]:
    """Values as class numbers; ValueError for one that the task does not have."""
    numbers = list(map(int, values))
    if bad := [number for number in numbers if not 0 <= number < len(task.labels)]:
        raise ValueError(f"{task.name}: class {bad[0]} is out of range, allowed: 0 to {len(task.labels) - 1}")
    return numbers


def score(name: str, predictions, labels, pair=None) -> dict[str, float]:
    """GLUE's metrics in percent and "headline", the one that tables show, from class numbers.

    `pair` = (predictions, labels) of MNLI's mismatched set. Raises ValueError for classes out of range, or a
    pair for another task."""
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
    task, sets = task_of(name), {"matched": (predictions, labels)}
    if pair is not None:
        sets["mismatched"] = pair
        if name != "mnli":
            raise ValueError(f"{name} has no mismatched set, pair is for mnli only")
    for key, both in sets.items():
        predictions, labels = (class_numbers(task, values) for values in both)
        sets[key] = predictions, labels
        if len(predictions) != len(labels):
            raise ValueError(f"{name}: {len(predictions)} predictions for {len(labels)} labels")
        if not labels:
            raise ValueError(f"{name}: nothing to score")
    if name == "mnli":  # Table 7 says "f1": macro F1 over the three classes
        scores = {f"accuracy_{key}": 100 * accuracy_score(y, p) for key, (p, y) in sets.items()}
        options = {"average": "macro", "labels": [0, 1, 2], "zero_division": 0}
        scores |= {f"f1_{key}": 100 * f1_score(y, p, **options) for key, (p, y) in sets.items()}
        for metric in ("accuracy", "f1"):
            scores[metric] = sum(scores[f"{metric}_{key}"] for key in sets) / len(sets)
    else:
        metrics = {"matthews": lambda: matthews_corrcoef(labels, predictions),
                   "accuracy": lambda: accuracy_score(labels, predictions),
                   "f1": lambda: f1_score(labels, predictions, zero_division=0)}
        scores = {metric: 100 * metrics[metric]() for metric in task.metrics}
    scores = {key: float(value) for key, value in scores.items()}
    return scores | {"headline": scores[task.headline]}
