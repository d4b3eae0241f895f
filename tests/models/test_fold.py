"""Folding is exact: logits, cache, generation, saving; what cannot be folded is refused in one line."""

import json
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
from conftest import ROOT, tiny_gpt2

from kn import KnGPT2Config, KnGPT2LMHeadModel, KroneckerSpec, compress

IDS = torch.randint(1, 50, (3, 11), generator=torch.Generator().manual_seed(5))


def student(labels=0, dtype=torch.float64, **fields):
    """A compressed tiny GPT-2 whose factors and biases are far from special values."""
    model = compress(tiny_gpt2(labels, dtype=dtype, n_embd=16), KroneckerSpec(**fields)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".A", ".B", ".bias")):
                parameter.add_(
                    0.2 * torch.randn(
                        parameter.shape, generator=torch.Generator().manual_seed(len(name)), dtype=dtype
                    )
                )
    return model


def logits(model, **inputs):
    with torch.no_grad():
        return model(**({"input_ids": IDS} | inputs)).logits


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"layers": "all"},
        {"layers": (0, 3)},
        {"out_proj": False},
        {"embedding": False},
        {"factor": 4, "layers": "all"},
        {"layers": "even", "scale": "unit_b"},
        {"head": "tied"},
        {"embedding_factor": 4},
    ],
)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_logits_are_equal_in_float64(fields, attention):
    model = student(**fields)
    narrow = model.fold()
    for each in (model, narrow):
        each.set_attn_implementation(attention)
    assert (logits(narrow) - logits(model)).abs().max() < 1e-12 * logits(model).abs().max()
    mask = torch.ones_like(IDS)
    mask[1, :4] = 0  # left padding
    kept = mask.bool()
    assert (
        logits(narrow, attention_mask=mask) - logits(model, attention_mask=mask)
    )[kept].abs().max() < 1e-12 * logits(model).abs().max()


@pytest.mark.parametrize("case", ["no biases", "negative s", "s is zero", "b has a zero", "all negative"])
def test_signs_and_zeros(case):
    """s = b_q·b_k may have any sign, or vanish with u: never divided by."""
    model = student(layers="all")
    with torch.no_grad():
        for block in model.transformer.h:
            b_q, b_k, _ = block.attn.c_attn.B[..., 0]
            if case == "no biases":
                for layer in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj):
                    layer.bias.zero_()
            if case == "negative s":
                b_q.copy_(-b_k)
            if case == "s is zero":
                b_q.copy_(torch.stack([b_k[1], -b_k[0]]))
                assert b_q @ b_k == 0
            if case == "b has a zero":
                block.mlp.c_fc.B[0, 0] = 0
                block.mlp.c_proj.B[0, 0, 1] = 0
                b_k[0] = 0
            if case == "all negative":
                for layer in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj):
                    layer.B.copy_(-layer.B.abs())
    assert (logits(model.fold()) - logits(model)).abs().max() < 1e-12 * logits(model).abs().max()


def test_the_cache_of_compressed_layers_is_half_as_wide():
    model = student()
    narrow = model.fold()
    with torch.no_grad():
        caches = [each(input_ids=IDS, use_cache=True).past_key_values for each in (model, narrow)]
    widths = [[(layer.keys.shape[-1], layer.values.shape[-1]) for layer in cache.layers] for cache in caches]
    assert widths == [[(8, 8)] * 4, [(8, 8), (4, 4), (8, 8), (4, 4)]]


def test_generation_is_the_same():
    model = student(layers="all")
    narrow = model.fold()
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    for options in ({"do_sample": False}, {"do_sample": True, "top_k": 10}):
        texts = []
        for each in (model, narrow):
            torch.manual_seed(0)
            texts.append(each.generate(IDS, attention_mask=mask, max_new_tokens=5, pad_token_id=0, **options))
        assert torch.equal(*texts) and texts[0].shape == (3, 16)


def test_a_classifier_folds_too():
    model = student(labels=3)
    mask = torch.ones_like(IDS)
    mask[0, 7:] = 0
    assert (
        logits(model.fold(), attention_mask=mask) - logits(model, attention_mask=mask)
    ).abs().max() < 1e-11


def test_parameters_halve_in_compressed_layers():
    model = student(layers="all")
    attn, mlp = model.fold().transformer.h[1].attn, model.fold().transformer.h[1].mlp
    assert attn.c_attn.weight.shape == (16, 24) and attn.c_proj.weight.shape == (8, 16)
    assert mlp.c_fc.weight.shape == (16, 32) and mlp.c_proj.weight.shape == (32, 16)


def test_saved_and_loaded_in_a_fresh_process(tmp_path):
    narrow = student(dtype=torch.float32).fold()
    narrow.save_pretrained(tmp_path / "narrow")
    code = (
        "import sys, json, torch, kn; model = kn.KnGPT2LMHeadModel.from_pretrained(sys.argv[1]).eval(); "
        "ids = torch.tensor(json.loads(sys.argv[2])); print(json.dumps(model(input_ids=ids).logits.tolist()))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "narrow"), json.dumps(IDS.tolist())], cwd=ROOT,
        capture_output=True, text=True,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert torch.equal(torch.tensor(json.loads(result.stdout.splitlines()[-1])), logits(narrow))


def test_what_cannot_be_folded_is_refused():
    with pytest.raises(
        ValueError, match="^fold needs rank 1, this model has rank 2: a sum of 2 products is not narrower "
    ):
        student(rank=2).fold()
    with pytest.raises(ValueError, match="^this model is folded already$"):
        student().fold().fold()
    with pytest.raises(ValueError, match=r"^to_dense needs the model before fold\(\)"):
        student().fold().to_dense()
    with pytest.raises(ValueError, match="^fold needs heads that factor 16 divides, they are 8 wide$"):
        student(factor=16, shapes={"mlp.*": None}).fold()
    with pytest.raises(ValueError, match="^fold needs B 2x1 in mlp.c_fc, this model has 2x2$"):
        student(shapes={"mlp.c_fc": (2, 2), "attn.*": None}).fold()
    with pytest.raises(ValueError, match="^fold needs compressed layers, this model has none$"):
        student(layers=()).fold()


@pytest.mark.parametrize(
    "fields",
    [
        {"factor": 16}, {"shapes": {"mlp.*": (2, 2)}}, {"ranks": {"attn.c_attn": 2}},
        {"shapes": {"mlp.c_proj": None, "3.attn.c_proj": (2, 2)}},
    ],
    ids=str,
)
def test_what_can_be_folded_is_and_the_rest_stays(fields):
    """Where 16 does not divide a head, B is 2x2 or the rank is 2, the block's other sublayer is folded."""
    model = student(**fields)
    narrow = model.fold()
    assert (logits(narrow) - logits(model)).abs().max() < 1e-12 * logits(model).abs().max()
    assert narrow.state_dict().keys() != model.state_dict().keys()


def test_the_paper_s_size_folds():
    with torch.device("meta"):
        narrow = KnGPT2LMHeadModel(
            KnGPT2Config(tie_word_embeddings=False, kronecker=asdict(KroneckerSpec()), folded=True)
        )
    weights = sum(
        p.numel() for block in narrow.transformer.h for n, p in block.named_parameters()
        if n.endswith("weight") and p.ndim == 2
    )
    assert weights == 63_700_992  # of 84,934,656 dense
