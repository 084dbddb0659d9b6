import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from sae_runner.config import config_dir
from sae_runner.evaluators import EVALUATORS

CFG = {"type": "density", "active_eps": 0.0}


def planted(n, probabilities, seed=0):
    """Bernoulli(p_j) latents of exponential size."""
    rng = np.random.default_rng(seed)
    active = rng.random((n, len(probabilities))) < np.asarray(probabilities)
    return (active * rng.exponential(1, active.shape)).astype(np.float32)


def test_frequencies_and_sizes_are_those_of_dense_numpy(measure):
    f = planted(3000, [0.9, 0.3, 0.05, 0.002, 0.0])
    found = measure(CFG, torch.ones(3000, 2), latents=f, batch=7)
    columns = found.per_latent
    np.testing.assert_array_equal(columns["n_fired"], (f > 0).sum(0))
    np.testing.assert_array_equal(columns["freq"], (f > 0).mean(0))
    np.testing.assert_array_equal(columns["max_act"], f.max(0))
    fired = (f > 0).any(0)
    wanted = np.where(fired, f.sum(0, dtype=np.float64) / (f > 0).sum(0).clip(1), 0)
    np.testing.assert_allclose(columns["mean_act_when_active"], wanted, rtol=1e-12)


def test_planted_frequencies_are_recovered(measure):
    p, n = np.array([0.5, 0.2, 0.01, 0.001]), 20_000
    found = measure(CFG, torch.ones(n, 1), latents=planted(n, p, seed=1), batch=4096)
    assert (np.abs(found.per_latent["freq"] - p) < 5 * np.sqrt(p / n)).all()


def test_shares_of_latents(measure):
    n = 1000
    f = np.zeros((n, 10), dtype=np.float32)
    for j, n_fired in enumerate([0, 0, 0, 1, 9, 10, 11, 100, 101, 1000]):
        f[:n_fired, j] = 2.0
    found = measure(CFG, torch.ones(n, 1), latents=f)
    metrics = found.metrics["density"]
    assert metrics["n_tokens"] == n
    assert metrics["dead_frac"] == pytest.approx(0.3)
    assert metrics["alive_frac"] == pytest.approx(0.7)
    assert metrics["dead_upper_bound"] == pytest.approx(0.003)
    assert metrics["frac_below_1e-4"] == pytest.approx(0.3)  # Dead ones are below too.
    assert metrics["frac_above_1e-2"] == pytest.approx(0.4)  # 10 of 1000 is not above 1e-2.
    assert metrics["frac_above_1e-1"] == pytest.approx(0.2)
    log10 = np.log10(np.array([1, 9, 10, 11, 100, 101, 1000]) / n)
    assert metrics["log10_freq_mean"] == pytest.approx(log10.mean())
    assert metrics["log10_freq_median"] == pytest.approx(log10[3])


def test_each_threshold_below_and_above(measure):
    n = 1_100_000
    f = torch.zeros(n, 4)
    for j, n_fired in enumerate([1, 3, 40, 400]):  # 9e-7, 3e-6, 4e-5, 4e-4
        f[:n_fired, j] = 1.0
    metrics = measure(CFG, torch.ones(n, 1), latents=f).metrics["density"]
    below = [metrics[f"frac_below_{edge}"] for edge in ("1e-6", "1e-5", "1e-4")]
    assert below == [0.25, 0.5, 0.75]
    assert metrics["frac_above_1e-2"] == 0


def test_histogram_counts_every_latent_once_and_dead_ones_apart(measure):
    f = planted(5000, [0.0] * 3 + [0.5, 0.1, 0.02, 0.001, 1.0], seed=2)
    found = measure(CFG, torch.ones(5000, 1), latents=f)
    histogram = found.series["log10_hist"]
    assert histogram["n_dead"] == int((f > 0).sum(0).__eq__(0).sum()) >= 3
    assert sum(histogram["counts"]) + histogram["n_dead"] == 8
    np.testing.assert_allclose(histogram["edges"], np.linspace(-8, 0, 81))
    assert histogram["counts"][-1] == 1  # The latent that always fires: log10 freq = 0.
    half = np.log10((f[:, 3] > 0).mean())
    bin_of_half = int((half + 8) / 0.1)
    assert histogram["counts"][bin_of_half] == 1


def test_l0_is_the_sum_of_the_frequencies(measure):
    f = planted(999, np.linspace(0, 0.5, 50), seed=3)
    freq = measure(CFG, torch.ones(999, 4), latents=f).per_latent["freq"]
    sparsity = {"type": "sparsity", "active_eps": 0.0, "n_bootstrap": 0}
    l0 = measure(sparsity, torch.ones(999, 4), latents=f).metrics["sparsity"]["l0"]
    assert freq.sum() == pytest.approx(l0, rel=1e-14)


def test_active_eps_decides_what_is_active_for_signed_latents_too(measure):
    f = np.array([[0.5, -2.0], [0.1, 0.3], [0.0, 0.0]], dtype=np.float32)
    found = measure({**CFG, "active_eps": 0.2}, torch.ones(3, 1), latents=f).per_latent
    assert found["n_fired"].tolist() == [1, 2]
    np.testing.assert_allclose(found["mean_act_when_active"], [0.5, 1.15])
    assert found["max_act"].tolist() == [0.5, 2.0]


@pytest.mark.parametrize("batch", [1, 7, 400])
def test_batches_and_order_do_not_matter(measure, batch):
    f = planted(400, [0.3, 0.02, 0.0, 0.7], seed=4)
    whole = measure(CFG, torch.ones(400, 2), latents=f)
    order = np.random.default_rng(5).permutation(400)
    split = measure(CFG, torch.ones(400, 2), latents=f, batch=batch, order=order)
    assert split.metrics == whole.metrics
    assert split.series == whole.series
    for name, column in whole.per_latent.items():
        np.testing.assert_allclose(split.per_latent[name], column, rtol=1e-14)


def test_all_dead_and_no_rows_are_nulls_with_notes(measure):
    dead = measure(CFG, torch.ones(5, 2), latents=torch.zeros(5, 4))
    assert dead.metrics["density"]["dead_frac"] == 1
    assert dead.metrics["density"]["log10_freq_mean"] is None
    assert {note.code for note in dead.notes} == {"dead_feature"}
    empty = measure(CFG, torch.ones(0, 2), latents=torch.zeros(0, 4))
    assert empty.metrics["density"]["n_tokens"] == 0
    assert empty.metrics["density"]["dead_frac"] is None


def test_latents_that_are_not_finite_are_told(measure):
    f = torch.tensor([[1.0, torch.nan], [torch.inf, 0.0]])
    found = measure(CFG, torch.ones(2, 1), latents=f)
    assert found.per_latent["n_fired"].tolist() == [1, 0]
    assert any("2 latent values are not finite" in note.detail for note in found.notes)


def test_the_yaml_has_every_option():
    cfg = OmegaConf.load(f"{config_dir()}/evaluators/density.yaml")["density"]
    assert EVALUATORS.build(cfg).active_eps == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_rows_on_a_gpu(measure):
    f, x = planted(300, [0.3, 0.02, 0.0, 0.7]), torch.randn(300, 4)
    ids, position = np.repeat(np.arange(100), 3), np.tile(np.arange(3), 100)
    run = {"latents": f, "example_id": ids, "position": position, "has_cls": True, "n_prefix": 1}
    here, there = (measure(CFG, x, **run, batch=64, device=device) for device in ("cpu", "cuda"))
    assert there.metrics["density"] == pytest.approx(here.metrics["density"], rel=1e-12)
