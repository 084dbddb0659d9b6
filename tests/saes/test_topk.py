"""TopK and AuxK against formulas written a second time, in NumPy and float64."""

import numpy as np
import pytest
import torch

from sae_runner.errors import ConfigError, DataError
from sae_runner.saes.base import TrainState
from sae_runner.saes.topk import auxk_loss, default_k_aux

D_IN, D_SAE, K, K_AUX = 5, 12, 3, 4
DEAD = np.array([0, 1, 0, 0, 1, 1, 0, 0, 0, 1, 0, 1], dtype=bool)


def topk_relu(z: np.ndarray, k: int) -> np.ndarray:
    kept = np.zeros_like(z)
    for row, values in enumerate(z):
        chosen = np.argsort(-values)[:k]
        kept[row, chosen] = np.maximum(values[chosen], 0)
    return kept


def reference(p: dict, x: np.ndarray, sae, dead: np.ndarray, at: dict | None = None) -> dict:
    """Every part of the loss; the residual that AuxK predicts is taken at parameters `at`."""

    def reconstruct(p):
        z = (sae.input_scale.item() * x - p["b_dec"]) @ p["W_enc"] + p["b_enc"]
        return z, topk_relu(z, sae.k) @ p["W_dec"] + p["b_dec"]

    z, x_hat = reconstruct(p)
    scaled = sae.input_scale.item() * x
    e = scaled - reconstruct(at or p)[1]
    predicted = topk_relu(z[:, dead], sae.k_aux) @ p["W_dec"][dead]
    auxk = ((predicted - e) ** 2).mean() / ((e - e.mean(0)) ** 2).mean()
    mse = ((scaled - x_hat) ** 2).mean()
    return {
        "sse": mse * x.shape[1],
        "mse": mse,
        "normalised_mse": mse / sae.mean_baseline_mse.item(),
        "auxk": auxk * min(dead.sum() / sae.k_aux, 1),
    }


def parameters(sae) -> dict:
    names = ("W_enc", "W_dec", "b_enc", "b_dec")
    return {name: sae.tensors()[name].double().numpy().copy() for name in names}


PARTS = {"sum": "sse", "mean": "mse", "normalised": "normalised_mse"}


@pytest.fixture
def small(make):
    def build(**options):
        options = {"k": K, "k_aux": K_AUX, "auxk_coefficient": 0.5, **options}
        return make("topk", D_IN, D_SAE, **options).double()

    return build


@pytest.mark.parametrize("reduction", PARTS)
@pytest.mark.parametrize("n_dead", [12, 5, 2])
def test_loss_is_the_papers(small, rows, reduction, n_dead):
    sae, x = small(loss_reduction=reduction), rows(20, D_IN).double()
    dead = np.arange(D_SAE) < n_dead
    loss = sae.loss(x, TrainState(torch.from_numpy(dead)))
    expected = reference(parameters(sae), x.numpy(), sae, dead)
    assert set(loss.parts) == {PARTS[reduction], "auxk"}
    for name, part in loss.parts.items():
        assert part.item() == pytest.approx(expected[name], rel=1e-12)
    total = expected[PARTS[reduction]] + 0.5 * expected["auxk"]
    assert loss.total.item() == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize("reduction", PARTS)
def test_gradient_is_that_of_the_formula_with_the_residual_held(small, rows, reduction):
    sae, x = small(loss_reduction=reduction), rows(20, D_IN).double()
    sae.loss(x, TrainState(torch.from_numpy(DEAD))).total.backward()
    at = parameters(sae)

    def total(p):
        parts = reference(p, x.numpy(), sae, DEAD, at)
        return parts[PARTS[reduction]] + 0.5 * parts["auxk"]

    for name, values in at.items():
        numeric = np.zeros_like(values)
        for entry in np.ndindex(values.shape):
            step = np.zeros_like(values)
            step[entry] = 1e-6
            numeric[entry] = (
                total(at | {name: values + step}) - total(at | {name: values - step})
            ) / 2e-6
        gradient = (sae.W_enc_rows.grad.T if name == "W_enc" else getattr(sae, name).grad).numpy()
        assert np.abs(numeric).max() > 1e-4
        np.testing.assert_allclose(gradient, numeric, rtol=1e-5, atol=1e-7, err_msg=name)


