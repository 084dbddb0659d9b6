import numpy as np
import pytest
from scipy import stats
from sklearn import metrics

from sae_runner.evaluators._agreement import (
    auc,
    balanced_accuracy,
    pearson,
    precision,
    recall,
    spearman,
)


def test_the_fixture_of_the_reference():
    predicted, act = np.array([0.0, 0, 1, 2, 3]), np.array([0.0, 1, 2, 3, 10])
    assert spearman(predicted, act) == pytest.approx(0.974679, abs=1e-6)
    assert pearson(predicted, act) == pytest.approx(0.909753, abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_agreement_is_that_of_scipy_and_sklearn(seed):
    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, 5, 200).astype(float), rng.integers(0, 4, 200) + rng.random(200).round(1)
    b += a * rng.random()
    truth, said = b > 2.5, a > 1
    assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-12)
    assert pearson(a, b) == pytest.approx(stats.pearsonr(a, b).statistic, abs=1e-12)
    assert auc(a, truth) == pytest.approx(metrics.roc_auc_score(truth, a), abs=1e-12)
    wanted = metrics.balanced_accuracy_score(truth, said)
    assert balanced_accuracy(truth, said) == pytest.approx(wanted, abs=1e-12)
    assert precision(truth, said) == pytest.approx(metrics.precision_score(truth, said), abs=1e-12)
    assert recall(truth, said) == pytest.approx(metrics.recall_score(truth, said), abs=1e-12)


def test_what_is_constant_or_of_one_class_is_undefined():
    a, ones = np.arange(4.0), np.ones(4)
    assert spearman(ones, a) is pearson(a, ones) is spearman(np.array([]), np.array([])) is None
    flags = np.array([True, False, False, True])
    for one_class in (np.ones(4, dtype=bool), np.zeros(4, dtype=bool)):
        assert auc(a, one_class) is balanced_accuracy(one_class, flags) is None
    assert precision(flags, np.zeros(4, dtype=bool)) is None
    assert recall(np.zeros(4, dtype=bool), flags) is None


def test_an_oracle_a_constant_yes_and_a_coin():
    rng = np.random.default_rng(0)
    truth = np.arange(400) < 100
    assert balanced_accuracy(truth, truth) == 1
    assert balanced_accuracy(truth, np.ones(400, dtype=bool)) == 0.5
    coin = balanced_accuracy(truth, rng.random(400) < 0.5)
    assert abs(coin - 0.5) < 3 * np.sqrt(0.25 / 100)
