"""The ledger: what the paper's own numbers say, verdicts and intervals computed again from the CSVs by other
means, and where numbers are missing."""

import itertools
import math

import pandas
import pytest
from conftest import ROOT
from scipy import stats
from test_report import make

from kn import report
from kn.paper import claims as listed
from kn.paper import printed, value_of
from kn.report import claims, identities
from kn.report.labels import TASKS
from kn.report.statistics import REPRODUCED

DATA = {name: f"reports/published/mini/{name}.csv" for name in ("claims", "seeds")}


@pytest.fixture(scope="module")
def ledger():
    return claims.ledger(report.by_seed(make(5), "mini")).set_index("id")


@pytest.mark.parametrize(
    ("claim", "verdict", "value"),
    [
        ("most-dev", "does not hold", 3), ("most-test", "holds", 4), ("average-dev", "holds", 0.2),
        ("average-test", "holds", 0.5), ("all-dev", "does not hold", 5),
        ("all-dev-kd", "holds", 7), ("vanilla-dev", "holds", -0.07), ("vanilla-test", "does not hold", 0.16),
        ("outperforms-dev", "undecided", 2.45),
        ("perplexity", "holds", 20.5 / 23.7), ("tenth", "holds", 3.2 / 38),
        ("faster-training", "holds", 6.5 / 90), ("determinant", "does not hold", None),
        ("indicator", "holds", 1), ("retrieve", "holds", 8.64), ("same-size", "holds", 83 / 82),
        ("first", "not testable here", None), ("drop-layers", "not printed", None),
    ],
)  # fmt: skip
def test_what_the_printed_numbers_say(ledger, claim, verdict, value):
    assert ledger.loc[claim, "paper"] == verdict
    if value is not None:
        assert ledger.loc[claim, "paper_value"] == pytest.approx(value, abs=0.006)


def test_every_claim_has_a_quote_a_judge_and_a_verdict(ledger):
    frame = listed()
    assert frame["id"].is_unique and (frame["quote"] != "").all()
    assert set(frame["judge"]) <= {*claims.JUDGES, "untestable"}
    assert set(ledger["ours"]) <= {*REPRODUCED.values(), claims.UNTESTABLE, "not run"}
    assert set(ledger["paper"]) <= {*claims.HOLDS.values(), claims.UNTESTABLE, "not printed"}
    assert len(frame) == len(ledger) >= 45


def students(values):
    """Mean and 95 % interval, by scipy."""
    if len(values) < 2:
        return values[0], math.nan, math.nan
    span = stats.ttest_1samp(values,
                             0).confidence_interval(0.95) if len(set(values)) > 1 else (values[0], values[0])
    return sum(values) / len(values), *span


def again(claim, cells, tasks):
    """(verdict, value, low, high) of one claim from {(table, row, column): {seed: value}}, or None where its
    judge is not repeated here."""
    def get(name):
        return cells[tuple(name.split("/", 2))]

    def apart(left, right, change=float):
        if None in right and None not in left:
            right = dict.fromkeys(left, right[None])
        if None in left and None not in right:
            left = dict.fromkeys(right, left[None])
        return [change(left[seed]) - change(right[seed]) for seed in left if seed in right]

    def judged(values, side, bound=0.0, change=float):
        mean, low, high = (change(end) for end in students(values))
        if len(values) == 1 and drawn is False:
            return ("reproduced" if side * (mean - bound) > 0 else "not reproduced"), mean, math.nan, math.nan
        if math.isnan(low):
            return "undecided", mean, low, high
        ends = [side * (low - bound), side * (high - bound)]
        return ("reproduced" if min(ends) > 0 else "not reproduced" if max(ends) < 0
                else "undecided"), mean, low, high

    kind = claim.judge
    if kind in ("above", "not above", "below", "at most", "at least"):
        left, right = get(claim.left), get(claim.right)
        drawn = set(left) | set(right) != {None}
        if kind in ("above", "not above"):
            return judged(apart(left, right), 1 if kind == "above" else -1)
        return judged(apart(left, right, math.log), 1 if kind == "at least" else -1, float(claim.bound or 1),
                      math.exp)
    if kind in ("most", "all"):
        drawn = True
        found = [judged(apart(get(f"{claim.left}/{task}"), get(f"{claim.right}/{task}")), 1)
                 for task in tasks[claim.left.partition("/")[0]]]
        wanted = len(found) // 2 + 1 if kind == "most" else len(found)
        sure, lost = sum(f[0] == "reproduced" for f in found), sum(f[0] == "not reproduced" for f in found)
        return ("reproduced" if sure >= wanted else "not reproduced" if len(found) - lost < wanted
                else "undecided"), sum(f[1] > 0 for f in found), sure, len(found) - lost
    if kind == "above each":
        drawn = True
        found = [judged(apart(get(cell), get(claim.right)), 1) for cell in claim.left.split(";")]
        sure, lost = sum(f[0] == "reproduced" for f in found), sum(f[0] == "not reproduced" for f in found)
        return ("reproduced" if sure == len(found) else "not reproduced" if lost
                else "undecided"), sum(f[1] > 0 for f in found), sure, len(found) - lost
    if kind == "recovers":
        drawn = True
        rows = [get(f"{row}/Average (informative)")
                for row in (claim.left, claim.right, f"{claim.left.partition('/')[0]}/GPT-2 Small")]
        return judged([(rows[0][seed] - rows[1][seed]) / (rows[2][seed] - rows[1][seed]) for seed in rows[0]],
                      1, float(claim.bound))
    if kind in ("within", "above bound"):
        left = get(claim.left)
        drawn = set(left) != {None}
        if kind == "above bound":
            return judged(list(left.values()), 1, float(claim.bound))
        table, row, column = claim.right.split("/", 2)
        (value,) = (value_of(cell.value)
                    for cell in printed(int(table)).itertuples() if (cell.row, cell.column) == (row, column))
        return judged([abs(ours - value) for ours in left.values()], -1, float(claim.bound))
    if kind == "reversed":
        drawn, found = True, []
        for a, b in itertools.permutations(claim.left.split(";"), 2):
            easier = judged(apart(get(f"{a}/Wikitext-103 (pp.)"), get(f"{b}/Wikitext-103 (pp.)"), math.log),
                            -1)
            worse = judged(apart(get(f"{a}/MNLI (f1)"), get(f"{b}/MNLI (f1)")), -1)
            words = {easier[0], worse[0]}
            found.append(("not reproduced" if "not reproduced" in words else "undecided"
                          if "undecided" in words else "reproduced", easier[1] < 0 and worse[1] < 0))
        sure, lost = sum(f[0] == "reproduced" for f in found), sum(f[0] == "not reproduced" for f in found)
        return ("reproduced" if sure else "not reproduced" if lost == len(found)
                else "undecided"), sum(f[1] for f in found), sure, len(found) - lost
    assert kind in ("algebra", "speed", "untestable"), kind
    return None


