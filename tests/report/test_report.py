"""Tables, trends and pages from fabricated stages with numbers that can be checked by hand."""

import math
import statistics
from itertools import count

import pandas
import pytest
from scipy import stats

from kn import report
from kn.paper import printed, value_of
from kn.report.labels import TASKS
from kn.report.orderings import compare
from kn.report.statistics import interval

HOSTILE = '<script>alert("x")</script>&'
OFFSETS = dict(zip(TASKS, range(7), strict=True))  # one task is a point harder than the one before
SEED_NOISE = [0.0, 0.4, -0.2, 0.1, 0.3]


# noqa: B008 - one counter for all, so that every path is another
def stage(kind, fields, metrics, number=count()):
    path = f"{kind}/{'-'.join(map(str, fields.values()))}-{next(number):08x}"
    return {
        "stage": kind,
        "fields": fields,
        "metrics": metrics,
        "path": path,
        "provenance": {"wall_seconds": 2, "device": "cpu", "commit": "abc", "peak_bytes": 10**9},
    }


def perplexities(value):
    return {"web": {"valid": value, "test": value}, "wiki": {"valid": value, "test": value}}


def make(seeds=3, baseline=60.0, student=62.0, ilkd=64.0, hard_task=None, lead=10.0):
    """Every stage of Tables 1-7; scores are a level plus the seed's noise minus the task's offset."""
    shape = {
        "embedding": "50257×768",
        "qkv": "768×768",
        "ffn": "3072×768",
        "out_proj": "768×768",
        "parameters": {"total": 124439808, "without_head": 124439808},
    }
    factors = {"embedding": "A 50257×384, B 1×2", "qkv": "A 384×768, B 2×1", "ffn": "A 1536×768, B 2×2",
               "out_proj": "A 768×384, B 1×2"}
    factors["parameters"] = {"total": 122504906, "without_head": 83907530}
    built = {"GPT-2 Small": shape, "DistilGPT2": shape, "KnGPT2": factors}
    records = [stage("shapes", {}, {"paper_size": built, "mini_size": built}),
               stage("corpus", {}, {"fingerprint": HOSTILE})]
    records.append(stage("twins", {},
                         {task: {"majority": {"headline": 66.0 - lead if task != hard_task else 68.0},
                                 "word_list": {"headline": 51.0}} for task in TASKS}))
    size = {"parameters": {"total": 2_000_000, "without_head": 1_500_000}, "bytes": 4_000_000}
    log = [{"step": step, "tokens": step * 8, "loss": 9 / step, "valid_perplexity": 90 / step}
           for step in (1, 2, 3)]
    for model, value in (("teacher", 30.0), ("baseline", 40.0)):
        metrics = {**size, "hours": 1.5, "data_bytes": 2e9, "tokens": 5_000_000, "steps": 9,
                   "hardware": HOSTILE, "log": log, "perplexity": perplexities(value)}
        records.append(stage("pretrained", {"model": model}, metrics))
    alone = {"layers": {"wiki": {"test": 500.0}}, "embedding": {"wiki": {"test": 100.0}}}
    records.append(stage("decompose", {}, {**size, "perplexity": perplexities(900.0), "alone": alone}))
    hyper = {"batch_size": 1, "learning_rate": 1e-3, "alphas": [0.5, 0.5, 0.5, 0.1], "optimizer": "AdamW"}
    terms = [{"step": step, "loss": 2 / step, "embedding": 1 / step, "attention": 1 / step,
              "hidden": 1 / step, "cross_entropy": 1 / step} for step in (1, 2)]
    for seed in range(seeds):
        noise = SEED_NOISE[seed]
        for on, objective, value in (("web", "lm_kd", 45), ("wiki", "lm", 50), ("wiki", "kd", 140),
                                     ("wiki", "lm_kd", 52)):
            metrics = {"hyper": hyper, "perplexity": perplexities(value + noise), "log": terms, "hours": 0.1,
                       "data_bytes": 1e6, "steps": 2, "tokens": 16}
            records.append(stage("pretrain", {"on": on, "objective": objective, "seed": seed}, metrics))
        for model, value in (("teacher", 20), ("baseline", 30), ("student", 25)):
            tuned = {"hyper": hyper, "perplexity": perplexities(value + noise),
                     "word_perplexity": {"test": 99.0}}
            records.append(stage("finetune_lm", {"model": model, "seed": seed}, tuned))
        levels = {"teacher": 72.0, "baseline": baseline, "baseline_kd": baseline + (0.5, -0.5)[seed % 2],
                  "student": student, "student_ilkd": ilkd}
        for row, level in levels.items():
            for task, offset in OFFSETS.items():
                score = {"headline": level + noise * (row == "student") - offset}
                if task == "mnli":
                    score |= {"accuracy_matched": 1.0, "f1": 2.0}
                records.append(stage("finetune_glue", {"row": row, "task": task, "seed": seed},
                                     {"hyper": hyper, "dev": score, "test": score}))
        for objective, f1 in (("none", 50.0), ("lm", 60.0), ("kd", 61.0), ("lm_kd", 62.0)):
            score = {"headline": f1, "f1": f1 + noise}
            records.append(stage("finetune_glue",
                                 {"row": f"ablation_{objective}", "task": "mnli", "seed": seed},
                                 {"hyper": hyper, "dev": score, "test": score}))
        for task in TASKS:
            for kind in ("random", "first_sentence", "second_sentence"):
                records.append(stage("twin_check", {"task": task, "kind": kind, "seed": seed},
                                     {"dev": {"headline": 40.0 + (kind == "second_sentence")}}))
    return records


