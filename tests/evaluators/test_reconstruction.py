from itertools import pairwise

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from sae_runner.config import config_dir
from sae_runner.evaluators import EVALUATORS
from sae_runner.evaluators import reconstruction as module

CFG = {"type": "reconstruction", "n_bootstrap": 0}
X = [[3.0, 0.0], [1.0, 0.0], [2.0, 2.0], [2.0, -2.0]]
X_HAT = [[3.0, 0.0], [2.0, 0.0], [2.5, 1.0], [2.5, -1.0]]


def random_rows(n=500, d=6, seed=0):
    """Rows far from the origin, and reconstructions with a bias and rows of zeros."""
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=(n, d)) * np.arange(1, d + 1) + 10 * rng.normal(size=d)).astype("f4")
    x_hat = (0.8 * x + rng.normal(size=(n, d)) + 0.5).astype("f4")
    x_hat[::50] = 0
    return x, x_hat


def dense(x, x_hat, mean=None):
    """Every metric by its definition, on whole arrays."""
    x, x_hat = np.asarray(x, np.float64), np.asarray(x_hat, np.float64)
    r, mean = x - x_hat, x.mean(0) if mean is None else np.asarray(mean, np.float64)
    r2, norm, norm_hat = (r**2).sum(1), np.linalg.norm(x, axis=1), np.linalg.norm(x_hat, axis=1)
    off_mean = ((x - x.mean(0)) ** 2).sum(1)
    with np.errstate(invalid="ignore"):
        cosine = np.nan_to_num((x * x_hat).sum(1) / (norm * norm_hat))
    return {
        "mse": (r**2).mean(),
        "mse_sum": r2.mean(),
        "mse_hugofry": (r2 / norm).mean() / x.shape[1],
        "nmse_uncentred": (r2 / norm**2).mean(),
        "explained_variance": 1 - r2.sum() / off_mean.sum(),
        "fvu": r2.sum() / off_mean.sum(),
        "explained_variance_per_token": 1 - (r2 / ((x - mean) ** 2).sum(1)).mean(),
        "explained_variance_residcentred": 1 - r.var(0).sum() / x.var(0).sum(),
        "explained_variance_uncentred_per_token": 1 - (r2 / norm**2).mean(),
        "cosine": cosine.mean(),
        "l2_norm_in": norm.mean(),
        "l2_norm_out": norm_hat.mean(),
        "l2_ratio": (norm_hat / norm).mean(),
        "relative_reconstruction_bias": (x_hat**2).sum() / (x * x_hat).sum(),
        "zero_norm_skipped": 0,
        "per_token_skipped": 0,
    }


@pytest.mark.parametrize("mean", [None, torch.tensor([2.0, 0.0])])
def test_known_answers(measure, mean):
    found = measure(CFG, X, X_HAT, mean=mean).metrics["reconstruction"]
    known = {
        "mse": 0.4375, "mse_sum": 0.875, "mse_hugofry": 0.235485, "explained_variance": 0.65,
        "fvu": 0.35, "explained_variance_per_token": 0.59375,
        "explained_variance_residcentred": 0.75, "cosine": 0.959573, "l2_ratio": 1.225986,
        "explained_variance_uncentred_per_token": 0.671875, "relative_reconstruction_bias": 1.1,
        "nmse_uncentred": 1 - 0.671875,
    }  # fmt: skip
    assert {name: found[name] for name in known} == pytest.approx(known, abs=5e-7)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("batch", [1, 7, 500])
def test_every_metric_is_that_of_dense_numpy(measure, batch, given):
    x, x_hat = random_rows()
    mean = torch.from_numpy(x.astype(np.float64).mean(0)) if given else None
    order = np.random.default_rng(1).permutation(500)
    found = measure(CFG, x, x_hat, mean=mean, batch=batch, order=order)
    assert found.metrics["reconstruction"] == pytest.approx(dense(x, x_hat), rel=1e-10)
    assert not found.notes


