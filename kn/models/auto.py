"""Which class compresses which, and the registration with transformers' AutoConfig and AutoModel (public API only).

A further family is one file beside gpt2.py and llama.py, and a line in FAMILIES.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from kn.models import gpt2, llama
from kn.models.config import KnGPT2Config, KnLlamaConfig

FAMILIES = {KnGPT2Config: gpt2.COMPRESSED_CLASSES, KnLlamaConfig: llama.COMPRESSED_CLASSES}
COMPRESSED_CLASSES = {stock: student for students in FAMILIES.values() for stock, student in students.items()}


def register() -> None:
    """Make every family known to AutoConfig, AutoModel, AutoModelForCausalLM and AutoModelForSequenceClassification."""
    for config, students in FAMILIES.items():
        AutoConfig.register(config.model_type, config, exist_ok=True)
        for auto, student in zip((AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification), students.values(), strict=True):
            auto.register(config, student, exist_ok=True)
