"""How many of the model's outputs one latent at one token acts on (Gao et al. 2024, §4.5).

For a pair of a token t and a latent j that is active there, the latent alone is taken out of the
site, the SAE's error staying as it is:

    x'_t = x_t − (decode(f) − decode(f with f_j = 0))

With Δ [T', V] the change of the logits at t and the T' − 1 places after it (a classifier, or a text
tower, has one), less its median over V at each of them,

    s = (Σ |Δ|)² / (Σ Δ² · T' V)

is the effective share of outputs that move: 1/n where one of n does, 1 where all do by as much,
2/π where they move as normal noise.
`latent` is the mean of s over the pairs. Beside it, at the same tokens: `channel`, where one of the
site's channels (drawn) is set to 0, and `random`, where a vector as long as the latent's, in a
random direction, is taken out. `effect_*` are means of the root mean square of Δ.

A Δ that is not above what rounding makes of the logits says nothing; such pairs are skipped.
"""

from collections.abc import Mapping
from math import nan
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sae_runner.config import NonNegative, Positive
from sae_runner.evaluators import EVALUATORS
from sae_runner.evaluators._ablations import REMOVED, Pairs, changes, draw_pairs, effective_share
from sae_runner.evaluators._bootstrap import (
    ClusterSums,
    Statistic,
    Sums,
    checked_resamples,
    intervals,
    ratio_of,
)
from sae_runner.evaluators._numbers import Scalars, plain_list
from sae_runner.evaluators._predictions import Head, head_of, predicts
from sae_runner.evaluators.base import Axis, EvalContext, Evaluator, Findings, Setting
from sae_runner.log import Progress
from sae_runner.models.base import Inputs, Model
from sae_runner.store.loading import load_batches

N_EXAMPLES = 16
"""Examples that are recorded at a time."""
N_OUTPUTS = 2**25
"""Numbers that one run of the model may give."""
ROUNDING = 4.0
"""Of logits: a root mean square of Δ of so many of their last places says nothing."""
DRAWN = ("example_id", "position", "latent", "activation", "channel")
SHARES, EFFECTS = (tuple(f"{kind}_{what}" for kind in REMOVED) for what in ("share", "effect"))
"""Columns of the table `pairs`."""


