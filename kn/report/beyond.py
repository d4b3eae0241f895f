"""What the notebooks beyond the paper show: tables with the columns of the others (nothing is printed there, so nothing is compared with the paper), and claims.

table("beyond_alignment", records)       before training: teacher, SVD start, each ingredient, aligned start; then against tokens of training
table("beyond_compression", records)     models of many sizes: parameters, perplexity as made and after a short training
claims("beyond_alignment", records)      left against right, paired by seed: a line like those of report.trends
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from kn.report.statistics import Values
from kn.report.tables import TASKS, Found, Sheet, before_finetuning, find
from kn.suite.plan import BEYOND, COMPRESSION_GRID, STARTS, glue_row

if TYPE_CHECKING:
    import pandas

NAMES = {"svd": "SVD start", "aligned": "Aligned start"}
DOMAINS = {"web": "web text (calibration)", "wiki": "wiki text (another domain)"}
GOAL = 1.2  # times the teacher's perplexity that the aligned start should stay below without training
TENTH = 0.1  # of the SVD start's training that should do for the aligned start
METHODS = {"aligned": "Aligned start", "svd": "SVD start", "narrow": "Narrow (pruned, refitted)", "lowrank": "Low-rank products"}
OTHERS = {"svd": "SVD start", "narrow": "the narrow model", "lowrank": "low-rank products"}


def sheet_of(name: str, records: list[dict]) -> Sheet:
    """The filled sheet of one notebook; ValueError for another name."""
    sheet = Sheet(name)
    {"beyond_alignment": _alignment, "beyond_compression": _compression}[_known(name)](sheet, records)
    return sheet


def table(name: str, records: list[dict]) -> pandas.DataFrame:
    """The table of one notebook, with the columns of tables.COLUMNS; ValueError for another name."""
    return sheet_of(name, records).frame()


def claims(name: str, records: list[dict]) -> pandas.DataFrame:
    """What the notebook claims, held by our own numbers or not: the columns of report.trends."""
    import pandas

    return pandas.DataFrame({"beyond_alignment": _alignment_claims, "beyond_compression": _compression_claims}[_known(name)](records))


def _known(name: str) -> str:
    if name not in BEYOND:
        raise ValueError(f"{name!r} is not a notebook beyond the tables: allowed are {' and '.join(BEYOND)}")
    return name


def shares_of(records: list[dict], start: str) -> list[float]:
    """The shares of the light pre-training that were run from a start, 0 and 1 included where they were."""
    found = {record["fields"]["share"] for record in records if record["stage"] == "heal" and record["fields"]["start"] == start}
    found |= {0.0} if find(records, "perplexity", {"svd": "decompose", "aligned": "aligned"}[start]).values else set()
    return sorted(found | ({1.0} if start == "svd" and find(records, "tokens", "pretrain", on="web", objective="lm_kd").values else set()))


def started(records: list[dict], start: str, share: float, path: str) -> Found:
    """A value of the model that comes from a start by a share of the light pre-training."""
    if share == 0:
        return find(records, path, "decompose" if start == "svd" else "aligned")
    if start == "svd" and share == 1:
        return find(records, path, "pretrain", on="web", objective="lm_kd")
    return find(records, path, "heal", start=start, share=share)


def ratio(above: Found, below: Found) -> Found:
    """above / below, by seed where both have seeds."""
    values = {seed: value / below.values.get(seed, below.values.get(None, math.nan)) for seed, value in above.values.items()}
    return Found({seed: value for seed, value in values.items() if not math.isnan(value)}, above.stages)


def twins(records: list[dict], start: str, share: float) -> Found:
    """Mean dev score over the tasks that were fine-tuned on, by seed."""
    row = glue_row(start, share)
    parts = [found for task in TASKS if (found := find(records, "dev.headline", "finetune_glue", row=row, task=task)).values and task in _tasks(records)]
    seeds = [seed for seed in parts[0].values if all(seed in part.values for part in parts)] if parts else []
    return Found({seed: sum(part.values[seed] for part in parts) / len(parts) for seed in seeds}, sum((part.stages for part in parts), []))


def _tasks(records: list[dict]) -> set[str]:
    """The tasks that models with an aligned start were fine-tuned on."""
    return {record["fields"]["task"] for record in records if record["stage"] == "finetune_glue" and record["fields"]["row"].startswith("aligned@")}


def _alignment(sheet: Sheet, records: list[dict]) -> None:
    teacher = {domain: before_finetuning(records, "teacher", f"perplexity.{domain}.test") for domain in DOMAINS}
    alone: dict[str, dict] = next((record["metrics"]["ingredients"] for record in records if record["stage"] == "aligned"), {})
    rows = {"GPT-2 (teacher)": (teacher.get, "teacher", Found()), "SVD start": (_path(records, "svd", 0), glue_row("svd", 0), Found())}
    rows |= {f"Aligned: {key}": (lambda domain, key=key: _ingredient(records, key, domain), "", Found()) for key in alone}
    rows["Aligned start: all, dense layers corrected"] = (_path(records, "aligned", 0), glue_row("aligned", 0), Found())
    for start in STARTS:
        for share in shares_of(records, start)[1:]:
            rows[f"{NAMES[start]} + {share:g} of the light pre-training"] = (_path(records, start, share), glue_row(start, share), started(records, start, share, "tokens"))
    for row, (perplexity, fine_tuned, tokens) in rows.items():
        for domain, name in DOMAINS.items():
            sheet.add(row, name, perplexity(domain), "test perplexity", "perplexity")
        for domain, name in DOMAINS.items():
            sheet.add(row, f"times the teacher's, {name.partition(' (')[0]}", ratio(perplexity(domain), teacher[domain]), "ratio of perplexities")
        if tokens.values:
            sheet.add(row, "thousand tokens", tokens.map(lambda count: count / 1e3), "tokens", "thousands")
        for task in (task for task in TASKS if task in _tasks(records)):
            scores = find(records, "dev.headline", "finetune_glue", row=fine_tuned, task=task)
            if scores.values:
                sheet.add(row, f"{TASKS[task]}, fine-tuned", scores, "dev score", "%")
    sheet.add("Aligned start: all, dense layers corrected", "seconds of calibration", find(records, "seconds", "aligned"), "calibration", "s")


def _path(records: list[dict], start: str, share: float):
    return lambda domain: started(records, start, share, f"perplexity.{domain}.test")


def _ingredient(records: list[dict], key: str, domain: str) -> Found:
    """Perplexity of one ingredient; its name holds commas, not dots."""
    return find(records, f"ingredients.{key}.{domain}.test", "aligned")


def _alignment_claims(records: list[dict]) -> list[dict]:
    from kn.report.trends import compare

    lines = []
    for domain, name in DOMAINS.items():
        path = f"perplexity.{domain}.test"
        teacher, aligned = before_finetuning(records, "teacher", path).values, started(records, "aligned", 0, path).values
        claim = f"Before training, {name}: aligned start at most {GOAL:g} times the teacher's perplexity, ratio"
        lines.append(below(compare(claim, aligned, teacher, None, 1, True), GOAL))
        for share in (share for share in shares_of(records, "aligned") if share in shares_of(records, "svd")):
            claim = f"{_when(share)}, {name}: aligned below SVD start, ratio"
            left, right = (started(records, start, share, path).values for start in ("aligned", "svd"))
            lines.append(compare(claim, left, right, None, -1, True))
        claim = f"Share of the light pre-training after which the aligned start is as good as the SVD start after all of it, {name}: at most {TENTH:g}"
        lines.append(below(compare(claim, tokens_needed(records, path), {None: 0.0}, None, 1, False), TENTH))
    tasks = ", ".join(TASKS[task] for task in TASKS if task in _tasks(records))
    for share in shares_of(records, "aligned"):
        left, right = (twins(records, start, share).values for start in ("aligned", "svd"))
        if left and right:
            lines.append(compare(f"{_when(share)}, fine-tuned on {tasks}: aligned above SVD start, points", left, right, None, 1, False))
    return lines


def _when(share: float) -> str:
    return f"After {share:g} of the light pre-training" if share else "Before training"


def below(line: dict, bound: float) -> dict:
    """The same line, judged by a bound: held where the whole interval (without a spread: the value) stays at or below it, not held where it lies above."""
    if not line["n"]:
        return line
    low, high = (line["ours"] if math.isnan(value) else value for value in (line["low"], line["high"]))
    if math.isnan(line["low"]) and line["n"] == 1:
        return {**line, "verdict": "one seed: undecided"}
    return {**line, "verdict": "held" if high <= bound else "not held" if low > bound else "undecided"}


def tokens_needed(records: list[dict], path: str) -> Values:
    """Per seed, the share of the light pre-training's tokens after which the aligned start first is at least as good as the SVD start after all of them; left out where it never is."""
    found: Values = {}
    goal = started(records, "svd", 1.0, path).values
    for share in shares_of(records, "aligned"):
        for seed, value in started(records, "aligned", share, path).values.items():
            if seed in goal and value <= goal[seed]:
                found.setdefault(seed, share)
    return found


