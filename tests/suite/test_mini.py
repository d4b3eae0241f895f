"""The whole of mini at one seed and nbval on every notebook: minutes, so it comes last. The store is the
user's own, so a finished run is reused."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT, compare_notebook, stop_beside

from kn.report import compare


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """reports/mini of a run at one seed."""
    stop_beside()
    folder = tmp_path_factory.mktemp("reports")
    variables = {**os.environ, "KN_REPORTS": str(folder), "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-m", "kn"], cwd=ROOT, env=variables, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return folder / "mini"


@pytest.fixture(scope="module")
def tables(reports):
    import pandas

    return {
        n: pandas.read_csv(reports / f"table{n}.csv", dtype=str, keep_default_na=False) for n in range(1, 8)
    }


def test_seven_tables_without_a_hole(tables):
    for number, frame in tables.items():
        printed = frame[frame["paper"] != ""]
        # every cell the paper prints; others may not apply
        assert len(printed) and not (printed["verdict"] == "not run").any(), number
        assert (printed["ours"] != "").any() and (frame["stage"] != "").any(), number


def cell(frame, row, column):
    """One of our numbers."""
    found = frame[(frame["row"] == row) & (frame["column"] == column)]
    assert len(found) >= 1, (row, column, sorted(set(frame["row"])), sorted(set(frame["column"])))
    return float(found["ours"].iloc[0])


def test_measured_values_agree_with_the_published_report(reports):
    """Every cell, by the tolerance that a user's own run is compared with (kn/report/compare.py)."""
    cells = compare.compare_cells(reports, ROOT / "reports" / "published" / "mini")
    assert len(cells) > 300 and not [cell for cell in cells if not cell.agrees]


def test_the_svd_start_is_far_worse_than_the_teacher_and_training_heals(tables):
    frame = tables[7]
    column = next(c for c in frame["column"] if "ikitext" in c.lower())
    none, lm, both = (cell(frame, row, column) for row in ("KnGPT2", "KnGPT2 + LM", "KnGPT2 + LM + KD"))
    assert none > 4 * lm and none > 4 * both


@pytest.mark.parametrize("name", ["00_start_here", *(f"table{n}" for n in range(1, 8))])
def test_notebook_against_its_committed_outputs(reports, tmp_path, name):
    """What cannot move between processors; measured values carry nbval-ignore-output."""
    compare_notebook(name, tmp_path, KN_REPORTS=str(reports.parent / "nbval"))
