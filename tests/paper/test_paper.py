"""The printed values: all there, each with its quote, and the quotes really are the paper's."""

import re
from decimal import ROUND_DOWN, ROUND_HALF_UP, Decimal

import pytest
from conftest import ROOT

from kn.paper import printed, value_of

PAPER_TEXT = ROOT.parent / "shared" / "paper" / "kngpt2.txt"
CELLS = {1: (3, 3), 2: (2, 6), 3: (3, 3), 4: (1, 3), 5: (5, 8), 6: (5, 8), 7: (4, 2)}  # table: rows, columns


@pytest.mark.parametrize("table", CELLS)
def test_every_printed_cell_is_there_once(table):
    frame = printed(table)
    rows, columns = CELLS[table]
    assert list(frame) == ["table", "row", "column", "metric", "value", "unit", "quote", "note"]
    assert (frame["row"].nunique(), frame["column"].nunique(), len(frame)) == (rows, columns, rows * columns)
    assert not frame.duplicated(["row", "column"]).any()
    assert (frame["value"].str.len() > 0).all() and (frame["quote"].str.len() > 0).all()


def test_known_sums():
    """Sums counted by hand from the paper's pages, so that a mistyped digit is noticed."""
    total = {table: sum((Decimal(v) for v in printed(table)["value"] if value_of(v) is not None), Decimal())
             for table in (2, 3, 4, 5, 6, 7)}
    assert total[2] == Decimal("1") + Decimal("0.00025") + 16 + Decimal("0.00002") + 3 + Decimal("0.12")
    assert total[3] == 124 + 82 + 83 + Decimal("6.5") + 40 + 38 + Decimal("3.2")
    assert total[4] == Decimal("63.0")
    assert total[7] == 28608 + Decimal("21.94") + Decimal("144.1") + Decimal("23.04") + Decimal("302.67")


@pytest.mark.parametrize("table", [5, 6])
def test_all_ten_averages_are_truncated(table):
    frame = printed(table)
    differ = 0
    for _, row in frame.groupby("row"):
        values = dict(zip(row["column"], map(Decimal, row["value"]), strict=True))
        average = values.pop("Average")
        mean = sum(values.values()) / len(values)
        assert average == mean.quantize(Decimal("0.01"), ROUND_DOWN)
        differ += average != mean.quantize(Decimal("0.01"), ROUND_HALF_UP)
    assert differ == {5: 1, 6: 2}[table]


def test_the_value_stands_in_its_quote():
    for table in CELLS:
        for cell in printed(table).itertuples():
            squeezed = re.sub(r"[\s:]", "", cell.quote)
            assert re.sub(r"[\s:]", "", cell.value) in squeezed, cell


def test_erratum_is_noted_for_every_embedding_shape():
    frame = printed(1)
    wrong = frame[frame["value"].str.contains("50527")]
    assert len(wrong) == 3
    errata = set(wrong["note"].str.extract(r"(erratum: \d+ stands for \d+)")[0])
    assert errata == {"erratum: 50527 stands for 50257"}


@pytest.mark.parametrize("table", CELLS)
def test_quotes_are_the_papers(table):
    if not PAPER_TEXT.is_file():
        pytest.skip("the text of the paper is not part of the repository")
    text = " ".join(PAPER_TEXT.read_text(encoding="utf-8").split())
    for quote in printed(table)["quote"].unique():
        assert quote in text


@pytest.mark.parametrize("table", [0, 8, 9])
def test_unknown_table(table):
    with pytest.raises(ValueError, match=f"^table {table} does not exist, allowed: 1-7$"):
        printed(table)


def test_numbers_of_printed_texts():
    assert [value_of(text)
            for text in ("28608", "65.0", "2e-5", ">90", "768×768")] == [28608, 65.0, 2e-05, None, None]