def test_identity_reconstructs_everything(measure):
    x, _ = random_rows()
    found = measure(CFG, x, x).metrics["reconstruction"]
    ones = [name for name in found if name.startswith("explained_variance")]
    assert len(ones) == 4
    for name in [*ones, "cosine", "l2_ratio", "relative_reconstruction_bias"]:
        assert found[name] == pytest.approx(1, rel=1e-14)
    assert found["mse"] == found["fvu"] == 0


def test_mean_and_zero_reconstructions(measure):
    x, _ = random_rows()
    mean = x.astype(np.float64).mean(0)
    # Doubles: rounded to float32, the mean would be off by 1e-7.
    predicts_mean = measure(CFG, x.astype(np.float64), np.tile(mean, (500, 1)))
    found = predicts_mean.metrics["reconstruction"]
    assert found["explained_variance"] == pytest.approx(0, abs=1e-12)
    assert found["explained_variance_residcentred"] == pytest.approx(0, abs=1e-12)
    zero = measure(CFG, x, np.zeros_like(x))
    found = zero.metrics["reconstruction"]
    assert found["explained_variance_uncentred_per_token"] == 0
    spread = ((x.astype(np.float64) - mean) ** 2).sum()
    assert found["explained_variance"] == pytest.approx(-500 * (mean**2).sum() / spread)
    assert found["cosine"] == found["l2_ratio"] == 0
    assert found["relative_reconstruction_bias"] is None


def test_shrinkage(measure):
    x, _ = random_rows()
    found = measure(CFG, x.astype("f8"), 0.9 * x.astype("f8")).metrics["reconstruction"]
    for name, value in (("cosine", 1), ("l2_ratio", 0.9), ("relative_reconstruction_bias", 0.9)):
        assert found[name] == pytest.approx(value, rel=1e-12)
    against = measure(CFG, x, -x).metrics["reconstruction"]
    assert against["cosine"] == pytest.approx(-1)
    assert against["relative_reconstruction_bias"] is None


def test_a_large_mean_takes_no_digits(measure):
    rng = np.random.default_rng(3)
    x = rng.normal(size=(400, 5)) + 1e6
    x_hat = x + 0.1 * rng.normal(size=(400, 5))
    found = measure(CFG, x, x_hat, batch=16).metrics["reconstruction"]
    wanted = 1 - ((x - x_hat) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
    assert found["explained_variance"] == pytest.approx(wanted, rel=1e-9)


def test_rows_of_zeros_are_skipped_and_counted(measure):
    x = np.array([[0.0, 0.0], [3.0, 4.0], [6.0, 8.0]])
    x_hat = np.array([[1.0, 0.0], [3.0, 3.0], [0.0, 0.0]])
    found = measure(CFG, x, x_hat).metrics["reconstruction"]
    assert found["zero_norm_skipped"] == 1
    assert found["mse_sum"] == pytest.approx((1 + 1 + 100) / 3)
    assert found["nmse_uncentred"] == pytest.approx((1 / 25 + 1) / 2)
    assert found["mse_hugofry"] == pytest.approx((1 / 5 + 10) / 2 / 2)
    # The reconstruction of zeros counts as cosine 0, in the mean.
    assert found["cosine"] == pytest.approx(21 / (5 * 18**0.5) / 2)
    assert found["l2_ratio"] == pytest.approx(18**0.5 / 5 / 2)
    assert found["l2_norm_in"] == pytest.approx(5)


def test_rows_on_the_mean_are_skipped_per_token(measure):
    x = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]])
    found = measure(CFG, x, 0.5 * x + 0.1).metrics["reconstruction"]
    assert found["per_token_skipped"] == 1
    r2 = ((0.5 * x - 0.1) ** 2).sum(1)
    assert found["explained_variance_per_token"] == pytest.approx(1 - r2[:2].mean())


@pytest.mark.parametrize(("error", "value"), [(0.0, 1.0), (0.5, 0.0)])
def test_rows_that_do_not_vary(measure, error, value):
    x = np.tile([[300.0, -4.0]], (20, 1))
    found = measure({**CFG, "n_bootstrap": 100}, x, x + error)
    metrics = found.metrics["reconstruction"]
    assert metrics["explained_variance"] == value
    assert metrics["fvu"] == 1 - value
    # A constant error has no variance either.
    assert metrics["explained_variance_residcentred"] == 1
    assert metrics["explained_variance_per_token"] is None
    assert "reconstruction.explained_variance" in {note.metric for note in found.notes}
    assert found.ci.keys() == {"reconstruction.mse", "reconstruction.cosine"}


