"""The stages of one profile: kind, fields, settings, inputs, estimated FLOPs (their work: kn.suite.work)."""

import functools
import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from kn.data import glue
from kn.data.hub import SourceError, digest, mirror_folder
from kn.files import ASSETS
from kn.suite.devices import precision
from kn.suite.input_digests import asset_digest, corpus_file_digest, package_versions
from kn.suite.settings import Profile, Readings, Training
from kn.suite.store import Stage

TASKS = tuple(glue.TASKS)
ROWS = ("teacher", "baseline", "baseline_kd", "student", "student_ilkd")  # of Tables 5 and 6
OBJECTIVES = ("lm", "kd", "lm_kd")  # of Table 7's light pre-training
GLUE_METHODS = {"baseline_kd": "vanilla", "student_ilkd": "ilkd"}  # other rows: without a teacher
DISTILLATION_READINGS = {  # fields of Readings that a loss depends on; the others stay out of stage keys
    "none": (),
    "vanilla": ("kd_weight", "temperature"),
    "ilkd": ("direction", "hidden_point", "logit_term", "temperature"),
}
STARTS = ("svd", "aligned")
# (method, fields of KroneckerSpec) of beyond_compression. A low-rank or narrow model has as many parameters
# as the Kronecker model of the same fields.
COMPRESSION_GRID: list[tuple[str, dict[str, Any]]] = [
    *(("aligned", {"layers": layers, "factor": factor}) for layers in ("odd", "all") for factor in (2, 4, 8)),
    *(("svd", {"layers": layers, "factor": factor}) for layers in ("odd", "all") for factor in (2, 4)),
    ("svd", {"layers": "odd", "factor": 4, "rank": 2}),
    ("svd", {"layers": "odd", "factor": 2, "head": "tied"}),
    *((method, {"layers": layers, "factor": factor}) for method in ("narrow", "lowrank")
      for layers, factor in (("odd", 2), ("all", 2), ("all", 4))),
]
STEP_FLOPS = {"lm": 2.7, "lm_ilkd": 4.2, "glue": 3.0, "glue_ilkd": 4.5}  # over the teacher's forward pass
TOKEN_ESTIMATES = {  # light pre-training (10 % of OpenWebText's 9 billion), wiki corpus, one GLUE row
    "documentation": {"sample": 119_000, "wiki": 610_000, "row": 21},
    "mirror": {"sample": 900_000_000, "wiki": 118_000_000, "row": 45},
}


class Amount(NamedTuple):
    """Estimated cost of a stage: FLOPs, and the steps and tokens of its training."""

    flops: float
    steps: int = 0
    tokens: float = 0.0


def glue_row(start: str, share: float) -> str:
    """GLUE row of a model of beyond_alignment, as "aligned@0.1"; ("svd", 1) is Table 5's KnGPT2."""
    return "student" if (start, share) == ("svd", 1) else f"{start}@{share:g}"


def make_stage(
        kind: str, settings: dict[str, Any], inputs: tuple[Stage, ...], amount: Amount, version: int = 1,
        resources: dict[str, Any] | None = None, **fields: Any) -> Stage:
    """A Stage with its settings and resources as canonical JSON."""
    canonical, hardware = json.dumps(settings, sort_keys=True), json.dumps(resources or {})
    flops, steps, tokens = amount
    return Stage(kind, tuple(fields.items()), canonical, inputs, version, flops, hardware, steps, tokens)


