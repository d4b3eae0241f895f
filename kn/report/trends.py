"""The paper's orderings of methods, judged on our numbers."""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING

from kn.paper import number_of, printed
from kn.report.statistics import interval, paired
from kn.report.tables import ABLATION, GLUE_ROWS, MODELS, TASKS, ablated, average, before_finetuning, find, informative, rounded

if TYPE_CHECKING:
    import pandas

FAR_WORSE = 2.0  # ratio of perplexities from which the SVD start counts as far worse than the teacher


def compare(claim: str, left: dict, right: dict, paper: float | None, side: int, ratio: bool) -> dict:
    """One line of trends(): left against right, paired by seed; side is +1 where left is claimed to be the greater, −1 the smaller."""
    change = math.log if ratio else float
    differences = [change(a) - change(b) for a, b in paired(left, right).values()]
    line = {"claim": claim, "paper": paper, "ours": math.nan, "low": math.nan, "high": math.nan, "n": len(differences)}
    if not differences:
        return {**line, "verdict": "not run"}
    ours = interval(differences)
    verdict = "undecided" if len(differences) > 1 else "one seed: undecided"
    if min(side * ours[1], side * ours[2]) > 0:
        verdict = "held"
    elif max(side * ours[1], side * ours[2]) < 0:
        verdict = "not held"
    values = [rounded(math.exp(value) if ratio else value) for value in ours]
    return {**line, **dict(zip(("ours", "low", "high"), values, strict=True)), "verdict": verdict}


def trends(records: list[dict]) -> pandas.DataFrame:
    """The paper's orderings on our numbers: claim, paper, ours, low, high, n, verdict; scores over the informative tasks alone."""
    import pandas

    paper = {number: {(cell.row, cell.column): number_of(cell.value) for cell in printed(number).itertuples()} for number in range(4, 8)}
    four = {model: paper[4]["Perplexity", name] for model, name in MODELS.items()}
    start, teacher = ablated(records, "none").values, before_finetuning(records, "teacher").values
    seven = {key: paper[7][row, "Wikitext-103 (pp.)"] for key, row in ABLATION.items()}
    far = compare(f"SVD start: perplexity at least {FAR_WORSE:g} times the teacher's", start, teacher, seven["none"] / four["teacher"], 1, True)
    if far["n"]:  # nothing is drawn on either side, so the ratio itself decides
        far["verdict"] = "held" if far["ours"] >= FAR_WORSE else "not held"
    lines = [far]
    for less, more in (("lm", "lm_kd"), ("lm_kd", "kd"), ("kd", "none")):
        claim = f"Table 7, perplexity: {ABLATION[less]} below {ABLATION[more]}{' (SVD start)' if more == 'none' else ''}, ratio"
        lines.append(compare(claim, ablated(records, less).values, ablated(records, more).values, seven[less] / seven[more], -1, True))
    tuned = {model: find(records, "perplexity.wiki.test", "finetune_lm", model=model).values for model in MODELS}
    claim = "Table 4, perplexity: KnGPT2 below DistilGPT2, ratio"
    lines.append(compare(claim, tuned["student"], tuned["baseline"], four["student"] / four["baseline"], -1, True))
    tasks = informative(records)
    pairs = [("student", "baseline", 1, "above"), ("student_ilkd", "student", 1, "above"), ("baseline_kd", "baseline", -1, "not improving")]
    for left, right, side, word in pairs:
        for number, split in ((5, "dev"), (6, "test")):
            printed_mean = [statistics.fmean(paper[number][GLUE_ROWS[row], TASKS[task]] for task in tasks or TASKS) for row in (left, right)]
            claim = f"Table {number}, GLUE {split} average: {GLUE_ROWS[left]} {word} {'on ' if side < 0 else ''}{GLUE_ROWS[right]}, points"
            ours = [average(records, row, split, tasks) for row in (left, right)]
            lines.append(compare(claim, ours[0], ours[1], round(printed_mean[0] - printed_mean[1], 2), side, False))
    lm_kd, none = ({**find(records, "dev.f1", "finetune_glue", row=f"ablation_{key}", task="mnli").values} for key in ("lm_kd", "none"))
    known = "mnli" in tasks
    difference = round(paper[7][ABLATION["lm_kd"], "MNLI (f1)"] - paper[7][ABLATION["none"], "MNLI (f1)"], 2)
    claim = "Table 7, MNLI f1: KnGPT2 + LM + KD above KnGPT2 without pre-training, points"
    lines.append(compare(claim, lm_kd if known else {}, none if known else {}, difference, 1, False))
    return pandas.DataFrame(lines)
