"""The settings of a run: frozen pydantic dataclasses with the type, allowed range and meaning of every field.

A profile (kn.suite.profiles) is one instance of `Profile`. Fields are part of the keys of finished stages:
renaming one, or writing 1.0 for a default of 1, makes every training that depends on it run again. Where the
paper leaves something open, a field holds our reading of it; the README explains each."""

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
Share = Annotated[float, Field(ge=1e-6, le=1000)]  # of the light pre-training's tokens; above 1: more text
Temperature = Annotated[float, Field(ge=1e-6, le=1e6)]
Task = Annotated[str, AfterValidator(lambda name: glue.task_of(name).name)]


@dataclass(frozen=True)
class Text:
    """Source of the text and its splits. Packages are import names; a file's documents stay in one split."""
    web: tuple[str, ...] = (  # packages whose documentation stands for OpenWebText
        "torch", "transformers", "pandas", "numpy", "matplotlib", "sklearn", "huggingface_hub", "datasets",
        "IPython", "pydantic", "accelerate", "prompt_toolkit", "rich", "PIL", "tornado", "jupyter_server",
        "joblib", "fsspec", "pyarrow", "narwhals", "nbconvert", "traitlets", "jinja2", "coverage", "filelock",
        "anyio",
    )
    wiki: tuple[str, ...] = ("sympy", "scipy", "networkx", "mpmath")  # and for WikiText-103
    web_shares: tuple[Fraction, Fraction] = (0.10, 0.10)  # of the valid and test splits
    wiki_shares: tuple[Fraction, Fraction] = (0.06, 0.12)
    sample: Annotated[float, Field(ge=1e-9, le=1)] = 0.10  # of the web text in the light pre-training (§3.3)
    sample_seed: Count = 0
    fingerprint: str = "53ab8fd17eb73eca"  # of the corpus of the committed models and reports
    limit: Count = 0  # documents (mirror: token rows) of each split; 0: all
    file: str = ""  # corpus written elsewhere by `python -m kn export-corpus FILE`


@dataclass(frozen=True)
class Model:
    """Shape of the GPT-2 teacher; the baseline keeps every other layer."""
    vocabulary: Annotated[int, Field(ge=256, le=2**24)] = 4608  # V = 6·L·d, the paper's proportion
    context: Annotated[int, Field(ge=2, le=2**17)] = 128  # positions, in tokens
    width: Size = 128  # hidden size d
    layers: Annotated[int, Field(ge=1, le=1024)] = 6
    heads: Annotated[int, Field(ge=1, le=1024)] = 4
    # gelu_pytorch_tanh is GPT-2's gelu_new as one fused operation
    activation: Literal["gelu_pytorch_tanh", "gelu_new", "gelu", "relu", "silu"] = "gelu_pytorch_tanh"
    dropout: Annotated[float, Field(ge=0, le=0.99)] = 0.0


@dataclass(frozen=True)
class Compression:
    """Fields of kn.KroneckerSpec."""
    layers: Literal["odd", "even", "all"] = "odd"
    factor: Size = 2
    rank: Size = 1
    embedding: bool = True
    out_proj: bool = True
    scale: Literal["sqrt", "unit_b"] = "sqrt"  # √σ to A and B each, or ‖B‖ = 1


@dataclass(frozen=True)
class Training:
    """One training run with AdamW, linear warm-up and decay."""
    batch_size: BatchSize
    learning_rate: Rate  # peak value
    epochs: Annotated[float | int, Field(ge=0, le=1e6)]  # int too: stage keys hold a default of 1 as 1
    alphas: tuple[Rate, Rate, Rate, Rate] = (0.5, 0.5, 0.5, 0.1)  # eq. 5: embedding, attention, hidden, CE
    warmup: Fraction = 0.06  # of all steps
    weight_decay: Rate = 0.01
    schedule: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    optimizer: Literal["adamw_torch_fused", "adamw_torch", "adafactor", "sgd"] = "adamw_torch_fused"
    clip: Rate = 1.0  # largest norm of the gradient
    max_steps: Count = 0  # 0: by epochs