class StagePlanner:
    """Builds the stages of a profile. Whatever asks for a stage of the same fields gets an equal one."""

    def __init__(self, profile: Profile, without_mirror: bool = False):
        """`without_mirror`: a missing mirror is no error, for cost estimates before anything is fetched."""
        self.profile, self.without_mirror = profile, without_mirror
        self.precision, self.resources = precision(profile.device), asdict(profile.hardware)
        self.from_mirror, self.token_estimates = profile.source == "mirror", TOKEN_ESTIMATES[profile.source]
        model = profile.model
        blocks, head = 12 * model.layers * model.width**2, model.vocabulary * model.width
        self.forward_flops = {"lm": 2 * (blocks + head), "glue": 2 * blocks}  # of the teacher, per token

    def training_settings(self, training: Training, distillation: str = "ilkd", **more) -> dict:
        """Hyper-parameters, the readings that "none", "vanilla" or "ilkd" depends on, and precision."""
        read = {key: getattr(self.profile.readings, key) for key in DISTILLATION_READINGS[distillation]}
        settings = {"training": asdict(training), "readings": asdict(Readings(**read))}
        return {**settings, "precision": self.precision, **more}

    def glue_settings(self, method: str, **more) -> dict:
        """Settings of a fine-tuning on GLUE by "none", "vanilla" or "ilkd"."""
        p = self.profile
        more |= {"mirror": "gpt2"} if self.from_mirror else {"assets": p.assets}
        more |= {"method": method, "max_length": p.glue.max_length}
        return self.training_settings(p.finetune_glue, method, **more)

    def mirror_settings(self, *items: str) -> dict:
        """Settings of a stage that reads these items of the mirror; SourceError where one is missing."""
        try:
            return {"mirror": digest(mirror_folder(), items)}
        except SourceError:
            if not self.without_mirror:
                raise
            return {"mirror": {}}

    def light_pretraining(self, start: str, share: float) -> Training:
        """Table 3's training at the learning rate of a start (or a low-rank or narrow model) and share."""
        training, beyond = self.profile.pretrain, self.profile.beyond
        svd_rate = beyond.svd_rate if share < 1 else training.learning_rate
        return replace(training, learning_rate=svd_rate if start == "svd" else beyond.learning_rate)

    def lm_amount(
        self, training: Training, corpus: str, step_flops: float, evaluation: float = 0.0, share: float = 1
    ) -> Amount:
        """Cost of a training on a share of "sample" or "wiki"; step_flops: per FLOP of the forward pass."""
        batch = training.batch_size * self.profile.model.context  # tokens
        tokens = training.max_steps * batch or training.epochs * self.token_estimates[corpus]
        flops = self.forward_flops["lm"] * step_flops * share * tokens + evaluation
        return Amount(flops, math.ceil(share * math.ceil(tokens / batch)), share * tokens)

    def glue_amount(self, task: str, step_flops: float) -> Amount:
        """Cost of one fine-tuning and its predictions; step_flops: per FLOP of the teacher's forward."""
        training, (train, dev, test) = self.profile.finetune_glue, self.profile.glue.sizes[task]
        rows = training.max_steps * training.batch_size or training.epochs * train
        row = self.token_estimates["row"]  # tokens
        flops = self.forward_flops["glue"] * row * (step_flops * rows + dev + test) + 3e10
        return Amount(flops, math.ceil(rows / training.batch_size), rows * row)

    def training_stage(self, kind: str, settings: dict, inputs: tuple, amount: Amount, **fields) -> Stage:
        """A stage whose record tells the hardware settings it was trained with."""
        return make_stage(kind, settings, inputs, amount, resources=self.resources, **fields)

    @functools.cached_property
    def corpus(self) -> Stage:
        """Token rows of the mirror's text, or of documentation."""
        text, assets = self.profile.text, self.profile.assets
        settings: dict[str, Any] = {"text": asdict(text), "context": self.profile.model.context}
        if self.from_mirror:
            names = ("sample", "sample_seed", "web_shares", "limit")
            settings["text"] = {name: settings["text"][name] for name in names}
            settings |= self.mirror_settings("gpt2", "wikitext", "openwebtext")
            tokens = self.token_estimates["sample"] + self.token_estimates["wiki"]
            return make_stage("corpus", settings, (), Amount(0.0, tokens=tokens))
        settings["assets"] = assets
        if assets:
            asset_digest(ASSETS / assets / "tokenizer")
        else:
            settings["vocabulary"] = self.profile.model.vocabulary
        if text.file:
            settings["text"]["file"] = corpus_file_digest(text.file)
            resources = {"file": str(Path(text.file).absolute())}
            return make_stage("corpus", settings, (), Amount(5e11), resources=resources)
        del settings["text"]["file"]
        settings["pins"] = package_versions(text.web + text.wiki)
        return make_stage("corpus", settings, (), Amount(2.1e12))

    @functools.cached_property
    def glue_tasks(self) -> Stage:
        """GLUE's seven tasks from the mirror, or their twins made of documentation text."""
        p = self.profile.glue
        if self.from_mirror:
            settings = {"tasks": list(p.sizes), "limit": p.limit, **self.mirror_settings("glue")}
            return make_stage("glue", settings, (), Amount(1e13), version=2)
        twins = {"sizes": p.sizes, "seed": p.seed}
        return make_stage("twins", twins, (self.corpus,), Amount(2.7e11), version=3)

    @functools.cached_property
    def shapes(self) -> Stage:
        """Table 1's shapes and parameter counts, of models built at mini's and at the paper's size."""
        settings = {"model": asdict(self.profile.model), "compression": asdict(self.profile.compression)}
        return make_stage("shapes", settings, (), Amount(3e10))

    @functools.cached_property
    def teacher(self) -> Stage:
        """The pretrained teacher."""
        return self.pretrained("teacher")

    def pretrained(self, model: str) -> Stage:
        """The "teacher" or the "baseline": from the mirror, committed, or trained within the run."""
        p, settings = self.profile, dict[str, Any](precision=self.precision)
        inputs: tuple[Stage, ...] = (self.corpus,)
        if self.from_mirror:
            name, amount = {"teacher": "gpt2", "baseline": "distilgpt2"}[model], Amount(1e14)
            settings |= {"name": name, **self.mirror_settings(name)}
        elif p.assets:
            amount = Amount(5e11)
            settings |= {"assets": p.assets, "digest": asset_digest(ASSETS / p.assets / model)}
        else:
            recipe = replace(p.teacher if model == "teacher" else p.baseline, precision=self.precision)
            inputs += () if model == "teacher" else (self.teacher,)
            tokens = recipe.steps * recipe.batch * p.model.context
            amount = Amount(STEP_FLOPS["lm"] * self.forward_flops["lm"] * tokens, recipe.steps, tokens)
            settings |= {"recipe": asdict(recipe), "model": asdict(p.model)}
        return make_stage("pretrained", settings, inputs, amount, model=model)

    @functools.cached_property
    def decompose(self) -> Stage:
        """The SVD start: nearest Kronecker products of the teacher's matrices (eq. 1)."""
        settings = {"compression": asdict(self.profile.compression), "precision": self.precision}
        return make_stage("decompose", settings, (self.teacher, self.corpus), Amount(9e11), version=2)

    def pretrain(self, on: str, objective: str, seed: int) -> Stage:
        """Light pre-training of the SVD start on "web" (Table 3) or "wiki" (Table 7); see OBJECTIVES."""
        training = self.profile.pretrain if on == "web" else self.profile.ablation
        distils, corpus = objective != "lm", "sample" if on == "web" else "wiki"
        inputs = (self.corpus, self.decompose, *((self.teacher,) if distils else ()))
        amount = self.lm_amount(training, corpus, STEP_FLOPS["lm_ilkd" if distils else "lm"], 1e11)
        settings = self.training_settings(training, "ilkd" if distils else "none")
        fields = {"on": on, "objective": objective, "seed": seed}
        return self.training_stage("pretrain", settings, inputs, amount, **fields)

    def aligned(self, seed: int) -> Stage:
        """The aligned start of beyond_alignment, and the teacher in its basis."""
        p = self.profile
        settings: dict[str, Any] = {"calibration": p.beyond.calibration, "precision": self.precision}
        settings["compression"] = {**asdict(p.compression), "init": "aligned"}
        flops = 30 * self.forward_flops["lm"] * p.beyond.calibration * p.model.context + 3e11
        return make_stage("aligned", settings, (self.teacher, self.corpus), Amount(flops), seed=seed)

    def light_pretrained(self, start: str, share: float, seed: int) -> Stage:
        """The model of beyond_alignment after a share of the light pre-training; share 0 is the start."""
        if share == 0:
            return self.decompose if start == "svd" else self.aligned(seed)
        if start == "svd" and share == 1:
            return self.pretrain("web", "lm_kd", seed)
        training = self.light_pretraining(start, share)
        amount = self.lm_amount(training, "sample", STEP_FLOPS["lm_ilkd"], 1e11, share)
        inputs = (self.corpus, self.light_pretrained(start, 0, seed), self.teacher)
        settings = self.training_settings(training)
        return self.training_stage("heal", settings, inputs, amount, start=start, share=share, seed=seed)

    def compressed(self, method: str, spec: dict, seed: int) -> Stage:
        """One model of beyond_compression, evaluated before and after a short pre-training.
        The profile's own configuration is beyond_alignment's, not made twice; narrow begins from aligned."""
        p, share, usual = self.profile, self.profile.beyond.share, asdict(self.profile.compression)
        training = self.light_pretraining(method, share)
        compression = {**usual, "embedding_factor": 2, **spec}
        is_profiles_own = compression == {**usual, "embedding_factor": usual["factor"]}
        inputs: tuple[Stage, ...] = (self.corpus, self.teacher)
        calibration = p.beyond.calibration * p.model.context if method in ("aligned", "lowrank") else 0
        evaluation = 5 * self.forward_flops["lm"] * calibration + 2e11
        amount = self.lm_amount(training, "sample", STEP_FLOPS["lm_ilkd"], evaluation, share)
        if is_profiles_own and method in STARTS:
            inputs += (self.light_pretrained(method, 0, seed), self.light_pretrained(method, share, seed))
            amount = Amount(1e9)
        elif method == "narrow":
            inputs += (self.aligned(seed) if is_profiles_own else self.compressed("aligned", spec, seed),)
        keep_model = method == "aligned" and ("narrow", spec) in COMPRESSION_GRID and not is_profiles_own
        settings = self.training_settings(training) | {"compression": compression, "share": share}
        settings |= {"calibration": p.beyond.calibration, "keep_model": keep_model}
        fields = {"method": method, "spec": "-".join(f"{k}_{v}" for k, v in spec.items()), "seed": seed}
        return self.training_stage("compressed", settings, inputs, amount, **fields)

    def initial_model(self, row: str, seed: int) -> Stage:
        """The model that a row of Tables 4-7, or of beyond_alignment ("aligned@0.1"), is fine-tuned from."""
        start, at, share = row.partition("@")
        if at:
            return self.light_pretrained(start, float(share), seed)
        model, _, objective = row.partition("_")
        if model == "ablation":
            return self.decompose if objective == "none" else self.pretrain("wiki", objective, seed)
        return self.pretrain("web", "lm_kd", seed) if model == "student" else self.pretrained(model)

    def finetune_lm(self, model: str, seed: int) -> Stage:
        """Table 4: the teacher, baseline or student fine-tuned on WikiText-103 or its stand-in."""
        training, ilkd = self.profile.finetune_lm, model == "student" and self.profile.readings.table4_ilkd
        inputs = (self.corpus, self.initial_model(model, seed), *((self.teacher,) if ilkd else ()))
        amount = self.lm_amount(training, "wiki", {"teacher": 3, "baseline": 2, "student": 2.7}[model])
        settings = self.training_settings(training, "ilkd" if ilkd else "none", ilkd=ilkd)
        return self.training_stage("finetune_lm", settings, inputs, amount, model=model, seed=seed)

    def finetune_glue(self, row: str, task: str, seed: int) -> Stage:
        """One task of a row of Tables 5 and 6, of an arm of Table 7, or of a model of beyond_alignment."""
        ablation_ilkd = row.startswith("ablation") and self.profile.readings.table7_ilkd
        method = "ilkd" if ablation_ilkd else GLUE_METHODS.get(row, "none")
        guide = () if method == "none" else (self.finetune_glue("teacher", task, seed),)
        inputs = (self.glue_tasks, self.initial_model(row, seed), *guide)
        step_flops = STEP_FLOPS["glue_ilkd" if method == "ilkd" else "glue"]
        amount = self.glue_amount(task, step_flops * (0.6 if row.startswith("baseline") else 1.0))
        settings = self.glue_settings(method, keep_model=row == "teacher")
        return self.training_stage("finetune_glue", settings, inputs, amount, row=row, task=task, seed=seed)

    def shortcut_check(self, task: str, check: str) -> Stage:
        """A teacher with random weights, or that sees one sentence of two: how far a task can be guessed."""
        settings, inputs = self.glue_settings("none"), (self.glue_tasks, self.teacher)
        amount = self.glue_amount(task, STEP_FLOPS["glue"])
        return make_stage("twin_check", settings, inputs, amount, task=task, check=check, seed=0)

    def score(self, row: str, tasks: tuple[str, ...], seed: int) -> Stage:
        """Table 6: the submission files of a row, and their scores where test labels are known."""
        inputs = (self.glue_tasks, *(self.finetune_glue(row, task, seed) for task in tasks))
        return make_stage("score", {}, inputs, Amount(1e9), row=row, seed=seed)
