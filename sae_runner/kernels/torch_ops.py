"""The operations in PyTorch, on any device and in any precision: the fallback, and the definition.

`embedding_bag` is the sum of few rows of a matrix, forwards; read by latents it is the gradient of
that matrix, and its gradient by the weights of the sum is the products of rows.
"""

from collections.abc import Iterator

import torch
from jaxtyping import BFloat16, Float, Float64, Int, Int32, Int64
from torch import Tensor, nn
from torch.optim.adam import adam

from sae_runner.kernels.base import ByLatent, Factor

GRADIENT_BYTES = 2**21
"""What rows of a gradient may take at a time: they stay in a core's cache."""
IN_GROUP = 16
"""Scores that one maximum stands for."""


def topk(scores: Float[Tensor, "n d_sae"], k: int) -> Int32[Tensor, "n k"]:
    """See `Ops.topk`.

    The k largest lie in the k groups with the largest maxima, place i being in group i mod their
    number: two searches among few take half the time of one among all.
    """
    n, d_sae = scores.shape
    each = IN_GROUP if d_sae % IN_GROUP == 0 and d_sae >= 2 * k * IN_GROUP else 1
    if each == 1:
        return scores.topk(k, dim=1, sorted=False).indices.int()
    n_groups = d_sae // each
    groups = scores.view(n, each, n_groups).amax(1).topk(k, dim=1, sorted=False).indices
    firsts = torch.arange(0, d_sae, n_groups, device=scores.device)
    places = (firsts.unsqueeze(1) + groups.unsqueeze(1)).flatten(1)
    best = scores.gather(1, places).topk(k, dim=1, sorted=False).indices
    return places.gather(1, best).int()


def largest_within(
    scores: BFloat16[Tensor, "n d_sae"],
    error: Float[Tensor, " n"] | None,
    x: Float[Tensor, "n d"],
    W: Float[Tensor, "d_sae d"],
    b: Float[Tensor, " d_sae"],
    k: int,
) -> tuple[Float[Tensor, "n k"], Int32[Tensor, "n k"], int]:
    """See `Ops.largest_within`: some more than wanted, and twice as many where that may not do.

    How far scores are off is seen where both are known: another latent may have the least
    candidate's score and four times the largest error of its row.
    """
    n, d_sae = scores.shape
    values, indices = x.new_empty(n, k), torch.empty(n, k, dtype=torch.int32, device=x.device)
    rows, m, looked_at = torch.arange(n, device=x.device), n_candidates(k), 0
    while len(rows):
        part, some = (x, scores) if len(rows) == n else (x[rows], scores[rows])
        m = m if 4 * m < d_sae else d_sae
        looked_at += len(rows) * m
        if m == d_sae:
            exact = torch.addmm(b, part, W.T)
            indices[rows] = found = topk(exact, k)
            values[rows] = exact.gather(1, found.long())
            break
        candidates = topk(some, m)
        exact = _scores_of(part, W, b, candidates)
        values[rows], places = exact.topk(k, dim=1, sorted=False)
        indices[rows] = candidates.gather(1, places)
        seen = some.gather(1, candidates.long()).to(x.dtype)
        off = (seen - exact).abs().amax(1)
        rows = rows[~(values[rows].amin(1) >= seen.amin(1) + 4 * off)]
        m *= 2
    return values, indices, looked_at


def n_candidates(k: int) -> int:
    """How many are looked at as a rule: a screen in bfloat16 changes 1% of a selection."""
    return k + max(16, k // 2)


def above(
    scores: Float[Tensor, "n d_sae"], least: Float[Tensor, " d_sae"], error: Float[Tensor, " n"]
) -> tuple[Int64[Tensor, " n_plus_1"], Int32[Tensor, " nnz"]]:
    """See `Ops.above`."""
    rows, indices = (scores > least - error.unsqueeze(1)).nonzero(as_tuple=True)
    counts = torch.bincount(rows, minlength=len(scores))
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)]), indices.int()


def _scores_of(
    x: Float[Tensor, "n d"],
    W: Float[Tensor, "d_sae d"],
    b: Float[Tensor, " d_sae"],
    latents: Int[Tensor, "n m"],
) -> Float[Tensor, "n m"]:
    n, m = latents.shape
    offsets = torch.arange(0, n * m + 1, m, device=x.device)
    return products(x, W, offsets, latents.flatten()).view(n, m) + b[latents]


def products(
    x: Float[Tensor, "n d"],
    W: Float[Tensor, "d_sae d"],
    offsets: Int64[Tensor, " n_plus_1"],
    indices: Int[Tensor, " nnz"],
) -> Float[Tensor, " nnz"]:
    """See `Ops.products`; what a sum of rows W_j has as its gradient by their weights."""
    if len(indices) == 0:
        return x.new_zeros(0)
    indices, starts = indices.long(), offsets[:-1].long()
    found: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        x, W, indices, starts, rows_of(offsets), 0, -1
    )
    return found


def rows_of(offsets: Int64[Tensor, " n_plus_1"]) -> Int64[Tensor, " nnz"]:
    """The row of every entry."""
    n = torch.arange(len(offsets) - 1, device=offsets.device)
    return torch.repeat_interleave(n, offsets.diff())