@EVALUATORS.register("ablation_sparsity")
class AblationSparsity(Evaluator):
    """Effective share of the outputs that an ablated latent, channel or random vector moves.

    The table `pairs` holds what was drawn and what each ablation gave. Pairs are spread evenly over
    held-out examples; in each they are drawn at the tokens with the most outputs ahead, T' at most.

    Args:
        n_pairs: how many are drawn, `eval.n_latents` at most.
        n_positions: T', where the model gives logits at every token.
        n_bootstrap: resamples of the examples for the intervals; 0 for none.
    """

    axis: ClassVar[Axis] = "faithfulness"
    sizes = ("n_latents",)

    def __init__(
        self, *, n_pairs: Positive, n_positions: Positive, n_bootstrap: NonNegative
    ) -> None:
        self.n_pairs, self.n_positions = n_pairs, n_positions
        self.n_bootstrap = checked_resamples(n_bootstrap, "ablation_sparsity")

    def check(self, setting: Setting) -> None:
        """See `Evaluator.check`: there must be logits, and rows that can be put back."""
        predicts(setting.shapes(), setting.dataset)
        setting.selection.check_replaceable("this evaluator")

    def start(self, context: EvalContext) -> None:
        """Forget earlier pairs; the model is run at the end, and on them alone."""
        self.context = context
        names = (*DRAWN, *SHARES, *EFFECTS)
        self.columns: dict[str, list[Tensor]] = {name: [] for name in names}
        n = min(self.n_pairs, context.n_latents)
        order = np.random.default_rng(context.seed).permutation(context.example_ids)[:n]
        share, more = divmod(n, max(len(order), 1))
        self.counts = {int(example): share + (i < more) for i, example in enumerate(order)}
        """How many pairs each example is to give."""

    def finish(self) -> Findings:
        """Category `ablation_sparsity`; intervals over examples."""
        context = self.context
        assert context.model is not None and context.dataset is not None
        assert context.setting is not None
        model, ids = context.model(), np.sort(np.array(list(self.counts), np.int64))
        head = head_of(model, context.setting.dataset, None)
        with Progress("ablation_sparsity", len(ids), "examples") as progress:
            for loaded in load_batches(context.dataset(), model, ids, N_EXAMPLES, workers=0):
                if loaded.inputs is not None:
                    self._ablate(model, head, loaded.inputs.to(model.device))
                progress.advance(N_EXAMPLES)
        return self._findings()

    def _ablate(self, model: Model, head: Head, inputs: Inputs) -> None:
        """Draw the pairs of a batch of examples and run the model on them."""
        context = self.context
        assert context.setting is not None
        site, place = context.setting.site, context.setting.spliced_site
        context.spent["full_forwards"] += len(inputs)
        seen = model.record(inputs, list(dict.fromkeys([site.name, place.name])))
        x, y = seen[site.name], seen[place.name]
        keep = context.setting.selection.mask(site, inputs, x.shape[1])
        ahead = torch.ones_like(keep, dtype=torch.int64)
        if head.kind == "tokens":
            own = ahead if inputs.attended is None else inputs.attended.cpu().long()
            ahead = own.flip(1).cumsum(1).flip(1).clamp_max(self.n_positions)
        context.spent["sae_encodes"] += int(keep.sum())
        pairs = draw_pairs(context.sae, x, y, keep, ahead, inputs.ids, self.counts, context.seed)
        start, n = 0, 1  # One, to see how many numbers it gives.
        while start < len(pairs.latent):
            part = pairs.part(start, start + n)
            context.spent["partial_forwards"] += (1 + len(REMOVED)) * len(part.latent)
            found = changes(model, head, inputs, place.name, y, part, self.n_positions)
            share, effect = effective_share(found.delta, found.counted)
            too_small = effect <= ROUNDING * found.rounding.unsqueeze(1)
            self._keep(inputs.ids[part.example], part, share.masked_fill(too_small, nan), effect)
            start, n = start + n, max(1, N_OUTPUTS // found.n_outputs)

    def _keep(
        self, ids: Tensor, pairs: Pairs, share: Float[Tensor, "p 3"], effect: Float[Tensor, "p 3"]
    ) -> None:
        values = {"example_id": ids, **pairs._asdict()}
        values |= dict(zip((*SHARES, *EFFECTS), (*share.T, *effect.T), strict=True))
        for name, parts in self.columns.items():
            parts.append(values[name].cpu())

    def _findings(self) -> Findings:
        table = {name: torch.cat(parts or [torch.zeros(0)]) for name, parts in self.columns.items()}
        scalars, statistics = Scalars("ablation_sparsity"), dict[str, Statistic]()
        n_pairs, wanted = len(table["latent"]), sum(self.counts.values())
        scalars.put("n_pairs", n_pairs)
        if n_pairs < wanted:
            detail = f"{n_pairs} of {wanted}: few latents are active in these examples"
            scalars.note("n_pairs", "too_few_examples", detail)
        sums = self._sums(table)
        for kind in REMOVED:
            moved = int(sums[f"{kind}_n"].sum())
            detail = f"{n_pairs - moved} of {n_pairs} pairs move no logit by more than rounding"
            if scalars.ratio(kind, sums[f"{kind}_share"].sum(), moved, detail) is not None:
                statistics[f"ablation_sparsity.{kind}"] = ratio_of(f"{kind}_share", f"{kind}_n")
                if moved < n_pairs:
                    scalars.note(kind, "zero_denominator", f"{detail}, and are left out")
        for kind in REMOVED:
            name, column = f"effect_{kind}", f"{kind}_effect"
            if scalars.ratio(name, sums[column].sum(), n_pairs, "no pair") is not None:
                statistics[f"ablation_sparsity.{name}"] = ratio_of(column, "pairs")
        ci, notes = intervals(
            sums, statistics, n_resamples=self.n_bootstrap, seed=self.context.seed
        )
        pairs = {name: plain_list(column) for name, column in table.items()}
        metrics, notes = {"ablation_sparsity": scalars.values}, scalars.notes + notes
        return Findings(metrics, ci, notes, tables={"pairs": pairs})

    def _sums(self, table: Mapping[str, Tensor]) -> Sums:
        """Over the pairs of each example; shares that are none count as 0, and not in `n`."""
        columns = {"pairs": torch.ones(len(table["latent"]))}
        for kind in REMOVED:
            share = table[f"{kind}_share"]
            columns |= {f"{kind}_share": share.nan_to_num(0), f"{kind}_n": share.isfinite()}
            columns[f"{kind}_effect"] = table[f"{kind}_effect"]
        clusters = ClusterSums(self.context.example_ids, list(columns))
        clusters.add(table["example_id"].long(), **columns)
        return clusters.seen("pairs")
