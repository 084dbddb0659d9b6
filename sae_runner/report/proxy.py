"""Which metric predicts which: rank correlations of metrics over runs.

    ρ(x, y) = Pearson correlation of the average ranks of x and y over the runs that have both
                                                                            (Spearman)

Null below `min_runs` runs, or where a metric is constant. The 95% interval is a percentile
bootstrap over runs, ranks taken anew in each resample; a resample in which a metric is constant
counts as -1 at the lower end and as 1 at the upper one. Runs are what was trained, no sample of all
that could be: an interval says how much hangs on single runs, not what other models would give.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from sae_runner.errors import ConfigError, did_you_mean
from sae_runner.ranks import Ranks, average_ranks
from sae_runner.report.comparison import Comparison
from sae_runner.report.options import ProxyOptions
from sae_runner.report.runs import Run
from sae_runner.report.table import show_value

ALL = "all runs"


class Correlation(NamedTuple):
    """ρ of two metrics over the runs of a group."""

    group: str
    x: str
    y: str
    rho: float | None
    lo: float | None
    hi: float | None
    n: int
    """Runs that have both metrics."""
    note: str
    """Why ρ, or its interval, is null."""

    @property
    def is_firm(self) -> bool:
        """Whether the interval is on one side of 0."""
        return self.lo is not None and self.hi is not None and (self.lo > 0 or self.hi < 0)


def spearman(x: npt.NDArray[Any], y: npt.NDArray[Any]) -> Ranks:
    """ρ along the last axis; NaN where x or y is constant."""
    centred = [average_ranks(v) - (v.shape[-1] + 1) / 2 for v in (x, y)]
    products, square_x, square_y = (
        (a * b).sum(-1) for a, b in (centred, (centred[0], centred[0]), (centred[1], centred[1]))
    )
    with np.errstate(invalid="ignore"):
        return np.asarray(products / np.sqrt(square_x * square_y))


def proxy_correlations(
    comparison: Comparison, xs: Sequence[str], ys: Sequence[str], options: ProxyOptions
) -> list[Correlation]:
    """ρ of every x with every other y, in each group of runs."""
    return [
        correlation(group, [comparison.runs[i] for i in members], x, y, options)
        for group, members in groups_by(comparison, options.group_by).items()
        for y in ys
        for x in xs
        if x != y
    ]


def groups_by(comparison: Comparison, key: str | None) -> dict[str, list[int]]:
    """Runs by a config key's value, or by `group`: whether they may be compared; or all together.

    Raises:
        ConfigError: a key that no run's config has.
    """
    runs = comparison.runs
    if key is None:
        return {ALL: list(range(len(runs)))}
    if key == "group":
        return {f"group {group.letter}": list(group.runs) for group in comparison.groups}
    found: dict[str, list[int]] = {}
    for i, run in enumerate(runs):
        if key in run.config:
            found.setdefault(f"{key}={show_value(run.config[key])}", []).append(i)
    if not found:
        known = {"group", *(key for run in runs for key in run.config)}
        raise ConfigError(f"proxy.group_by={key}: no run has this key.{did_you_mean(key, known)}")
    return found


def correlation(
    group: str, runs: Sequence[Run], x: str, y: str, options: ProxyOptions
) -> Correlation:
    """ρ of two metrics over the runs that have both."""
    pairs = [(run.metrics.get(x), run.metrics.get(y)) for run in runs]
    known = np.array([p for p in pairs if None not in p], float).reshape(-1, 2)
    n = len(known)

    def null(why: str) -> Correlation:
        return Correlation(group, x, y, None, None, None, n, why)

    if n < options.min_runs:
        return null(
            f"{n} {'run has' if n == 1 else 'runs have'} both; proxy.min_runs={options.min_runs}"
        )
    if constant := [name for name, v in zip((x, y), known.T, strict=True) if len(set(v)) == 1]:
        return null(f"constant: {' and '.join(constant)}")
    rho = float(spearman(*known.T))
    if not options.n_bootstrap:
        return Correlation(group, x, y, rho, None, None, n, "")
    generator = np.random.default_rng(options.seed)
    drawn = known[generator.integers(0, n, (options.n_bootstrap, n))]
    resampled = spearman(drawn[..., 0], drawn[..., 1])
    low = np.quantile(np.nan_to_num(resampled, nan=-1.0), 0.025)
    high = np.quantile(np.nan_to_num(resampled, nan=1.0), 0.975)
    return Correlation(group, x, y, rho, float(low), float(high), n, "")