def recomputed(ledger, seeds):
    """How many verdicts and intervals of a ledger come out the same from the numbers of every seed; an
    assertion for one that does not."""
    seeds = seeds.drop_duplicates(["table", "row", "column", "seed"])
    cells, dull = {}, set()
    for line in seeds.itertuples():
        cells.setdefault((line.table, line.row, line.column),
                         {})[None if pandas.isna(line.seed) else int(line.seed)] = line.value
        if line.verdict == "uninformative":
            dull.add((line.table, line.column))
    tasks = {table: [name for name in TASKS.values() if (table, name) not in dull] for table in ("5", "6")}
    same = 0
    for claim in ledger.itertuples():
        if claim.ours == "not run" or (found := again(claim, cells, tasks)) is None:
            continue
        assert claim.ours == found[0], claim.id
        for mine, theirs in zip((claim.value, claim.low, claim.high), found[1:], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-9, nan_ok=True), claim.id
        same += 1
    return same


def read(path, **more):
    return pandas.read_csv(path, dtype={"table": str, "bound": str, "id": str}, keep_default_na=False,
                           na_values={c: [""] for c in ("seed", "value", "low", "high", "paper_value")},
                           **more)


def test_verdicts_again_from_fabricated_runs(tmp_path):
    report.write_ledger(make(4, student=57.05), {}, "mini", tmp_path)
    assert recomputed(read(tmp_path / "claims.csv"), read(tmp_path / "seeds.csv")) == 31


def test_verdicts_again_from_the_committed_report():
    assert recomputed(*(read(ROOT / DATA[name]) for name in ("claims", "seeds"))) >= 33


def test_one_seed_decides_nothing_that_is_drawn():
    found = claims.ledger(report.by_seed(make(1), "mini")).set_index("id")
    assert set(found.loc[["average-dev", "perplexity", "kd-helps-test", "retrieve", "most-dev"],
                         "ours"]) == {"undecided"}
    assert found.loc["drop", "ours"] == "reproduced"  # nothing is drawn on either side


def test_a_ratio_to_nothing_is_not_run():
    records = make(2)
    for record in records:
        if record["stage"] == "pretrained":
            record["metrics"]["hours"] = 0.0  # a run cut to seconds
    found = claims.ledger(report.by_seed(records, "midi")).set_index("id")
    assert found.loc["faster-training", "ours"] == "not run" and found.loc["tenth", "ours"] == "reproduced"


def test_nothing_run_is_said(tmp_path):
    found = claims.ledger(report.by_seed([], "mini")).set_index("id")
    assert found.loc["average-dev", "ours"] == "not run" and found.loc["transpose", "ours"] == "reproduced"


def test_a_significance_without_variance_stays_undecided(ledger):
    assert set(ledger.loc[ledger["variance"] == "yes", "paper"]) == {"undecided"}


def test_a_verdict_turns_with_the_numbers():
    better, worse = (claims.ledger(report.by_seed(make(5, student=level), "mini")).set_index("id")
                     for level in (62.0, 58.0))
    assert (better.loc["average-dev", "ours"],
            worse.loc["average-dev", "ours"]) == ("reproduced", "not reproduced")


@pytest.mark.parametrize("name", identities.CHECKS)
def test_the_papers_algebra(name):
    holds, value, unit = identities.CHECKS[name]()
    assert holds is (name != "determinant") and value >= 0 and unit


def test_quotes_stand_in_the_paper():
    text = ROOT.parent / "shared" / "paper" / "kngpt2.txt"
    if not text.exists():
        pytest.skip("needs the paper's text beside the clone")

    def plain(words):
        return "".join(c for c in words.replace("-\n", "") if c.isalnum()).lower()

    whole = plain(text.read_text(encoding="utf-8"))
    missing = [claim.id for claim in listed().itertuples() if plain(claim.quote) not in whole]
    assert not missing


def test_no_informative_task_leaves_claims_over_tasks_undecided():
    """A short run may learn no task: the ledger and so the front page are made all the same."""
    seeds = claims.printed_numbers()
    seeds.loc[seeds["table"].isin(("5", "6")), "verdict"] = "uninformative"
    found = claims.ledger(seeds).set_index("judge")
    for kind in ("most", "all"):
        assert set(found.loc[[kind], "ours"]) == {"undecided"} and set(found.loc[[kind], "value"]) == {0}
