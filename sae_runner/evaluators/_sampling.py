"""What autointerp shows of a latent: examples to explain it by, and others to score it on.

    E1: the `n_top` strongest, and `n_weighted` drawn in proportion to their activation
    E2: `n_decile` of the strongest tenth without E1 (or of the strongest left, where that is too
        small), `n_quantile` over the quantiles of the rest, and `n_silent` in which it is nowhere
        active, looked up for each

No example is in both. A latent that has fewer active examples than these take divides them by
halves: E1 is never more than half of them.

Where a latent was explained elsewhere, E1 is what it was explained from there (nothing, of other
data), and E2 is drawn from the rest as ever: of the same data it is the same.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sae_runner.evaluators._activating import (
    PLACES,
    silent,
    spread,
    strongest_first,
    take,
    uniform,
    weighted,
)
from sae_runner.evaluators._codes import Codes, Peaks


class Amounts(NamedTuple):
    """How many examples of each kind are shown."""

    n_top: int
    n_weighted: int
    n_decile: int
    n_quantile: int
    n_silent: int


class Sample(NamedTuple):
    """Examples of a latent by their numbers in the codes."""

    explain: Peaks
    active: Peaks
    silent: list[int]
    silent_positions: list[int]
    """A row of each silent example, drawn evenly."""


def sample(
    codes: Codes,
    latent: int,
    amounts: Amounts,
    seed: int,
    explained: Sequence[int] | None = None,
) -> Sample:
    """Draw the examples of one latent.

    Args:
        codes: of the examples.
        latent: whose they are.
        amounts: how many of each kind.
        seed: of the draw.
        explained: ids of the examples that it was explained from elsewhere; None to draw them.
    """
    peaks = strongest_first(codes.peaks(latent))
    n = len(peaks.slot)
    if explained is None:
        shown = _to_explain(codes, latent, peaks, amounts, seed)
    else:
        ids = codes.example_ids[peaks.slot].numpy()
        shown = np.flatnonzero(np.isin(ids, np.asarray(explained, dtype=np.int64)))
    explain, rest = take(peaks, shown), np.setdiff1d(np.arange(n), shown)
    tenth = rest[rest < -(-n // 10)]
    pool = tenth if len(tenth) >= amounts.n_decile else rest[: amounts.n_decile]
    order = np.argsort(_uniform(codes, latent, take(peaks, pool), seed), kind="stable")
    decile = np.sort(pool[order[: amounts.n_decile]])
    rest = np.setdiff1d(rest, decile)
    others = rest[spread(codes, latent, take(peaks, rest), amounts.n_quantile, seed)]
    active = take(peaks, np.concatenate([decile, others]))
    slots = silent(codes, latent, latent + 1, amounts.n_silent, seed)[0]
    found = slots[slots >= 0].tolist()
    return Sample(explain, active, found, [_place(codes, latent, slot, seed) for slot in found])


def _to_explain(
    codes: Codes, latent: int, peaks: Peaks, amounts: Amounts, seed: int
) -> npt.NDArray[np.int64]:
    """E1 by places in `peaks`, which come strongest first."""
    n, wanted = len(peaks.slot), amounts.n_top + amounts.n_weighted
    n_explain = min(wanted, n // 2)
    n_top = -(-n_explain * amounts.n_top // max(wanted, 1))
    rest = np.arange(n_top, n)
    drawn = rest[weighted(codes, latent, take(peaks, rest), n_explain - n_top, seed)]
    return np.concatenate([np.arange(n_top), drawn])


def _uniform(codes: Codes, latent: int, peaks: Peaks, seed: int) -> np.ndarray:
    return uniform(latent, codes.example_ids[peaks.slot].numpy(), seed, PLACES)


def _place(codes: Codes, latent: int, slot: int, seed: int) -> int:
    """The position of a row of an example."""
    begin, end = codes.example_offsets[slot : slot + 2].tolist()
    u = uniform(latent, codes.example_ids[slot : slot + 1].numpy(), seed, PLACES)[0]
    return int(codes.position[begin + min(int(u * (end - begin)), end - begin - 1)])
