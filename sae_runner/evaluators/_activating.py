"""Which examples stand for a latent: the strongest, some of every strength, and silent ones.

An example counts once, by its strongest token; only activations above 0 count. What is drawn is
decided by hashes of seed, latent and example id, so that no batch, order or other latent matters:

- `top`: the k strongest; of equals the lower example id;
- `strata`: some of each of `n_intervals` equal intervals of (0, max], the latent's own maximum;
- `weighted`: without replacement, each next with probability in proportion to its activation;
- `spread`: one of each of n quantiles of the activations;
- `silent`: examples in which the latent is active nowhere, which is looked up for each.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from sae_runner.evaluators._codes import Codes, Peaks, PeaksOfMany
from sae_runner.evaluators._collecting import hashed

Numbers = npt.NDArray[np.int64]
ENTRIES_AT_ONCE = 2**22
"""Entries of latents that are looked at together: some 200 MB."""
# What is drawn for one purpose says nothing of what is drawn for another.
LATENTS, STRATA, WEIGHTED, SPREAD, SILENT, PLACES = range(6)


class Chosen(NamedTuple):
    """Examples of several latents; the slots that are left over hold -1, 0 and -1."""

    slot: Int64[Tensor, "n_latents *places"]
    """Number of the example in `Codes.example_ids`."""
    value: Float32[Tensor, "n_latents *places"]
    position: Int64[Tensor, "n_latents *places"]

    @classmethod
    def empty(cls, *shape: int) -> "Chosen":
        """Nothing chosen yet."""
        none = torch.full(shape, -1, dtype=torch.int64)
        return cls(none, torch.zeros(shape), none.clone())


def uniform(
    latent: int | Numbers, ids: Numbers, seed: int, purpose: int
) -> npt.NDArray[np.float64]:
    """Numbers in (0, 1) that look random, one of each latent and id."""
    key = hashed(np.atleast_1d(np.asarray(latent, dtype=np.int64)), seed).astype(np.int64)
    return (hashed(ids ^ key, seed + 1000 * (purpose + 1)).astype(np.float64) + 0.5) / 2**63


def sampled_latents(codes: Codes, n: int, seed: int, *, fewest: int = 1) -> Numbers:
    """Up to n of the latents that are active in `fewest` examples or more, ascending."""
    alive = (codes.n_examples_fired >= max(fewest, 1)).nonzero().flatten().numpy()
    drawn = uniform(0, alive, seed, LATENTS)
    return np.sort(alive[np.argsort(drawn, kind="stable")[:n]])


def chunks(codes: Codes) -> Iterator[tuple[int, int]]:
    """Ranges of latents that are small enough to be looked at together; in order, all of them."""
    ends = codes.n_fired.cumsum(0).numpy()
    begin = 0
    while begin < codes.d_sae:
        before = int(ends[begin - 1]) if begin else 0
        last = int(np.searchsorted(ends, before + ENTRIES_AT_ONCE, side="right"))
        end = min(max(last, begin + 1), begin + 8192, codes.d_sae)
        yield begin, end
        begin = end


def place_in_run(group: Numbers) -> Numbers:
    """0, 1, 2, … within each run of equal numbers."""
    new = np.ones(len(group), dtype=bool)
    new[1:] = group[1:] != group[:-1]
    starts = np.flatnonzero(new)
    return np.arange(len(group)) - np.repeat(starts, np.diff([*starts, len(group)]))


def _above_zero(codes: Codes, begin: int, end: int) -> PeaksOfMany:
    peaks = codes.peaks_between(begin, end)
    keep = peaks.value > 0
    return peaks if bool(keep.all()) else PeaksOfMany(*(part[keep] for part in peaks))


def _fill(chosen: Chosen, peaks: PeaksOfMany, order: Numbers, *index: Numbers) -> Chosen:
    for target, source in zip(chosen, peaks[1:], strict=True):
        target[tuple(map(torch.from_numpy, index))] = source[torch.from_numpy(order)]
    return chosen


def top(codes: Codes, begin: int, end: int, k: int) -> Chosen:
    """[n, k]: the k strongest examples of each latent from `begin` to `end`, strongest first."""
    peaks = _above_zero(codes, begin, end)
    latent, slot, value = (part.numpy() for part in peaks[:3])
    order = np.lexsort((slot, -value, latent))
    place = place_in_run(latent[order])
    order, place = order[place < k], place[place < k]
    return _fill(Chosen.empty(end - begin, k), peaks, order, latent[order] - begin, place)


def strata(
    codes: Codes, begin: int, end: int, *, n_intervals: int, per_interval: int, seed: int
) -> Chosen:
    """[n, n_intervals, per_interval]: examples drawn evenly from each interval of activation.

    Interval b of a latent is from b/n to (b+1)/n of its maximum, the last with its upper end.
    """
    peaks = _above_zero(codes, begin, end)
    latent, slot, value = (part.numpy() for part in peaks[:3])
    most = np.zeros(end - begin)
    np.maximum.at(most, latent - begin, value)
    interval = (
        (value / most[latent - begin] * n_intervals).astype(np.int64).clip(0, n_intervals - 1)
    )
    drawn = uniform(latent, codes.example_ids.numpy()[slot], seed, STRATA)
    order = np.lexsort((drawn, interval, latent))
    place = place_in_run((latent * n_intervals + interval)[order])
    order, place = order[place < per_interval], place[place < per_interval]
    chosen = Chosen.empty(end - begin, n_intervals, per_interval)
    return _fill(chosen, peaks, order, latent[order] - begin, interval[order], place)


def silent(codes: Codes, begin: int, end: int, n: int, seed: int) -> Int64[Tensor, "n_latents n"]:
    """Numbers of n examples in which each latent is never active; -1 where there are no more."""
    found = torch.full((end - begin, n), -1, dtype=torch.int64)
    n_examples = codes.n_examples
    if not n_examples:
        return found
    peaks = codes.peaks_between(begin, end)
    active = (peaks.latent * n_examples + peaks.slot).numpy()
    latents = np.arange(begin, end)
    tries = np.arange(4 * n + 8)
    drawn = uniform(latents[:, None], tries[None, :], seed, SILENT)
    slots = (drawn * n_examples).astype(np.int64).clip(0, n_examples - 1)
    keys = latents[:, None] * n_examples + slots
    at = np.searchsorted(active, keys).clip(0, max(len(active) - 1, 0))
    bad = (active[at] == keys) if len(active) else np.zeros(keys.shape, dtype=bool)
    order = np.argsort(slots, axis=1, kind="stable")
    again = np.zeros_like(bad)
    ordered = np.take_along_axis(slots, order, axis=1)
    np.put_along_axis(again, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], axis=1)
    bad |= again
    place = np.cumsum(~bad, axis=1) - 1
    row, column = np.nonzero(~bad & (place < n))
    found[torch.from_numpy(row), torch.from_numpy(place[row, column])] = torch.from_numpy(
        slots[row, column]
    )
    # A latent that is active nearly everywhere: its silent examples are listed.
    for i in (found[:, -1] < 0).nonzero().flatten().tolist() if n else []:
        mine = peaks.slot[peaks.latent == begin + i].numpy()
        rest = np.setdiff1d(np.arange(n_examples), mine)
        drawn = uniform(begin + i, rest, seed, SILENT)
        rest = rest[np.argsort(drawn, kind="stable")[:n]]
        found[i] = -1
        found[i, : len(rest)] = torch.from_numpy(rest)
    return found


def take(peaks: Peaks, which: Numbers) -> Peaks:
    """Some of a latent's peaks, in the order given."""
    index = torch.from_numpy(np.asarray(which, dtype=np.int64))
    return Peaks(*(part[index] for part in peaks))


