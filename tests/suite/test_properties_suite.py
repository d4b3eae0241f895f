"""Any values given to profiles, stores, plans and tables: a valid result or a one-line error."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import ALLOWED, USUAL, Attempts, anything, mostly, odd, odd_text

from kn import report
from kn.suite import profiles
from kn.suite import run as stages
from kn.suite.plan import StagePlanner, table_stages
from kn.suite.store import Stage, Store, StoreError

attempt = Attempts()


@USUAL
@given(
    name=mostly(st.sampled_from(list(profiles.PROFILES))),
    key=mostly(st.sampled_from(profiles.keys(profiles.MIDI)), odd_text),
    value=st.one_of(
        odd_text,
        st.sampled_from([
            "1", "0", "-1", "1e400", "nan", "true", "1,2,3,4", "0.1,0.2", "99999999999999", "1_0", "(1,)"
        ]),
        st.integers().map(str), st.floats().map(str),
    ),
)
def test_profiles_and_their_plans(name, key, value):
    """What load takes can be planned: no overflow, no endless sizes."""
    profile = attempt(lambda: profiles.load(name, (f"{key}={value}",)))
    if profile is not None and "text.web" not in key and "text.wiki" not in key and key != "text.file":
        made = StagePlanner(profile, without_mirror=True)
        assert all(
            0 <= item.cost < math.inf and item.path
            for item in (
                *table_stages(made, 4, range(1), ("cola",)), *table_stages(made, 5, range(1), ("cola",))
            )
        )


record = st.one_of(
    odd,
    st.fixed_dictionaries({
        "stage": st.one_of(
            st.sampled_from([
                "pretrained", "finetune_lm", "finetune_glue", "shapes", "decompose", "pretrain", "twins"
            ]),
            odd,
        ),
        "path": st.just("a/b"), "provenance": st.just({}),
        "fields": st.fixed_dictionaries({
            "model": st.sampled_from(["teacher", "student"]), "row": st.just("teacher"),
            "task": st.just("cola"), "seed": st.integers(0, 1), "on": st.just("web"),
            "objective": st.just("lm_kd"),
        }),
        "metrics": st.one_of(
            odd,
            st.fixed_dictionaries({
                "perplexity": st.one_of(
                    odd,
                    st.fixed_dictionaries({
                        "wiki": st.one_of(odd, st.fixed_dictionaries({"test": odd, "valid": odd}))
                    }),
                ),
                "hyper": odd, "dev": st.one_of(odd, st.fixed_dictionaries({"headline": odd})),
                "parameters": odd, "hours": odd,
            }),
        ),
    }),
)


@USUAL
@given(
    number=mostly(st.integers(1, 7)), records=st.one_of(odd, st.lists(record, max_size=3)), name=odd
)
def test_report_table(number, records, name):
    frame = attempt(lambda: report.table(number, records, name))
    if frame is not None:
        assert list(frame) == report.COLUMNS
        assert not [value for value in frame["ours"] if isinstance(value, float) and math.isinf(value)]


@USUAL
@given(
    home=mostly(st.just("store")),
    kind=mostly(st.just("demo"), odd_text),
    fields=st.lists(st.tuples(st.text(max_size=4), odd), max_size=2),
    plain=st.sampled_from(["{}", '{"a": 1}']),
    found=anything,
)
def test_store(tmp_path_factory, home, kind, fields, plain, found):
    """A stage is made and read back the same, or refused; nothing is ever written outside the store."""
    folder, item = tmp_path_factory.getbasetemp() / "properties" / "store", Stage(kind, tuple(fields), plain)
    if not isinstance(home, str) or not home.isprintable():
        with pytest.raises((StoreError, *ALLOWED)):
            assert Store(home).home is None or not home  # what is empty or None means the default
            raise ValueError
    store = Store(folder)
    made = attempt(lambda: store.make(item, lambda *_: {"value": found}))
    assert not folder.parent.exists() or [path.name for path in folder.parent.iterdir()] == ["store"]
    assert made in (None, False, True) and (made is None or store.metrics(item).keys() == {"value"})


@USUAL
@given(
    tables=mostly(st.just([4])), seeds=mostly(st.just(1)),
    tasks=mostly(st.just(("cola",))),
)
def test_plan(tables, seeds, tasks):
    found = attempt(lambda: stages.plan_stages(profiles.TEST, tables, seeds, tasks))
    assert found is None or all(item.path for item in found[0])


def test_so_many_values_were_tried():
    """So that strategies whose values are all refused, or all taken, are noticed."""
    assert attempt.made > 350
    assert 0.2 < attempt.refused / attempt.made < 0.95, vars(attempt)
