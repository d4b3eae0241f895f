"""The seven tables of the paper, made from finished stages: a line per cell, the printed value beside ours.

    table(4, records, "mini")             paper, ours, sd, n, delta, verdict, unit, stage
    average(records, "student", "dev")    mean over the GLUE tasks, per seed
    informative(records)                  the tasks on which the teacher really beats the simple baselines

A record is {"stage", "fields", "metrics", "path", "provenance"}; scores are percentages, perplexities plain numbers.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from kn.paper import number_of, printed, value_of
from kn.report.statistics import Values

if TYPE_CHECKING:
    import pandas

SEED_COLUMNS = ["table", "row", "column", "metric", "unit", "verdict", "seed", "value", "stage"]
COLUMNS = ["table", "row", "column", "metric", "paper", "ours", "sd", "n", "delta", "verdict", "unit", "stage"]
TASKS = {"cola": "CoLA", "rte": "RTE", "mrpc": "MRPC", "sst2": "SST-2", "mnli": "MNLI", "qnli": "QNLI", "qqp": "QQP"}
MODELS = {"teacher": "GPT-2 Small", "baseline": "DistilGPT2", "student": "KnGPT2"}
GLUE_ROWS = {**MODELS, "baseline_kd": "DistilGPT2 + KD", "student_ilkd": "KnGPT2 + ILKD"}
GLUE_ROWS = {key: GLUE_ROWS[key] for key in ("teacher", "baseline", "baseline_kd", "student", "student_ilkd")}  # the paper's order
ABLATION = {"none": "KnGPT2", "lm": "KnGPT2 + LM", "kd": "KnGPT2 + KD", "lm_kd": "KnGPT2 + LM + KD"}
ALPHAS = {"α1": 0, "α2": 1, "α3": 2, "α4": 3}
LEAD = 5.0  # points the teacher must be ahead of the simple baselines for a task to be informative


@dataclass
class Found:
    """A value per seed (None where nothing is drawn; several stages of a seed: the last; a (task, seed) where each is kept) and the paths of the stages it comes from."""

    values: dict[Any, Any] = field(default_factory=dict)
    stages: list[str] = field(default_factory=list)

    def map(self, change: Callable[[Any], Any]) -> Found:
        """The values changed, one by one."""
        return Found({seed: change(value) for seed, value in self.values.items()}, self.stages)

    def mean(self) -> float | None:
        """The mean over seeds; None where there is no value."""
        return statistics.fmean(self.values.values()) if self.values else None


def find(records: Iterable[dict], path: str, stage: str, **fields: object) -> Found:
    """The value at a dotted path of metrics in every record of a stage whose fields match; records without it are passed over. ValueError for a number that is not finite."""
    found = Found()
    for record in records:
        if record["stage"] != stage or any(record["fields"].get(key) != value for key, value in fields.items()):
            continue
        value = record["provenance"] if path.startswith("provenance.") else record["metrics"]
        for key in path.removeprefix("provenance.").split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{record['path']}: {path} is {value}, no number for a table")
        if value is not None:
            found.values[record["fields"].get("seed")] = value
            found.stages.append(record["path"])
    return found


class Sheet:
    """Collects the lines of one table; paper values are looked up by row and column (a table of ours, named by text, has none)."""

    def __init__(self, table: int | str):
        self.table, self.missing = table, "not run"
        self.lines: list[list] = []
        self.by_seed: list[list] = []
        self.paper = {(cell.row, cell.column): cell for cell in printed(table).itertuples()} if isinstance(table, int) else {}

    def add(self, row: str, column: str, found: Found, metric: str = "", unit: str = "", verdict: str = "", paper: Any = ...) -> None:
        """One line: values over seeds as mean and standard deviation, beside the printed one of this row and column, or the one given."""
        cell = self.paper.get((row, column)) if paper is ... else None
        if cell is not None:
            value = value_of(cell.value)
            paper, metric, unit = cell.value if value is None else value, metric or cell.metric, unit or cell.unit
        paper = None if paper is ... else paper
        values = list(found.values.values())
        numeric = bool(values) and all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
        ours, sd, delta = None, None, None
        if numeric:
            ours = values[0] if len(set(values)) == 1 else rounded(statistics.fmean(values))
            sd = rounded(statistics.stdev(values)) if len(values) > 1 else None
            delta = rounded(ours - paper) if isinstance(paper, int | float) else None
            ours = rounded(ours)
        elif values:
            ours = " / ".join(dict.fromkeys(map(str, values)))
        line, verdict = [self.table, row, column, metric, paper, ours, sd, len(values), delta], self.missing if ours is None else verdict or "recorded"
        self.lines.append([*line, verdict, unit, ";".join(dict.fromkeys(found.stages))])
        made = dict(zip(found.values, found.stages, strict=True)) if len(found.stages) == len(values) else {}  # a cell of several stages a seed names them in the table
        self.by_seed += [[self.table, row, column, metric, unit, verdict, seed, value, made.get(seed, "")] for seed, value in found.values.items() if numeric and not isinstance(seed, tuple)]

    def frame(self) -> pandas.DataFrame:
        """The table, a line per cell (COLUMNS)."""
        import pandas

        return pandas.DataFrame(self.lines, columns=COLUMNS).astype({"paper": object, "ours": object, "sd": float, "delta": float})

    def seeds(self) -> pandas.DataFrame:
        """A line per number and seed, not rounded: what means, deviations and intervals are made of. The seed is empty where nothing is drawn."""
        import pandas

        return pandas.DataFrame(self.by_seed, columns=SEED_COLUMNS).astype({"table": str, "seed": "Int64", "value": float})


def rounded(value: float) -> int | float:
    """Six digits, as tables show them; whole numbers as they are."""
    return value if isinstance(value, int) else float(f"{value:.6g}")


def sheet_of(number: int, records: list[dict], profile_name: str) -> Sheet:
    """The filled sheet of one of Tables 1-7; ValueError for another number."""
    sheet = Sheet(number)
    makers = [_configuration, _hyperparameters, _cost, _perplexity, _glue, _glue, _ablation]
    makers[number - 1](sheet, records, profile_name)
    return sheet


def table(number: int, records: list[dict], profile_name: str) -> pandas.DataFrame:
    """One of Tables 1-7, a line per cell, rows and names in the paper's order; TypeError for what is no number, ValueError for another number."""
    if not isinstance(number, int) or isinstance(number, bool):
        raise TypeError(f"table {number!r} does not exist, allowed: 1-7")
    if not isinstance(records, list | tuple) or not all(isinstance(record, dict) and {"stage", "fields", "metrics", "path", "provenance"} <= set(record) for record in records):
        raise TypeError("records must be a list of what Store.record gives: stage, fields, metrics, path and provenance")
    try:
        return sheet_of(number, records, profile_name).frame()
    except (KeyError, AttributeError, TypeError, IndexError, OverflowError, ZeroDivisionError) as error:
        raise ValueError(f"table {number}: metrics are not as their stage writes them ({type(error).__name__}: {str(error)[:80]})") from None


