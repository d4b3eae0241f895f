"""The tables and claims of the notebooks beyond the paper: nothing is printed there, so ours stand alone."""

from collections.abc import Callable
from functools import partial

import pandas

from kn.report.labels import TASKS
from kn.report.metrics import SeedValues, before_finetuning, glue_score, mean_over, select_metric
from kn.report.orderings import compare
from kn.report.statistics import Values, paired
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


def shares_of(records: list[dict], start: str) -> list[float]:
    """The shares of the light pre-training that were run from a start, from 0 (the start itself) to 1."""
    healed = {record["fields"]["share"] for record in records
              if record["stage"] == "heal" and record["fields"]["start"] == start}
    return sorted(share for share in {0.0, 1.0, *healed}
                  if from_start(records, start, share, "perplexity").values)


def from_start(records: list[dict], start: str, share: float, path: str) -> SeedValues:
    """A metric of the model that a share of the light pre-training makes from "svd" or "aligned"."""
    if share == 0:
        return select_metric(records, path, "decompose" if start == "svd" else "aligned")
    if start == "svd" and share == 1:
        return select_metric(records, path, "pretrain", on="web", objective="lm_kd")
    return select_metric(records, path, "heal", start=start, share=share)


def ratio(numerator: SeedValues, denominator: SeedValues) -> SeedValues:
    """numerator / denominator by seed; a denominator in which nothing is random serves every seed."""
    pairs = paired(numerator.values, denominator.values)
    return SeedValues({seed: above / below for seed, (above, below) in pairs.items()}, numerator.stages)


def glue_average(records: list[dict], start: str, share: float) -> Values:
    """Mean dev score over the tasks that were fine-tuned on, by seed."""
    scores = [glue_score(records, glue_row(start, share), task).values for task in _tasks(records)]
    return mean_over([values for values in scores if values])


def _tasks(records: list[dict]) -> list[str]:
    """The tasks that models with an aligned start were fine-tuned on."""
    found = {record["fields"]["task"] for record in records
             if record["stage"] == "finetune_glue" and record["fields"]["row"].startswith("aligned@")}
    return [task for task in TASKS if task in found]


def alignment(builder: TableBuilder, records: list[dict], profile: str) -> None:
    """The table of beyond_alignment: perplexities, their ratios to the teacher's, tokens, GLUE scores."""
    teacher = {domain: before_finetuning(records, "teacher", f"perplexity.{domain}.test")
               for domain in DOMAINS}

    def add(row: str, method: dict, perplexity: dict[str, SeedValues], glue_row: str = "",
            tokens: SeedValues | None = None) -> None:
        builder.methods[row] = method
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

    def add_trained(row: str, start: str, share: float) -> None:
        perplexity = {d: from_start(records, start, share, f"perplexity.{d}.test") for d in DOMAINS}
        tokens = from_start(records, start, share, "tokens") if share else None
        add(row, {"method": start, "share": share}, perplexity, glue_row(start, share), tokens)

    add("GPT-2 (teacher)", {"method": "teacher"}, teacher, "teacher")
    add_trained("SVD start", "svd", 0.0)
    starts = [record for record in records if record["stage"] == "aligned"]
    for name in starts[0]["metrics"]["ingredients"] if starts else ():  # a name without dots
        add(f"Aligned: {name}", {"method": name, "share": 0.0},
            {d: select_metric(records, f"ingredients.{name}.{d}.test", "aligned") for d in DOMAINS})
    add_trained(ALIGNED_ROW, "aligned", 0.0)
    for start in STARTS:
        for share in shares_of(records, start)[1:]:
            add_trained(f"{STARTS_SHOWN[start]} + {share:g} of the light pre-training", start, share)
    builder.add(ALIGNED_ROW, "seconds of calibration", select_metric(records, "seconds", "aligned"),
                "calibration", "s")