def decode(
    W: Float[Tensor, "d_sae d"],
    offsets: Int64[Tensor, " n_plus_1"],
    indices: Int[Tensor, " nnz"],
    values: Float[Tensor, " nnz"],
) -> Float[Tensor, "n d"]:
    """See `Ops.decode`."""
    return nn.functional.embedding_bag(
        indices.long(), W, offsets, mode="sum", per_sample_weights=values, include_last_offset=True
    )


def reconstruct(
    W: Float[Tensor, "d_sae d"],
    offsets: Int64[Tensor, " n_plus_1"],
    indices: Int[Tensor, " nnz"],
    values: Float[Tensor, " nnz"],
    wanted: Float[Tensor, "n d"],
) -> tuple[Float[Tensor, "n d"], Float[Tensor, " nnz"]]:
    """See `Ops.reconstruct`."""
    residual = wanted - decode(W, offsets, indices, values)
    return residual, products(residual, W, offsets, indices)


def by_latent(
    offsets: Int64[Tensor, " n_plus_1"], indices: Int[Tensor, " nnz"], d_sae: int
) -> ByLatent:
    """See `Ops.by_latent`."""
    entries = indices.sort(stable=True).indices
    counts = torch.bincount(indices, minlength=d_sae)
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return ByLatent(starts, rows_of(offsets)[entries].int(), entries.int())


def sums_by_latent(by_latent: ByLatent, values: Float[Tensor, " nnz"]) -> Float[Tensor, " d_sae"]:
    """See `Ops.sums_by_latent`."""
    ordered = values[by_latent.entries.long()].double().cumsum(0)
    sums = torch.cat([ordered.new_zeros(1), ordered])[by_latent.starts]
    return sums.diff().to(values.dtype)


def weighted_sum(W: Float[Tensor, "m d"], weights: Float[Tensor, " m"]) -> Float[Tensor, " d"]:
    """See `Ops.weighted_sum`."""
    return weights @ W


def weight_gradient(factor: Factor, d_sae: int) -> Float[Tensor, "d_sae d"]:
    """See `Ops.weight_gradient`."""
    starts, rows, entries = factor.by_latent
    return decode(factor.dense, starts, rows, factor.coefs[entries.long()])


def gradient_norm2(
    factors: list[Factor], W: Float[Tensor, "d_sae d"] | None
) -> Float64[Tensor, ""]:
    """See `Ops.gradient_norm2`."""
    squares = [part.double().square().sum() for _, part in _gradients(factors, W)]
    return torch.stack(squares).sum()


def adam_(
    W: Float[Tensor, "d_sae d"],
    exp_avg: Float[Tensor, "d_sae d"],
    exp_avg_sq: Float[Tensor, "d_sae d"],
    factors: list[Factor],
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    step: int | Tensor,
    scale: float | Tensor,
    unit: bool,
    shadow: BFloat16[Tensor, "d_sae d"] | None,
) -> None:
    """See `Ops.adam_`: PyTorch's own, on the rows of few latents at a time."""
    for latents, gradient in _gradients(factors, W if unit else None):
        w, m, v = W[latents], exp_avg[latents], exp_avg_sq[latents]
        if isinstance(scale, Tensor) or scale != 1:
            gradient *= scale
        before = torch.tensor(float(step - 1))  # Which it counts up.
        adam(
            [w], [gradient], [m], [v], [], [before], fused=True, amsgrad=False, lr=lr,
            beta1=beta1, beta2=beta2, eps=eps, weight_decay=0.0, maximize=False,
        )  # fmt: skip
        if unit:
            w.div_(w.norm(dim=1, keepdim=True).clamp_min(1e-12))
        if shadow is not None:
            shadow[latents] = w
    torch.autograd.graph.increment_version([W, exp_avg, exp_avg_sq])  # It counts none.


def _gradients(factors: list[Factor], W: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """Rows of the sum of `factors`, few latents at a time; with W, less each one's part along it.

    They are used before they leave the cache, and never exist whole.
    """
    dense = factors[0].dense
    n_latents = len(factors[0].by_latent.starts) - 1
    size = max(1, GRADIENT_BYTES // (dense.shape[1] * dense.itemsize))
    for begin in range(0, n_latents, size):
        latents = slice(begin, min(begin + size, n_latents))
        gradient = _of_some(factors[0], latents)
        for factor in factors[1:]:
            gradient += _of_some(factor, latents)
        if W is not None:
            direction = nn.functional.normalize(W[latents], dim=1)
            gradient -= (gradient * direction).sum(1, keepdim=True) * direction
        yield latents, gradient


def _of_some(factor: Factor, latents: slice) -> Tensor:
    """Rows of the gradient that a factor stands for."""
    starts, rows, entries = factor.by_latent
    own = starts[latents.start : latents.stop + 1]
    places = slice(int(own[0]), int(own[-1]))
    coefs = factor.coefs[entries[places].long()]
    return decode(factor.dense, own - own[0], rows[places], coefs)
