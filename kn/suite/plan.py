"""Every kind of stage with its fields, settings, inputs and cost, and which of them a table needs.

This file imports nothing heavy, so that planning is quick; the work is in train.py and starts.py.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

from kn.files import ASSETS, file_sha256
from kn.files import PROJECT_ROOT as ROOT
from kn.suite.devices import precision
from kn.suite.profiles import Profile, Readings, Training
from kn.suite.store import Stage, StoreError

BENCHMARKS = ROOT / "benchmarks"  # speed-<device>.csv, shown on the index page and judged by the ledger
TASKS = ("cola", "rte", "mrpc", "sst2", "mnli", "qnli", "qqp")
ONE_SENTENCE = ("cola", "sst2")
ROWS = ("teacher", "baseline", "baseline_kd", "student", "student_ilkd")
METHODS = {"baseline_kd": "vanilla", "student_ilkd": "ilkd"}
METHOD_READINGS = {  # the readings that a training by each method depends on; the others leave its key, and its result, as they are
    "none": (), "vanilla": ("kd_weight", "temperature"), "ilkd": ("direction", "hidden_point", "logit_term", "temperature"),
}  # fmt: skip
OBJECTIVES = ("lm", "kd", "lm_kd")
TABLES = range(1, 8)
BEYOND = ("beyond_alignment", "beyond_compression")  # notebooks beyond the paper's tables
LEDGER = "claims"  # the notebook that judges every claim
NOTEBOOKS = (*TABLES, *BEYOND, LEDGER)
STARTS = ("svd", "aligned")
COMPRESSION_GRID: list[tuple[str, dict[str, Any]]] = [  # of beyond_compression: (method, KroneckerSpec's fields); lowrank and narrow have the parameters of the Kronecker model of that spec
    *(("aligned", {"layers": layers, "factor": factor}) for layers in ("odd", "all") for factor in (2, 4, 8)),
    *(("svd", {"layers": layers, "factor": factor}) for layers in ("odd", "all") for factor in (2, 4)),
    ("svd", {"layers": "odd", "factor": 4, "rank": 2}), ("svd", {"layers": "odd", "factor": 2, "head": "tied"}),
    *((method, {"layers": layers, "factor": factor}) for method in ("narrow", "lowrank") for layers, factor in (("odd", 2), ("all", 2), ("all", 4))),
]  # fmt: skip
FACTORS = {"lm": 2.7, "lm_ilkd": 4.2, "glue": 3.0, "glue_ilkd": 4.5}  # FLOPs of a step over those of the teacher's forward pass
TOKENS = {  # of a pre-training, of the wiki corpus, of a GLUE row: for estimates of cost only
    "documentation": {"sample": 119_000, "wiki": 610_000, "row": 21},
    "mirror": {"sample": 900_000_000, "wiki": 118_000_000, "row": 45},  # 10 % of OpenWebText's 9 billion
}


@functools.cache
def asset_digest(folder: Path) -> str:
    """One hash for all files of an asset folder; StoreError says what is missing and how to mend it."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    if not any(p.suffix in (".safetensors", ".json") for p in files):
        raise StoreError(f"the pretrained model {folder} is missing: restore it with `git checkout -- {folder.relative_to(ROOT)}`")
    listed = folder.parent / "SHA256SUMS"
    known = {name: digest for digest, name in map(str.split, listed.read_text().splitlines())} if listed.exists() else {}
    for path in files:
        name = path.relative_to(folder.parent).as_posix()
        if known.get(name) != file_sha256(path):
            raise StoreError(f"{path} is damaged (its sha256 is not the one in SHA256SUMS): restore it with `git checkout -- {path.relative_to(ROOT)}`")
    missing = [n for n in known if n.startswith(folder.name + "/") and not (folder.parent / n).exists()]
    if missing:
        raise StoreError(f"{folder.parent / missing[0]} is missing: restore it with `git checkout -- {folder.relative_to(ROOT)}`")
    return file_sha256(listed)


def carried_digest(file: str) -> str:
    """sha256 of a corpus file (python -m kn corpus FILE); StoreError where it is not there."""
    if not Path(file).is_file():
        raise StoreError(f"text.file={file} is not there: make it with `python -m kn corpus {file}` in an environment with the pins")
    return file_sha256(Path(file))