def test_auxk_moves_the_encoder_of_dead_latents_and_nothing_of_live_ones(small, rows):
    x, gradients = rows(20, D_IN).double(), []
    for coefficient in (0.0, 0.5):
        sae = small(auxk_coefficient=coefficient)
        with torch.no_grad():  # Dead for sure: never among the k largest, though positive.
            sae.W_enc_rows[DEAD] *= 0.05
            sae.b_enc[DEAD] += 0.2
            sae.b_enc[~DEAD] += 5.0
        loss = sae.loss(x, TrainState(torch.from_numpy(DEAD)))
        assert not loss.fired[DEAD].any()
        loss.total.backward()
        gradients.append((sae.W_enc_rows.grad, sae.W_dec.grad, sae.b_enc.grad))
    for without, with_auxk in zip(*gradients, strict=True):
        assert not without[DEAD].any()
        assert (with_auxk[DEAD].reshape(DEAD.sum(), -1).abs().amax(1) > 0).all()
        assert torch.equal(with_auxk[~DEAD], without[~DEAD])


def test_auxk_of_a_perfect_prediction_is_zero_and_of_none_is_known(rows):
    residual, dead = rows(30, 4).double(), torch.ones(4, dtype=torch.bool)
    decoder = torch.eye(4, dtype=torch.float64)
    # Latents that are the residual itself, made positive by a sign of the decoder row: exact.
    positive = residual.abs()
    assert auxk_loss(positive, positive, dead, decoder, 4).item() == pytest.approx(0, abs=1e-12)
    # Pre-activations below zero predict nothing: mean square over variance.
    expected = (residual.numpy() ** 2).mean() / residual.numpy().var(0).mean()
    nothing = auxk_loss(residual, -positive, dead, decoder, 4)
    assert nothing.item() == pytest.approx(expected, rel=1e-12)
    # Half as many dead latents as k_aux: half of it.
    assert auxk_loss(residual, -positive, dead, decoder, 8).item() == pytest.approx(expected / 2)


def test_auxk_without_variance_or_dead_latents_is_zero(small, rows):
    sae, one_row = small(), rows(1, D_IN).double()
    loss = sae.loss(one_row, TrainState(torch.ones(D_SAE, dtype=torch.bool)))
    loss.total.backward()
    assert loss.parts["auxk"] == 0
    assert all(p.grad.isfinite().all() for p in sae.parameters())
    for dead in (None, torch.zeros(D_SAE, dtype=torch.bool)):
        loss = sae.loss(rows(9, D_IN).double(), TrainState(dead))
        assert loss.parts["auxk"] == 0
        assert loss.total.item() == loss.parts["normalised_mse"].item()
    assert "auxk" not in small(auxk_coefficient=0.0).loss(one_row, TrainState()).parts


def test_exactly_k_are_chosen_also_among_equals(small, rows):
    sae = small(k=5)
    with torch.no_grad():
        sae.W_enc_rows.copy_(torch.full((D_SAE, D_IN), 0.25))  # All pre-activations are equal.
        sae.b_enc.fill_(100.0)
    latents = sae.encode_sparse(rows(7, D_IN).double())
    assert latents.counts.tolist() == [5] * 7
    for row in latents.indices.reshape(7, 5).tolist():
        assert sorted(set(row)) == row
    assert (sae.encode(rows(7, D_IN).double()) != 0).sum(1).tolist() == [5] * 7


