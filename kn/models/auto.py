"""The compressed class of each stock class, and registration with transformers' AutoConfig and AutoModel.

A further family is one file beside gpt2.py and llama.py, and a line in FAMILIES."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from kn.models import gpt2, llama
from kn.models.base import KroneckerModel
from kn.models.config import KnGPT2Config, KnLlamaConfig

FAMILIES = {KnGPT2Config: gpt2.COMPRESSED_CLASSES, KnLlamaConfig: llama.COMPRESSED_CLASSES}
COMPRESSED_CLASSES: dict[type, type[KroneckerModel]] = gpt2.COMPRESSED_CLASSES | llama.COMPRESSED_CLASSES
AUTO_CLASSES = (AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification)  # each family's order


def register() -> None:
    """Register every family with AutoConfig and the three AutoModel classes."""
    for config, classes in FAMILIES.items():
        AutoConfig.register(config.model_type, config, exist_ok=True)
        for auto_class, compressed in zip(AUTO_CLASSES, classes.values(), strict=True):
            auto_class.register(config, compressed, exist_ok=True)
