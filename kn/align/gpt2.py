"""Aligned start of GPT-2: of all weights of one function, those nearest to Kronecker products.

The teacher has the model's function, its residual stream rotated for the compressed embedding. The student is
dense, but its compressed matrices are exact Kronecker products with B = (1, 0, …), to train like any other
parameter: an MLP is pruned to 1/f of its neurons and refitted, a head of size e has rank e/f.
Row vectors; sums are float64. Memory grows with the calibration text by two streams (tokens, d) and no more.
"""

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from transformers import GPT2ForSequenceClassification

from kn.align import least_squares as lsq
from kn.align import symmetries
from kn.align.calibration import check_calibration, gradient_covariance, token_frequencies
from kn.align.least_squares import append_ones, interleave_zeros, map_batches
from kn.models.config import KroneckerSpec

INGREDIENTS = ("attention", "feed_forward", "correction")  # besides the embedding, a switch of KroneckerSpec
LOGIT_TOKENS = 1024  # tokens at a time through the head: 0.2 GB over 50,257 words, several times
GRADIENT_TOKENS = 8192  # for gradient_covariance, whose backward passes cost as much as all the rest
SMOOTHING = 1.0  # added to every token's count, so that tokens missing from the text are not forgotten


class Sublayer:
    """A residual sublayer (attention or MLP) of a GPT-2 block: x + out_proj(f(in_proj(norm(x))))."""

    MODULES = {"attention": ("ln_1", "attn", "c_attn"), "feed_forward": ("ln_2", "mlp", "c_fc")}

    def __init__(self, block: nn.Module, name: str):
        norm, module, self.in_proj_name = self.MODULES[name]
        self.name, self.norm, self.module = name, getattr(block, norm), getattr(block, module)
        self.in_proj, self.out_proj = getattr(self.module, self.in_proj_name), self.module.c_proj

    def __call__(self, x: Tensor) -> Tensor:
        output = self.module(self.norm(x))
        return x + (output[0] if isinstance(output, tuple) else output)

    def with_inner(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(input of out_proj, output of the sublayer) for the stream x (sequences, length, d)."""
        inner = []
        with self.out_proj.register_forward_pre_hook(lambda _module, args: inner.append(args[0])):
            output = self(x)
        return inner[0], output


def rotated_teacher(model: nn.Module, spec: KroneckerSpec, ids: Tensor) -> tuple[nn.Module, Tensor | None]:
    """An untied model with the same logits, rotated so that the compressed embedding keeps most of it.
    Also returns the projection (d, d) of its embedding to what KroneckerEmbedding can hold."""
    teacher = symmetries.untied_copy(model).eval()
    symmetries.centre_gpt2(teacher)
    symmetries.fold_gpt2_norms(teacher)
    if not spec.embedding:
        return teacher, None
    ids, embedding = ids.to(model.device), teacher.transformer.wte
    frequency = token_frequencies(ids, embedding.num_embeddings, SMOOTHING)
    rows = embedding.weight.detach().double()
    mean = frequency @ rows
    rows = rows - mean
    with torch.no_grad():  # the tokens' common part moves to every position
        embedding.weight.copy_(rows)
        teacher.transformer.wpe.weight.add_(mean)
    length, covariance = ids.shape[1], rows.T @ (frequency[:, None] * rows)
    batches = ids[: max(1, GRADIENT_TOKENS // length)].split(max(1, LOGIT_TOKENS // length))
    metric = gradient_covariance(embedding, partial(_embedding_losses, teacher), batches)
    Q, P = optimal_rotation(covariance, metric, spec.embedding_factor or spec.factor)
    symmetries.rotate_gpt2(teacher, Q)
    return teacher, Q.T @ P @ Q


def _embedding_losses(teacher: nn.Module, x: Tensor, ids: Tensor) -> list[Tensor]:
    """The text's loss, or for each label of a classifier √p·log p, p itself held fixed."""
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    inputs = {"inputs_embeds": x, "position_ids": positions}
    if not isinstance(teacher, GPT2ForSequenceClassification):
        return [teacher(labels=ids, **inputs).loss * ids.numel()]
    last = teacher.transformer(**inputs).last_hidden_state[:, -1]
    log_p = teacher.score(last).log_softmax(-1)  # (sequences, labels)
    return [(log_p[:, c] * log_p[:, c].detach().exp().sqrt()).sum() for c in range(log_p.shape[1])]


def optimal_rotation(covariance: Tensor, metric: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """Q (d, d), orthogonal with Q·1 = 1, turns the best_subspace of rank d/f to that of B = (1, −1, 0, …)/√2.
    Also returns the projection P (d, d) onto the best_subspace, which is mean-free. Both float64."""
    d, device = len(covariance), covariance.device
    ones, eye = torch.full((d, 1), d**-0.5, dtype=torch.float64), torch.eye(d, dtype=torch.float64)
    mean_free = torch.linalg.qr(torch.cat([ones, eye], 1)).Q[:, 1:d]
    span, P = lsq.best_subspace(covariance.cpu(), metric.cpu(), d // factor, mean_free)
    b = torch.tensor([[0.5**0.5, -(0.5**0.5), *[0.0] * (factor - 2)]], dtype=torch.float64)
    targets = torch.kron(torch.eye(d // factor, dtype=torch.float64), b).T  # (d, d/f)
    # two orthonormal bases: 1, then the span or its target, then the rest
    old, new = (torch.linalg.qr(torch.cat([ones, first, eye], 1)).Q[:, :d] for first in (span, targets))
    signs = torch.sign((old[:, :1].T @ ones) * (new[:, :1].T @ ones))
    return (old[:, 1:] @ new[:, 1:].T + signs * (old[:, :1] @ new[:, :1].T)).to(device), P.to(device)


def _set(layer: nn.Module, weight: Tensor, bias: Tensor) -> None:
    layer.weight.copy_(weight)
    layer.bias.copy_(bias)


def refit_reader(sublayer: Sublayer, teacher: Sublayer, x_t: Tensor, x_s: Tensor) -> None:
    """Refit in_proj so that from the student's stream x_s it gives what the teacher's gives from x_t."""
    norm_t, norm_s = teacher.norm, sublayer.norm
    change = lsq.fit_linear_map(lambda t, s: (append_ones(norm_s(s)), norm_t(t) - norm_s(s)), x_t, x_s)
    weight, bias = (parameter.double() for parameter in teacher.in_proj.parameters())
    change = change @ weight
    _set(sublayer.in_proj, weight + change[:-1], bias + change[-1])


def refit_writer(sublayer: Sublayer, y_t: Tensor, x_s: Tensor, factor: int = 1) -> None:
    """Refit out_proj, from every factor-th of its inputs, so that the sublayer's output comes next to y_t."""
    def samples(y_t: Tensor, x_s: Tensor) -> tuple[Tensor, Tensor]:
        inner, output = sublayer.with_inner(x_s)
        return append_ones(inner[..., ::factor]), y_t - output

    change, layer = lsq.fit_linear_map(samples, y_t, x_s), sublayer.out_proj
    _set(layer, layer.weight + interleave_zeros(change[:-1], factor, 0), layer.bias + change[-1])


def shrink_heads(sublayer: Sublayer, teacher: Sublayer, x_s: Tensor, factor: int) -> None:
    """Heads of rank e/f: queries and keys by their products q·k, values by theirs with out_proj."""
    attn, d = sublayer.module, sublayer.module.embed_dim
    e = d // attn.num_heads
    gram = lsq.gram_matrix(sublayer.norm, x_s)
    weight, bias, output = (x.double() for x in (*attn.c_attn.parameters(), teacher.out_proj.weight))
    new_weight, new_bias = torch.zeros_like(weight), torch.zeros_like(bias)
    for head in range(attn.num_heads):
        q, k, v = (slice(part * d + head * e, part * d + (head + 1) * e) for part in range(3))
        # a constant per query drops out of softmax: keys need no bias
        query, rank = torch.cat([weight[:, q], bias[None, q]]), e // factor
        a, c = lsq.weighted_low_rank(query, weight[:, k].T, rank, gram, gram[:-1, :-1])
        new_weight[:, q], new_bias[q] = interleave_zeros(a, factor, 1).split([len(weight), 1])
        new_weight[:, k] = interleave_zeros(c.T, factor, 1)
        a, _ = lsq.weighted_low_rank(weight[:, v], output[head * e : (head + 1) * e], rank, gram[:-1, :-1])
        new_weight[:, v] = interleave_zeros(a, factor, 1)
    _set(attn.c_attn, new_weight, new_bias)


def prune_neurons(sublayer: Sublayer, teacher: Sublayer, x_s: Tensor, factor: int) -> None:
    """Keep 1/f of the MLP's neurons, those from which the output is refitted best."""
    gram = lsq.gram_matrix(lambda x: sublayer.with_inner(x)[0], x_s)
    output, layer = teacher.out_proj.weight, sublayer.in_proj
    keep = lsq.backward_elimination(gram, output, len(output) // factor)
    _set(layer, *(interleave_zeros(x[..., keep], factor, x.ndim - 1) for x in layer.parameters()))


def fit_kronecker(sublayer: Sublayer, teacher: Sublayer, y_t: Tensor, x_s: Tensor, factor: int) -> None:
    """Make in_proj and out_proj Kronecker products with B = (1, 0, …), the output refitted to y_t."""
    (shrink_heads if sublayer.name == "attention" else prune_neurons)(sublayer, teacher, x_s, factor)
    for parameter in sublayer.out_proj.parameters():
        parameter.zero_()
    refit_writer(sublayer, y_t, x_s, factor)


def check(model: nn.Module, spec: KroneckerSpec, ids: Tensor) -> None:
    """Raises ValueError for a device, spec or calibration ids (sequences, length) that cannot be aligned."""
    check_calibration(model, spec, ids, tokens="30,000")
    if spec.shapes:
        raise ValueError("init 'aligned' takes no shapes for GPT-2: matrices are compressed by their factor")
    if (size := model.config.n_embd // model.config.n_head) % spec.factor:
        raise ValueError(f"factor {spec.factor} does not divide the heads' size of {size}")


@torch.no_grad()
def build_aligned_pair(
        model: nn.Module, spec: KroneckerSpec, ids: Tensor, ingredients: tuple[str, ...] = INGREDIENTS,
        fit_sublayer: Callable = fit_kronecker) -> tuple[nn.Module, nn.Module]:
    """(equivalent teacher, dense student near it whose compressed matrices are Kronecker products).

    ids: (sequences, length) of calibration text. Without "attention" or "feed_forward" among the ingredients
    these sublayers stay dense; "correction" refits dense layers to the student's activations. fit_sublayer
    compresses a sublayer in place. Raises ValueError as `check` does."""
    check(model, spec, ids)
    ids = ids.to(model.device)
    teacher, projection = rotated_teacher(model, spec, ids)
    teacher.set_attn_implementation("sdpa")  # causal without a mask
    student = copy.deepcopy(teacher)
    if projection is not None:
        student.transformer.wte.weight.copy_(student.transformer.wte.weight.double() @ projection)
    positions = torch.arange(ids.shape[1], device=ids.device)
    x_t, x_s = (m.transformer.wte(ids) + m.transformer.wpe(positions) for m in (teacher, student))
    corrects, differs = "correction" in ingredients, projection is not None  # differs: x_s is no longer x_t
    for index, blocks in enumerate(zip(teacher.transformer.h, student.transformer.h, strict=True)):
        for name in Sublayer.MODULES:
            dense, sublayer = (Sublayer(block, name) for block in blocks)
            if corrects and differs:
                refit_reader(sublayer, dense, x_t, x_s)
            x_t = map_batches(dense, x_t)
            compresses = name in ingredients and index in spec.indices(model.config.n_layer)
            if compresses:
                fit_sublayer(sublayer, dense, x_t, x_s, spec.factor)
            elif corrects and differs:
                refit_writer(sublayer, x_t, x_s)
            x_s, differs = map_batches(sublayer, x_s), differs or compresses
    if corrects and differs:  # the dense head is to give from x_s what the teacher's gives from x_t
        norm_t, norm_s = teacher.transformer.ln_f, student.transformer.ln_f
        change = lsq.fit_linear_map(lambda t, s: (norm_s(s), norm_t(t) - norm_s(s)), x_t, x_s)
        weight = symmetries.gpt2_head(student).weight
        weight.add_((weight.double() @ change.T).to(weight.dtype))
    for aligned in (teacher, student):
        aligned.set_attn_implementation(model.config._attn_implementation)
        aligned.train(model.training)
    return teacher, student
