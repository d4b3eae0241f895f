"""The paper's orderings of methods, judged on our numbers."""

import math
import statistics

import pandas

from kn.paper import number_of, printed
from kn.report.labels import ABLATION, GLUE_ROWS, MODELS, TASKS
from kn.report.metrics import after_ablation, average, before_finetuning, informative, select_metric
from kn.report.statistics import HELD, Values, judge, paired_differences
from kn.report.table_builder import rounded

FAR_WORSE = 2.0  # ratio of perplexities from which the SVD start counts as far worse than the teacher


def compare(claim: str, left: Values, right: Values, paper: float | None, side: int, ratio: bool,
            bound: float | None = None) -> dict:
    """One line of trends(): left against right, paired by seed, as a difference or as a ratio.
    side is +1 where left is claimed to be greater, −1 where smaller; with a bound the claim is that the
    difference or ratio is at least (+1) or at most (−1) the bound."""
    differences = paired_differences(left, right, ratio)
    line: dict = {"claim": claim, "paper": paper}
    if not differences:
        return {**line, "ours": math.nan, "low": math.nan, "high": math.nan, "n": 0, "verdict": "not run"}
    verdict = judge(differences, bound, side, ratio=ratio, inclusive=bound is not None)
    line |= zip(("ours", "low", "high"), map(rounded, verdict[1:4]), strict=True)
    return {**line, "n": len(differences),
            "verdict": "one seed: undecided" if verdict.n == 1 else HELD[verdict.holds]}


def trends(records: list[dict]) -> pandas.DataFrame:
    """The paper's orderings on our numbers: claim, paper, ours, low, high, n, verdict."""
    paper = {number: {(cell.row, cell.column): number_of(cell.value) for cell in printed(number).itertuples()}
             for number in range(4, 8)}
    table4 = {model: paper[4]["Perplexity", name] for model, name in MODELS.items()}
    table7 = {key: paper[7][row, "Wikitext-103 (pp.)"] for key, row in ABLATION.items()}
    ablated = {key: after_ablation(records, key).values for key in ABLATION}
    tuned = {model: select_metric(records, "perplexity.wiki.test", "finetune_lm", model=model).values
             for model in MODELS}
    tasks = informative(records)

    claim = f"SVD start: perplexity at least {FAR_WORSE:g} times the teacher's"
    teacher = before_finetuning(records, "teacher").values
    lines = [compare(claim, ablated["none"], teacher, table7["none"] / table4["teacher"], 1, True, FAR_WORSE)]
    for less, more in (("lm", "lm_kd"), ("lm_kd", "kd"), ("kd", "none")):
        start = " (SVD start)" if more == "none" else ""
        claim = f"Table 7, perplexity: {ABLATION[less]} below {ABLATION[more]}{start}, ratio"
        lines.append(compare(claim, ablated[less], ablated[more], table7[less] / table7[more], -1, True))
    claim = "Table 4, perplexity: KnGPT2 below DistilGPT2, ratio"
    ratio = table4["student"] / table4["baseline"]
    lines.append(compare(claim, tuned["student"], tuned["baseline"], ratio, -1, True))

    for left, right, side, words in (
        ("student", "baseline", 1, "above"), ("student_ilkd", "student", 1, "above"),
        ("baseline_kd", "baseline", -1, "not improving on"),
    ):
        for number, split in ((5, "dev"), (6, "test")):
            means = [statistics.fmean(paper[number][GLUE_ROWS[row], TASKS[task]] for task in tasks or TASKS)
                     for row in (left, right)]
            claim = (f"Table {number}, GLUE {split} average: "
                     f"{GLUE_ROWS[left]} {words} {GLUE_ROWS[right]}, points")
            ours, theirs = (average(records, row, split, tasks) for row in (left, right))
            lines.append(compare(claim, ours, theirs, round(means[0] - means[1], 2), side, False))

    claim = "Table 7, MNLI f1: KnGPT2 + LM + KD above KnGPT2 without pre-training, points"
    tuned_on_mnli = records if "mnli" in tasks else []
    with_both, without = (
        select_metric(tuned_on_mnli, "dev.f1", "finetune_glue", row=f"ablation_{key}", task="mnli").values
        for key in ("lm_kd", "none")
    )
    difference = round(paper[7][ABLATION["lm_kd"], "MNLI (f1)"] - paper[7][ABLATION["none"], "MNLI (f1)"], 2)
    return pandas.DataFrame([*lines, compare(claim, with_both, without, difference, 1, False)])
