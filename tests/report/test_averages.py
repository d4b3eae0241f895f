"""Both intervals of the GLUE averages, from fabricated stages."""

import pytest
from test_report import make

from kn import report
from kn.report import averages
from kn.report.statistics import interval


def test_rows_differences_and_their_seeds_and_tasks():
    frame = averages.averages(5, make(5)).set_index("average")
    assert list(frame.columns) == ["table", "value", "low", "high", "low_tasks", "high_tasks", "n", "tasks"]
    assert set(frame["n"]) == {5} and set(frame["tasks"]) == {7} and len(frame) == 10
    line, ours = frame.loc["KnGPT2 − DistilGPT2"], [2.0 + noise for noise in (0.0, 0.4, -0.2, 0.1, 0.3)]
    assert (line["value"], line["low"], line["high"]) == pytest.approx(interval(ours))


def test_an_uninformative_task_is_left_out():
    frame = averages.averages(6, make(2, hard_task="rte"))
    assert set(frame["tasks"]) == {6}


def test_nothing_run_gives_nothing():
    frame = averages.averages(5, [])
    assert frame.empty and list(frame.columns) == averages.COLUMNS


def test_page_and_csv(tmp_path):
    report.write_table(5, make(3), "mini", tmp_path)
    text = (tmp_path / "table5.html").read_text()
    assert "95 % over tasks and seeds" in text and "table5_averages.csv" in text
    assert (tmp_path / "table5_averages.csv").is_file()