def title(method: str, spec: dict) -> str:
    """A row of beyond_compression."""
    parts = [f"{spec['layers']} layers", f"factor {spec['factor']}", *([f"rank {spec['rank']}"] if "rank" in spec else []), *(["tied head"] if "head" in spec else [])]
    return f"{METHODS[method]}, {', '.join(parts)}"


def sized(records: list[dict], method: str, spec: dict, path: str) -> Found:
    """A value of one model of beyond_compression."""
    return find(records, path, "compressed", method=method, spec="-".join(f"{key}_{value}" for key, value in spec.items()))


def _compression(sheet: Sheet, records: list[dict]) -> None:
    size = "parameters.without_head"
    for model, row in (("teacher", "GPT-2 (teacher)"), ("baseline", "DistilGPT2")):
        for column, path in (("parameters", size), ("parameters in all", "parameters.total")):
            sheet.add(row, column, find(records, path, "pretrained", model=model).map(lambda value: value / 1e6), "parameters" + " without the output embedding" * (path == size), "M")
        for domain in DOMAINS:
            sheet.add(row, f"as made, {domain}", before_finetuning(records, model, f"perplexity.{domain}.test"), "test perplexity", "perplexity")
    for method, spec in COMPRESSION_GRID:
        row = title(method, spec)
        sheet.add(row, "parameters", sized(records, method, spec, size).map(lambda value: value / 1e6), "parameters without the output embedding", "M")
        sheet.add(row, "parameters in all", sized(records, method, spec, "parameters.total").map(lambda value: value / 1e6), "parameters", "M")
        for when, path in (("as made", "start."), ("trained", "")):
            for domain in DOMAINS:
                sheet.add(row, f"{when}, {domain}", sized(records, method, spec, f"{path}perplexity.{domain}.test"), "test perplexity", "perplexity")


def _compression_claims(records: list[dict]) -> list[dict]:
    from kn.report.trends import compare

    lines = []
    for other in OTHERS:
        for method, spec in COMPRESSION_GRID:
            if method != other or ("aligned", spec) not in COMPRESSION_GRID:
                continue
            for when, path in (("as made", "start."), ("after a short training", "")):
                if other == "narrow" and path:  # the same function, until B is trained
                    continue
                for domain, name in DOMAINS.items():
                    left, right = (sized(records, m, spec, f"{path}perplexity.{domain}.test").values for m in ("aligned", other))
                    claim = f"{spec['layers'].capitalize()} layers, factor {spec['factor']}, {when}, {name.partition(' (')[0]}: aligned start below {OTHERS[other]}, ratio"
                    lines.append(compare(claim, left, right, None, -1, True))
    return lines
