"""How alike two dictionaries of one space are: seeds, widths, kinds of SAE at one site.

With unit rows d̂_j of the latents that are alive in each,

    mmcs_12 = mean_j max_k d̂¹_j · d̂²_k                     (Sharkey et al. 2022; mmcs_21 likewise)
    frac_matched_12[τ] = share of j with max_k d̂¹_j · d̂²_k ≥ τ
    mmcs_random_12 = mean_j max_k d̂¹_j · r_k                with as many random unit r_k

One-to-one matchings σ maximise the sum of cosines, of decoder rows and of encoder rows separately.
A latent is shared if both give it the same partner and the mean of the two cosines is at least
`shared_cosine` (Paulo & Belrose 2025):

    shared_frac = shared pairs / min(n_1, n_2)
    pw_mcc = mean over matched pairs of d̂¹_j · d̂²_σ(j)     (pairwise mean cosine; decoder)

Matching is exact (Hungarian) up to `exact_up_to` latents on the larger side. Beyond that it is
greedy: latents that are each other's nearest are paired and leave, until one side is empty, which
pairs by descending cosine. Cosines keep their sign; a row of zeros is at 0 from everything.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from sae_runner.report.options import SimilarityOptions

_TAG = 0x73696D  # "sim"
ROWS = 4096
"""Rows of a product that are in memory at a time."""


class Directions(NamedTuple):
    """What a dictionary is compared by: the rows of its latents that are alive."""

    decoder: Float[Tensor, "n d_out"]
    encoder: Float[Tensor, "n d_in"]


class Matching(NamedTuple):
    """Pairs of rows, each row in one at most."""

    first: Int64[Tensor, " n"]
    """Ascending."""
    second: Int64[Tensor, " n"]
    cosine: Float32[Tensor, " n"]
    method: str
    """`hungarian` or `greedy`."""


DIRECTIONS = ("12", "21")
MEASURED = (
    *(f"{n}_{way}" for n in ("mmcs", "mmcs_random", "frac_matched") for way in DIRECTIONS),
    "method", "pw_mcc", "n_shared", "shared_frac",
)  # fmt: skip


def similarity(one: Directions, two: Directions, options: SimilarityOptions) -> dict[str, Any]:
    """Metrics of two dictionaries by name; null throughout where one has no latent."""
    n_1, n_2 = len(one.decoder), len(two.decoder)
    found: dict[str, Any] = {"n_alive_1": n_1, "n_alive_2": n_2}
    if not (n_1 and n_2):
        return found | dict.fromkeys(MEASURED)
    decoders = unit(one.decoder), unit(two.decoder)
    for direction, rows, n_others, best in zip(
        DIRECTIONS, decoders, (n_2, n_1), nearest(*decoders), strict=True
    ):
        found[f"mmcs_{direction}"] = float(best.cosine.double().mean())
        found[f"mmcs_random_{direction}"] = random_mmcs(rows, n_others, options.seed)
        found[f"frac_matched_{direction}"] = {
            f"{tau:g}": float((best.cosine >= tau).double().mean()) for tau in options.thresholds
        }
    return found | shared(one, two, options)


def shared(one: Directions, two: Directions, options: SimilarityOptions) -> dict[str, Any]:
    """The one-to-one part: how many latents decoder and encoder pair alike and closely."""
    of_decoder, of_encoder = (
        matching(unit(a), unit(b), options.exact_up_to) for a, b in zip(one, two, strict=True)
    )
    partner = torch.full((len(one.encoder),), -1)
    partner[of_encoder.first] = of_encoder.second
    cosine = torch.zeros(len(one.encoder))
    cosine[of_encoder.first] = of_encoder.cosine
    agreed = partner[of_decoder.first] == of_decoder.second
    close = (of_decoder.cosine + cosine[of_decoder.first]) / 2 >= options.shared_cosine
    n_shared = int((agreed & close).sum())
    return {
        "method": of_decoder.method,
        "pw_mcc": float(of_decoder.cosine.double().mean()),
        "n_shared": n_shared,
        "shared_frac": n_shared / len(of_decoder.first),
    }


def unit(rows: Float[Tensor, "n d"]) -> Float32[Tensor, "n d"]:
    """Rows of norm 1 in float32; a row of zeros stays zero."""
    return torch.nn.functional.normalize(rows.detach().double(), dim=1).float()


class Nearest(NamedTuple):
    """The most similar row of the other dictionary, for each row; the first of equals."""

    cosine: Float32[Tensor, " n"]
    place: Int64[Tensor, " n"]


def nearest(a: Float32[Tensor, "n d"], b: Float32[Tensor, "m d"]) -> tuple[Nearest, Nearest]:
    """For each row of `a` the nearest of `b`, and the other way round, from the same products."""
    of_a: list[Nearest] = []
    of_b = Nearest(torch.full((len(b),), -torch.inf), torch.zeros(len(b), dtype=torch.int64))
    for begin in range(0, len(a), ROWS):
        cosines = a[begin : begin + ROWS] @ b.T
        of_a.append(Nearest(*cosines.max(1)))
        best, place = cosines.max(0)
        better = best > of_b.cosine
        of_b = Nearest(
            torch.where(better, best, of_b.cosine), torch.where(better, begin + place, of_b.place)
        )
    return Nearest(*map(torch.cat, zip(*of_a, strict=True))), of_b


def random_mmcs(a: Float32[Tensor, "n d"], n_random: int, seed: int) -> float:
    """What `n_random` random directions would score against `a`: the value to beat."""
    # Not what torch draws from this seed: an SAE may have begun there.
    drawn = np.random.default_rng([seed, _TAG]).standard_normal((n_random, a.shape[1]))
    return float(nearest(a, unit(torch.from_numpy(drawn)))[0].cosine.double().mean())


def matching(a: Float32[Tensor, "n d"], b: Float32[Tensor, "m d"], exact_up_to: int) -> Matching:
    """A one-to-one matching of min(n, m) pairs by cosine: exact, or greedy for many rows."""
    if max(len(a), len(b)) > exact_up_to:
        return greedy(a, b)
    from scipy.optimize import linear_sum_assignment

    cosines = a @ b.T
    first, second = map(
        torch.from_numpy, linear_sum_assignment(cosines.double().numpy(), maximize=True)
    )
    return Matching(first, second, cosines[first, second], "hungarian")


def greedy(a: Float32[Tensor, "n d"], b: Float32[Tensor, "m d"]) -> Matching:
    """Mutual nearest neighbours leave in pairs, until one side is empty."""
    left_a, left_b = torch.arange(len(a)), torch.arange(len(b))
    pairs: list[tuple[Tensor, Tensor, Tensor]] = []
    while len(left_a) and len(left_b):
        (cosine, to_b), (_, to_a) = nearest(a[left_a], b[left_b])
        # The greatest cosine that is left is always mutual, so each round takes a pair at least.
        mutual = to_a[to_b] == torch.arange(len(left_a))
        pairs.append((left_a[mutual], left_b[to_b[mutual]], cosine[mutual]))
        taken = torch.zeros(len(left_b), dtype=torch.bool)
        taken[to_b[mutual]] = True
        left_a, left_b = left_a[~mutual], left_b[~taken]
    first, second, cosines = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    order = first.argsort()
    return Matching(first[order], second[order], cosines[order], "greedy")