def strongest_first(peaks: Peaks) -> Peaks:
    """A latent's peaks above 0 by activation; of equals the lower example id comes first."""
    order = np.lexsort((peaks.slot.numpy(), -peaks.value.numpy()))
    return take(peaks, order[peaks.value.numpy()[order] > 0])


def weighted(codes: Codes, latent: int, peaks: Peaks, n: int, seed: int) -> Numbers:
    """Which n of the peaks to take, drawn one after another in proportion to their activation.

    The n greatest of u^(1/activation), u uniform: Efraimidis and Spirakis (2006).
    """
    u = uniform(latent, codes.example_ids[peaks.slot].numpy(), seed, WEIGHTED)
    waiting = -np.log(u) / peaks.value.double().numpy()
    return np.argsort(waiting, kind="stable")[:n]


def spread(codes: Codes, latent: int, peaks: Peaks, n: int, seed: int) -> Numbers:
    """Which of the peaks to take: one drawn from each of n parts of equal size by activation.

    Where there are no more than n, all. `peaks` come ordered by activation.
    """
    if len(peaks.slot) <= n:
        return np.arange(len(peaks.slot))
    u = uniform(latent, codes.example_ids[peaks.slot].numpy(), seed, SPREAD)
    parts = np.array_split(np.arange(len(peaks.slot)), n)
    return np.array([part[np.argmin(u[part])] for part in parts])
