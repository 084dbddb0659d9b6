"""BatchTopK against formulas written a second time, in NumPy and float64."""

import copy

import numpy as np
import pytest
import torch

from sae_runner.errors import ConfigError
from sae_runner.saes.base import TrainState
from sae_runner.saes.batch_topk import Largest, threshold_above, whole

D_IN, D_SAE, K = 5, 12, 2.7
PARTS = {
    "sum": "sse", "mean": "mse", "normalised": "normalised_mse", "row_norm": "mse_by_norm",
}  # fmt: skip


def selected(z: np.ndarray, n: int) -> np.ndarray:
    """The n largest entries of the whole matrix, where positive."""
    kept = np.zeros_like(z)
    rows, latents = np.unravel_index(np.argsort(-z, axis=None)[:n], z.shape)
    kept[rows, latents] = np.maximum(z[rows, latents], 0)
    return kept


def pre_acts(p: dict, x: np.ndarray, sae) -> np.ndarray:
    return (sae.input_scale.item() * x - p["b_dec"]) @ p["W_enc"] + p["b_enc"]


def reference(p: dict, x: np.ndarray, sae) -> dict:
    """The error under every reduction."""
    scaled = sae.input_scale.item() * x
    x_hat = selected(pre_acts(p, x, sae), int(K * len(x))) @ p["W_dec"] + p["b_dec"]
    square = (scaled - x_hat) ** 2
    norms = np.sqrt((scaled**2).sum(1, keepdims=True))
    baseline = sae.mean_baseline_mse.item() if sae.loss_reduction == "normalised" else 1.0
    return {
        "sse": square.mean() * x.shape[1],
        "mse": square.mean(),
        "normalised_mse": square.mean() / baseline,
        "mse_by_norm": (square / norms).mean(),
    }


def parameters(sae) -> dict:
    names = ("W_enc", "W_dec", "b_enc", "b_dec")
    return {name: sae.tensors()[name].double().numpy().copy() for name in names}


@pytest.fixture
def small(make):
    def build(**options):
        return make("batch_topk", D_IN, D_SAE, **{"k": K, **options}).double()

    return build


# -- Training --------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", PARTS)
def test_loss_and_gradient_are_the_formulas(small, rows, reduction):
    sae, x, name = small(loss_reduction=reduction), rows(21, D_IN).double(), PARTS[reduction]
    loss, at = sae.loss(x, TrainState()), parameters(sae)
    assert set(loss.parts) == {name}
    assert loss.total.item() == pytest.approx(reference(at, x.numpy(), sae)[name], rel=1e-12)
    kept = selected(pre_acts(at, x.numpy(), sae), 56)  # ⌊2.7 · 21⌋
    assert loss.fired.tolist() == (kept > 0).sum(0).tolist()
    assert loss.l0.item() == pytest.approx(56 / 21, rel=1e-6)
    assert len(set((kept > 0).sum(1))) > 2  # Rows differ in what they get.
    loss.total.backward()
    for key, values in at.items():
        numeric = np.zeros_like(values)
        for entry in np.ndindex(values.shape):
            step = np.zeros_like(values)
            step[entry] = 1e-6
            numeric[entry] = (
                reference(at | {key: values + step}, x.numpy(), sae)[name]
                - reference(at | {key: values - step}, x.numpy(), sae)[name]
            ) / 2e-6
        gradient = (sae.W_enc_rows.grad.T if key == "W_enc" else getattr(sae, key).grad).numpy()
        assert np.abs(numeric).max() > 1e-4
        np.testing.assert_allclose(gradient, numeric, rtol=1e-5, atol=1e-7, err_msg=key)


def test_training_knows_nothing_of_the_threshold(small, rows):
    sae, x = small(), rows(20, D_IN).double()
    before = sae.loss(x, TrainState())
    with torch.no_grad():
        sae.threshold.fill_(1e6)
    after = sae.loss(x, TrainState())
    assert before.total.item() == after.total.item() and after.l0 > 0
    assert not sae.thresholds(torch.arange(D_SAE)).any()
    assert not sae.encode(x).any()


def test_exactly_so_many_are_chosen_also_among_equals(small, rows):
    sae, x = small(k=2.5), rows(7, D_IN).double()
    with torch.no_grad():
        sae.W_enc_rows.fill_(0.0)
        sae.b_enc.fill_(1.0)
    loss = sae.loss(x, TrainState())
    assert int(loss.fired.sum()) == 17  # ⌊2.5 · 7⌋
    scaled = sae.scaled(x)
    latents = sae.chosen(scaled, sae.centred(scaled), 2.5)
    assert len(latents) == 7 and len(latents.indices) == 17
    assert (latents.dense() != 0).sum() == 17  # No entry twice.


def test_a_tiny_batch_may_choose_nothing(small, rows):
    loss = small(k=0.4).loss(rows(2, D_IN).double(), TrainState())
    assert loss.l0 == 0
    loss.total.backward()


