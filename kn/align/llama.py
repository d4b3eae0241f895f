"""The aligned start for Llama (MATH.md §5): of all weight settings of one model, the one nearest to Kronecker form under real activations.

What aligned.py does for GPT-2, and what Llama asks for beside: the stream may turn freely (RMSNorm has no mean), query heads share
a key head, and rotary positions tie queries and keys to frequencies, so that halved ones are fitted to the teacher's attention.
Dense layers are refitted as well: they take up what the compressed ones before them lost. Rows are tokens; sums in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from kn.align import symmetries_llama as align
from kn.align.least_squares import in_parts, low_rank, parts, spread, zero
from kn.align.rotary import cross, narrow_query_key, outputs, spaced
from kn.models.config import KroneckerSpec
from kn.models.llama import GATED, KnLlamaForCausalLM

TOKENS = 65536  # of the calibration text are run through the layers; all of it is counted
GRADIENTS = 4096  # tokens for the sensitivity of the loss
IDENTITY = 0.1  # added to that sensitivity, whose mean is 1
SMOOTHING = 500.0  # counted in addition: every token; nearly alike is best, in the calibration text's domain, too (LOG.md)
OWN = 0.01  # ridge, relative to the mean of the Gram matrix's diagonal: of a narrow writer towards the teacher's weights, for what its own layer lost
WRITE = 0.3  # of writers towards that, for what the layers before lost: less text asks for more (LOG.md)
START = 0.03  # of the first layer's, that reads a halved embedding
READ = 0.1  # of the map between the streams that readers see, towards the identity
OUTLIER = 4.0  # times the median size: such a token is where attention rests (the first of a sequence, above all), that later ones look at
SINK = 64.0  # tokens that it counts for
DENSE = True  # refit the dense layers too


def equivalent(model: LlamaForCausalLM, spec: KroneckerSpec, ids: Tensor) -> LlamaForCausalLM:
    """An untied model with the teacher's logits, in the basis of the compressed one: what ILKD should compare with; ids (sequences, length)."""
    check(model, spec, ids)
    return _turned(model, spec, ids)[0].to(model.dtype).train(model.training)


def _turned(model: LlamaForCausalLM, spec: KroneckerSpec, ids: Tensor) -> tuple[LlamaForCausalLM, Tensor | None, Tensor | None]:
    """The equivalent teacher, the (d, d) map from its token embedding to the nearest one that KroneckerEmbedding can hold, and the tokens' shares (V)."""
    teacher = align.untied(model).to(torch.promote_types(model.dtype, torch.float32)).eval()
    align.fold_norms(teacher)
    if not spec.embedding:
        return teacher, None, None
    table = teacher.model.embed_tokens.weight
    count = torch.bincount(ids.flatten(), minlength=len(table)).double() + SMOOTHING
    rows, share = table.detach().double(), count / count.sum()
    Q, P = turn(rows.T @ (share[:, None] * rows), sensitivity(teacher, spaced(ids, GRADIENTS)), spec.embedding_factor or spec.factor)
    align.rotate(teacher, Q)
    return teacher, Q.T @ P @ Q, share


def sensitivity(teacher: LlamaForCausalLM, ids: Tensor) -> Tensor:
    """How much a direction of the embedding matters to the loss: E[g gᵀ] (d, d) of mean diagonal 1, and IDENTITY; g the gradient by a token's embedding."""
    total = zero(ids)
    for part in ids.split(1):
        x = teacher.model.embed_tokens(part).detach().requires_grad_()
        with torch.enable_grad():
            (g,) = torch.autograd.grad(teacher(inputs_embeds=x, labels=part).loss, x)
        total = total + cross(g, g)
    return total / total.diagonal().mean() + IDENTITY * torch.eye(len(total), dtype=torch.float64, device=ids.device)


