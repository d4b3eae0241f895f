"""Pages and CSVs written from fabricated stages: escaped, self-contained, linked, never half-written."""

import html
import re

import pandas
import pytest
from test_report import HOSTILE, make

from kn import files, report
from kn.report import write
from kn.report.labels import TASKS


def test_pages_escape_hostile_text_and_fetch_nothing(tmp_path):
    records = make(2)
    report.write_table(3, records, HOSTILE, tmp_path)
    report.write_index(records, HOSTILE, tmp_path)
    for page in tmp_path.glob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert HOSTILE not in text and "<script" not in text and HOSTILE in html.unescape(text)
        assert not re.findall(r"""(?:src|href)=["']?(?:https?:)?//|@import|url\((?!#)""",
                              re.sub(r"xmlns\S+|<metadata>.*?</metadata>", "", text, flags=re.S))


def test_the_benchmark_is_on_the_index_page_as_measured(tmp_path, monkeypatch):
    records = make(2)
    frame = pandas.read_csv(write.BENCHMARKS / "speed-cpu.csv")
    report.write_index(records, "mini", tmp_path)
    text = (tmp_path / "index.html").read_text()
    assert 'id="speed"' in text and "times as fast as dense" in text and frame["device"][0] in text
    row = frame[(frame["case"] == "ffn block") & (frame["variant"] == "folded")].iloc[0]
    cells = (row["median"], row["low"], row["high"], "ms", row["ratio"])
    assert "".join(f"<td>{cell}</td>" for cell in cells) in text
    monkeypatch.setattr(write, "BENCHMARKS", tmp_path)
    frame.assign(device=HOSTILE, case=HOSTILE).to_csv(tmp_path / "speed-hostile.csv", index=False)
    report.write_index(records, "mini", tmp_path)
    text = (tmp_path / "index.html").read_text()
    assert HOSTILE not in text and HOSTILE in html.unescape(text)
    (tmp_path / "speed-hostile.csv").unlink()
    report.write_index(records, "mini", tmp_path)
    assert 'id="speed"' not in (tmp_path / "index.html").read_text()


def test_every_link_of_a_page_has_its_place(tmp_path):
    records, folder = make(2), tmp_path / "mini"
    folder.mkdir()
    report.write_index(records, "mini", folder)
    for number in range(1, 8):
        report.write_table(number, records, "mini", folder)
    report.write_front(tmp_path)
    places = {page: set(re.findall(r'id="([^"]+)"', page.read_text(encoding="utf-8")))
              for page in tmp_path.rglob("*.html")}
    assert len(places) == 13
    for page in places:
        for target in re.findall(r'<a [^>]*?href="?([^"> ]+)', page.read_text(encoding="utf-8")):
            name, _, place = target.partition("#")
            file = (page.parent / name).resolve() if name else page
            assert file.is_file(), (page.name, target)
            assert not place or place in places[file], (page.name, target)


@pytest.mark.parametrize(("profile", "expected"), [("mini", True), ("paper", False)])
def test_banner(tmp_path, profile, expected):
    text = report.write_index([], profile, tmp_path).read_text(encoding="utf-8")
    assert (f"{profile}: documentation text, not the paper&#x27;s data" in text
            or f"{profile}: documentation text, not the paper&#39;s data" in text) is expected
    assert text.count("not run") > 50


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [({"as_committed": False}, "not the committed corpus"),
     ({"weights": "random"}, "a rehearsal: models with random weights"), ({"as_committed": True}, "")]
)
def test_another_corpus_and_a_rehearsal_are_said(tmp_path, metrics, expected):
    records = [{"stage": "corpus", "fields": {}, "metrics": metrics, "path": "corpus/all-0",
                "provenance": {}}]
    pages = [report.write_index(records, "paper", tmp_path),
             report.write_table(4, records, "paper", tmp_path)]
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert text.count('class="banner"') == bool(expected) and expected in text


def test_a_failed_write_leaves_the_old_page(tmp_path, monkeypatch):
    report.write_table(4, make(1), "mini", tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(before) == {"table4.csv", "table4.html"}

    def refuse(*_):
        raise OSError("disk full")

    monkeypatch.setattr(files.os, "replace", refuse)
    with pytest.raises(OSError, match="^disk full$"):
        report.write_table(4, make(2), "mini", tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("number", range(1, 8))
def test_plots(number):
    assert report.plot(number, make(2)).axes[0].has_data()
    assert "not run" in [text.get_text() for text in report.plot(number, []).axes[0].texts]


def test_the_csv_reads_back_as_the_table(tmp_path):
    report.write_table(7, make(2), "mini", tmp_path)
    back = pandas.read_csv(tmp_path / "table7.csv")
    assert list(back) == report.COLUMNS
    assert back["ours"].tolist() == report.table(7, make(2), "mini")["ours"].tolist()


def test_show_is_html_with_its_own_style():
    shown = report.show(report.table(4, make(1), "mini")).data
    assert shown.lstrip().startswith("<style>") and "Perplexity" in shown
    assert TASKS["cola"] in report.show(report.table(5, [], "mini")).data
