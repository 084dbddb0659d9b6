"""What the model's predictions lose when the reconstruction stands in for the site.

With p the clean predictions, p_s those with the reconstruction, p_z and p_m those with zeros and
with the training rows' mean in the place of the same tokens; means over all places that are
predicted at and that a replaced token can reach (see `_predictions`), ratios of sums:

    kl, kl_zero, kl_mean   mean KL(p ‖ p_s), KL(p ‖ p_z), KL(p ‖ p_m), nats
    kl_score_zero          (kl_zero − kl) / kl_zero                  kl_score_mean likewise
    ce_clean, ce_recon, …  mean −log p(target), over the places that have a target
    ce_increase            ce_recon − ce_clean
    ce_recovered_zero      (ce_zero − ce_recon) / (ce_zero − ce_clean)    ce_recovered_mean likewise
    top1_agreement         share of places where p and p_s have the same first choice
    tv                     mean ½ Σ |p − p_s|
    top1_acc_*, acc_*      share of targets that are the first choice: of tokens, of classes
    acc_recovered_zero     (acc_recon − acc_zero) / (acc_clean − acc_zero)    and of the mean

For a model with a text tower the accuracies are in the category `zeroshot`, with acc5_* (among the
first five), `agreement` (top1_agreement) and

    embed_cos              mean over images of cos(v, v_s) of the embeddings

Nothing is clamped. A recovered share is null where its denominator is too small to divide by (1e-6
nats; 0.01 of accuracy, negative too); of a negative one in nats, where the ablation improves the
loss, the value is kept with a note.
"""

from typing import ClassVar

import numpy as np
import torch

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
from sae_runner.evaluators._numbers import Scalars
from sae_runner.evaluators._predictions import Head, among_first, head_of, judge, predicts
from sae_runner.evaluators.base import (
    Axis,
    EvalContext,
    Evaluator,
    Findings,
    Setting,
    Spliced,
    SpliceKind,
)
from sae_runner.models._text import check_templates

LEAST_NATS, LEAST_ACCURACY = 1e-6, 0.01
"""Denominators of recovered shares that are still divided by."""
NO_PLACES = "nothing that is predicted comes after a replaced token"
FIRST = 5
ABLATIONS: tuple[SpliceKind, ...] = ("zero", "mean")
KINDS: tuple[SpliceKind, ...] = ("recon", *ABLATIONS)
RUNS = ("clean", *KINDS)


