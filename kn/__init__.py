"""kn: Kronecker decomposition for GPT compression. Imports are lazy: `import kn` is quick."""

import sys
from importlib import import_module

_WHERE = {
    "nearest_kronecker": "kronecker", "KroneckerLinear": "kronecker", "KroneckerEmbedding": "kronecker",
    "KroneckerSpec": "config", "KnGPT2Config": "config", "KnGPT2LMHeadModel": "gpt2", "KnGPT2ForSequenceClassification": "gpt2",
    "compress": "gpt2", "count_parameters": "gpt2",
    "capture": "distill", "Captured": "distill", "ilkd_loss": "distill", "vanilla_kd_loss": "distill", "DistillTrainer": "distill",
}  # fmt: skip
__all__ = list(_WHERE)


def __getattr__(name: str):
    if name not in _WHERE:
        raise AttributeError(f"module 'kn' has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)


def __dir__():
    return [*globals(), *__all__]


if "transformers.models.auto.modeling_auto" in sys.modules:  # then `import kn` makes KnGPT2 known to AutoModel; else `import kn.gpt2` does
    import_module("kn.gpt2")
