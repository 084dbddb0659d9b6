"""Jumps with a threshold that is trained: exact values, published pseudo-derivatives.

With the rectangle K(u) = 1 where |u| < 1/2, and 0 elsewhere, a jump at θ of bandwidth ε has

    ∂H(z − θ)/∂θ = −K((z − θ)/ε) / ε,        ∂[z H(z − θ)]/∂θ = −θ K((z − θ)/ε) / ε

(Rajamanoharan et al. 2024, arXiv 2407.14435, eqs. 11 and 12). One over ε comes once: the kernel
itself is not divided by it.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def step(
    z: Float[Tensor, "..."], threshold: Float[Tensor, "..."], bandwidth: float
) -> Float[Tensor, "..."]:
    """H(z − θ), entry by entry: 1 where z > θ. No gradient flows to z."""
    ones: Tensor = _Step.apply(z, threshold, bandwidth)
    return ones


def jump(
    z: Float[Tensor, "..."], threshold: Float[Tensor, "..."], bandwidth: float, *, to_z: bool
) -> Float[Tensor, "..."]:
    """`z H(z − θ)`, entry by entry; with `to_z` z's gradient has the jump's share, θ K / ε, too."""
    acts: Tensor = _Jump.apply(z, threshold, bandwidth, to_z)
    return acts


class _Step(torch.autograd.Function):
    """See `step`."""

    @staticmethod
    def forward(
        ctx: Any, z: Float[Tensor, "..."], threshold: Float[Tensor, "..."], bandwidth: float
    ) -> Float[Tensor, "..."]:
        """Ones and zeros."""
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth = bandwidth
        return (z > threshold).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, None]:
        """Of the thresholds alone."""
        z, threshold = ctx.saved_tensors
        near = within(z, threshold, ctx.bandwidth)
        return None, -(gradients[0] * near) / ctx.bandwidth, None


class _Jump(torch.autograd.Function):
    """See `jump`."""

    @staticmethod
    def forward(
        ctx: Any,
        z: Float[Tensor, "..."],
        threshold: Float[Tensor, "..."],
        bandwidth: float,
        to_z: bool,
    ) -> Float[Tensor, "..."]:
        """Z where it is above its threshold."""
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth, ctx.to_z = bandwidth, to_z
        return torch.where(z > threshold, z, 0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """Of pre-activations and thresholds."""
        (gradient,), (z, threshold) = gradients, ctx.saved_tensors
        through = gradient * (z > threshold)
        jump = gradient * within(z, threshold, ctx.bandwidth) * (threshold / ctx.bandwidth)
        return through + jump if ctx.to_z else through, -jump, None, None


def within(
    z: Float[Tensor, "..."], threshold: Float[Tensor, "..."], bandwidth: float
) -> Bool[Tensor, "..."]:
    """Where K((z − θ) / ε) is 1."""
    return (z - threshold).abs() < bandwidth / 2
