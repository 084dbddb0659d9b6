import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from sklearn.mixture import GaussianMixture

from sae_runner.config import config_dir
from sae_runner.evaluators import EVALUATORS
from sae_runner.evaluators._mixture import bic_of_one, otsu, two_gaussians
from sae_runner.evaluators._strongest import Strongest
from sae_runner.evaluators.ultra_low_density import is_apart

CFG = {
    "type": "ultra_low_density", "mode": "gmm", "n_top": 20, "dense_log10_freq": -1.0,
    "dense_log10_top": -0.7, "rare_freq": 0.02, "n_pairs": 500, "active_eps": 0.0,
}  # fmt: skip
N_ROWS = 200


def planted_heaps(n_low=900, n_high=100, seed=0):
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.normal(-2, 0.1, n_low), rng.normal(0, 0.2, n_high)])


def planted(seed=0):
    """90 rare weak latents of one encoder direction and 10 frequent strong ones."""
    rng = np.random.default_rng(seed)
    y = planted_heaps(90, 10, seed)
    f = np.zeros((N_ROWS, 100), dtype=np.float32)
    for j in range(100):
        rows = rng.choice(np.arange(1, N_ROWS), 2 if j < 90 else 150, replace=False)
        f[rows, j] = 10 ** y[j]
    f[0, :60] = 10 ** y[:60]  # One row in which most of the cluster fires.
    W = torch.cat([torch.ones(90, 12), torch.eye(12)[:10]])
    return f, W, y


def test_planted_heaps_are_found():
    y = planted_heaps()
    mixture = two_gaussians(y)
    assert mixture.ashman_d == pytest.approx(12.6, abs=0.6)
    assert mixture.weights == pytest.approx([0.9, 0.1], abs=1e-6)
    assert mixture.means == pytest.approx([-2, 0], abs=0.06)
    assert int((mixture.posterior_low(y) > 0.5).sum()) == 900
    assert mixture.bic(1000) < bic_of_one(y) - 10


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("gap", [0.8, 1.5, 4.0])
def test_the_mixture_is_that_of_scikit_learn(gap):
    rng = np.random.default_rng(1)
    y = np.concatenate([rng.normal(0, 0.5, 700), rng.normal(gap, 0.2, 300)])
    above = otsu(y)
    parts = [y[~above], y[above]]
    theirs = GaussianMixture(
        2, tol=1e-12, max_iter=200, reg_covar=0,
        weights_init=[len(part) / len(y) for part in parts],
        means_init=[[part.mean()] for part in parts],
        precisions_init=[[[1 / part.var()]] for part in parts],
    )  # fmt: skip
    theirs.fit(y[:, None])
    ours, order = two_gaussians(y), np.argsort(theirs.means_[:, 0])
    assert ours.means == pytest.approx(theirs.means_[order, 0], abs=1e-3)
    assert ours.weights == pytest.approx(theirs.weights_[order], abs=1e-3)
    assert ours.variances == pytest.approx(theirs.covariances_[order, 0, 0], abs=1e-3)
    assert ours.bic(len(y)) == pytest.approx(theirs.bic(y[:, None]), abs=0.05)
    shares = theirs.predict_proba(y[:, None])[:, order[0]]
    assert ours.posterior_low(y) == pytest.approx(shares, abs=5e-3)
    one = GaussianMixture(1, reg_covar=0).fit(y[:, None])
    assert bic_of_one(y) == pytest.approx(one.bic(y[:, None]), rel=1e-9)


def test_the_mixture_does_not_depend_on_the_order_and_equal_values_have_none():
    y = planted_heaps(50, 20)
    shuffled = two_gaussians(np.random.default_rng(3).permutation(y))
    assert shuffled.means == pytest.approx(two_gaussians(y).means, rel=1e-9)
    assert two_gaussians(np.ones(5)) is None and two_gaussians(np.ones(1)) is None
    assert two_gaussians(np.full(1000, 0.1)) is None  # Whatever their sums are rounded to.
    assert otsu(np.array([3.0, 1.0, 1.1, 3.1])).tolist() == [True, False, False, True]
    two = two_gaussians(np.array([0.0, 1.0, 0.0]))  # No spread: the floor holds.
    assert two.variances.tolist() == [1e-4, 1e-4]


def test_a_planted_cluster(measure):
    f, W, _ = planted()
    found = measure(CFG, torch.ones(N_ROWS, 12), latents=f, W_dec=W, batch=7)
    uld, dense = found.metrics["uld"], found.metrics["dense"]
    assert (uld["present"], uld["n"], uld["frac"]) == (1, 90, 0.9)
    assert (dense["n"], dense["frac"]) == (10, pytest.approx(0.1))
    assert found.per_latent["uld"].tolist() == [True] * 90 + [False] * 10
    freq = (f > 0).mean(0)
    assert uld["mean_log10_freq"] == pytest.approx(np.log10(freq[:90]).mean())
    assert dense["mean_log10_freq"] == pytest.approx(np.log10(freq[90:]).mean())
    assert uld["enc_cos_within"] == pytest.approx(1, abs=1e-6)
    assert uld["enc_pc1_share"] == pytest.approx(1, abs=1e-6)
    assert dense["enc_cos_within"] == pytest.approx(0, abs=1e-7)
    assert dense["dec_pc1_share"] == pytest.approx(0.1)
    assert uld["enc_cos_between"] == pytest.approx(12**-0.5, abs=1e-6)
    assert (uld["max_l0"], uld["max_l0_example"]) == (60, 0)
    assert uld["max_l0_frac"] == 0.6
    assert uld["frac_active_at_max"] == pytest.approx(60 / 90)
    decades = found.series["enc_cos_by_decade"]
    assert decades["decade"] == [-2, -1] and decades["n_latents"] == [90, 10]
    assert decades["mean"] == pytest.approx([1, 0], abs=1e-6)
    assert [sum(counts) for counts in decades["counts"]] == [500, 500]


