"""Ecosystem features: generation, resizing, torch.compile, half precision, checkpointing, the model card."""

import math

import pytest
import torch
from conftest import tiny_gpt2
from transformers import AutoTokenizer
from transformers.activations import NewGELUActivation

from kn import KnGPT2Config, KnGPT2LMHeadModel, KroneckerSpec, compress, count_parameters
from kn.files import ASSETS
from kn.kronecker import layers as kronecker

IDS = torch.randint(1, 50, (3, 9), generator=torch.Generator().manual_seed(5))
MATRICES = "attn.c_attn, attn.c_proj, mlp.c_fc, mlp.c_proj"
SPECS = {"paper": {}, "tied head": {"head": "tied"}, "2x2 of rank 2": {"shapes": {"*": (2, 2)}, "rank": 2}}


def student(dtype=None, **fields):
    return compress(tiny_gpt2(dtype=dtype), KroneckerSpec(**fields)).eval()


@pytest.fixture
def by_hand(monkeypatch):
    """Tiny layers take the way of large ones."""
    monkeypatch.setattr(kronecker, "MATERIALIZE_MAX_NUMEL", 0)
    monkeypatch.setattr(kronecker, "CUSTOM_BACKWARD_MIN_NUMEL", 0)


@pytest.mark.parametrize("folded", [False, True], ids=["compressed", "folded"])
def test_generation_with_cache_left_padding_and_sampling(folded):
    model = student().fold() if folded else student()
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    ids = IDS.masked_fill(mask == 0, 0)
    greedy = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": 49}
    together = model.generate(ids, attention_mask=mask, **greedy)
    assert torch.equal(together, model.generate(ids, attention_mask=mask, use_cache=False, **greedy))
    # the padded row without its padding
    alone = model.generate(IDS[:1, 4:], attention_mask=mask[:1, 4:], **greedy)
    assert torch.equal(together[0, 9 : 9 + alone.shape[1] - 5], alone[0, 5:])
    torch.manual_seed(1)
    sampled = model.generate(
        ids, attention_mask=mask, do_sample=True, top_p=0.9, num_return_sequences=2, max_new_tokens=4,
        pad_token_id=0, eos_token_id=49,
    )
    assert sampled.shape[0] == 6 and sampled.max() < 50
    beams = model.generate(ids, attention_mask=mask, num_beams=3, **greedy)
    assert beams.shape[0] == 3


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("size", [57, 40])
def test_resizing_the_vocabulary(name, size, tmp_path):
    """Old tokens keep their embeddings and logits; the model still trains, saves and folds."""
    model = student(**SPECS[name])
    before, kept = model(IDS % 40).logits, min(size, 50)
    model.resize_token_embeddings(size)
    after = model(IDS % 40).logits
    assert after.shape[-1] == size == model.config.vocab_size == model.transformer.wte.num_embeddings
    assert torch.allclose(after[..., :kept], before[..., :kept], atol=1e-6)
    if name == "tied head":
        assert model.lm_head.A is model.transformer.wte.A
        assert count_parameters(model)["total"] == count_parameters(model)["without_head"]
    loss = model(IDS % 40, labels=IDS % 40).loss
    loss.backward()
    assert model.transformer.wte.A.grad.shape == (size, 4)
    model.save_pretrained(tmp_path)
    assert torch.equal(KnGPT2LMHeadModel.from_pretrained(tmp_path).eval()(IDS % 40).logits, after)
    assert model.to_dense()(IDS % 40).logits.shape == after.shape


