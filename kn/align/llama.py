"""Aligned start of Llama (MATH.md §5): of all weights of one function, those nearest to Kronecker products.

As gpt2.py, but the stream may be rotated freely (RMSNorm has no mean), query heads share a key head, and
rotary positions tie queries and keys to frequencies: narrow ones are fitted to the teacher's attention
(rotary.py). Dense layers behind a compressed one are refitted: they make up for its loss.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from kn.align import least_squares as lsq
from kn.align import symmetries_llama as symmetries
from kn.align.calibration import check_calibration, evenly_spaced, gradient_covariance, token_frequencies
from kn.align.least_squares import cross_moment, interleave_zeros, map_batches
from kn.align.rotary import narrow_heads, narrow_query_key
from kn.models.config import KroneckerSpec
from kn.models.llama import GATED, KnLlamaForCausalLM

STREAM_TOKENS = 65536  # of the calibration text run through the layers; token frequencies count all of it
GRADIENT_TOKENS = 4096  # for gradient_covariance
SMOOTHING = 500.0  # added to every token's count; nearly equal frequencies are best in any domain (LOG.md)
# ridges, relative to the mean of a Gram matrix's diagonal; less text asks for more (LOG.md)
RIDGE_OWN_LAYER = 0.01  # of a narrow writer towards the teacher's weights, to make up for its own layer
RIDGE_WRITER = 0.3  # of writers towards these weights, to make up for earlier layers
RIDGE_FIRST_WRITER = 0.03  # of the first layer's MLP writer if the embedding is compressed
RIDGE_READER = 0.1  # of the map between the streams that readers see, towards the identity
SINK_NORM = 4.0  # times the median norm: an attention sink (a sequence's first token, above all)
SINK_WEIGHT = 64.0  # least-squares weight of an attention-sink token; others have 1


def equivalent_teacher(model: LlamaForCausalLM, spec: KroneckerSpec, ids: Tensor) -> LlamaForCausalLM:
    """An untied model with the same logits, rotated so that the compressed embedding keeps most of it.

    ids: (sequences, length) of calibration text. Raises ValueError as `check` does.
    """
    check(model, spec, ids)
    return _rotated_teacher(model, spec, ids)[0].to(model.dtype).train(model.training)


def _rotated_teacher(
    model: LlamaForCausalLM, spec: KroneckerSpec, ids: Tensor
) -> tuple[LlamaForCausalLM, Tensor | None, Tensor | None]:
    """(teacher, projection (d, d) of its embedding as in gpt2.py, token frequencies (vocabulary))."""
    teacher = symmetries.untied(model).to(torch.promote_types(model.dtype, torch.float32)).eval()
    symmetries.fold_norms(teacher)
    if not spec.embedding:
        return teacher, None, None
    rows = teacher.model.embed_tokens.weight.detach().double()
    frequency = token_frequencies(ids, len(rows), SMOOTHING)
    metric = gradient_covariance(
        teacher.model.embed_tokens, lambda x, batch: [teacher(inputs_embeds=x, labels=batch).loss],
        evenly_spaced(ids, GRADIENT_TOKENS).split(1),
    )
    covariance = rows.T @ (frequency[:, None] * rows)
    Q, P = optimal_rotation(covariance, metric, spec.embedding_factor or spec.factor)
    symmetries.rotate(teacher, Q)
    return teacher, Q.T @ P @ Q, frequency


def optimal_rotation(covariance: Tensor, metric: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """Q (d, d), orthogonal, that turns the best_subspace of rank d/f onto every f-th coordinate.

    Also returns the projection P (d, d) onto that subspace. Both float64.
    """
    d = len(covariance)
    eye = torch.eye(d, dtype=torch.float64, device=covariance.device)
    span, P = lsq.best_subspace(covariance, metric, d // factor, eye)
    basis = torch.linalg.qr(torch.cat([span, eye], 1)).Q[:, :d]  # the span, then the rest
    return basis @ eye[torch.arange(d).view(-1, factor).T.flatten()], P


def refit_readers(
    layers: tuple[nn.Linear, ...], norms: tuple[nn.Module, nn.Module], x_t: Tensor, x_s: Tensor,
    weights: Tensor | None = None,
) -> None:
    """Refit all linear layers that read one norm. Streams (sequences, length, d), weights (sequences, 1, 1).

    Ridge regression finds M (d, d) with norm(x_s) M ≈ norm(x_t), shrunk towards the identity; then W ← W Mᵀ.
    """
    G = C = x_s.new_zeros(())
    for t, s, *w in lsq.batches(x_t, x_s, *([] if weights is None else [weights])):
        t, s = norms[0](t), norms[1](s)
        weighted = s * w[0] if w else s
        G, C = G + cross_moment(weighted, s), C + cross_moment(weighted, t)
    M = lsq.ridge_regression(G, C, RIDGE_READER, torch.eye(len(G), dtype=G.dtype, device=G.device)).T
    for layer in layers:
        for rows in layer.weight.split(8192):
            rows.copy_(rows.double() @ M)


class WriterRegression:
    """Ridge regression of a linear layer that writes to the stream, errors relative to the stream's norm.

    Layer inputs z (sequences, length, n), target outputs and teacher's stream x_t (sequences, length, d).
    W (n, d) holds the teacher's weights, with the bias as one more row; G = Σ zᵀ z, C = Σ zᵀ target.
    """

    def __init__(self, layer: nn.Linear, z: Tensor, target: Tensor, x_t: Tensor):
        self.layer, self.has_bias = layer, layer.bias is not None
        self.W = layer.weight.double().T
        if self.has_bias:
            self.W = torch.cat([self.W, layer.bias.double()[None]])
        self.G = self.C = z.new_zeros(())
        for a, t, x in lsq.batches(z, target, x_t):
            norm = x.square().mean(-1, keepdim=True).clamp_min(1e-12).sqrt()  # RMSNorm divides by it next
            w = torch.where(norm > SINK_NORM * norm.median(), SINK_WEIGHT**0.5, 1.0) / norm
            a = torch.cat([a * w, w], -1) if self.has_bias else a * w
            self.G, self.C = self.G + cross_moment(a, a), self.C + cross_moment(a, t * w)

    def refit(self, ridge: float) -> None:
        """Refit a dense layer, drawn towards its weights."""
        self._set(lsq.ridge_regression(self.G, self.C, ridge, self.W), 1)

    def narrow(self, A: Tensor, prior: Tensor, ridge: float, factor: int) -> None:
        """Refit a layer that will read z A, A (n, n/f), followed by zeros, drawn towards prior (n/f, d).

        First to the output of the teacher's weights, then to the target.
        """
        if self.has_bias:
            A, prior = torch.block_diag(A, torch.ones_like(A[:1, :1])), torch.cat([prior, self.W[-1:]])
        G = A.T @ self.G @ A
        own = lsq.ridge_regression(G, A.T @ self.G @ self.W, RIDGE_OWN_LAYER, prior)
        self._set(lsq.ridge_regression(G, A.T @ self.C, ridge, own), factor)

    def _set(self, fitted: Tensor, factor: int) -> None:
        if self.has_bias:
            fitted, bias = fitted[:-1], fitted[-1]
            self.layer.bias.copy_(bias)
        self.layer.weight.copy_(interleave_zeros(fitted, factor, 0).T)


def narrow_values(attn: nn.Module, writer: WriterRegression, factor: int) -> Tensor:
    """Values of size e/f per key head, by their moments and all output projections that read them.

    Returns the map (n, n/f) of o_proj's inputs.
    """
    e, groups = attn.head_dim, attn.num_key_value_groups
    eye = torch.eye(e, dtype=writer.G.dtype, device=writer.G.device)
    maps: list[Tensor] = []
    outputs: list[Tensor] = []
    for key_head in range(attn.o_proj.in_features // e // groups):
        rows = [slice(h * e, (h + 1) * e) for h in symmetries.query_heads(attn, key_head)]
        output = torch.cat([writer.W[r] for r in rows], 1)  # (e, groups · d)
        left, right = lsq.weighted_low_rank(eye, output, e // factor, sum(writer.G[r, r] for r in rows))
        maps.append(left)
        outputs += right.chunk(groups, 1)
    narrow_heads(attn.v_proj, torch.stack(maps), factor)
    A = torch.block_diag(*(m for m in maps for _ in range(groups)))
    writer.narrow(A, torch.cat(outputs), RIDGE_WRITER, factor)
    return A


def select_neurons(G: Tensor, W: Tensor, keep: int, ridge: float = RIDGE_OWN_LAYER) -> Tensor:
    """Indices (keep) of the neurons to keep: an eighth goes at a time, those the others can replace best.

    G (n, n): Gram matrix of the neurons, W (n, d): output weights.
    """
    G = lsq.add_ridge(G, ridge)
    kept, target = torch.arange(len(G), device=G.device), G @ W
    while len(kept) > keep:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(G[kept][:, kept]))
        cost = (inverse @ target[kept]).square().sum(1) / inverse.diagonal()
        drop = min(len(kept) - keep, max(1, len(kept) // 8))
        kept = kept[cost.argsort(stable=True)[drop:].sort().values]
    return kept


def prune_neurons(mlp: nn.Module, writer: WriterRegression, ridge: float, factor: int) -> Tensor:
    """Keep 1/f of the gated MLP's neurons and refit down_proj on them; returns their indices (n/f,)."""
    n = mlp.down_proj.in_features
    G = writer.G[:n, :n]
    if writer.has_bias:  # centred: the bias absorbs the mean
        G = G - writer.G[:n, n:] @ writer.G[n:, :n] / writer.G[n, n]
    keep = select_neurons(G, writer.W[:n], n // factor)
    for parameter in (*mlp.gate_proj.parameters(), *mlp.up_proj.parameters()):
        kept = parameter[keep].view(len(keep), -1)
        parameter.copy_(interleave_zeros(kept, factor, 0).view_as(parameter))
    writer.narrow(torch.eye(n, dtype=G.dtype, device=G.device)[:, keep], writer.W[keep], ridge, factor)
    return keep


def check(model: nn.Module, spec: KroneckerSpec, ids: Tensor) -> None:
    """Raises ValueError for a model, a spec or calibration ids (sequences, length) that cannot be aligned."""
    if type(model) is not LlamaForCausalLM:
        got = type(model).__name__
        raise ValueError(f"init 'aligned' takes LlamaForCausalLM, not {got}: take init='svd'")
    if isinstance(ids, Tensor) and ids.device != model.device:
        devices = f"the calibration ids are on {ids.device} and the model on {model.device}"
        raise ValueError(f"{devices}: move one of them with .to()")
    check_calibration(model, spec, ids, tokens="65,000")
    config, size = model.config, model.model.layers[0].self_attn.head_dim
    compressed_layers(spec, config.num_hidden_layers)
    if size % (2 * spec.factor) or config.intermediate_size % spec.factor:
        raise ValueError(
            f"factor {spec.factor} does not divide the frequencies of a head of {size} (half its size) "
            f"and the {config.intermediate_size} hidden units"
        )


def compressed_layers(spec: KroneckerSpec, layers: int) -> tuple[set[int], set[int]]:
    """Indices of the layers whose attention and of those whose MLP is compressed.

    Raises ValueError where only some matrices of one are, or where B has a shape of its own.
    """
    targets = KnLlamaForCausalLM.target_modules
    shapes = spec.factor_shapes(layers, targets, KnLlamaForCausalLM.out_proj)
    found = []
    for paths in ([path for path in targets if path not in GATED], GATED):
        found.append({i for i in range(layers) if f"{i}.{paths[0]}" in shapes})
        together = {f"{i}.{path}" for i in found[-1] for path in paths}
        if {name for name in shapes if name.partition(".")[2] in paths} != together:
            names = ", ".join(paths)
            raise ValueError(f"init 'aligned' compresses {names} of a layer together or not at all")
    if any(shape is not None for shape in spec.shapes.values()):
        raise ValueError("init 'aligned' takes shapes that leave matrices dense (None), not another B")
    return found[0], found[1]


@torch.no_grad()
def prepare(model: LlamaForCausalLM, spec: KroneckerSpec, ids: Tensor) -> LlamaForCausalLM:
    """A dense model near equivalent_teacher whose compressed matrices are Kronecker products, B = (1, 0, …).

    ids: (sequences, length) of calibration text. Raises ValueError as `check` does.
    """
    check(model, spec, ids)
    teacher, projection, frequency = _rotated_teacher(model, spec, ids)
    teacher.set_attn_implementation("sdpa")  # causal without a mask
    student = copy.deepcopy(teacher)
    embeddings = [m.model.embed_tokens for m in (teacher, student)]
    if projection is not None:
        embeddings[1].weight.copy_(embeddings[1].weight.double() @ projection)
    narrow_attention, narrow_mlp = compressed_layers(spec, len(teacher.model.layers))
    compressed = narrow_attention | narrow_mlp
    first = -1 if projection is not None else min(compressed, default=len(teacher.model.layers))
    text = evenly_spaced(ids, STREAM_TOKENS)
    x_t, x_s = (embedding(text) for embedding in embeddings)
    positions = teacher.model.rotary_emb(x_t, torch.arange(ids.shape[1], device=ids.device)[None])
    for index, (dense, block) in enumerate(zip(teacher.model.layers, student.model.layers, strict=True)):
        attn, mlp, refits, ridge = block.self_attn, block.mlp, index > first, RIDGE_WRITER
        streams = [x_t, x_s]
        if index == 0 and projection is not None:
            # the first layer reads little but tokens: its attention is fitted to the vocabulary, not the text
            streams = [embedding.weight[:, None] for embedding in embeddings]
            streams.append(frequency[:, None, None].to(x_t.dtype))
            ridge = RIDGE_FIRST_WRITER
        if refits:
            norms = (dense.input_layernorm, block.input_layernorm)
            refit_readers((attn.q_proj, attn.k_proj, attn.v_proj), norms, *streams)
        factor = spec.factor if index in narrow_attention else 1
        x_t, x_s = _fit_attention(dense, block, x_t, x_s, positions, factor, refits)
        refits = refits or index in narrow_attention
        if refits:
            norms = (dense.post_attention_layernorm, block.post_attention_layernorm)
            refit_readers((mlp.gate_proj, mlp.up_proj), norms, x_t, x_s)
        factor = spec.factor if index in narrow_mlp else 1
        x_t, x_s = _fit_mlp(dense, block, x_t, x_s, factor, refits, ridge)
    refit_readers((student.lm_head,), (teacher.model.norm, student.model.norm), x_t, x_s)
    student.set_attn_implementation(model.config._attn_implementation)
    return student.to(model.dtype).train(model.training)


def _fit_attention(
    dense: nn.Module, block: nn.Module, x_t: Tensor, x_s: Tensor, positions: tuple[Tensor, Tensor],
    factor: int, refits: bool,
) -> tuple[Tensor, Tensor]:
    """Both streams after the attention, the student's narrowed if factor > 1, else refitted if asked for."""

    def attention(layer: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda x: layer.self_attn(layer.input_layernorm(x), positions, None)[0]

    def narrow(writer: WriterRegression) -> Callable[[Tensor], Tensor]:
        A = narrow_values(block.self_attn, writer, factor).to(x_s.dtype)
        return lambda z: interleave_zeros(z @ A, factor, 2)

    if factor > 1:
        narrow_query_key(dense, block, x_t, x_s, positions, factor)
    fit = narrow if factor > 1 else RIDGE_WRITER if refits else None
    return _fit_writer(block.self_attn.o_proj, attention(dense), attention(block), x_t, x_s, fit)


def _fit_mlp(
    dense: nn.Module, block: nn.Module, x_t: Tensor, x_s: Tensor, factor: int, refits: bool, ridge: float
) -> tuple[Tensor, Tensor]:
    """Both streams after the MLP, the student's narrowed if factor > 1, else refitted if asked for."""

    def mlp(layer: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda x: layer.mlp(layer.post_attention_layernorm(x))

    def narrow(writer: WriterRegression) -> Callable[[Tensor], Tensor]:
        keep = prune_neurons(block.mlp, writer, ridge, factor)
        return lambda z: interleave_zeros(z[..., keep], factor, 2)

    fit = narrow if factor > 1 else ridge if refits else None
    return _fit_writer(block.mlp.down_proj, mlp(dense), mlp(block), x_t, x_s, fit)


def _fit_writer(
    layer: nn.Linear, teacher: Callable, student: Callable, x_t: Tensor, x_s: Tensor,
    fit: float | Callable[[WriterRegression], Callable[[Tensor], Tensor]] | None,
) -> tuple[Tensor, Tensor]:
    """Both streams after a sublayer (teacher, student: stream → output) whose output `layer` writes.

    fit: a ridge to refit the layer with, or a function that narrows it and returns the map to its new inputs.
    """
    after, inputs = x_t + map_batches(teacher, x_t), []
    hook = layer.register_forward_pre_hook(lambda _layer, args: inputs.append(args[0]))
    map_batches(student, x_s)
    hook.remove()
    z = torch.cat(inputs)
    if fit is not None:
        writer = WriterRegression(layer, z, after - x_s, after)
        if callable(fit):
            z = map_batches(fit(writer), z)
        else:
            writer.refit(fit)
    return after, x_s + map_batches(layer, z)