def line(frame, row, column):
    return frame[(frame["row"] == row) & (frame["column"] == column)].iloc[0]


def verdict(records, words):
    claims = report.trends(records).set_index("claim")
    (name,) = [claim for claim in claims.index if words in claim]
    return claims.loc[name]


@pytest.mark.parametrize("number", range(1, 8))
@pytest.mark.parametrize("records", [[], make(2)], ids=["nothing", "everything"])
def test_schema_and_order_of_every_table(number, records):
    frame, paper = report.table(number, records, "mini"), printed(number)
    assert list(frame) == report.COLUMNS == ["table", "row", "column", "metric", "paper", "ours", "sd", "n",
                                             "delta", "verdict", "unit", "stage"]
    in_paper = list(zip(paper["row"], paper["column"], strict=True))
    ours = [pair
            for pair in dict.fromkeys(zip(frame["row"], frame["column"], strict=True)) if pair in in_paper]
    assert ours == in_paper
    for cell in paper.itertuples():
        value = value_of(cell.value)
        assert line(frame, cell.row, cell.column)["paper"] == (cell.value if value is None else value)
    if not records:
        assert set(frame["verdict"]) == {"not run"} and frame["ours"].isna().all()
        assert (frame["n"] == 0).all() and (frame["stage"] == "").all()


def test_unknown_table():
    with pytest.raises(ValueError, match="^table 8 does not exist, allowed: 1-7$"):
        report.table(8, [], "mini")


def test_shapes_are_judged():
    frame = report.table(1, make(1), "mini")
    verdicts = {column: line(frame, "KnGPT2", column)["verdict"]
                for column in ("Embedding", "Q, K, V", "FFN", "Output projection")}
    assert verdicts == {"Embedding": "erratum", "Q, K, V": "as printed", "FFN": "differs",
                        "Output projection": "recorded"}
    assert line(frame, "KnGPT2", "Parameters without the output embedding")["ours"] == 83907530
    assert line(frame, "KnGPT2, mini size", "FFN")["verdict"] == "recorded"


def test_hyperparameters_are_what_training_used():
    frame = report.table(2, make(3), "mini")
    rate, batch = line(frame, "Pre-training", "Learning rate"), line(frame, "Pre-training", "Batch size")
    assert (rate["ours"], rate["verdict"], rate["delta"]) == (1e-3, "mini's own", pytest.approx(0.00075))
    assert (batch["ours"], batch["verdict"], batch["delta"]) == (1, "as printed", 0)
    assert line(frame, "Fine-tuning", "Optimizer")["ours"] == "AdamW"


