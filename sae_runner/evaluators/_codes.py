"""The latents of a pass grouped by example, both ways round: what is asked of latents one by one.

Top examples, pooled latents of an example, verified negatives and how latents fire together are all
read from here, so that no row is encoded twice.
"""

from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float32, Int32, Int64
from torch import Tensor


class Firing(NamedTuple):
    """Where one latent is active, row by row, in the order of examples and positions."""

    row: Int64[Tensor, " m"]
    """Number of the row in `Codes`."""
    value: Float32[Tensor, " m"]


class Peaks(NamedTuple):
    """The strongest activation of one latent in each example in which it is active."""

    slot: Int64[Tensor, " m"]
    """Number of the example in `Codes.example_ids`, ascending."""
    value: Float32[Tensor, " m"]
    position: Int64[Tensor, " m"]
    """Of the token where it is strongest; the first of equals."""


class FiringOfMany(NamedTuple):
    """`Firing` of several latents, one latent after another."""

    latent: Int64[Tensor, " m"]
    row: Int64[Tensor, " m"]
    value: Float32[Tensor, " m"]


class PeaksOfMany(NamedTuple):
    """`Peaks` of several latents, one latent after another."""

    latent: Int64[Tensor, " m"]
    slot: Int64[Tensor, " m"]
    value: Float32[Tensor, " m"]
    position: Int64[Tensor, " m"]


class Codes:
    """Sparse latents of whole examples; rows by example id, then by position.

    Args:
        example_id: of each row.
        position: of each row.
        label: of each row, or None.
        offsets: row t owns the entries from offsets[t] to offsets[t + 1].
        indices: the latent of each entry.
        values: its activation.
        d_sae: number of latents.
        n_left_out: examples that did not fit.
    """

    def __init__(
        self,
        example_id: Int64[Tensor, " n"],
        position: Int64[Tensor, " n"],
        label: Int64[Tensor, " n"] | None,
        offsets: Int64[Tensor, " n_plus_1"],
        indices: Int32[Tensor, " nnz"],
        values: Float32[Tensor, " nnz"],
        d_sae: int,
        n_left_out: int = 0,
    ) -> None:
        order = torch.from_numpy(np.lexsort((position.numpy(), example_id.numpy())))
        counts = offsets.diff()[order]
        self.offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        within = torch.arange(int(counts.sum())) - self.offsets[:-1].repeat_interleave(counts)
        source = offsets[:-1][order].repeat_interleave(counts) + within
        self.indices, self.values = indices[source], values[source]
        self.position, self.d_sae, self.n_left_out = position[order], d_sae, n_left_out
        example_id = example_id[order]
        self.example_ids, self.slot = torch.unique_consecutive(example_id, return_inverse=True)
        """Ids of the examples, ascending, and for each row the number of its example."""
        self.label = None if label is None else label[order][self._first_rows]
        """Class of each example."""
        self._recent: tuple[int, Firing] | None = None

    def __len__(self) -> int:
        return len(self.position)

    @property
    def n_examples(self) -> int:
        """How many examples there are."""
        return len(self.example_ids)

    @cached_property
    def _first_rows(self) -> Int64[Tensor, " n_examples"]:
        return torch.searchsorted(self.slot, torch.arange(self.n_examples))

    @cached_property
    def example_offsets(self) -> Int64[Tensor, " n_examples_plus_1"]:
        """Example e owns the rows from example_offsets[e] to example_offsets[e + 1]."""
        return torch.cat([self._first_rows, torch.tensor([len(self)])])

    @cached_property
    def entry_row(self) -> Int32[Tensor, " nnz"]:
        """The row of each entry."""
        rows = torch.arange(len(self), dtype=torch.int32)
        return rows.repeat_interleave(self.offsets.diff())

    @cached_property
    def _by_latent(self) -> tuple[Tensor, Tensor]:
        """Where each latent's entries begin, and all entries in the order of latents, then rows."""
        order = np.argsort(self.indices.numpy(), kind="stable")
        counts = torch.bincount(self.indices.long(), minlength=self.d_sae)
        starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return starts, torch.from_numpy(order)

    @property
    def n_fired(self) -> Int64[Tensor, " d_sae"]:
        """In how many rows each latent is active."""
        return self._by_latent[0].diff()

    @cached_property
    def n_examples_fired(self) -> Int64[Tensor, " d_sae"]:
        """In how many examples each latent is active."""
        starts, order = self._by_latent
        slots = self.slot[self.entry_row[order].long()]
        new = torch.ones(len(slots), dtype=torch.int64)
        new[1:] = (slots[1:] != slots[:-1]).long()
        begins = starts[:-1][starts.diff() > 0]
        new[begins] = 1
        latent = torch.arange(self.d_sae).repeat_interleave(starts.diff())
        return torch.zeros(self.d_sae, dtype=torch.int64).index_add_(0, latent, new)

    def firing(self, latent: int) -> Firing:
        """The rows in which a latent is active; the last one asked for is at hand."""
        if self._recent is None or self._recent[0] != latent:
            self._recent = latent, Firing(*self.firing_between(latent, latent + 1)[1:])
        return self._recent[1]

    def firing_between(self, begin: int, end: int) -> FiringOfMany:
        """The rows in which the latents from `begin` to `end`, not included, are active."""
        starts, order = self._by_latent
        entries = order[int(starts[begin]) : int(starts[end])]
        latent = torch.arange(begin, end).repeat_interleave(starts[begin : end + 1].diff())
        return FiringOfMany(latent, self.entry_row[entries].long(), self.values[entries])

    def peaks(self, latent: int) -> Peaks:
        """The examples in which a latent is active, and its strongest activation in each."""
        return Peaks(*self.peaks_between(latent, latent + 1)[1:])

    def peaks_between(self, begin: int, end: int) -> PeaksOfMany:
        """The peaks of the latents from `begin` to `end`, which is not included."""
        latent, row, value = self.firing_between(begin, end)
        pair = latent * self.n_examples + self.slot[row]
        pairs, group = torch.unique_consecutive(pair, return_inverse=True)
        best = torch.full((len(pairs),), -torch.inf).scatter_reduce_(0, group, value, "amax")
        # Rows are in order of position: the first that holds the maximum is the one.
        place = torch.where(value == best[group], torch.arange(len(row)), len(row))
        first = torch.full((len(pairs),), len(row)).scatter_reduce_(0, group, place, "amin")
        chosen = row[first]
        return PeaksOfMany(latent[first], self.slot[chosen], best, self.position[chosen])

    def activations(self, latent: int, slot: int) -> tuple[Tensor, Tensor]:
        """Positions of an example's rows, and a latent's activation at each (0 where inactive)."""
        begin, end = self.example_offsets[slot : slot + 2].tolist()
        row, value = self.firing(latent)
        low, high = torch.searchsorted(row, torch.tensor([begin, end])).tolist()
        acts = torch.zeros(end - begin)
        acts[row[low:high] - begin] = value[low:high]
        return self.position[begin:end], acts
