"""The cluster of latents that hardly ever fire, and weakly: does it exist, who is in it.

Of each latent that fired, X = log10 of its frequency and Y = log10 of the mean of its `n_top`
largest activations. Members of the cluster (`uld`), the rest being `dense`:

    gmm         two Gaussians on Y (see `_mixture`): posterior of the lower one > 0.5, and Y below
                the upper one's mean; none unless the cluster is present: Ashman's D > 2, BIC lower
                by 10 than that of one Gaussian, both weights ≥ 0.01, mean X of the lower part below
                that of the upper
    thresholds  not (X > `dense_log10_freq` and Y > `dense_log10_top`)
    frequency   frequency < `rare_freq`

`frac` is of the latents that fired. Cosines are means over pairs of latents, of rows at norm 1:
`enc_cos_within`, `enc_cos_between` the two, `enc_pc1_share` = λ₁ / Σλ without centring (1: a single
direction); `dec_*` likewise. A single cluster of encoders that fire on the same rare inputs shows
in the row of the largest L0: `max_l0`, `max_l0_example`, and the share of members active there.
"""

from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Int64
from torch import Tensor

from sae_runner.config import NonNegative, NonNegativeFloat, Positive, PositiveFloat
from sae_runner.evaluators import EVALUATORS
from sae_runner.evaluators._directions import (
    first_component_share,
    mean_cosine_between,
    mean_cosine_within,
    unit_rows,
)
from sae_runner.evaluators._mixture import Mixture, bic_of_one, two_gaussians
from sae_runner.evaluators._numbers import NO_ROWS, Scalars, entries, plain_list
from sae_runner.evaluators._strongest import Strongest
from sae_runner.evaluators.base import EvalContext, Evaluator, Findings, Rows

FEW_PAIRS = "fewer than two latents with a direction"
EDGES = np.linspace(-1, 1, 41)
Members = npt.NDArray[np.bool_]
Values = npt.NDArray[np.float64]


class Peak(NamedTuple):
    """The row of the largest L0; of equals, the first by example and position."""

    l0: int
    example: int
    position: int
    latents: Int64[Tensor, " l0"]


