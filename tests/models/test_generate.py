"""generate() of folded models: every cache and way of decoding gives the unfolded model's tokens, or fails as
the stock model does (no GPU, a package that is missing, a method that transformers no longer holds)."""

import logging

import pytest
import torch
from conftest import tiny_gpt2
from test_llama import tiny_llama
from transformers import ContinuousBatchingConfig, GenerationConfig, WatermarkingConfig
from transformers.generation.configuration_utils import ALL_CACHE_IMPLEMENTATIONS, GenerationMode

import kn

IDS = torch.randint(1, 50, (2, 7), generator=torch.Generator().manual_seed(0))
GREEDY = {"max_new_tokens": 6, "pad_token_id": 0, "do_sample": False}
PAGES = ContinuousBatchingConfig(page_size=16, num_blocks=8, max_batch_tokens=32)  # else most of the memory
WAYS = {
    "": {}, "chunked": {"prefill_chunk_size": 3}, "beams": {"num_beams": 2},
    "sampled": {"do_sample": True, "num_return_sequences": 2}, "not compiled": {"disable_compile": True},
}
DECODING = {
    GenerationMode.GREEDY_SEARCH: {},
    GenerationMode.SAMPLE: {"do_sample": True, "top_p": 0.9},
    GenerationMode.CONTRASTIVE_SEARCH: {"penalty_alpha": 0.6, "top_k": 4},
    GenerationMode.ASSISTED_GENERATION: {"assistant_model": None},
    GenerationMode.DOLA_GENERATION: {"dola_layers": "low"},
    GenerationMode.BEAM_SEARCH: {"num_beams": 3},
    GenerationMode.BEAM_SAMPLE: {"num_beams": 3, "do_sample": True},
    GenerationMode.CONSTRAINED_BEAM_SEARCH: {"force_words_ids": [[5]], "num_beams": 3},
    GenerationMode.GROUP_BEAM_SEARCH: {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "early exit": {"assistant_early_exit": 2},
    "no cache": {"use_cache": False},
    "guidance": {"guidance_scale": 1.5},
    "watermark": {"watermarking_config": WatermarkingConfig()},
    "scores": {"output_scores": True, "output_hidden_states": True, "return_dict_in_generate": True},
    "static, longer": {"cache_implementation": "static", "cache_config": {"max_cache_len": 20}},
}
ASSISTED = (GenerationMode.ASSISTED_GENERATION, "prompt lookup", "early exit")  # one row at a time


def model(family, layers, attention):
    make = tiny_gpt2 if family == "gpt2" else tiny_llama
    dense = make(dtype=torch.float64, attn_implementation=attention)
    return dense, kn.compress(dense, kn.KroneckerSpec(layers=layers))


def tokens(each, ids, options):
    """The tokens, or type and first words of the error."""
    torch.manual_seed(0)
    if "assistant_model" in options:
        options = {**options, "assistant_model": each}
    try:
        made = each.generate(ids, **{**GREEDY, **options})
        return getattr(made, "sequences", made).tolist()
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:60]}"


def compare(family, layers, attention, ids, options):
    logging.disable(logging.CRITICAL)  # a failing batch prints its traceback
    try:
        dense, student = model(family, layers, attention)
        stock, narrow, wide = (tokens(each, ids, options) for each in (dense, student.fold(), student))
    finally:
        logging.disable(logging.NOTSET)
    assert narrow == wide
    if isinstance(stock, str):
        assert narrow == stock
    else:
        assert len(narrow) == len(stock) and len(narrow[0]) > ids.shape[1]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("cache", ALL_CACHE_IMPLEMENTATIONS)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_every_cache(family, cache, way):
    compare(family, "all", "sdpa", IDS, {"cache_implementation": cache, **WAYS[way]})


@pytest.mark.parametrize("name", DECODING, ids=str)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_every_way_of_decoding(family, name):
    assert set(GenerationMode) < set(DECODING)
    compare(family, "odd", "sdpa", IDS[:1] if name in ASSISTED else IDS, DECODING[name])


@pytest.mark.parametrize("layers", ["odd", "all"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_static_cache_that_is_filled_in_chunks(family, attention, layers):
    """It was made as wide as the configuration's heads."""
    compare(family, layers, attention, IDS, {"cache_implementation": "static", "prefill_chunk_size": 3})


@pytest.mark.parametrize("layers", ["odd", "all"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_continuous_batches(family, attention, layers):
    """Their pages are as wide as the configuration's heads: folded models answered without a new token."""
    student = model(family, layers, attention)[1].float()
    made = []
    for each in (student, student.fold()):
        answers = each.generate_batch(IDS.tolist(), GenerationConfig(**GREEDY, eos_token_id=-1), PAGES)
        made.append(sorted(answer.generated_tokens for answer in answers.values()))
    expected = student.generate(IDS, **GREEDY, eos_token_id=-1)[:, IDS.shape[1] :]
    assert made[0] == made[1] == sorted(expected.tolist())
