"""kn: Kronecker decomposition for GPT compression. Imports are lazy: `import kn` is quick."""

import warnings
from importlib import import_module

from . import auto

warnings.filterwarnings("ignore", message="IProgress not found")  # tqdm in a notebook without ipywidgets: its bars are text then

_WHERE = {
    "nearest_kronecker": "kronecker", "KroneckerLinear": "kronecker", "KroneckerEmbedding": "kronecker", "KroneckerHead": "kronecker",
    "KroneckerSpec": "config", "KnGPT2Config": "config", "KnLlamaConfig": "config", "compress": "model", "count_parameters": "model",
    "KnGPT2Model": "gpt2", "KnGPT2LMHeadModel": "gpt2", "KnGPT2ForSequenceClassification": "gpt2", "KnLlamaModel": "llama", "KnLlamaForCausalLM": "llama", "KnLlamaForSequenceClassification": "llama",
    "attention_kl": "attention", "capture": "distill", "Captured": "distill", "ilkd_loss": "distill", "vanilla_kd_loss": "distill", "DistillTrainer": "distill",
}  # fmt: skip
__all__ = list(_WHERE)


def __getattr__(name: str):
    if name not in _WHERE:
        raise AttributeError(f"module 'kn' has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)


def __dir__():
    return [*globals(), *__all__]


auto.register()
