"""Half-width queries and keys under rotary positions, for the aligned start of Llama (aligned_llama.py), and how it goes over its tokens.

Positions tie every dimension to a frequency, so there is no best product in closed form, as GPT-2 has one: half the frequencies
stay, and what queries and keys have there is fitted to the teacher's attention by a few steps of L-BFGS. Rows are tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kn.align.least_squares import in_parts, root, spread

SEQUENCES = 16  # of the calibration text
QUERIES = 64  # per sequence, whose attention is compared
STEPS = 60  # of L-BFGS, from the best start in closed form
SLOW = 1.0  # radians over a whole sequence: frequencies below hardly turn, and may be mixed


def spaced(ids: Tensor, tokens: int) -> Tensor:
    """Sequences from all over a text (sequences, length, …), as many as hold that number of tokens (at least one)."""
    wanted = max(1, min(len(ids), tokens // ids.shape[1]))
    return ids[torch.arange(wanted, device=ids.device) * len(ids) // wanted]


def cross(x: Tensor, y: Tensor) -> Tensor:
    """Σ xᵀ y over the rows of x (…, n) and y (…, m); products of 2,048 rows in their own precision, their sum in float64."""
    return sum((a.T @ b).double() for a, b in zip(x.flatten(0, -2).split(2048), y.flatten(0, -2).split(2048), strict=True))


def outputs(layer: nn.Linear, maps: Tensor, factor: int) -> None:
    """Give every head (of e outputs) e/f instead, by maps (heads, e, e/f) from the old to the new, each followed by zeros."""
    for parameter in layer.parameters():
        old = parameter.double().view(len(maps), maps.shape[1], -1)
        parameter.copy_(spread((maps.transpose(1, 2) @ old).flatten(0, 1), factor, 0).view_as(parameter))


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
    x_t, x_s = spaced(x_t, SEQUENCES * length), spaced(x_s, SEQUENCES * length)
    every = -(-length // QUERIES)
    asked = (torch.arange(len(x_s))[:, None] % every + torch.arange(0, length, every)).clamp_max(length - 1).to(x_s.device)  # (sequences, n)
    cos, sin = positions[0][0], positions[1][0]  # (length, e)
    later = torch.arange(length, device=x_s.device) > asked[..., None]  # (sequences, n, length)

    def heads(layer: nn.Linear, norm: nn.Module, x: Tensor) -> Tensor:
        return in_parts(lambda part: layer(norm(part)).unflatten(-1, (-1, e)).transpose(1, 2), x)  # (sequences, heads, length, e)

    targets = []
    for i, x in enumerate(x_t.split(1)):
        q, k = heads(teacher.q_proj, dense.input_layernorm, x)[0, :, asked[i]], heads(teacher.k_proj, dense.input_layernorm, x)[0]
        score = scale * turned_by(q, cos[asked[i]], sin[asked[i]]) @ turned_by(k, cos, sin).repeat_interleave(groups, 0).transpose(-1, -2)
        targets.append(score.masked_fill(later[i], -torch.inf).softmax(-1))
    q, k = heads(attn.q_proj, block.input_layernorm, x_s), heads(attn.k_proj, block.input_layernorm, x_s)
    roots_q, roots_k = (torch.stack([root(cross(h, h) / h[..., 0].numel()) for h in x.unbind(1)]) for x in (q, k))
    q, k = (torch.linalg.solve_triangular(r.to(x.dtype), x, upper=True, left=False) for r, x in ((roots_q, q), (roots_k, k)))  # white: L-BFGS then needs few steps
    queries = [x[:, rows] for x, rows in zip(q, asked, strict=True)]
    free = [(r @ m).to(k.dtype).requires_grad_() for r, m in zip((roots_q, roots_k), starts(roots_q, roots_k, positions, factor), strict=True)]
    few_cos, few_sin = cos[:, ::factor], sin[:, ::factor]
    optimizer = torch.optim.LBFGS(free, max_iter=STEPS, max_eval=STEPS * 5 // 4, history_size=20, tolerance_change=0, tolerance_grad=0, line_search_fn="strong_wolfe")

    @torch.enable_grad()
    def divergence() -> Tensor:
        """Up to the teacher's entropy; gradients are added sequence by sequence."""
        optimizer.zero_grad()
        total = free[0].new_zeros(())
        for i, target in enumerate(targets):
            mine = turned_by(queries[i] @ free[0], few_cos[asked[i]], few_sin[asked[i]]).unflatten(0, (-1, groups)).flatten(1, 2)  # (key heads, groups · n, e/f)
            score = (scale * mine @ turned_by(k[i] @ free[1], few_cos, few_sin).transpose(-1, -2)).view_as(target)
            loss = -(target * score.masked_fill(later[i], -1e4).log_softmax(-1)).sum() / target[..., 0].numel() / len(targets)
            loss.backward()
            total = total + loss.detach()
        return total

    optimizer.step(divergence)
    for layer, r, found in zip((attn.q_proj, attn.k_proj), (roots_q, roots_k), free, strict=True):
        outputs(layer, torch.linalg.solve_triangular(r, found.detach().double(), upper=True), factor)
