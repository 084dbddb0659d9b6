"""How well x̂ stands in for x, under every definition in use, each by its own name.

With r = x − x̂, N rows of width d, and x̄ the mean of the rows:

    mse          Σ‖r‖² / (N d)                    mse_sum            Σ‖r‖² / N
    mse_hugofry  Σ(‖r‖² / ‖x‖) / (N d)            nmse_uncentred     Σ(‖r‖² / ‖x‖²) / N
    fvu          Σ‖r‖² / Σ‖x − x̄‖²                explained_variance 1 − fvu
    explained_variance_per_token                  mean of 1 − ‖r‖² / ‖x − x̄‖²
    explained_variance_residcentred               1 − Σ_d Var(r_d) / Σ_d Var(x_d)
    explained_variance_uncentred_per_token        mean of 1 − ‖r‖² / ‖x‖²
    cosine       mean of cos(x, x̂); x̂ = 0 is 0   l2_ratio           mean of ‖x̂‖ / ‖x‖
    relative_reconstruction_bias                  Σ‖x̂‖² / Σ x·x̂ (arXiv:2404.16014, γ)

Means over rows of what is divided by ‖x‖ skip x = 0 (`zero_norm_skipped`); the per-token explained
variance skips rows within 1e-8 of the mean (`per_token_skipped`).

**The mean.** Whatever is a ratio of sums uses the mean of the very rows evaluated, from their
moments. What is centred row by row (`explained_variance_per_token`, both series, the intervals of
`fvu`) needs it before the rows come: it is `EvalContext.mean`, the mean of the store's whole
held-out split. Without one, rows are kept until their mean is known, up to KEPT_BYTES; beyond,
these are left out with a note. Where the two means differ a note says by how much.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sae_runner.config import NonNegative
from sae_runner.evaluators import EVALUATORS
from sae_runner.evaluators._bootstrap import (
    ClusterSums,
    Statistic,
    Sums,
    checked_resamples,
    intervals,
    ratio_of,
)
from sae_runner.evaluators._moments import FLAT, Centred, Moments
from sae_runner.evaluators._numbers import NO_ROWS, Scalars, chunks
from sae_runner.evaluators.base import EvalContext, Evaluator, Findings, Rows

NO_NORM = "no row with x ≠ 0"
KEPT_BYTES = 2**28
# ‖mean given − mean of the rows‖² over the variance, above what float32 rounding makes.
MEANS_DIFFER = 1e-9


@EVALUATORS.register("reconstruction")
class Reconstruction(Evaluator):
    """Error, explained variance, direction and length of the reconstruction.

    The series `error_histogram` counts rows by log10 of ‖r‖² / ‖x − x̄‖², and `error_by_position`
    gives mse, fvu (both of its sums over the rows of one position, x̄ over all rows) and n.
    """

    axis = "faithfulness"

    def __init__(self, *, n_bootstrap: NonNegative) -> None:
        self.n_bootstrap = checked_resamples(n_bootstrap, "reconstruction")

    def start(self, context: EvalContext) -> None:
        """Zero every sum."""
        self.context, self.d = context, context.sae.d_out
        mean = context.mean
        self.given_mean = None if mean is None else mean.detach().cpu().double()
        self.moments = Moments(self.d, self.given_mean)
        self.centred: Centred | None = Centred()
        # Until the mean is known: x, ‖r‖², example ids and positions of each batch.
        self.kept: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        self.kept_bytes = 0
        self.sums = dict.fromkeys(("norm", "norm_hat", "x_hat", "product", "ratio"), 0.0)
        self.sums |= dict.fromkeys(("hugofry", "nmse", "cosine", "with_norm"), 0.0)
        columns = ("rows", "error", "spread", "cosine", "with_norm")
        self.clusters = ClusterSums(context.example_ids, columns)

    def update(self, rows: Rows) -> None:
        """Sum in float64; what needs the mean waits for it, or is done where it was given."""
        if not len(rows.x):
            return
        squares = self.moments.add(rows.x, rows.x_hat)
        norm, norm_hat = squares.x.sqrt(), squares.x_hat.sqrt()
        with_norm = norm != 0

        def relative(above: Tensor, below: Tensor) -> Tensor:
            return torch.where(with_norm & (below != 0), above / below, 0.0)

        # A NaN below must not pass for a zero, hence `!= 0` and not `> 0`.
        cosine = relative(squares.product, norm * norm_hat)
        for name, values in {
            "norm": norm, "norm_hat": norm_hat, "x_hat": squares.x_hat,
            "product": squares.product, "ratio": relative(norm_hat, norm),
            "hugofry": relative(squares.error, norm), "nmse": relative(squares.error, squares.x),
            "cosine": cosine, "with_norm": with_norm,
        }.items():  # fmt: skip
            self.sums[name] += float(values.sum())
        rows_seen = torch.ones_like(norm)
        self.clusters.add(
            rows.example_id,
            rows=rows_seen, error=squares.error, cosine=cosine, with_norm=with_norm,
        )  # fmt: skip
        if self.given_mean is not None:
            self._centre(squares.error, squares.from_shift, rows.example_id, rows.position)
        else:
            self._keep(rows, squares.error)

    def _keep(self, rows: Rows, error: Tensor) -> None:
        if self.centred is None:
            return
        self.kept_bytes += rows.x.numel() * rows.x.element_size()
        if self.kept_bytes > KEPT_BYTES:
            self.centred = None
            self.kept.clear()
            return
        x = rows.x.detach().to("cpu", copy=True)
        self.kept.append((x, error, rows.example_id.cpu().clone(), rows.position.cpu().clone()))

    def _centre(self, error: Tensor, spread: Tensor, example_id: Tensor, position: Tensor) -> None:
        if self.centred is not None:
            self.centred.add(error, spread, position.cpu())
            self.clusters.add(example_id, spread=spread)

    def _centre_kept(self) -> None:
        mean = self.moments.mean
        for x, error, example_id, position in self.kept:
            deviations = (part.double() - mean for part in chunks(x))
            spread = torch.cat([torch.linalg.vecdot(part, part) for part in deviations])
            self._centre(error, spread, example_id, position)
        self.kept.clear()

    def finish(self) -> Findings:
        """Category `reconstruction`; intervals of mse, explained variance, fvu and cosine."""
        self._centre_kept()
        scalars = Scalars("reconstruction")
        self._errors(scalars)
        explained = self._explained_variance(scalars)
        self._per_token(scalars)
        self._lengths(scalars)
        ci, notes = intervals(
            self.clusters.seen("rows"),
            self._statistics(scalars, explained),
            n_resamples=self.n_bootstrap,
            seed=self.context.seed,
        )
        series = self.centred.series(self.d) if self.centred and self.moments.n else {}
        return Findings({"reconstruction": scalars.values}, ci, scalars.notes + notes, series)

    def _errors(self, scalars: Scalars) -> None:
        n, error = self.moments.n, self.moments.sum_error
        with_norm = self.sums["with_norm"]
        scalars.ratio("mse", error, n * self.d, NO_ROWS)
        scalars.ratio("mse_sum", error, n, NO_ROWS)
        scalars.ratio("mse_hugofry", self.sums["hugofry"], with_norm * self.d, NO_NORM)
        nmse = scalars.ratio("nmse_uncentred", self.sums["nmse"], with_norm, NO_NORM)
        name = "explained_variance_uncentred_per_token"
        if nmse is None:
            scalars.null(name, "zero_denominator", "nmse_uncentred is null")
        else:
            scalars.put(name, 1 - nmse)
        scalars.put("zero_norm_skipped", n - int(with_norm))

    def _explained_variance(self, scalars: Scalars) -> bool:
        """A and C; False where the rows do not vary, so that there is nothing to explain."""
        moments, names = self.moments, ("explained_variance", "explained_variance_residcentred")
        for name, unexplained in zip(names, (moments.sum_error, moments.error_spread), strict=True):
            if not moments.n:
                scalars.null(name, "zero_denominator", NO_ROWS)
            elif moments.spread < FLAT * moments.n:
                scalars.put(name, 1.0 if unexplained < FLAT * moments.n else 0.0)
                detail = "the rows do not vary: 1 where the error is 0, else 0, by convention"
                scalars.note(name, "zero_denominator", detail)
            else:
                scalars.put(name, 1 - unexplained / moments.spread)
        value = scalars.values["explained_variance"]
        if value is None:
            scalars.null("fvu", "zero_denominator", "explained_variance is null")
        else:
            scalars.put("fvu", 1 - value)
        return value is not None and moments.spread >= FLAT * moments.n

    def _per_token(self, scalars: Scalars) -> None:
        name, centred = "explained_variance_per_token", self.centred
        if centred is None:
            mib = KEPT_BYTES >> 20
            detail = f"needs the mean before the pass: none given, and rows exceed {mib} MiB"
            scalars.null(name, "not_applicable", detail)
            return
        detail = "no row is off the mean" if self.moments.n else NO_ROWS
        error = scalars.ratio(name, centred.sum_relative, centred.n, detail)
        if error is not None:
            scalars.put(name, 1 - error)
        scalars.put("per_token_skipped", centred.n_skipped)
        if (apart := self._means_apart()) > MEANS_DIFFER * (spread := self.moments.spread):
            detail = (
                "centred on the mean of the whole held-out split, not of the rows evaluated: that "
                f"adds {apart:.2g} to their Σ‖x − x̄‖² of {spread:.4g}"
            )
            scalars.note(name, "not_applicable", detail)

    def _means_apart(self) -> float:
        """N ‖x̄ − mean given‖², which is also Σ‖x − mean given‖² − Σ‖x − x̄‖²."""
        if self.given_mean is None:
            return 0.0
        return float((self.moments.mean - self.given_mean).square().sum()) * self.moments.n

    def _lengths(self, scalars: Scalars) -> None:
        n, sums = self.moments.n, self.sums
        scalars.ratio("cosine", sums["cosine"], sums["with_norm"], NO_NORM)
        scalars.ratio("l2_norm_in", sums["norm"], n, NO_ROWS)
        scalars.ratio("l2_norm_out", sums["norm_hat"], n, NO_ROWS)
        scalars.ratio("l2_ratio", sums["ratio"], sums["with_norm"], NO_NORM)
        name = "relative_reconstruction_bias"
        if sums["product"] <= 0:
            scalars.null(name, "zero_denominator", "the mean of x·x̂ is not positive")
        else:
            scalars.ratio(name, sums["x_hat"], sums["product"], NO_ROWS)

    def _statistics(self, scalars: Scalars, explained: bool) -> dict[str, Statistic]:
        known = {name for name, value in scalars.values.items() if value is not None}
        apart = self._means_apart() / max(self.moments.n, 1)

        def fvu(sums: Sums) -> npt.NDArray[np.float64]:
            # Each row's part of what the given mean adds, so that the interval is around `fvu`.
            return sums["error"] / (sums["spread"] - apart * sums["rows"])

        statistics: dict[str, Statistic] = {}
        if "mse" in known:
            statistics["mse"] = ratio_of("error", "rows", 1 / self.d)
        if explained and self.centred is not None:
            statistics["explained_variance"] = lambda sums: 1 - fvu(sums)
            statistics["fvu"] = fvu
        if "cosine" in known:
            statistics["cosine"] = ratio_of("cosine", "with_norm")
        return {f"reconstruction.{name}": statistic for name, statistic in statistics.items()}
