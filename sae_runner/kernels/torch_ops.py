"""The operations in PyTorch, on any device and in any precision: the fallback, and the definition.

`embedding_bag` is the sum of few rows of a matrix, forwards; read by latents it is the gradient of
that matrix, and its gradient by the weights of the sum is the products of rows.
"""

import torch
from jaxtyping import BFloat16, Float, Float64, Int, Int32, Int64
from torch import Tensor, nn

from sae_runner.kernels.base import ByLatent, Factor


def topk(scores: Float[Tensor, "n d_sae"], k: int) -> Int32[Tensor, "n k"]:
    """See `Ops.topk`."""
    return scores.topk(k, dim=1, sorted=False).indices.int()


def rescore(
    x: Float[Tensor, "n d"],
    W: Float[Tensor, "d_sae d"],
    b: Float[Tensor, " d_sae"],
    candidates: Int[Tensor, "n m"],
    k: int,
) -> tuple[Float[Tensor, "n k"], Int32[Tensor, "n k"]]:
    """See `Ops.rescore`."""
    n, m = candidates.shape
    offsets = torch.arange(0, n * m + 1, m, device=x.device)
    scores = products(x, W, offsets, candidates.flatten()).view(n, m) + b[candidates]
    values, places = scores.topk(k, dim=1, sorted=False)
    return values, candidates.gather(1, places).int()


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
    gradient = _summed(factors, W)
    return gradient.double().square().sum()


def adam_(
    W: Float[Tensor, "d_sae d"],
    exp_avg: Float[Tensor, "d_sae d"],
    exp_avg_sq: Float[Tensor, "d_sae d"],
    factors: list[Factor],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    scale: float | Tensor,
    unit: bool,
    shadow: BFloat16[Tensor, "d_sae d"] | None,
) -> None:
    """See `Ops.adam_`; Kingma and Ba 2015, algorithm 1, in the order of `torch.optim.Adam`."""
    gradient = scale * _summed(factors, W if unit else None)
    exp_avg.lerp_(gradient, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    root = exp_avg_sq.sqrt().div_((1 - beta2**step) ** 0.5).add_(eps)
    W.addcdiv_(exp_avg, root, value=-lr / (1 - beta1**step))
    if unit:
        W.div_(W.norm(dim=1, keepdim=True).clamp_min(1e-12))
    if shadow is not None:
        shadow.copy_(W)


def _summed(factors: list[Factor], W: Tensor | None) -> Tensor:
    n_latents = len(factors[0].by_latent.starts) - 1
    gradient = weight_gradient(factors[0], n_latents)
    for factor in factors[1:]:
        gradient += weight_gradient(factor, n_latents)
    if W is None:
        return gradient
    direction = nn.functional.normalize(W, dim=1)
    along = (gradient * direction).sum(1, keepdim=True)
    return gradient - along * direction
