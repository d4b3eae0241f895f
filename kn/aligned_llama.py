"""The aligned start for Llama (MATH.md §5): of all weight settings of one model, the one nearest to Kronecker form under real activations.

What aligned.py does for GPT-2, and what Llama asks for beside: the stream may turn freely (RMSNorm has no mean), query heads share
a key head, and rotary positions tie queries and keys to frequencies, so that halved ones are fitted to the teacher's attention.
Dense layers are refitted as well: they take up what the compressed ones before them lost. Rows are tokens; sums in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from . import align_llama as align
from .config import KroneckerSpec
from .moments import low_rank, root, spread

TOKENS = 32768  # of the calibration text are run through the layers; all of it is counted
GRADIENTS = 4096  # tokens for the sensitivity of the loss
PART = 4096  # tokens at a time
IDENTITY = 0.1  # added to that sensitivity, relative to its mean
SMOOTHING = 1.0  # counted once more: every token, so that those the calibration text lacks are not forgotten
READ = 0.03  # ridge towards the identity of what readers are multiplied by, relative to the mean of the Gram matrix's diagonal
WRITE = 0.03  # ridge of writers towards the teacher's weights
DENSE = True  # refit the dense layers too
QUERIES = 64  # per sequence, whose attention is compared
STEPS = 30  # of L-BFGS, from the best start in closed form
SLOW = 1.0  # radians over a whole sequence: frequencies below hardly turn, and may be mixed


def equivalent(model: LlamaForCausalLM, spec: KroneckerSpec, ids: Tensor) -> LlamaForCausalLM:
    """An untied model with the teacher's logits, in the basis of the compressed one: what ILKD should compare with; ids (sequences, length)."""
    check(model, spec, ids)
    return _turned(model, spec, ids)[0]


def _turned(model: LlamaForCausalLM, spec: KroneckerSpec, ids: Tensor) -> tuple[LlamaForCausalLM, Tensor | None, Tensor | None]:
    """The equivalent teacher, the (d, d) map from its token embedding to the nearest one that KroneckerEmbedding can hold, and the tokens' shares (V)."""
    teacher = align.untied(model).eval()
    align.fold_norms(teacher)
    if not spec.embedding:
        return teacher, None, None
    table = teacher.model.embed_tokens.weight
    count = torch.bincount(ids.flatten(), minlength=len(table)).double() + SMOOTHING
    rows, share = table.detach().double(), count / count.sum()
    Q, P = turn(rows.T @ (share[:, None] * rows), sensitivity(teacher, _spaced(ids, GRADIENTS)), spec.embedding_factor or spec.factor)
    align.rotate(teacher, Q)
    return teacher, Q.T @ P @ Q, share