def test_no_rows_and_values_that_are_not_finite_are_nulls_with_notes(measure):
    cfg = {**CFG, "n_bootstrap": 100}
    empty = measure(cfg, torch.ones(0, 2)).metrics["reconstruction"]
    counts = {"zero_norm_skipped", "per_token_skipped"}
    assert {empty[name] for name in empty.keys() - counts} == {None}
    x, x_hat = random_rows(50)
    x_hat[3, 2] = np.nan
    diverged = measure(cfg, x, x_hat).metrics["reconstruction"]
    assert {name for name in diverged if diverged[name] is not None} == {"l2_norm_in", *counts}
    x[7, 0] = np.inf
    assert measure(cfg, x, x_hat).metrics["reconstruction"]["explained_variance"] is None


def test_rows_beyond_what_can_be_kept_need_the_mean_beforehand(measure, monkeypatch):
    x, x_hat = random_rows()
    monkeypatch.setattr(module, "KEPT_BYTES", 400 * 6 * 4)
    cfg = {**CFG, "n_bootstrap": 100}
    found = measure(cfg, x, x_hat, batch=50)
    assert found.metrics["reconstruction"]["explained_variance_per_token"] is None
    assert found.metrics["reconstruction"]["fvu"] == pytest.approx(dense(x, x_hat)["fvu"])
    assert not found.series
    assert "reconstruction.fvu" not in found.ci
    given = measure(cfg, x, x_hat, batch=50, mean=torch.from_numpy(x.mean(0)))
    assert given.metrics["reconstruction"]["explained_variance_per_token"] is not None
    assert given.series


def test_a_mean_of_other_rows_is_used_and_told(measure):
    x, x_hat = random_rows()
    mean = x.mean(0) + 0.5
    cfg = {**CFG, "n_bootstrap": 2000}
    found = measure(cfg, x, x_hat, mean=torch.from_numpy(mean))
    wanted = dense(x, x_hat, mean)
    assert wanted["explained_variance_per_token"] != pytest.approx(
        dense(x, x_hat)["explained_variance_per_token"], rel=1e-3
    )
    assert found.metrics["reconstruction"] == pytest.approx(wanted, rel=1e-10)
    assert [n.metric for n in found.notes] == ["reconstruction.explained_variance_per_token"]
    # The interval is around the number reported, which is of these rows' own mean.
    own = measure(cfg, x, x_hat).ci["reconstruction.fvu"]
    for bound in ("lo", "hi"):
        assert found.ci["reconstruction.fvu"][bound] == pytest.approx(own[bound], rel=0.01)


def test_rounding_of_the_mean_is_not_told(measure):
    x, x_hat = random_rows()
    mean = torch.from_numpy(x.astype(np.float64).mean(0).astype(np.float32))
    assert not measure(CFG, x, x_hat, mean=mean).notes


@pytest.mark.parametrize("batch", [1, 7, 600])
@pytest.mark.parametrize("given", [False, True])
def test_error_by_position(measure, batch, given):
    x, x_hat = random_rows(600)
    position = np.tile([1, 4, 5], 200)
    order = np.random.default_rng(4).permutation(600)
    mean = torch.from_numpy(x.astype(np.float64).mean(0)) if given else None
    found = measure(CFG, x, x_hat, position=position, batch=batch, order=order, mean=mean)
    series = found.series["error_by_position"]
    assert series["position"] == [1, 4, 5]
    assert series["n"] == [200] * 3
    x, x_hat = x.astype(np.float64), x_hat.astype(np.float64)
    r2, spread = ((x - x_hat) ** 2).sum(1), ((x - x.mean(0)) ** 2).sum(1)
    at = [position == p for p in (1, 4, 5)]
    np.testing.assert_allclose(series["fvu"], [r2[i].sum() / spread[i].sum() for i in at])
    np.testing.assert_allclose(series["mse"], [r2[i].mean() / 6 for i in at])


