import numpy as np
import pytest

from sae_runner.report.retention import retention, scores_of


def test_the_same_corpus_twice_retains_everything() -> None:
    scores = {3: 0.4, 5: 0.9, 8: 0.15}
    alive = np.array([True, False, True, True])
    found, notes = retention(scores, scores, (alive, alive))
    assert found["retention_12"] == found["retention_21"] == pytest.approx(1)
    assert found["uni_interp"] == pytest.approx((0.4 + 0.9 + 0.15) / 3)
    assert found["active_overlap"] == 0.75 and notes == []


def test_ratios_are_of_latents_scored_on_both_and_well_on_the_base() -> None:
    one, two = {1: 0.8, 2: 0.05, 3: 0.5, 9: 0.9}, {1: 0.4, 2: 0.5, 3: 0.0, 7: 0.3}
    alive = np.array([True, True, False]), np.array([True, False, True])
    found, _ = retention(one, two, alive)
    assert (found["n_latents"], found["n_retention_12"], found["n_retention_21"]) == (3, 2, 2)
    assert found["retention_12"] == pytest.approx((0.5 + 0) / 2)
    assert found["retention_21"] == pytest.approx((2 + 0.1) / 2)
    assert found["uni_interp"] == pytest.approx((0.4 + 0.05 + 0) / 3)
    assert found["active_overlap"] == pytest.approx(1 / 3)


def test_what_cannot_be_known_is_null_with_a_reason() -> None:
    found, notes = retention({1: 0.5}, {2: 0.5}, None)
    assert found["retention_12"] is None and found["uni_interp"] is None
    assert found["active_overlap"] is None and len(notes) == 2
    found, notes = retention({1: 0.05}, {1: 0.5}, None)
    assert found["retention_12"] is None and found["retention_21"] == pytest.approx(0.1)
    assert notes[0] == "retention_12: no latent scores 0.1 or more on #1 of two"


def test_a_constant_prediction_scores_nothing_and_an_unscored_latent_is_left_out() -> None:
    table = {"feature": [4, 5, 6], "scored": [True, True, False], "spearman": [0.5, None, None]}
    assert scores_of(table) == {4: 0.5, 5: 0.0}
