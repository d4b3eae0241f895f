"""The settings of a run: frozen pydantic dataclasses with the type, allowed range and meaning of every field.

A profile (kn.suite.profiles) is one instance of `Profile`. Fields are part of the keys of finished stages:
renaming one, or writing 1.0 for a default of 1, makes every training that depends on it run again. Where the
paper leaves something open, a field holds our reading of it; the README explains each.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field
from pydantic.dataclasses import dataclass

from kn.data import glue
from kn.suite.devices import Precision

Count = Annotated[int, Field(ge=0, le=2**31 - 1)]
BatchSize = Annotated[int, Field(ge=1, le=2**20)]  # larger sizes than any machine holds are typing errors
Size = Annotated[int, Field(ge=1, le=2**16)]
Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Fractions = tuple[Fraction, Fraction]
Share = Annotated[float, Field(ge=1e-6, le=1000)]  # of the light pre-training's tokens; above 1: more text
Temperature = Annotated[float, Field(ge=1e-6, le=1e6)]
Task = Annotated[str, AfterValidator(lambda name: glue.task_of(name).name)]


@dataclass(frozen=True)
class Text:
    """Source of the text and its splits. Packages are import names; a file's documents stay in one split."""

    web: tuple[str, ...] = Field(
        default=(
            "torch", "transformers", "pandas", "numpy", "matplotlib", "sklearn", "huggingface_hub",
            "datasets", "IPython", "pydantic", "accelerate", "prompt_toolkit", "rich", "PIL", "tornado",
            "jupyter_server", "joblib", "fsspec", "pyarrow", "narwhals", "nbconvert", "traitlets", "jinja2",
            "coverage", "filelock", "anyio",
        ),
        description="packages whose documentation stands for OpenWebText",
    )
    wiki: tuple[str, ...] = Field(
        default=("sympy", "scipy", "networkx", "mpmath"), description="and for WikiText-103"
    )
    web_shares: Fractions = Field(default=(0.10, 0.10), description="shares of the valid and test splits")
    wiki_shares: Fractions = Field(default=(0.06, 0.12), description="shares of the valid and test splits")
    sample: float = Field(  # §3.3: 10 % of OpenWebText
        default=0.10, ge=1e-9, le=1, description="share of the web text in the light pre-training"
    )
    sample_seed: Count = 0
    fingerprint: str = Field(
        default="53ab8fd17eb73eca", description="of the corpus of the committed models and reports"
    )
    limit: Count = Field(default=0, description="documents (mirror: token rows) of each split; 0: all")
    file: str = Field(default="", description="corpus written elsewhere by `python -m kn export-corpus FILE`")


@dataclass(frozen=True)
class Model:
    """Shape of the GPT-2 teacher; the baseline keeps every other layer."""

    vocabulary: int = Field(default=4608, ge=256, le=2**24, description="V = 6·L·d, the paper's proportion")
    context: int = Field(default=128, ge=2, le=2**17, description="positions, in tokens")
    width: Size = Field(default=128, description="hidden size d")
    layers: int = Field(default=6, ge=1, le=1024)
    heads: int = Field(default=4, ge=1, le=1024)
    activation: Literal["gelu_pytorch_tanh", "gelu_new", "gelu", "relu", "silu"] = Field(
        default="gelu_pytorch_tanh", description="GPT-2's gelu_new as one fused operation"
    )
    dropout: float = Field(default=0.0, ge=0, le=0.99)


@dataclass(frozen=True)
class Compression:
    """Fields of kn.KroneckerSpec."""

    layers: Literal["odd", "even", "all"] = "odd"
    factor: Size = 2
    rank: Size = 1
    embedding: bool = True
    out_proj: bool = True
    scale: Literal["sqrt", "unit_b"] = Field(default="sqrt", description="√σ to A and B each, or ‖B‖ = 1")


@dataclass(frozen=True)
class Training:
    """One training run with AdamW, linear warm-up and decay."""

    batch_size: BatchSize
    learning_rate: Rate  # peak value
    epochs: Annotated[float | int, Field(ge=0, le=1e6)]  # int too: stage keys hold a default of 1 as 1
    alphas: tuple[Rate, Rate, Rate, Rate] = Field(
        default=(0.5, 0.5, 0.5, 0.1), description="eq. 5: embedding, attention, hidden, cross-entropy"
    )
    warmup: Fraction = Field(default=0.06, description="share of all steps")
    weight_decay: Rate = 0.01
    schedule: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    optimizer: Literal["adamw_torch_fused", "adamw_torch", "adafactor", "sgd"] = "adamw_torch_fused"
    clip: Rate = Field(default=1.0, description="largest norm of the gradient")
    max_steps: Count = Field(default=0, description="0: by epochs")


