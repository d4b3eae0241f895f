"""Profiles and `--set`: allowed values, messages of the others, and the hyper-parameters of Table 2."""

import pytest
from conftest import ROOT

from kn.suite import profiles


def test_overrides_reach_their_field():
    overrides = ("pretrain.batch_size=32", "readings.direction=teacher_student", "pretrain.alphas=1,0,0,0.5")
    profile = profiles.load("mini", (*overrides, "readings.table4_ilkd=true"))
    assert profile.pretrain.batch_size == 32 and profile.readings.direction == "teacher_student"
    assert profile.pretrain.alphas == (1.0, 0.0, 0.0, 0.5) and profile.readings.table4_ilkd is True
    assert profiles.MINI.pretrain.batch_size != 32


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("huge", (), "profile 'huge' is unknown: allowed are mini, midi, paper, test"),
        ("mini", ("teacher.steps=5",), "--set teacher.steps: the pretrained models of mini are not trained"),
        (
            "mini",
            ("pretrain.batchsize=3",),
            "'pretrain.batchsize' is unknown: did you mean pretrain.batch_size",
        ),
        ("mini", ("pretrain=3",), "--set key 'pretrain' is unknown"),
        ("mini", ("name=x",), "--set key 'name' is unknown"),
        ("mini", ("pretrain.batch_size",), "is not of the form key=value"),
        ("mini", ("pretrain.batch_size=many",), "batch_size=many: input should be a valid integer"),
        ("mini", ("pretrain.batch_size=0",), "=0: input should be greater than or equal to 1"),
        ("mini", ("pretrain.learning_rate=-1",), "input should be greater than or equal to 0"),
        ("mini", ("pretrain.learning_rate=nan",), "input should be a finite number"),
        ("mini", ("pretrain.alphas=1,2",), "4 values are needed, got 2"),
        ("mini", ("readings.direction=up",), "allowed are student_teacher, teacher_student"),
        ("mini", ("beyond.tasks=rte,x",), "--set beyond.tasks=rte,x: unknown task 'x', allowed: cola, rte"),
        ("mini", ("compression.factor=99999",), "input should be less than or equal to 65536"),
        ("mini", ("readings.table4_ilkd=maybe",), "true or false is needed"),
    ],
)
def test_refusals_are_one_clear_line(name, overrides, message):
    with pytest.raises(ValueError) as caught:
        profiles.load(name, overrides)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_alphas_are_the_papers():
    from kn.paper import printed

    frame = printed(2)
    trainings = {"Pre-training": profiles.MINI.pretrain, "Fine-tuning": profiles.MINI.finetune_glue}
    for row, training in trainings.items():
        values = frame[frame["row"] == row].set_index("column")["value"]
        assert [float(values[f"α{i}"]) for i in (1, 2, 3, 4)] == list(training.alphas)


def test_packages_of_the_corpus_are_pinned():
    from importlib.metadata import packages_distributions

    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pins = {line.split("==")[0].lower().replace("_", "-") for line in lines if "==" in line}
    where = packages_distributions()
    for name in (*profiles.MINI.text.web, *profiles.MINI.text.wiki):
        assert where[name][0].lower().replace("_", "-") in pins, name
