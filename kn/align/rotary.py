"""Narrow queries and keys under rotary positions, for Llama's aligned start.

Positions tie every dimension to a frequency, so there is no best product in closed form as for GPT-2: 1/f of
the frequencies stay, their queries and keys fitted to the teacher's attention by a few steps of L-BFGS."""

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import rotate_half

from kn.align.calibration import evenly_spaced
from kn.align.least_squares import cross_moment, gram_root, interleave_zeros, map_batches

FIT_SEQUENCES = 16  # of the calibration text
FIT_QUERIES = 64  # per sequence, whose attention is compared
LBFGS_STEPS = 60  # from the best start in closed form
SLOW_ANGLE = 1.0  # radians over a sequence: frequencies that turn less may be mixed
Pair = tuple[Tensor, Tensor]  # of queries and keys, or cos and sin


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on x (…, length, width): dimensions i and i + width/2 are a complex number."""
    return x * cos + rotate_half(x) * sin


def narrow_heads(layer: nn.Linear, maps: Tensor, factor: int) -> None:
    """Map every head's e outputs to e/f, each followed by f − 1 zeros; maps (heads, e, e/f)."""
    for parameter in layer.parameters():
        old = parameter.double().view(len(maps), maps.shape[1], -1)
        new = interleave_zeros((maps.transpose(1, 2) @ old).flatten(0, 1), factor, 0)
        parameter.copy_(new.view_as(parameter))


def initial_maps(roots_q: Tensor, roots_k: Tensor, positions: Pair, factor: int) -> Pair:
    """Maps (heads, e, e/f) of queries and keys: every f-th fast frequency, a low-rank product of slow ones.
    roots R (heads, e, e): Rᵀ R is the second moment. positions: (cos, sin), each (1, length, e); frequencies
    fall, as in all rotary embeddings of transformers."""
    e, groups = roots_q.shape[-1], len(roots_q) // len(roots_k)
    cos, sin = (c[0, 1, : e // 2] for c in positions)
    fast = int((torch.atan2(sin, cos).abs() * positions[0].shape[1] > SLOW_ANGLE).sum())
    kept, kept_fast = e // 2 // factor, -(-fast // factor)  # frequencies
    eye = torch.eye(e, dtype=roots_q.dtype, device=roots_q.device)
    maps_q, maps_k = (eye[:, ::factor].repeat(len(roots), 1, 1) for roots in (roots_q, roots_k))
    if kept_fast < kept:
        ranges = ((kept_fast * factor, e // 2), (kept_fast, kept))
        slow, targets = (torch.cat([torch.arange(a, b), torch.arange(a, b) + b]) for a, b in ranges)
        n = len(targets)
        for key, root_k in enumerate(roots_k):
            queries = slice(key * groups, (key + 1) * groups)
            product = (roots_q[queries] @ eye[:, slow]).flatten(0, 1) @ (root_k @ eye[:, slow]).T
            U, s, Vh = torch.linalg.svd(product, full_matrices=False)
            scale = s[:n].sqrt()
            left = (U[:, :n] * scale).unflatten(0, (groups, e))
            maps_q[queries][:, :, targets] = torch.linalg.solve_triangular(roots_q[queries], left, upper=True)
            maps_k[key][:, targets] = torch.linalg.solve_triangular(root_k, Vh[:n].T * scale, upper=True)
    return maps_q, maps_k


@torch.no_grad()
def narrow_query_key(
        dense: nn.Module, block: nn.Module, x_t: Tensor, x_s: Tensor, positions: Pair, factor: int) -> None:
    """Queries and keys of size e/f, interleaved with zeros, of least KL(teacher ‖ student) in attention.
    dense, block: teacher's and student's layer, x_t, x_s (sequences, length, d) their streams. Fitted are
    maps (e, e/f) of each head's own queries and keys: few numbers, so that little text suffices."""
    attn, teacher = block.self_attn, dense.self_attn
    e, groups, scale, length = attn.head_dim, attn.num_key_value_groups, attn.scaling, x_s.shape[1]
    x_t, x_s = (evenly_spaced(x, FIT_SEQUENCES * length) for x in (x_t, x_s))
    every = -(-length // FIT_QUERIES)
    rows = torch.arange(len(x_s))[:, None] % every + torch.arange(0, length, every)
    rows = rows.clamp_max(length - 1).to(x_s.device)  # (sequences, n): positions of the queries
    cos, sin = positions[0][0], positions[1][0]  # (length, e)
    future = torch.arange(length, device=x_s.device) > rows[..., None]  # (sequences, n, length)

    def heads(layer: nn.Linear, norm: nn.Module, x: Tensor) -> Tensor:  # (sequences, heads, length, e)
        return map_batches(lambda batch: layer(norm(batch)).unflatten(-1, (-1, e)).transpose(1, 2), x)

    targets = []  # per sequence: attention (heads, n, length)
    for i, x in enumerate(x_t.split(1)):
        q, k = (heads(layer, dense.input_layernorm, x)[0] for layer in (teacher.q_proj, teacher.k_proj))
        q, k = q[:, rows[i]], apply_rotary(k, cos, sin).repeat_interleave(groups, 0)
        score = scale * apply_rotary(q, cos[rows[i]], sin[rows[i]]) @ k.transpose(-1, -2)
        targets.append(score.masked_fill(future[i], -torch.inf).softmax(-1))
    outputs = [heads(layer, block.input_layernorm, x_s) for layer in (attn.q_proj, attn.k_proj)]
    roots = [
        torch.stack([gram_root(cross_moment(h, h) / h[..., 0].numel()) for h in x.unbind(1)]) for x in outputs
    ]
    q, k = (  # whitened, so that L-BFGS needs few steps
        torch.linalg.solve_triangular(root.to(x.dtype), x, upper=True, left=False)
        for root, x in zip(roots, outputs, strict=True)
    )
    queries = [x[:, r] for x, r in zip(q, rows, strict=True)]
    starts = initial_maps(roots[0], roots[1], positions, factor)
    maps = [(root @ m).to(k.dtype).requires_grad_() for root, m in zip(roots, starts, strict=True)]
    narrow_cos, narrow_sin = cos[:, ::factor], sin[:, ::factor]
    optimizer = torch.optim.LBFGS(maps, max_iter=LBFGS_STEPS, max_eval=LBFGS_STEPS * 5 // 4, history_size=20,
                                  tolerance_change=0, tolerance_grad=0, line_search_fn="strong_wolfe")

    @torch.enable_grad()
    def cross_entropy() -> Tensor:
        """KL(teacher ‖ student) up to the teacher's entropy; gradients accumulate sequence by sequence."""
        optimizer.zero_grad()
        total = maps[0].new_zeros(())
        for i, target in enumerate(targets):
            query = apply_rotary(queries[i] @ maps[0], narrow_cos[rows[i]], narrow_sin[rows[i]])
            query = query.unflatten(0, (-1, groups)).flatten(1, 2)  # (key heads, groups · n, e/f)
            key = apply_rotary(k[i] @ maps[1], narrow_cos, narrow_sin)
            score = (scale * query @ key.transpose(-1, -2)).view_as(target).masked_fill(future[i], -1e4)
            loss = -(target * score.log_softmax(-1)).sum() / target[..., 0].numel() / len(targets)
            loss.backward()
            total = total + loss.detach()
        return total

    optimizer.step(cross_entropy)
    for layer, root, fitted in zip((attn.q_proj, attn.k_proj), roots, maps, strict=True):
        narrow_heads(layer, torch.linalg.solve_triangular(root, fitted.detach().double(), upper=True), factor)