def _configuration(sheet: Sheet, records: list[dict], profile: str) -> None:
    columns = {"embedding": "Embedding", "qkv": "Q, K, V", "ffn": "FFN", "out_proj": "Output projection"}
    counts = {"parameters.without_head": "Parameters without the output embedding", "parameters.total": "Parameters"}
    for size, suffix in {"paper_size": "", "mini_size": f", {profile} size"}.items():
        if suffix and (profile == "paper" or not find(records, size, "shapes").values):
            continue
        for name in MODELS.values():
            built = find(records, f"{size}.{name}", "shapes")
            for key, column in columns.items():
                cell, shape = sheet.paper.get((name + suffix, column)), _inside(built, key)
                verdict = _shape_verdict(shape, cell) if cell is not None else ""
                sheet.add(name + suffix, column, shape, metric="shape", verdict=verdict)
            for key, column in counts.items():
                sheet.add(name + suffix, column, _inside(built, key), metric="count")


def _inside(found: Found, path: str) -> Found:
    """The values one level further down, for example one model's embedding shape."""
    result = Found({}, found.stages)
    for seed, value in found.values.items():
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            result.values[seed] = value
    return result if result.values else Found()


def _shape_verdict(shape: Found, cell: Any) -> str:
    """Compares the sizes alone: A 384×768 and A : 384× 768 are the same shape."""
    sizes = {tuple(re.findall(r"\d+", value)) for value in shape.values.values()}
    slip = re.match(r"erratum: (\d+) stands for (\d+)", cell.note)
    if sizes == {tuple(re.findall(r"\d+", cell.value))}:
        return "as printed"
    if slip and sizes == {tuple(re.findall(r"\d+", cell.value.replace(*slip.groups())))}:
        return "erratum"
    return "differs"


