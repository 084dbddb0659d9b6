import numpy as np
import pytest
from scipy.stats import mannwhitneyu
from sklearn.metrics import cohen_kappa_score

from sae_runner.evaluators._rater_agreement import interval_alpha, mann_whitney, weighted_kappa


def alpha_by_coincidences(items):
    """Krippendorff's own way: a matrix of how often two values meet in an item."""
    values = sorted({v for item in items for v in item})
    met = np.zeros((len(values), len(values)))
    for item in items:
        if len(item) > 1:
            for i, a in enumerate(item):
                for j, b in enumerate(item):
                    if i != j:
                        met[values.index(a), values.index(b)] += 1 / (len(item) - 1)
    n_of, n = met.sum(1), met.sum()
    apart = np.subtract.outer(values, values) ** 2
    expected = (np.outer(n_of, n_of) - np.diag(n_of)) / (n - 1)
    return 1 - (met * apart).sum() / (expected * apart).sum()


def test_identical_ratings_agree_entirely():
    assert weighted_kappa([0, 3, 1, 2], [0, 3, 1, 2], 4) == 1
    assert interval_alpha([[0, 0], [3, 3], [1, 1]]) == 1


def test_ratings_that_say_nothing_of_each_other_are_at_zero():
    assert weighted_kappa([0, 0, 3, 3], [0, 3, 0, 3], 4) == pytest.approx(0, abs=1e-12)


def test_kappa_is_sklearns_and_its_weights_are_squares():
    generator = np.random.default_rng(0)
    a = generator.integers(0, 6, 80)
    b = (a + generator.integers(-1, 3, 80)).clip(0, 5)
    expected = cohen_kappa_score(a, b, weights="quadratic", labels=list(range(6)))
    assert weighted_kappa(a.tolist(), b.tolist(), 6) == pytest.approx(expected, abs=1e-12)


def test_alpha_is_that_of_the_coincidence_matrix_with_gaps():
    generator = np.random.default_rng(1)
    items = [generator.integers(0, 5, generator.integers(1, 5)).tolist() for _ in range(40)]
    assert interval_alpha(items) == pytest.approx(alpha_by_coincidences(items), abs=1e-12)
    one_sided = [[0, 4], [0, 4], [4, 0]]
    found = interval_alpha(one_sided)
    assert found == pytest.approx(alpha_by_coincidences(one_sided)) and found < 0


def test_where_nothing_varies_there_is_no_agreement_to_measure():
    assert weighted_kappa([2, 2], [2, 2], 4) is None and weighted_kappa([], [], 4) is None
    assert interval_alpha([[1, 1], [1, 1]]) is None
    assert interval_alpha([[1], [2]]) is None and interval_alpha([]) is None


def test_one_sample_above_another_is_mann_and_whitneys():
    a, b = [12, 9, 14, 11, 9], [3, 9, 0, 4]
    found = mann_whitney(a, b)
    assert found.u == mannwhitneyu(a, b).statistic and found.p == mannwhitneyu(a, b).pvalue
    above = np.mean([(x > y) + (x == y) / 2 for x in a for y in b])
    assert found.superiority == pytest.approx(above)
    assert mann_whitney([1], [1]) is None and mann_whitney([], [1]) is None
