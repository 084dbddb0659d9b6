"""Sparse latents in memory, and the one sum that a decoder makes of them."""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor, nn

from sae_runner.kernels.autograd import Selection


@dataclass(frozen=True)
class Latents:
    """Sparse latents of n rows in CSR form: what travels between SAE, evaluators and disk."""

    offsets: Int64[Tensor, " n_plus_1"]
    """Row t owns the entries from offsets[t] to offsets[t + 1]."""
    indices: Int[Tensor, " nnz"]
    """Which latent each entry is of; ascending within a row."""
    values: Float[Tensor, " nnz"]
    d_sae: int

    @classmethod
    def from_dense(cls, acts: Float[Tensor, "n d_sae"]) -> "Latents":
        """The non-zero entries of dense latents."""
        return cls.where(acts != 0, acts)

    @classmethod
    def where(cls, active: Bool[Tensor, "n d_sae"], acts: Float[Tensor, "n d_sae"]) -> "Latents":
        """The entries of `acts` at which `active` is true."""
        rows, indices = active.nonzero(as_tuple=True)
        return cls.from_entries(rows, indices, acts[rows, indices], *active.shape)

    @classmethod
    def from_entries(
        cls,
        rows: Int64[Tensor, " nnz"],
        indices: Int[Tensor, " nnz"],
        values: Float[Tensor, " nnz"],
        n: int,
        d_sae: int,
    ) -> "Latents":
        """Entries of n rows, in the order of rows, and of latents within each."""
        counts = torch.bincount(rows, minlength=n)
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return cls(offsets, indices, values, d_sae)

    @classmethod
    def from_topk(
        cls, values: Float[Tensor, "n k"], indices: Int64[Tensor, "n k"], d_sae: int
    ) -> "Latents":
        """The non-zero ones of k chosen latents of each row."""
        indices, order = indices.sort(dim=1)
        values = values.gather(1, order)
        active = values != 0
        offsets = torch.cat([active.new_zeros(1, dtype=torch.int64), active.sum(1).cumsum(0)])
        return cls(offsets, indices[active], values[active], d_sae)

    @classmethod
    def concatenate(cls, parts: "list[Latents]") -> "Latents":
        """The rows of `parts` one after another; at least one part."""
        counts = torch.cat([part.counts for part in parts])
        return cls(
            torch.cat([counts.new_zeros(1), counts.cumsum(0)]),
            torch.cat([part.indices for part in parts]),
            torch.cat([part.values for part in parts]),
            parts[0].d_sae,
        )

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def counts(self) -> Int64[Tensor, " n"]:
        """How many latents are active in each row: the row's L0."""
        return self.offsets.diff()

    @property
    def rows(self) -> Int64[Tensor, " nnz"]:
        """The row of each entry."""
        return torch.repeat_interleave(
            torch.arange(len(self), device=self.offsets.device), self.counts
        )

    @property
    def fired(self) -> Int64[Tensor, " d_sae"]:
        """In how many rows each latent is active; a device is not waited for."""
        counts = torch.zeros(self.d_sae, dtype=torch.int64, device=self.indices.device)
        return counts.index_add_(0, self.indices, (self.values != 0).long())

    @cached_property
    def selection(self) -> Selection:
        """Which entries they are, for operations on selected latents."""
        return Selection(self.offsets, self.indices, self.d_sae)

    def with_values(self, values: Float[Tensor, " nnz"]) -> "Latents":
        """The same entries with other values."""
        other = replace(self, values=values)
        other.__dict__["selection"] = self.selection  # What is known of it is shared.
        return other

    def dense(self) -> Float[Tensor, "n d_sae"]:
        """The same latents with their zeros. For small d_sae only."""
        acts = self.values.new_zeros(len(self), self.d_sae)
        acts[self.rows, self.indices] = self.values
        return acts


def sum_rows(
    weights: Float[Tensor, "d_sae d_in"],
    indices: Int[Tensor, "..."],
    values: Float[Tensor, "..."],
    offsets: Int64[Tensor, " n_plus_1"] | None = None,
) -> Float[Tensor, "n d_in"]:
    """`f W` from sparse f: `indices` and `values` are [n, k], or flat with CSR `offsets`."""
    return nn.functional.embedding_bag(
        indices.long(),
        weights,
        offsets,
        mode="sum",
        per_sample_weights=values.to(weights.dtype),
        include_last_offset=offsets is not None,
    )
