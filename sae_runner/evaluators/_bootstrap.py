"""95% intervals of ratios of sums, by resampling whole examples.

Rows of one example are not independent, so that intervals over rows would be too narrow.
The clusters are examples: images, documents, prompts. A resample draws as many of them as there
are, with replacement, and takes every ratio anew from the sums of what it drew.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Int64
from torch import Tensor

from sae_runner.errors import ConfigError
from sae_runner.evaluators.base import Note
from sae_runner.log import Progress

Sums = Mapping[str, npt.NDArray[np.float64]]
Statistic = Callable[[Sums], npt.NDArray[np.float64]]
"""From totals by column, [n_resamples] each, to the metric of each resample."""

# Below this many resamples the 2.5% and 97.5% points are no more than the extremes.
FEWEST_RESAMPLES = 40


def checked_resamples(n: int, evaluator: str) -> int:
    """`n_bootstrap`: 0 for no intervals, or enough of them for a 95% interval.

    Raises:
        ConfigError: more than none and too few.
    """
    if 0 < n < FEWEST_RESAMPLES:
        key = f"evaluators.{evaluator}.n_bootstrap"
        raise ConfigError(
            f"{key}={n}: a 95% interval needs {FEWEST_RESAMPLES} or more; {key}=0 for none"
        )
    return n


class ClusterSums:
    """Sums of named columns over the rows of each example, whatever order the rows come in."""

    def __init__(self, example_ids: npt.NDArray[np.int64], columns: Sequence[str]) -> None:
        self.ids = torch.as_tensor(example_ids, dtype=torch.int64)
        self.sums = {c: torch.zeros(len(self.ids), dtype=torch.float64) for c in columns}

    def slots(self, example_id: Int64[Tensor, " n"]) -> Int64[Tensor, " n"]:
        """The place of each id among the examples.

        Raises:
            ValueError: an id that was not announced.
        """
        example_id = example_id.cpu()
        found = torch.searchsorted(self.ids, example_id).clamp_max(len(self.ids) - 1)
        if len(example_id) and (not len(self.ids) or (self.ids[found] != example_id).any()):
            raise ValueError("rows come from an example that EvalContext.example_ids lacks")
        return found

    def add(self, example_id: Int64[Tensor, " n"], **columns: Tensor) -> None:
        """Add one value per row to the columns named."""
        slots = self.slots(example_id)
        for name, values in columns.items():
            self.sums[name].index_add_(0, slots, values.to("cpu", torch.float64))

    def seen(self, count_column: str) -> dict[str, npt.NDArray[np.float64]]:
        """The columns of the examples that had any row."""
        present = self.sums[count_column] > 0
        return {name: column[present].numpy() for name, column in self.sums.items()}


def ratio_of(above: str, below: str, factor: float = 1.0) -> Statistic:
    """The statistic factor × above / below, of two columns."""
    return lambda sums: factor * sums[above] / sums[below]


def resampled_totals(sums: Sums, n_resamples: int, seed: int) -> dict[str, npt.NDArray[np.float64]]:
    """Totals of every column in each resample. Memory is O(examples), not times resamples."""
    table = np.stack(list(sums.values()), axis=1)
    n_clusters = len(table)
    generator = np.random.default_rng(seed)
    totals = np.empty((n_resamples, table.shape[1]))
    with Progress("bootstrap", n_resamples, "resamples") as progress:
        for b in range(n_resamples):
            drawn = generator.integers(0, n_clusters, n_clusters)
            totals[b] = np.bincount(drawn, minlength=n_clusters) @ table
            progress.advance(1)
    return {name: totals[:, i] for i, name in enumerate(sums)}


def intervals(
    sums: Sums, statistics: Mapping[str, Statistic], *, n_resamples: int, seed: int
) -> tuple[dict[str, dict[str, float | int]], list[Note]]:
    """Standard error and percentile interval of each statistic, and notes on those that have none.

    Anything estimated from all rows at once (a centring mean) is held fixed over the resamples.
    """
    n_clusters = len(next(iter(sums.values())))
    if not n_resamples or not statistics:
        return {}, []
    if n_clusters < 2:
        detail = f"no interval: {n_clusters} examples with rows"
        return {}, [Note("too_few_examples", name, detail) for name in statistics]
    totals = resampled_totals(sums, n_resamples, seed)
    found: dict[str, dict[str, float | int]] = {}
    notes: list[Note] = []
    for name, statistic in statistics.items():
        with np.errstate(divide="ignore", invalid="ignore"):
            values = statistic(totals)
        if not np.isfinite(values).all():
            n_bad = int((~np.isfinite(values)).sum())
            detail = f"no interval: undefined in {n_bad} of {n_resamples} resamples"
            notes.append(Note("zero_denominator", name, detail))
            continue
        low, high = np.quantile(values, [0.025, 0.975])
        se = float(values.std(ddof=1))
        found[name] = {"se": se, "lo": float(low), "hi": float(high), "n": n_clusters}
    return found, notes
