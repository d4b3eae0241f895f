"""The plan: which stages a table needs, with their fields, settings and inputs. `run` makes what is missing.

This file imports nothing heavy, so that planning and reading finished results is quick; the work is in train.py.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
from importlib.metadata import packages_distributions, version
from pathlib import Path

from .cost import FACTORS
from .executors import gpus, keep_off_gpus
from .profiles import Profile, Training, load
from .store import Stage, Store, StoreError, file_sha256

ROOT = Path(__file__).parent.parent
ASSETS = Path(__file__).parent / "assets"
TASKS = ("cola", "rte", "mrpc", "sst2", "mnli", "qnli", "qqp")
ONE_SENTENCE = ("cola", "sst2")
ROWS = ("teacher", "baseline", "baseline_kd", "student", "student_ilkd")
METHODS = {"baseline_kd": "vanilla", "student_ilkd": "ilkd"}
OBJECTIVES = ("lm", "kd", "lm_kd")
TABLES = range(1, 8)
TOKENS = {  # of a pre-training, of the wiki corpus, of a GLUE row: for estimates of cost only
    "documentation": {"sample": 119_000, "wiki": 610_000, "row": 21},
    "mirror": {"sample": 900_000_000, "wiki": 118_000_000, "row": 45},  # 10 % of OpenWebText's 9 billion
}


def precision(device: str = "cpu") -> str:
    """ "bf16" where the processor, or the GPU where one may be used, multiplies bfloat16 in hardware, else "fp32"; part of every training stage's key."""
    if device == "auto" and gpus():
        return "bf16"
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return "fp32"
    return "bf16" if "avx512_bf16" in flags or "amx_bf16" in flags else "fp32"


