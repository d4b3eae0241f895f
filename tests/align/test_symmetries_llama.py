"""Llama's symmetries leave float64 logits as they are, one by one and together; what they cannot
take is refused. The aligned start finds the last three, of neurons and heads, by least
squares; here they stand by themselves.
"""

import pytest
import torch
from test_llama import exact_norm, logits, tiny_llama  # noqa: F401

from kn.align import symmetries

pytestmark = pytest.mark.usefixtures("exact_norm")


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def permute_neurons(model, layer, order):
    mlp = model.model.layers[layer].mlp
    for parameter in (*mlp.gate_proj.parameters(), *mlp.up_proj.parameters()):
        parameter.copy_(parameter[order])
    mlp.down_proj.weight.copy_(mlp.down_proj.weight[:, order])


def transform_outputs(layer, rows, M):
    """y ← M y for some outputs y of a linear layer."""
    for parameter in layer.parameters():
        parameter[rows] = M @ parameter[rows]


def head_rows(attn, head):
    """Rows of a head in q_proj's weight, or of a key head in k_proj's and v_proj's."""
    return torch.arange(head * attn.head_dim, (head + 1) * attn.head_dim)


def query_heads(attn, key_head):
    """The query heads that share one key head."""
    return range(key_head * attn.num_key_value_groups, (key_head + 1) * attn.num_key_value_groups)


@torch.no_grad()
def change_value_output(model, layer, head, N):
    """v ← v N of one key head, N (head size, head size), and N⁻¹ before o_proj of its query heads."""
    attn = model.model.layers[layer].self_attn
    transform_outputs(attn.v_proj, head_rows(attn, head), N.T)
    for query in query_heads(attn, head):
        columns = head_rows(attn, query)
        attn.o_proj.weight[:, columns] = attn.o_proj.weight[:, columns] @ torch.linalg.inv(N).T


@torch.no_grad()
def scale_rotary_pair(model, layer, head, frequency, z):
    """q ← z q, k ← k / conj(z) at one rotary frequency of one key head and its query heads.

    Dimensions `frequency` and that plus half a head are a complex number, which rotary positions multiply by
    one of length 1: Re(q conj(k)) stays.
    """
    attn = model.model.layers[layer].self_attn
    pair = torch.tensor([frequency, frequency + attn.head_dim // 2])

    def as_matrix(c):
        return torch.tensor([[c.real, -c.imag], [c.imag, c.real]], dtype=torch.float64)

    for query in query_heads(attn, head):
        transform_outputs(attn.q_proj, head_rows(attn, query)[pair], as_matrix(z))
    transform_outputs(attn.k_proj, head_rows(attn, head)[pair], as_matrix(1 / z.conjugate()))


SYMMETRIES = {
    "norms folded": lambda m: symmetries.fold_llama_norms(m),
    "rotated": lambda m: (
        symmetries.fold_llama_norms(m), symmetries.rotate_llama(m, torch.linalg.qr(random(24, 24)).Q)
    ),
    "neurons permuted": lambda m: permute_neurons(
        m, 1, torch.randperm(32, generator=torch.Generator().manual_seed(3))
    ),
    "value and output": lambda m: change_value_output(m, 3, 1, random(4, 4)),
    "query and key": lambda m: scale_rotary_pair(m, 2, 1, 1, 0.3 - 1.7j),
}


@pytest.mark.parametrize(
    "fields", [{}, {"biases": True}, {"tie_word_embeddings": False}], ids=["tied", "biases", "untied"]
)
@pytest.mark.parametrize("names", [*([name] for name in SYMMETRIES), list(SYMMETRIES)], ids=str)
def test_logits_stay(names, fields):
    teacher = tiny_llama(**fields)
    model = symmetries.untied_copy(teacher)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    assert all((norm.weight != 1).any() for norm, _ in symmetries.llama_norm_consumers(model))
    for name in names:
        SYMMETRIES[name](model)
    assert any(not torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    assert (logits(model) - logits(teacher)).abs().max() < 1e-10 * logits(teacher).abs().max()


def test_frequencies_cannot_be_permuted():
    """They are tied to positions: exchanging two of them in query and key alike is another function, but at
    one position.
    """
    teacher = tiny_llama()
    model = symmetries.untied_copy(teacher)
    order = torch.tensor([1, 0, 3, 2])  # both frequencies of a head of 4
    with torch.no_grad():
        for layer in (model.model.layers[1].self_attn.q_proj, model.model.layers[1].self_attn.k_proj):
            layer.weight.copy_(layer.weight.unflatten(0, (-1, 4))[:, order].flatten(0, 1))
    difference = (logits(model) - logits(teacher)).abs().amax((0, 2))
    assert difference[0] < 1e-12 and difference[-1] > 1e-4


def test_refusals():
    tied = tiny_llama()
    with pytest.raises(TypeError, match="^the symmetries are for .*, LlamaForCausalLM, got LlamaModel$"):
        symmetries.untied_copy(tied.model)
    for wrong in (random(24, 24), torch.eye(12)):
        with pytest.raises(ValueError, match="^Q must be orthogonal and 24 wide"):
            symmetries.rotate_llama(symmetries.untied_copy(tied), wrong)