def test_cost_scales_and_text():
    frame = report.table(3, make(2), "mini")
    hours = line(frame, "Training time (hrs)", "DistilGPT2")
    assert (hours["paper"], hours["ours"]) == (">90", 1.5) and math.isnan(hours["delta"])
    assert line(frame, "Dataset size (GB)", "DistilGPT2")["delta"] == -36
    full = line(frame, "Parameters* at the paper's size", "KnGPT2")
    assert (full["ours"], full["verdict"]) == (83.9075, "as printed")
    assert line(frame, "Parameters* at the paper's size", "DistilGPT2")["verdict"] == "differs"


@pytest.mark.parametrize("seeds", [1, 3])
def test_mean_deviation_and_delta(seeds):
    cell = line(report.table(4, make(seeds), "mini"), "Perplexity", "KnGPT2")
    values = [25 + noise for noise in SEED_NOISE[:seeds]]
    assert cell["ours"] == pytest.approx(statistics.mean(values), rel=1e-5) and cell["n"] == seeds
    assert cell["delta"] == pytest.approx(statistics.mean(values) - 20.5, rel=1e-5)
    expected = math.nan if seeds == 1 else statistics.stdev(values)
    assert cell["sd"] == pytest.approx(expected, rel=1e-5, nan_ok=True)
    assert len(cell["stage"].split(";")) == seeds and cell["verdict"] == "recorded"


def test_averages_and_uninformative_task():
    records = make(2, hard_task="rte", lead=10)
    assert report.informative(make(2)) == [task for task, offset in OFFSETS.items() if 72 - offset - 56 >= 5]
    known = report.informative(records)
    assert "rte" not in known and "cola" in known
    frame = report.table(5, records, "mini")
    assert set(frame[frame["column"] == "RTE"]["verdict"]) == {"uninformative"}
    assert line(frame, "KnGPT2 + ILKD", "Average")["ours"] == pytest.approx(64 - 3)
    expected = statistics.mean(64 - OFFSETS[task] for task in known)
    assert line(frame, "KnGPT2 + ILKD", "Average (informative)")["ours"] == pytest.approx(expected)
    paper = statistics.mean(float(line(printed(5), "KnGPT2 + ILKD", TASKS[task])["value"]) for task in known)
    assert line(frame, "KnGPT2 + ILKD", "Average (informative)")["paper"] == pytest.approx(paper, abs=0.005)
    assert report.average(records, "student", "dev") == pytest.approx({0: 59.0, 1: 59.4})


@pytest.mark.parametrize(("lead", "known"), [(4.99, False), (5.0, True)])
def test_five_points_decide(lead, known):
    records = [stage("finetune_glue", {"row": "teacher", "task": "cola", "seed": 0},
                     {"dev": {"headline": 60.0}})]
    records.append(stage("twin_check", {"task": "cola", "kind": "random", "seed": 0},
                         {"dev": {"headline": 60 - lead}}))
    assert ("cola" in report.informative(records)) is known


def test_simple_baselines_stand_beside_the_scores():
    frame = report.table(5, make(2), "mini")
    rows = list(dict.fromkeys(frame["row"]))
    assert rows[5:] == ["Majority class", "Word list", "Random initialisation", "One sentence only"]
    assert line(frame, "One sentence only", "QQP")["ours"] == 41  # the better of the two
    assert "Majority class" not in set(report.table(6, make(2), "mini")["row"])
    extra = frame[(frame["metric"] == "accuracy_matched") & (frame["row"] == "KnGPT2")].iloc[0]
    assert (extra["column"], extra["ours"]) == ("MNLI", 1.0) and pandas.isna(extra["paper"])


def test_a_seed_without_all_tasks_is_in_no_average():
    records = [r for r in make(3) if not (r["fields"].get("row") == "student"
                                          and r["fields"].get("task") == "qqp" and r["fields"]["seed"] == 1)]
    assert set(report.average(records, "student", "dev")) == {0, 2}


