"""Every number a run uses: the profiles as frozen dataclasses, and `--set key=value` on top of them.

Readings of what the paper leaves open are fields here, each with its default; the README explains them.
"""

from __future__ import annotations

import dataclasses
import difflib
import typing
from dataclasses import dataclass, field

from kn.suite import limits


@dataclass(frozen=True)
class Text:
    """Where text comes from and how it is cut; packages are import names, shares are (valid, test) by file."""

    web: tuple[str, ...] = (
        "torch", "transformers", "pandas", "numpy", "matplotlib", "sklearn", "huggingface_hub", "datasets", "IPython",
        "pydantic", "accelerate", "prompt_toolkit", "rich", "PIL", "tornado", "jupyter_server", "joblib", "fsspec",
        "pyarrow", "narwhals", "nbconvert", "traitlets", "jinja2", "coverage", "filelock", "anyio",
    )  # fmt: skip
    wiki: tuple[str, ...] = ("sympy", "scipy", "networkx", "mpmath")
    web_shares: tuple[float, float] = (0.10, 0.10)
    wiki_shares: tuple[float, float] = (0.06, 0.12)
    sample: float = 0.10  # share of the web documents KnGPT2's pre-training sees (§3.3: 10 % of OpenWebText, one epoch)
    sample_seed: int = 0
    fingerprint: str = "53ab8fd17eb73eca"  # of the corpus the committed models and reports were made with
    limit: int = 0  # documents of each split (token rows of a mirror's), 0 for all: tests and rehearsals
    file: str = ""  # a corpus made elsewhere by `python -m kn corpus FILE`, for a machine without the packages


@dataclass(frozen=True)
class Model:
    """Shape of the teacher; the baseline keeps every other layer."""

    vocabulary: int = 4608  # V = 6·L·d keeps the paper's proportion of embedding to blocks
    context: int = 128  # tokens
    width: int = 128
    layers: int = 6
    heads: int = 4
    activation: str = "gelu_pytorch_tanh"  # the same function as GPT-2's gelu_new, in one fused operation
    dropout: float = 0.0


@dataclass(frozen=True)
class Compression:
    """Fields of kn.KroneckerSpec (readings: "odd layers", "which matrices", "SVD scale")."""

    layers: str = "odd"
    factor: int = 2
    rank: int = 1
    embedding: bool = True
    out_proj: bool = True
    scale: str = "sqrt"


@dataclass(frozen=True)
class Training:
    """One training run: AdamW, linear warm-up and decay. Rates are peak values, warm-up is a share of all steps."""

    batch_size: int
    learning_rate: float
    epochs: float
    alphas: tuple[float, float, float, float] = (0.5, 0.5, 0.5, 0.1)  # eq. 5: embedding, attention, hidden, cross-entropy
    warmup: float = 0.06
    weight_decay: float = 0.01
    schedule: str = "linear"
    optimizer: str = "adamw_torch_fused"
    clip: float = 1.0
    max_steps: int = 0  # 0: by epochs


@dataclass(frozen=True)
class Readings:
    """How the distillation terms are read where the paper leaves them open."""

    direction: str = "student_teacher"  # eq. 3 as printed; "teacher_student" is MiniLM's
    hidden_point: str = "c_proj"  # "output of the second fully connected layer"; or "block"
    logit_term: float = 0.0  # weight of a logit KL beside eq. 5, which has none
    kd_weight: float = 0.5  # vanilla KD
    temperature: float = 2.0
    table4_ilkd: bool = False  # fine-tune KnGPT2 on the wiki corpus with ILKD
    table7_ilkd: bool = False  # MNLI of the ablation with ILKD


@dataclass(frozen=True)
class Glue:
    """Sizes (train, dev, test) of the tasks and how they are cut."""

    sizes: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    max_length: int = 64  # tokens
    seed: int = 0
    limit: int = 0  # rows of each split, 0 for all (rehearsals)


@dataclass(frozen=True)
class Hardware:
    """What changes speed and memory but no result: not part of a stage's key, recorded with it."""

    micro_batch: int = 0  # rows at a time; 0: the whole batch. Gradients are added up to the batch of the profile
    checkpointing: bool = False  # recompute activations instead of keeping them
    processes: int = 1  # of one language-model training (torchrun): one a GPU, the profile's batch is shared among them


@dataclass(frozen=True)
class Beyond:
    """What the two notebooks beyond the paper run; shares are of the light pre-training's tokens."""

    calibration: int = 256  # rows of text that the aligned start looks at
    learning_rate: float = 1e-4  # of training from an aligned or low-rank start: near its optimum the SVD start's rate does harm (LOG.md)
    svd_rate: float = 2e-3  # of training from the SVD start for less than the whole light pre-training
    shares: tuple[float, ...] = (0.1, 0.3, 1.0)  # trainings from either start
    glue_shares: tuple[float, ...] = (0.0, 0.1, 1.0)  # those of them (0: no training) that are fine-tuned on tasks
    tasks: tuple[str, ...] = ("rte", "mnli")
    share: float = 0.3  # training of every model in the comparison of sizes


