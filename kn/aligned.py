"""The aligned start (MATH.md §5): of all weight settings of one GPT-2, the one nearest to Kronecker form under real activations.

    teacher = equivalent(model, spec, ids)      the same function, its stream turned so that the halved embedding keeps most
    target = prepare(model, spec, ids)          a dense model whose compressed matrices are exact Kronecker products

`compress(model, KroneckerSpec(init="aligned"), calibration=ids)` factors `target`. With B = (1, 0, …) a feed-forward network is
pruned to 1/f of its units and refitted, and a head of e is a low-rank head of e/f: B is trained like any other parameter.
Row vectors, as in align.py; sums in float64.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from . import align, aligned_llama
from .config import KroneckerSpec
from .moments import ROWS, gram, in_parts, low_rank, one, refit, spread

IDENTITY = 0.1  # added to the sensitivity of the loss to the embedding, relative to its mean
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
    factor = spec.embedding_factor or spec.factor
    table, places = teacher.transformer.wte.weight, teacher.transformer.wpe.weight
    count = torch.bincount(ids.flatten().cpu(), minlength=len(table)).double() + SMOOTHING
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
    """E[g gᵀ] (d, d) over calibration tokens, g the gradient of the loss by what the token embedding adds to the stream: how much a direction matters."""
    total, places = 0.0, torch.arange(ids.shape[1], device=ids.device)
    for part in ids.split(ROWS):
        x = teacher.transformer.wte(part).detach().requires_grad_()
        with torch.enable_grad():
            loss = teacher(inputs_embeds=x, labels=part, position_ids=places.expand_as(part)).loss * part.numel()
            (g,) = torch.autograd.grad(loss, x)
        total = total + gram(g)
    return total / total.diagonal().mean()


def kept_directions(d: int, factor: int) -> Tensor:
    """(d/f, d) orthonormal rows, mean-free: what a Kronecker embedding with B = (1, −1, 0, …)/√2 can hold."""
    b = torch.zeros(factor, dtype=torch.float64)
    b[0], b[1] = 0.5**0.5, -(0.5**0.5)
    return torch.kron(torch.eye(d // factor, dtype=torch.float64), b[None])


def turn(covariance: Tensor, metric: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """Q (d, d), orthogonal with Q·1 = 1, that puts the best d/f directions of mean-free rows on the kept ones, and the projection P (d, d) onto them.

    Best for rows of that covariance when an error δ costs δ (metric + IDENTITY) δᵀ.
    """
    d = len(covariance)
    r, ones = d // factor, torch.full((d, 1), d**-0.5, dtype=torch.float64)
    inside = torch.linalg.qr(torch.cat([ones, torch.eye(d, dtype=torch.float64)], 1)).Q[:, 1:d]  # a basis of what is mean-free
    R = torch.linalg.cholesky(inside.T @ metric @ inside + IDENTITY * torch.eye(d - 1, dtype=torch.float64)).T
    U = torch.linalg.eigh(R @ inside.T @ covariance @ inside @ R.T).eigenvectors.flip(1)[:, :r]
    best = inside @ torch.linalg.solve_triangular(R, U, upper=True)  # (d, r), the rows' new span
    P = inside @ R.T @ U @ best.T
    kept = kept_directions(d, factor).T
    old, new = (torch.linalg.qr(torch.cat([ones, first, torch.eye(d, dtype=torch.float64)], 1)).Q[:, :d] for first in (best, kept))  # 1, then `first`, then the rest
    signs = torch.sign((old[:, :1].T @ ones) * (new[:, :1].T @ ones))
    return old[:, 1:] @ new[:, 1:].T + signs * (old[:, :1] @ new[:, :1].T), P


def align_attention(teacher: nn.Module, student: nn.Module, x_t: Tensor, x_s: Tensor, factor: int) -> None:
    """Low-rank heads for one block, then the output projection refitted on what the student's heads give."""
    attn = student.attn
    d, heads = attn.embed_dim, attn.num_heads
    e = d // heads
    seen = in_parts(student.ln_1, x_s)
    H = gram(seen, one(seen))
    weight, bias = teacher.attn.c_attn.weight.double(), teacher.attn.c_attn.bias.double()
    out = teacher.attn.c_proj.weight.double()
    new_weight, new_bias = torch.zeros_like(weight), torch.zeros_like(bias)
    for h in range(heads):
        q, k, v = (slice(part * d + h * e, part * d + (h + 1) * e) for part in range(3))
        a, c = low_rank(torch.cat([weight[:, q], bias[None, q]]), weight[:, k].T, e // factor, H, H[:-1, :-1])  # a constant per query drops out of softmax: no key bias
        new_weight[:, q], new_bias[q], new_weight[:, k] = spread(a[:-1], factor, 1), spread(a[-1:], factor, 1)[0], spread(c.T, factor, 1)
        new_weight[:, v] = spread(low_rank(weight[:, v], out[h * e : (h + 1) * e], e // factor, H[:-1, :-1])[0], factor, 1)
    with torch.no_grad():
        attn.c_attn.weight.copy_(new_weight)
        attn.c_attn.bias.copy_(new_bias)
    mixed = []
    hook = attn.c_proj.register_forward_pre_hook(lambda _m, args: mixed.append(args[0]))
    in_parts(lambda x: attn(student.ln_1(x))[0], x_s)
    hook.remove()
    z = torch.cat(mixed)[..., ::factor]
    target = in_parts(lambda x: x + teacher.attn(teacher.ln_1(x))[0], x_t) - x_s
    fitted, constant = refit(z, target)
    with torch.no_grad():
        attn.c_proj.weight.copy_(spread(fitted, factor, 0))
        attn.c_proj.bias.copy_(constant)


def align_feed_forward(teacher: nn.Module, student: nn.Module, x_t: Tensor, x_s: Tensor, factor: int) -> None:
    """1/f of the hidden units, by the variance that each adds to the output, then the second map refitted on them."""
    mlp = student.mlp
    hidden = in_parts(lambda x: mlp.act(mlp.c_fc(student.ln_2(x))), x_s)
    H = gram(hidden, one(hidden))
    variance = H.diagonal()[:-1] / H[-1, -1] - (H[-1, :-1] / H[-1, -1]).square()
    worth = variance * teacher.mlp.c_proj.weight.double().square().sum(1)
    keep = worth.argsort(descending=True)[: len(worth) // factor].sort().values
    target = in_parts(lambda x: x + teacher.mlp(teacher.ln_2(x)), x_t) - x_s
    fitted, constant = refit(hidden[..., keep], target)
    with torch.no_grad():
        mlp.c_fc.weight.copy_(spread(mlp.c_fc.weight[:, keep], factor, 1))
        mlp.c_fc.bias.copy_(spread(mlp.c_fc.bias[None, keep], factor, 1)[0])
        mlp.c_proj.weight.copy_(spread(fitted, factor, 0))
        mlp.c_proj.bias.copy_(constant)


def check(model: nn.Module, spec: KroneckerSpec, ids: Tensor) -> None:
    """One line for what cannot be aligned."""
    if model.config.model_type != "gpt2":
        raise ValueError(f"init 'aligned' is for GPT-2 and Llama, not yet for {model.config.model_type}: take init='svd'")
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point() or not ids.numel():
        raise ValueError("init 'aligned' needs calibration=token ids, an integer tensor (sequences, length) of some 30,000 tokens of text")
    if model.device.type != "cpu" or ids.device.type != "cpu":
        raise ValueError(f"init 'aligned' runs on a CPU so far, the model is on {model.device} and the ids on {ids.device}: move both with .to('cpu')")
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


@torch.no_grad()
def prepare(model: nn.Module, spec: KroneckerSpec, ids: Tensor) -> nn.Module:
    """A dense model near to the teacher whose compressed matrices are Kronecker products with B = (1, 0, …); ids (sequences, length)."""
    if model.config.model_type == "llama":
        return aligned_llama.prepare(model, spec, ids)
    check(model, spec, ids)
    training = model.training
    teacher, halved = _turned(model.eval(), spec, ids)
    model.train(training)
    teacher.eval()
    teacher.set_attn_implementation("sdpa")  # without a mask this is causal
    student = copy.deepcopy(teacher)
    if halved is not None:
        student.transformer.wte.weight.copy_(student.transformer.wte.weight.double() @ halved)
    places = torch.arange(ids.shape[1])
    x_t, x_s = (m.transformer.wte(ids) + m.transformer.wpe(places) for m in (teacher, student))
    for index, (dense, block) in enumerate(zip(teacher.transformer.h, student.transformer.h, strict=True)):
        chosen = index in spec.indices(model.config.n_layer)
        if chosen:
            align_attention(dense, block, x_t, x_s, spec.factor)
        mid_t, mid_s = (in_parts(lambda x, b=b: x + b.attn(b.ln_1(x))[0], x) for b, x in ((dense, x_t), (block, x_s)))
        if chosen:
            align_feed_forward(dense, block, mid_t, mid_s, spec.factor)
        x_t, x_s = (in_parts(lambda x, b=b: x + b.mlp(b.ln_2(x)), x) for b, x in ((dense, mid_t), (block, mid_s)))
    student.set_attn_implementation(model.config._attn_implementation)
    return student.train(training)
