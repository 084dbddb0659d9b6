"""What the reconstruction's error becomes in later blocks, when it stands in for the site.

With a the clean activations of a later site, b those with the reconstruction spliced in, over N
tokens of width d (Braun et al. 2024, arXiv 2405.12241, whose loss this mse is):

    mse     Σ‖a − b‖² / (N d)
    fvu     Σ‖a − b‖² / Σ‖a − ā‖², ā the mean of these tokens
    cosine  mean of cos(a, b); 0 where one of them is 0

and `mse_mean`, `fvu_mean` and `cosine_mean` over the sites. Raw errors grow with the stream and are
mostly the last blocks', so that `fvu_mean` is the one to quote.

`final_norm_fvu` is the fvu of what the last norm gives (the site `final_norm`; of pooled vectors
where it comes after the pool): of the stream as the head reads it. It is in no mean and no table
unless `later_sites` names the site. Of an SAE on the last block it is all that is measured.

Tokens are all that a selection of all would keep, whether they were replaced or not: of a text no
padding, nor what the run drops (special tokens, position 0), whose norms would hide the rest.
Intervals hold each site's Σ‖a − ā‖² / N fixed, which is the model's and not the SAE's.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from sae_runner.config import NonNegative
from sae_runner.errors import ConfigError
from sae_runner.evaluators import EVALUATORS
from sae_runner.evaluators._bootstrap import (
    ClusterSums,
    Statistic,
    Sums,
    checked_resamples,
    intervals,
    ratio_of,
)
from sae_runner.evaluators._moments import FLAT, Moments
from sae_runner.evaluators._numbers import NO_ROWS, Scalars, plain_list
from sae_runner.evaluators.base import Axis, EvalContext, Evaluator, Findings, Setting, Spliced
from sae_runner.models.base import SiteInfo
from sae_runner.splice import final_norm, later_sites

SUMS, METRICS = ("tokens", "error", "cosine"), ("mse", "fvu", "cosine")
NORM = "final_norm_fvu"


@EVALUATORS.register("downstream_recon")
class DownstreamReconstruction(Evaluator):
    """Error, unexplained variance and direction at later sites.

    The table `sites` and the series `downstream_by_site` hold each site's.

    Args:
        later_sites: names or globs; None for `resid_post` of every later block.
        include_site: whether the site that is spliced is one of them.
        n_bootstrap: resamples of the examples for the intervals; 0 for none.
    """

    axis: ClassVar[Axis] = "faithfulness"
    version = "2"  # Since 2 there is final_norm_fvu.
    sizes = ("n_examples",)
    splices = ("recon",)

    def __init__(
        self, *, later_sites: list[str] | None, include_site: bool, n_bootstrap: NonNegative
    ) -> None:
        self.later_sites, self.include_site = later_sites, include_site
        self.n_bootstrap = checked_resamples(n_bootstrap, "downstream_recon")

    def check(self, setting: Setting) -> None:
        """See `Evaluator.check`: something must come later, and rows can be put back."""
        setting.selection.check_replaceable("this evaluator")
        self.watches(setting)

    def watches(self, setting: Setting) -> Sequence[SiteInfo]:
        """See `Evaluator.watches`; the site itself is seen anyhow."""
        norm, later = self._norm(setting), self._later(setting)
        return later if norm is None or norm in later else [*later, norm]

    def _norm(self, setting: Setting) -> SiteInfo | None:
        return final_norm(setting.shapes(), setting.spliced_site)

    def _later(self, setting: Setting) -> list[SiteInfo]:
        """The sites of the table; none is enough where the site itself or the last norm is left."""
        model, site, wanted = setting.shapes(), setting.spliced_site, self.later_sites
        try:
            return later_sites(model, site, wanted, "later_sites", ", or set include_site=true")
        except ConfigError:
            if wanted is None and (self.include_site or self._norm(setting)):
                return []
            raise

    def start(self, context: EvalContext) -> None:
        """Zero every sum."""
        assert context.setting is not None
        self.context = context
        self.every = replace(context.setting.selection, tokens="all")
        own = [context.setting.spliced_site] if self.include_site else []
        sites, norm = [*own, *self._later(context.setting)], self._norm(context.setting)
        watched = dict.fromkeys(sites if norm is None else [*sites, norm])
        self.watched = [AtSite(i, info) for i, info in enumerate(watched)]
        self.sites = self.watched[: len(sites)]
        self.norm = next((site for site in self.watched if site.info == norm), None)
        columns = [site.column(what) for site in self.watched for what in SUMS]
        self.clusters = ClusterSums(context.example_ids, columns)

    def update_spliced(self, batch: Spliced) -> None:
        """Compare the two runs at each site, in float64."""
        # An example in which nothing is replaced has no rows, and says nothing of the SAE.
        touched = batch.replaced.any(1).cpu()
        for site in self.watched:
            a, b = (run.sites[site.info.name] for run in (batch.clean, batch.run))
            keep = self.every.mask(site.info, batch.inputs, a.shape[1]) & touched.unsqueeze(1)
            if not keep.any():
                continue
            at, ids = keep.to(a.device), batch.inputs.ids.cpu()[keep.nonzero()[:, 0]]
            self.clusters.add(ids, **site.add(a[at], b[at]))

    def finish(self) -> Findings:
        """Category `downstream_recon`: means over the sites and the last norm, with intervals."""
        sums = self.clusters.seen(self.watched[0].column("tokens"))
        totals = {name: np.array([column.sum()]) for name, column in sums.items()}
        scalars = Scalars("downstream_recon")
        scalars.put("n_sites", len(self.sites))
        if not self.watched[0].moments.n:
            for name in (*(f"{metric}_mean" for metric in METRICS), NORM):
                scalars.null(name, "zero_denominator", NO_ROWS)
            return Findings({"downstream_recon": scalars.values}, notes=scalars.notes)
        table: dict[str, list[Any]] = {"site": [site.info.name for site in self.sites]}
        statistics: dict[str, Statistic] = {}
        for metric in METRICS:
            by_site = [site.statistic(metric) for site in self.sites]
            values = [None if found is None else float(found(totals)[0]) for found in by_site]
            table[metric] = plain_list(values)
            self._mean(scalars, f"{metric}_mean", by_site, totals, statistics)
        self._at_norm(scalars, totals, statistics)
        table["n_tokens"] = [site.moments.n for site in self.sites]
        ci, notes = intervals(
            sums, statistics, n_resamples=self.n_bootstrap, seed=self.context.seed
        )
        return Findings(
            {"downstream_recon": scalars.values}, ci, scalars.notes + notes,
            series={"downstream_by_site": table} if self.sites else {},
            tables={"sites": table} if self.sites else {},
        )  # fmt: skip

    def _at_norm(self, scalars: Scalars, totals: Sums, statistics: dict[str, Statistic]) -> None:
        """FVU after the last norm; null where there is none, or where that is constant."""
        if self.norm is None:
            detail = "no norm comes after the blocks of this model, or the site is behind it"
            return scalars.null(NORM, "not_applicable", detail)
        if (fvu := self.norm.statistic("fvu")) is None:
            return scalars.null(NORM, "constant_feature", f"{self.norm.info.name} does not vary")
        if scalars.put(NORM, float(fvu(totals)[0])) is not None:
            statistics[f"downstream_recon.{NORM}"] = fvu

    def _mean(
        self,
        scalars: Scalars,
        name: str,
        by_site: Sequence[Statistic | None],
        totals: Sums,
        statistics: dict[str, Statistic],
    ) -> None:
        """The mean over the sites that have a value; its statistic is kept for the interval."""
        there = [statistic for statistic in by_site if statistic is not None]
        if not by_site:
            detail = "no block comes after the site; name later_sites, or set include_site=true"
            return scalars.null(name, "not_applicable", detail)
        if not there:
            return scalars.null(name, "constant_feature", "no site's activations vary")

        def mean(sums: Sums) -> npt.NDArray[np.float64]:
            total = np.sum([statistic(sums) for statistic in there], axis=0)
            return np.asarray(total / len(there))

        if scalars.put(name, float(mean(totals)[0])) is not None:
            statistics[f"downstream_recon.{name}"] = mean
        if len(there) < len(by_site):
            pairs = zip(self.sites, by_site, strict=True)
            constant = ", ".join(site.info.name for site, found in pairs if found is None)
            detail = f"without {constant}, whose activations do not vary"
            scalars.note(name, "constant_feature", detail)


class AtSite:
    """What is summed at one site, and its metrics as statistics of the sums."""

    def __init__(self, number: int, info: SiteInfo) -> None:
        self.number, self.info = number, info
        self.moments = Moments(info.d, None)

    def column(self, what: str) -> str:
        """The name of one of its SUMS."""
        return f"{what} {self.number}"

    def add(self, a: Float[Tensor, "n d"], b: Float[Tensor, "n d"]) -> dict[str, Tensor]:
        """Take tokens of the clean and of the spliced run into account; their SUMS by column."""
        squares = self.moments.add(a, b)
        norms = (squares.x * squares.x_hat).sqrt()
        cosine = torch.where(norms != 0, squares.product / norms, 0.0)
        sums = (torch.ones_like(cosine), squares.error, cosine)
        return {self.column(what): values for what, values in zip(SUMS, sums, strict=True)}

    def statistic(self, metric: str) -> Statistic | None:
        """One of METRICS; None where the activations do not vary."""
        n, error, cosine = (self.column(what) for what in SUMS)
        match metric:
            case "mse":
                return ratio_of(error, n, 1 / self.info.d)
            case "fvu":
                n_tokens, spread = self.moments.n, self.moments.spread
                return None if spread < FLAT * n_tokens else ratio_of(error, n, n_tokens / spread)
            case _:
                return ratio_of(cosine, n)
