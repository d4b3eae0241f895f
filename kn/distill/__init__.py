"""Knowledge distillation: the losses of eq. 2-5, the activations they compare, and a Trainer that uses them.

kn.distill.attention_kl and kn.distill.capture are functions here; the modules of these names offer more."""

from kn.distill.attention_kl import attention_kl
from kn.distill.capture import Captured, capture
from kn.distill.ilkd import ilkd_loss, streaming_ilkd_loss, vanilla_kd_loss
from kn.distill.large_vocabulary import chunked_cross_entropy, chunked_logit_kd
from kn.distill.trainer import DistillationConfig, DistillTrainer

__all__ = [
    "Captured", "DistillTrainer", "DistillationConfig", "attention_kl", "capture", "chunked_cross_entropy",
    "chunked_logit_kd", "ilkd_loss", "streaming_ilkd_loss", "vanilla_kd_loss",
]
