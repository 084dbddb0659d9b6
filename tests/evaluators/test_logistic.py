"""Many probes at once against one at a time, and against scikit-learn."""

import math

import numpy as np
import pytest
from scipy import sparse
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
from sklearn.model_selection import StratifiedKFold
from sklearn.preprocessing import StandardScaler

from sae_runner.evaluators import _logistic as module
from sae_runner.evaluators._logistic import bce, entropy, fit_full, fit_singles, in_span, pieces

RIDGE = 1e-4
FORMS = {"dense": np.asarray, "float32": np.float32, "sparse": sparse.csr_array}
in_every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def table(n00, n01, n10, n11):
    """z of 0 with n00 false and n01 true examples, z of 1 with n10 and n11."""
    z = np.repeat([0.0, 0.0, 1.0, 1.0], [n00, n01, n10, n11])
    y = np.repeat([False, True, False, True], [n00, n01, n10, n11])
    return z[:, None], y


def drawn(n=400, m=12, seed=0, density=0.3):
    rng = np.random.default_rng(seed)
    x = (rng.random((n, m)) < density) * rng.exponential(1, (n, m)) * rng.uniform(0.01, 100, m)
    y = x[:, 0] + x[:, 1] + rng.normal(0, x[:, 0].std(), n) > np.median(x[:, 0] + x[:, 1])
    return x, y


def objective(theta, z, y, ridge):
    logit = theta[0] * z + theta[1]
    return np.mean(np.logaddexp(0, logit) - y * logit) + ridge * theta[0] ** 2 / 2


@in_every_form
def test_the_table_of_the_definition(form):
    z, y = table(40, 10, 10, 40)
    z = form(z)
    found = fit_singles(z, y, RIDGE)
    assert found.loss[0] == pytest.approx(0.5004025, abs=1e-7)
    assert found.w[0] == pytest.approx(2.7709, abs=5e-5)
    assert found.b[0] == pytest.approx(-1.3854, abs=5e-5)
    plain = fit_singles(z, y, 1e-12)
    assert plain.loss[0] == pytest.approx(entropy(np.array([True] + [False] * 4)), abs=1e-9)
    assert plain.w[0] == pytest.approx(math.log(16), abs=1e-6)
    assert plain.b[0] == pytest.approx(-math.log(4), abs=1e-6)


@in_every_form
def test_independent_and_separable_columns(form):
    z, y = table(25, 25, 25, 25)
    assert fit_singles(form(z), y, RIDGE).loss[0] == pytest.approx(math.log(2), abs=1e-12)
    z, y = table(50, 0, 0, 50)
    found = fit_singles(form(z), y, RIDGE)
    assert found.loss[0] == pytest.approx(0.000723, abs=5e-7)
    assert np.isfinite(found.w).all()


@pytest.mark.parametrize("form", [np.asarray, sparse.csr_array])
def test_every_probe_is_the_minimum_that_another_optimiser_finds(form):
    x, y = drawn()
    found = fit_singles(form(x), y, RIDGE)
    for j in range(x.shape[1]):
        z = (x[:, j] - x[:, j].mean()) / x[:, j].std()
        best = minimize(objective, [0, 0], (z, y, RIDGE), tol=1e-14)
        w, b = best.x[0] / x[:, j].std(), best.x[1] - best.x[0] * x[:, j].mean() / x[:, j].std()
        assert found.w[j] == pytest.approx(w, rel=1e-3, abs=1e-5 / x[:, j].std())
        assert found.b[j] == pytest.approx(b, rel=1e-3, abs=1e-5)
        assert found.loss[j] == pytest.approx(objective(best.x, z, y, 0), abs=1e-7)
        assert bce(found.w[j] * x[:, j] + found.b[j], y) == pytest.approx(found.loss[j], rel=1e-12)


