"""Llama's symmetries leave float64 logits as they are, one by one and together; what is none, and what they
cannot take, is refused.
"""

import pytest
import torch
from test_llama import exact_norm, logits, tiny_llama  # noqa: F401

from kn.align import symmetries_llama as symmetries

pytestmark = pytest.mark.usefixtures("exact_norm")


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


SYMMETRIES = {
    "norms folded": lambda m: symmetries.fold_norms(m),
    "rotated": lambda m: (symmetries.fold_norms(m), symmetries.rotate(m, torch.linalg.qr(random(24, 24)).Q)),
    "neurons permuted": lambda m: symmetries.permute_neurons(
        m, 1, torch.randperm(32, generator=torch.Generator().manual_seed(3))
    ),
    "value and output": lambda m: symmetries.change_value_output(m, 3, 1, random(4, 4)),
    "query and key": lambda m: symmetries.scale_rotary_pair(m, 2, 1, 1, 0.3 - 1.7j),
}


@pytest.mark.parametrize(
    "fields", [{}, {"biases": True}, {"tie_word_embeddings": False}], ids=["tied", "biases", "untied"]
)
@pytest.mark.parametrize("names", [*([name] for name in SYMMETRIES), list(SYMMETRIES)], ids=str)
def test_logits_stay(names, fields):
    teacher = tiny_llama(**fields)
    model = symmetries.untied(teacher)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    assert all((norm.weight != 1).any() for norm, _ in symmetries.norm_consumers(model))
    for name in names:
        SYMMETRIES[name](model)
    assert any(not torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    assert (logits(model) - logits(teacher)).abs().max() < 1e-10 * logits(teacher).abs().max()


def test_frequencies_cannot_be_permuted():
    """They are tied to positions: exchanging two of them in query and key alike is another function, but at
    one position.
    """
    teacher = tiny_llama()
    model = symmetries.untied(teacher)
    order = torch.tensor([1, 0, 3, 2])  # both frequencies of a head of 4
    with torch.no_grad():
        for layer in (model.model.layers[1].self_attn.q_proj, model.model.layers[1].self_attn.k_proj):
            layer.weight.copy_(layer.weight.unflatten(0, (-1, 4))[:, order].flatten(0, 1))
    difference = (logits(model) - logits(teacher)).abs().amax((0, 2))
    assert difference[0] < 1e-12 and difference[-1] > 1e-4


def test_refusals():
    tied = tiny_llama()
    with pytest.raises(TypeError, match="^the symmetries are for LlamaForCausalLM, got LlamaModel$"):
        symmetries.untied(tied.model)
    with pytest.raises(
        ValueError,
        match=r"^the head is tied to the embedding, "
        r"and takes up the gain of the last norm: take untied\(model\)$",
    ):
        symmetries.fold_norms(tied)
    with pytest.raises(
        ValueError, match=r"^a norm has a gain, which a rotation would mix: fold_norms\(model\) first$"
    ):
        symmetries.rotate(symmetries.untied(tied), torch.eye(24))
    for wrong in (random(24, 24), torch.eye(12)):
        with pytest.raises(ValueError, match="^Q must be orthogonal and 24 wide"):
            symmetries.rotate(symmetries.untied(tied), wrong)
    with pytest.raises(ValueError, match="^order must be a permutation of 0 to 31$"):
        symmetries.permute_neurons(tied, 0, torch.zeros(32, dtype=torch.long))
    with pytest.raises(ValueError, match="^z must not be 0"):
        symmetries.scale_rotary_pair(tied, 0, 0, 0, 0)