@dataclass(frozen=True)
class Readings:
    """Readings of the distillation terms that the paper leaves open."""

    direction: Literal["student_teacher", "teacher_student"] = Field(
        default="student_teacher", description="of the KL in eq. 3: as printed, or MiniLM's"
    )
    hidden_point: Literal["c_proj", "block"] = Field(
        default="c_proj", description="eq. 4: output of the second fully connected layer, or of the block"
    )
    logit_term: Rate = Field(default=0.0, description="weight of a logit KL beside eq. 5, which has none")
    kd_weight: Fraction = Field(default=0.5, description="weight of the KL in vanilla KD")
    temperature: Temperature = 2.0
    table4_ilkd: bool = Field(default=False, description="fine-tune KnGPT2 on the wiki corpus with ILKD")
    table7_ilkd: bool = Field(default=False, description="fine-tune the ablation's MNLI with ILKD")


@dataclass(frozen=True)
class Glue:
    """Sizes of the GLUE tasks and their tokenization."""

    sizes: dict[str, tuple[int, int, int]] = Field(
        default_factory=dict, description="rows of train, dev and test (MNLI: of each of its two sets)"
    )
    max_length: int = Field(default=64, ge=3, le=2**17, description="tokens")
    seed: Count = 0
    limit: Count = Field(default=0, description="rows of each split; 0: all")


@dataclass(frozen=True)
class Hardware:
    """Settings of speed and memory that change no result: recorded with a stage, not part of its key."""

    micro_batch: Count = Field(default=0, description="rows per device and accumulation step; 0: the batch")
    checkpointing: bool = Field(default=False, description="recompute activations in the backward pass")
    processes: int = Field(default=1, ge=1, le=1024, description="of one language-model training (torchrun)")


@dataclass(frozen=True)
class Beyond:
    """Settings of the two notebooks beyond the paper; shares are of the light pre-training's tokens."""

    calibration: int = Field(default=256, ge=1, le=2**31 - 1, description="text rows of the aligned start")
    learning_rate: Rate = Field(  # near its optimum the SVD start's rate does harm (LOG.md)
        default=1e-4, description="from an aligned or low-rank start"
    )
    svd_rate: Rate = Field(default=2e-3, description="learning rate from the SVD start for a share below 1")
    shares: tuple[Share, ...] = Field(default=(0.1, 0.3, 1.0), description="trainings from either start")
    glue_shares: tuple[Annotated[float, Field(ge=0, le=1000)], ...] = Field(
        default=(0.0, 0.1, 1.0), description="trainings (0: the start) that are fine-tuned on tasks"
    )
    tasks: tuple[Task, ...] = ("rte", "mnli")
    share: Share = Field(default=0.3, description="training of each model in the comparison of sizes")


@dataclass(frozen=True)
class Ledger:
    """Seeds and tasks on which the ledger of claims switches each reading of the paper."""

    seeds: int = Field(default=3, ge=1, le=999, description="at most, of the run's seeds")
    tasks: tuple[Task, ...] = ("rte", "mnli")


@dataclass(frozen=True)
class Recipe:
    """Training of a GPT-2 from random weights with Muon and AdamW, gradient norm at most 1."""

    steps: Count  # 0: three epochs of the rows, as DistilGPT2 saw OpenWebText
    batch: BatchSize
    muon_lr: Rate  # of the matrices of the blocks
    adam_lr: Rate  # of embeddings, gains and biases
    weight_decay: Rate
    warmup: Count  # steps
    seed: Count = 0
    kd_weight: Fraction = Field(default=0.5, description="of the logit KD from the teacher (baseline)")
    temperature: Temperature = 2.0
    precision: Precision = "bf16"


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
    teacher: Recipe  # where the pretrained models are trained within the run
    baseline: Recipe
    beyond: Beyond = Beyond()
    ledger: Ledger = Ledger()
    hardware: Hardware = Hardware()
    device: Literal["cpu", "auto"] = Field(default="cpu", description='"auto": a GPU where there is one')
    source: Literal["documentation", "mirror"] = Field(
        default="documentation", description='"mirror": the hub\'s models and data'
    )
    assets: str = Field(default="mini", description='committed pretrained models; "": trained within the run')
    checks: tuple[Literal["random", "first_sentence", "second_sentence"], ...] = Field(
        default=("random", "second_sentence"),  # "first_sentence" scores less (LOG.md)
        description="what a task gives away: teachers with random weights, or that see one sentence of two",
    )
