"""kn: Kronecker decomposition for GPT compression.

`import kn` imports transformers and registers the compressed models with its AutoModel. If KN_QUICK_IMPORT is
set, or for `python -m kn` (--help and the plan need no model), the first use of a model does it."""

import os
import sys
import warnings
from importlib import import_module

warnings.filterwarnings("ignore", message="IProgress not found")  # tqdm in a notebook without ipywidgets

_MODULES = {
    "kronecker.nearest": ("nearest_kronecker",), "compression": ("compress",),
    "kronecker.layers": ("KroneckerLinear", "KroneckerEmbedding", "KroneckerHead"),
    "models.config": ("KroneckerSpec", "KnGPT2Config", "KnLlamaConfig"), "models.base": ("count_parameters",),
    "models.gpt2": ("KnGPT2Model", "KnGPT2LMHeadModel", "KnGPT2ForSequenceClassification"),
    "models.llama": ("KnLlamaModel", "KnLlamaForCausalLM", "KnLlamaForSequenceClassification"),
    "distill.attention_kl": ("attention_kl",), "distill.capture": ("capture", "Captured"),
    "distill.ilkd": ("ilkd_loss", "vanilla_kd_loss"), "distill.trainer": ("DistillTrainer",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}
__all__ = list(_MODULE_OF)


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'kn' has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__():
    return [*globals(), *__all__]


if not os.environ.get("KN_QUICK_IMPORT") and sys.argv[:1] != ["-m"]:  # "-m" until the module is found
    import_module("kn.models")
