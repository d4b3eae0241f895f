"""Aligned start of Llama: of all weights of one function, those nearest to Kronecker products.

As gpt2.py, but the stream may be rotated freely (RMSNorm has no mean), query heads share a key head, and
rotary positions tie queries and keys to frequencies: narrow ones are fitted to the teacher's attention
(rotary.py). Dense layers behind a compressed one are refitted: they make up for its loss."""

import copy
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from kn.align import least_squares as lsq
from kn.align import symmetries
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

Map = Callable[[Tensor], Tensor]  # of activations (sequences, length, …), a batch at a time


def rotated_teacher(
    model: LlamaForCausalLM, spec: KroneckerSpec, ids: Tensor
) -> tuple[LlamaForCausalLM, Tensor | None, Tensor | None]:
    """(teacher in float32 at least, its embedding's projection, as in gpt2.py; frequencies of tokens)."""
    teacher = symmetries.untied_copy(model).to(torch.promote_types(model.dtype, torch.float32)).eval()
    teacher.generation_config = copy.deepcopy(model.generation_config)
    symmetries.fold_llama_norms(teacher)
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
    symmetries.rotate_llama(teacher, Q)
    return teacher, Q.T @ P @ Q, frequency


def optimal_rotation(covariance: Tensor, metric: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """Q (d, d), orthogonal, that turns the best_subspace of rank d/f onto every f-th coordinate.
    Also returns the projection P (d, d) onto that subspace. Both float64."""
    d = len(covariance)
    eye = torch.eye(d, dtype=torch.float64, device=covariance.device)
    span, P = lsq.best_subspace(covariance, metric, d // factor, eye)
    basis = torch.linalg.qr(torch.cat([span, eye], 1)).Q[:, :d]  # the span, then the rest
    return basis @ eye[torch.arange(d).view(-1, factor).T.flatten()], P


def refit_readers(
        dense: nn.Module, block: nn.Module, norm: str, layers: Iterable[nn.Linear], x_t: Tensor, x_s: Tensor,
        *weights: Tensor) -> None:
    """Refit all linear layers that read one norm. Streams (sequences, length, d), weights (sequences, 1, 1).
    Ridge regression: M (d, d) with norm(x_s) M ≈ norm(x_t), shrunk towards the identity; then W ← W Mᵀ."""
    norm_t, norm_s = getattr(dense, norm), getattr(block, norm)
    G = C = x_s.new_zeros(())
    for t, s, *w in lsq.batches(x_t, x_s, *weights):
        t, s = norm_t(t), norm_s(s)
        weighted = s * w[0] if w else s
        G, C = G + cross_moment(weighted, s), C + cross_moment(weighted, t)
    M = lsq.ridge_regression(G, C, RIDGE_READER, torch.eye(len(G), dtype=G.dtype, device=G.device)).T
    for layer in layers:
        for rows in layer.weight.split(8192):
            rows.copy_(rows.double() @ M)


class WriterRegression:
    """Ridge regression of a linear layer that writes to the stream, errors relative to the stream's norm.
    Layer inputs z (sequences, length, n), target outputs and teacher's stream x_t (sequences, length, d).
    W (n, d) holds the teacher's weights, with the bias as one more row; G = Σ zᵀ z, C = Σ zᵀ target."""

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
        First to the output of the teacher's weights, then to the target."""
        if self.has_bias:
            A, prior = torch.block_diag(A, torch.ones_like(A[:1, :1])), torch.cat([prior, self.W[-1:]])
        G = A.T @ self.G @ A
        own = lsq.ridge_regression(G, A.T @ self.G @ self.W, RIDGE_OWN_LAYER, prior)
        self._set(lsq.ridge_regression(G, A.T @ self.C, ridge, own), factor)

    def _set(self, fitted: Tensor, factor: int) -> None:
        if self.has_bias:
            self.layer.bias.copy_(fitted[-1])
            fitted = fitted[:-1]
        self.layer.weight.copy_(interleave_zeros(fitted, factor, 0).T)


Fit = Callable[[WriterRegression], Map | None]  # returns the map to the layer's new inputs, if they change


def narrow_values(attn: nn.Module, factor: int, writer: WriterRegression) -> Map:
    """Values of size e/f per key head, by their moments and all output projections that read them.
    Returns the map of o_proj's inputs to what they become."""
    e, groups = attn.head_dim, attn.num_key_value_groups
    eye = torch.eye(e, dtype=writer.G.dtype, device=writer.G.device)
    maps: list[Tensor] = []
    outputs: list[Tensor] = []
    for first in range(0, attn.o_proj.in_features, groups * e):  # the query heads of one key head
        rows = [slice(start, start + e) for start in range(first, first + groups * e, e)]
        output = torch.cat([writer.W[r] for r in rows], 1)  # (e, groups · d)
        left, right = lsq.weighted_low_rank(eye, output, e // factor, sum(writer.G[r, r] for r in rows))
        maps.append(left)
        outputs += right.chunk(groups, 1)
    narrow_heads(attn.v_proj, torch.stack(maps), factor)
    A = torch.block_diag(*(m for m in maps for _ in range(groups)))
    writer.narrow(A, torch.cat(outputs), RIDGE_WRITER, factor)
    return lambda z: interleave_zeros(z @ A.to(z.dtype), factor, 2)


def select_neurons(G: Tensor, W: Tensor, keep: int, ridge: float = RIDGE_OWN_LAYER) -> Tensor:
    """Indices (keep) of the neurons to keep: an eighth goes at a time, those the others can replace best.
    G (n, n): Gram matrix of the neurons, W (n, d): output weights."""
    G = lsq.add_ridge(G, ridge)
    kept, target = torch.arange(len(G), device=G.device), G @ W
    while len(kept) > keep:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(G[kept][:, kept]))
        cost = (inverse @ target[kept]).square().sum(1) / inverse.diagonal()
        drop = min(len(kept) - keep, max(1, len(kept) // 8))
        kept = kept[cost.argsort(stable=True)[drop:].sort().values]
    return kept


def prune_neurons(mlp: nn.Module, ridge: float, factor: int, writer: WriterRegression) -> Map:
    """Keep 1/f of the gated MLP's neurons and refit down_proj on them; returns the map of its inputs."""
    n = mlp.down_proj.in_features
    G = writer.G[:n, :n]
    if writer.has_bias:  # centred: the bias absorbs the mean
        G = G - writer.G[:n, n:] @ writer.G[n:, :n] / writer.G[n, n]
    keep = select_neurons(G, writer.W[:n], n // factor)
    for parameter in (*mlp.gate_proj.parameters(), *mlp.up_proj.parameters()):
        kept = parameter[keep].view(len(keep), -1)
        parameter.copy_(interleave_zeros(kept, factor, 0).view_as(parameter))
    writer.narrow(torch.eye(n, dtype=G.dtype, device=G.device)[:, keep], writer.W[keep], ridge, factor)
    return lambda z: interleave_zeros(z[..., keep], factor, 2)


def check(model: nn.Module, spec: KroneckerSpec, ids: Tensor) -> None:
    """Raises ValueError for a model, a spec or calibration ids (sequences, length) that cannot be aligned."""
    if (cls := type(model)) is not LlamaForCausalLM:
        raise ValueError(f"init 'aligned' takes LlamaForCausalLM, not {cls.__name__}: take init='svd'")
    if isinstance(ids, Tensor) and ids.device != model.device:
        devices = f"the calibration ids are on {ids.device} and the model on {model.device}"
        raise ValueError(f"{devices}: move one of them with .to()")
    check_calibration(model, spec, ids, tokens="65,000")
    config, size = model.config, model.model.layers[0].self_attn.head_dim
    compressed_layers(spec, config.num_hidden_layers)
    if size % (2 * spec.factor) or config.intermediate_size % spec.factor:
        units = f"a head of {size} (half its size) and the {config.intermediate_size} hidden units"
        raise ValueError(f"factor {spec.factor} does not divide the frequencies of {units}")


def compressed_layers(spec: KroneckerSpec, layers: int) -> tuple[set[int], set[int]]:
    """Indices of the layers whose attention and of those whose MLP is compressed.
    Raises ValueError where only some matrices of one are, or where B has a shape of its own."""
    targets = KnLlamaForCausalLM.target_modules
    shapes = spec.factor_shapes(layers, targets, KnLlamaForCausalLM.out_proj)
    found = []
    for paths in ([path for path in targets if path not in GATED], GATED):
        compressed = [{i for i in range(layers) if f"{i}.{path}" in shapes} for path in paths]
        if any(indices != compressed[0] for indices in compressed):
            names = ", ".join(paths)
            raise ValueError(f"init 'aligned' compresses {names} of a layer together or not at all")
        found.append(compressed[0])
    if any(shape is not None for shape in spec.shapes.values()):
        raise ValueError("init 'aligned' takes shapes that leave matrices dense (None), not another B")
    return found[0], found[1]


@torch.no_grad()
def build_aligned_pair(
    model: LlamaForCausalLM, spec: KroneckerSpec, ids: Tensor
) -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    """As build_aligned_pair of gpt2.py. Raises ValueError as `check` does."""
    check(model, spec, ids)
    teacher, projection, frequency = rotated_teacher(model, spec, ids)
    teacher.set_attn_implementation("sdpa")  # causal without a mask
    student = copy.deepcopy(teacher)
    embeddings = [m.model.embed_tokens for m in (teacher, student)]
    if projection is not None:
        embeddings[1].weight.copy_(embeddings[1].weight.double() @ projection)
    narrow_attention, narrow_mlp = compressed_layers(spec, len(teacher.model.layers))
    text = evenly_spaced(ids, STREAM_TOKENS)
    x_t, x_s = (embedding(text) for embedding in embeddings)
    positions = teacher.model.rotary_emb(x_t, torch.arange(ids.shape[1], device=ids.device)[None])

    def attention(layer: nn.Module, x: Tensor) -> Tensor:
        return layer.self_attn(layer.input_layernorm(x), positions, None)[0]

    def feed_forward(layer: nn.Module, x: Tensor) -> Tensor:
        return layer.mlp(layer.post_attention_layernorm(x))

    differs = projection is not None  # x_s is no longer x_t
    for index, (dense, block) in enumerate(zip(teacher.model.layers, student.model.layers, strict=True)):
        attn, mlp, ridge, streams = block.self_attn, block.mlp, RIDGE_WRITER, [x_t, x_s]
        if index == 0 and projection is not None:
            # the first layer reads little but tokens: its attention is fitted to the vocabulary, not the text
            streams = [embedding.weight[:, None] for embedding in embeddings]
            streams.append(frequency[:, None, None].to(x_t.dtype))
            ridge = RIDGE_FIRST_WRITER
        if differs:
            refit_readers(dense, block, "input_layernorm", (attn.q_proj, attn.k_proj, attn.v_proj), *streams)
        fit: Fit | None = partial(WriterRegression.refit, ridge=RIDGE_WRITER) if differs else None
        if index in narrow_attention:
            narrow_query_key(dense, block, x_t, x_s, positions, spec.factor)
            fit, differs = partial(narrow_values, attn, spec.factor), True
        x_t, x_s = _fit_writer(attn.o_proj, attention, dense, block, x_t, x_s, fit)
        if differs:
            readers = (mlp.gate_proj, mlp.up_proj)
            refit_readers(dense, block, "post_attention_layernorm", readers, x_t, x_s)
        fit = partial(WriterRegression.refit, ridge=ridge) if differs else None
        if index in narrow_mlp:
            fit, differs = partial(prune_neurons, mlp, ridge, spec.factor), True
        x_t, x_s = _fit_writer(mlp.down_proj, feed_forward, dense, block, x_t, x_s, fit)
    refit_readers(teacher.model, student.model, "norm", [student.lm_head], x_t, x_s)
    for aligned in (teacher, student):
        aligned.set_attn_implementation(model.config._attn_implementation)
        aligned.to(model.dtype).train(model.training)
    return teacher, student


def _fit_writer(
        layer: nn.Linear, sublayer: Callable[[nn.Module, Tensor], Tensor], dense: nn.Module, block: nn.Module,
        x_t: Tensor, x_s: Tensor, fit: Fit | None) -> tuple[Tensor, Tensor]:
    """Both streams after sublayer(dense, x_t) and sublayer(block, x_s), whose output `layer` writes.
    fit refits the layer, or narrows it and returns the map to its new inputs."""
    after, inputs = x_t + map_batches(partial(sublayer, dense), x_t), []
    with layer.register_forward_pre_hook(lambda _layer, args: inputs.append(args[0])):
        map_batches(partial(sublayer, block), x_s)
    z = torch.cat(inputs)
    if fit is not None and (narrow := fit(WriterRegression(layer, z, after - x_s, after))) is not None:
        z = map_batches(narrow, z)
    return after, x_s + map_batches(layer, z)