def test_the_k_largest_are_chosen_and_only_positive_ones_fire(small, rows):
    sae, x = small(k=D_SAE), rows(50, D_IN).double()
    p = parameters(sae)
    z = (sae.input_scale.item() * x.numpy() - p["b_dec"]) @ p["W_enc"] + p["b_enc"]
    np.testing.assert_allclose(sae.encode(x).detach(), np.maximum(z, 0), rtol=1e-12, atol=1e-12)
    sae = small(k=K)
    np.testing.assert_allclose(sae.encode(x).detach(), topk_relu(z, K), rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        sae.b_enc.fill_(-100.0)
    assert sae.encode_sparse(x).counts.tolist() == [0] * 50
    loss = sae.loss(x, TrainState())
    assert loss.l0 == 0 and not loss.fired.any()
    torch.testing.assert_close(sae(x).x_hat, (sae.b_dec / sae.input_scale).expand(50, D_IN))


def test_predicting_the_mean_has_normalised_error_one(new, stats, rows):
    x = rows(200, 8)
    sae = new("topk", 8, 24, loss_reduction="normalised", b_dec_init="mean", k=3)
    sae.initialise(stats(x), torch.Generator().manual_seed(0))
    with torch.no_grad():
        sae.b_enc.fill_(-1e3)
    assert sae.loss(x, TrainState()).parts["normalised_mse"].item() == pytest.approx(1, rel=1e-5)


class OnMetal(torch.Tensor):
    """As a tensor on Metal, which knows no float64."""

    def double(self):
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype")

    def cpu(self):
        return self.as_subclass(torch.Tensor)


def test_a_device_without_float64_can_initialise(new, stats, rows):
    x, baselines = rows(200, 8), []
    for kind in (torch.Tensor, OnMetal):
        sae = new("topk", 8, 24, loss_reduction="normalised", b_dec_init="mean", k=3)
        given = stats(x)
        given = given._replace(mean=given.mean.as_subclass(kind), sample=x.as_subclass(kind))
        sae.initialise(given, torch.Generator().manual_seed(0))
        baselines.append(sae.mean_baseline_mse.item())
    assert baselines[0] == baselines[1]


def test_fold_keeps_the_normalised_loss(small, rows):
    sae, x = small(), rows(20, D_IN).double()
    state = TrainState(torch.from_numpy(DEAD))
    before = sae.loss(x, state)
    after = sae.fold().loss(x, state)
    for name, part in before.parts.items():
        assert after.parts[name].item() == pytest.approx(part.item(), rel=1e-6), name


def test_equal_activations_cannot_be_normalised(new, stats):
    for reduction in ("normalised", "mean"):
        sae = new("topk", 8, 24, loss_reduction=reduction, k=3)
        if reduction == "mean":
            sae.initialise(stats(torch.ones(20, 8)), torch.Generator())
            continue
        with pytest.raises(DataError, match=r"sae\.loss_reduction=normalised: all .* are equal"):
            sae.initialise(stats(torch.ones(20, 8)), torch.Generator())


@pytest.mark.parametrize("how", ["zero", "mean", "geometric_median"])
def test_b_dec_starts_at_a_centre_in_scaled_units(new, stats, how):
    x = torch.cat([torch.ones(99, 4), torch.full((1, 4), 1_000.0)])
    sae = new("topk", 4, 8, k=2, b_dec_init=how, loss_reduction="mean")
    sae.initialise(stats(x), torch.Generator())
    centre = {"zero": 0.0, "mean": 10.99, "geometric_median": 1.0}[how]
    np.testing.assert_allclose(sae.b_dec.detach() / sae.input_scale, centre, rtol=2e-3)


def test_decoder_stays_on_the_sphere(small, rows):
    sae, x = small(), rows(20, D_IN).double()
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE).double(), rtol=1e-6, atol=0)
    optimiser = torch.optim.Adam(sae.parameters(), lr=0.1)
    sae.loss(x, TrainState()).total.backward()
    sae.before_step()
    along = (sae.W_dec.grad * sae.W_dec).sum(1)
    assert along.abs().max() < 1e-12 * sae.W_dec.grad.abs().max()
    optimiser.step()
    assert (sae.W_dec.norm(dim=1) - 1).abs().max() > 1e-3
    sae.after_step()
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE).double())


def test_k_and_its_other_name(new):
    assert new("topk", 8, 24, k=3).k == 3
    sae = new("topk", 8, 24, k=3, target_l0=7)
    assert sae.k == 7 and sae.config()["k"] == 7
    # A k that does not count may be anything.
    assert new("topk", 8, 24, k=32, target_l0=7).k == 7
    for options, message in (
        ({"k": 25}, r"sae\.k=25: must be <= d_sae=24"),
        ({"target_l0": 30}, r"sae\.target_l0=30: must be <= d_sae=24"),
        ({"k": 3, "k_aux": 99}, r"sae\.k_aux=99: must be <= d_sae=24"),
        ({"k": 0}, r"sae\.k=0: must be > 0"),
        ({"k": 3, "auxk_coefficient": -1.0}, r"sae\.auxk_coefficient=-1\.0: must be >= 0"),
        ({"k": 3, "loss_reduction": "total"}, "sae.loss_reduction=total: not one of its values"),
    ):
        with pytest.raises(ConfigError, match=message):
            new("topk", 8, 24, **options)


def test_k_aux_is_a_power_of_two_near_half_the_width(new):
    assert {d: default_k_aux(d) for d in (1, 2, 128, 768, 1024, 2304, 4096)} == {
        1: 1, 2: 1, 128: 64, 768: 512, 1024: 512, 2304: 1024, 4096: 2048,
    }  # fmt: skip
    assert new("topk", 128, 1024).k_aux == 64
    assert new("topk", 128, 40).k_aux == 40  # Never more than there are.


def test_planted_dictionary_is_recovered(new, recovered):
    assert recovered(new("topk", 32, 96, k=4), n_steps=1_200) > 0.95


def test_auxk_revives_latents_that_lose_from_the_start(new, recovered):
    """Half of the latents start too faint to be chosen: without AuxK they stay so for ever."""
    without = recovered(new("topk", 32, 64, k=4, auxk_coefficient=0.0), 800, n_faint=32)
    with_auxk = recovered(new("topk", 32, 64, k=4, k_aux=16), 800, n_faint=32)
    assert without < 0.85
    assert with_auxk > 0.9