def test_averaged_tokens_have_no_position(measure):
    x, x_hat = random_rows(30)
    found = measure(CFG, x, x_hat, position=np.full(30, -1))
    assert "error_by_position" not in found.series
    mixed = measure(CFG, x, x_hat, position=np.tile([-1, 0, 1], 10))
    assert mixed.series["error_by_position"]["n"] == [10, 10]


def test_error_histogram_counts_every_row_once(measure):
    x, x_hat = random_rows(400)
    x_hat[5] = x[5]
    x_hat[6] = x[6] + 1e4
    x_hat[7] = x[7] * (1 + 1e-6)
    found = measure(CFG, x, x_hat, batch=7)
    histogram = found.series["error_histogram"]
    assert histogram["n_below"] == 2
    assert histogram["n_above"] == 1
    assert sum(histogram["counts"]) == 397
    x, x_hat = x.astype(np.float64), x_hat.astype(np.float64)
    relative = ((x - x_hat) ** 2).sum(1) / ((x - x.mean(0)) ** 2).sum(1)
    inside = np.delete(relative, [5, 6, 7])
    edges = np.asarray(histogram["edges"])
    assert (edges[0], edges[-1]) == (-6, 3)
    wanted = [((inside >= 10**a) & (inside < 10**b)).sum() for a, b in pairwise(edges)]
    assert histogram["counts"] == wanted


def test_intervals_are_over_examples_and_independent_of_batches(measure):
    rng = np.random.default_rng(5)
    ids = np.sort(rng.integers(0, 60, 900))
    x = rng.normal(size=(900, 4))
    x_hat = x + 0.3 * rng.normal(size=(60, 4))[ids]  # One error for all rows of an example.
    cfg = {**CFG, "n_bootstrap": 3000}
    found = measure(cfg, x, x_hat, example_id=ids)
    x_bar = x.mean(0)
    rows = np.bincount(ids).astype(float)
    error = np.bincount(ids, ((x - x_hat) ** 2).sum(1))
    spread = np.bincount(ids, ((x - x_bar) ** 2).sum(1))
    cosine = (x * x_hat).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(x_hat, axis=1)
    for name, above, below in (
        ("mse", error, 4 * rows), ("fvu", error, spread), ("explained_variance", error, spread),
        ("cosine", np.bincount(ids, cosine), rows),
    ):  # fmt: skip
        residual = above - above.sum() / below.sum() * below
        se = np.sqrt(60 / 59 * (residual**2).sum()) / below.sum()
        interval = found.ci[f"reconstruction.{name}"]
        assert interval["n"] == 60
        assert interval["se"] == pytest.approx(se, rel=0.06)
        value = found.metrics["reconstruction"][name]
        assert interval["lo"] == pytest.approx(value - 1.96 * se, abs=0.4 * se)
        assert interval["hi"] == pytest.approx(value + 1.96 * se, abs=0.4 * se)
    split = measure(cfg, x, x_hat, example_id=ids, batch=7, order=rng.permutation(900))
    for name, interval in found.ci.items():
        assert split.ci[name] == pytest.approx(interval, rel=1e-9)


def test_low_precision_rows_are_summed_in_float64(measure):
    x, x_hat = (torch.from_numpy(a).bfloat16() for a in random_rows())
    found = measure(CFG, x, x_hat, batch=64).metrics["reconstruction"]
    wanted = dense(x.double().numpy(), x_hat.double().numpy())
    assert found == pytest.approx(wanted, rel=1e-10)


def test_the_yaml_has_every_option():
    cfg = OmegaConf.load(f"{config_dir()}/evaluators/reconstruction.yaml")["reconstruction"]
    assert EVALUATORS.build(cfg).n_bootstrap == 1000


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("given", [False, True])
def test_rows_on_a_gpu(measure, given):
    x, x_hat = random_rows()
    mean = torch.from_numpy(x.astype(np.float64).mean(0)) if given else None
    found = measure(CFG, x, x_hat, batch=64, mean=mean, device="cuda", position=np.arange(500) % 3)
    assert found.metrics["reconstruction"] == pytest.approx(dense(x, x_hat), rel=1e-10)
    assert found.series["error_by_position"]["n"] == [167, 167, 166]