def test_k_comes_down_without_rounding(small, rows):
    sae, x = small(k=2.5, k_start=10, k_anneal=0.5), rows(400, D_IN).double()
    with torch.no_grad():
        sae.b_enc.fill_(100.0)  # All positive: L0 is k.
    l0 = [sae.loss(x, TrainState(progress=p)).l0.item() for p in (0, 0.125, 0.25, 0.5, 0.9)]
    np.testing.assert_allclose(l0, [10, 8.125, 6.25, 2.5, 2.5], rtol=1e-6)


def test_only_positive_ones_fire(small, rows):
    sae, x = small(k=D_SAE), rows(50, D_IN).double()
    z = pre_acts(parameters(sae), x.numpy(), sae)
    assert sae.loss(x, TrainState()).fired.tolist() == (z > 0).sum(0).tolist()


def test_k_and_its_other_name(new):
    sae = new("batch_topk", 8, 24, k=3, target_l0=6.5)
    assert sae.k == 6.5 and sae.config()["k"] == 6.5
    for options, message in (
        ({"k": 24.5}, r"sae\.k=24\.5: must be <= d_sae=24"),
        ({"target_l0": 30}, r"sae\.target_l0=30: must be <= d_sae=24"),
        ({"k": 3, "k_start": 99}, r"sae\.k_start=99: must be <= d_sae=24"),
        ({"target_l0": 3.5, "k_start": 3}, r"sae\.k_start=3: .* must be >= 3\.5"),
        ({"k": 0}, r"sae\.k=0\.?0?: must be > 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            new("batch_topk", 8, 24, **options)


def test_planted_dictionary_is_recovered(new, recovered):
    assert recovered(new("batch_topk", 32, 96, k=4), n_steps=1_200) > 0.95


def test_whole_numbers_are_those_that_are_meant():
    assert [whole(0.29 * 100), whole(0.1 * 3 * 10), whole(2.7 * 21), whole(32.0 * 131_072)] == [
        29, 3, 56, 4_194_304,
    ]  # fmt: skip
    assert int(0.29 * 100) == 28


# -- The threshold ---------------------------------------------------------------------------------


def calibrated(sae, x, sizes, n_rows=None):
    sae = copy.deepcopy(sae)
    found = sae.calibrate(iter(torch.split(x, sizes)), n_rows or len(x))
    return sae, found


@pytest.mark.parametrize("k", [0.5, 2.7, 5])
def test_the_mean_l0_of_the_rows_it_was_measured_on_is_k_to_the_last_entry(small, rows, k):
    x = rows(1_000, D_IN).double()
    sae, found = calibrated(small(k=k), x, 64)
    z = pre_acts(parameters(sae), x.numpy(), sae)
    kept = np.where(z > sae.threshold.item(), z, 0)
    np.testing.assert_allclose(sae.encode(x).detach(), kept, rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(kept, selected(z, int(1_000 * k)))
    assert (kept != 0).sum() == 1_000 * k and found == k
    ordered = np.sort(z, axis=None)[::-1]
    n = int(1_000 * k)
    assert sae.threshold.item() == pytest.approx((ordered[n - 1] + ordered[n]) / 2, rel=1e-12)


def test_the_pieces_that_rows_come_in_change_nothing(small, rows, monkeypatch):
    from sae_runner.saes import base

    # The first rows are the largest by far: what is kept must not be a share of each piece.
    x = rows(600, D_IN).double() * torch.linspace(9, 0.1, 600).unsqueeze(1)
    whole_x, found = calibrated(small(), x, 600)
    assert found == pytest.approx(2.7)
    cases = [(1, 600), (7, 600), (100, 600), (600, 5_000), ([1, 599], 601), ([590, 10], 600)]
    for sizes, n_rows in cases:
        other, found = calibrated(small(), x, sizes, n_rows)
        assert other.threshold.item() == pytest.approx(whole_x.threshold.item(), rel=1e-12)
        assert found == pytest.approx(2.7)
    reversed_x, _ = calibrated(small(), x.flip(0), 7)
    assert reversed_x.threshold.item() == pytest.approx(whole_x.threshold.item(), rel=1e-12)
    monkeypatch.setattr(base, "ENCODE_CHUNK_BYTES", 10 * D_SAE * 8)
    chunked, _ = calibrated(small(), x, 600)
    assert chunked.threshold.item() == pytest.approx(whole_x.threshold.item(), rel=1e-12)


def test_no_more_rows_are_taken_than_were_announced(small, rows):
    x = rows(100, D_IN).double()
    few, _ = calibrated(small(), x[:40], 40)
    announced, found = calibrated(small(), x, 30, n_rows=40)
    assert announced.threshold.item() == pytest.approx(few.threshold.item(), rel=1e-12)
    assert found == 2.7


def test_few_numbers_are_kept_at_a_time():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(200, 50, generator=generator)
    largest = Largest(30)
    for part in values:
        largest.add(part)
        assert sum(map(len, largest.parts)) <= 60
    assert torch.equal(
        largest.found().sort(descending=True).values,
        values.flatten().sort(descending=True).values[:30],
    )


def test_equal_activations_at_the_threshold_all_fall_out():
    assert threshold_above(torch.tensor([4.0, 3, 3, 1]), 2) == 3.5
    assert threshold_above(torch.tensor([4.0, 3, 3, 1]), 3) == 2
    assert threshold_above(torch.tensor([3.0, 3, 3, 1]), 2) == 3
    assert threshold_above(torch.tensor([5.0, 1]), 0) == 5


def test_numbers_that_are_next_to_each_other_are_told_apart():
    for dtype in (torch.float32, torch.bfloat16):
        for start in (1.0, 1.5, 0.1, 300.0):
            low = torch.tensor(start, dtype=dtype)
            high = torch.nextafter(low, torch.tensor(torch.inf, dtype=dtype))
            threshold = torch.zeros((), dtype=dtype)
            threshold.fill_(threshold_above(torch.stack([low, high]), 1))
            assert (torch.stack([low, high]) > threshold).tolist() == [False, True]


def test_all_that_is_positive_fires_where_that_is_too_little(small, rows):
    x = rows(50, D_IN).double()
    sae, found = calibrated(small(k=D_SAE), x, 7)
    n_positive = (pre_acts(parameters(sae), x.numpy(), sae) > 0).sum()
    assert sae.threshold == 0 and found == n_positive / 50
    assert (sae.encode(x) != 0).sum() == n_positive
    with torch.no_grad():
        sae.b_enc.fill_(-1e3)
    sae, found = calibrated(sae, x, 7)
    assert sae.threshold == 0 and found == 0


def test_before_it_is_measured_all_that_is_positive_fires(new, stats, rows):
    x = rows(50)
    sae = new("batch_topk", 8, 24, k=2)
    sae.initialise(stats(x), torch.Generator().manual_seed(0))
    z = pre_acts(parameters(sae), x.double().numpy(), sae)
    assert sae.threshold == 0 and (sae.encode(x) != 0).sum() == (z > 0).sum()


def test_an_encoder_is_matched_by_what_k_latents_give(new, stats, rows):
    x = rows(500)
    sae = new("batch_topk", 8, 24, k=2, encoder_init="matched")
    sae.initialise(stats(x), torch.Generator().manual_seed(0))
    loss, scaled = sae.loss(x, TrainState()), sae.scaled(x)
    x_hat = scaled - loss.residual
    ratio = (x_hat - sae.b_dec).norm(dim=1).mean() / (scaled - sae.b_dec).norm(dim=1).mean()
    assert ratio.item() == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_threshold_in_the_precision_of_the_weights(make, rows, dtype):
    x = rows(2_000)
    sae = make("batch_topk", k=3).to(dtype)
    found = sae.calibrate(iter(torch.split(x, 300)), len(x))
    assert sae.threshold.dtype == dtype
    latents = sae.encode_sparse(x)
    # In bfloat16 many are equal to the threshold.
    assert found == pytest.approx(3, rel=1e-6 if dtype == torch.float32 else 0.05) and found <= 3
    assert latents.counts.double().mean().item() == pytest.approx(found, rel=1e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_threshold_on_another_device(make, rows):
    x, sae = rows(5_000), make("batch_topk", k=3)
    expected, _ = calibrated(sae, x, 512)
    found, l0 = calibrated(sae.cuda(), x.cuda(), 512)
    assert found.threshold.item() == pytest.approx(expected.threshold.item(), rel=1e-5)
    n_active = int(found.encode_sparse(x.cuda()).counts.sum())
    assert l0 == 3 and n_active == pytest.approx(15_000, abs=2)


@pytest.mark.parametrize("scaling", ["sqrt_d", "whitening", "layer_norm"])
def test_fold_takes_the_threshold_along(small, rows, scaling):
    sae, x = small(input_scaling=scaling), rows(300, D_IN).double()
    sae.calibrate(iter([x]), 300)
    unfolded, before = copy.deepcopy(sae), sae(x)
    assert len(before.latents.values) == 810 and sae.threshold > 0
    folded = sae.fold()(x)
    assert torch.equal(folded.latents.indices, before.latents.indices)
    torch.testing.assert_close(folded.x_hat, before.x_hat)
    if scaling == "sqrt_d":
        expected = unfolded.threshold.item() / unfolded.input_scale.item()
        assert sae.threshold.item() == pytest.approx(expected) != unfolded.threshold.item()
    again = sae.unfold_like(unfolded)
    assert again.threshold.item() == pytest.approx(unfolded.threshold.item())


def test_the_threshold_is_saved(small, new, rows):
    sae, x = small(), rows(50, D_IN).double()
    tensors = sae.tensors()
    assert tensors["threshold"].shape == () and tensors["threshold"] > 0
    other = new("batch_topk", D_IN, D_SAE, k=K).double()
    other.load_tensors(tensors)
    assert other.threshold.item() == sae.threshold.item()
    assert torch.equal(other.encode(x), sae.encode(x))
