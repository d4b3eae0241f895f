"""The README's numbers are those of the committed report, and its paths and commands exist."""

import importlib.util
import json
import re

import pytest
from conftest import ROOT

spec = importlib.util.spec_from_file_location("make", ROOT / "tests" / "expected" / "make.py")
make = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make)
TEXT = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("begin", [begin for begin, _, _ in make.blocks()])
def test_what_is_made_from_reports_and_benchmarks_is_up_to_date(begin):
    ((made, end),) = [(made, end) for other, made, end in make.blocks() if other == begin]
    assert TEXT.split(begin)[1].split(end)[0] == made


def test_expected_values_are_those_of_the_committed_report():
    assert json.loads(make.EXPECTED.read_text()) == make.expected()


def test_the_committed_report_has_five_seeds():
    run = json.loads((make.REPORTS / "run.json").read_text())
    assert run["seeds"] == 5 and run["finished"] == run["stages"] and run["overrides"] == []


def test_every_file_it_names_is_there():
    named = set(re.findall(r"`((?:kn|tests|notebooks|reports|benchmarks)/[\w./]*)`", TEXT))
    assert len(named) > 10 and not [name for name in named if not (ROOT / name).exists()]


def test_every_setting_it_names_can_be_set():
    from kn.suite import profiles

    keys = set(profiles.keys(profiles.MINI))
    named = {name for name in re.findall(r"`((?:compression|readings|pretrain|ablation|finetune_lm|finetune_glue|glue|text|model|beyond)\.\w+)", TEXT)}
    assert len(named) > 8 and named <= keys


def test_every_test_it_names_exists():
    source = "\n".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    assert not [name for name in re.findall(r"`(test_\w+)`", TEXT) if f"def {name}(" not in source and not (ROOT / "tests" / f"{name}.py").exists()]
