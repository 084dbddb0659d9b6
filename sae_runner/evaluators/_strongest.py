"""The strongest activations of every latent, kept while rows stream by."""

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor


class Strongest:
    """The k largest values of each of d_sae latents, 4 k d_sae bytes; 0 where there are fewer."""

    def __init__(self, d_sae: int, k: int) -> None:
        self.values: Float[Tensor, "d_sae k"] = torch.zeros(d_sae, k)
        """Descending."""

    def add(self, latent: Int64[Tensor, " nnz"], size: Float[Tensor, " nnz"]) -> None:
        """Take positive values of latents into account, many of one latent at a time if need be."""
        k = self.values.shape[1]
        size = size.float()
        larger = size > self.values[latent, -1]
        latent, size = latent[larger], size[larger]
        order = size.argsort(descending=True)
        order = order[latent[order].argsort(stable=True)]
        latent, size = latent[order], size[order]
        which, slot, counts = torch.unique_consecutive(
            latent, return_inverse=True, return_counts=True
        )
        rank = torch.arange(len(latent)) - (counts.cumsum(0) - counts)[slot]
        first = rank < k
        new = torch.zeros(len(which), k)
        new[slot[first], rank[first]] = size[first]
        self.values[which] = torch.cat([self.values[which], new], 1).topk(k).values

    def mean(self) -> Float64[Tensor, " d_sae"]:
        """Mean of the values there are; 0 for a latent that has none."""
        n = (self.values > 0).sum(1)
        return self.values.double().sum(1) / n.clamp_min(1)
