import numpy as np
import pytest

from sae_runner.report.retention import everywhere, retention, scores_of


def test_ratios_are_of_latents_scored_on_both_and_well_where_they_were_explained() -> None:
    found, notes = retention({1: 0.8, 2: 0.05, 3: 0.5, 9: 0.9}, {1: 0.4, 2: 0.5, 3: 0.0, 7: 0.3})
    assert (found["n_latents"], found["n_retention"]) == (3, 2) and notes == []
    assert found["retention"] == pytest.approx((0.5 + 0) / 2)
    assert found["spearman_explained"] == pytest.approx((0.8 + 0.05 + 0.5) / 3)
    assert found["spearman"] == pytest.approx((0.4 + 0.5 + 0) / 3)
    found, _ = retention({1: 0.5, 2: 0.5, 3: 0.1}, {1: 0.5, 2: 0.5, 3: 0.9})
    assert (found["retention"], found["retention_median"]) == (pytest.approx(11 / 3), 1)


def test_a_latent_is_as_universal_as_its_worst_corpus() -> None:
    scored = {1: 0.8, 2: 0.1, 3: 0.5}, {1: 0.4, 2: 0.5, 4: 1.0}, {1: 0.6, 2: 0.3, 3: 0.9}
    alive = np.array([[1, 1, 0, 1], [1, 0, 0, 1], [1, 1, 1, 1], [1, 1, 1, 0]], dtype=bool)
    found, notes = everywhere(scored, [*alive])
    assert (found["n_corpora"], found["n_everywhere"]) == (3, 2)
    assert found["uni_interp"] == pytest.approx((0.4 + 0.1) / 2)
    assert found["active_overlap"] == 0.25 and notes == []


def test_what_cannot_be_known_is_null_with_a_reason() -> None:
    found, notes = retention({1: 0.5}, {2: 0.5})
    assert found["retention"] is None and found["spearman"] is None
    assert notes == ["no latent was scored on both corpora"]
    found, notes = retention({1: 0.05}, {1: 0.5})
    assert found["retention"] is None and found["retention_median"] is None
    assert notes == ["retention: no latent scores 0.1 or more where it was explained"]
    found, notes = everywhere([{1: 0.5}, {2: 0.5}], None)
    assert found["uni_interp"] is None and found["active_overlap"] is None and len(notes) == 2


def test_a_constant_prediction_scores_nothing_and_an_unscored_latent_is_left_out() -> None:
    table = {"feature": [4, 5, 6], "scored": [True, True, False], "spearman": [0.5, None, None]}
    assert scores_of(table) == {4: 0.5, 5: 0.0}
