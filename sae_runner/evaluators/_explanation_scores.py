"""From what explanations predicted to scores of latents, their means, and a table."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from sae_runner.evaluators._activating import LATENTS, uniform
from sae_runner.evaluators._agreement import (
    auc,
    balanced_accuracy,
    pearson,
    precision,
    recall,
    spearman,
)
from sae_runner.evaluators._bootstrap import Statistic, intervals, ratio_of
from sae_runner.evaluators._explainers.base import Case, Explanation, Verdict
from sae_runner.evaluators._numbers import Scalars
from sae_runner.evaluators.base import Note

Numbers = npt.NDArray[np.float64]
Scores = dict[str, float | None]
CATEGORY = "autointerp"
METRIC = {
    "spearman": "spearman_mean", "pearson": "pearson_mean", "auc": "auc_mean",
    "recall": "recall_mean", "precision": "precision_mean",
    "detection_balacc": "detection_balacc", "fuzz_balacc": "fuzz_balacc",
}  # fmt: skip
"""Scores of a latent, and what their means are called."""
AS_ZERO = ("spearman", "pearson")
"""What counts as 0 in a mean where it is undefined."""
SHUFFLED = ("spearman", "auc", "detection_balacc")
"""What is measured with the explanations of other latents too."""


def scores_of(verdict: Verdict | None, case: Case) -> Scores | None:
    """The scores of one latent; None where there is no verdict, or nothing in one."""
    if verdict is None:
        return None
    scores: Scores = {}
    if verdict.predicted is not None:
        a = np.concatenate([shown.acts for shown in case.score])
        predicted = np.concatenate(verdict.predicted)
        active, said = a > 0, predicted > 0
        scores = {
            "spearman": spearman(predicted, a), "pearson": pearson(predicted, a),
            "auc": auc(predicted, active), "recall": recall(active, said),
            "precision": precision(active, said),
        }  # fmt: skip
    if verdict.said is not None:
        truth = np.array([shown.act > 0 for shown in case.score])
        scores["detection_balacc"] = balanced_accuracy(truth, verdict.said)
    if verdict.fuzzed is not None:
        scores["fuzz_balacc"] = balanced_accuracy(*verdict.fuzzed)
    return scores or None


def shuffled(explanations: Sequence[Explanation | None], seed: int) -> list[int | None]:
    """For each latent with an explanation another one, whose explanation it is to be given."""
    own = [i for i, explanation in enumerate(explanations) if explanation is not None]
    donors: list[int | None] = [None] * len(explanations)
    if len(own) > 1:
        order = np.argsort(uniform(1, np.array(own, dtype=np.int64), seed, LATENTS))
        for i, j in zip(order, np.roll(order, 1), strict=True):
            donors[own[int(i)]] = own[int(j)]
    return donors


def values_of(scores: Sequence[Scores], name: str) -> tuple[Numbers, Numbers]:
    """A score of every latent, and 1 where it counts in a mean."""
    found = [score.get(name) for score in scores]
    has = np.array([name in score for score in scores], dtype=bool)
    defined = np.array([value is not None for value in found], dtype=bool)
    values = np.array([0.0 if value is None else value for value in found])
    counts = has if name in AS_ZERO else defined
    return values, counts.astype(np.float64)


def aggregate(
    scores: Sequence[Scores | None],
    control: Sequence[Scores | None],
    freq: Numbers,
    *,
    n_bootstrap: int,
    seed: int,
) -> tuple[Scalars, dict[str, dict[str, float | int]], list[Note]]:
    """Means over the scored latents, those with shuffled explanations, and intervals.

    Args:
        scores: of each latent.
        control: the same with another latent's explanation.
        freq: how often each fires.
        n_bootstrap: resamples of the latents.
        seed: of these.
    """
    scalars = Scalars(CATEGORY)
    kept = [score for score in scores if score is not None]
    blind = [score for score in control if score is not None]
    sums: dict[str, Numbers] = {}
    statistics: dict[str, Statistic] = {}
    for side, suffix, names in ((kept, "", tuple(METRIC)), (blind, "_shuffled", SHUFFLED)):
        for name in names:
            metric = METRIC[name] + suffix
            values, counts = values_of(side, name)
            if not counts.sum():
                scalars.null(metric, "not_applicable", absent(side, name))
                continue
            scalars.put(metric, float((values * counts).sum() / counts.sum()))
            if not suffix:
                _note_partial(scalars, metric, counts, "latents")
                sums |= {name: values * counts, f"n_{name}": counts}
                statistics[f"{CATEGORY}.{metric}"] = ratio_of(name, f"n_{name}")
    _losses(scalars, kept, freq[[score is not None for score in scores]])
    if not sums:
        return scalars, {}, []
    if "spearman" in sums:
        statistics[f"{CATEGORY}.apl_mean"] = lambda s: 1 - s["spearman"] / s["n_spearman"]
    ci, notes = intervals(sums, statistics, n_resamples=n_bootstrap, seed=seed)
    return scalars, ci, notes


def aggregate_neurons(
    scalars: Scalars, scores: Sequence[Scores | None], *, n_bootstrap: int, seed: int
) -> tuple[dict[str, dict[str, float | int]], list[Note]]:
    """Means of what was explained beside the latents, put to theirs, and an interval."""
    kept = [score for score in scores if score is not None]
    scalars.put("n_scored_neurons", len(kept))
    for name in SHUFFLED:
        metric = f"{METRIC[name]}_neurons"
        values, counts = values_of(kept, name)
        if counts.sum():
            scalars.put(metric, float((values * counts).sum() / counts.sum()))
            _note_partial(scalars, metric, counts, "neurons")
        else:
            why = absent(kept, name) if kept else "no neuron was scored"
            scalars.null(metric, "not_applicable", why)
    values, counts = values_of(kept, "spearman")
    if not counts.sum():
        return {}, []
    sums = {"spearman": values * counts, "n": counts}
    statistic = {f"{CATEGORY}.{METRIC['spearman']}_neurons": ratio_of("spearman", "n")}
    return intervals(sums, statistic, n_resamples=n_bootstrap, seed=seed)


def _note_partial(scalars: Scalars, metric: str, counts: Numbers, what: str) -> None:
    """Say so where a mean is of some alone."""
    if (n := int(counts.sum())) < len(counts):
        detail = f"over {n} of {len(counts)} {what}: undefined for the others (see the table)"
        scalars.note(metric, "too_few_examples", detail)


def absent(scores: Sequence[Scores], name: str) -> str:
    """Why there is no mean of a score."""
    if not scores:
        return "no latent was scored"
    if any(name in score for score in scores):
        return "undefined for every latent"
    return "this back-end does not predict it"


def _losses(scalars: Scalars, kept: Sequence[Scores], freq: Numbers) -> None:
    """Activation prediction loss, medians, and the mean weighted by frequency."""
    values, counts = values_of(kept, "spearman")
    values, weights = values[counts > 0], freq[counts > 0]
    if not len(values):
        for name in ("apl_mean", "apl_median", "spearman_median", "spearman_freq_mean"):
            scalars.null(name, "not_applicable", absent(kept, "spearman"))
        return
    scalars.put("apl_mean", float(1 - values.mean()))
    scalars.put("apl_median", float(1 - np.median(values)))
    scalars.put("spearman_median", float(np.median(values)))
    scalars.ratio(
        "spearman_freq_mean", float(weights @ values), float(weights.sum()), "no latent fires"
    )


def table(
    cases: Sequence[Case],
    explanations: Sequence[Explanation | None],
    scores: Sequence[Scores | None],
    control: Sequence[Scores | None],
    donors: Sequence[int | None],
    freq: Numbers,
) -> dict[str, Any]:
    """One row a sampled latent: explanation, scores, and the ids of the examples."""
    columns: dict[str, Any] = {
        "feature": [case.latent for case in cases],
        "freq": freq.tolist(),
        "scored": [score is not None for score in scores],
        "explanation": [None if e is None else e.text for e in explanations],
    }
    for name in METRIC:
        columns[name] = [None if score is None else score.get(name) for score in scores]
    for name in SHUFFLED:
        found = [None if score is None else score.get(name) for score in control]
        columns[f"{name}_shuffled"] = found
    columns["shuffled_from"] = [None if d is None else cases[d].latent for d in donors]
    columns["explain_ids"] = [[shown.example_id for shown in case.explain] for case in cases]
    columns["score_ids"] = [[shown.example_id for shown in case.score] for case in cases]
    columns["n_silent"] = [sum(shown.act == 0 for shown in case.score) for case in cases]
    return columns