@EVALUATORS.register("ultra_low_density")
class UltraLowDensity(Evaluator):
    """The ultra-low-density cluster, its size and the directions of its latents.

    Args:
        mode: how members are told.
        n_top: activations that Y is the mean of, or as many as there are.
        dense_log10_freq: X above which a latent can be dense (`thresholds`).
        dense_log10_top: Y above which it can.
        rare_freq: frequency below which a latent is a member (`frequency`).
        n_pairs: pairs drawn for the histogram of each decade of frequency; 0 for none.
        active_eps: a latent is active where |f| is above.
    """

    axis = "interpretability"

    def __init__(
        self,
        *,
        mode: Literal["gmm", "thresholds", "frequency"],
        n_top: Positive,
        dense_log10_freq: float,
        dense_log10_top: float,
        rare_freq: PositiveFloat,
        n_pairs: NonNegative,
        active_eps: NonNegativeFloat,
    ) -> None:
        self.mode, self.n_top, self.n_pairs, self.active_eps = mode, n_top, n_pairs, active_eps
        self.dense_log10 = (dense_log10_freq, dense_log10_top)
        self.rare_freq = rare_freq

    def start(self, context: EvalContext) -> None:
        """See `Evaluator.start`."""
        self.sae, self.seed = context.sae, context.seed
        self.n_rows = 0
        self.n_fired = torch.zeros(self.sae.d_sae, dtype=torch.int64)
        self.strongest = Strongest(self.sae.d_sae, self.n_top)
        self.peak: Peak | None = None

    def update(self, rows: Rows) -> None:
        """See `Evaluator.update`."""
        latent, size, active, _ = entries(rows.latents, self.active_eps)
        row = rows.latents.rows.cpu()
        if not active.all():
            latent, size, row = latent[active], size[active], row[active]
        self.n_rows += len(rows.latents)
        self.n_fired.index_add_(0, latent, torch.ones_like(latent))
        self.strongest.add(latent, size)
        l0 = torch.bincount(row, minlength=len(rows.latents))
        most = int(l0.max()) if len(l0) else 0
        if most == 0 or (self.peak is not None and most < self.peak.l0):
            return
        ids, position = rows.example_id.cpu(), rows.position.cpu()
        at = min((l0 == most).nonzero().flatten().tolist(), key=lambda i: (ids[i], position[i]))
        found = Peak(most, int(ids[at]), int(position[at]), latent[row == at])
        if self.peak is None or (-found.l0, *found[1:3]) < (-self.peak.l0, *self.peak[1:3]):
            self.peak = found

    def finish(self) -> Findings:
        """Categories `uld` and `dense`; `top_mean` (10^Y, 0 for a dead latent) and `uld`, each's.

        Series: Y by latent that fired, and encoder cosines of pairs within decades of frequency.
        """
        uld, dense = Scalars("uld"), Scalars("dense")
        fired = (self.n_fired > 0).numpy()
        freq = self.n_fired.numpy()[fired] / max(self.n_rows, 1)
        top_mean = self.strongest.mean().numpy()
        x, y = np.log10(freq), np.log10(top_mean[fired])
        members = self._members(uld, x, y, freq)
        for scalars, mask in ((uld, members), (dense, ~members)):
            scalars.put("n", int(mask.sum()))
            scalars.ratio("frac", int(mask.sum()), len(mask), "no latent fired")
            scalars.ratio("mean_log10_freq", x[mask].sum(), int(mask.sum()), "it has no member")
        which = torch.from_numpy(fired.nonzero()[0])
        self._cosines(uld, dense, which, members)
        self._peak(uld, which, members)
        column = np.zeros(len(fired), dtype=bool)
        column[fired] = members
        return Findings(
            {"uld": uld.values, "dense": dense.values},
            notes=uld.notes + dense.notes,
            series={
                "top_mean_log10": histogram_of(y),
                "enc_cos_by_decade": self._by_decade(which, x),
            },
            per_latent={"top_mean": top_mean, "uld": column},
        )

    def _members(self, uld: Scalars, x: Values, y: Values, freq: Values) -> Members:
        """Which latents are of the cluster."""
        mixture = two_gaussians(y)
        low = np.zeros(len(y), dtype=bool)
        if mixture is None:
            for name in ("ashman_d", "bic_gain"):
                uld.null(name, "too_few_examples", "top activations of fewer than two sizes")
        else:
            uld.put("ashman_d", mixture.ashman_d)
            uld.put("bic_gain", bic_of_one(y) - mixture.bic(len(y)))
            low = (mixture.posterior_low(y) > 0.5) & (y < mixture.means[1])
        if self.mode == "gmm":
            present = mixture is not None and is_apart(mixture, y) and rarer(x, low)
            members = low if present else np.zeros_like(low)
        elif self.mode == "thresholds":
            members = ~((x > self.dense_log10[0]) & (y > self.dense_log10[1]))
        else:
            members = freq < self.rare_freq
        uld.put("present", int(members.any()))
        return members

    def _cosines(
        self, uld: Scalars, dense: Scalars, which: Int64[Tensor, " n"], members: Members
    ) -> None:
        of_uld = torch.from_numpy(members)
        for side, rows in (("enc", self.sae.W_enc_rows), ("dec", self.sae.W_dec)):
            parts = {}
            for scalars, mask in ((uld, of_uld), (dense, ~of_uld)):
                unit, kept = unit_rows(rows.detach()[which[mask].to(rows.device)].cpu())
                scalars.put(f"n_zero_{side}", int(mask.sum()) - len(kept))
                parts[scalars.category] = unit
                if len(unit) > 1:
                    scalars.put(f"{side}_cos_within", mean_cosine_within(unit))
                    scalars.put(f"{side}_pc1_share", first_component_share(unit))
                else:
                    scalars.null(f"{side}_cos_within", "too_few_examples", FEW_PAIRS)
                    scalars.null(f"{side}_pc1_share", "too_few_examples", FEW_PAIRS)
            if all(len(unit) for unit in parts.values()):
                uld.put(f"{side}_cos_between", mean_cosine_between(parts["uld"], parts["dense"]))
            else:
                detail = "one of the two has no latent with a direction"
                uld.null(f"{side}_cos_between", "too_few_examples", detail)

    def _peak(self, uld: Scalars, which: Int64[Tensor, " n"], members: Members) -> None:
        if not self.n_rows:
            for name in ("max_l0", "max_l0_frac", "max_l0_example", "frac_active_at_max"):
                uld.null(name, "zero_denominator", NO_ROWS)
            return
        uld.put("max_l0", self.peak.l0 if self.peak else 0)
        uld.put("max_l0_frac", (self.peak.l0 if self.peak else 0) / self.sae.d_sae)
        if self.peak is None:
            uld.null("max_l0_example", "dead_feature", "every latent is dead")
            uld.null("frac_active_at_max", "dead_feature", "every latent is dead")
            return
        uld.put("max_l0_example", self.peak.example)
        n_there = int(torch.isin(which[torch.from_numpy(members)], self.peak.latents).sum())
        detail = "the cluster has no member"
        uld.ratio("frac_active_at_max", n_there, int(members.sum()), detail)

    def _by_decade(self, which: Int64[Tensor, " n"], x: Values) -> dict[str, list[object]]:
        """Histograms of encoder cosines of seeded pairs whose frequencies are of one decade."""
        series: dict[str, list[object]] = {"edges": plain_list(EDGES), "decade": [],
                                           "n_latents": [], "mean": [], "counts": []}  # fmt: skip
        unit, kept = unit_rows(self.sae.W_enc_rows.detach()[which.to(self.sae.b_dec.device)].cpu())
        decades = np.floor(x[kept.numpy()]).astype(int)
        for decade in sorted(set(decades.tolist())):
            here = (decades == decade).nonzero()[0]
            if len(here) < 2 or not self.n_pairs:
                continue
            generator = np.random.default_rng([self.seed, abs(decade)])
            one = generator.integers(0, len(here), self.n_pairs)
            other = (one + generator.integers(1, len(here), self.n_pairs)) % len(here)
            cosines = torch.linalg.vecdot(unit[here[one]], unit[here[other]]).double().numpy()
            series["decade"].append(decade)
            series["n_latents"].append(len(here))
            series["mean"].append(float(cosines.mean()))
            series["counts"].append(np.histogram(cosines.clip(-1, 1), EDGES)[0].tolist())
        return series


def is_apart(mixture: Mixture, values: Values) -> bool:
    """Whether two Gaussians are two heaps, and two describe the values better than one."""
    better = mixture.bic(len(values)) < bic_of_one(values) - 10
    return bool(mixture.ashman_d > 2 and better and (mixture.weights >= 0.01).all())


def rarer(x: Values, low: Members) -> bool:
    """Whether the members of the lower part fire more rarely than the others."""
    return bool(low.any() and not low.all() and x[low].mean() < x[~low].mean())


def histogram_of(values: Values) -> dict[str, list[object]]:
    """Fifty bins from the least to the greatest value."""
    counts, edges = np.histogram(values, 50)
    return {"edges": plain_list(edges), "counts": plain_list(counts)}
