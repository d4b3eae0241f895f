"""The aligned start (MATH.md §5): of all weight settings of one GPT-2, the one nearest to Kronecker form under real activations.

    teacher = equivalent(model, spec, ids)      the same function, its stream turned so that the halved embedding keeps most
    target = prepare(model, spec, ids)          a dense model whose compressed matrices are exact Kronecker products

`compress(model, KroneckerSpec(init="aligned"), calibration=ids)` factors `target`. With B = (1, 0, …) a feed-forward network is
pruned to 1/f of its units and refitted, and a head of e is a low-rank head of e/f: B is trained like any other parameter.
Row vectors, as in align.py; sums in float64. Memory grows with the calibration text by two streams (tokens × d) and no more.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers import GPT2ForSequenceClassification

from kn.align import llama as aligned_llama
from kn.align import symmetries_gpt2 as align
from kn.align.least_squares import in_parts, least_squares, low_rank, moments, one, spread, subset, zero
from kn.models.config import KroneckerSpec

INGREDIENTS = ("attention", "feed_forward", "correction")  # beside the embedding, which spec.embedding switches
IDENTITY = 0.1  # added to the sensitivity of the loss to the embedding, relative to its mean
LOGITS = 1024  # tokens at a time where the head is needed: 0.2 GB over 50,257 words, several times
SENSITIVE = 8192  # tokens that the sensitivity is measured on: its gradients cost as much as all the rest
SMOOTHING = 1.0  # counted once more: every token, so that those the calibration text lacks are not forgotten


def equivalent(model: nn.Module, spec: KroneckerSpec, ids: Tensor) -> nn.Module:
    """An untied model with the teacher's logits, in the basis of the compressed one: what ILKD should compare with.

    ids (sequences, length) of calibration text. Raises ValueError where ln_f has a zero gain.
    """
    if model.config.model_type == "llama":
        return aligned_llama.equivalent(model, spec, ids)
    return _turned(model, spec, ids)[0]


def _turned(model: nn.Module, spec: KroneckerSpec, ids: Tensor) -> tuple[nn.Module, Tensor | None]:
    """The equivalent teacher, and the (d, d) map from its token embedding to the nearest one that KroneckerEmbedding can hold."""
    teacher = align.untied(model)
    align.centre(teacher)
    align.fold_norms(teacher)
    if not spec.embedding:
        return teacher, None
    factor, ids = spec.embedding_factor or spec.factor, ids.to(model.device)
    table, places = teacher.transformer.wte.weight, teacher.transformer.wpe.weight
    count = torch.bincount(ids.flatten(), minlength=len(table)).double() + SMOOTHING
    rows, share = table.detach().double(), count / count.sum()
    mean = share @ rows
    with torch.no_grad():  # what all tokens share is added to every position instead
        table.copy_(rows - mean)
        places.add_(mean)
    rows = rows - mean
    Q, P = turn(rows.T @ (share[:, None] * rows), sensitivity(teacher, ids), factor)
    align.rotate(teacher, Q)
    return teacher, Q.T @ P @ Q


def sensitivity(teacher: nn.Module, ids: Tensor) -> Tensor:
    """E[g gᵀ] (d, d), g the gradient of the loss by what the token embedding adds to the stream: how much a direction matters; mean 1 on the diagonal.

    A language model's loss is that of the text, a classifier's that of each class, weighted by how likely it finds it.
    """
    training, total, places = teacher.training, zero(ids), torch.arange(ids.shape[1], device=ids.device)
    for part in ids[: max(1, SENSITIVE // ids.shape[1])].split(max(1, LOGITS // ids.shape[1])):
        x = teacher.eval().transformer.wte(part).detach().requires_grad_()
        with torch.enable_grad():
            given = {"inputs_embeds": x, "position_ids": places.expand_as(part)}
            if isinstance(teacher, GPT2ForSequenceClassification):
                logs = teacher.score(teacher.transformer(**given).last_hidden_state[:, -1]).log_softmax(-1)  # (sequences, labels)
                losses = [(logs[:, c] * logs[:, c].detach().exp().sqrt()).sum() for c in range(logs.shape[1])]
            else:
                losses = [teacher(labels=part, **given).loss * part.numel()]
            for left, loss in enumerate(losses, start=1 - len(losses)):
                (g,) = torch.autograd.grad(loss, x, retain_graph=left < 0)
                total = total + moments(lambda g: (g, g), g)
    teacher.train(training)
    return total / total.diagonal().mean()


def kept_directions(d: int, factor: int) -> Tensor:
    """(d/f, d) orthonormal rows, mean-free: what a Kronecker embedding with B = (1, −1, 0, …)/√2 can hold."""
    b = torch.zeros(factor, dtype=torch.float64)
    b[0], b[1] = 0.5**0.5, -(0.5**0.5)
    return torch.kron(torch.eye(d // factor, dtype=torch.float64), b[None])


def turn(covariance: Tensor, metric: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """Q (d, d), orthogonal with Q·1 = 1, that puts the best d/f directions of mean-free rows on the kept ones, and the projection P (d, d) onto them.

    Best for rows of that covariance when an error δ costs δ (metric + IDENTITY) δᵀ. Both float64, on the covariance's device.
    """
    d, device = len(covariance), covariance.device
    covariance, metric, eye = covariance.cpu(), metric.cpu(), torch.eye(len(covariance), dtype=torch.float64)
    r, ones = d // factor, torch.full((d, 1), d**-0.5, dtype=torch.float64)
    inside = torch.linalg.qr(torch.cat([ones, eye], 1)).Q[:, 1:d]  # a basis of what is mean-free
    R = torch.linalg.cholesky(inside.T @ metric @ inside + IDENTITY * eye[1:, 1:]).T
    U = torch.linalg.eigh(R @ inside.T @ covariance @ inside @ R.T).eigenvectors.flip(1)[:, :r]
    best = inside @ torch.linalg.solve_triangular(R, U, upper=True)  # (d, r), the rows' new span
    P = inside @ R.T @ U @ best.T
    kept = kept_directions(d, factor).T
    old, new = (torch.linalg.qr(torch.cat([ones, first, eye], 1)).Q[:, :d] for first in (best, kept))  # 1, then `first`, then the rest
    signs = torch.sign((old[:, :1].T @ ones) * (new[:, :1].T @ ones))
    return (old[:, 1:] @ new[:, 1:].T + signs * (old[:, :1] @ new[:, :1].T)).to(device), P.to(device)


class Half:
    """One half of a block, attention or feed-forward: x → x + writer(… reader(norm(x)) …)."""

    def __init__(self, block: nn.Module, name: str):
        self.norm, self.module, self._reader = {"attention": (block.ln_1, block.attn, "c_attn"), "feed_forward": (block.ln_2, block.mlp, "c_fc")}[name]

    @property
    def reader(self) -> nn.Module:
        """The layer that reads the normed stream: c_attn or c_fc."""
        return getattr(self.module, self._reader)

    @reader.setter
    def reader(self, layer: nn.Module) -> None:
        setattr(self.module, self._reader, layer)

    @property
    def writer(self) -> nn.Module:
        """The layer that adds to the stream: c_proj."""
        return self.module.get_submodule("c_proj")

    def __call__(self, x: Tensor) -> Tensor:
        out = self.module(self.norm(x))
        return x + (out[0] if isinstance(out, tuple) else out)

    def inside(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the writer reads, and what comes out in the end."""
        found = []
        hook = self.writer.register_forward_pre_hook(lambda _module, given: found.append(given[0]))
        out = self(x)
        hook.remove()
        return found[0], out


