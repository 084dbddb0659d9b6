"""Pre-activations of a batch as a loss sees them: all of them, or those few that can matter.

A loss of latents that are zero below a threshold is written once, entry by entry: where few entries
exceed it no [n, d_sae] tensor is made, and where many do, as at the start of training, dense
products are cheaper.
"""

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from sae_runner.kernels import autograd
from sae_runner.saes._latents import Latents

FEW = 1 / 64
"""Share of entries above which dense products are cheaper than gathering rows."""


class PreActs(ABC):
    """Entries z of n rows, with their gradient, and what sums over entries come to."""

    z: Float[Tensor, "..."]
    n: int

    @abstractmethod
    def per_latent(self, vector: Float[Tensor, " d_sae"]) -> Float[Tensor, "..."]:
        """vector[j] of every entry."""

    @abstractmethod
    def weighted_sum(
        self, acts: Float[Tensor, "..."], weights: Float[Tensor, " d_sae"]
    ) -> Float[Tensor, ""]:
        """Σ over entries of act · weight of its latent."""

    @abstractmethod
    def reconstruct(
        self,
        acts: Float[Tensor, "..."],
        W_dec: Float[Tensor, "d_sae d_out"],
        b_dec: Float[Tensor, " d_out"],
        target: Float[Tensor, "n d_out"],
    ) -> autograd.Reconstruction:
        """x̂ = f W_dec + b_dec, and the squared error of each row."""

    @abstractmethod
    def fired(self, acts: Float[Tensor, "..."]) -> Int64[Tensor, " d_sae"]:
        """In how many rows each latent is active."""


class All(PreActs):
    """Every entry: z is [n, d_sae]."""

    def __init__(self, z: Float[Tensor, "n d_sae"]) -> None:
        self.z, self.n = z, len(z)

    def per_latent(self, vector: Float[Tensor, " d_sae"]) -> Float[Tensor, "n d_sae"]:
        """See `PreActs.per_latent`."""
        return vector.expand_as(self.z)

    def weighted_sum(
        self, acts: Float[Tensor, "n d_sae"], weights: Float[Tensor, " d_sae"]
    ) -> Float[Tensor, ""]:
        """See `PreActs.weighted_sum`; rows first: products of all entries would cost a pass."""
        return (acts.sum(0, dtype=weights.dtype) * weights).sum()

    def reconstruct(
        self,
        acts: Float[Tensor, "n d_sae"],
        W_dec: Float[Tensor, "d_sae d_out"],
        b_dec: Float[Tensor, " d_out"],
        target: Float[Tensor, "n d_out"],
    ) -> autograd.Reconstruction:
        """See `PreActs.reconstruct`."""
        return autograd.Reconstruction.of(target, acts @ W_dec + b_dec)

    def fired(self, acts: Float[Tensor, "n d_sae"]) -> Int64[Tensor, " d_sae"]:
        """See `PreActs.fired`."""
        return acts.detach().count_nonzero(dim=0)


class Few(PreActs):
    """Entries of a selection: z is [nnz]."""

    def __init__(self, latents: Latents) -> None:
        self.latents, self.z, self.n = latents, latents.values, len(latents)

    def per_latent(self, vector: Float[Tensor, " d_sae"]) -> Float[Tensor, " nnz"]:
        """See `PreActs.per_latent`."""
        return autograd.per_latent(vector, self.latents.selection)

    def weighted_sum(
        self, acts: Float[Tensor, " nnz"], weights: Float[Tensor, " d_sae"]
    ) -> Float[Tensor, ""]:
        """See `PreActs.weighted_sum`."""
        return (acts * self.per_latent(weights)).sum()

    def reconstruct(
        self,
        acts: Float[Tensor, " nnz"],
        W_dec: Float[Tensor, "d_sae d_out"],
        b_dec: Float[Tensor, " d_out"],
        target: Float[Tensor, "n d_out"],
    ) -> autograd.Reconstruction:
        """See `PreActs.reconstruct`."""
        return autograd.reconstruct(acts, W_dec, b_dec, target, self.latents.selection)

    def fired(self, acts: Float[Tensor, " nnz"]) -> Int64[Tensor, " d_sae"]:
        """See `PreActs.fired`."""
        active = self.latents.indices[acts.detach() != 0]
        return torch.bincount(active, minlength=self.latents.d_sae)