@EVALUATORS.register("downstream_loss")
class DownstreamLoss(Evaluator):
    """KL divergence, cross-entropy and accuracy recovered, agreement.

    Args:
        templates: sentences that stand for a class, with {} for its name, where the model has a
            text tower; None for the model's own.
        n_bootstrap: resamples of the examples for the intervals; 0 for none.
    """

    axis: ClassVar[Axis] = "faithfulness"
    version = "2"  # 1 counted a language model's places before the first replaced token too.
    sizes = ("n_examples",)
    splices = KINDS

    def __init__(self, *, templates: list[str] | None, n_bootstrap: NonNegative) -> None:
        if templates is not None:
            check_templates(templates, "evaluators.downstream_loss.templates")
        self.templates = templates
        self.n_bootstrap = checked_resamples(n_bootstrap, "downstream_loss")

    def check(self, setting: Setting) -> None:
        """See `Evaluator.check`: predictions that mean something, and rows that can be put back."""
        kind = predicts(setting.shapes(), setting.dataset)
        setting.selection.check_replaceable("this evaluator")
        if self.templates is not None and kind != "names":
            raise ConfigError(
                f"templates={self.templates}: this model has no text tower to read them; use null"
            )

    def start(self, context: EvalContext) -> None:
        """Zero every sum; the model is asked for when the first batch comes."""
        assert context.setting is not None
        self.context = context
        self.kind = predicts(context.setting.shapes(), context.setting.dataset)
        self.head: Head | None = None
        self.unlabelled = ""
        columns = ["places", "labelled", "tv", "agree", "embed_cos"]
        columns += [f"{what}_{run}" for what in ("kl", "ce", "right", "right5") for run in RUNS]
        self.clusters = ClusterSums(context.example_ids, columns)

    def update_spliced(self, batch: Spliced) -> None:
        """Compare predictions, in float32 at least; sum in float64."""
        if self.head is None:
            context = self.context
            assert context.model is not None and context.setting is not None
            self.head = head_of(context.model(), context.setting.dataset, self.templates)
        head, kind = self.head, batch.kind
        clean, spliced = head.logits(batch.clean.output), head.logits(batch.run.output)
        self.unlabelled = head.unlabelled(clean)
        places = head.places(batch.inputs, clean, batch.replaced)
        found, known = judge(clean, spliced, places), (places.target >= 0).double()
        sums = {f"kl_{kind}": found.kl, f"ce_{kind}": found.ce, f"right_{kind}": found.right}
        if head.kind == "names":
            sums[f"right5_{kind}"] = among_first(spliced, places, FIRST)
        if kind == "recon":
            sums |= {
                "places": torch.ones_like(known), "labelled": known, "tv": found.tv,
                "agree": found.agree, "ce_clean": found.ce_clean, "right_clean": found.right_clean,
            }  # fmt: skip
            if head.kind == "names":
                sums["right5_clean"] = among_first(clean, places, FIRST)
                v, v_s = (run.output[places.example].double() for run in (batch.clean, batch.run))
                sums["embed_cos"] = torch.cosine_similarity(v, v_s)
        self.clusters.add(batch.inputs.ids[places.example], **sums)

    def finish(self) -> Findings:
        """Category `downstream_loss`, and `zeroshot` of a model with a text tower; intervals."""
        sums = self.clusters.seen("places")
        untargeted = self.unlabelled
        if not untargeted and not sums["labelled"].sum():
            untargeted = "no example with a label" if len(sums["labelled"]) else NO_PLACES
        categories = [Category("downstream_loss", sums)]
        self._losses(categories[0], untargeted)
        if self.kind == "names":
            categories.append(Category("zeroshot", sums))
            self._zero_shot(categories[1], untargeted)
        ci, notes = intervals(
            sums,
            {name: s for category in categories for name, s in category.statistics.items()},
            n_resamples=self.n_bootstrap,
            seed=self.context.seed,
        )
        notes = [note for category in categories for note in category.notes] + notes
        return Findings({c.category: c.values for c in categories}, ci, notes)

    def _losses(self, loss: "Category", untargeted: str) -> None:
        loss.statistic("kl", ratio_of("kl_recon", "places"))
        for kind in ABLATIONS:
            loss.statistic(f"kl_{kind}", ratio_of(f"kl_{kind}", "places"))
            above, below = gap(f"kl_{kind}", "kl_recon", "places"), ratio_of(f"kl_{kind}", "places")
            loss.share(f"kl_score_{kind}", above, below)
        for run in RUNS:
            loss.statistic(f"ce_{run}", ratio_of(f"ce_{run}", "labelled"), untargeted)
        loss.statistic("ce_increase", gap("ce_recon", "ce_clean", "labelled"), untargeted)
        for kind in ABLATIONS:
            above, below = (gap(f"ce_{kind}", run, "labelled") for run in ("ce_recon", "ce_clean"))
            loss.share(f"ce_recovered_{kind}", above, below, untargeted)
        loss.statistic("top1_agreement", ratio_of("agree", "places"))
        loss.statistic("tv", ratio_of("tv", "places"))
        loss.count("n_predictions", "places")
        if self.kind == "tokens":
            for run in RUNS:
                loss.statistic(f"top1_acc_{run}", ratio_of(f"right_{run}", "labelled"))
        elif self.kind == "classes":
            self._accuracies(loss, untargeted)

    def _accuracies(self, category: "Category", untargeted: str) -> None:
        for run in RUNS:
            category.statistic(f"acc_{run}", ratio_of(f"right_{run}", "labelled"), untargeted)
        for kind in ABLATIONS:
            above, below = (
                gap(f"right_{run}", f"right_{kind}", "labelled") for run in ("recon", "clean")
            )
            category.share(f"acc_recovered_{kind}", above, below, untargeted, accuracy=True)
        category.count("n_labelled", "labelled")

    def _zero_shot(self, zero_shot: "Category", untargeted: str) -> None:
        self._accuracies(zero_shot, untargeted)
        for run in RUNS:
            zero_shot.statistic(f"acc5_{run}", ratio_of(f"right5_{run}", "labelled"), untargeted)
        zero_shot.statistic("agreement", ratio_of("agree", "places"))
        zero_shot.statistic("embed_cos", ratio_of("embed_cos", "places"))
        if self.head is not None:
            zero_shot.put("n_classes", self.head.n_labels)
            zero_shot.put("logit_scale", self.head.scale)


def gap(high: str, low: str, n: str) -> Statistic:
    """The statistic (high − low) / n, of three columns."""
    return lambda sums: (sums[high] - sums[low]) / sums[n]


class Category(Scalars):
    """Metrics that are statistics of the sums, each kept to have its interval taken."""

    def __init__(self, category: str, sums: Sums) -> None:
        super().__init__(category)
        self.totals = {name: np.array([column.sum()]) for name, column in sums.items()}
        self.statistics: dict[str, Statistic] = {}

    def count(self, name: str, column: str) -> None:
        """How many there are."""
        self.put(name, int(self.totals[column][0]))

    def statistic(self, name: str, statistic: Statistic, absent: str = "") -> None:
        """A mean; null where there is nothing to take it of, or `absent` says why."""
        if absent or not self.totals["places"][0]:
            code = "not_applicable" if absent else "zero_denominator"
            self.null(name, code, absent or NO_PLACES)
        elif self.put(name, float(statistic(self.totals)[0])) is not None:
            self.statistics[f"{self.category}.{name}"] = statistic

    def share(
        self,
        name: str,
        above: Statistic,
        below: Statistic,
        absent: str = "",
        *,
        accuracy: bool = False,
    ) -> None:
        """A part above of what is below; see the module for small and negative denominators."""
        if absent or not self.totals["places"][0]:
            return self.statistic(name, above, absent)
        denominator = float(below(self.totals)[0])
        size = denominator if accuracy else abs(denominator)
        if size < (least := LEAST_ACCURACY if accuracy else LEAST_NATS):
            detail = f"the ablation costs {denominator:.3g}, less than {least:g}"
            return self.null(name, "zero_denominator", detail)
        if denominator < 0:
            detail = f"the ablation improves it by {-denominator:.3g}: above 1 is worse than clean"
            self.note(name, "negative_denominator", detail)
        self.statistic(name, lambda sums: above(sums) / below(sums))
