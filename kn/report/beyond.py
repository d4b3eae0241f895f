"""The tables and claims of the notebooks beyond the paper: nothing is printed there, so ours stand alone.

alignment(…)        before training: teacher, SVD start, each ingredient, aligned start; then against tokens
compression(…)      models of many sizes: parameters, perplexity as made and after a short training
beyond_claims(…)    left against right, paired by seed: a line like those of report.trends
"""

from __future__ import annotations

import math

import pandas

from kn.report.metrics import TASKS, SeedValues, before_finetuning, glue_score, mean_over, select_metric
from kn.report.orderings import compare
from kn.report.statistics import Values
from kn.report.table_builder import COUNT, TableBuilder
from kn.suite.plan import BEYOND
from kn.suite.planner import COMPRESSION_GRID, STARTS, glue_row

STARTS_SHOWN = {"svd": "SVD start", "aligned": "Aligned start"}
DOMAINS = {"web": "web text (calibration)", "wiki": "wiki text (another domain)"}
GOAL = 1.2  # times the teacher's perplexity that the aligned start should stay below without training
TENTH = 0.1  # share of the SVD start's training that should be enough for the aligned start
METHODS = {**STARTS_SHOWN, "narrow": "Narrow (pruned, refitted)", "lowrank": "Low-rank products"}
BASELINES = {"svd": "SVD start", "narrow": "the narrow model", "lowrank": "low-rank products"}
ALIGNED_ROW = "Aligned start: all, dense layers corrected"
SHORT = {domain: name.partition(" (")[0] for domain, name in DOMAINS.items()}


def known(name: str) -> str:
    """The name of a notebook beyond the tables; ValueError for another one."""
    if name not in BEYOND:
        raise ValueError(f"{name!r} is not a notebook beyond the tables: allowed are {' and '.join(BEYOND)}")
    return name


def beyond_claims(name: str, records: list[dict]) -> pandas.DataFrame:
    """The claims of a notebook, judged on our numbers as in report.trends; ValueError for others."""
    judged = {"beyond_alignment": _alignment_claims, "beyond_compression": _compression_claims}
    return pandas.DataFrame(judged[known(name)](records))


# ---------------------------------------------------------------- beyond_alignment


def shares_of(records: list[dict], start: str) -> list[float]:
    """The shares of the light pre-training that were run from a start, from 0 (the start itself) to 1."""
    trained = [record["fields"] for record in records if record["stage"] == "heal"]
    found = {fields["share"] for fields in trained if fields["start"] == start}
    if from_start(records, start, 0, "perplexity").values:
        found.add(0.0)
    if start == "svd" and from_start(records, start, 1, "tokens").values:
        found.add(1.0)
    return sorted(found)


def from_start(records: list[dict], start: str, share: float, path: str) -> SeedValues:
    """A metric of the model that a share of the light pre-training makes from "svd" or "aligned"."""
    if share == 0:
        return select_metric(records, path, "decompose" if start == "svd" else "aligned")
    if start == "svd" and share == 1:
        return select_metric(records, path, "pretrain", on="web", objective="lm_kd")
    return select_metric(records, path, "heal", start=start, share=share)


def ratio(numerator: SeedValues, denominator: SeedValues) -> SeedValues:
    """numerator / denominator by seed; a denominator in which nothing is random serves every seed."""
    below = denominator.values
    values = {seed: value / below.get(seed, below.get(None, math.nan))
              for seed, value in numerator.values.items()}
    return SeedValues({seed: value for seed, value in values.items() if not math.isnan(value)},
                      numerator.stages)


def glue_average(records: list[dict], start: str, share: float) -> Values:
    """Mean dev score over the tasks that were fine-tuned on, by seed."""
    scores = [glue_score(records, glue_row(start, share), task).values for task in _tasks(records)]
    return mean_over([values for values in scores if values])


def _tasks(records: list[dict]) -> list[str]:
    """The tasks that models with an aligned start were fine-tuned on."""
    tuned = [record["fields"] for record in records if record["stage"] == "finetune_glue"]
    found = {fields["task"] for fields in tuned if fields["row"].startswith("aligned@")}
    return [task for task in TASKS if task in found]


