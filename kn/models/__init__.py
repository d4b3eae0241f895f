"""KnGPT2 and KnLlama: transformers models some of whose weight matrices are Kronecker products.

A KroneckerSpec in the configuration says which; the models save, load, generate and resize like any other,
fold for inference and go back to dense. Importing this package registers them with transformers' AutoConfig
and AutoModel."""

from kn.models.auto import register
from kn.models.base import count_parameters
from kn.models.config import KnGPT2Config, KnLlamaConfig, KroneckerSpec
from kn.models.gpt2 import KnGPT2ForSequenceClassification, KnGPT2LMHeadModel, KnGPT2Model
from kn.models.llama import KnLlamaForCausalLM, KnLlamaForSequenceClassification, KnLlamaModel

__all__ = [
    "KnGPT2Config", "KnGPT2ForSequenceClassification", "KnGPT2LMHeadModel", "KnGPT2Model", "KnLlamaConfig",
    "KnLlamaForCausalLM", "KnLlamaForSequenceClassification", "KnLlamaModel", "KroneckerSpec",
    "count_parameters",
]

register()
