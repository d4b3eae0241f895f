"""Two reports compared: what agrees, what does not, unlike runs refused; and publishing one."""

import json
import shutil

import pandas
import pytest
from conftest import ROOT

from kn.report import compare, publish

MINI = ROOT / "reports" / "published" / "mini"


@pytest.fixture
def report(tmp_path):
    """A copy of the published report."""
    return shutil.copytree(MINI, tmp_path / "mini")


def change(folder, number, row, column, value):
    """Another value in one cell of a table."""
    path = folder / f"table{number}.csv"
    frame = pandas.read_csv(path, dtype=str, keep_default_na=False)
    at = frame.index[(frame["row"] == row) & (frame["column"] == column)][0]
    before = frame.loc[at, "ours"]
    frame.loc[at, "ours"] = value(before) if callable(value) else value
    frame.to_csv(path, index=False)
    return before


def edit_run(folder, **changes):
    path = folder / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_report_agrees_with_itself(report):
    cells = compare.compare_cells(report, MINI)
    assert len(cells) > 300 and all(cell.agrees for cell in cells)
    assert (
        compare.compare_reports(report, MINI)
        .splitlines()[0]
        .startswith(f"{len(cells)} of {len(cells)} cells of Tables 1-7 agree")
    )


def test_tolerance_is_four_deviations_of_one_seed():
    """Table 4 and 7's perplexities are pooled, relative to their value; computed here cell by cell."""
    frame = compare.read_tables(MINI)
    chosen = frame[
        (frame["metric"] + frame["unit"]).str.contains("perplexity")
        & (frame["sd"] != "")
        & frame["table"].isin(["4", "7"])
    ]
    relative = [
        float(sd) / float(ours) for sd, ours in zip(chosen["sd"], chosen["ours"], strict=True) if float(sd)
    ]
    pooled = (sum(value**2 for value in relative) / len(relative)) ** 0.5
    cell = next(
        c
        for c in compare.compare_cells(MINI, MINI)
        if (c.table, c.row, c.column) == (4, "Perplexity", "KnGPT2")
    )
    assert cell.tolerance == pytest.approx(4 * pooled * float(cell.reference), rel=1e-6)


@pytest.mark.parametrize(
    ("number", "row", "column", "value"),
    [
        (4, "Perplexity", "KnGPT2", lambda v: f"{1.05 * float(v):.6g}"),
        (5, "KnGPT2 + ILKD", "Average", lambda v: f"{float(v) - 6:.6g}"),
        (1, "KnGPT2", "Embedding", "50257x768"),
        (2, "Pre-training", "Batch size", "8"),
        (7, "KnGPT2", "Wikitext-103 (pp.)", lambda v: f"{1.02 * float(v):.6g}"),
    ],
)
def test_what_is_outside_is_named(report, number, row, column, value):
    before = change(report, number, row, column, value)
    text = compare.compare_reports(report, MINI)
    assert f"Table {number}, {row}, {column}" in text and f"{before} there" in text


def test_another_seed_is_inside(report):
    for number, row, column in ((4, "Perplexity", "KnGPT2"), (5, "KnGPT2", "CoLA")):
        line = next(
            c
            for c in compare.compare_cells(MINI, MINI)
            if (c.table, c.row, c.column) == (number, row, column)
        )
        change(report, number, row, column, lambda v, line=line: f"{float(v) + 0.6 * line.tolerance:.6g}")
    assert all(cell.agrees for cell in compare.compare_cells(report, MINI))


def test_differences_of_the_runs_are_said(report):
    environment = json.loads((report / "run.json").read_text())["environment"]
    edit_run(
        report,
        seeds=1,
        environment={
            **environment,
            "device": "Some CPU",
            "packages": {**environment["packages"], "torch": "9.9"},
        },
    )
    text = compare.compare_reports(report, MINI)
    assert "device Some CPU against AMD EPYC" in text and "torch 9.9 against" in text
    assert "means of 1 against 5 seeds" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"profile": "midi"}, "unlike runs (profile midi against mini)"),
        ({"corpus": "other"}, "unlike runs (corpus other against 53ab8fd17eb73eca)"),
        (
            {"overrides": ["pretrain.batch_size=8"]},
            "unlike runs (overrides pretrain.batch_size=8 against none)",
        ),
    ],
)
def test_unlike_runs_are_refused(report, changes, message):
    edit_run(report, **changes)
    with pytest.raises(ValueError) as caught:
        compare.compare_reports(report, MINI)
    assert message in str(caught.value) and "can be compared" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_no_report_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is not a report folder .* such as reports/mini"):
        compare.compare_reports(tmp_path, MINI)


# ---------------------------------------------------------------- publishing


def test_a_finished_report_is_published(report, tmp_path):
    (report / "table4-failed.html").write_text("x")
    target = publish.publish(report, tmp_path / "published")
    assert (target / "table4.csv").read_bytes() == (MINI / "table4.csv").read_bytes()
    assert (tmp_path / "published" / "index.html").is_file() and not (target / "table4-failed.html").exists()
    edit_run(report, seeds=5)
    publish.publish(report, tmp_path / "published")  # again, over the old one
    assert compare.compare_cells(target, MINI)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"finished": 394}, "lacks 1 stages: run its profile again first"),
        (
            {"overrides": ["pretrain.batch_size=8"]},
            "was made with --set pretrain.batch_size=8: publish a run of the profile's own settings",
        ),
        ({"seeds": 1}, "has 5 seeds, {folder} has 1: run it with --seeds 5 first"),
    ],
)
def test_what_is_not_fit_is_refused(report, tmp_path, changes, message):
    published = tmp_path / "published"
    shutil.copytree(MINI, published / "mini")
    edit_run(report, **changes)
    with pytest.raises(ValueError) as caught:
        publish.publish(report, published)
    assert message.format(folder=report) in str(caught.value)
    assert compare.read_run(published / "mini")["seeds"] == 5  # as it was