@functools.cache
def asset_digest(folder: Path) -> str:
    """One hash for all files of an asset folder; StoreError says what is missing and how to mend it."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    if not any(p.suffix in (".safetensors", ".json") for p in files):
        raise StoreError(f"the pretrained model {folder} is missing: restore it with `git checkout -- {folder.relative_to(ROOT)}`")
    listed = folder.parent / "SHA256SUMS"
    known = dict(reversed(line.split()) for line in listed.read_text().splitlines()) if listed.exists() else {}
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
    """Installed versions of the packages whose documentation is the corpus."""
    where = packages_distributions()
    missing = [name for name in names if name not in where]
    if missing:
        raise StoreError(f"package {missing[0]!r} is not installed, mini's corpus is made of its documentation: run ./run_all.sh to set up the pins")
    return {name: version(where[name][0]) for name in names}


def stage(kind: str, settings: dict, inputs: tuple[Stage, ...] = (), cost: float = 0.0, version: int = 1, hints: dict | None = None, amount: tuple[int, float] = (0, 0.0), **fields) -> Stage:
    """A Stage with its settings as canonical JSON; `amount` is (steps, tokens) of its training."""
    return Stage(kind, tuple(fields.items()), json.dumps(settings, sort_keys=True), inputs, version, cost, json.dumps(hints or {}), *amount)


class Plan:
    """Builds the stages of one profile; every method is one kind."""

    def __init__(self, profile: Profile, without_mirror: bool = False):
        self.profile = p = profile
        self.precision = precision(p.device)
        self.counts, self.without_mirror = TOKENS[p.source], without_mirror
        self.hints, self.real = dataclasses.asdict(p.hardware), p.source == "mirror"
        blocks, head = 12 * p.model.layers * p.model.width**2, p.model.vocabulary * p.model.width
        self.forward = {"lm": 2 * (blocks + head), "glue": 2 * blocks}  # FLOPs a token of the teacher

    def train_settings(self, training: Training, **more) -> dict:
        return {"training": dataclasses.asdict(training), "readings": dataclasses.asdict(self.profile.readings), "precision": self.precision, **more}

    def amount(self, training: Training, all_tokens: int) -> tuple[int, float]:
        """Steps and tokens of a language-model run, for its cost."""
        batch = training.batch_size * self.profile.model.context
        tokens = training.max_steps * batch or training.epochs * all_tokens
        return math.ceil(tokens / batch), tokens

    def mirrored(self, *items: str) -> dict:
        """Settings of a stage that reads these items of the mirror."""
        from .real import digest
        from .sources import SourceError

        try:
            return {"mirror": digest(items)}
        except SourceError:
            if self.without_mirror:  # a plan's costs are asked for before anything is fetched
                return {"mirror": {}}
            raise

    @functools.cached_property
    def corpus(self) -> Stage:
        p = self.profile
        if self.real:
            shares = {"sample": p.text.sample, "sample_seed": p.text.sample_seed, "web_shares": p.text.web_shares, "limit": p.text.limit}
            return stage("corpus", {"text": shares, "context": p.model.context, **self.mirrored("gpt2", "wikitext", "openwebtext")}, amount=(0, self.counts["sample"] + self.counts["wiki"]))
        settings = {"text": dataclasses.asdict(p.text), "context": p.model.context, "assets": p.assets}
        if p.assets:
            asset_digest(ASSETS / p.assets / "tokenizer")
        else:
            settings["vocabulary"] = p.model.vocabulary
        if p.text.file:
            settings["text"]["file"] = carried_digest(p.text.file)
            return stage("corpus", settings, cost=5e11, hints={"file": str(Path(p.text.file).absolute())})
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
        return stage("shapes", {"model": dataclasses.asdict(self.profile.model), "compression": dataclasses.asdict(self.profile.compression)}, cost=3e10)

    def pretrained(self, model: str) -> Stage:
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
        return stage("decompose", {"compression": dataclasses.asdict(self.profile.compression), "precision": self.precision}, (self.pretrained("teacher"), self.corpus), cost=4.5e11)

    def pretrain(self, on: str, objective: str, seed: int) -> Stage:
        training = self.profile.pretrain if on == "web" else self.profile.ablation
        amount = self.amount(training, self.counts["sample" if on == "web" else "wiki"])
        cost = self.forward["lm"] * FACTORS["lm" if objective == "lm" else "lm_ilkd"] * amount[1] + 1e11
        teacher = () if objective == "lm" else (self.pretrained("teacher"),)
        return stage("pretrain", self.train_settings(training), (self.corpus, self.decompose, *teacher), cost, hints=self.hints, amount=amount, on=on, objective=objective, seed=seed)

    def source(self, row: str, seed: int) -> Stage:
        """The model a row of Tables 4-7 starts from."""
        model = row.partition("_")[0]
        if model == "ablation":
            objective = row.removeprefix("ablation_")
            return self.decompose if objective == "none" else self.pretrain("wiki", objective, seed)
        return self.pretrain("web", "lm_kd", seed) if model == "student" else self.pretrained(model)

    def finetune_lm(self, model: str, seed: int) -> Stage:
        p = self.profile
        ilkd = model == "student" and p.readings.table4_ilkd
        inputs = (self.corpus, self.source(model, seed), *((self.pretrained("teacher"),) if ilkd else ()))
        amount = self.amount(p.finetune_lm, self.counts["wiki"])
        cost = self.forward["lm"] * {"teacher": 3, "baseline": 2, "student": 2.7}[model] * amount[1]
        return stage("finetune_lm", self.train_settings(p.finetune_lm, ilkd=ilkd), inputs, cost, hints=self.hints, amount=amount, model=model, seed=seed)

    def glue_cost(self, task: str, factor: float) -> dict:
        """cost and amount of one fine-tuning and its predictions."""
        training, size = self.profile.finetune_glue, self.profile.glue.sizes[task]
        rows = training.max_steps * training.batch_size or training.epochs * size[0]
        cost = self.forward["glue"] * self.counts["row"] * (factor * rows + size[1] + size[2]) + 3e10
        return {"cost": cost, "amount": (math.ceil(rows / training.batch_size), rows * self.counts["row"])}

    def glue_settings(self, method: str, **more) -> dict:
        p = self.profile
        return self.train_settings(p.finetune_glue, method=method, max_length=p.glue.max_length, **({"mirror": "gpt2"} if self.real else {"assets": p.assets}), **more)

    def finetune_glue(self, row: str, task: str, seed: int) -> Stage:
        p = self.profile
        method = "ilkd" if row.startswith("ablation") and p.readings.table7_ilkd else METHODS.get(row, "none")
        guide = () if method == "none" else (self.finetune_glue("teacher", task, seed),)
        inputs = (self.twins, self.source(row, seed), *guide)
        factor = FACTORS["glue_ilkd" if method == "ilkd" else "glue"] * (0.6 if row.startswith("baseline") else 1.0)
        return stage("finetune_glue", self.glue_settings(method, keep_model=row == "teacher"), inputs, **self.glue_cost(task, factor), hints=self.hints, row=row, task=task, seed=seed)

    def twin_checks(self, tasks: tuple[str, ...]) -> list[Stage]:
        wanted = [(t, c) for t in tasks for c in self.profile.checks if c == "random" or t not in ONE_SENTENCE]
        inputs = (self.twins, self.pretrained("teacher"))
        return [stage("twin_check", self.glue_settings("none"), inputs, **self.glue_cost(t, FACTORS["glue"]), task=t, check=c, seed=0) for t, c in wanted]

    def score(self, row: str, tasks: tuple[str, ...], seed: int) -> Stage:
        return stage("score", {}, (self.twins, *(self.finetune_glue(row, task, seed) for task in tasks)), 1e9, row=row, seed=seed)

    def table(self, number: int, seeds: range, tasks: tuple[str, ...]) -> list[Stage]:
        """The stages Table `number` reads (not what those need in turn)."""
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


def plan(profile: Profile, tables=TABLES, seeds: int = 1, tasks: tuple[str, ...] = TASKS, without_mirror: bool = False) -> tuple[list[Stage], list[Stage]]:
    """(all stages in an order in which each comes after its inputs, those the tables read); `without_mirror` is for costs only."""
    wrong = [t for t in tables if t not in TABLES]
    if wrong:
        raise ValueError(f"table {wrong[0]} does not exist: allowed are 1 to 7")
    if not isinstance(seeds, int) or seeds < 1:
        raise ValueError(f"seeds is {seeds!r}: a whole number of at least 1 wanted")
    unknown = [t for t in tasks if t not in TASKS]
    if unknown:
        raise ValueError(f"task {unknown[0]!r} is unknown: allowed are {', '.join(TASKS)}")
    made, wanted, order = Plan(profile, without_mirror), {}, {}

    def add(item: Stage) -> None:
        if item.path not in order:
            for need in item.inputs:
                add(need)
            order[item.path] = item

    for number in tables:
        for item in made.table(number, range(seeds), tuple(tasks)):
            wanted[item.path] = item
            add(item)
    return list(order.values()), list(wanted.values())


def records(store: Store, wanted: list[Stage]) -> list[dict]:
    """Records of finished stages; Table 6's test scores join the fine-tuning they belong to."""
    found = [store.record(item) for item in wanted]
    scores = {(r["fields"]["row"], r["fields"]["seed"]): r["metrics"]["tasks"] for r in found if r["stage"] == "score"}
    if os.environ.get("KN_GLUE_SCORES"):
        from . import glue

        given = glue.read_scores(os.environ["KN_GLUE_SCORES"], ROWS)
        scores = {key: {task: {"headline": value} for task, value in values.items()} for key, values in given.items()}
    for record in found:
        fields = record["fields"]
        if record["stage"] == "twin_check":
            fields["kind"] = fields.pop("check")
        if record["stage"] == "finetune_glue" and fields["task"] in scores.get((fields["row"], fields["seed"]), {}):
            record["metrics"]["test"] = scores[fields["row"], fields["seed"]][fields["task"]]
    return found


def run(profile: str = "mini", tables=TABLES, seeds: int = 1, only=None, overrides: tuple[str, ...] = (), jobs: int | None = None) -> list[dict]:
    """Records of the stages the tables read, made where the store lacks them; `only` names the GLUE tasks to restrict to."""
    from . import launch

    tables, tasks = list(tables), tuple(only) if only else TASKS
    settings = load(profile, overrides or environment_overrides())
    keep_off_gpus(settings.device)
    stages, wanted = plan(settings, tables, seeds, tasks)
    store = Store().open()
    launch.run(stages, store, jobs=jobs)
    return records(store, wanted)


def environment_overrides() -> tuple[str, ...]:
    """The `--set` values ./run_all.sh hands to the notebooks, one a line."""
    return tuple(line for line in os.environ.get("KN_SET", "").splitlines() if line)


def report_folder(profile: str) -> Path:
    """Where a profile's tables go: $KN_REPORTS (default reports/) / profile."""
    return Path(os.environ.get("KN_REPORTS") or ROOT / "reports") / profile