@dataclass(frozen=True)
class Ledger:
    """How far the readings of the paper are switched, one at a time, for the ledger of claims."""

    seeds: int = 3  # at most, of the run's
    tasks: tuple[str, ...] = ("rte", "mnli")


@dataclass(frozen=True)
class Recipe:
    """Training a GPT-2 from nothing: batches of whole rows, Muon and AdamW, gradient norm at most 1."""

    steps: int  # 0: three epochs of the rows, as DistilGPT2 saw OpenWebText
    batch: int
    muon_lr: float  # matrices of the blocks
    adam_lr: float  # embeddings, gains, biases
    weight_decay: float
    warmup: int
    seed: int = 0
    kd_weight: float = 0.5  # of the logit KD from the teacher (the baseline's)
    temperature: float = 2.0
    precision: str = "bf16"


# of mini's committed models; chosen on validation perplexity alone, what else was tried is in LOG.md
TEACHER = Recipe(steps=9000, batch=16, muon_lr=0.005, adam_lr=0.004, weight_decay=0.05, warmup=100)
BASELINE = Recipe(steps=0, batch=16, muon_lr=0.004, adam_lr=0.002, weight_decay=0.05, warmup=50)


@dataclass(frozen=True)
class Profile:
    """All settings of one run; `name` and `note` are for people."""

    name: str
    note: str
    text: Text
    model: Model
    compression: Compression
    pretrain: Training
    ablation: Training
    finetune_lm: Training
    finetune_glue: Training
    readings: Readings
    glue: Glue
    beyond: Beyond = Beyond()
    ledger: Ledger = Ledger()
    hardware: Hardware = Hardware()
    device: str = "cpu"  # "cpu", or "auto": a GPU where there is one
    source: str = "documentation"  # or "mirror": the hub's models and data
    assets: str = "mini"  # which committed pretrained models (documentation); "": trained within the run
    teacher: Recipe = TEACHER  # where they are trained within the run
    baseline: Recipe = BASELINE
    checks: tuple[str, ...] = ("random", "second_sentence")  # each side is changed equally often, and "first_sentence" scored less (LOG.md)


# train, dev, test rows; each of MNLI's two dev and test sets has that size. Chosen with learning rate and epochs on dev scores alone (LOG.md)
SIZES = {
    "cola": (1400, 700, 700), "rte": (1600, 700, 700), "mrpc": (1700, 700, 700), "sst2": (1600, 700, 700),
    "mnli": (2400, 480, 480), "qnli": (2200, 700, 700), "qqp": (2100, 700, 700),
}  # fmt: skip

MINI = Profile(
    name="mini",
    note="documentation text, not the paper's data",
    text=Text(),
    model=Model(),
    compression=Compression(),
    pretrain=Training(batch_size=4, learning_rate=1e-3, epochs=1),
    ablation=Training(batch_size=4, learning_rate=1e-3, epochs=1, max_steps=300),
    finetune_lm=Training(batch_size=8, learning_rate=1e-3, epochs=0.5),
    finetune_glue=Training(batch_size=16, learning_rate=5e-4, epochs=2, alphas=(0.5, 0.5, 0.5, 0.02)),
    readings=Readings(),
    glue=Glue(sizes=SIZES),
)
TEST = dataclasses.replace(
    MINI,
    name="test",
    note="a seconds-long run for the test suite: its numbers mean nothing",
    text=dataclasses.replace(Text(), fingerprint="", web=("joblib", "filelock", "jinja2", "anyio"), wiki=("mpmath",), web_shares=(0.25, 0.25), wiki_shares=(0.25, 0.25), sample=0.5, limit=60),
    pretrain=dataclasses.replace(MINI.pretrain, max_steps=2),
    ablation=dataclasses.replace(MINI.ablation, max_steps=2),
    finetune_lm=dataclasses.replace(MINI.finetune_lm, max_steps=2),
    finetune_glue=dataclasses.replace(MINI.finetune_glue, max_steps=2),
    beyond=Beyond(calibration=8),
    glue=Glue(sizes={task: (24, 16, 16) for task in SIZES}),
)
# GLUE's own sizes, for estimates of cost (each of MNLI's two dev and test sets)
GLUE_SIZES = {
    "cola": (8551, 1043, 1063), "rte": (2490, 277, 3000), "mrpc": (3668, 408, 1725), "sst2": (67349, 872, 1821),
    "mnli": (392702, 9824, 9822), "qnli": (104743, 5463, 5463), "qqp": (363846, 40430, 390965),
}  # fmt: skip
PAPER = Profile(
    name="paper",
    note="the paper's models and data",
    text=dataclasses.replace(Text(), web=(), wiki=(), web_shares=(0.00025, 0.00025), fingerprint=""),  # shares of OpenWebText for valid and test
    model=Model(vocabulary=50257, context=1024, width=768, layers=12, heads=12, activation="gelu_new", dropout=0.1),
    compression=Compression(),
    pretrain=Training(batch_size=1, learning_rate=2.5e-4, epochs=1),  # Table 2
    ablation=Training(batch_size=1, learning_rate=2.5e-4, epochs=1),
    finetune_lm=Training(batch_size=8, learning_rate=5e-5, epochs=1),
    finetune_glue=Training(batch_size=16, learning_rate=2e-5, epochs=3, alphas=(0.5, 0.5, 0.5, 0.02)),  # Table 2
    readings=Readings(),
    glue=Glue(sizes=GLUE_SIZES, max_length=128),
    device="auto",
    source="mirror",
    checks=(),
)
MIDI = Profile(  # its recipes are guesses from mini's: no GPU was at hand to choose them on
    name="midi",
    note="documentation text, not the paper's data; models trained within the run",
    text=dataclasses.replace(Text(), fingerprint=""),
    model=Model(vocabulary=8192, context=256, width=384, layers=8, heads=6, dropout=0.1),  # 17.4 M parameters
    compression=Compression(),
    pretrain=Training(batch_size=8, learning_rate=5e-4, epochs=1),
    ablation=Training(batch_size=8, learning_rate=5e-4, epochs=1),
    finetune_lm=Training(batch_size=16, learning_rate=5e-4, epochs=1),
    finetune_glue=Training(batch_size=16, learning_rate=2e-4, epochs=3, alphas=(0.5, 0.5, 0.5, 0.02)),
    readings=Readings(),
    glue=Glue(sizes={task: (2 * train, dev, test) for task, (train, dev, test) in SIZES.items()}),
    device="auto",
    assets="",
    teacher=Recipe(steps=4000, batch=32, muon_lr=0.005, adam_lr=0.003, weight_decay=0.05, warmup=100),
    baseline=Recipe(steps=1500, batch=32, muon_lr=0.004, adam_lr=0.002, weight_decay=0.05, warmup=50),
)
PROFILES = {"mini": MINI, "midi": MIDI, "paper": PAPER, "test": TEST}


