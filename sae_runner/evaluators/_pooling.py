"""One vector for each example, from the rows of its tokens: raw activations and latents.

Latents are pooled after each token is encoded, and stay sparse: as [n, d_sae] they are never dense.
A latent that is inactive in a row counts as 0 there. Pre-activations are dense, in float32.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from scipy import sparse
from torch import Tensor

from sae_runner.errors import DataError
from sae_runner.evaluators.base import Rows
from sae_runner.saes.base import SAE

Pool = Literal["mean", "max", "last", "cls"]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Pooled:
    """Examples by ascending id."""

    ids: Ints
    label: Ints | None
    """Class of each, -1 where it has none; None where there are no classes."""
    raw: npt.NDArray[np.float64]
    """[n, d]"""
    latents: Any
    """[n, d_sae]: a SciPy array in CSR form, float64; of pre-activations dense, float32."""

    def __len__(self) -> int:
        return len(self.ids)


class _Part(NamedTuple):
    """Sums, maxima or single rows of examples, of which an id may occur more than once."""

    ids: Ints
    n_rows: Ints
    last: Ints
    """The greatest position."""
    raw: Tensor
    label: Ints
    slot: Ints
    """Which of the ids each entry belongs to."""
    latent: Ints
    value: npt.NDArray[np.float64]
    n_active: Ints
    """Of how many rows the entry is."""

    def only(self, kept: npt.NDArray[np.bool_]) -> "_Part":
        """Some of the ids."""
        place = kept.cumsum() - 1
        of_kept = kept[self.slot]
        return _Part(
            self.ids[kept], self.n_rows[kept], self.last[kept], self.raw[torch.from_numpy(kept)],
            self.label[kept], place[self.slot[of_kept]], self.latent[of_kept],
            self.value[of_kept], self.n_active[of_kept],
        )  # fmt: skip


class PooledPreActs:
    """Pre-activations of examples, pooled as their rows come; a few rows are dense at a time."""

    def __init__(self, sae: SAE, how: Pool, n_examples: int) -> None:
        self.sae, self.how = sae, how
        self.values = torch.empty(n_examples, sae.d_sae)
        """Written from the top: what no example has needs no memory."""
        self.slots: dict[int, int] = {}
        """Rows of `values` by example."""
        self.n_rows = torch.zeros(n_examples)
        self.last = torch.full((n_examples,), -2)  # An average of tokens is at position -1.

    @torch.no_grad()
    def add(self, rows: Rows) -> None:
        """Take rows into account, of which an example may have more later."""
        ids, position, begin = rows.example_id.cpu(), rows.position.cpu(), 0
        for part in self.sae.chunks(rows.source):
            own = slice(begin, begin + len(part))
            begin += len(part)
            z = self.sae.pre_activations(self.sae.scaled(part)).float().cpu()
            self._pool(ids[own], position[own], z)

    def _pool(self, ids: Tensor, position: Tensor, z: Tensor) -> None:
        if self.how == "cls":
            chosen = (position == 0).nonzero().squeeze(1)
            ids, position, z = ids[chosen], position[chosen], z[chosen]
        slot = self._slots(ids)
        match self.how:
            case "mean":
                self.values.index_add_(0, slot, z)
                self.n_rows.index_add_(0, slot, torch.ones(len(slot)))
            case "max":
                self.values.scatter_reduce_(0, slot.unsqueeze(1).expand_as(z), z, "amax")
            case _:
                order = torch.from_numpy(np.lexsort((position.numpy(), slot.numpy())))
                ends = torch.ones(len(order), dtype=torch.bool)
                ends[:-1] = slot[order].diff() != 0
                order = order[ends]
                order = order[position[order] > self.last[slot[order]]]
                self.values[slot[order]], self.last[slot[order]] = z[order], position[order]

    def _slots(self, ids: Tensor) -> Tensor:
        """Rows of `values` for examples, of which some may be new."""
        n, start = len(self.slots), -torch.inf if self.how == "max" else 0.0
        found = [self.slots.setdefault(i, len(self.slots)) for i in ids.tolist()]
        self.values[n : len(self.slots)] = start
        return torch.tensor(found, dtype=torch.int64)

    def finish(self, ids: Ints) -> npt.NDArray[np.float32]:
        """[n, d_sae] of the examples `ids`, in that order."""
        if self.how == "mean":
            self.values[: len(self.slots)] /= self.n_rows[: len(self.slots), None]
        order = torch.tensor([self.slots[i] for i in ids.tolist()])
        found: npt.NDArray[np.float32] = self.values[order].numpy()
        return found


def pooled(batches: Iterable[Rows], how: Pool, pre: PooledPreActs | None = None) -> Pooled:
    """Pool the rows of whole examples.

    Args:
        batches: rows, in any order.
        how: `mean` or `max` over the rows of an example, its `last` row, or that of position 0.
        pre: pools pre-activations, which then stand for the latents.

    Raises:
        DataError: no row is left.
    """
    parts, d_sae, has_labels = [], 0, False
    for rows in batches:
        d_sae, has_labels = rows.latents.d_sae, rows.label is not None
        parts.append(_combined(_of_rows(rows, how), how, d_sae))
        if pre is not None:
            pre.add(rows)
    joined = _combined(_joined(parts), how, d_sae) if parts else None
    if joined is None or not len(joined.ids):
        of = "position 0 (site.tokens leaves it out)" if how == "cls" else "any example"
        raise DataError(f"no row of {of} to pool")
    value, raw = joined.value, joined.raw.numpy()
    if how == "mean":
        value, raw = value / joined.n_rows[joined.slot], raw / joined.n_rows[:, None]
    if how == "max":
        somewhere_inactive = joined.n_active < joined.n_rows[joined.slot]
        value = np.where(somewhere_inactive, value.clip(0), value)
    n, latents = len(joined.ids), None
    if pre is not None:
        latents = pre.finish(joined.ids)
    else:
        latents = sparse.csr_array((value, (joined.slot, joined.latent)), shape=(n, d_sae))
        latents.eliminate_zeros()
    return Pooled(joined.ids, joined.label if has_labels else None, raw, latents)


def _of_rows(rows: Rows, how: Pool) -> _Part:
    ids, position = rows.example_id.cpu().numpy(), rows.position.cpu().numpy()
    label = np.full(len(ids), -1) if rows.label is None else rows.label.cpu().numpy()
    latents = rows.latents
    latent = latents.indices.cpu().long().numpy()
    value = latents.values.detach().cpu().double().numpy()
    part = _Part(
        ids, np.ones_like(ids), position, rows.x.detach().cpu().double(), label,
        latents.rows.cpu().numpy(), latent, value, np.ones_like(latent),
    )  # fmt: skip
    return part.only(position == 0) if how == "cls" else part


def _joined(parts: list[_Part]) -> _Part:
    starts = np.cumsum([0, *(len(part.ids) for part in parts)])
    slot = [part.slot + start for part, start in zip(parts, starts, strict=False)]
    return _Part(
        np.concatenate([part.ids for part in parts]),
        np.concatenate([part.n_rows for part in parts]),
        np.concatenate([part.last for part in parts]),
        torch.cat([part.raw for part in parts]),
        np.concatenate([part.label for part in parts]),
        np.concatenate(slot),
        np.concatenate([part.latent for part in parts]),
        np.concatenate([part.value for part in parts]),
        np.concatenate([part.n_active for part in parts]),
    )


def _combined(part: _Part, how: Pool, d_sae: int) -> _Part:
    """The same with every id once."""
    if how == "last":
        order = np.lexsort((part.last, part.ids))
        is_last = np.append(part.ids[order][1:] != part.ids[order][:-1], True)[: len(order)]
        kept = np.zeros(len(order), dtype=bool)
        kept[order[is_last]] = True
        part = part.only(kept)
    ids, first, place = np.unique(part.ids, return_index=True, return_inverse=True)
    where = torch.from_numpy(place)
    raw = torch.zeros(len(ids), part.raw.shape[1], dtype=torch.float64)
    if how == "max":
        spread = where.unsqueeze(1).expand_as(part.raw)
        raw.scatter_reduce_(0, spread, part.raw, "amax", include_self=False)
    else:
        raw.index_add_(0, where, part.raw)
    n_rows = np.bincount(place, part.n_rows, len(ids)).astype(np.int64)
    keys, group = np.unique(place[part.slot] * d_sae + part.latent, return_inverse=True)
    if how == "max":
        value = np.full(len(keys), -np.inf)
        np.maximum.at(value, group, part.value)
    else:
        value = np.bincount(group, part.value, len(keys))
    n_active = np.bincount(group, part.n_active, len(keys)).astype(np.int64)
    last = np.zeros(len(ids), dtype=np.int64)
    np.maximum.at(last, place, part.last)
    return _Part(
        ids, n_rows, last, raw, part.label[first], keys // d_sae, keys % d_sae, value, n_active
    )
