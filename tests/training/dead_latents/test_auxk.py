"""AuxK against formulas written a second time, in NumPy and float64."""

import numpy as np
import pytest
import torch

from sae_runner.errors import ConfigError
from sae_runner.saes.base import TrainState
from sae_runner.training.dead_latents import DEAD_LATENTS
from sae_runner.training.dead_latents.auxk import AuxK, default_k_aux

D_IN, D_SAE, K_AUX = 5, 12, 4
DEAD = np.array([0, 1, 0, 0, 1, 1, 0, 0, 0, 1, 0, 1], dtype=bool)


def topk_relu(z: np.ndarray, k: int) -> np.ndarray:
    kept = np.zeros_like(z)
    for row, values in enumerate(z):
        chosen = np.argsort(-values)[:k]
        kept[row, chosen] = np.maximum(values[chosen], 0)
    return kept


def parameters(sae) -> dict:
    names = ("W_enc", "W_dec", "b_enc", "b_dec")
    return {name: sae.tensors()[name].double().numpy().copy() for name in names}


def reference(p: dict, e: np.ndarray, scaled: np.ndarray, dead: np.ndarray) -> float:
    z = (scaled - p["b_dec"]) @ p["W_enc"] + p["b_enc"]
    predicted = topk_relu(z[:, dead], K_AUX) @ p["W_dec"][dead]
    auxk = ((predicted - e) ** 2).mean() / ((e - e.mean(0)) ** 2).mean()
    return auxk * min(dead.sum() / K_AUX, 1)


@pytest.fixture
def small(make):
    def build(dead=DEAD, coefficient=0.5, k_aux=K_AUX, **options):
        sae = make("topk", D_IN, D_SAE, **{"k": 3, **options}).double()
        auxk = AuxK(sae, 10, coefficient=coefficient, k_aux=k_aux)
        auxk.rows_since_fired[torch.from_numpy(np.asarray(dead))] = 10
        return sae, auxk

    return build


@pytest.mark.parametrize("n_dead", [12, 5, 2])
def test_value_and_gradient_are_the_formulas_with_the_residual_held(small, rows, n_dead):
    dead, x = np.arange(D_SAE) < n_dead, rows(20, D_IN).double()
    sae, auxk = small(dead)
    at, plain = parameters(sae), sae.loss(x, TrainState())
    scaled, e = sae.scaled(x).numpy(), plain.residual.numpy()
    loss = auxk.add_to(plain, x)
    assert loss.parts["auxk"].item() == pytest.approx(reference(at, e, scaled, dead), rel=1e-12)
    assert (loss.total - plain.total).item() == pytest.approx(0.5 * loss.parts["auxk"].item())
    (loss.total - plain.total).backward()
    for name, values in at.items():
        numeric = np.zeros_like(values)
        for entry in np.ndindex(values.shape):
            step = np.zeros_like(values)
            step[entry] = 1e-6
            up, down = at | {name: values + step}, at | {name: values - step}
            numeric[entry] = (
                0.5 * (reference(up, e, scaled, dead) - reference(down, e, scaled, dead)) / 2e-6
            )
        gradient = (sae.W_enc_rows.grad.T if name == "W_enc" else getattr(sae, name).grad).numpy()
        assert np.abs(numeric).max() > 1e-4
        np.testing.assert_allclose(gradient, numeric, rtol=1e-5, atol=1e-7, err_msg=name)


def test_it_moves_the_encoder_of_dead_latents_and_nothing_of_live_ones(small, rows):
    x, gradients = rows(20, D_IN).double(), []
    for coefficient in (0.0, 0.5):
        sae, auxk = small(coefficient=coefficient)
        with torch.no_grad():  # Dead for sure: never among the k largest, though positive.
            sae.W_enc_rows[DEAD] *= 0.05
            sae.b_enc[DEAD] += 0.2
            sae.b_enc[~DEAD] += 5.0
        loss = auxk.add_to(sae.loss(x, TrainState()), x)
        assert not loss.fired[DEAD].any()
        loss.total.backward()
        gradients.append((sae.W_enc_rows.grad, sae.W_dec.grad, sae.b_enc.grad))
    for without, with_auxk in zip(*gradients, strict=True):
        assert not without[DEAD].any()
        assert (with_auxk[DEAD].reshape(DEAD.sum(), -1).abs().amax(1) > 0).all()
        assert torch.equal(with_auxk[~DEAD], without[~DEAD])


def test_without_variance_or_dead_latents_it_is_zero(small, rows):
    one_row = rows(1, D_IN).double()
    sae, auxk = small(np.ones(D_SAE, dtype=bool))
    loss = auxk.add_to(sae.loss(one_row, TrainState()), one_row)
    loss.total.backward()
    assert loss.parts["auxk"] == 0
    assert all(p.grad.isfinite().all() for p in sae.parameters())
    sae, auxk = small(np.zeros(D_SAE, dtype=bool))
    plain = sae.loss(rows(9, D_IN).double(), TrainState())
    loss = auxk.add_to(plain, rows(9, D_IN).double())
    assert loss.parts["auxk"] == 0 and loss.total.item() == plain.total.item()


def test_a_prediction_of_nothing_is_known(small, rows):
    x = rows(30, D_IN).double()
    sae, auxk = small(np.ones(D_SAE, dtype=bool), k_aux=8)
    plain = sae.loss(x, TrainState())
    with torch.no_grad():  # Nothing is above zero: mean square over variance.
        sae.b_enc.fill_(-1e3)
    e = plain.residual.numpy()
    expected = (e**2).mean() / e.var(0).mean()
    assert auxk.term(plain, x).item() == pytest.approx(expected, rel=1e-12)
    auxk.rows_since_fired[4:] = 0  # Half as many dead latents as k_aux: half of it.
    assert auxk.term(plain, x).item() == pytest.approx(expected / 2, rel=1e-12)


def test_k_aux_is_a_power_of_two_near_half_the_width(new):
    assert {d: default_k_aux(d) for d in (1, 2, 128, 768, 1024, 2304, 4096)} == {
        1: 1, 2: 1, 128: 64, 768: 512, 1024: 512, 2304: 1024, 4096: 2048,
    }  # fmt: skip
    assert AuxK(new("topk", 128, 1024), 1, coefficient=1.0, k_aux=None).k_aux == 64
    assert AuxK(new("topk", 128, 40), 1, coefficient=1.0, k_aux=None).k_aux == 40
    cfg = {"type": "auxk", "coefficient": 1.0, "k_aux": 41}
    with pytest.raises(ConfigError, match=r"sae\.dead_latents\.k_aux=41: must be <= d_sae=40"):
        DEAD_LATENTS.build(cfg, sae=new("topk", 128, 40), window=1)


def test_latents_that_lose_from_the_start_are_revived(new, recovered):
    """Half of the latents start too faint to be chosen: without AuxK they stay so for ever."""
    auxk = {"type": "auxk", "coefficient": 0.03125, "k_aux": 16}
    without = recovered(new("topk", 32, 64, k=4), 800, n_faint=32)
    with_auxk = recovered(new("topk", 32, 64, k=4), 800, n_faint=32, strategy=auxk)
    assert without < 0.85
    assert with_auxk > 0.9
