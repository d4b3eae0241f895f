"""kn: Kronecker decomposition for GPT compression.

`import kn` makes the compressed models known to transformers' AutoModel, which takes as long as importing transformers.
Where KN_QUICK_IMPORT is set (the command line sets it: --help and the plan need no model) that is left to the first use.
"""

import os
import warnings
from importlib import import_module

warnings.filterwarnings("ignore", message="IProgress not found")  # tqdm in a notebook without ipywidgets: its bars are text then

_WHERE = {
    "nearest_kronecker": "kronecker.layers", "KroneckerLinear": "kronecker.layers", "KroneckerEmbedding": "kronecker.layers", "KroneckerHead": "kronecker.layers",
    "KroneckerSpec": "models.config", "KnGPT2Config": "models.config", "KnLlamaConfig": "models.config", "compress": "compression", "count_parameters": "models.base",
    "KnGPT2Model": "models.gpt2", "KnGPT2LMHeadModel": "models.gpt2", "KnGPT2ForSequenceClassification": "models.gpt2", "KnLlamaModel": "models.llama", "KnLlamaForCausalLM": "models.llama", "KnLlamaForSequenceClassification": "models.llama",
    "attention_kl": "distill.attention_kl", "capture": "distill.capture", "Captured": "distill.capture", "ilkd_loss": "distill.ilkd", "vanilla_kd_loss": "distill.ilkd", "DistillTrainer": "distill.trainer",
}  # fmt: skip
__all__ = list(_WHERE)


def __getattr__(name: str):
    if name not in _WHERE:
        raise AttributeError(f"module 'kn' has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)


def __dir__():
    return [*globals(), *__all__]


if not os.environ.get("KN_QUICK_IMPORT"):
    import_module("kn.models")