def _alignment_claims(records: list[dict]) -> list[dict]:
    lines = []
    shares = shares_of(records, "aligned")
    when = {share: f"After {share:g} of the light pre-training" if share else "Before training"
            for share in shares}
    for domain, name in DOMAINS.items():
        path = f"perplexity.{domain}.test"
        teacher = before_finetuning(records, "teacher", path).values
        aligned = from_start(records, "aligned", 0, path).values
        claim = (f"Before training, {name}: aligned start at most {GOAL:g} times the teacher's perplexity, "
                 "ratio")
        lines.append(compare(claim, aligned, teacher, None, -1, True, GOAL))
        for share in shares:
            if share in shares_of(records, "svd"):
                left, right = (from_start(records, start, share, path).values for start in ("aligned", "svd"))
                claim = f"{when[share]}, {name}: aligned below SVD start, ratio"
                lines.append(compare(claim, left, right, None, -1, True))
        claim = ("Share of the light pre-training after which the aligned start is as good as the SVD start "
                 f"after all of it, {name}: at most {TENTH:g}")
        lines.append(compare(claim, share_needed(records, path), {None: 0.0}, None, -1, False, TENTH))
    tasks = ", ".join(TASKS[task] for task in _tasks(records))
    for share in shares:
        left, right = (glue_average(records, start, share) for start in ("aligned", "svd"))
        if left and right:
            claim = f"{when[share]}, fine-tuned on {tasks}: aligned above SVD start, points"
            lines.append(compare(claim, left, right, None, 1, False))
    return lines


def share_needed(records: list[dict], path: str) -> Values:
    """By seed, the first share of the light pre-training after which the aligned start is as good (a metric
    as low) as the SVD start after all of it; seeds without one are left out."""
    found: Values = {}
    target = from_start(records, "svd", 1.0, path).values
    for share in shares_of(records, "aligned"):
        for seed, value in from_start(records, "aligned", share, path).values.items():
            if seed in target and value <= target[seed]:
                found.setdefault(seed, share)
    return found


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

    def add(row: str, perplexities: dict[str, str], metric: Callable[[str], SeedValues]) -> None:
        for column, path, name in (("parameters", "without_head", COUNT),
                                   ("parameters in all", "total", "parameters")):
            count = metric(f"parameters.{path}")
            builder.add(row, column, count.map(lambda value: value / 1e6), name, "M")
        for when, prefix in perplexities.items():
            for domain in DOMAINS:
                builder.add(row, f"{when}, {domain}", metric(f"{prefix}perplexity.{domain}.test"),
                            "test perplexity", "perplexity")

    for model, row in (("teacher", "GPT-2 (teacher)"), ("baseline", "DistilGPT2")):
        add(row, {"as made": ""}, partial(before_finetuning, records, model))
        builder.methods[row] = {"method": model}
    for method, spec in COMPRESSION_GRID:
        row = title(method, spec)
        add(row, {"as made": "start.", "trained": ""}, partial(compressed_metric, records, method, spec))
        variant = f" rank {spec['rank']}" if "rank" in spec else " tied" if "head" in spec else ""
        builder.methods[row] = {"method": method, "layers": spec["layers"],
                                "factor": f"{spec['factor']}{variant}"}


def _compression_claims(records: list[dict]) -> list[dict]:
    lines = []
    grid = [(method, name, spec, when, prefix)
            for method, name in BASELINES.items()
            for other, spec in COMPRESSION_GRID if other == method and ("aligned", spec) in COMPRESSION_GRID
            for when, prefix in (("as made", "start."), ("after a short training", ""))]
    for method, name, spec, when, prefix in grid:
        if method == "narrow" and prefix:  # the same function as the aligned start, until B is trained
            continue
        model = f"{spec['layers'].capitalize()} layers, factor {spec['factor']}"
        for domain in DOMAINS:
            left, right = (compressed_metric(records, made, spec, f"{prefix}perplexity.{domain}.test").values
                           for made in ("aligned", method))
            claim = f"{model}, {when}, {SHORT[domain]}: aligned start below {name}, ratio"
            lines.append(compare(claim, left, right, None, -1, True))
    return lines
