"""Rows made from a known dictionary: what an SAE should find is known to the last digit.

    x = f D + b + ε,    f ≥ 0 sparse [n_features],    D [n_features, d] with unit rows

Every number of a row is a hash of (seed, id, which number), so that any row can be made at any
time, in any company, and is always the same.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from sae_runner.config import (
    Fraction,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    ProperFraction,
)
from sae_runner.data import DATASETS
from sae_runner.data.base import Dataset, Example, Ids, Split, Unreadable, split_ids
from sae_runner.errors import ConfigError
from sae_runner.meters import physical_bytes

Magnitude = Literal["constant", "uniform", "half_normal", "exponential"]
Words = npt.NDArray[np.uint64]
Reals = npt.NDArray[np.float32]

ID_BYTES = 48
"""Of an example: its id, and what it takes to draw the splits and the order."""
_VERSION = 1  # Part of the fingerprint: raise it when a change alters a row.
# Independent streams of random numbers within one row.
_COUNT, _WHICH, _HOW_MUCH, _TOGETHER, _NOISE = range(5)


class Active(NamedTuple):
    """The non-zero codes of some rows; sorted by row, then by feature."""

    rows: Int64[Tensor, " nnz"]
    """Index into the ids that were asked for."""
    features: Int64[Tensor, " nnz"]
    values: Float[Tensor, " nnz"]


@DATASETS.register("toy")
class ToyDataset(Dataset):
    """Sparse codes times a random dictionary, plus bias and noise.

    Feature j fires with probability ∝ (1 + j // 2)^-zipf; features 2i and 2i + 1 share theirs and
    fire together with correlation (φ) `correlation`. Codes have mean 1 where they are not zero:
    constant, uniform in [0.5, 1.5], half-normal or exponential.

    Args:
        n_features: true features.
        d: width of a row.
        n_active: mean number of true features active in a row.
        zipf: 0 for equally frequent features.
        magnitude: distribution of the non-zero codes.
        correlation: φ between the activities of the two features of a pair.
        noise_std: standard deviation of ε, in each of the d numbers.
        bias_norm: ‖b‖₂; the direction is drawn.
        n_examples: rows of both splits together.
        heldout: share of rows that is never trained on.
        seed: decides dictionary, bias, rows and splits.

    Raises:
        ConfigError: more features or examples than there is memory for.
    """

    modality = "rows"
    name = "toy"
    dictionary: Float[Tensor, "n_features d"]
    """D: unit rows."""
    bias: Float[Tensor, " d"]

    def __init__(
        self,
        *,
        n_features: Positive,
        d: Positive,
        n_active: PositiveFloat,
        zipf: NonNegativeFloat,
        magnitude: Magnitude,
        correlation: Fraction,
        noise_std: NonNegativeFloat,
        bias_norm: NonNegativeFloat,
        n_examples: Positive,
        heldout: ProperFraction,
        seed: NonNegative,
    ) -> None:
        self.options: dict[str, Any] = {
            "n_features": n_features, "d": d, "n_active": n_active, "zipf": zipf,
            "magnitude": magnitude, "correlation": correlation, "noise_std": noise_std,
            "bias_norm": bias_norm, "n_examples": n_examples, "heldout": heldout, "seed": seed,
        }  # fmt: skip
        for key, value, n_bytes in (
            ("n_features", n_features, 4 * n_features * d),
            ("n_examples", n_examples, ID_BYTES * n_examples),
        ):
            if n_bytes > (limit := physical_bytes() or float("inf")):
                raise ConfigError(
                    f"dataset.{key}={value}: takes {n_bytes / 1e9:,.0f} GB of memory, and this "
                    f"machine has {limit / 1e9:,.0f} GB; lower it"
                )
        self.n_features, self.d, self.n_examples = n_features, d, n_examples
        self.heldout, self.seed = heldout, seed
        self.magnitude, self.correlation, self.noise_std = magnitude, correlation, noise_std
        self.probabilities = firing_probabilities(n_features, n_active, zipf)
        # A feature of probability p is active when a Poisson process of this rate hits it at all.
        self._edges = np.cumsum(-np.log1p(-self.probabilities))
        self._key = np.frombuffer(hashlib.sha256(f"toy{seed}".encode()).digest(), np.uint64)
        generator = np.random.default_rng([seed, _VERSION])
        self.dictionary = unit_rows(generator, n_features, d)
        self.bias = unit_rows(generator, 1, d)[0] * bias_norm

    def ids(self, split: Split) -> Ids:
        """See `Dataset.ids`."""
        return split_ids(self.n_examples, split, heldout=self.heldout, seed=self.seed)

    def load(self, ids: Sequence[int] | Ids) -> list[Example | Unreadable]:
        """The rows of `ids` as float32 arrays [d]."""
        values = self.rows(ids).numpy()
        return [Example(i, row) for i, row in zip(np.asarray(ids).tolist(), values, strict=True)]

    def fingerprint(self) -> str:
        """See `Dataset.fingerprint`."""
        text = json.dumps([_VERSION, self.options], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def rows(self, ids: Sequence[int] | Ids) -> Float[Tensor, "n d"]:
        """The rows of `ids` as one tensor."""
        active = self.active(ids)
        starts = torch.bincount(active.rows, minlength=len(ids)).cumsum(0)
        # A bag is summed in the order of its entries, whatever else is in the batch.
        signal = torch.nn.functional.embedding_bag(
            active.features,
            self.dictionary,
            torch.cat([starts.new_zeros(1), starts]),
            mode="sum",
            per_sample_weights=active.values,
            include_last_offset=True,
        )
        signal += self.bias
        if self.noise_std:
            signal += self.noise_std * torch.from_numpy(self._noise(words(ids)))
        return signal

    def codes(self, ids: Sequence[int] | Ids) -> Float[Tensor, "n n_features"]:
        """The true codes of `ids`, zeros included."""
        active = self.active(ids)
        codes = torch.zeros(len(ids), self.n_features)
        codes[active.rows, active.features] = active.values
        return codes

    def active(self, ids: Sequence[int] | Ids) -> Active:
        """The true codes of `ids`, without their zeros."""
        who = words(ids)
        total = float(self._edges[-1])
        hits = poisson(uniform(self._draw(_COUNT, who)), total)
        rows = np.repeat(np.arange(len(who)), hits)
        nth = np.arange(len(rows)) - np.repeat(np.cumsum(hits) - hits, hits)
        where = uniform(self._draw(_WHICH, who[rows], nth.astype(np.uint64))) * total
        features = np.minimum(
            np.searchsorted(self._edges, where, side="right"), self.n_features - 1
        )
        if self.correlation:
            rows, features = self._pair(who, rows, features)
        cells = np.unique(rows * self.n_features + features)
        rows, features = np.divmod(cells, self.n_features)
        values = self._magnitudes(who[rows], features)
        return Active(torch.from_numpy(rows), torch.from_numpy(features), torch.from_numpy(values))

    def _pair(
        self, who: Words, rows: npt.NDArray[Any], features: npt.NDArray[Any]
    ) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """With probability φ the odd feature of a pair does what the even one does.

        Both have the same probability, so neither's changes, and their correlation is φ.
        """
        pair = (features // 2).astype(np.uint64)
        together = uniform(self._draw(_TOGETHER, who[rows], pair)) < self.correlation
        odd = features % 2 == 1
        copied = together & ~odd & (features + 1 < self.n_features)
        kept = ~(together & odd)
        return (
            np.concatenate([rows[kept], rows[copied]]),
            np.concatenate([features[kept], features[copied] + 1]),
        )

    def _magnitudes(self, who: Words, features: npt.NDArray[Any]) -> Reals:
        if self.magnitude == "constant":
            return np.ones(len(who), np.float32)
        draw = self._draw(_HOW_MUCH, who, features.astype(np.uint64))
        if self.magnitude == "half_normal":
            return np.abs(normals(draw)[0]) * np.float32((np.pi / 2) ** 0.5)
        u = uniform(draw)
        return (u + 0.5 if self.magnitude == "uniform" else -np.log1p(-u)).astype(np.float32)

    def _noise(self, who: Words) -> Reals:
        pairs = np.arange((self.d + 1) // 2, dtype=np.uint64)
        both = normals(self._draw(_NOISE, who[:, None], pairs[None, :]))
        return np.concatenate(both, axis=1)[:, : self.d]

    def _draw(self, stream: int, who: Words, index: Words | None = None) -> Words:
        """64 random bits for each (id, index) of a stream."""
        mixed = mix(who * np.uint64(8) + np.uint64(stream) ^ self._key[0])
        return mix(mixed if index is None else mixed + index * _GOLDEN ^ self._key[1])


def firing_probabilities(n_features: int, n_active: float, zipf: float) -> npt.NDArray[np.float64]:
    """Probability of each feature; they sum to `n_active`.

    Raises:
        ConfigError: the most frequent one would have to be active more than always.
    """
    weights = (1.0 + np.arange(n_features) // 2) ** -zipf
    probabilities: npt.NDArray[np.float64] = n_active * weights / weights.sum()
    if probabilities[0] > 0.99:
        most = 0.99 * weights.sum()
        raise ConfigError(
            f"dataset.n_active={n_active:g}: at most {most:.4g} for dataset.n_features={n_features}"
            f" and dataset.zipf={zipf:g}, or the most frequent feature is always active"
        )
    return probabilities


def unit_rows(generator: np.random.Generator, n: int, d: int) -> Float[Tensor, "n d"]:
    """Directions drawn uniformly from the sphere."""
    drawn = generator.standard_normal((n, d))
    drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
    return torch.from_numpy(drawn.astype(np.float32))


# -- Random numbers by counter ------------------------------------------------------------------

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def words(ids: Sequence[int] | Ids) -> Words:
    """Ids as unsigned 64-bit words."""
    return np.asarray(ids, dtype=np.int64).astype(np.uint64)


def mix(x: Words) -> Words:
    """SplitMix64's finaliser: a bijection of 64 bits that passes statistical batteries."""
    x = x + _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def uniform(x: Words) -> npt.NDArray[np.float64]:
    """From [0, 1), with 53 bits."""
    return (x >> np.uint64(11)).astype(np.float64) * 2.0**-53


def normals(x: Words) -> tuple[Reals, Reals]:
    """Two independent standard normals from each word (Box and Muller 1958)."""
    high, low = (x >> np.uint64(32)).astype(np.uint32), x.astype(np.uint32)
    radius = np.sqrt(-2 * np.log((high.astype(np.float32) + np.float32(1)) * np.float32(2**-32)))
    angle = low.astype(np.float32) * np.float32(2 * np.pi * 2**-32)
    return radius * np.cos(angle), radius * np.sin(angle)


def poisson(u: npt.NDArray[np.float64], mean: float) -> npt.NDArray[np.int64]:
    """Poisson counts by inverting their distribution function at `u`."""
    most = int(mean + 12 * mean**0.5 + 30)
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, most)))])
    log_mass = np.arange(most) * np.log(mean) - mean - log_factorial
    return np.searchsorted(np.cumsum(np.exp(log_mass)), u, side="right").astype(np.int64)