def _hyperparameters(sheet: Sheet, records: list[dict], profile: str) -> None:
    rows = {
        "Pre-training": find(records, "hyper", "pretrain", on="web", objective="lm_kd"),
        "Fine-tuning": _each(records, "hyper", "finetune_glue", row="student_ilkd"),
        "Fine-tuning on WikiText-103": find(records, "hyper", "finetune_lm", model="student"),
    }
    extra = dict.fromkeys(key for found in rows.values() for hyper in found.values.values() for key in hyper)
    names = {"batch_size": "Batch size", "learning_rate": "Learning rate"}
    for row, found in rows.items():
        settings = {column: _inside(found, key) for key, column in names.items()}
        settings |= {column: _inside(found, "alphas").map(itemgetter(at)) for column, at in ALPHAS.items()}
        settings |= {key.replace("_", " ").capitalize(): _inside(found, key) for key in extra if key not in (*names, "alphas")}
        for column, values in settings.items():
            cell = sheet.paper.get((row, column))
            values = _distinct(values)
            if not values.values and cell is None:
                continue
            same = cell is not None and all(isinstance(v, int | float) and math.isclose(v, float(cell.value)) for v in values.values.values())
            verdict = "" if cell is None else "as printed" if same else f"{profile}'s own"
            sheet.add(row, column, values, metric="hyper-parameter", verdict=verdict)


def _each(records: list[dict], path: str, stage: str, **fields: str) -> Found:
    """Like find, with every task of a seed kept."""
    parts = [find(records, path, stage, task=task, **fields) for task in TASKS]
    return Found({(task, seed): v for task, part in zip(TASKS, parts, strict=True) for seed, v in part.values.items()}, sum((p.stages for p in parts), []))


def _distinct(found: Found) -> Found:
    """A setting that all runs share, as one value; settings that differ, joined as text."""
    values = list(dict.fromkeys(", ".join(map(str, v)) if isinstance(v, list) else v for v in found.values.values() if v is not None))
    return Found({None: values[0] if len(values) == 1 else " / ".join(map(str, values))}, found.stages[:1]) if values else Found()


def _cost(sheet: Sheet, records: list[dict], profile: str) -> None:
    def sources(pretrained: str, student: tuple[str, str]) -> list[Found]:
        ours = find(records, student[1], "decompose") if student[0] == "decompose" else find(records, student[1], "pretrain", on="web", objective="lm_kd")
        return [*(find(records, pretrained, "pretrained", model=model) for model in ("teacher", "baseline")), ours]

    def row(name: str, found: list[Found], scale: float = 1, metric: str = "", unit: str = "") -> None:
        for column, values in zip(MODELS.values(), found, strict=True):
            sheet.add(name, column, values.map(lambda value: value * scale) if scale != 1 else values, metric=metric, unit=unit)

    without_head = "parameters.without_head"
    row("Parameters*", sources(without_head, ("decompose", without_head)), 1e-6)
    row("Training time (hrs)", sources("hours", ("pretrain", "hours")))
    row("Hardware", sources("hardware", ("pretrain", "provenance.device")), 1, "device")
    row("Dataset size (GB)", sources("data_bytes", ("pretrain", "data_bytes")), 1e-9)
    for column in MODELS.values():
        full = find(records, f"paper_size.{column}.{without_head}", "shapes").map(lambda value: value / 1e6)
        paper = number_of(sheet.paper["Parameters*", column].value)
        verdict = "as printed" if all(abs(value - paper) < 1 for value in full.values.values()) else "differs"
        sheet.add("Parameters* at the paper's size", column, full, "parameters without the output embedding", "M", verdict, paper)
    row("Parameters with the output embedding", sources("parameters.total", ("decompose", "parameters.total")), 1e-6, "parameters", "M")
    totals = [find(records, f"paper_size.{column}.parameters.total", "shapes") for column in MODELS.values()]
    row("Parameters with the output embedding at the paper's size", totals, 1e-6, "parameters", "M")
    row("Size on disk", sources("bytes", ("decompose", "bytes")), 1e-6, "weights", "MB")
    row("Tokens seen", sources("tokens", ("pretrain", "tokens")), 1e-6, "tokens", "M")
    row("Steps", sources("steps", ("pretrain", "steps")), 1, "steps")


def _perplexity(sheet: Sheet, records: list[dict], profile: str) -> None:
    tuned = {"Perplexity": ("perplexity.wiki.test", ""), "Perplexity, validation": ("perplexity.wiki.valid", "validation perplexity")}
    tuned["Perplexity per word"] = ("word_perplexity.test", "test perplexity per word")
    for row, (path, metric) in tuned.items():
        for model, column in MODELS.items():
            sheet.add(row, column, find(records, path, "finetune_lm", model=model), metric, "perplexity")
    for model, column in MODELS.items():
        sheet.add("Perplexity before this training", column, before_finetuning(records, model), "test perplexity", "perplexity")


def before_finetuning(records: list[dict], model: str, path: str = "perplexity.wiki.test") -> Found:
    """A value of the "teacher", "baseline" or "student" before it is fine-tuned, by seed."""
    if model == "student":
        return find(records, path, "pretrain", on="web", objective="lm_kd")
    return find(records, path, "pretrained", model=model)


