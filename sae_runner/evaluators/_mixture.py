"""Two Gaussians in one dimension: whether numbers fall into two heaps, and which is in which.

Expectation maximisation in float64 from Otsu's split (the threshold of the largest variance between
both sides). Ashman's D = √2 |μ₁ − μ₂| / √(σ₁² + σ₂²) is above 2 where two heaps are apart (Ashman,
Bird & Zepf 1994); BIC = −2 ln L + p ln n, with p = 5 for two Gaussians and 2 for one.
"""

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

FLOOR = 1e-4
"""Least variance of a Gaussian."""
N_ITERATIONS = 200
Values = npt.NDArray[np.float64]


class Mixture(NamedTuple):
    """Two Gaussians, that of the lower mean first."""

    weights: Values
    means: Values
    variances: Values
    log_likelihood: float

    @property
    def ashman_d(self) -> float:
        """How far apart they are, in their widths."""
        return float(
            math.sqrt(2) * abs(self.means[1] - self.means[0]) / math.sqrt(self.variances.sum())
        )

    def posterior_low(self, values: Values) -> Values:
        """Probability that each value is of the lower one."""
        densities = self._log_densities(values)
        return np.asarray(np.exp(densities[:, 0] - np.logaddexp(densities[:, 0], densities[:, 1])))

    def bic(self, n: int) -> float:
        """Of both together, on the n values that they were fitted to."""
        return -2 * self.log_likelihood + 5 * math.log(n)

    def _log_densities(self, values: Values) -> Values:
        return log_densities(values, self.weights, self.means, self.variances)


def log_densities(values: Values, weights: Values, means: Values, variances: Values) -> Values:
    """ln(weight · density) of each value, [n, 2]."""
    squares = (values[:, None] - means) ** 2 / variances
    return np.asarray(np.log(weights) - 0.5 * (np.log(2 * np.pi * variances) + squares))


def otsu(values: Values) -> npt.NDArray[np.bool_] | None:
    """Which values are above the threshold that separates best; None where all are equal."""
    ordered = np.sort(values)
    n = len(ordered)
    n_below = np.arange(1, n)
    below = ordered.cumsum()[:-1]
    means = below / n_below, (ordered.sum() - below) / (n - n_below)
    between = n_below * (n - n_below) * (means[1] - means[0]) ** 2
    between[ordered[1:] == ordered[:-1]] = -1.0  # Equal values stay together.
    if not len(between) or between.max() <= 0:
        return None
    return np.asarray(values > ordered[int(between.argmax())])


def two_gaussians(values: Values) -> Mixture | None:
    """The mixture that fits best; None where all values are equal."""
    above = otsu(values)
    if above is None:
        return None
    shares = np.stack([~above, above], axis=1).astype(np.float64)
    last = -math.inf
    for _ in range(N_ITERATIONS):
        sizes = shares.sum(0).clip(1e-300)
        weights = sizes / len(values)
        means = (shares * values[:, None]).sum(0) / sizes
        spread = (shares * (values[:, None] - means) ** 2).sum(0) / sizes
        variances = spread.clip(FLOOR)
        joint = log_densities(values, weights, means, variances)
        total = np.logaddexp(joint[:, 0], joint[:, 1])
        likelihood = float(total.sum())
        if abs(likelihood - last) <= 1e-12 * abs(likelihood):
            break
        shares, last = np.exp(joint - total[:, None]), likelihood
    order = np.argsort(means)
    return Mixture(weights[order], means[order], variances[order], likelihood)


def bic_of_one(values: Values) -> float:
    """BIC of a single Gaussian."""
    n, found = len(values), float(values.var())
    variance = max(found, FLOOR)
    log_likelihood = -0.5 * n * (math.log(2 * math.pi * variance) + found / variance)
    return -2 * log_likelihood + 2 * math.log(n)