@functools.cache
def pins(names: tuple[str, ...]) -> dict[str, str]:
    """Installed versions of the packages whose documentation is the corpus; StoreError names one that is not installed."""
    where = packages_distributions()
    missing = [name for name in names if name not in where]
    if missing:
        raise StoreError(f"package {missing[0]!r} is not installed, mini's corpus is made of its documentation: run ./run_all.sh to set up the pins")
    return {name: version(where[name][0]) for name in names}


def row_of(start: str, share: float) -> str:
    """The GLUE row of a model of beyond_alignment; the SVD start after the whole light pre-training is Table 5's KnGPT2."""
    return "student" if (start, share) == ("svd", 1) else f"{start}@{share:g}"


def table_of(kind: str, fields: dict) -> int | str:
    """The first table, or what lies beyond them, that makes a stage of this kind: for `--only`."""
    if kind in ("aligned", "heal", "compressed") or "@" in str(fields.get("row")):
        return "beyond"
    if kind == "finetune_glue":
        return 7 if fields["row"].startswith("ablation") else 5
    wiki = kind == "pretrain" and fields["on"] == "wiki"
    return 7 if wiki else {"shapes": 1, "finetune_lm": 4, "twins": 5, "glue": 5, "twin_check": 5, "score": 6}.get(kind, 3)


def stage(kind: str, settings: dict, inputs: tuple[Stage, ...] = (), cost: float = 0.0, version: int = 1, resources: dict | None = None, amount: tuple[int, float] = (0, 0.0), **fields) -> Stage:
    """A Stage with its settings as canonical JSON; `amount` is (steps, tokens) of its training."""
    return Stage(kind, tuple(fields.items()), json.dumps(settings, sort_keys=True), inputs, version, cost, json.dumps(resources or {}), *amount)