def alignment(builder: TableBuilder, records: list[dict], profile: str) -> None:
    """The table of beyond_alignment: perplexities, their ratios to the teacher's, tokens, GLUE scores."""
    teacher = {domain: before_finetuning(records, "teacher", f"perplexity.{domain}.test")
               for domain in DOMAINS}

    def add(row: str, perplexity: dict[str, SeedValues], glue_row: str = "",
            tokens: SeedValues | None = None) -> None:
        for domain, name in DOMAINS.items():
            builder.add(row, name, perplexity[domain], "test perplexity", "perplexity")
        for domain in DOMAINS:
            relative = ratio(perplexity[domain], teacher[domain])
            builder.add(row, f"times the teacher's, {SHORT[domain]}", relative, "ratio of perplexities")
        if tokens and tokens.values:
            builder.add(row, "thousand tokens", tokens.map(lambda count: count / 1e3), "tokens", "thousands")
        for task in _tasks(records):
            scores = glue_score(records, glue_row, task)
            if scores.values:
                builder.add(row, f"{TASKS[task]}, fine-tuned", scores, "dev score", "%")

    def perplexities(start: str, share: float) -> dict[str, SeedValues]:
        return {domain: from_start(records, start, share, f"perplexity.{domain}.test") for domain in DOMAINS}

    add("GPT-2 (teacher)", teacher, "teacher")
    add("SVD start", perplexities("svd", 0), glue_row("svd", 0))
    starts = [record for record in records if record["stage"] == "aligned"]
    for ingredient in starts[0]["metrics"]["ingredients"] if starts else ():  # a name without dots
        path = f"ingredients.{ingredient}"
        add(f"Aligned: {ingredient}",
            {d: select_metric(records, f"{path}.{d}.test", "aligned") for d in DOMAINS})
        builder.methods[f"Aligned: {ingredient}"] = {"method": ingredient, "share": 0.0}
    add(ALIGNED_ROW, perplexities("aligned", 0), glue_row("aligned", 0))
    builder.methods |= {"GPT-2 (teacher)": {"method": "teacher"},
                        "SVD start": {"method": "svd", "share": 0.0}}
    builder.methods[ALIGNED_ROW] = {"method": "aligned", "share": 0.0}
    for start in STARTS:
        for share in shares_of(records, start)[1:]:
            row = f"{STARTS_SHOWN[start]} + {share:g} of the light pre-training"
            tokens = from_start(records, start, share, "tokens")
            add(row, perplexities(start, share), glue_row(start, share), tokens)
            builder.methods[row] = {"method": start, "share": share}
    builder.add(ALIGNED_ROW, "seconds of calibration", select_metric(records, "seconds", "aligned"),
                "calibration", "s")


def _alignment_claims(records: list[dict]) -> list[dict]:
    lines = []
    for domain, name in DOMAINS.items():
        path = f"perplexity.{domain}.test"
        teacher = before_finetuning(records, "teacher", path).values
        aligned = from_start(records, "aligned", 0, path).values
        claim = f"aligned start at most {GOAL:g} times the teacher's perplexity, ratio"
        lines.append(compare(f"Before training, {name}: {claim}", aligned, teacher, None, -1, True,
                             bound=GOAL))
        for share in shares_of(records, "aligned"):
            if share in shares_of(records, "svd"):
                left, right = (from_start(records, start, share, path).values for start in ("aligned", "svd"))
                claim = f"{_when(share)}, {name}: aligned below SVD start, ratio"
                lines.append(compare(claim, left, right, None, -1, True))
        claim = (
            "Share of the light pre-training after which the aligned start is as good as the SVD start after "
            f"all of it, {name}: at most {TENTH:g}"
        )
        lines.append(compare(claim, share_needed(records, path), {None: 0.0}, None, -1, False, bound=TENTH))
    tasks = ", ".join(TASKS[task] for task in _tasks(records))
    for share in shares_of(records, "aligned"):
        left, right = (glue_average(records, start, share) for start in ("aligned", "svd"))
        if left and right:
            claim = f"{_when(share)}, fine-tuned on {tasks}: aligned above SVD start, points"
            lines.append(compare(claim, left, right, None, 1, False))
    return lines


