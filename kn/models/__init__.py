"""KnGPT2 and KnLlama: transformers models some of whose matrices are Kronecker products.

Importing this package registers them with transformers' AutoConfig and AutoModel.
"""

from kn.models.auto import register
from kn.models.base import count_parameters
from kn.models.config import KnGPT2Config, KnLlamaConfig, KroneckerSpec
from kn.models.gpt2 import KnGPT2ForSequenceClassification, KnGPT2LMHeadModel, KnGPT2Model
from kn.models.llama import KnLlamaForCausalLM, KnLlamaForSequenceClassification, KnLlamaModel

__all__ = [
    "KnGPT2Config", "KnGPT2ForSequenceClassification", "KnGPT2LMHeadModel", "KnGPT2Model", "KnLlamaConfig", "KnLlamaForCausalLM", "KnLlamaForSequenceClassification", "KnLlamaModel",
    "KroneckerSpec", "count_parameters",
]  # fmt: skip

register()