def load(name: str, overrides: tuple[str, ...] = ()) -> Profile:
    """The profile of this name with `key=value` overrides applied; ValueError says what is allowed."""
    if not isinstance(name, str) or name not in PROFILES:
        raise ValueError(f"profile {name!r} is unknown: allowed are {', '.join(PROFILES)}")
    profile = PROFILES[name]
    for item in overrides:
        if not isinstance(item, str) or not item.isprintable():  # the notebooks get them one a line
            raise ValueError(f"--set {item!r}: one line of printable text wanted")
        key, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"--set {item!r} is not of the form key=value, for example --set pretrain.batch_size=8")
        if (profile.assets or profile.source == "mirror") and key.strip().partition(".")[0] in ("teacher", "baseline"):
            raise ValueError(f"--set {key.strip()}: the pretrained models of {name} are not trained within the run, only midi's are")
        profile = _replace(profile, key.strip().split("."), value.strip(), key.strip())
    limits.together(profile)
    return profile


def keys(settings, prefix: str = "") -> list[str]:
    """Every dotted key that `--set` takes."""
    found = []
    for item in dataclasses.fields(settings):
        value = getattr(settings, item.name)
        if dataclasses.is_dataclass(value):
            found += keys(value, f"{prefix}{item.name}.")
        elif item.name not in ("name", "note", "sizes", "assets", "source", "device"):
            found.append(prefix + item.name)
    return found


def _replace(settings, path: list[str], text: str, key: str):
    """settings with the field at `path` set to the parsed text."""
    if len(path) > 1 and dataclasses.is_dataclass(getattr(settings, path[0], None)):
        return dataclasses.replace(settings, **{path[0]: _replace(getattr(settings, path[0]), path[1:], text, key)})
    if len(path) > 1 or path[0] not in keys(settings):
        near = difflib.get_close_matches(key, keys(MINI), n=3)
        raise ValueError(f"--set key {key!r} is unknown" + (f": did you mean {' or '.join(near)}?" if near else f": allowed are {', '.join(keys(MINI))}"))
    return dataclasses.replace(settings, **{path[0]: _parse(text, typing.get_type_hints(type(settings))[path[0]], key)})


def _parse(text: str, kind, key: str):
    """One value of the field's type from text; ValueError names the type and what is allowed."""
    wanted = getattr(kind, "__name__", str(kind))
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.strip().lower()]
        if typing.get_origin(kind) is tuple:
            parts, types = [p.strip() for p in text.strip("()").split(",") if p.strip()], typing.get_args(kind)
            if types[-1] is not Ellipsis and len(parts) != len(types):
                raise ValueError(f"--set {key}={text}: {len(types)} values wanted, got {len(parts)}")
            return tuple(_parse(p, types[0], key) for p in parts)
        value = kind(text)
    except (ValueError, KeyError) as error:
        if "--set" in str(error):
            raise
        raise ValueError(f"--set {key}={text}: {wanted} wanted") from None
    limits.check(key, text, value)
    return value
