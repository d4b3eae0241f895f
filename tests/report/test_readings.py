"""Readings switched one at a time: what they make anew, and the effects computed from fabricated stages."""

import copy
import math

import pytest
from scipy import stats
from test_report import make

from kn.report import readings as effects
from kn.report.statistics import interval
from kn.suite import plan as kinds
from kn.suite import profiles, readings
from kn.suite import run as stages

TASKS = kinds.TASKS


def plan_paths(tables, seeds):
    return {item.path for item in stages.plan_stages(profiles.MINI, tables, seeds)[0]}


@pytest.mark.parametrize("name", readings.SWITCHES)
def test_a_switch_changes_one_field_and_makes_only_new_stages(name):
    part, field, value = readings.SWITCHES[name]
    changed = readings.switch_reading(profiles.MINI, name)
    assert getattr(getattr(changed, part), field) == value != getattr(getattr(profiles.MINI, part), field)
    made = readings.switched_stages(profiles.MINI, name, range(5), TASKS)
    assert made and {item["seed"] for item in made} == set(range(profiles.MINI.ledger.seeds))
    assert not {item.path for item in made} & plan_paths(range(1, 8), 5)


def test_every_reading_that_the_readme_calls_a_switch_of_training_is_there():
    fields = {f"{part}.{field}" for part, field, _ in readings.SWITCHES.values()}
    assert fields == {"compression.layers", "compression.scale", "readings.direction",
                      "readings.hidden_point", "readings.logit_term", "readings.table4_ilkd",
                      "readings.table7_ilkd"}


def test_an_unknown_reading():
    with pytest.raises(ValueError,
                       match="^reading 'odd' is unknown: allowed are even layers instead of odd ones, "):
        readings.switch_reading(profiles.MINI, "odd")


def test_the_plan_of_the_ledger_holds_the_tables_and_the_switched_stages():
    plan, wanted = stages.plan_stages(profiles.MINI, ("claims",), 2)
    paths = {item.path for item in plan}
    assert plan_paths(range(1, 8), 2) < paths
    assert {item.path for name in readings.SWITCHES
            for item in readings.switched_stages(profiles.MINI, name, range(2), TASKS)} < paths
    assert not {item.kind for item in wanted} & {"aligned", "compressed"}


def switch(records, kind, change, **fields):
    """The records of a kind as another reading would give them."""
    found = [copy.deepcopy(r)
             for r in records if r["stage"] == kind
             and all(r["fields"].get(k) == v for k, v in fields.items())
             and r["fields"].get("seed") in (0, 1, 2)]
    for record in found:
        change(record["metrics"])
        record["path"] += "-other"
    return found


def test_effects_are_paired_by_seed_and_verdicts_can_turn():
    records = make(3)

    def worse(metrics):
        metrics["perplexity"]["wiki"]["test"] *= 1.5

    other = switch(records, "finetune_lm", worse, model="student")
    frame = effects.effects(records, {"ILKD in Table 4's fine-tuning": other})
    (line,) = frame.itertuples(index=False)
    before = [math.log((25 + noise) / (30 + noise)) for noise in (0.0, 0.4, -0.2)]
    assert line.quantity.startswith("Table 4") and line.n == 3 and line.switch == "readings.table4_ilkd=True"
    assert (line.default, line.switched,
            line.effect) == pytest.approx((math.exp(sum(before) / 3), 1.5 * math.exp(sum(before) / 3), 1.5))
    assert (frame["verdict by default"][0], frame["verdict switched"][0], line.turned,
            line.moved) == ("held", "not held", "yes", "yes")


def test_an_effect_within_the_noise_is_undecided():
    records = make(3)
    shifts = iter((3.0, -2.5, 0.5))
    other = switch(records, "finetune_glue",
                   lambda metrics: metrics["dev"].update(f1=metrics["dev"]["f1"] + next(shifts)),
                   row="ablation_lm_kd")
    frame = effects.effects(records, {"ILKD in Table 7's MNLI": other})
    (line,) = frame.itertuples(index=False)
    mean, low, high = interval([3.0, -2.5, 0.5])
    assert (line.effect, line.low, line.high) == pytest.approx((mean, low, high))
    assert line.moved == "undecided" and low < 0 < high
    assert (low,
            high) == pytest.approx(tuple(stats.ttest_1samp([3.0, -2.5, 0.5], 0).confidence_interval(0.95)))


def test_nothing_switched_gives_an_empty_table():
    frame = effects.effects(make(2), {})
    assert frame.empty and list(frame.columns) == effects.COLUMNS