@dataclass(frozen=True)
class Readings:
    """Readings of the distillation terms that the paper leaves open."""
    # eq. 3: KL(student ‖ teacher) as printed, or MiniLM's
    direction: Literal["student_teacher", "teacher_student"] = "student_teacher"
    hidden_point: Literal["c_proj", "block"] = "c_proj"  # eq. 4: output of the second FC layer, or the block
    logit_term: Rate = 0.0  # weight of a logit KL beside eq. 5, which has none
    kd_weight: Fraction = 0.5  # of the KL in vanilla KD
    temperature: Temperature = 2.0
    table4_ilkd: bool = False  # fine-tune KnGPT2 on the wiki corpus with ILKD
    table7_ilkd: bool = False  # fine-tune the ablation's MNLI with ILKD


@dataclass(frozen=True)
class Glue:
    """Sizes of the GLUE tasks and their tokenization."""
    sizes: dict[str, tuple[int, int, int]]  # rows of train, dev and test (MNLI: of each of its two sets)
    max_length: Annotated[int, Field(ge=3, le=2**17)] = 64  # tokens
    seed: Count = 0
    limit: Count = 0  # rows of each split; 0: all


@dataclass(frozen=True)
class Hardware:
    """Settings of speed and memory that change no result: recorded with a stage, not part of its key."""
    micro_batch: Count = 0  # rows per device and accumulation step; 0: the batch
    checkpointing: bool = False  # recompute activations in the backward pass
    processes: Annotated[int, Field(ge=1, le=1024)] = 1  # of one language-model training


@dataclass(frozen=True)
class Beyond:
    """Settings of the two notebooks beyond the paper; shares are of the light pre-training's tokens."""
    calibration: Annotated[int, Field(ge=1, le=2**31 - 1)] = 256  # text rows of the aligned start
    learning_rate: Rate = 1e-4  # from an aligned or low-rank start; the SVD start's does harm there (LOG.md)
    svd_rate: Rate = 2e-3  # learning rate from the SVD start for a share below 1
    shares: tuple[Share, ...] = (0.1, 0.3, 1.0)  # trainings from either start
    # trainings (0: the start) that are fine-tuned on tasks
    glue_shares: tuple[Annotated[float, Field(ge=0, le=1000)], ...] = (0.0, 0.1, 1.0)
    tasks: tuple[Task, ...] = ("rte", "mnli")
    share: Share = 0.3  # training of each model in the comparison of sizes


@dataclass(frozen=True)
class Ledger:
    """Seeds and tasks on which the ledger of claims switches each reading of the paper."""
    seeds: Annotated[int, Field(ge=1, le=999)] = 3  # at most, of the run's seeds
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
    kd_weight: Fraction = 0.5  # of the logit KD from the teacher (baseline)
    temperature: Temperature = 2.0
    precision: Precision = "bf16"


@dataclass(frozen=True)
class Profile:
    """All settings of one run; `name` and `note` are for people."""
    name: str
    note: str
    pretrain: Training
    ablation: Training
    finetune_lm: Training
    finetune_glue: Training
    glue: Glue
    teacher: Recipe  # where the pretrained models are trained within the run
    baseline: Recipe
    text: Text = Text()
    model: Model = Model()
    compression: Compression = Compression()
    readings: Readings = Readings()
    beyond: Beyond = Beyond()
    ledger: Ledger = Ledger()
    hardware: Hardware = Hardware()
    device: Literal["cpu", "auto"] = "cpu"  # "auto": a GPU where there is one
    source: Literal["documentation", "mirror"] = "documentation"  # "mirror": the hub's models and data
    assets: str = "mini"  # committed pretrained models; "": trained within the run
    # what a task gives away: teachers with random weights, or that see one sentence of two (the first: less)
    checks: tuple[Literal["random", "first_sentence", "second_sentence"], ...] = ("random", "second_sentence")
