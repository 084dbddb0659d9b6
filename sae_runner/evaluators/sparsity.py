"""How many latents a row uses (L0) and how strongly (L1).

Active means |f| > `active_eps`. With s the SAE's `input_scale`, and sums over latents j:

    l0            mean over rows of the number of active latents
    l1            mean of Σ|f_j|, in the units of the SAE's own input (s x)
    l1_dec        mean of Σ|f_j| ‖d_j‖ / s, in the units of x; f and d_j may trade a factor
    l1_over_norm  mean of Σ|f_j| / ‖s x‖, without units; rows with x = 0 are skipped and counted

`l1_dec` and `l1_over_norm` do not change when the scale is folded into the weights. Percentiles
interpolate between neighbouring counts, as NumPy's do, and come from the exact histogram.
"""

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Int64
from torch import Tensor

from sae_runner.config import NonNegative, NonNegativeFloat
from sae_runner.evaluators import EVALUATORS
from sae_runner.evaluators._bootstrap import ClusterSums, checked_resamples, intervals, ratio_of
from sae_runner.evaluators._numbers import NO_ROWS, Scalars, entries, row_norms
from sae_runner.evaluators.base import EvalContext, Evaluator, Findings, Rows

# One byte for each (image, latent): above this, l0_image is the mean over a sample of the images.
SEEN_BYTES = 2**28


def quantile(histogram: Int64[Tensor, " bins"], q: float) -> float:
    """The q-quantile of counts whose histogram (bin i: value i) is known."""
    cumulative = histogram.cumsum(0)
    place = (int(cumulative[-1]) - 1) * q
    below = int(place)
    ends = torch.tensor([below, min(below + 1, int(cumulative[-1]) - 1)])
    low, high = torch.searchsorted(cumulative, ends, right=True).tolist()
    return float(low + (high - low) * (place - below))