def _when(share: float) -> str:
    return f"After {share:g} of the light pre-training" if share else "Before training"


def share_needed(records: list[dict], path: str) -> Values:
    """By seed, the first share of the light pre-training after which the aligned start is as good (a metric as
    low) as the SVD start after all of it; seeds without one are left out."""
    found: Values = {}
    target = from_start(records, "svd", 1.0, path).values
    for share in shares_of(records, "aligned"):
        for seed, value in from_start(records, "aligned", share, path).values.items():
            if seed in target and value <= target[seed]:
                found.setdefault(seed, share)
    return found


# ---------------------------------------------------------------- beyond_compression


def title(method: str, spec: dict) -> str:
    """The row of a model in beyond_compression."""
    variant = f", rank {spec['rank']}" if "rank" in spec else ", tied head" if "head" in spec else ""
    return f"{METHODS[method]}, {spec['layers']} layers, factor {spec['factor']}{variant}"


def compressed_metric(records: list[dict], method: str, spec: dict, path: str) -> SeedValues:
    """A metric of one model of beyond_compression."""
    name = "-".join(f"{key}_{value}" for key, value in spec.items())
    return select_metric(records, path, "compressed", method=method, spec=name)


def compression(builder: TableBuilder, records: list[dict], profile: str) -> None:
    """The table of beyond_compression: parameters, and perplexity as made and after a short training."""
    sizes = {"parameters": ("parameters.without_head", COUNT),
             "parameters in all": ("parameters.total", "parameters")}
    for model, row in (("teacher", "GPT-2 (teacher)"), ("baseline", "DistilGPT2")):
        for column, (path, metric) in sizes.items():
            values = select_metric(records, path, "pretrained", model=model)
            builder.add(row, column, values.map(lambda value: value / 1e6), metric, "M")
        for domain in DOMAINS:
            values = before_finetuning(records, model, f"perplexity.{domain}.test")
            builder.add(row, f"as made, {domain}", values, "test perplexity", "perplexity")
        builder.methods[row] = {"method": model}
    for method, spec in COMPRESSION_GRID:
        row = title(method, spec)
        for column, (path, metric) in sizes.items():
            values = compressed_metric(records, method, spec, path)
            builder.add(row, column, values.map(lambda value: value / 1e6), metric, "M")
        for when, prefix in (("as made", "start."), ("trained", "")):
            for domain in DOMAINS:
                values = compressed_metric(records, method, spec, f"{prefix}perplexity.{domain}.test")
                builder.add(row, f"{when}, {domain}", values, "test perplexity", "perplexity")
        variant = f" rank {spec['rank']}" if "rank" in spec else " tied" if "head" in spec else ""
        builder.methods[row] = {"method": method, "layers": spec["layers"],
                                "factor": f"{spec['factor']}{variant}"}


def _compression_claims(records: list[dict]) -> list[dict]:
    lines = []
    for baseline, name in BASELINES.items():
        specs = [spec for method, spec in COMPRESSION_GRID if method == baseline]
        for spec in (spec for spec in specs if ("aligned", spec) in COMPRESSION_GRID):
            for when, prefix in (("as made", "start."), ("after a short training", "")):
                # the same function as the aligned start, until B is trained
                if baseline == "narrow" and prefix:
                    continue
                for domain in DOMAINS:
                    path = f"{prefix}perplexity.{domain}.test"
                    left, right = (compressed_metric(records, m, spec, path).values
                                   for m in ("aligned", baseline))
                    model = f"{spec['layers'].capitalize()} layers, factor {spec['factor']}"
                    claim = f"{model}, {when}, {SHORT[domain]}: aligned start below {name}, ratio"
                    lines.append(compare(claim, left, right, None, -1, True))
    return lines
