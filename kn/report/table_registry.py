"""One record per table: title, builder and plot of Tables 1-7 and of the tables beyond the paper."""

from collections.abc import Callable
from dataclasses import dataclass, field

import pandas
from matplotlib.figure import Figure

from kn.report import beyond, plots, tables
from kn.report.metrics import select_metric
from kn.report.table_builder import TableBuilder

RECORD_KEYS = {"stage", "fields", "metrics", "path", "provenance"}


@dataclass(frozen=True)
class TableRecord:
    """What is known of one table; its note is templates/notes/<table>.html."""

    title: str
    build: Callable[[TableBuilder, list[dict], str], None]
    plot: Callable[[Figure, pandas.DataFrame, list[dict]], None]
    training: tuple[str, dict] | None = None  # stage and fields of those whose settings stand above the table
    not_applicable: dict[tuple[str, str], str] = field(default_factory=dict)  # (row, column) → why no value


GLUE_TRAINING = ("finetune_glue", {"row": "student_ilkd"})
TABLES: dict[int | str, TableRecord] = {
    1: TableRecord("Configuration of the models", tables.configuration, plots.parameter_counts),
    2: TableRecord("Hyper-parameters", tables.hyperparameters, plots.loss_terms),
    3: TableRecord("Cost of training", tables.cost, plots.training_logs),
    4: TableRecord("Perplexity on WikiText-103, after fine-tuning on it", tables.perplexity,
                   plots.perplexities, ("finetune_lm", {"model": "student"})),
    5: TableRecord("GLUE, development sets", tables.glue, plots.glue_scores, GLUE_TRAINING, {
        ("One sentence only", task): "one text only: not applicable" for task in ("CoLA", "SST-2")}),
    6: TableRecord("GLUE, test sets", tables.glue, plots.glue_scores, GLUE_TRAINING),
    7: TableRecord("Ablation of the pre-training", tables.ablation, plots.ablation,
                   ("pretrain", {"on": "wiki", "objective": "lm_kd"})),
    "beyond_alignment": TableRecord("Beyond the paper: a start that needs no healing", beyond.alignment,
                                    plots.alignment),
    "beyond_compression": TableRecord("Beyond the paper: quality against size", beyond.compression,
                                      plots.compression),
}


def build(key: int | str, records: list[dict], profile: str = "") -> TableBuilder:
    """The filled builder of a table of the registry."""
    builder = TableBuilder(key)
    TABLES[key].build(builder, records, profile)
    return builder


def table(number: int, records: list[dict], profile: str) -> pandas.DataFrame:
    """One of Tables 1-7, a line per cell, rows and names in the paper's order.
    Raises TypeError where the number or the records have the wrong type, ValueError for another number and
    for metrics that are not as their stage writes them."""
    if not isinstance(number, int) or isinstance(number, bool):
        raise TypeError(f"table {number!r} does not exist, allowed: 1-7")
    if not isinstance(records, list | tuple) or not all(
            isinstance(record, dict) and set(record) >= RECORD_KEYS for record in records):
        raise TypeError("records must be a list of what Store.record gives: stage, fields, metrics, path and "
                        "provenance")
    if number not in TABLES:
        raise ValueError(f"table {number} does not exist, allowed: 1-7")
    try:
        return build(number, list(records), profile).frame()
    except (KeyError, AttributeError, TypeError, IndexError, OverflowError, ZeroDivisionError) as error:
        reason = f"{type(error).__name__}: {str(error)[:80]}"
        raise ValueError(f"table {number}: metrics are not as their stage writes them ({reason})") from None


def beyond_table(name: str, records: list[dict]) -> pandas.DataFrame:
    """The table of a notebook beyond the paper (columns of the others); ValueError for another name."""
    return build(beyond.known(name), records).frame()


def plot(key: int | str, records: list[dict], profile: str = "") -> Figure:
    """The picture of a table: parameters, loss terms, training logs, perplexities (log axis) or GLUE bars."""
    return plots.draw(TABLES[key].plot, build(key, records, profile).plot_frame(), records)


def training_settings(key: int | str, records: list[dict]) -> str:
    """The hyper-parameters of the trainings behind a table, read off the records; "" where none has run."""
    stage, fields = TABLES[key].training or ("", {})
    hyper, shown = select_metric(records, "hyper", stage, **fields).values.values(), []
    for name in ("epochs", "max_steps", "batch_size", "learning_rate"):
        if values := dict.fromkeys(str(settings[name]) for settings in hyper if settings.get(name)):
            shown.append(f"{name.replace('_', ' ')} {' / '.join(values)}")
    return "; ".join(shown)