@pytest.mark.parametrize("name", [*SPECS, "folded"])
def test_compiles_without_graph_breaks(name, by_hand):
    """fullgraph=True fails at the first break; the eager backend needs no C++ compiler."""
    model = student().fold() if name == "folded" else student(**SPECS[name])
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.allclose(compiled(IDS).logits, model(IDS).logits, atol=1e-5)
    if name != "folded":
        compiled(IDS, labels=IDS).loss.backward()
        grads = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        assert all(
            torch.allclose(a, p.grad, atol=1e-5) for a, p in zip(grads, model.parameters(), strict=True)
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, by_hand, tmp_path):
    """Against the same weights in float32: some roundings of the largest logit, 18 products deep."""
    half = student().to(dtype)
    reference = student().to(dtype).float()(IDS).logits
    bound = 18 * torch.finfo(dtype).eps * reference.abs().max()
    narrow = half.fold()
    for each in (half, narrow, half.to_dense()):
        assert each.dtype == dtype and (each(IDS).logits.float() - reference).abs().max() < bound
    narrow.save_pretrained(tmp_path)
    assert KnGPT2LMHeadModel.from_pretrained(tmp_path).dtype == dtype


def test_checkpointed_blocks_give_the_same_gradients(by_hand):
    found = []
    for checkpointing in (False, True):
        model = student().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(IDS, labels=IDS).loss.backward()
        found.append([p.grad for p in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*found, strict=True))


def test_the_folded_activation_is_fused():
    """GPT-2's own tanh GELU is five passes in transformers; folding takes the same function in one."""
    teacher = tiny_gpt2(dtype=torch.float64, activation_function="gelu_new")
    assert isinstance(teacher.transformer.h[0].mlp.act, NewGELUActivation)
    model = compress(teacher)
    assert isinstance(model.fold().transformer.h[1].mlp.act.activation, torch.nn.GELU)
    assert (model.fold()(IDS).logits - model(IDS).logits).abs().max() < 1e-12


def test_large_and_small_batches_fold_alike(monkeypatch):
    """The two ways through FoldedActivation: all at once, and in parts that stay in the cache."""
    narrow = student(dtype=torch.float64).fold()
    with torch.no_grad():
        whole = narrow(IDS).logits
        monkeypatch.setattr("kn.models.fold.ROWS", 4)
        assert (narrow(IDS).logits - whole).abs().max() < 1e-12


def test_the_card_and_the_tokenizer(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "mini" / "tokenizer")
    model = student()
    model.config.provenance["teacher"] = "<script>|`a`\n# b"
    model.save_pretrained(
        tmp_path, tokenizer=tokenizer, evaluation={"perplexity on <b>my|text</b>": 20.4561, "seeds": 5}
    )
    card = (tmp_path / "README.md").read_text()
    assert "| perplexity on b my text /b | 20.46 |" in card and "| seeds | 5 |" in card
    assert "<script>" not in card
    assert "3,490 parameters, 3,090 without an untied output head (the teacher has 4,032)" in card
    assert "| attn.c_attn | A 4x8, B 2x1, 3 fused | layers 1, 3 |" in card
    assert "| transformer.wte | A 50x4, B 1x2 | once |" in card
    for part in ("## Use", "## Evaluation", "## Provenance", "## Limits", "AutoModelForCausalLM"):
        assert part in card
    assert AutoTokenizer.from_pretrained(tmp_path).vocab_size == tokenizer.vocab_size
    KnGPT2LMHeadModel.from_pretrained(tmp_path).fold().save_pretrained(tmp_path / "folded")
    assert "It is folded" in (tmp_path / "folded" / "README.md").read_text()
    (tmp_path / "README.md").write_text("my own words")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "my own words"


