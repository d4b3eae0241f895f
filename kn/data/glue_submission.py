"""GLUE's test sets: submission files for the server, and scores, our own or the server's."""

import csv
import zipfile
from pathlib import Path

from kn.data import glue
from kn.data.glue import LABELS_FILE, TASKS, task_of

# Every file of a submission: (lines of the real test set, constant for a task that was not predicted)
SUBMISSION = {
    "CoLA.tsv": (1063, "0"), "SST-2.tsv": (1821, "0"), "MRPC.tsv": (1725, "0"), "STS-B.tsv": (1379, "0.0"),
    "MNLI-m.tsv": (9796, "entailment"), "MNLI-mm.tsv": (9847, "entailment"), "QNLI.tsv": (5463, "entailment"),
    "RTE.tsv": (3000, "entailment"), "WNLI.tsv": (146, "0"), "QQP.tsv": (390965, "0"),
    "AX.tsv": (1104, "entailment"),
}


def write_submission(folder: Path | str, name: str, predictions) -> list[Path]:
    """Write the server's TSVs from class numbers (mnli: {test split: numbers}); ValueError for wrong ones."""
    task, written = task_of(name), []
    if len(task.test) == 1:
        predictions = {task.test[0]: predictions}
    elif not isinstance(predictions, dict) or set(predictions) != set(task.test):
        raise ValueError(f"{name} needs predictions for each of {', '.join(task.test)}")
    for split, file in zip(task.test, task.files, strict=True):
        numbers = glue.class_numbers(task, predictions[split])
        lines = [("index", "prediction"), *((i, task.labels[p]) for i, p in enumerate(numbers))]
        glue.write_cells(Path(folder) / file, lines)
        written.append(Path(folder) / file)
    return written


def zip_submission(folder: Path | str) -> tuple[Path, list[str]]:
    """(submission.zip with all eleven GLUE files, those that `folder` lacks: a constant fills them)."""
    folder, target, filled = Path(folder), Path(folder) / "submission.zip", []
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for file, (lines, constant) in SUBMISSION.items():
            if (folder / file).is_file():
                text = (folder / file).read_text(encoding="utf-8")
            else:
                text = "index\tprediction\n" + "".join(f"{i}\t{constant}\n" for i in range(lines))
                filled.append(file)
            entry = zipfile.ZipInfo(file, (1980, 1, 1, 0, 0, 0))  # fixed date: same predictions, same bytes
            archive.writestr(entry, text, zipfile.ZIP_DEFLATED)
    return target, filled


def read_submission(path: Path | str, name: str) -> list[int]:
    """Class numbers of one submission file, ordered by index; ValueError names the line and the value."""
    task, path = task_of(name), Path(path)
    header, *lines = glue.read_cells(path) or [["nothing"]]
    if header != ["index", "prediction"]:
        raise ValueError(f"{path}: the header must be index, prediction, found: {', '.join(header)}")
    numbers = []
    for number, cells in enumerate(lines, start=2):
        if len(cells) != 2 or cells[0] != str(number - 2):
            expected = f"expected index {number - 2} and a label"
            raise ValueError(f"{path}, line {number}: {expected}, found {' '.join(cells)!r}")
        numbers.append(glue.label_number(task, cells[1], path, number))
    return numbers


def grade(submission: Path | str, name: str, folder: Path | str) -> dict[str, float]:
    """Score the files in `submission` against test_labels.tsv in `folder`; ValueError names a wrong line."""
    task, path = task_of(name), Path(folder) / LABELS_FILE
    labels: dict[str, list[int]] = {split: [] for split in task.test}
    for number, cells in enumerate(glue.read_cells(path)[1:], start=2):
        if len(cells) != 3 or cells[0] not in labels:
            expected = "expected split, index and label"
            raise ValueError(f"{path}, line {number}: {expected}, found {' '.join(cells)!r}")
        labels[cells[0]].append(glue.label_number(task, cells[2], path, number))
    answers = [read_submission(Path(submission) / file, name) for file in task.files]
    first, *mismatched = zip(answers, labels.values(), strict=True)
    return glue.score(name, *first, *mismatched)


def read_scores(path: Path | str, rows: tuple[str, ...]) -> dict[tuple[str, int], dict[str, float]]:
    """The GLUE server's scores {(row, seed): {task: percent}} from a CSV; ValueError names the wrong line."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig").splitlines()  # a spreadsheet puts a mark first
        filled = {number: line for number, line in enumerate(text, start=1) if line.strip(",;\t ")}
        delimiter = next((sign for sign in ";\t" if sign in next(iter(filled.values()), "")), ",")
        lines = list(csv.DictReader(filled.values(), delimiter=delimiter, skipinitialspace=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or "it is no CSV in UTF-8"
        raise ValueError(f"{path} cannot be read ({reason})") from None
    scores: dict[tuple[str, int], dict[str, float]] = {}
    for number, line in zip([*filled][1:], lines, strict=False):
        place = f"{path}, line {number}"
        if set(line) != {"row", "seed", "task", "score"}:
            found = ", ".join(map(str, line))
            raise ValueError(f"{path}: the columns must be row, seed, task, score, found: {found}")
        row, task = line["row"], line["task"]
        try:
            seed, value = int(line["seed"]), float(line["score"].replace(",", "."))
        except (TypeError, ValueError, AttributeError):
            found = f"seed {line['seed']!r} and score {line['score']!r}"
            raise ValueError(f"{place}: {found} must be numbers") from None
        if row not in rows or task not in TASKS:
            allowed = f"rows are {', '.join(rows)}, tasks {', '.join(TASKS)}"
            raise ValueError(f"{place}: {row!r} / {task!r} is unknown, {allowed}")
        if not -100 <= value <= 100:
            raise ValueError(f"{place}: score {value} is not a percentage")
        if task in scores.setdefault((row, seed), {}):
            raise ValueError(f"{place}: {row} / {task} of seed {seed} is there twice")
        scores[row, seed][task] = value
    if not scores:
        raise ValueError(f"{path} holds no scores")
    return scores
