"""Least squares and low-rank products weighted by the second moments of real activations.

Row vectors: a sample is a row x (…, n). Streams (sequences, length, d) are visited a few sequences at a time:
at most BATCH_TOKENS samples are in memory. Sums over all of them and their solutions are float64."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

RIDGE = 1e-3  # added to a Gram matrix's diagonal, relative to its mean
METRIC_RIDGE = 0.1  # added to the diagonal of a metric whose mean is 1
BATCH_TOKENS = 4096
ELIMINATION_STEPS = 32


def batches(*streams: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Split streams (sequences, length, …) alike into batches of at most BATCH_TOKENS tokens."""
    return zip(*(stream.split(max(1, BATCH_TOKENS // stream.shape[1])) for stream in streams), strict=True)


@torch.no_grad()
def map_batches(function: Callable[..., Tensor], *streams: Tensor) -> Tensor:
    """function(*streams), batch by batch."""
    return torch.cat([function(*batch) for batch in batches(*streams)])


def cross_moment(x: Tensor, y: Tensor, rows: int = 2048) -> Tensor:
    """Σ xᵀ y (n, m) over the rows of x (…, n), y (…, m): products of some rows at a time, summed in float64.
    Products are float32 at least: in half precision, a Gram matrix may not be positive definite any more."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    chunks = zip(x.flatten(0, -2).split(rows), y.flatten(0, -2).split(rows), strict=True)
    return sum(((a.to(dtype).T @ b.to(dtype)).double() for a, b in chunks), start=x.new_zeros(()))


@torch.no_grad()
def streamed_cross_moment(samples: Callable[..., tuple[Tensor, Tensor]], *streams: Tensor) -> Tensor:
    """cross_moment of all samples (x, y) that `samples` makes of batches of the streams."""
    # 1,024 rows are few enough that float32 rounds far below the ridge
    moments = (cross_moment(*samples(*batch), rows=1024) for batch in batches(*streams))
    return sum(moments, start=streams[0].new_zeros(()))


def append_ones(x: Tensor) -> Tensor:
    """x (…, n) with a column of ones after it, for a bias."""
    return torch.cat([x, torch.ones_like(x[..., :1])], -1)


def gram_matrix(features: Callable[[Tensor], Tensor], stream: Tensor) -> Tensor:
    """Σ xᵀ x (n + 1, n + 1), float64, of x = features(stream) with a column of ones."""
    return streamed_cross_moment(lambda batch: (append_ones(features(batch)),) * 2, stream)


def add_ridge(gram: Tensor, ridge: float = RIDGE) -> Tensor:
    """gram (n, n) + ridge times the mean of its diagonal."""
    return gram + ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)


def ridge_regression(G: Tensor, C: Tensor, ridge: float = RIDGE, prior: Tensor | None = None) -> Tensor:
    """The (n, m) map from x to y, (G + ridge)⁻¹ C, from G = Σ xᵀ x (n, n) and C = Σ xᵀ y (n, m).
    Drawn towards a prior (n, m) instead of 0 if given: prior + (G + ridge)⁻¹ (C − G prior)."""
    if prior is None:
        return torch.linalg.solve(add_ridge(G, ridge), C)
    return prior + torch.linalg.solve(add_ridge(G, ridge), C - G @ prior)


def fit_linear_map(samples: Callable[..., tuple[Tensor, Tensor]], *streams: Tensor) -> Tensor:
    """ridge_regression (n, m), float64, of all (x, y) that `samples` makes of batches of the streams."""
    def x_and_both(*batch: Tensor) -> tuple[Tensor, Tensor]:
        x, y = samples(*batch)
        return x, torch.cat([x, y], -1)

    moments = streamed_cross_moment(x_and_both, *streams)  # (n, n + m)
    return ridge_regression(*moments.tensor_split([len(moments)], 1))


def gram_root(gram: Tensor) -> Tensor:
    """Upper triangular R with Rᵀ R = gram + ridge."""
    return torch.linalg.cholesky(add_ridge(gram)).T


def weighted_low_rank(
    left: Tensor, right: Tensor, rank: int, gram_left: Tensor, gram_right: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Best (n, rank), (rank, m) for left @ right (n, e)(e, m), errors weighted by each side's Gram matrix."""
    R, S = gram_root(gram_left), None if gram_right is None else gram_root(gram_right)
    product = R @ left @ (right if S is None else right @ S.T)
    U, s, Vh = torch.linalg.svd(product, full_matrices=False)
    scale = s[:rank].sqrt()
    new_left = torch.linalg.solve_triangular(R, U[:, :rank] * scale, upper=True)
    new_right = scale[:, None] * Vh[:rank]
    return new_left, new_right if S is None else torch.linalg.solve_triangular(S, new_right.T, upper=True).T


def best_subspace(covariance: Tensor, metric: Tensor, rank: int, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Best subspace for rows of this covariance (d, d): its span (d, rank) and the projection (d, d) onto it.
    An error δ costs δ (metric + METRIC_RIDGE) δᵀ, metric (d, d) of mean diagonal 1; the subspace lies in the
    span of basis (d, n). All float64."""
    ridge = METRIC_RIDGE * torch.eye(basis.shape[1], dtype=basis.dtype, device=basis.device)
    R = torch.linalg.cholesky(basis.T @ metric @ basis + ridge).T
    U = torch.linalg.eigh(R @ basis.T @ covariance @ basis @ R.T).eigenvectors.flip(1)[:, :rank]
    span = basis @ torch.linalg.solve_triangular(R, U, upper=True)
    return span, basis @ R.T @ U @ span.T


def backward_elimination(gram: Tensor, weight: Tensor, keep: int) -> Tensor:
    """Indices (keep) of the inputs from which a refitted map gives input @ weight (n, m) best.
    gram (n + 1, n + 1) has ones last. Dropping input j and refitting the others costs |w_j|² / (C⁻¹)_jj, C
    the inputs' covariance; the surplus goes in ELIMINATION_STEPS equal shares."""
    mean = gram[:-1, -1] / gram[-1, -1]
    covariance = gram[:-1, :-1] / gram[-1, -1] - torch.outer(mean, mean)
    inverse, weight = torch.linalg.inv(add_ridge(covariance)), weight.double().clone()
    kept = torch.arange(len(weight), device=weight.device)
    for size in torch.linspace(len(weight), keep, ELIMINATION_STEPS + 1).round().int().tolist()[1:]:
        order = (weight.square().sum(1) / inverse.diagonal()).argsort()
        drop, stay = order[: len(kept) - size], order[len(kept) - size :].sort().values
        right = torch.cat([inverse[drop][:, stay], weight[drop]], 1)
        step = torch.linalg.solve(inverse[drop][:, drop], right)
        weight = weight[stay] - inverse[stay][:, drop] @ step[:, size:]
        inverse, kept = inverse[stay][:, stay] - inverse[stay][:, drop] @ step[:, :size], kept[stay]
    return kept


def interleave_zeros(weight: Tensor, factor: int, dim: int) -> Tensor:
    """Each column (dim 1) or row (dim 0) followed by factor − 1 of zeros: weight ⊗ (1, 0, …)."""
    return torch.stack([weight, *[torch.zeros_like(weight)] * (factor - 1)], dim + 1).flatten(dim, dim + 1)
