"""The compressed model: sizes, what is compressed, saving and loading, and the way back to a stock GPT-2."""

import pytest
import torch
from conftest import tiny_gpt2
from transformers import GPT2Config, GPT2LMHeadModel

from kn import (
    KnGPT2Config,
    KnGPT2ForSequenceClassification,
    KnGPT2LMHeadModel,
    KroneckerEmbedding,
    KroneckerLinear,
    KroneckerSpec,
    compress,
    count_parameters,
    nearest_kronecker,
)
from kn.kronecker import kronecker_sum

IDS = torch.tensor([[5, 6, 7, 8, 9, 3], [1, 2, 3, 4, 5, 6]])


def test_real_size_parameter_counts():
    with torch.device("meta"):
        student = KnGPT2LMHeadModel(KnGPT2Config(tie_word_embeddings=False, kronecker={}))
        teacher = GPT2LMHeadModel(GPT2Config())
    assert count_parameters(student) == {"total": 122_504_906, "without_head": 83_907_530}
    assert count_parameters(teacher) == {"total": 124_439_808, "without_head": 124_439_808}
    with torch.device("meta"):
        without = KnGPT2LMHeadModel(KnGPT2Config(tie_word_embeddings=False, kronecker={"out_proj": False}))
    assert count_parameters(without)["without_head"] == 85_676_990


def test_what_is_compressed():
    student = compress(tiny_gpt2())
    for index, block in enumerate(student.transformer.h):
        for path in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
            assert isinstance(block.get_submodule(path), KroneckerLinear) == (index % 2 == 1), (index, path)
    block = student.transformer.h[1]
    shapes = {
        path: tuple(block.get_submodule(path).B.shape[1:])
        for path in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    assert shapes == {"attn.c_attn": (2, 1), "attn.c_proj": (1, 2), "mlp.c_fc": (2, 1), "mlp.c_proj": (1, 2)}
    assert block.attn.c_attn.num_fused == 3 and isinstance(student.transformer.wte, KroneckerEmbedding)


def test_logits_equal_a_dense_gpt2_with_the_nearest_products():
    """A naive float64 reference: multiply out the nearest products in a copy of the teacher."""
    teacher = tiny_gpt2(dtype=torch.float64)
    student = compress(teacher)
    reference = GPT2LMHeadModel(
        GPT2Config(**{**teacher.config.to_dict(), "tie_word_embeddings": False})
    ).double().eval()
    reference.load_state_dict(teacher.state_dict())
    with torch.no_grad():
        for index in (1, 3):
            block = reference.transformer.h[index]
            for path, b_shape, parts in (
                ("attn.c_attn", (2, 1), 3), ("attn.c_proj", (1, 2), 1), ("mlp.c_fc", (2, 1), 1),
                ("mlp.c_proj", (1, 2), 1),
            ):
                weight = block.get_submodule(path).weight  # in×out
                weight.copy_(
                    torch.cat([
                        kronecker_sum(*nearest_kronecker(part, b_shape)) for part in weight.T.chunk(parts)
                    ]).T
                )
        table = reference.transformer.wte.weight
        table.copy_(kronecker_sum(*nearest_kronecker(table, (1, 2))))
    assert torch.allclose(student(IDS).logits, reference(IDS).logits, atol=1e-11)
    assert torch.allclose(student.to_dense()(IDS).logits, student(IDS).logits, atol=1e-11)
    assert type(student.to_dense()) is GPT2LMHeadModel


def test_head_is_dense_untied_and_cloned():
    teacher = tiny_gpt2()
    student = compress(teacher)
    assert torch.equal(student.lm_head.weight, teacher.transformer.wte.weight)
    with torch.no_grad():
        student.lm_head.weight.add_(1)
        student.transformer.wte.A.mul_(2)
    assert not torch.equal(student.lm_head.weight, teacher.lm_head.weight)
    assert torch.equal(teacher.lm_head.weight, teacher.transformer.wte.weight)
    assert "lm_head.weight" in student.state_dict() and student.config.tie_word_embeddings is False


def test_a_language_model_becomes_a_classifier(tmp_path):
    student = compress(tiny_gpt2())
    student.save_pretrained(tmp_path)
    classifier = KnGPT2ForSequenceClassification.from_pretrained(tmp_path, num_labels=3).eval()
    assert classifier(IDS).logits.shape == (2, 3)
    assert torch.equal(classifier.transformer.h[1].mlp.c_fc.A, student.transformer.h[1].mlp.c_fc.A)


def test_errors_say_what_is_allowed():
    with pytest.raises(
        TypeError, match=r"^compress takes a GPT-2 or Llama model \(GPT2LMHeadModel, .*\), got Linear$"
    ):
        compress(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="layer 9 does not exist: the model has layers 0 to 3"):
        compress(tiny_gpt2(), KroneckerSpec(layers=(9,)))
    with pytest.raises(ValueError, match="layers 'first' is unknown: allowed are 'odd', 'even', 'all'"):
        compress(tiny_gpt2(), KroneckerSpec(layers="first"))
    with pytest.raises(ValueError, match="init 'magic' is unknown"):
        compress(tiny_gpt2(), KroneckerSpec(init="magic"))
    with pytest.raises(ValueError, match="leave nothing to compress"):
        compress(tiny_gpt2(), KroneckerSpec(layers=(), embedding=False))


def test_every_option_of_the_spec_builds_and_runs():
    for spec in (
        KroneckerSpec(layers="all", factor=4), KroneckerSpec(rank=2), KroneckerSpec(embedding=False),
        KroneckerSpec(out_proj=False), KroneckerSpec(layers=(0, 2), scale="unit_b"),
    ):
        student = compress(tiny_gpt2(), spec)
        assert student(IDS, labels=IDS).loss.isfinite() and student.config.spec == spec