def _checks(records: list[dict], task: str) -> dict[str, Found]:
    """What a task gives away: one row each, the better of the two one-sentence models."""
    kinds = {kind: find(records, "dev.headline", "twin_check", task=task, kind=kind) for kind in ("random", "first_sentence", "second_sentence")}
    one = max(kinds["first_sentence"], kinds["second_sentence"], key=lambda found: -math.inf if (mean := found.mean()) is None else mean)
    found = {row: find(records, f"{task}.{key}.headline", "twins") for row, key in (("Majority class", "majority"), ("Word list", "word_list"))}
    return found | {"Random initialisation": kinds["random"], "One sentence only": one}


def informative(records: list[dict]) -> list[str]:
    """The tasks on which the teacher's dev score beats the best simple baseline by at least 5 points, or where that is not known."""
    result = []
    for task in TASKS:
        teacher = find(records, "dev.headline", "finetune_glue", row="teacher", task=task).mean()
        checks = [mean for found in _checks(records, task).values() if (mean := found.mean()) is not None]
        if teacher is None or not checks or teacher - max(checks) >= LEAD:
            result.append(task)
    return result


def average(records: list[dict], row: str, split: str = "dev", tasks: Iterable[str] = tuple(TASKS)) -> Values:
    """The mean headline score in percent over the tasks, for each seed that has them all; empty where there is none."""
    scores = [find(records, f"{split}.headline", "finetune_glue", row=row, task=task).values for task in tasks]
    seeds = [seed for seed in scores[0] if all(seed in other for other in scores)] if scores else []
    return {seed: statistics.fmean(values[seed] for values in scores) for seed in seeds}


def _glue(sheet: Sheet, records: list[dict], profile: str) -> None:
    split, known = "dev" if sheet.table == 5 else "test", informative(records)
    if split == "test" and profile == "paper":
        sheet.missing = "server only"  # GLUE's test labels are hidden: the submission files are beside each stage
    extra = []
    for key, row in GLUE_ROWS.items():
        for task, column in TASKS.items():
            found, verdict = find(records, f"{split}.headline", "finetune_glue", row=key, task=task), "" if task in known else "uninformative"
            sheet.add(row, column, found, verdict=verdict)
            shown = {"headline", sheet.paper[row, column].metric}
            others = find(records, split, "finetune_glue", row=key, task=task)
            names = dict.fromkeys(name for scores in others.values.values() for name in scores if name not in shown)
            extra += [(row, column, _inside(others, name), name, "%", verdict, None) for name in names]
        stages = find(records, f"{split}.headline", "finetune_glue", row=key).stages
        sheet.add(row, "Average", _with(average(records, key, split), stages))
        paper = [float(sheet.paper[row, TASKS[task]].value) for task in known]
        over_known = _with(average(records, key, split, known), stages)
        sheet.add(row, "Average (informative)", over_known, "mean of informative tasks", "%", paper=round(statistics.fmean(paper), 2) if paper else None)
    if split == "dev" and profile != "paper":
        checks = {task: _checks(records, task) for task in TASKS}
        for row in checks["cola"]:
            for task, column in TASKS.items():
                sheet.add(row, column, checks[task][row], sheet.paper["GPT-2 Small", column].metric, "%", "" if task in known else "uninformative")
    for line in extra:
        sheet.add(*line)


def _with(values: Values, stages: list[str]) -> Found:
    return Found(values, stages if values else [])


def _ablation(sheet: Sheet, records: list[dict], profile: str) -> None:
    verdict = "" if "mnli" in informative(records) else "uninformative"
    for key, row in ABLATION.items():
        sheet.add(row, "Wikitext-103 (pp.)", ablated(records, key))
        sheet.add(row, "MNLI (f1)", find(records, "dev.f1", "finetune_glue", row=f"ablation_{key}", task="mnli"), verdict=verdict)
    for key, row in ABLATION.items():
        sheet.add(row, "Wikitext-103, validation (pp.)", ablated(records, key, "perplexity.wiki.valid"), "validation perplexity", "perplexity")
        sheet.add(row, "OpenWebText (pp.)", ablated(records, key, "perplexity.web.test"), "test perplexity", "perplexity")
        accuracy = find(records, "dev.headline", "finetune_glue", row=f"ablation_{key}", task="mnli")
        sheet.add(row, "MNLI (accuracy)", accuracy, "accuracy", "%", verdict)
    for part in ("layers", "embedding"):  # of the SVD start, alone
        sheet.add(f"{ABLATION['none']}, {part} alone", "Wikitext-103 (pp.)", find(records, f"alone.{part}.wiki.test", "decompose"), "test perplexity", "perplexity")


def ablated(records: list[dict], objective: str, path: str = "perplexity.wiki.test") -> Found:
    """Perplexities right after the pre-training on WikiText-103; objective "none" is the SVD start."""
    return find(records, path, "decompose") if objective == "none" else find(records, path, "pretrain", on="wiki", objective=objective)
