"""The symmetries leave float64 logits as they are, one by one and together; what they cannot take is refused.
"""

import pytest
import torch
from conftest import tiny_gpt2

from kn.align import symmetries_gpt2 as symmetries

IDS = torch.randint(1, 50, (3, 11), generator=torch.Generator().manual_seed(5))


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rotation(d):
    """A random orthogonal matrix that keeps the ones vector."""
    basis = torch.linalg.qr(torch.cat([torch.ones(d, 1, dtype=torch.float64), random(d, d - 1, seed=1)], 1)).Q
    inner = torch.eye(d, dtype=torch.float64)
    inner[1:, 1:] = torch.linalg.qr(random(d - 1, d - 1, seed=2)).Q
    return basis @ inner @ basis.T


def prepared(labels=0):
    model = symmetries.untied(tiny_gpt2(labels, dtype=torch.float64, n_embd=16))
    symmetries.centre(model)
    symmetries.fold_norms(model)
    return model


SYMMETRIES = {
    "centred": lambda m: symmetries.centre(m),
    "norms folded": lambda m: symmetries.fold_norms(m),
    "neurons permuted": lambda m: symmetries.permute_neurons(
        m, 1, torch.randperm(64, generator=torch.Generator().manual_seed(3))
    ),
    "query and key": lambda m: symmetries.change_query_key(m, 2, 1, random(8, 8)),
    "value and output": lambda m: symmetries.change_value_output(m, 3, 0, random(8, 8)),
}


@pytest.mark.parametrize("labels", [0, 3], ids=["language model", "classifier"])
@pytest.mark.parametrize("names", [*([name] for name in SYMMETRIES), list(SYMMETRIES)], ids=str)
def test_logits_stay(labels, names):
    teacher = tiny_gpt2(labels, dtype=torch.float64, n_embd=16)
    model = symmetries.untied(teacher)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for name in names:
        SYMMETRIES[name](model)
    assert any(not torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    assert (model(IDS).logits - teacher(IDS).logits).abs().max() < 1e-10 * teacher(IDS).logits.abs().max()


@pytest.mark.parametrize("labels", [0, 3], ids=["language model", "classifier"])
def test_a_rotation_leaves_the_logits_and_nothing_else(labels):
    teacher, model = tiny_gpt2(labels, dtype=torch.float64, n_embd=16), prepared(labels)
    straight = model.transformer.wte.weight.detach().clone()
    Q = rotation(16)
    symmetries.rotate(model, Q)
    assert (model(IDS).logits - teacher(IDS).logits).abs().max() < 1e-10 * teacher(IDS).logits.abs().max()
    assert torch.allclose(model.transformer.wte.weight, straight @ Q)
    assert not torch.allclose(model.transformer.wte.weight, straight)
    assert model.transformer.wte.weight.sum(-1).abs().max() < 1e-12


def test_refusals():
    tied = tiny_gpt2(dtype=torch.float64, n_embd=16)
    with pytest.raises(
        ValueError, match=r"^the head is tied to the embedding, which centring changes: take untied\(model\)$"
    ):
        symmetries.centre(tied)
    with pytest.raises(
        ValueError,
        match=r"^the head is tied to the embedding, and takes up the gain of ln_f: take untied\(model\)$",
    ):
        symmetries.fold_norms(tied)
    with pytest.raises(
        ValueError,
        match=r"^a LayerNorm has a gain or bias that a rotation would mix: fold_norms\(model\) first$",
    ):
        symmetries.rotate(symmetries.untied(tied), rotation(16))
    for wrong in (random(16, 16), torch.linalg.qr(random(16, 16)).Q):
        with pytest.raises(ValueError, match="^Q must be orthogonal with Q·1 = 1"):
            symmetries.rotate(prepared(), wrong)
    with pytest.raises(ValueError, match="^order must be a permutation of 0 to 63$"):
        symmetries.permute_neurons(prepared(), 0, torch.zeros(64, dtype=torch.long))
    model = symmetries.untied(tied)
    with torch.no_grad():
        model.transformer.ln_f.weight[3] = 0
    with pytest.raises(ValueError, match="^1 gains of ln_f are zero: "):
        symmetries.fold_norms(model)
    with pytest.raises(
        TypeError,
        match="^the symmetries are for GPT2LMHeadModel and GPT2ForSequenceClassification, got Linear$",
    ):
        symmetries.untied(torch.nn.Linear(2, 2))
