"""Whether raters agree, and whether one source's scores lie above another's.

Quadratic-weighted kappa of two raters over K ordered scores, O observed shares, E those expected
from the raters' own shares (Cohen 1968):

    κ = 1 − Σ w_ij O_ij / Σ w_ij E_ij,    w_ij = (i − j)² / (K − 1)²

Krippendorff's alpha for interval data, any number of raters, gaps allowed (Krippendorff 2011):

    α = 1 − D_o / D_e,    D_o = 1/n Σ_u 1/(m_u − 1) Σ_{i≠j in u} (v_i − v_j)²
                          D_e = 1/(n(n − 1)) Σ_{i≠j} (v_i − v_j)²

over the n scores of items u that m_u ≥ 2 raters have scored. Both are None where nothing varies.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Scores = npt.NDArray[np.float64]


def weighted_kappa(a: Sequence[int], b: Sequence[int], n_levels: int) -> float | None:
    """κ of two raters' scores from 0 to n_levels − 1 of the same items."""
    observed = np.zeros((n_levels, n_levels))
    np.add.at(observed, (np.asarray(a, int), np.asarray(b, int)), 1)
    total = observed.sum()
    if not total:
        return None
    levels = np.arange(n_levels)
    weight = (levels[:, None] - levels[None, :]) ** 2 / max(n_levels - 1, 1) ** 2
    expected = np.outer(observed.sum(1), observed.sum(0)) / total
    below = float((weight * expected).sum())
    return 1 - float((weight * observed).sum()) / below if below else None


def interval_alpha(items: Sequence[Sequence[float]]) -> float | None:
    """α of the scores that each item got; items with one score count nothing."""
    scored = [np.asarray(v, float) for v in items if len(v) > 1]
    if not scored:
        return None
    every = np.concatenate(scored)
    n = len(every)
    apart = sum(_squared_differences(v) / (len(v) - 1) for v in scored) / n
    chance = _squared_differences(every) / (n * (n - 1))
    return 1 - float(apart / chance) if chance > 0 else None


def _squared_differences(v: Scores) -> float:
    """Σ (v_i − v_j)² over ordered pairs: 2n times the sum of squares about the mean."""
    return 2 * len(v) * float(((v - v.mean()) ** 2).sum())


class Comparison(NamedTuple):
    """Whether one sample lies above another (Mann and Whitney 1947)."""

    u: float
    p: float
    """Two-sided."""
    superiority: float
    """u / (n m): share of pairs in which the first is above, ties by half."""


def mann_whitney(a: Sequence[float], b: Sequence[float]) -> Comparison | None:
    """U of `a` against `b`; None where one is empty or nothing varies."""
    from scipy.stats import mannwhitneyu

    if not len(a) or not len(b) or len({*a, *b}) == 1:
        return None
    u, p = mannwhitneyu(a, b, alternative="two-sided")
    return Comparison(float(u), float(p), float(u) / (len(a) * len(b)))
