"""KnGPT2: GPT-2 whose embedding and chosen layers are Kronecker products (§3.2 of the paper). GPT-2's module tree is kept."""

from __future__ import annotations

from transformers import GPT2ForSequenceClassification, GPT2LMHeadModel, GPT2Model

from kn.models.base import KroneckerModel
from kn.models.config import KnGPT2Config
from kn.models.fold import Attention, FeedForward


class _KnGPT2(KroneckerModel):
    config_class = KnGPT2Config
    blocks, table = "h", "wte"
    # query, key and value are three products of one layer; B is 2x1 where outputs share an entry of A and 1x2 where inputs do (Table 1)
    matrices = {"attn.c_attn": ("outputs", 3), "attn.c_proj": ("inputs", 1), "mlp.c_fc": ("outputs", 1), "mlp.c_proj": ("inputs", 1)}
    out_proj = "attn.c_proj"
    narrow = (Attention, FeedForward)
    _tied_weights_keys = {}  # a dense head is a clone; model.py ties a Kronecker one


class KnGPT2Model(_KnGPT2, GPT2Model):
    """KnGPT2 (§3.2 of the paper) without a head; last_hidden_state (batch, length, width)."""

    dense_class = GPT2Model


class KnGPT2LMHeadModel(_KnGPT2, GPT2LMHeadModel):
    """KnGPT2 (§3.2 of the paper) as language model; logits (batch, length, vocabulary). The head is dense (Table 3's footnote) unless spec.head is "tied"."""

    dense_class = GPT2LMHeadModel


class KnGPT2ForSequenceClassification(_KnGPT2, GPT2ForSequenceClassification):
    """KnGPT2 (§3.2 of the paper) as sequence classifier on the last token that is not padding; logits (batch, labels)."""

    dense_class = GPT2ForSequenceClassification


COMPRESSED_CLASSES = {model.dense_class: model for model in (KnGPT2Model, KnGPT2LMHeadModel, KnGPT2ForSequenceClassification)}
