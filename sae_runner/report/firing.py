"""Do latents of two SAEs fire together: across models and sites, where directions say nothing.

Both SAEs see the same held-out examples. Over n units (rows of the same example and position; or
examples, each latent at its strongest, where the two sites cut an example differently)

    ρ_jk = (Σ f¹_j f²_k − n μ¹_j μ²_k) / (n σ¹_j σ²_k)            (Pearson; sums over sparse codes)
    max_corr_12_j = max_k ρ_jk,   max_corr_21_k = max_j ρ_jk

after Bricken et al. 2023, activation similarity. Latents that are constant over the units, such as
those that never fire, are left out and counted. The baseline is the same with one side's examples
shuffled: within each position, rows are dealt to other examples, so that what is left is chance
and what depends on the position alone. Examples are dealt to others of about as many rows: the
greatest of many values is greater, so that a long text has higher peaks in any two models.

Neurons, the raw coordinates x_j of the two sites, are a second baseline: the same maxima over the
same units with x for f (an example's greatest x_j, where units are examples). They are dense, and
read some rows at a time from where they lie.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from sae_runner.evaluators._codes import Codes

CELLS = 2**23
"""Correlations that are in memory at a time: 64 MB."""
ROWS_AT_ONCE = 4096
"""Of neurons."""
MOST_STRATA, LEAST_IN_ONE = 32, 64
"""Of examples, by their number of rows."""
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
HIGH = 0.5
Vector = npt.NDArray[np.float64]
Placed = tuple[Any, npt.NDArray[np.int64]]
"""Coordinates [m, d], and which of their rows are looked at, in order."""


class Units(NamedTuple):
    """Latents over the units that two SAEs have in common."""

    one: Any
    """scipy CSR [n, d_sae] in float64."""
    two: Any
    stratum: npt.NDArray[np.int64]
    """Within which units may be shuffled: the position, or of examples the length."""
    of_one: npt.NDArray[np.int64]
    """Their numbers among the units of the first SAE."""
    of_two: npt.NDArray[np.int64]


def firing(
    one: Codes, two: Codes, *, by_row: bool, seed: int, neurons: Sequence[Placed] | None = None
) -> dict[str, Any]:
    """Metrics of two SAEs' firing by name; null where fewer than two units or latents are left.

    Args:
        one: latents of the first SAE.
        two: latents of the second.
        by_row: whether units are rows, or examples.
        seed: of the shuffled baseline.
        neurons: coordinates of both sites, and their rows of all units in the order of `keys_of`.
    """
    units = common_units(one, two, by_row=by_row)
    permutation = shuffle(units.stratum, seed)
    found: dict[str, Any] = {"unit": "row" if by_row else "example", "n_units": len(units.stratum)}
    real = max_correlations(units.one, units.two)
    chance = max_correlations(units.one, units.two[permutation])
    found |= _directed(real, chance, "")
    if neurons is not None:
        (x, of_one), (y, of_two) = neurons
        one_side, rows = (x, of_one[units.of_one]), of_two[units.of_two]
        real = max_correlations_of_neurons(one_side, (y, rows))
        chance = max_correlations_of_neurons(one_side, (y, rows[permutation]))
        found |= _directed(real, chance, "_neurons")
    return found


def _directed(
    real: tuple[Vector, Vector], chance: tuple[Vector, Vector], what: str
) -> dict[str, Any]:
    """Summaries of the maxima each way, of shuffled examples too."""
    found: dict[str, Any] = {}
    for way, best, lucky in zip(("12", "21"), real, chance, strict=True):
        found[f"n_constant{what}_{way[0]}"] = int(np.isnan(best).sum())
        found |= {f"{name}{what}_{way}": value for name, value in summary(best).items()}
        found |= {f"{name}{what}_shuffled_{way}": value for name, value in summary(lucky).items()}
    return found


def unknown(what: str) -> dict[str, None]:
    """The metrics that `what` (`_neurons`) adds to those of latents, where there is none."""
    none = np.empty(0)
    return dict.fromkeys(_directed((none, none), (none, none), what))


def summary(best: Vector) -> dict[str, Any]:
    """How the strongest correlations of latents are distributed; NaN ones are left out."""
    known = best[~np.isnan(best)]
    names = ("max_corr_mean", "max_corr_median", "frac_above_half", "max_corr_quantiles")
    if not len(known):
        return dict.fromkeys(names)
    levels = {f"{q:g}": float(v) for q, v in zip(QUANTILES, np.quantile(known, QUANTILES))}  # noqa: B905
    values = (float(known.mean()), float(np.median(known)), float((known > HIGH).mean()), levels)
    return dict(zip(names, values, strict=True))


def unit_keys(
    example_id: npt.NDArray[np.int64], position: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """A number for each row; positions are far below 2^20, ids below 2^43."""
    keys: npt.NDArray[np.int64] = example_id * 2**20 + position
    return keys


def keys_of(codes: Codes, by_row: bool) -> npt.NDArray[np.int64]:
    """A number for each unit, ascending: the same for two SAEs where the unit is the same."""
    ids = codes.example_ids.numpy()
    return unit_keys(ids[codes.slot.numpy()], codes.position.numpy()) if by_row else ids


def common_units(one: Codes, two: Codes, *, by_row: bool) -> Units:
    """The rows of examples and positions that both have; or the examples, latents at their peak."""
    keys = [keys_of(codes, by_row) for codes in (one, two)]
    _, of_one, of_two = np.intersect1d(keys[0], keys[1], True, return_indices=True)
    if by_row:
        stratum = one.position.numpy()[of_one]
        return Units(
            rows_of(one)[of_one], rows_of(two)[of_two], stratum, of_one, of_two
        )  # fmt: skip
    sizes = [np.bincount(codes.slot.numpy(), minlength=codes.n_examples) for codes in (one, two)]
    stratum = strata(sizes[0][of_one] + sizes[1][of_two])
    return Units(by_example(one)[of_one], by_example(two)[of_two], stratum, of_one, of_two)


def rows_of(codes: Codes) -> Any:
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


def strata(size: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Classes of units of about one size, as even as units of the same size allow."""
    n = max(1, min(MOST_STRATA, len(size) // LEAST_IN_ONE))
    ordered = np.sort(size)
    bounds = np.unique(ordered[np.arange(1, n) * len(size) // n])
    # Where many are of one size, few may be left below or above: one would be shuffled onto itself.
    edges = [0, *np.searchsorted(ordered, bounds), len(size)]
    while len(bounds) and (least := np.diff(edges)).min() < LEAST_IN_ONE // 2:
        thin = int(least.argmin())
        gone = min(max(thin - 1, 0), len(bounds) - 1)
        bounds, edges = np.delete(bounds, gone), [*edges[: gone + 1], *edges[gone + 2 :]]
    found: npt.NDArray[np.int64] = np.searchsorted(bounds, size, side="right")
    return found


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


# -- Neurons -------------------------------------------------------------------------------------


def max_correlations_of_neurons(a: Placed, b: Placed) -> tuple[Vector, Vector]:
    """`max_correlations` of dense columns: some of `a` at a time, and of each some rows."""
    (mean_a, sd_a), (mean_b, sd_b) = dense_moments(a), dense_moments(b)
    of_a, of_b = np.full(len(mean_a), np.nan), np.full(len(mean_b), np.nan)
    n, size = len(a[1]), max(1, CELLS // max(len(mean_b), 1))
    if n < 2:
        return of_a, of_b
    with np.errstate(invalid="ignore"):
        for begin in range(0, len(mean_a), size):
            part = slice(begin, begin + size)
            products = np.zeros((len(mean_a[part]), len(mean_b)))
            for rows_a, rows_b in zip(parts_of(a), parts_of(b), strict=True):
                # In standard units float32 is enough for a product of some thousand rows.
                left = ((rows_a[:, part] - mean_a[part]) / sd_a[part]).astype(np.float32)
                products += left.T @ ((rows_b - mean_b) / sd_b).astype(np.float32)
            of_a[part] = np.fmax.reduce(products, axis=1) / n
            of_b = np.fmax(of_b, np.fmax.reduce(products, axis=0) / n)
    return of_a, of_b


def parts_of(placed: Placed) -> Iterator[Vector]:
    """The rows that are looked at, some at a time, in float64."""
    x, rows = placed
    for begin in range(0, len(rows), ROWS_AT_ONCE):
        yield x[rows[begin : begin + ROWS_AT_ONCE]].astype(np.float64)


def dense_moments(placed: Placed) -> tuple[Vector, Vector]:
    """`moments` of dense columns, in two passes."""
    x, rows = placed
    n = max(len(rows), 1)
    mean, variance = np.zeros(x.shape[1]), np.zeros(x.shape[1])
    for part in parts_of(placed):
        mean += part.sum(0) / n
    for part in parts_of(placed):
        variance += np.square(part - mean).sum(0) / n
    scale = variance + np.square(mean)
    return mean, np.sqrt(np.where(variance > 1e-12 * scale, variance, np.nan))
