"""How often each latent is active: dead, rare and dense ones.

    freq_j = rows in which |f_j| > active_eps / rows

How many latents are dead depends on how many rows were looked at: `n_tokens` stands beside it, and
a latent never seen in N independent rows has a frequency below `dead_upper_bound` = 3 / N with
95% confidence (rows of one example are not independent: take N as examples to be careful). A
bootstrap says nothing about what was never seen, so `dead_frac` has that bound and no interval.

`frac_below_*` (<) and `frac_above_*` (>) are shares of all latents, dead ones included.
"""

import numpy as np
import torch

from sae_runner.config import NonNegativeFloat
from sae_runner.evaluators import EVALUATORS
from sae_runner.evaluators._numbers import NO_ROWS, Scalars, entries, plain_list
from sae_runner.evaluators.base import EvalContext, Evaluator, Findings, Rows

BELOW = ("1e-6", "1e-5", "1e-4")
ABOVE = ("1e-2", "1e-1")


@EVALUATORS.register("density")
class Density(Evaluator):
    """Frequency of each latent over the rows, and how many are dead, rare and dense."""

    axis = "interpretability"

    def __init__(self, *, active_eps: NonNegativeFloat) -> None:
        self.active_eps = active_eps

    def start(self, context: EvalContext) -> None:
        """Zero every count."""
        d_sae = context.sae.d_sae
        self.n_rows = self.n_not_finite = 0
        self.n_fired = torch.zeros(d_sae, dtype=torch.int64)
        self.sum_act = torch.zeros(d_sae, dtype=torch.float64)
        self.max_act = torch.zeros(d_sae, dtype=torch.float64)

    def update(self, rows: Rows) -> None:
        """Count on the CPU, where sums come in the same order on every run."""
        index, size, active, n_not_finite = entries(rows.latents, self.active_eps)
        if not active.all():
            index, size = index[active], size[active]
        self.n_not_finite += n_not_finite
        self.n_rows += len(rows.latents)
        self.n_fired.index_add_(0, index, torch.ones_like(index))
        self.sum_act.index_add_(0, index, size)
        self.max_act.scatter_reduce_(0, index, size, "amax")

    def finish(self) -> Findings:
        """Category `density`, the histogram of log10 freq, and columns for each latent.

        `mean_act_when_active` and `max_act` are of |f| and 0 for latents that never fired.
        """
        scalars = Scalars("density")
        n_fired = self.n_fired.numpy()
        freq = n_fired / max(self.n_rows, 1)
        alive = n_fired > 0
        scalars.put("n_tokens", self.n_rows)
        shares = {"dead_frac": ~alive, "alive_frac": alive}
        shares |= {f"frac_below_{edge}": freq < float(edge) for edge in BELOW}
        shares |= {f"frac_above_{edge}": freq > float(edge) for edge in ABOVE}
        for name, members in shares.items():
            if self.n_rows:
                scalars.put(name, float(members.mean()))
            else:
                scalars.null(name, "zero_denominator", NO_ROWS)
        scalars.ratio("dead_upper_bound", 3, self.n_rows, NO_ROWS)
        log10 = np.log10(freq[alive])
        for name, average in (("mean", np.mean), ("median", np.median)):
            if len(log10):
                scalars.put(f"log10_freq_{name}", float(average(log10)))
            else:
                scalars.null(f"log10_freq_{name}", "dead_feature", "every latent is dead")
        edges = np.linspace(-8, 0, 81)
        # Rarer than 1e-8 takes more than 10^8 rows to see: the first bin takes those too.
        counts, _ = np.histogram(log10.clip(-8, 0), edges)
        mean_act = self.sum_act.numpy() / n_fired.clip(1)
        if self.n_not_finite:
            detail = f"{self.n_not_finite} latent values are not finite; they count as inactive"
            scalars.note("dead_frac", "not_applicable", detail)
        return Findings(
            {"density": scalars.values},
            notes=scalars.notes,
            series={
                "log10_hist": {
                    "edges": plain_list(edges),
                    "counts": plain_list(counts),
                    "n_dead": int((~alive).sum()),
                }
            },
            per_latent={
                "freq": freq,
                "n_fired": n_fired.copy(),
                "mean_act_when_active": mean_act,
                "max_act": self.max_act.numpy().copy(),
            },
        )