@in_every_form
def test_a_probe_is_scikit_learns_logistic_regression_with_the_same_ridge(form):
    x, y = drawn(seed=1)
    found = fit_singles(form(x), y, 0.01)
    for j in range(4):
        sd = x[:, j].std()
        theirs = LogisticRegression(C=1 / (len(y) * 0.01), tol=1e-10).fit(x[:, [j]] / sd, y)
        assert found.w[j] * sd == pytest.approx(theirs.coef_[0, 0], rel=1e-4)
        assert found.b[j] == pytest.approx(theirs.intercept_[0], rel=1e-4, abs=1e-6)


@in_every_form
def test_all_at_once_is_some_at_a_time(form, monkeypatch):
    x, y = drawn(seed=11, m=25)
    x[:, [4, 9]] = 0
    together = fit_singles(form(x), y, RIDGE)
    monkeypatch.setattr(module, "AT_ONCE", 900)  # Two dense columns, several sparse ones.
    for found, wanted in zip(fit_singles(form(x), y, RIDGE), together, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-9)


def test_pieces_hold_as_much_as_they_may_and_one_column_at_least(monkeypatch):
    monkeypatch.setattr(module, "AT_ONCE", 10)
    assert list(pieces(np.cumsum([4, 6, 1, 0, 9, 1, 30, 2, 0]))) == [
        (0, 2), (2, 5), (5, 6), (6, 7), (7, 9)
    ]  # fmt: skip
    assert list(pieces(np.zeros(3))) == [(0, 3)]


def test_all_at_once_is_one_at_a_time_and_sparse_is_dense():
    x, y = drawn(seed=2)
    together = fit_singles(sparse.csr_array(x), y, RIDGE)
    for j in range(x.shape[1]):
        alone = fit_singles(x[:, [j]], y, RIDGE)
        assert alone.w[0] == pytest.approx(together.w[j], rel=1e-3)
        assert alone.loss[0] == pytest.approx(together.loss[j], abs=1e-7)
    shifted = fit_singles(x + 1000.0, y, RIDGE)  # No zero is left, and the mean is far off.
    np.testing.assert_allclose(shifted.loss, together.loss, rtol=1e-7)


@pytest.mark.parametrize("form", [np.asarray, sparse.csr_array])
def test_constant_and_empty_columns_have_the_loss_of_the_base_rate(form):
    x, y = drawn(seed=3)
    x[:, 2], x[:, 5] = 0.0, 3.0
    y[:300] = False
    found = fit_singles(form(x), y, RIDGE)
    assert found.constant.nonzero()[0].tolist() == [2, 5]
    for j in (2, 5):
        assert found.loss[j] == pytest.approx(entropy(y)) and found.w[j] == 0
        assert found.b[j] == pytest.approx(math.log(y.mean() / (1 - y.mean())))
    assert found.loss[0] < entropy(y)
    none = fit_singles(np.zeros((400, 3)), y, RIDGE)
    assert none.constant.all() and none.loss.tolist() == [pytest.approx(entropy(y))] * 3


@pytest.mark.parametrize("form", [np.asarray, sparse.csr_array])
def test_steps_that_are_too_long_are_halved(form, monkeypatch):
    x, y = drawn(seed=8)
    wanted = fit_singles(form(x), y, 0.5)
    kind = module._Standardised if form is sparse.csr_array else module._Dense
    whole = kind.derivatives

    def flat(self, w, b):  # Curvatures a third of what they are: steps three times as long.
        by_w, by_b, ww, wb, bb = whole(self, w, b)
        return by_w, by_b, ww / 3 - 0.5 * 2 / 3, wb / 3, bb / 3

    monkeypatch.setattr(kind, "derivatives", flat)
    found = fit_singles(form(x), y, 0.5)
    np.testing.assert_allclose(found.loss, wanted.loss, atol=1e-4)
    np.testing.assert_allclose(found.w * x.std(0), wanted.w * x.std(0), atol=0.01)


def test_entropy():
    assert entropy(np.array([True, False])) == pytest.approx(math.log(2))
    assert entropy(np.array([True, True])) == 0
    assert entropy(np.arange(5) == 0) == pytest.approx(0.500402, abs=1e-6)