def test_ablation():
    frame = report.table(7, make(3), "mini")
    start = line(frame, "KnGPT2", "Wikitext-103 (pp.)")
    assert (start["paper"], start["ours"], start["n"], start["delta"]) == (28608, 900, 1, -27708)
    assert line(frame, "KnGPT2 + KD", "MNLI (f1)")["paper"] == 77.5


def test_interval_is_the_paired_t_interval():
    left, right = [3.0, 4.5, 5.2, 4.1], [2.5, 4.6, 4.1, 3.0]
    expected = stats.ttest_rel(left, right).confidence_interval(0.95)
    mean, low, high = interval([a - b for a, b in zip(left, right, strict=True)])
    assert (low, high) == pytest.approx((expected.low, expected.high)) and mean == pytest.approx(0.65)


@pytest.mark.parametrize(("left", "expected"),
                         [([3.0, 4.0, 5.1], "held"), ([1.0, 2.0, 3.1], "not held"),
                          ([1.0, 4.0, 4.1], "undecided"), ([9.0], "one seed: undecided")])
def test_verdicts(left, expected):
    right = [2.0, 3.1, 4.0][: len(left)]
    found = compare("a claim", dict(enumerate(left)), dict(enumerate(right)), 1.0, 1, False)
    assert found["verdict"] == expected and found["n"] == len(left)
    assert found["ours"] == pytest.approx(statistics.mean(left) - statistics.mean(right), rel=1e-5)
    mirrored = compare("a claim", dict(enumerate(right)), dict(enumerate(left)), 1.0, -1, False)
    assert mirrored["verdict"] == expected


def test_ratio_is_compared_by_logarithms_and_pairs_by_seed():
    left, right = {0: 10.0, 1: 22.0, 7: 5.0}, {1: 44.0, 0: 21.0, 2: 1.0}
    found = compare("a claim", left, right, None, -1, True)
    expected = stats.ttest_rel([math.log(10), math.log(22)],
                               [math.log(21), math.log(44)]).confidence_interval(0.95)
    assert found["n"] == 2 and found["verdict"] == "held"
    assert (found["low"],
            found["high"]) == pytest.approx((math.exp(expected.low), math.exp(expected.high)), rel=1e-5)


def test_trends_of_the_fabricated_stages():
    records = make(5)
    claims = report.trends(records)
    assert list(claims) == ["claim", "paper", "ours", "low", "high", "n", "verdict"]
    start = verdict(records, "SVD start: perplexity at least 2 times the teacher's")
    assert (start["ours"], start["verdict"], start["n"]) == (30.0, "held", 1)
    assert verdict(records, "KnGPT2 + LM below KnGPT2 + LM + KD")["verdict"] == "held"
    assert verdict(records, "KnGPT2 + KD below KnGPT2 (SVD start)")["n"] == 5
    assert verdict(records, "Table 4")["verdict"] == "held"
    assert verdict(records, "dev average: KnGPT2 above DistilGPT2")["verdict"] == "held"
    assert verdict(make(5, student=55.0), "dev average: KnGPT2 above DistilGPT2")["verdict"] == "not held"
    assert verdict(records, "dev average: DistilGPT2 + KD not improving")["verdict"] == "undecided"
    assert set(report.trends(make(1))["verdict"]) <= {"held", "one seed: undecided"}
    assert set(report.trends([])["verdict"]) == {"not run"}


def test_the_papers_own_differences_are_shown():
    assert verdict([], "dev average: KnGPT2 above DistilGPT2")["paper"] == pytest.approx(0.20)
    assert verdict([], "Table 4")["paper"] == pytest.approx(20.5 / 23.7)


def test_fixed_facts_do_not_depend_on_measured_values():
    slower = make(2, student=50.0, ilkd=51.0)
    for number in (3, 4, 5, 6, 7):
        facts = [report.machine_independent_facts(report.table(number, r, "mini")) for r in (make(2), slower)]
        assert facts[0] == facts[1]
    facts = report.machine_independent_facts(report.table(4, [], "mini"))
    assert facts["printed"] == "3 cells, numbers add up to 63"