def test_one_heap_is_no_cluster_and_neither_is_one_that_fires_more_often(measure):
    rng = np.random.default_rng(2)
    f = np.zeros((N_ROWS, 100), dtype=np.float32)
    f[:50] = 10 ** rng.normal(0, 0.2, 100)
    one = measure(CFG, torch.ones(N_ROWS, 12), latents=f, W_dec=torch.ones(100, 12))
    assert one.metrics["uld"]["present"] == one.metrics["uld"]["n"] == 0
    assert one.metrics["uld"]["enc_cos_within"] is None
    f, W, y = planted()
    f[:] = 10**y  # The weak heap fires always,
    f[2:, 90:] = 0  # the strong one hardly ever.
    found = measure(CFG, torch.ones(N_ROWS, 12), latents=f, W_dec=W).metrics["uld"]
    assert found["present"] == 0 and found["ashman_d"] > 2


def test_heaps_that_are_no_two():
    rng = np.random.default_rng(7)
    skewed = rng.exponential(1, 2000)
    mixture = two_gaussians(skewed)
    assert mixture.bic(2000) < bic_of_one(skewed) - 10 and mixture.ashman_d < 2
    assert not is_apart(mixture, skewed)
    some_far_off = np.concatenate([rng.normal(0, 0.1, 1000), rng.normal(3, 0.1, 5)])
    assert two_gaussians(some_far_off).ashman_d > 2
    assert not is_apart(two_gaussians(some_far_off), some_far_off)
    even = np.linspace(0, 1, 30)  # Its halves are far apart in their widths, and no better.
    assert two_gaussians(even).ashman_d > 2 and not is_apart(two_gaussians(even), even)
    assert is_apart(two_gaussians(planted_heaps()), planted_heaps())


def test_members_by_thresholds_and_by_frequency(measure):
    f = np.zeros((100, 4), dtype=np.float32)
    for j, (n, size) in enumerate([(50, 1.0), (50, 0.1), (5, 1.0), (1, 0.1)]):
        f[:n, j] = size
    run = {"latents": f, "W_dec": torch.eye(4)}
    found = measure({**CFG, "mode": "thresholds"}, torch.ones(100, 4), **run)
    assert found.per_latent["uld"].tolist() == [False, True, True, True]
    found = measure({**CFG, "mode": "frequency"}, torch.ones(100, 4), **run)
    assert found.per_latent["uld"].tolist() == [False, False, False, True]
    assert found.metrics["uld"]["present"] == 1


def test_top_means_are_those_of_dense_numpy(measure):
    rng = np.random.default_rng(4)
    f = ((rng.random((300, 9)) < 0.3) * rng.exponential(1, (300, 9))).astype(np.float32)
    f[:, 7] = 0
    f[4:, 8] = 0  # Four values at most.
    f[:4, 8] = 0.5, 0, 0.25, 0.75
    found = measure({**CFG, "n_top": 5}, torch.ones(300, 2), latents=f, batch=11)
    wanted = np.sort(f.astype(np.float64), axis=0)[-5:].mean(0)
    wanted[8] = 0.5
    np.testing.assert_allclose(found.per_latent["top_mean"], wanted, rtol=1e-12)
    assert not found.per_latent["uld"][7]


def test_the_strongest_of_one_batch_in_which_a_latent_comes_often():
    keeper, rng = Strongest(3, 4), np.random.default_rng(5)
    values = torch.from_numpy(rng.random(60).astype(np.float32))
    latent = torch.from_numpy(rng.integers(0, 2, 60))
    keeper.add(latent[:50], values[:50])
    keeper.add(latent[50:], values[50:])
    for j in range(2):
        assert torch.equal(keeper.values[j], values[latent == j].sort(descending=True).values[:4])
    assert keeper.values[2].tolist() == [0] * 4
    at_once = Strongest(3, 4)
    at_once.add(latent, values)
    assert torch.equal(at_once.values, keeper.values)


@pytest.mark.parametrize("batch", [1, 7, N_ROWS])
def test_batches_and_order_do_not_matter(measure, batch):
    f, W, _ = planted(1)
    f[5] = f[0]  # An equal maximum: the first example counts.
    x, order = torch.ones(N_ROWS, 12), np.random.default_rng(6).permutation(N_ROWS)
    whole = measure(CFG, x, latents=f, W_dec=W)
    split = measure(CFG, x, latents=f, W_dec=W, batch=batch, order=torch.from_numpy(order))
    assert split.metrics == whole.metrics and split.series == whole.series
    assert whole.metrics["uld"]["max_l0_example"] == 0


def test_no_rows_and_no_latent_that_fired_are_nulls_with_notes(measure):
    for n in (0, 5):
        found = measure(CFG, torch.ones(n, 2), latents=torch.zeros(n, 4))
        uld = found.metrics["uld"]
        assert uld["present"] == uld["n"] == 0
        assert uld["ashman_d"] is uld["frac"] is uld["max_l0_example"] is None
        assert uld["max_l0"] == (0 if n else None)


def test_the_yaml_has_every_option():
    cfg = OmegaConf.load(f"{config_dir()}/evaluators/ultra_low_density.yaml")["ultra_low_density"]
    assert EVALUATORS.build(cfg).n_top == 20