def turn(covariance: Tensor, metric: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """Q (d, d), orthogonal, that puts the best d/f directions of the rows on every f-th coordinate, and the projection P (d, d) onto them.

    Best for rows of that covariance when an error δ costs δ metric δᵀ.
    """
    d = len(covariance)
    eye = torch.eye(d, dtype=torch.float64, device=covariance.device)
    R = torch.linalg.cholesky(metric).T
    U = torch.linalg.eigh(R @ covariance @ R.T).eigenvectors.flip(1)[:, : d // factor]
    best = torch.linalg.solve_triangular(R, U, upper=True)  # (d, d/f), the rows' new span
    basis = torch.linalg.qr(torch.cat([best, eye], 1)).Q[:, :d]  # that span, then the rest
    return basis @ eye[torch.arange(d).view(-1, factor).T.flatten()], R.T @ U @ best.T


def toward(prior: Tensor, G: Tensor, C: Tensor, ridge: float) -> Tensor:
    """The (n, m) least-squares map with Gram matrix G (n, n) of the inputs and cross moments C (n, m), drawn towards prior (n, m)."""
    lifted = G + ridge * G.diagonal().mean() * torch.eye(len(G), dtype=G.dtype, device=G.device)
    return prior + torch.linalg.solve(lifted, C - G @ prior)


def mend(layers: tuple[nn.Linear, ...], norms: tuple[nn.Module, nn.Module], x_t: Tensor, x_s: Tensor, share: Tensor | None = None) -> None:
    """Let readers see the teacher's normed stream as far as the student's tells it: W ← W Mᵀ, x_s M ≈ x_t, one M (d, d) for all that read it.

    share: a weight for every row, where the rows are not tokens of a text but the vocabulary's.
    """
    G = C = zero(x_s)
    for t, s, *w in parts(x_t, x_s, *([] if share is None else [share])):
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
        self.G = self.C = zero(z)
        for a, t, x in parts(z, target, x_t):
            size = x.square().mean(-1, keepdim=True).clamp_min(1e-12).sqrt()  # RMSNorm divides by this before anything reads it
            w = torch.where(size > OUTLIER * size.median(), SINK**0.5, 1.0) / size
            a = torch.cat([a * w, w], -1) if self.biased else a * w
            self.G, self.C = self.G + cross(a, a), self.C + cross(a, t * w)

    def refit(self, ridge: float) -> None:
        """For a dense layer."""
        self._set(toward(self.W, self.G, self.C, ridge), 1)

    def narrow(self, A: Tensor, prior: Tensor, ridge: float, factor: int) -> None:
        """For a compressed one, that reads z A, A (n, n/f): what the teacher's weights would write, near to prior (n/f, d); then the target; spread over every f-th input."""
        if self.biased:
            A, prior = torch.block_diag(A, torch.ones_like(A[:1, :1])), torch.cat([prior, self.W[-1:]])
        G = A.T @ self.G @ A
        own = toward(prior, G, A.T @ self.G @ self.W, OWN)
        self._set(toward(own, G, A.T @ self.C, ridge), factor)

    def _set(self, found: Tensor, factor: int) -> None:
        if self.biased:
            found, bias = found[:-1], found[-1]
            self.layer.bias.copy_(bias)
        self.layer.weight.copy_(spread(found, factor, 0).T)


def narrow_values(attn: nn.Module, writer: Writer, ridge: float, factor: int) -> Tensor:
    """The best e/f of a key head's e values, by the mixed values' moments and the output projections of all its query heads; then those refitted. Returns the map (n, n/f)."""
    e, groups = attn.head_dim, attn.num_key_value_groups
    n = attn.o_proj.in_features
    maps: list[Tensor] = []
    right: list[Tensor] = []
    for key in range(n // e // groups):
        rows = [slice(h * e, (h + 1) * e) for h in align.group(attn, key)]
        pooled = sum(writer.G[r, r] for r in rows)
        left, outs = low_rank(torch.eye(e, dtype=pooled.dtype, device=pooled.device), torch.cat([writer.W[r] for r in rows], 1), e // factor, pooled)
        maps.append(left)
        right += outs.chunk(groups, 1)
    outputs(attn.v_proj, torch.stack(maps), factor)
    A = torch.block_diag(*(m for m in maps for _ in range(groups)))
    writer.narrow(A, torch.cat(right), ridge, factor)
    return A


def kept_units(G: Tensor, W: Tensor, wanted: int, ridge: float = OWN) -> Tensor:
    """Indices of the units to keep: an eighth at a time leaves, those whose output (G their Gram matrix, W what each writes) the others can make up for best."""
    G = G + ridge * G.diagonal().mean() * torch.eye(len(G), dtype=G.dtype, device=G.device)
    alive, aim = torch.arange(len(G), device=G.device), G @ W
    while len(alive) > wanted:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(G[alive][:, alive]))
        cost = (inverse @ aim[alive]).square().sum(1) / inverse.diagonal()
        drop = min(len(alive) - wanted, max(1, len(alive) // 8))
        alive = alive[cost.argsort(stable=True)[drop:].sort().values]
    return alive


def narrow_units(mlp: nn.Module, writer: Writer, ridge: float, factor: int) -> Tensor:
    """1/f of the gated hidden units, and the last map refitted on them. Returns their indices."""
    n = mlp.down_proj.in_features
    G = writer.G[:n, :n]
    if writer.biased:  # what the bias explains is no unit's worth
        G = G - writer.G[:n, n:] @ writer.G[n:, :n] / writer.G[n, n]
    keep = kept_units(G, writer.W[:n], n // factor)
    for layer in (mlp.gate_proj, mlp.up_proj):
        for parameter in layer.parameters():
            parameter.copy_(spread(parameter[keep].view(len(keep), -1), factor, 0).view_as(parameter))
    choose = torch.eye(n, dtype=G.dtype, device=G.device)[:, keep]
    writer.narrow(choose, writer.W[keep], ridge, factor)
    return keep


def check(model: nn.Module, spec: KroneckerSpec, ids: Tensor) -> None:
    """Raises ValueError, one line, for a model, a spec or calibration ids (sequences, length) that cannot be aligned."""
    if type(model) is not LlamaForCausalLM:
        raise ValueError(f"init 'aligned' takes LlamaForCausalLM among Llama's classes, got {type(model).__name__}: take init='svd'")
    config = model.config
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point() or not ids.numel() or ids.shape[1] < 2:
        raise ValueError("init 'aligned' needs calibration=token ids, an integer tensor (sequences, length) of some 65,000 tokens of text")
    if ids.device != model.device:
        raise ValueError(f"the calibration ids are on {ids.device} and the model on {model.device}: move one of them with .to()")
    if ids.shape[1] > config.max_position_embeddings or ids.min() < 0 or ids.max() >= config.vocab_size:
        raise ValueError(f"calibration ids must be below {config.vocab_size} in sequences of at most {config.max_position_embeddings}, got up to {int(ids.max())} and {ids.shape[1]}")
    if spec.rank != 1 or spec.ranks or not spec.out_proj or spec.factor < 2:
        raise ValueError("init 'aligned' pairs inputs and outputs: it needs rank 1 everywhere, out_proj=True and a factor of at least 2")
    if spec.embedding and ((factor := spec.embedding_factor or spec.factor) < 2 or config.hidden_size % factor):
        raise ValueError(f"init 'aligned' needs an embedding factor of at least 2 that divides {config.hidden_size}, got {factor}")
    narrowed(spec, config.num_hidden_layers)
    if spec.head == "tied":
        raise ValueError("init 'aligned' gives the head the last norm's gain, so it cannot be the embedding's factors: take head='dense'")
    if (size := model.model.layers[0].self_attn.head_dim) % (2 * spec.factor) or config.intermediate_size % spec.factor:
        raise ValueError(f"factor {spec.factor} does not divide the frequencies of a head of {size} (half its size) and the {config.intermediate_size} hidden units")


def narrowed(spec: KroneckerSpec, layers: int) -> tuple[set[int], set[int]]:
    """The layers whose attention and those whose feed-forward network are compressed; ValueError where only some matrices of one are, or in another shape."""
    plan = spec.factor_shapes(layers, {path: side for path, (side, _) in KnLlamaForCausalLM.target_modules.items()}, KnLlamaForCausalLM.out_proj)
    found = []
    for paths in ([path for path in KnLlamaForCausalLM.target_modules if path not in GATED], GATED):
        found.append({i for i in range(layers) if f"{i}.{paths[0]}" in plan})
        wanted = {f"{i}.{path}" for i in found[-1] for path in paths}
        if {name for name in plan if name.partition(".")[2] in paths} != wanted:
            raise ValueError(f"init 'aligned' compresses {', '.join(paths)} of a layer together or not at all")
    if any(shape is not None for shape in spec.shapes.values()):
        raise ValueError("init 'aligned' pairs inputs and outputs: shapes may leave matrices dense (None), not give them another B")
    return found[0], found[1]


@torch.no_grad()
def prepare(model: LlamaForCausalLM, spec: KroneckerSpec, ids: Tensor) -> LlamaForCausalLM:
    """A dense model near to the teacher whose compressed matrices are Kronecker products with B = (1, 0, …); ids (sequences, length)."""
    check(model, spec, ids)
    teacher, halved, share = _turned(model, spec, ids)
    teacher.set_attn_implementation("sdpa")  # without a mask this is causal
    student = copy.deepcopy(teacher)
    if halved is not None:
        student.model.embed_tokens.weight.copy_(student.model.embed_tokens.weight.double() @ halved)
    blocks = list(zip(teacher.model.layers, student.model.layers, strict=True))
    small = narrowed(spec, len(blocks))
    first = -1 if halved is not None else min(small[0] | small[1], default=len(blocks))
    some = spaced(ids, TOKENS)
    x_t, x_s = (m.model.embed_tokens(some) for m in (teacher, student))
    positions = teacher.model.rotary_emb(x_t, torch.arange(ids.shape[1], device=ids.device)[None])
    for index, (dense, block) in enumerate(blocks):
        attn, mlp, behind, reads_words = block.self_attn, block.mlp, DENSE and index > first, index == 0 and halved is not None
        if behind:
            seen = (x_t, x_s)
            if reads_words:  # the first layer reads little but tokens: its attention is fitted to the whole vocabulary
                seen = (*(m.model.embed_tokens.weight[:, None] for m in (teacher, student)), share[:, None, None].to(x_t.dtype))
            mend((attn.q_proj, attn.k_proj, attn.v_proj), (dense.input_layernorm, block.input_layernorm), *seen)
        x_t, x_s = _attention(dense, block, x_t, x_s, positions, spec.factor if index in small[0] else 1, behind)
        behind = behind or (DENSE and index in small[0])
        if behind:
            mend((mlp.gate_proj, mlp.up_proj), (dense.post_attention_layernorm, block.post_attention_layernorm), x_t, x_s)
        x_t, x_s = _feed_forward(dense, block, x_t, x_s, spec.factor if index in small[1] else 1, behind, START if reads_words else WRITE)
    if DENSE:
        mend((student.lm_head,), (teacher.model.norm, student.model.norm), x_t, x_s)
    student.set_attn_implementation(model.config._attn_implementation)
    return student.to(model.dtype).train(model.training)


def _read_by(layer: nn.Linear, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """What a layer reads while function(x) runs, some sequences at a time."""
    found = []
    hook = layer.register_forward_pre_hook(lambda _layer, inputs: found.append(inputs[0]))
    in_parts(function, x)
    hook.remove()
    return torch.cat(found)


def _attention(dense, block, x_t: Tensor, x_s: Tensor, positions, factor: int, behind: bool) -> tuple[Tensor, Tensor]:
    """Both streams after the attention, the student's narrowed if factor > 1, or refitted if it lies behind what is compressed."""
    attn = block.self_attn

    def attend(layer: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda x: layer.self_attn(layer.input_layernorm(x), positions, None)[0]

    if factor > 1:
        narrow_query_key(dense, block, x_t, x_s, positions, factor)
    after = x_t + in_parts(attend(dense), x_t)
    mixed = _read_by(attn.o_proj, attend(block), x_s)
    if behind or factor > 1:
        writer = Writer(attn.o_proj, mixed, after - x_s, after)
        if factor == 1:
            writer.refit(WRITE)
        else:
            A = narrow_values(attn, writer, WRITE, factor).to(mixed.dtype)
            mixed = in_parts(lambda z: nn.functional.pad((z @ A)[..., None], (0, factor - 1)).flatten(-2), mixed)
    return after, x_s + in_parts(attn.o_proj, mixed)


def _feed_forward(dense, block, x_t: Tensor, x_s: Tensor, factor: int, behind: bool, ridge: float) -> tuple[Tensor, Tensor]:
    """Both streams after the feed-forward network, the student's narrowed if factor > 1, or refitted if it lies behind what is compressed."""
    mlp = block.mlp
    after = x_t + in_parts(lambda x: dense.mlp(dense.post_attention_layernorm(x)), x_t)
    hidden = _read_by(mlp.down_proj, lambda x: block.mlp(block.post_attention_layernorm(x)), x_s)
    if behind or factor > 1:
        writer = Writer(mlp.down_proj, hidden, after - x_s, after)
        if factor == 1:
            writer.refit(ridge)
        else:
            keep = narrow_units(mlp, writer, ridge, factor)
            hidden = in_parts(lambda z: nn.functional.pad(z[..., keep, None], (0, factor - 1)).flatten(-2), hidden)
    return after, x_s + in_parts(mlp.down_proj, hidden)
