"""What the paper printed: table1.csv … table7.csv, every value with the words around it; no other file holds
a printed value.

printed(4)   one line per printed cell: table, row, column, metric, value, unit, quote, note
claims()     one line per claim of the text: id, label, section, quote, claim, judge (kn/report/claims.py),
             left and right ("table/row/column"), bound, variance, note"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas

TABLES = range(1, 8)
BEYOND = ("beyond_alignment", "beyond_compression")  # notebooks beyond the paper's tables
LEDGER = "claims"  # the notebook that judges every claim of the paper
NOTEBOOKS = (*TABLES, *BEYOND, LEDGER)


def printed(table: int) -> pandas.DataFrame:
    """The printed cells of one table, all columns as text; ValueError for a table the paper does not have."""
    if table not in TABLES:
        raise ValueError(f"table {table} does not exist, allowed: {TABLES[0]}-{TABLES[-1]}")
    frame = read_csv_as_text(Path(__file__).with_name(f"table{table}.csv"))
    return frame.assign(table=frame["table"].astype(int))


def claims() -> pandas.DataFrame:
    """The claims of the paper's text, all columns as text."""
    return read_csv_as_text(Path(__file__).with_name("claims.csv"))


def read_csv_as_text(path: Path) -> pandas.DataFrame:
    """A CSV whose cells are all text, "" where there is nothing."""
    import pandas
    return pandas.read_csv(path, dtype=str, keep_default_na=False)


def value_of(text: str) -> int | float | None:
    """The value of a printed number such as "1024" or "2e-5"; None for text such as ">90" or a shape."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return None


def number_of(text: str) -> int | float:
    """The value of a printed cell that holds a number; ValueError for text."""
    value = value_of(text)
    if value is None:
        raise ValueError(f"{text!r} is printed where a number is needed")
    return value
