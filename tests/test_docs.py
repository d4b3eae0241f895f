"""README and docs: numbers are the committed report's, what they name exists, they stay short."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from kn.report import compare, publish
from kn.suite import profiles

spec = importlib.util.spec_from_file_location("docs_tables", ROOT / "benchmarks" / "docs_tables.py")
docs_tables = importlib.util.module_from_spec(spec)
spec.loader.exec_module(docs_tables)
MINI = publish.PUBLISHED / "mini"
PAGES = {
    path.name: path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}
TEXT = "\n".join(PAGES.values())


def between(text, begin, end):
    return text.split(begin)[1].split(end)[0]


def test_the_picture_is_made_of_the_published_report(tmp_path):
    """The same drawing: the places of its marks (other versions of fonts write other glyph outlines)."""
    docs_tables.picture().savefig(tmp_path / "picture.svg")
    places = [
        re.findall(r'<use xlink:href="#m\w+" x="([\d.]+)" y="([\d.]+)"', path.read_text())
        for path in (tmp_path / "picture.svg", docs_tables.PICTURE)
    ]
    assert len(places[0]) > 24 and places[0] == places[1]


@pytest.mark.parametrize("name", docs_tables.BLOCKS)
def test_tables_of_benchmarks_are_up_to_date(name):
    page, make = docs_tables.BLOCKS[name]
    assert between(PAGES[Path(page).name], *docs_tables.markers(name)) == make()


def test_the_published_report_has_five_seeds():
    run = compare.read_run(MINI)
    assert run["seeds"] == 5 and run["overrides"] == [] and run["profile"] == "mini"


def test_they_are_short():
    assert len(PAGES["README.md"].splitlines()) <= 150
    assert not {name: lines for name, text in PAGES.items() if (lines := len(text.splitlines())) > 120}


def test_every_file_they_name_is_there():
    named = set(re.findall(r"`((?:kn|tests|notebooks|reports/published|benchmarks|docs)/[\w./]*)`", TEXT))
    linked = {link for link in re.findall(r"\]\(([^)#:]+)\)", PAGES["README.md"])}
    inside = {
        f"docs/{link}"
        for name, text in PAGES.items()
        if name != "README.md"
        for link in re.findall(r"\]\(([^)#:]+)\)", text)
    }
    assert len(named) > 20 and not [name for name in named | linked | inside if not (ROOT / name).exists()]


def test_every_setting_they_name_can_be_set():
    keys = set(profiles.keys(profiles.MINI))
    groups = (
        "compression|readings|pretrain|ablation|finetune_lm|finetune_glue|glue|text|model|beyond|hardware"
    )
    named = set(re.findall(rf"\b((?:{groups})\.(?!md|html|ipynb|py\b)[a-z]\w+)", TEXT))
    assert len(named) > 8 and named - {"model.safetensors"} <= keys


def test_citation():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (
        cited["cff-version"] == "1.2.0"
        and cited["preferred-citation"]["doi"] == "10.18653/v1/2022.acl-short.24"
    )
    assert len(cited["preferred-citation"]["authors"]) == 6


def test_pages_of_the_interface(tmp_path):
    """pdoc's pages of the public names: no script, nothing fetched."""
    command = [sys.executable, str(ROOT / "docs" / "interface.py"), str(tmp_path)]
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    text = (tmp_path / "kn.html").read_text(encoding="utf-8")
    assert all(name in text for name in ("nearest_kronecker", "compress", "attention_kl", "DistillTrainer"))
    for page in tmp_path.rglob("*.html"):
        source = page.read_text(encoding="utf-8")
        assert not re.search(r"<script|src=.https?:|<link[^>]+https?:", source), page.name
