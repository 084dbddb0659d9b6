import numpy as np
import pytest

from sae_runner.evaluators._explainers.base import Case, Explanation, Shown, Verdict
from sae_runner.evaluators._explanation_scores import (
    aggregate,
    aggregate_neurons,
    scores_of,
    shuffled,
)


def case_of(*acts):
    return Case(0, [], [Shown(i, i, act, None) for i, act in enumerate(acts)])


def test_scores_are_of_all_scored_examples_together():
    case = case_of(0.0, 1.0, 2.0, 3.0, 10.0)
    predicted = [np.array([v]) for v in (0.0, 0.0, 1.0, 2.0, 3.0)]
    said = np.array([False, False, True, True, True])
    marks = np.array([True, True, False, False]), np.array([True, True, True, False])
    scores = scores_of(Verdict(predicted, said, marks), case)
    assert scores["spearman"] == pytest.approx(0.974679, abs=1e-6)
    assert scores["pearson"] == pytest.approx(0.909753, abs=1e-6)
    assert scores["auc"] == pytest.approx(0.875) and scores["recall"] == 0.75
    assert scores["precision"] == 1 and scores["detection_balacc"] == pytest.approx(0.875)
    assert scores["fuzz_balacc"] == 0.75


def test_an_oracle_scores_1_and_a_constant_yes_a_half():
    case = case_of(0.0, 0.0, 0.0, 2.0)
    oracle = scores_of(Verdict(said=np.array([False, False, False, True])), case)
    assert oracle == {"detection_balacc": 1.0}
    assert scores_of(Verdict(said=np.ones(4, dtype=bool)), case) == {"detection_balacc": 0.5}


def test_no_verdict_is_no_score():
    assert scores_of(None, case_of(1.0)) is None and scores_of(Verdict(), case_of(1.0)) is None


def test_undefined_correlations_count_as_0_and_other_undefined_scores_do_not():
    scores = [
        {"spearman": 0.8, "auc": 0.9, "detection_balacc": 0.7},
        {"spearman": None, "auc": None, "detection_balacc": 0.5},
        None,
        {"spearman": 0.4, "auc": 0.5, "detection_balacc": None},
    ]
    control = [{"spearman": 0.1, "auc": 0.5}, None, None, {"spearman": -0.3, "auc": 0.7}]
    freq = np.array([0.1, 0.2, 0.9, 0.3])
    scalars, ci, notes = aggregate(scores, control, freq, n_bootstrap=200, seed=0)
    values = scalars.values
    assert values["spearman_mean"] == pytest.approx(0.4)
    assert values["apl_mean"] == pytest.approx(0.6) == values["apl_median"]
    assert values["auc_mean"] == pytest.approx(0.7)
    assert values["detection_balacc"] == pytest.approx(0.6)
    assert values["spearman_freq_mean"] == pytest.approx((0.08 + 0.12) / 0.6)
    assert values["spearman_mean_shuffled"] == pytest.approx(-0.1)
    assert values["detection_balacc_shuffled"] is None and values["fuzz_balacc"] is None
    losses, rho = ci["autointerp.apl_mean"], ci["autointerp.spearman_mean"]
    assert losses["lo"] == pytest.approx(1 - rho["hi"]) and losses["se"] == pytest.approx(rho["se"])
    assert rho["n"] == 3 and rho["se"] == pytest.approx(np.std([0.8, 0, 0.4]) / 3**0.5, rel=0.15)
    assert not [note for note in notes if "spearman" in note.metric]
    partial = {n.metric: n.detail for n in scalars.notes if n.code == "too_few_examples"}
    assert partial == dict.fromkeys(
        ("autointerp.auc_mean", "autointerp.detection_balacc"),
        "over 2 of 3 latents: undefined for the others (see the table)",
    )


def test_a_mean_of_a_few_neurons_says_how_few():
    scores = [{"spearman": rho, "auc": 0.9, "detection_balacc": None} for rho in (0.5, None, 0.1)]
    scores[1]["detection_balacc"] = 0.8
    scalars = aggregate([], [], np.zeros(0), n_bootstrap=0, seed=0)[0]
    ci, _ = aggregate_neurons(scalars, scores, n_bootstrap=50, seed=0)
    assert scalars.values["detection_balacc_neurons"] == 0.8
    assert scalars.values["spearman_mean_neurons"] == pytest.approx(0.2)
    assert ci["autointerp.spearman_mean_neurons"]["n"] == 3
    (note,) = [n for n in scalars.notes if n.code == "too_few_examples"]
    assert note.metric == "autointerp.detection_balacc_neurons"
    assert note.detail.startswith("over 1 of 3 neurons: ")


def test_explanations_go_to_other_latents():
    explanations = [None if i in (2, 5) else Explanation(str(i)) for i in range(9)]
    donors = shuffled(explanations, seed=0)
    assert donors[2] is None and donors[5] is None
    given = [d for d in donors if d is not None]
    assert sorted(given) == [0, 1, 3, 4, 6, 7, 8]
    assert all(i != d for i, d in enumerate(donors))
    assert donors != shuffled(explanations, seed=1)
    assert shuffled([Explanation("a"), None], seed=0) == [None, None]