class StagePlanner:
    """Builds the stages of one profile; every method is one kind."""

    def __init__(self, profile: Profile, without_mirror: bool = False):
        self.profile = p = profile
        self.precision = precision(p.device)
        self.counts, self.without_mirror = TOKENS[p.source], without_mirror
        self.resources, self.real = dataclasses.asdict(p.hardware), p.source == "mirror"
        blocks, head = 12 * p.model.layers * p.model.width**2, p.model.vocabulary * p.model.width
        self.forward = {"lm": 2 * (blocks + head), "glue": 2 * blocks}  # FLOPs a token of the teacher

    def train_settings(self, training: Training, by: str = "ilkd", /, **more) -> dict:
        """Settings of a training: its hyper-parameters, the readings that the method `by` depends on, the precision."""
        readings = {name: getattr(self.profile.readings, name) for name in METHOD_READINGS[by]}
        return {"training": dataclasses.asdict(training), "readings": dataclasses.asdict(Readings(**readings)), "precision": self.precision, **more}

    def amount(self, training: Training, all_tokens: int) -> tuple[int, float]:
        """Steps and tokens of a language-model run, for its cost."""
        batch = training.batch_size * self.profile.model.context
        tokens = training.max_steps * batch or training.epochs * all_tokens
        return math.ceil(tokens / batch), tokens

    def mirrored(self, *items: str) -> dict:
        """Settings of a stage that reads these items of the mirror."""
        from kn.data.hub import SourceError
        from kn.data.hub_text import digest

        try:
            return {"mirror": digest(items)}
        except SourceError:
            if self.without_mirror:  # a plan's costs are asked for before anything is fetched
                return {"mirror": {}}
            raise

    @functools.cached_property
    def corpus(self) -> Stage:
        """The text as token rows: the mirror's, or mini's documentation."""
        p = self.profile
        if self.real:
            shares = {"sample": p.text.sample, "sample_seed": p.text.sample_seed, "web_shares": p.text.web_shares, "limit": p.text.limit}
            return stage("corpus", {"text": shares, "context": p.model.context, **self.mirrored("gpt2", "wikitext", "openwebtext")}, amount=(0, self.counts["sample"] + self.counts["wiki"]))
        settings: dict[str, Any] = {"text": dataclasses.asdict(p.text), "context": p.model.context, "assets": p.assets}
        if p.assets:
            asset_digest(ASSETS / p.assets / "tokenizer")
        else:
            settings["vocabulary"] = p.model.vocabulary
        if p.text.file:
            settings["text"]["file"] = carried_digest(p.text.file)
            return stage("corpus", settings, cost=5e11, resources={"file": str(Path(p.text.file).absolute())})
        del settings["text"]["file"]
        return stage("corpus", {**settings, "pins": pins(p.text.web + p.text.wiki)}, cost=2.1e12)

    @functools.cached_property
    def twins(self) -> Stage:
        """GLUE's tasks: the real ones, or mini's stand-ins."""
        if self.real:
            return stage("glue", {"tasks": list(self.profile.glue.sizes), "limit": self.profile.glue.limit, **self.mirrored("glue")}, cost=1e13)
        return stage("twins", {"sizes": self.profile.glue.sizes, "seed": self.profile.glue.seed}, (self.corpus,), cost=2.7e11, version=3)

    @functools.cached_property
    def shapes(self) -> Stage:
        """Table 1's shapes and counts, of models that are built at both sizes."""
        return stage("shapes", {"model": dataclasses.asdict(self.profile.model), "compression": dataclasses.asdict(self.profile.compression)}, cost=3e10)

    def pretrained(self, model: str) -> Stage:
        """The "teacher" or the "baseline": from the mirror, committed, or trained here."""
        p = self.profile
        if self.real:
            name = {"teacher": "gpt2", "baseline": "distilgpt2"}[model]
            return stage("pretrained", {"precision": self.precision, "name": name, **self.mirrored(name)}, (self.corpus,), cost=1e14, model=model)
        if not p.assets:
            recipe = dataclasses.replace(p.teacher if model == "teacher" else p.baseline, precision=self.precision)
            before = () if model == "teacher" else (self.pretrained("teacher"),)
            amount = (recipe.steps, recipe.steps * recipe.batch * p.model.context)
            settings = {"recipe": dataclasses.asdict(recipe), "model": dataclasses.asdict(p.model), "precision": self.precision}
            return stage("pretrained", settings, (self.corpus, *before), FACTORS["lm"] * self.forward["lm"] * amount[1], amount=amount, model=model)
        return stage("pretrained", {"assets": p.assets, "digest": asset_digest(ASSETS / p.assets / model), "precision": self.precision}, (self.corpus,), cost=5e11, model=model)

    @functools.cached_property
    def decompose(self) -> Stage:
        """The SVD start: the teacher's matrices as nearest Kronecker products (eq. 1)."""
        return stage("decompose", {"compression": dataclasses.asdict(self.profile.compression), "precision": self.precision}, (self.pretrained("teacher"), self.corpus), cost=9e11, version=2)

    def pretrain(self, on: str, objective: str, seed: int) -> Stage:
        """The light pre-training of the SVD start on "web" (Table 3) or "wiki" (Table 7) text; objective "lm", "kd" or "lm_kd"."""
        training = self.profile.pretrain if on == "web" else self.profile.ablation
        amount = self.amount(training, self.counts["sample" if on == "web" else "wiki"])
        cost = self.forward["lm"] * FACTORS["lm" if objective == "lm" else "lm_ilkd"] * amount[1] + 1e11
        teacher = () if objective == "lm" else (self.pretrained("teacher"),)
        return stage(
            "pretrain",
            self.train_settings(training, "none" if objective == "lm" else "ilkd"),
            (self.corpus, self.decompose, *teacher),
            cost,
            resources=self.resources,
            amount=amount,
            on=on,
            objective=objective,
            seed=seed,
        )

    def calibration(self) -> dict:
        """Settings of what looks at calibration text."""
        return {"calibration": self.profile.beyond.calibration, "precision": self.precision}

    def aligned(self, seed: int) -> Stage:
        """The aligned start of beyond_alignment, and the teacher in its basis."""
        compression = {**dataclasses.asdict(self.profile.compression), "init": "aligned"}
        cost = 30 * self.forward["lm"] * self.profile.beyond.calibration * self.profile.model.context
        return stage("aligned", {"compression": compression, **self.calibration()}, (self.pretrained("teacher"), self.corpus), cost + 3e11, seed=seed)

    def healing(self, start: str, share: float) -> Training:
        """The light pre-training at the learning rate of a start."""
        p = self.profile
        rate = p.beyond.learning_rate if start != "svd" else p.beyond.svd_rate if share < 1 else p.pretrain.learning_rate
        return dataclasses.replace(p.pretrain, learning_rate=rate)

    def started(self, start: str, share: float, seed: int) -> Stage:
        """The model of beyond_alignment that comes from a start by a share of the light pre-training; share 0 is the start."""
        if share == 0:
            return self.decompose if start == "svd" else self.aligned(seed)
        if start == "svd" and share == 1:
            return self.pretrain("web", "lm_kd", seed)
        training = self.healing(start, share)
        steps, tokens = self.amount(training, self.counts["sample"])
        cost = self.forward["lm"] * FACTORS["lm_ilkd"] * share * tokens + 1e11
        inputs = (self.corpus, self.started(start, 0, seed), self.pretrained("teacher"))
        return stage("heal", self.train_settings(training), inputs, cost, resources=self.resources, amount=(math.ceil(share * steps), share * tokens), start=start, share=share, seed=seed)

    def compressed(self, method: str, spec: dict, seed: int) -> Stage:
        """One model of beyond_compression: how it was made, its size, before and after a short pre-training.

        The profile's own configuration is beyond_alignment's, not made twice; a narrow model begins from the aligned one.
        """
        p = self.profile
        share, training = p.beyond.share, self.healing(method, p.beyond.share)
        steps, tokens = self.amount(training, self.counts["sample"])
        name, usual = "-".join(f"{key}_{value}" for key, value in spec.items()), dataclasses.asdict(p.compression)
        compression = {**usual, "embedding_factor": 2, **spec}
        own = compression == {**usual, "embedding_factor": usual["factor"]}
        there = own and method in STARTS
        before: tuple[Stage, ...] = (self.started(method, 0, seed), self.started(method, share, seed)) if there else ()
        if method == "narrow":
            before = (self.aligned(seed) if own else self.compressed("aligned", spec, seed),)
        looked_at = p.beyond.calibration * p.model.context if method in ("aligned", "lowrank") else 0
        cost = self.forward["lm"] * (FACTORS["lm_ilkd"] * share * tokens + 5 * looked_at) + 2e11
        keep = method == "aligned" and ("narrow", spec) in COMPRESSION_GRID and not own
        settings = self.train_settings(training, compression=compression, share=share, keep_model=keep, **self.calibration())
        inputs, amount = (self.corpus, self.pretrained("teacher"), *before), (0, 0.0) if there else (math.ceil(share * steps), share * tokens)
        return stage("compressed", settings, inputs, 1e9 if there else cost, resources=self.resources, amount=amount, method=method, spec=name, seed=seed)

    def beyond(self, name: str, seeds: range, tasks: tuple[str, ...]) -> list[Stage]:
        """The stages a notebook beyond the paper reads."""
        if name == "beyond_compression":
            return [self.pretrained("teacher"), self.pretrained("baseline"), *(self.compressed(*size, seed) for seed in seeds for size in COMPRESSION_GRID)]
        wanted = self.profile.beyond
        found = [self.started(start, share, seed) for seed in seeds for start in STARTS for share in (0.0, *wanted.shares)]
        found += [self.finetune_glue(row_of(start, share), task, seed) for seed in seeds for start in STARTS for share in wanted.glue_shares for task in wanted.tasks if task in tasks]
        found += [self.finetune_glue("teacher", task, seed) for seed in seeds for task in wanted.tasks if task in tasks]
        return [self.corpus, self.pretrained("teacher"), *found]

    def source(self, row: str, seed: int) -> Stage:
        """The model a row of Tables 4-7, or of beyond_alignment ("aligned@0.1"), starts from."""
        start, at, share = row.partition("@")
        if at:
            return self.started(start, float(share), seed)
        model = row.partition("_")[0]
        if model == "ablation":
            objective = row.removeprefix("ablation_")
            return self.decompose if objective == "none" else self.pretrain("wiki", objective, seed)
        return self.pretrain("web", "lm_kd", seed) if model == "student" else self.pretrained(model)

    def finetune_lm(self, model: str, seed: int) -> Stage:
        """Table 4: a model fine-tuned on WikiText-103 or its stand-in."""
        p = self.profile
        ilkd = model == "student" and p.readings.table4_ilkd
        inputs = (self.corpus, self.source(model, seed), *((self.pretrained("teacher"),) if ilkd else ()))
        amount = self.amount(p.finetune_lm, self.counts["wiki"])
        cost = self.forward["lm"] * {"teacher": 3, "baseline": 2, "student": 2.7}[model] * amount[1]
        return stage("finetune_lm", self.train_settings(p.finetune_lm, "ilkd" if ilkd else "none", ilkd=ilkd), inputs, cost, resources=self.resources, amount=amount, model=model, seed=seed)

    def glue_cost(self, task: str, factor: float) -> dict:
        """cost and amount of one fine-tuning and its predictions."""
        training, size = self.profile.finetune_glue, self.profile.glue.sizes[task]
        rows = training.max_steps * training.batch_size or training.epochs * size[0]
        cost = self.forward["glue"] * self.counts["row"] * (factor * rows + size[1] + size[2]) + 3e10
        return {"cost": cost, "amount": (math.ceil(rows / training.batch_size), rows * self.counts["row"])}

    def glue_settings(self, method: str, **more) -> dict:
        """Settings of a fine-tuning on GLUE by "none", "vanilla" or "ilkd"."""
        p = self.profile
        return self.train_settings(p.finetune_glue, method, method=method, max_length=p.glue.max_length, **({"mirror": "gpt2"} if self.real else {"assets": p.assets}), **more)

    def finetune_glue(self, row: str, task: str, seed: int) -> Stage:
        """One task of one row of Tables 5 and 6, of an arm of Table 7, or of a model of beyond_alignment."""
        p = self.profile
        method = "ilkd" if row.startswith("ablation") and p.readings.table7_ilkd else METHODS.get(row, "none")
        guide = () if method == "none" else (self.finetune_glue("teacher", task, seed),)
        inputs = (self.twins, self.source(row, seed), *guide)
        factor = FACTORS["glue_ilkd" if method == "ilkd" else "glue"] * (0.6 if row.startswith("baseline") else 1.0)
        return stage("finetune_glue", self.glue_settings(method, keep_model=row == "teacher"), inputs, **self.glue_cost(task, factor), resources=self.resources, row=row, task=task, seed=seed)

    def twin_checks(self, tasks: tuple[str, ...]) -> list[Stage]:
        """What a task gives away: a teacher at random, or one that sees one sentence of two."""
        wanted = [(t, c) for t in tasks for c in self.profile.checks if c == "random" or t not in ONE_SENTENCE]
        inputs = (self.twins, self.pretrained("teacher"))
        return [stage("twin_check", self.glue_settings("none"), inputs, **self.glue_cost(t, FACTORS["glue"]), task=t, check=c, seed=0) for t, c in wanted]

    def score(self, row: str, tasks: tuple[str, ...], seed: int) -> Stage:
        """Table 6: a row's submission files, and their scores where test labels are known."""
        return stage("score", {}, (self.twins, *(self.finetune_glue(row, task, seed) for task in tasks)), 1e9, row=row, seed=seed)

    def table(self, number: int | str, seeds: range, tasks: tuple[str, ...]) -> list[Stage]:
        """The stages Table `number`, or a notebook beyond the tables, reads (not what those need in turn)."""
        if number in BEYOND:
            return self.beyond(number, seeds, tasks)
        glue = [self.finetune_glue(row, task, seed) for seed in seeds for row in ROWS for task in tasks]
        if number == 1:
            return [self.shapes]
        if number == 2:
            return [self.pretrain("web", "lm_kd", 0), self.finetune_glue("student_ilkd", tasks[0], 0)]
        if number == 3:
            return [self.shapes, self.pretrained("teacher"), self.pretrained("baseline"), self.decompose, *(self.pretrain("web", "lm_kd", s) for s in seeds), self.corpus]
        if number == 4:
            before = [self.pretrained("teacher"), self.pretrained("baseline"), *(self.pretrain("web", "lm_kd", s) for s in seeds)]
            return [*before, *(self.finetune_lm(model, seed) for seed in seeds for model in ("teacher", "baseline", "student"))]
        if number == 5:
            return [self.twins, *glue, *self.twin_checks(tasks)]
        if number == 6:
            return [self.twins, *glue, *self.twin_checks(tasks), *(self.score(row, tasks, seed) for seed in seeds for row in ROWS)]
        arms = ["ablation_none", *(f"ablation_{o}" for o in OBJECTIVES)]
        mnli = [self.finetune_glue(arm, "mnli", seed) for seed in seeds for arm in arms] if "mnli" in tasks else []
        return [self.decompose, self.pretrained("teacher"), *(self.pretrain("wiki", o, s) for s in seeds for o in OBJECTIVES), *mnli]