def _write(layer: nn.Module, weight: Tensor, bias: Tensor) -> None:
    layer.weight.copy_(weight)
    layer.bias.copy_(bias)


def correct_reader(half: Half, teacher: Half, x_t: Tensor, x_s: Tensor) -> None:
    """What reads the student's stream is to give what the teacher's reader makes of the teacher's: least squares between the two normed streams."""
    weight, bias = teacher.reader.weight.double(), teacher.reader.bias.double()
    change = least_squares(lambda x_t, x_s: (one(half.norm(x_s)), teacher.norm(x_t) - half.norm(x_s)), x_t, x_s) @ weight
    _write(half.reader, weight + change[:-1], bias + change[-1])


def correct_writer(half: Half, y_t: Tensor, x_s: Tensor, factor: int = 1) -> None:
    """Change what the writer makes of every factor-th of its inputs so that the student's stream comes next to the teacher's y_t: least squares."""

    def samples(y_t: Tensor, x_s: Tensor) -> tuple[Tensor, Tensor]:
        read, out = half.inside(x_s)
        return one(read[..., ::factor]), y_t - out

    change = least_squares(samples, y_t, x_s)
    _write(half.writer, half.writer.weight + spread(change[:-1], factor, 0), half.writer.bias + change[-1])


def shrink_heads(half: Half, teacher: Half, x_s: Tensor, factor: int) -> None:
    """Low-rank heads: queries and keys by their products with the inputs, values by theirs with the output."""
    attn, d, heads = half.module, half.module.embed_dim, half.module.num_heads
    e = d // heads
    H = moments(lambda x: (one(half.norm(x)),) * 2, x_s)
    weight, bias, out = half.reader.weight.double(), half.reader.bias.double(), teacher.writer.weight.double()
    new_weight, new_bias = torch.zeros_like(weight), torch.zeros_like(bias)
    for h in range(heads):
        q, k, v = (slice(part * d + h * e, part * d + (h + 1) * e) for part in range(3))
        a, c = low_rank(torch.cat([weight[:, q], bias[None, q]]), weight[:, k].T, e // factor, H, H[:-1, :-1])  # a constant per query drops out of softmax: no key bias
        new_weight[:, q], new_bias[q], new_weight[:, k] = spread(a[:-1], factor, 1), spread(a[-1:], factor, 1)[0], spread(c.T, factor, 1)
        new_weight[:, v] = spread(low_rank(weight[:, v], out[h * e : (h + 1) * e], e // factor, H[:-1, :-1])[0], factor, 1)
    _write(attn.c_attn, new_weight, new_bias)


def shrink_units(half: Half, teacher: Half, x_s: Tensor, factor: int) -> None:
    """1/f of the hidden units: those on which the output is refitted best."""
    keep = subset(moments(lambda x: (one(half.inside(x)[0]),) * 2, x_s), teacher.writer.weight, len(teacher.writer.weight) // factor)
    _write(half.reader, spread(half.reader.weight[:, keep], factor, 1), spread(half.reader.bias[None, keep], factor, 1)[0])


def correct_head(student: nn.Module, teacher: nn.Module, x_t: Tensor, x_s: Tensor) -> None:
    """The head, which stays dense, reads what is left of the difference."""
    last_t, last_s = teacher.transformer.ln_f, student.transformer.ln_f
    change = least_squares(lambda x_t, x_s: (last_s(x_s), last_t(x_t) - last_s(x_s)), x_t, x_s)
    head = align.head_of(student).weight
    head.add_((head.double() @ change.T).to(head.dtype))


def check(model: nn.Module, spec: KroneckerSpec, ids: Tensor) -> None:
    """Raises ValueError, one line, for a model, a spec or calibration ids (sequences, length) that cannot be aligned."""
    if model.config.model_type != "gpt2":
        raise ValueError(f"init 'aligned' is for GPT-2 and Llama, not yet for {model.config.model_type}: take init='svd'")
    if model.device.type in ("mps", "meta"):
        raise ValueError(f"init 'aligned' sums in float64, which a model on {model.device} cannot: move it with .to('cpu')")
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point() or not ids.numel():
        raise ValueError("init 'aligned' needs calibration=token ids, an integer tensor (sequences, length) of some 30,000 tokens of text")
    if ids.shape[1] > model.config.n_positions or ids.min() < 0 or ids.max() >= model.config.vocab_size:
        raise ValueError(f"calibration ids must be below {model.config.vocab_size} in sequences of at most {model.config.n_positions}, got up to {int(ids.max())} and {ids.shape[1]}")
    if spec.rank != 1 or spec.shapes or spec.ranks or not spec.out_proj or spec.factor < 2:
        raise ValueError("init 'aligned' pairs inputs and outputs: it needs rank 1, no shapes or ranks of their own, out_proj=True and a factor of at least 2")
    if spec.embedding and ((factor := spec.embedding_factor or spec.factor) < 2 or model.config.n_embd % factor):
        raise ValueError(f"init 'aligned' needs an embedding factor of at least 2 that divides {model.config.n_embd}, got {factor}")
    if spec.head == "tied":
        raise ValueError("init 'aligned' gives the head the gain of ln_f, so it cannot be the embedding's factors: take head='dense'")
    if (size := model.config.n_embd // model.config.n_head) % spec.factor:
        raise ValueError(f"factor {spec.factor} does not divide the heads' size of {size}")


SHRINK = {"attention": shrink_heads, "feed_forward": shrink_units}


def to_products(half: Half, teacher: Half, name: str, y_t: Tensor, x_s: Tensor, factor: int) -> None:
    """One half of a compressed layer: a narrow reader, and a writer that makes the teacher's stream y_t of what it gives."""
    SHRINK[name](half, teacher, x_s, factor)
    _write(half.writer, torch.zeros_like(half.writer.weight), torch.zeros_like(half.writer.bias))
    correct_writer(half, y_t, x_s, factor)


def prepare(model: nn.Module, spec: KroneckerSpec, ids: Tensor) -> nn.Module:
    """A dense model near to the teacher whose compressed matrices are Kronecker products with B = (1, 0, …); ids (sequences, length) of calibration text."""
    if model.config.model_type == "llama":
        return aligned_llama.prepare(model, spec, ids)
    return pair(model, spec, ids)[1]


@torch.no_grad()
def pair(model: nn.Module, spec: KroneckerSpec, ids: Tensor, ingredients: tuple[str, ...] = INGREDIENTS, to_smaller=to_products) -> tuple[nn.Module, nn.Module]:
    """(what `equivalent` gives, what `prepare` gives), and what single ingredients, or other smaller forms than products, do.

    Without "attention" or "feed_forward" among the ingredients those halves of the compressed layers stay dense; "correction"
    refits what is dense anyway (the other layers, the head) and what reads the stream to the student's own activations.
    """
    check(model, spec, ids)
    training, ids = model.training, ids.to(model.device)
    teacher, halved = _turned(model, spec, ids)
    teacher.eval()
    teacher.set_attn_implementation("sdpa")  # without a mask this is causal
    student = copy.deepcopy(teacher)
    if halved is not None:
        student.transformer.wte.weight.copy_(student.transformer.wte.weight.double() @ halved)
    places = torch.arange(ids.shape[1], device=ids.device)
    x_t, x_s = (m.transformer.wte(ids) + m.transformer.wpe(places) for m in (teacher, student))
    correct, moved = "correction" in ingredients, halved is not None  # moved: the student's stream is no longer the teacher's
    for index, blocks in enumerate(zip(teacher.transformer.h, student.transformer.h, strict=True)):
        for name in SHRINK:
            dense, half = (Half(block, name) for block in blocks)
            if correct and moved:
                correct_reader(half, dense, x_t, x_s)
            x_t, chosen = in_parts(dense, x_t), name in ingredients and index in spec.indices(model.config.n_layer)
            if chosen:
                to_smaller(half, dense, name, x_t, x_s, spec.factor)
            elif correct and moved:
                correct_writer(half, x_t, x_s)
            x_s, moved = in_parts(half, x_s), moved or chosen
    if correct and moved:
        correct_head(student, teacher, x_t, x_s)
    for made in (teacher, student):
        made.set_attn_implementation(model.config._attn_implementation)
        made.train(training)
    return teacher, student