def _spaced(ids: Tensor, tokens: int) -> Tensor:
    """Sequences from all over the text, as many as hold that number of tokens (at least one)."""
    wanted = max(1, min(len(ids), tokens // ids.shape[1]))
    return ids[torch.arange(wanted, device=ids.device) * len(ids) // wanted]


def sensitivity(teacher: LlamaForCausalLM, ids: Tensor) -> Tensor:
    """E[g gᵀ] (d, d) over tokens, relative to its mean diagonal, g the gradient of the loss by the token's embedding: how much a direction matters."""
    total = 0.0
    for part in ids.split(1):
        x = teacher.model.embed_tokens(part).detach().requires_grad_()
        with torch.enable_grad():
            (g,) = torch.autograd.grad(teacher(inputs_embeds=x, labels=part).loss, x)
        total = total + cross(g, g)
    return total / total.diagonal().mean()


def turn(covariance: Tensor, metric: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """Q (d, d), orthogonal, that puts the best d/f directions of the rows on every f-th coordinate, and the projection P (d, d) onto them.

    Best for rows of that covariance when an error δ costs δ (metric + IDENTITY) δᵀ.
    """
    d = len(covariance)
    eye = torch.eye(d, dtype=torch.float64, device=covariance.device)
    R = torch.linalg.cholesky(metric + IDENTITY * eye).T
    U = torch.linalg.eigh(R @ covariance @ R.T).eigenvectors.flip(1)[:, : d // factor]
    best = torch.linalg.solve_triangular(R, U, upper=True)  # (d, d/f), the rows' new span
    basis = torch.linalg.qr(torch.cat([best, eye], 1)).Q[:, :d]  # that span, then the rest
    return basis @ eye[torch.arange(d).view(-1, factor).T.flatten()], R.T @ U @ best.T


def cross(x: Tensor, y: Tensor) -> Tensor:
    """Σ xᵀ y over the rows of x (…, n) and y (…, m); products of 2,048 rows in their own precision, their sum in float64."""
    return sum((a.T @ b).double() for a, b in zip(x.flatten(0, -2).split(2048), y.flatten(0, -2).split(2048), strict=True))


def toward(prior: Tensor, G: Tensor, C: Tensor, ridge: float) -> Tensor:
    """The (n, m) least-squares map with Gram matrix G (n, n) of the inputs and cross moments C (n, m), drawn towards prior (n, m)."""
    lifted = G + ridge * G.diagonal().mean() * torch.eye(len(G), dtype=G.dtype, device=G.device)
    return prior + torch.linalg.solve(lifted, C - G @ prior)


def _parts(*inputs: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Some sequences at a time."""
    return zip(*(t.split(max(1, PART // inputs[0].shape[1])) for t in inputs), strict=True)


def each(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """function of x, some sequences at a time."""
    return torch.cat([function(part) for (part,) in _parts(x)])


def mend(layers: tuple[nn.Linear, ...], norms: tuple[nn.Module, nn.Module], x_t: Tensor, x_s: Tensor, share: Tensor | None = None) -> None:
    """Let readers see the teacher's normed stream as far as the student's tells it: W ← W Mᵀ, x_s M ≈ x_t, one M (d, d) for all that read it.

    share: a weight for every row, where the rows are not tokens of a text but the vocabulary's.
    """
    G = C = 0.0
    for t, s, *w in _parts(x_t, x_s, *([] if share is None else [share])):
        t, s = norms[0](t), norms[1](s)
        left = s * w[0] if w else s
        G, C = G + cross(left, s), C + cross(left, t)
    M = toward(torch.eye(len(G), dtype=G.dtype, device=G.device), G, C, READ).T
    for layer in layers:
        for rows in layer.weight.split(8192):
            rows.copy_(rows.double() @ M)


class Writer:
    """A linear map that adds to the stream: the least squares of its output, every token's error relative to the teacher's stream.

    z (sequences, length, n) is what it reads, target what it should write, x_t the teacher's stream after it. W (n, d), with
    the bias as one more row, is the teacher's; G and C are the moments.
    """

    def __init__(self, layer: nn.Linear, z: Tensor, target: Tensor, x_t: Tensor):
        self.layer, self.biased = layer, layer.bias is not None
        self.W = layer.weight.double().T
        if self.biased:
            self.W = torch.cat([self.W, layer.bias.double()[None]])
        self.G = self.C = 0.0
        for a, t, x in _parts(z, target, x_t):
            w = x.square().mean(-1, keepdim=True).clamp_min(1e-12).rsqrt()  # RMSNorm divides by this before anything reads it
            a = torch.cat([a * w, w], -1) if self.biased else a * w
            self.G, self.C = self.G + cross(a, a), self.C + cross(a, t * w)

    def refit(self) -> None:
        """For a dense layer."""
        self._set(toward(self.W, self.G, self.C, WRITE), 1)

    def narrow(self, A: Tensor, prior: Tensor, factor: int) -> None:
        """For a compressed one, that reads z A, A (n, n/f): near to prior (n/f, d), then spread over every f-th input."""
        if self.biased:
            A, prior = torch.block_diag(A, torch.ones_like(A[:1, :1])), torch.cat([prior, self.W[-1:]])
        self._set(toward(prior, A.T @ self.G @ A, A.T @ self.C, WRITE), factor)

    def _set(self, found: Tensor, factor: int) -> None:
        if self.biased:
            found, bias = found[:-1], found[-1]
            self.layer.bias.copy_(bias)
        self.layer.weight.copy_(spread(found, factor, 0).T)


def _outputs(layer: nn.Linear, maps: Tensor, factor: int) -> None:
    """Give every head (of e outputs) e/f instead, by maps (heads, e, e/f) from the old to the new, each followed by zeros."""
    for parameter in layer.parameters():
        old = parameter.double().view(len(maps), maps.shape[1], -1)
        parameter.copy_(spread((maps.transpose(1, 2) @ old).flatten(0, 1), factor, 0).view_as(parameter))


def narrow_values(attn: nn.Module, writer: Writer, factor: int) -> None:
    """The best e/f of a key head's e values, by the mixed values' moments and the output projections of all its query heads; then those refitted."""
    e, groups = attn.head_dim, attn.num_key_value_groups
    n = attn.o_proj.in_features
    maps, right = [], []
    for key in range(n // e // groups):
        rows = [slice(h * e, (h + 1) * e) for h in align.group(attn, key)]
        pooled = sum(writer.G[r, r] for r in rows)
        left, outs = low_rank(torch.eye(e, dtype=pooled.dtype, device=pooled.device), torch.cat([writer.W[r] for r in rows], 1), e // factor, pooled)
        maps.append(left)
        right += outs.chunk(groups, 1)
    _outputs(attn.v_proj, torch.stack(maps), factor)
    writer.narrow(torch.block_diag(*(m for m in maps for _ in range(groups))), torch.cat(right), factor)


def kept_units(G: Tensor, C: Tensor, W: Tensor, wanted: int) -> Tensor:
    """Indices of the units to keep: an eighth at a time leaves, those whose loss costs least once the others are refitted."""
    ridge = WRITE * G.diagonal().mean() * torch.eye(len(G), dtype=G.dtype, device=G.device)
    G, C = G + ridge, C + ridge @ W
    alive = torch.arange(len(G), device=G.device)
    while len(alive) > wanted:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(G[alive][:, alive]))
        cost = (inverse @ C[alive]).square().sum(1) / inverse.diagonal()
        drop = min(len(alive) - wanted, max(1, len(alive) // 8))
        alive = alive[cost.argsort(stable=True)[drop:].sort().values]
    return alive


def narrow_units(mlp: nn.Module, writer: Writer, factor: int) -> None:
    """1/f of the gated hidden units, and the last map refitted on them."""
    n = mlp.down_proj.in_features
    G, C = writer.G, writer.C
    if writer.biased:  # what the bias explains is no unit's worth
        G, C = G[:n, :n] - G[:n, n:] @ G[n:, :n] / G[n, n], C[:n] - G[:n, n:] @ C[n:] / G[n, n]
    keep = kept_units(G, C, writer.W[:n], n // factor)
    for layer in (mlp.gate_proj, mlp.up_proj):
        for parameter in layer.parameters():
            parameter.copy_(spread(parameter[keep].view(len(keep), -1), factor, 0).view_as(parameter))
    choose = torch.eye(n, dtype=G.dtype, device=G.device)[:, keep]
    writer.narrow(choose, writer.W[keep], factor)


def turned_by(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on x (…, length, width): dimensions i and i + width/2 are a complex number."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def starts(roots_q: Tensor, roots_k: Tensor, positions: tuple[Tensor, Tensor], factor: int) -> tuple[Tensor, Tensor]:
    """(heads, e, e/f) maps of queries and keys: every f-th of the frequencies that turn, and the best low-rank product of those that hardly do.

    roots: Rᵀ R (heads, e, e) are the second moments. Frequencies fall, as in all rotary embeddings that transformers has.
    """
    e, groups = roots_q.shape[-1], len(roots_q) // len(roots_k)
    cos, sin = (c[0, 1, : e // 2] for c in positions)
    fast = int((torch.atan2(sin, cos).abs() * positions[0].shape[1] > SLOW).sum())
    half, first = e // 2 // factor, -(-fast // factor)  # frequencies that stay, and how many of them as they are
    eye = torch.eye(e, dtype=roots_q.dtype, device=roots_q.device)
    maps_q, maps_k = (eye[:, ::factor].repeat(len(r), 1, 1) for r in (roots_q, roots_k))
    if first < half:
        slow, into = (torch.cat([torch.arange(a, b), torch.arange(a, b) + b]) for a, b in ((first * factor, e // 2), (first, half)))
        n = len(into)
        for key, root_k in enumerate(roots_k):
            mine = slice(key * groups, (key + 1) * groups)
            U, s, Vh = torch.linalg.svd((roots_q[mine] @ eye[:, slow]).flatten(0, 1) @ (root_k @ eye[:, slow]).T, full_matrices=False)
            scale = s[:n].sqrt()
            maps_q[mine][:, :, into] = torch.linalg.solve_triangular(roots_q[mine], (U[:, :n] * scale).unflatten(0, (groups, e)), upper=True)
            maps_k[key][:, into] = torch.linalg.solve_triangular(root_k, Vh[:n].T * scale, upper=True)
    return maps_q, maps_k


def narrow_query_key(dense: nn.Module, block: nn.Module, x_t: Tensor, x_s: Tensor, positions: tuple[Tensor, Tensor], factor: int) -> None:
    """Queries and keys at every f-th frequency, B = (1, 0, …), whose attention has the least KL divergence from the teacher's at QUERIES positions.

    What they read is only the teacher's own queries and keys of the same head, (e, e/f) numbers a head, so that little text suffices.
    """
    attn, teacher = block.self_attn, dense.self_attn
    e, groups, scale, length = attn.head_dim, attn.num_key_value_groups, attn.scaling, x_s.shape[1]
    every = -(-length // QUERIES)
    asked = (torch.arange(len(x_s))[:, None] % every + torch.arange(0, length, every)).clamp_max(length - 1).to(x_s.device)  # (sequences, n)
    cos, sin = positions[0][0], positions[1][0]  # (length, e)
    later = torch.arange(length, device=x_s.device) > asked[..., None]  # (sequences, n, length)

    def heads(layer: nn.Linear, norm: nn.Module, x: Tensor) -> Tensor:
        return each(lambda part: layer(norm(part)).unflatten(-1, (-1, e)).transpose(1, 2), x)  # (sequences, heads, length, e)

    targets = []
    for i, x in enumerate(x_t.split(1)):
        q, k = heads(teacher.q_proj, dense.input_layernorm, x)[0, :, asked[i]], heads(teacher.k_proj, dense.input_layernorm, x)[0]
        score = scale * turned_by(q, cos[asked[i]], sin[asked[i]]) @ turned_by(k, cos, sin).repeat_interleave(groups, 0).transpose(-1, -2)
        targets.append(score.masked_fill(later[i], -torch.inf).softmax(-1))
    q, k = heads(attn.q_proj, block.input_layernorm, x_s), heads(attn.k_proj, block.input_layernorm, x_s)
    roots_q, roots_k = (torch.stack([root(cross(h, h) / h[..., 0].numel()) for h in x.unbind(1)]) for x in (q, k))
    q, k = (torch.linalg.solve_triangular(r.to(x.dtype), x, upper=True, left=False) for r, x in ((roots_q, q), (roots_k, k)))  # white: L-BFGS then needs few steps
    q = [x[:, rows] for x, rows in zip(q, asked, strict=True)]
    free = [(r @ m).to(k.dtype).requires_grad_() for r, m in zip((roots_q, roots_k), starts(roots_q, roots_k, positions, factor), strict=True)]
    few_cos, few_sin = cos[:, ::factor], sin[:, ::factor]
    optimizer = torch.optim.LBFGS(free, max_iter=STEPS, max_eval=STEPS * 5 // 4, history_size=20, tolerance_change=0, tolerance_grad=0, line_search_fn="strong_wolfe")

    @torch.enable_grad()
    def divergence() -> Tensor:
        """Up to the teacher's entropy; gradients are added sequence by sequence."""
        optimizer.zero_grad()
        total = 0.0
        for i, target in enumerate(targets):
            mine = turned_by(q[i] @ free[0], few_cos[asked[i]], few_sin[asked[i]]).unflatten(0, (-1, groups)).flatten(1, 2)  # (key heads, groups · n, e/f)
            score = (scale * mine @ turned_by(k[i] @ free[1], few_cos, few_sin).transpose(-1, -2)).view_as(target)
            loss = -(target * score.masked_fill(later[i], -1e4).log_softmax(-1)).sum() / target[..., 0].numel() / len(targets)
            loss.backward()
            total = total + loss.detach()
        return total

    optimizer.step(divergence)
    for layer, r, found in zip((attn.q_proj, attn.k_proj), (roots_q, roots_k), free, strict=True):
        _outputs(layer, torch.linalg.solve_triangular(r, found.detach().double(), upper=True), factor)


def check(model: nn.Module, spec: KroneckerSpec, ids: Tensor) -> None:
    """One line for what cannot be aligned."""
    if type(model) is not LlamaForCausalLM:
        raise ValueError(f"init 'aligned' takes LlamaForCausalLM among Llama's classes, got {type(model).__name__}: take init='svd'")
    config = model.config
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point() or not ids.numel() or ids.shape[1] < 2:
        raise ValueError("init 'aligned' needs calibration=token ids, an integer tensor (sequences, length) of some 30,000 tokens of text")
    if ids.device != model.device:
        raise ValueError(f"the calibration ids are on {ids.device} and the model on {model.device}: move one of them with .to()")
    if ids.shape[1] > config.max_position_embeddings or ids.min() < 0 or ids.max() >= config.vocab_size:
        raise ValueError(f"calibration ids must be below {config.vocab_size} in sequences of at most {config.max_position_embeddings}, got up to {int(ids.max())} and {ids.shape[1]}")
    if spec.rank != 1 or spec.shapes or spec.ranks or not spec.out_proj or spec.factor < 2:
        raise ValueError("init 'aligned' pairs inputs and outputs: it needs rank 1, no shapes or ranks of their own, out_proj=True and a factor of at least 2")
    if spec.embedding and ((factor := spec.embedding_factor or spec.factor) < 2 or config.hidden_size % factor):
        raise ValueError(f"init 'aligned' needs an embedding factor of at least 2 that divides {config.hidden_size}, got {factor}")
    if spec.head == "tied":
        raise ValueError("init 'aligned' gives the head the last norm's gain, so it cannot be the embedding's factors: take head='dense'")
    if (size := model.model.layers[0].self_attn.head_dim) % (2 * spec.factor) or config.intermediate_size % spec.factor:
        raise ValueError(f"factor {spec.factor} does not divide the frequencies of a head of {size} (half its size) and the {config.intermediate_size} hidden units")


@torch.no_grad()
def prepare(model: LlamaForCausalLM, spec: KroneckerSpec, ids: Tensor) -> LlamaForCausalLM:
    """A dense model near to the teacher whose compressed matrices are Kronecker products with B = (1, 0, …); ids (sequences, length)."""
    check(model, spec, ids)
    teacher, halved, share = _turned(copy.deepcopy(model).to(torch.promote_types(model.dtype, torch.float32)).eval(), spec, ids)
    teacher.set_attn_implementation("sdpa")  # without a mask this is causal
    student, chosen, f = copy.deepcopy(teacher), spec.indices(model.config.num_hidden_layers), spec.factor
    if halved is not None:
        student.model.embed_tokens.weight.copy_(student.model.embed_tokens.weight.double() @ halved)
    ids = _spaced(ids, TOKENS)
    x_t, x_s = (m.model.embed_tokens(ids) for m in (teacher, student))
    positions = teacher.model.rotary_emb(x_t, torch.arange(ids.shape[1], device=ids.device)[None])
    for index, (dense, block) in enumerate(zip(teacher.model.layers, student.model.layers, strict=True)):
        small = index in chosen
        changed = small or (DENSE and (halved is not None or any(i < index for i in chosen)))
        x_t, x_s = _attention(dense, block, x_t, x_s, positions, f if small else 1, changed, (teacher, student, share) if index == 0 and share is not None else None)
        x_t, x_s = _feed_forward(dense, block, x_t, x_s, f if small else 1, changed)
    if DENSE:
        mend((student.lm_head,), (teacher.model.norm, student.model.norm), x_t, x_s)
    student.set_attn_implementation(model.config._attn_implementation)
    return student.to(model.dtype).train(model.training)


def _read_by(layer: nn.Linear, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """What a layer reads while function(x) runs, some sequences at a time."""
    found = []
    hook = layer.register_forward_pre_hook(lambda _layer, inputs: found.append(inputs[0]))
    each(function, x)
    hook.remove()
    return torch.cat(found)


def _attention(dense, block, x_t: Tensor, x_s: Tensor, positions, factor: int, changed: bool, models) -> tuple[Tensor, Tensor]:
    """Both streams after the attention, the student's refitted if `changed` and narrowed if factor > 1."""
    attn = block.self_attn

    def attend(layer: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda x: layer.self_attn(layer.input_layernorm(x), positions, None)[0]

    if changed and DENSE:
        where = (x_t, x_s, None) if models is None else (*(m.model.embed_tokens.weight[:, None] for m in models[:2]), models[2].to(x_t.dtype)[:, None, None])
        mend((attn.q_proj, attn.k_proj, attn.v_proj), (dense.input_layernorm, block.input_layernorm), *where)
    if factor > 1:
        narrow_query_key(dense, block, x_t, x_s, positions, factor)
    after = x_t + each(attend(dense), x_t)
    mixed = _read_by(attn.o_proj, attend(block), x_s)
    if changed:
        writer = Writer(attn.o_proj, mixed, after - x_s, after)
        if factor == 1:
            writer.refit()
        else:
            narrow_values(attn, writer, factor)
            mixed = _read_by(attn.o_proj, attend(block), x_s)
    return after, x_s + each(attn.o_proj, mixed)


def _feed_forward(dense, block, x_t: Tensor, x_s: Tensor, factor: int, changed: bool) -> tuple[Tensor, Tensor]:
    """Both streams after the feed-forward network, the student's refitted if `changed` and narrowed if factor > 1."""
    mlp = block.mlp
    if changed and DENSE:
        mend((mlp.gate_proj, mlp.up_proj), (dense.post_attention_layernorm, block.post_attention_layernorm), x_t, x_s)
    after = x_t + each(lambda x: dense.mlp(dense.post_attention_layernorm(x)), x_t)
    hidden = _read_by(mlp.down_proj, lambda x: block.mlp(block.post_attention_layernorm(x)), x_s)
    if changed:
        writer = Writer(mlp.down_proj, hidden, after - x_s, after)
        if factor == 1:
            writer.refit()
        else:
            narrow_units(mlp, writer, factor)
            hidden = _read_by(mlp.down_proj, lambda x: block.mlp(block.post_attention_layernorm(x)), x_s)
    return after, x_s + each(mlp.down_proj, hidden)
