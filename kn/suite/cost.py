"""Cost of a plan on this machine: steps, tokens, FLOPs, hours, disk and memory, scaled from a timing run."""

import json

from tqdm import tqdm

from kn.suite.devices import free_bytes, worker_count
from kn.suite.store import Stage, Store

TITLES = {"lm": "language model", "lm_ilkd": "with ILKD", "glue": "GLUE", "glue_ilkd": "GLUE with ILKD"}
NOTEBOOK_STARTS = 1.5  # seconds of a notebook, as a multiple of a process' start
ROW = "{:<14}{:>6}{:>7}{:>11}{:>9}{:>9}{:>17}"


class CostError(Exception):
    """A run that does not fit this machine, or could not be timed; the message is one line with a remedy."""


def training_kind(stage: Stage) -> str:
    """The kind of training in the timing run that a stage's speed is most like."""
    settings = json.loads(stage.settings)
    if stage.kind in ("finetune_glue", "twin_check"):
        return "glue_ilkd" if settings["method"] == "ilkd" else "glue"
    distils = settings.get("ilkd") or (stage.kind == "pretrain" and stage["objective"] != "lm")
    return "lm_ilkd" if distils else "lm"


def seconds(stage: Stage, timing: dict) -> float:
    """Expected seconds of one stage."""
    if stage.kind == "corpus" and stage.tokens:
        return stage.tokens / timing["tokenized"]
    kind = training_kind(stage)
    around = timing["around"][kind] if stage.steps else 0.0
    return stage.cost / (timing["flops"][kind] / timing["seconds"][kind]) + around


def disk_bytes(stage: Stage, timing: dict) -> float:
    """Expected bytes that a stage leaves: its model, or the corpus' token rows."""
    if stage.kind in ("pretrained", "decompose", "pretrain"):
        return timing["bytes"]["student" if stage.kind != "pretrained" else stage["model"]]
    if stage.kind == "finetune_glue" and json.loads(stage.settings)["keep_model"]:
        return timing["bytes"]["teacher"]
    return 2 * stage.tokens if stage.kind == "corpus" else 0.0


def check_disk_space(stages: list[Stage], store: Store, timing: dict) -> None:
    """Raise CostError if the missing stages need more disk space than the store's file system has free."""
    need = sum(disk_bytes(stage, timing) for stage in stages if not store.has(stage))
    if (free := free_bytes(store.home)) < need:
        sizes = f"{need / 1e9:.1f} GB will be written to {store.home}, {free / 1e9:.1f} GB are free there"
        raise CostError(f"{sizes}: make room, or choose another folder with KN_HOME=…")


def critical_path(stages: list[Stage], store: Store, timing: dict) -> float:
    """Seconds of the longest chain of missing stages that need one another."""
    ends: dict[str, float] = {}
    for stage in stages:
        start = max((ends[need.path] for need in stage.inputs), default=0.0)
        ends[stage.path] = start + (0.0 if store.has(stage) else seconds(stage, timing))
    return max(ends.values(), default=0.0)


def describe_plan(
    stages: list[Stage], store: Store, timing: dict, jobs: int | None = None, notebooks: int = 0
) -> str:
    """The plan as text: stages done and missing by kind and their cost, then time, disk, memory, speed."""
    jobs = jobs or worker_count()
    lines, total, disk = [ROW.format("stage", "done", "to do", "steps", "tokens", "FLOP", "about")], 0.0, 0.0
    for kind in dict.fromkeys(stage.kind for stage in stages):
        of_kind = [stage for stage in stages if stage.kind == kind]
        missing = [stage for stage in of_kind if not store.has(stage)]
        spent = sum(seconds(stage, timing) for stage in missing)
        total, disk = total + spent, disk + sum(disk_bytes(stage, timing) for stage in missing)
        steps, *totals = (sum(getattr(item, key) for item in missing) for key in ("steps", "tokens", "cost"))
        sizes = (tqdm.format_sizeof(total) if total else "-" for total in totals)
        amounts = (f"{steps:,}" if steps else "-", *sizes, _duration(spent) if missing else "-")
        lines.append(ROW.format(kind, len(of_kind) - len(missing), len(missing), *amounts))
    chain = critical_path(stages, store, timing)
    # each worker begins once, each notebook's kernel too; then it reads, draws and is rendered
    start, report = timing["start"], NOTEBOOK_STARTS * timing["start"] * notebooks
    whole = max((total + report) / jobs + start, chain + start + report / max(1, notebooks))
    about = _duration(whole if total else report) if total or notebooks else "nothing"
    work = f"{_duration(total)} of work, the longest chain {_duration(chain)}, notebooks {_duration(report)}"
    rates = (f"{TITLES[k]} {timing['tokens'][k] / timing['seconds'][k]:,.0f}" for k in TITLES)
    memory = f"{timing['peak_bytes'] / 1e9:.2g} GB of memory a training"
    return "\n".join([
        *lines,
        f"in all about {about} with {jobs} {'process' if jobs == 1 else 'processes'} ({work})",
        f"about {disk / 1e9:.2g} GB of disk in {store.home}, {memory}; "
        f"timed on {timing['device']} by a few steps of each kind of training",
        f"tokens a second and process: {', '.join(rates)}",
    ])


def _duration(seconds: float) -> str:
    """1 h 02 min, 3 min 20 s or 5 s."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60:,} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
