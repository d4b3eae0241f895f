"""The symmetries of GPT-2 leave float64 logits as they are, one by one and together; what they
cannot take is refused. The aligned start finds the last three, of neurons and heads, by least squares; here
they stand by themselves.
"""

import pytest
import torch
from conftest import tiny_gpt2

from kn.align import symmetries

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
    model = symmetries.untied_copy(tiny_gpt2(labels, dtype=torch.float64, n_embd=16))
    symmetries.centre_gpt2(model)
    symmetries.fold_gpt2_norms(model)
    return model


@torch.no_grad()
def permute_neurons(model, layer, order):
    mlp = model.transformer.h[layer].mlp
    mlp.c_fc.weight.copy_(mlp.c_fc.weight[:, order])
    mlp.c_fc.bias.copy_(mlp.c_fc.bias[order])
    mlp.c_proj.weight.copy_(mlp.c_proj.weight[order])


def head_columns(model, part, head):
    """Columns of one head's query (part 0), key (1) or value (2) in c_attn's weight."""
    d, e = model.config.n_embd, model.config.n_embd // model.config.n_head
    return slice(part * d + head * e, part * d + (head + 1) * e)


def transform_outputs(layer, columns, M):
    """y ← y M for some outputs y of a Conv1D."""
    layer.weight[:, columns] = layer.weight[:, columns] @ M
    layer.bias[columns] = layer.bias[columns] @ M


@torch.no_grad()
def change_query_key(model, layer, head, M):
    """q ← q M, k ← k M⁻ᵀ of one head, M (head size, head size) invertible: q·k stays."""
    c_attn = model.transformer.h[layer].attn.c_attn
    transform_outputs(c_attn, head_columns(model, 0, head), M)
    transform_outputs(c_attn, head_columns(model, 1, head), torch.linalg.inv(M).T)


@torch.no_grad()
def change_value_output(model, layer, head, N):
    """v ← v N of one head, and N⁻¹ before the output projection's rows that read it."""
    attn, rows = model.transformer.h[layer].attn, head_columns(model, 0, head)
    transform_outputs(attn.c_attn, head_columns(model, 2, head), N)
    attn.c_proj.weight[rows] = torch.linalg.inv(N) @ attn.c_proj.weight[rows]


SYMMETRIES = {
    "centred": lambda m: symmetries.centre_gpt2(m),
    "norms folded": lambda m: symmetries.fold_gpt2_norms(m),
    "neurons permuted": lambda m: permute_neurons(
        m, 1, torch.randperm(64, generator=torch.Generator().manual_seed(3))
    ),
    "query and key": lambda m: change_query_key(m, 2, 1, random(8, 8)),
    "value and output": lambda m: change_value_output(m, 3, 0, random(8, 8)),
}


@pytest.mark.parametrize("labels", [0, 3], ids=["language model", "classifier"])
@pytest.mark.parametrize("names", [*([name] for name in SYMMETRIES), list(SYMMETRIES)], ids=str)
def test_logits_stay(labels, names):
    teacher = tiny_gpt2(labels, dtype=torch.float64, n_embd=16)
    model = symmetries.untied_copy(teacher)
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
    symmetries.rotate_gpt2(model, Q)
    assert (model(IDS).logits - teacher(IDS).logits).abs().max() < 1e-10 * teacher(IDS).logits.abs().max()
    assert torch.allclose(model.transformer.wte.weight, straight @ Q)
    assert not torch.allclose(model.transformer.wte.weight, straight)
    assert model.transformer.wte.weight.sum(-1).abs().max() < 1e-12


def test_refusals():
    for wrong in (random(16, 16), torch.linalg.qr(random(16, 16)).Q):
        with pytest.raises(ValueError, match="^Q must be orthogonal with Q·1 = 1"):
            symmetries.rotate_gpt2(prepared(), wrong)
    model = symmetries.untied_copy(tiny_gpt2())
    with torch.no_grad():
        model.transformer.ln_f.weight[3] = 0
    with pytest.raises(ValueError, match="^1 gains of ln_f are zero: "):
        symmetries.fold_gpt2_norms(model)
    with pytest.raises(
        TypeError,
        match="^the symmetries are for GPT2LMHeadModel, GPT2ForSequenceClassification, LlamaForCausalLM, "
        "got Linear$",
    ):
        symmetries.untied_copy(torch.nn.Linear(2, 2))