def test_a_tied_head_at_real_size():
    """Without a dense head the whole model has the 83.9 M parameters that the paper counts without it."""
    with torch.device("meta"):
        model = KnGPT2LMHeadModel(KnGPT2Config(kronecker={"head": "tied"}))
    assert count_parameters(model) == {"total": 83_907_530, "without_head": 83_907_530}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layers": "9:"}, r"^layers '9:' matches nothing: the model has layers 0 to 3$"),
        ({"layers": "0,7"}, r"^layer 7 does not exist: the model has layers 0 to 3$"),
        (
            {"layers": "0-2"},
            r"^layers '0-2' is unknown: allowed are 'odd', 'even', 'all', "
            r"indices and slices such as '0,2,6:', or a tuple of indices below 4$",
        ),
        (
            {"shapes": {"mlp.fc": (2, 1)}},
            rf"^shapes pattern 'mlp.fc' matches nothing: compressed are {MATRICES} in layers 1, 3; "
            r"write 'mlp.\*', or '3.mlp.\*' for layer 3$",
        ),
        ({"ranks": {"2.mlp.*": 2}}, r"^ranks pattern '2.mlp.\*' matches nothing: "),
        (
            {"shapes": {"*": None}, "embedding": False},
            r"^layers 'odd' and embedding=False leave nothing to compress: "
            rf"the model has {MATRICES} in layers 0 to 3$",
        ),
        ({"shapes": {"mlp.c_fc": (5, 1)}}, r"^1.mlp.c_fc: B of shape 5x1 does not divide W of shape 32x8: "),
        (
            {"ranks": {"mlp.c_fc": 3}},
            r"^1.mlp.c_fc: rank 3 is not possible for W 32x8 with B 2x1: allowed are 1 to 2$",
        ),
        (
            {"shapes": {"mlp.c_fc": (2,)}},
            r"^shapes\['mlp.c_fc'\] is \(2,\): expected \(rows, columns\), such as \(2, 1\), "
            r"or None to leave the matrix dense$",
        ),
        ({"factor": 0}, r"^factor is 0: expected an integer of at least 1$"),
        ({"ranks": {"mlp.*": 0}}, r"^ranks\['mlp.\*'\] is 0: expected an integer of at least 1$"),
        ({"head": "sparse"}, r"^head 'sparse' is unknown: allowed are 'dense', 'tied'$"),
        (
            {"head": "tied", "embedding": False},
            r"^head 'tied' is the embedding's factors used again: it needs embedding=True$",
        ),
    ],
    ids=str,
)
def test_a_spec_that_cannot_be_says_what_can(fields, message):
    with pytest.raises(ValueError, match=message):
        compress(tiny_gpt2(), KroneckerSpec(**fields))


def test_a_tied_head_needs_a_tied_teacher():
    with pytest.raises(
        ValueError,
        match="^head 'tied' needs a teacher whose head is tied to its embedding, "
        "and this one's is not: take head='dense'$",
    ):
        compress(tiny_gpt2(tie_word_embeddings=False), KroneckerSpec(head="tied"))


def test_what_patterns_choose():
    model = student(
        layers="0,2:", shapes={"mlp.*": (2, 2), "2.mlp.c_fc": None, "attn.c_proj": (1, 4)},
        ranks={"mlp.*": 3, "3.mlp.c_fc": 1}, embedding_factor=4,
    )
    found = {
        name.removeprefix("transformer."): (tuple(m.B.shape[-2:]), m.rank)
        for name, m in model.named_modules() if isinstance(m, kronecker.KroneckerLinear)
    }
    assert found == {
        f"h.{i}.{path}": ((shape, rank) if (i, path) != (3, "mlp.c_fc") else (shape, 1)) for i in (0, 2, 3)
        for path, shape, rank in (
            ("attn.c_attn", (2, 1), 1), ("attn.c_proj", (1, 4), 1), ("mlp.c_fc", (2, 2), 3),
            ("mlp.c_proj", (2, 2), 3),
        )
        if (i, path) != (2, "mlp.c_fc")
    }
    assert model.transformer.wte.B.shape == (1, 4) and math.isfinite(model(IDS, labels=IDS).loss.item())
    assert KroneckerSpec(layers="-3::2").indices(4) == (1, 3)
    assert KroneckerSpec(layers="odd").indices(12) == (1, 3, 5, 7, 9, 11)


def test_generation_settings_are_taken_over_and_then_its_own():
    teacher = tiny_gpt2()
    teacher.generation_config.max_new_tokens = 7
    model = compress(teacher)
    for other in (model, model.fold(), model.to_dense()):
        assert other.generation_config.max_new_tokens == 7
        other.generation_config.max_new_tokens = 3
        assert teacher.generation_config.max_new_tokens == 7
        model.generation_config.max_new_tokens = 7