def test_the_full_probe_is_scikit_learns_with_the_c_that_cross_validation_finds():
    x, y = drawn(300, 10, seed=4, density=1.0)
    test = drawn(50, 10, seed=5, density=1.0)[0]
    strengths = [1e-4, 1e-2, 1.0, 100.0]
    found = fit_full(x, y, test, strengths=strengths, n_folds=5, seed=0)
    scaler = StandardScaler().fit(x)
    theirs = LogisticRegressionCV(
        Cs=strengths, cv=StratifiedKFold(5, shuffle=True, random_state=0), scoring="neg_log_loss",
        max_iter=1000,
    ).fit(scaler.transform(x), y)  # fmt: skip
    assert found.converged and found.strength == pytest.approx(float(np.ravel(theirs.C_)[0]))
    np.testing.assert_allclose(
        found.logit, theirs.decision_function(scaler.transform(test)), rtol=0, atol=0.05
    )


def test_wide_features_give_the_same_fit_in_the_space_that_the_examples_span(monkeypatch):
    x, y = drawn(60, 300, seed=12, density=1.0)
    test = drawn(20, 300, seed=13, density=1.0)[0]
    x[:, 3] = test[:, 3] = 2.0  # A constant column stays out of it.
    monkeypatch.setattr(module, "AT_ONCE", 1000)
    inside, test_inside = in_span(x.astype(np.float32), test.astype(np.float32))
    assert inside.shape == (60, 60) and test_inside.shape == (20, 60)
    scaler = StandardScaler().fit(x)
    z, z_test = scaler.transform(x), scaler.transform(test)
    np.testing.assert_allclose(inside @ inside.T, z @ z.T, atol=1e-4)
    np.testing.assert_allclose(test_inside @ inside.T, z_test @ z.T, atol=1e-4)
    found = fit_full(x, y, test, strengths=[0.01], n_folds=3, seed=0)
    theirs = LogisticRegression(C=0.01, tol=1e-8, max_iter=1000).fit(z, y)
    np.testing.assert_allclose(found.logit, theirs.decision_function(z_test), atol=2e-3)
    assert found.logit.std() > 0.1


def test_a_sparse_full_probe_stays_sparse_and_is_the_dense_one_without_centring():
    x, y = drawn(300, 10, seed=6)
    one = fit_full(sparse.csr_array(x), y, sparse.csr_array(x), strengths=[1.0], n_folds=5, seed=0)
    scaled = x / x.std(0)
    theirs = LogisticRegression(C=1.0, max_iter=1000).fit(scaled, y)
    np.testing.assert_allclose(one.logit, theirs.decision_function(scaled), rtol=1e-3, atol=1e-3)


def test_a_full_probe_on_hardly_any_zeros_is_that_of_a_dense_array():
    x, y = drawn(300, 10, seed=9, density=0.9)
    options = {"strengths": [0.1, 1.0], "n_folds": 3, "seed": 0}
    wanted = fit_full(x, y, x, **options)
    found = fit_full(sparse.csr_array(x), y, sparse.csr_array(x), **options)
    np.testing.assert_array_equal(found.logit, wanted.logit)


def test_larger_strengths_are_not_tried_once_the_loss_rises(monkeypatch):
    tried = set()
    whole = module._decided

    def spied(model, *given):
        tried.add(model.C)
        return whole(model, *given)

    monkeypatch.setattr(module, "_decided", spied)
    rng = np.random.default_rng(10)
    x, y = rng.normal(size=(100, 40)), rng.random(100) < 0.5
    fit_full(x, y, x, strengths=[1e-4, 1e-1, 10.0], n_folds=5, seed=0)
    assert tried == {1e-4, 1e-1}


def test_the_full_probe_of_noise_chooses_the_strongest_ridge():
    rng = np.random.default_rng(7)
    x, y = rng.normal(size=(100, 40)), rng.random(100) < 0.5
    assert fit_full(x, y, x, strengths=[10.0, 1e-4], n_folds=5, seed=0).strength == 1e-4