class DistinctLatents:
    """The latents that were active anywhere in each image.

    Kept for all images where SEEN_BYTES are enough, otherwise for as many as they are, drawn by
    seed.
    """

    def __init__(self, example_ids: npt.NDArray[np.int64], d_sae: int, seed: int) -> None:
        n = min(len(example_ids), max(1, SEEN_BYTES // d_sae))
        if n < len(example_ids):
            example_ids = np.random.default_rng(seed).choice(example_ids, n, replace=False)
        self.ids = torch.as_tensor(np.sort(example_ids), dtype=torch.int64)
        self.seen = torch.zeros(n, d_sae, dtype=torch.bool)
        self.present = torch.zeros(n, dtype=torch.bool)

    def add(
        self,
        example_id: Int64[Tensor, " n"],
        row: Int64[Tensor, " active"],
        latent: Int64[Tensor, " active"],
    ) -> None:
        """Take the active latents of a batch; entry i belongs to row `row[i]`."""
        slot = torch.searchsorted(self.ids, example_id).clamp_max(len(self.ids) - 1)
        kept = self.ids[slot] == example_id
        self.present[slot[kept]] = True
        if not kept.all():
            of_kept = kept[row]
            row, latent = row[of_kept], latent[of_kept]
        self.seen[slot[row], latent] = True


@EVALUATORS.register("sparsity")
class Sparsity(Evaluator):
    """L0 and L1 with their spread; for class tokens, patches and whole images where known."""

    axis = "interpretability"

    def __init__(self, *, active_eps: NonNegativeFloat, n_bootstrap: NonNegative) -> None:
        self.active_eps = active_eps
        self.n_bootstrap = checked_resamples(n_bootstrap, "sparsity")

    def start(self, context: EvalContext) -> None:
        """Zero every sum; decoder norms are taken once, in the units of x."""
        sae = context.sae
        self.context, self.d_sae = context, sae.d_sae
        self.scale = float(sae.input_scale)
        self.decoder_norms = row_norms(sae.W_dec.detach()) / self.scale
        self.histogram = torch.zeros(sae.d_sae + 1, dtype=torch.int64)
        columns = ("rows", "l0", "l1", "l1_dec", "l1_over_norm", "with_norm")
        self.clusters = ClusterSums(context.example_ids, columns)
        self.n_not_finite = 0
        self.by_part = {"cls": [0, 0], "patch": [0, 0]}  # Active latents, rows.
        self.distinct = None
        if context.has_cls or context.n_prefix > 0:  # Only images have such tokens.
            self.distinct = DistinctLatents(context.example_ids, sae.d_sae, context.seed)

    def update(self, rows: Rows) -> None:
        """Count on the CPU, from the sparse entries alone."""
        if not len(rows.x):
            return
        index, size, active, n_not_finite = entries(rows.latents, self.active_eps)
        self.n_not_finite += n_not_finite
        example_id, offsets = rows.example_id.cpu(), rows.latents.offsets.cpu()

        def row_sums(values: Tensor) -> Tensor:
            return torch.segment_reduce(values, "sum", offsets=offsets, initial=0)

        l0 = row_sums(active.double()).long()
        self.histogram += torch.bincount(l0, minlength=self.d_sae + 1)
        l1, norm = row_sums(size), row_norms(rows.x) * self.scale
        with_norm = norm != 0
        self.clusters.add(
            example_id,
            rows=torch.ones_like(l1),
            l0=l0,
            l1=l1,
            l1_dec=row_sums(size * self.decoder_norms[index]),
            l1_over_norm=torch.where(with_norm, l1 / norm, 0.0),
            with_norm=with_norm,
        )
        if self.distinct is not None:
            position = rows.position.cpu()
            self._add_part("cls", l0[(position == 0) & self.context.has_cls])
            self._add_part("patch", l0[position >= self.context.n_prefix])
            row = torch.repeat_interleave(torch.arange(len(l0)), offsets.diff())
            if not active.all():
                row, index = row[active], index[active]
            self.distinct.add(example_id, row, index)

    def _add_part(self, part: str, l0: Tensor) -> None:
        self.by_part[part][0] += int(l0.sum())
        self.by_part[part][1] += len(l0)

    def finish(self) -> Findings:
        """Category `sparsity`; intervals of `l0` and `l1` over examples."""
        scalars = Scalars("sparsity")
        total = {name: float(column.sum()) for name, column in self.clusters.sums.items()}
        self._l0(scalars, int(total["rows"]))
        # With one row of each image, a part is the whole.
        if self.distinct is not None and (self.clusters.sums["rows"] > 1).any():
            self._l0_of_parts(scalars, self.distinct)
        for name in ("l1", "l1_dec"):
            scalars.ratio(name, total[name], total["rows"], NO_ROWS)
        n_skipped = int(total["rows"] - total["with_norm"])
        detail = "no row with x ≠ 0"
        scalars.ratio("l1_over_norm", total["l1_over_norm"], total["with_norm"], detail)
        scalars.put("l1_over_norm_skipped", n_skipped)
        if n_skipped and total["with_norm"]:
            scalars.note("l1_over_norm", "zero_denominator", f"{n_skipped} rows with x = 0 skipped")
        ci, notes = intervals(
            self.clusters.seen("rows"),
            {
                f"sparsity.{name}": ratio_of(name, "rows")
                for name in ("l0", "l1")
                if scalars.values[name] is not None
            },
            n_resamples=self.n_bootstrap,
            seed=self.context.seed,
        )
        used = self.histogram.nonzero().squeeze(1)
        series = {"l0_histogram": {"l0": used.tolist(), "counts": self.histogram[used].tolist()}}
        return Findings({"sparsity": scalars.values}, ci, scalars.notes + notes, series)

    def _l0(self, scalars: Scalars, n_rows: int) -> None:
        used = torch.arange(self.d_sae + 1)
        mean = scalars.ratio("l0", (used * self.histogram).sum(), n_rows, NO_ROWS)
        if mean is None:
            for name in ("l0_p05", "l0_p50", "l0_p95", "l0_max", "l0_frac"):
                scalars.null(name, "zero_denominator", NO_ROWS)
            return
        for percent in (5, 50, 95):
            scalars.put(f"l0_p{percent:02}", quantile(self.histogram, percent / 100))
        if self.n_not_finite:
            detail = f"{self.n_not_finite} latent values are not finite; they count as inactive"
            scalars.note("l0", "not_applicable", detail)
        scalars.put("l0_max", int(self.histogram.nonzero().max()))
        scalars.put("l0_frac", mean / self.d_sae)

    def _l0_of_parts(self, scalars: Scalars, distinct: DistinctLatents) -> None:
        for part, (n_active, n_rows) in self.by_part.items():
            if part == "cls" and not self.context.has_cls:
                continue
            if n_rows:
                scalars.put(f"l0_{part}", n_active / n_rows)
            else:
                scalars.null(f"l0_{part}", "not_applicable", "the site's tokens leave them out")
        n_images = int(distinct.present.sum())
        scalars.ratio(
            "l0_image", distinct.seen.count_nonzero(), n_images, "no row of the images was seen"
        )
        scalars.put("l0_image_n", n_images)
