"""Do latents of two SAEs fire together: across models and sites, where directions say nothing.

Both SAEs see the same held-out examples. Over n units (rows of the same example and position; or
examples, each latent at its strongest, where the two sites cut an example differently)

    ρ_jk = (Σ f¹_j f²_k − n μ¹_j μ²_k) / (n σ¹_j σ²_k)            (Pearson; sums over sparse codes)
    max_corr_12_j = max_k ρ_jk,   max_corr_21_k = max_j ρ_jk

after Bricken et al. 2023, activation similarity. Latents that are constant over the units, such as
those that never fire, are left out and counted. The baseline is the same with one side's examples
shuffled: within each position, rows are dealt to other examples, so that what is left is chance
and what depends on the position alone.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from sae_runner.evaluators._codes import Codes

CELLS = 2**23
"""Correlations that are in memory at a time: 64 MB."""
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
HIGH = 0.5
Vector = npt.NDArray[np.float64]


class Units(NamedTuple):
    """Latents over the units that two SAEs have in common."""

    one: Any
    """scipy CSR [n, d_sae] in float64."""
    two: Any
    stratum: npt.NDArray[np.int64]
    """Within which units may be shuffled: the position, or 0 for examples."""


def firing(one: Codes, two: Codes, *, by_row: bool, seed: int) -> dict[str, Any]:
    """Metrics of two SAEs' firing by name; null where fewer than two units or latents are left."""
    units = common_rows(one, two) if by_row else common_examples(one, two)
    shuffled = units.two[shuffle(units.stratum, seed)]
    found: dict[str, Any] = {"unit": "row" if by_row else "example", "n_units": len(units.stratum)}
    real, chance = max_correlations(units.one, units.two), max_correlations(units.one, shuffled)
    for direction, best, lucky in zip(("12", "21"), real, chance, strict=True):
        found[f"n_constant_{direction[0]}"] = int(np.isnan(best).sum())
        found |= {f"{name}_{direction}": value for name, value in summary(best).items()}
        found |= {f"{name}_shuffled_{direction}": value for name, value in summary(lucky).items()}
    return found


def summary(best: Vector) -> dict[str, Any]:
    """How the strongest correlations of latents are distributed; NaN ones are left out."""
    known = best[~np.isnan(best)]
    names = ("max_corr_mean", "max_corr_median", "frac_above_half", "max_corr_quantiles")
    if not len(known):
        return dict.fromkeys(names)
    levels = {f"{q:g}": float(v) for q, v in zip(QUANTILES, np.quantile(known, QUANTILES))}  # noqa: B905
    values = (float(known.mean()), float(np.median(known)), float((known > HIGH).mean()), levels)
    return dict(zip(names, values, strict=True))


def common_rows(one: Codes, two: Codes) -> Units:
    """The rows of examples and positions that both have."""
    # Positions are far below 2^20, ids below 2^43.
    keys = [(c.example_ids[c.slot] * 2**20 + c.position).numpy() for c in (one, two)]
    _, of_one, of_two = np.intersect1d(keys[0], keys[1], True, return_indices=True)
    return Units(by_row(one)[of_one], by_row(two)[of_two], one.position.numpy()[of_one])


def common_examples(one: Codes, two: Codes) -> Units:
    """The examples that both have, each latent at its strongest in it."""
    ids = one.example_ids.numpy(), two.example_ids.numpy()
    _, of_one, of_two = np.intersect1d(*ids, assume_unique=True, return_indices=True)
    stratum = np.zeros(len(of_one), np.int64)
    return Units(by_example(one)[of_one], by_example(two)[of_two], stratum)


def by_row(codes: Codes) -> Any:
    """Codes as a CSR matrix [n, d_sae]."""
    from scipy.sparse import csr_array

    parts = (codes.values.double().numpy(), codes.indices.numpy(), codes.offsets.numpy())
    return csr_array(parts, shape=(len(codes), codes.d_sae))


def by_example(codes: Codes) -> Any:
    """The strongest activation of each latent in each example, CSR [n_examples, d_sae]."""
    from scipy.sparse import csr_array

    cell = codes.slot.numpy()[codes.entry_row.numpy()] * codes.d_sae + codes.indices.numpy()
    cells, group = np.unique(cell, return_inverse=True)
    best = np.full(len(cells), -np.inf)
    np.maximum.at(best, group, codes.values.double().numpy())
    return csr_array(
        (best, (cells // codes.d_sae, cells % codes.d_sae)), shape=(codes.n_examples, codes.d_sae)
    )


def shuffle(stratum: npt.NDArray[np.int64], seed: int) -> npt.NDArray[np.int64]:
    """A permutation that keeps each unit in its stratum."""
    generator = np.random.default_rng(seed)
    drawn = np.lexsort((generator.random(len(stratum)), stratum))
    permutation = np.empty(len(stratum), np.int64)
    permutation[np.argsort(stratum, kind="stable")] = drawn
    return permutation


def max_correlations(a: Any, b: Any) -> tuple[Vector, Vector]:
    """max_k ρ_jk and max_j ρ_jk; NaN for latents that are constant, or have no partner."""
    of_a, of_b = np.full(a.shape[1], np.nan), np.full(b.shape[1], np.nan)
    with np.errstate(invalid="ignore"):
        for begin, block in correlations(a, b):
            of_a[begin : begin + len(block)] = np.fmax.reduce(block, axis=1)
            of_b = np.fmax(of_b, np.fmax.reduce(block, axis=0))
    return of_a, of_b


def correlations(a: Any, b: Any) -> Iterator[tuple[int, Vector]]:
    """Blocks of ρ [some latents of a, latents of b] and where each begins; constant ones NaN."""
    n = a.shape[0]
    (mean_a, sd_a), (mean_b, sd_b) = moments(a), moments(b)
    turned, size = a.T.tocsr(), max(1, CELLS // b.shape[1])
    for begin in range(0, a.shape[1], size):
        part = slice(begin, begin + size)
        products = (turned[part] @ b).toarray()
        products -= n * np.outer(mean_a[part], mean_b)
        products /= n * np.outer(sd_a[part], sd_b)
        yield begin, products


def moments(a: Any) -> tuple[Vector, Vector]:
    """Mean and standard deviation of each column; NaN as the deviation of a constant one."""
    n = max(a.shape[0], 1)
    mean = np.asarray(a.sum(axis=0)).ravel() / n
    square = np.asarray(a.multiply(a).sum(axis=0)).ravel() / n
    variance = square - mean**2
    # What rounding leaves of a constant's variance is no variance.
    return mean, np.sqrt(np.where(variance > 1e-12 * square, variance, np.nan))
