"""Automated interpretability: explain a latent from examples, predict others, compare.

Of each sampled latent (`_sampling`: the explained examples and the scored ones are disjoint, silent
ones are verified), a back-end makes an explanation and predicts from it what the latent does in
examples it has not seen. With ŝ the prediction and a the activation, over all tokens of the scored
windows together (over examples, where a row is one):

    spearman   rank correlation of ŝ and a, average ranks   activation prediction loss = 1 − it
    pearson    their correlation
    auc        probability that ŝ is higher where a > 0 than where it is not
    recall, precision   of ŝ > 0 against a > 0
    detection_balacc    ½ (true positive rate + true negative rate) of "is it active in the example"
    fuzz_balacc         the same of "are the marks on the tokens it is active on" (back-end lm)

A constant ŝ explains nothing: its correlation is null for the latent and counts as 0 in the means
(`n_constant`). Means are over scored latents, with 95% intervals from resampling them;
`spearman_freq_mean` weights a latent by how often it fires. `*_shuffled` are the same with each
explanation put to another latent: what is left when the explanation says nothing of the latent.

`*_neurons` are the same of `n_neurons` coordinates of the site, each with the activation
max(x_j − m_j, 0), m the mean of the rows (`_controls`): Bricken et al. 2023 take neurons after
their nonlinearity, and a coordinate of a residual stream has none and is seldom 0. One that is
active in nearly every example has hardly any silent ones to be told from (`n_silent` in the table):
over texts, correlations compare best; over images, latents are told from silence, neurons seldom.
A mean that is over some of the latents or neurons alone says so in a note.

With `explanations` of another evaluation of the same SAE on the same model, its latents are not
explained: what was said of them there predicts what they do here, in examples that none of it is
from. A latent that is active here in fewer than `fewest` examples is not scored (`n_inactive`).
What a latent means on other data is then compared over corpora (`sae-run report`, retention).

A high score is necessary, not sufficient: low-level latents ("this token") score high.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from sae_runner.config import NonNegative, Positive
from sae_runner.errors import ConfigError, nearest
from sae_runner.evaluators import EVALUATORS
from sae_runner.evaluators._activating import sampled_latents
from sae_runner.evaluators._bootstrap import checked_resamples
from sae_runner.evaluators._codes import Codes
from sae_runner.evaluators._controls import Controls
from sae_runner.evaluators._examples import Examples
from sae_runner.evaluators._explainers import EXPLAINERS
from sae_runner.evaluators._explainers.base import Case, Explainer, Explanation
from sae_runner.evaluators._explanation_scores import (
    CATEGORY,
    Scores,
    aggregate,
    aggregate_neurons,
    scores_of,
    shuffled,
    table,
)
from sae_runner.evaluators._kept_explanations import FILE, Source, read_source, written
from sae_runner.evaluators._numbers import Scalars
from sae_runner.evaluators._sampling import Amounts
from sae_runner.evaluators._showing import Showing
from sae_runner.evaluators.base import Columns, EvalContext, Evaluator, Findings, Rows, Setting


@EVALUATORS.register("autointerp")
class AutoInterp(Evaluator):
    """Explanations of latents, and how well they predict activations.

    Args:
        backend: who explains, with its options: `type` ngram, clip or lm.
        explanations: a run, a folder of an evaluation of it or an evaluator's envelope there, whose
            explanations are scored here; None to explain.
        n_neurons: coordinates of the site that are explained beside the latents.
        n_top: of the examples to explain, the strongest.
        n_weighted: of these, drawn in proportion to activation.
        n_decile: of the scored examples, from the strongest tenth.
        n_quantile: of these, over the quantiles of activation.
        n_silent: of these, in which the latent is nowhere active.
        fewest: a latent that is active in fewer examples counts as dead.
        radius: tokens on each side of the peak, of a text.
        n_bootstrap: resamples of the latents for the intervals.
    """

    axis = "interpretability"
    sizes = ("n_rows", "n_latents")
    keeps_codes = True

    def __init__(
        self,
        *,
        backend: Any,
        explanations: str | None,
        n_neurons: NonNegative,
        n_top: Positive,
        n_weighted: NonNegative,
        n_decile: NonNegative,
        n_quantile: NonNegative,
        n_silent: Positive,
        fewest: Positive,
        radius: NonNegative,
        n_bootstrap: NonNegative,
    ) -> None:
        self.backend, self.fewest, self.radius = backend, fewest, radius
        self.explanations, self.n_neurons = explanations, n_neurons
        self.amounts = Amounts(n_top, n_weighted, n_decile, n_quantile, n_silent)
        self.n_bootstrap = checked_resamples(n_bootstrap, "autointerp")
        if n_decile + n_quantile == 0:
            raise ConfigError(
                "evaluators.autointerp.n_decile=0, n_quantile=0: no active example is scored"
            )
        if fewest < 4:
            raise ConfigError(f"evaluators.autointerp.fewest={fewest}: must be >= 4")

    @cached_property
    def explainer(self) -> Explainer:
        """The back-end.

        Raises:
            ConfigError: it is no block of options, or these do not fit.
        """
        if not hasattr(self.backend, "keys"):
            near = (nearest(str(self.backend), EXPLAINERS.names()) or ["ngram"])[0]
            preset = "autointerp" if near == "ngram" else f"autointerp_{near}"
            raise ConfigError(
                f"backend={self.backend}: is a block of options; use evaluators=[{preset}]"
            )
        made: Explainer = EXPLAINERS.build(self.backend, "backend")
        return made

    @cached_property
    def source(self) -> Source | None:
        """Explanations of another evaluation, where they are asked for.

        Raises:
            ConfigError: there are none, or they are of no use here.
        """
        if self.explanations is None:
            return None
        return read_source(self.explanations, str(self.backend["type"]), self.explainer)

    def check(self, setting: Setting) -> None:
        """Refuse what the back-end cannot explain, and explanations of another SAE."""
        source = self.source
        if source is not None and setting.weights not in source.weights:
            mine = setting.weights
            why = (
                f"this is {mine[:12]}"
                if mine
                else "this one is not trained yet: use `sae-run eval`"
            )
            theirs = min(source.weights)[:12]
            raise ConfigError(
                f"explanations={self.explanations}: they are of the SAE {theirs}, {why}"
            )
        self.explainer.check(setting)

    def reads(self) -> dict[str, str]:
        """What the back-end reads, and the explanations' hash."""
        taken = {} if self.source is None else {"explanations": self.source.sha256}
        return {**self.explainer.reads(), **taken}

    def start(self, context: EvalContext) -> None:
        """Draw the neurons.

        Raises:
            ConfigError: explanations that are of another model's latents.
        """
        self.context, self.controls = context, None
        if self.source is None and self.n_neurons:
            self.controls = Controls(context, n_neurons=self.n_neurons, centre=True)
        if self.source is not None and context.model is not None:
            if context.folder == self.source.folder:
                raise ConfigError(
                    f"explanations={self.explanations}: they are this evaluation's own, and would "
                    "be replaced; score them on a run of other data"
                )
            host = context.model().fingerprint()
            if host != self.source.host:
                raise ConfigError(
                    f"explanations={self.explanations}: they are of model {self.source.host[:12]}, "
                    f"this is {host[:12]}; name its weights with model.weights=FOLDER"
                )

    def update(self, rows: Rows) -> None:
        """Follow the neurons."""
        if self.controls is not None:
            self.controls.update(rows)

    def finish(self) -> Findings:
        """Category `autointerp`, and the table `latents` with a row for each sampled latent."""
        context, explainer = self.context, self.explainer
        assert context.codes is not None and context.setting is not None
        assert context.dataset is not None and context.model is not None
        codes = context.codes()
        showing = Showing(codes, context.dataset(), context.model(), context.setting.site)
        latents = self._latents(codes)
        explainer.start(context, showing)
        elsewhere = self._explained_from()
        cases = self.showing_of.cases(codes, showing, latents.tolist(), elsewhere)
        explanations = self._explanations(cases)
        verdicts = explainer.predict(explanations, cases)
        donors = shuffled(explanations, context.seed)
        others = [None if d is None else explanations[d] for d in donors]
        blind = explainer.predict(others, cases, control=True)
        scores = [scores_of(verdict, case) for verdict, case in zip(verdicts, cases, strict=True)]
        control = [scores_of(verdict, case) for verdict, case in zip(blind, cases, strict=True)]
        freq = codes.n_fired.numpy()[latents] / max(len(codes), 1)
        options = {"n_bootstrap": self.n_bootstrap, "seed": context.seed}
        scalars, ci, notes = aggregate(scores, control, freq, **options)
        self._count(scalars, codes, scores)
        tables: dict[str, Columns] = {
            "latents": table(cases, explanations, scores, control, donors, freq)
        }
        kept, remarks, incomplete = {}, explainer.remarks(), explainer.incomplete
        if self.source is None:
            kept[FILE] = written(str(self.backend["type"]), explainer, cases, explanations)
        if self.controls is not None:
            beside, tables["neurons"] = self._neurons(self.controls)
            more, why = aggregate_neurons(scalars, beside, **options)
            ci, notes = ci | more, [*notes, *why]
        return Findings(
            {CATEGORY: scalars.values},
            ci=ci,
            notes=[*scalars.notes, *notes, *remarks],
            tables=tables,
            texts=kept,
            incomplete=incomplete or explainer.incomplete,
        )

    @property
    def showing_of(self) -> Examples:
        """How examples are drawn and shown."""
        modality = self.explainer.modality
        return Examples(self.amounts, self.context.seed, self.radius, modality)

    def _neurons(self, controls: Controls) -> tuple[list[Scores | None], dict[str, Any]]:
        """Scores of neurons by the same protocol, and their table."""
        context, explainer = self.context, self.explainer
        assert context.setting is not None
        assert context.dataset is not None and context.model is not None
        units, codes = controls.finish()
        site = context.setting.spliced_site
        showing = Showing(codes, context.dataset(), context.model(), site)
        explainer.turn_to(showing, lambda x: controls.latents(x, x))
        fired = codes.n_examples_fired.numpy() if len(codes) else np.zeros(0)
        alive = np.flatnonzero(fired >= self.fewest)
        cases = self.showing_of.cases(codes, showing, alive.tolist(), {})
        explanations = explainer.explain(cases)
        verdicts = explainer.predict(explanations, cases)
        scores = [scores_of(verdict, case) for verdict, case in zip(verdicts, cases, strict=True)]
        freq = codes.n_fired.numpy()[alive] / max(len(codes), 1)
        none = [None] * len(cases)
        found = table(cases, explanations, scores, none, none, freq)
        found = {k: v for k, v in found.items() if "shuffled" not in k}
        found["feature"] = [units[i].id for i in alive.tolist()]
        return scores, {"neuron": found.pop("feature"), **found}

    def _latents(self, codes: Codes) -> npt.NDArray[np.int64]:
        """A sample, or those that were explained elsewhere and are active here too."""
        if self.source is None:
            n, seed = self.context.n_latents, self.context.seed
            return sampled_latents(codes, n, seed, fewest=self.fewest)
        every = np.array(sorted(self.source.latents), dtype=np.int64)
        return every[codes.n_examples_fired.numpy()[every] >= self.fewest]

    def _explanations(self, cases: Sequence[Case]) -> list[Explanation | None]:
        """Made here, or elsewhere."""
        if self.source is None:
            return self.explainer.explain(cases)
        taken = [self.source.latents[case.latent].explanation for case in cases]
        return self.explainer.take_over(taken, cases)

    def _explained_from(self) -> dict[int, Sequence[int]]:
        """Of latents that were explained elsewhere the examples here that they are explained from.

        Ids mean the same examples in the same data alone.
        """
        if self.source is None:
            return {}
        assert self.context.dataset is not None
        same = self.context.dataset().fingerprint() == self.source.data
        return {j: kept.explained if same else () for j, kept in self.source.latents.items()}

    def _count(self, scalars: Scalars, codes: Codes, scores: Sequence[Scores | None]) -> None:
        """How many latents there were of each kind."""
        kept = [score for score in scores if score is not None]
        constant = [score for score in kept if score.get("spearman", 0.0) is None]
        scalars.put("n_scored", len(kept))
        scalars.put("n_unscored", len(scores) - len(kept))
        scalars.put("n_dead", int((codes.n_examples_fired < self.fewest).sum()))
        scalars.put("n_constant", len(constant))
        if self.source is not None:
            scalars.put("n_inactive", len(self.source.latents) - len(scores))
        for name, value in self.explainer.counts().items():
            scalars.put(name, value)
        if codes.n_left_out:
            detail = f"{codes.n_left_out} examples were left out; raise eval.keep_gb to see all"
            scalars.note("n_scored", "too_few_examples", detail)
