"""ReLU with its L1 penalty against formulas written a second time, in NumPy and float64."""

import numpy as np
import pytest
import torch

from sae_runner.errors import ConfigError
from sae_runner.saes.base import TrainState

D_IN, D_SAE = 5, 12


def parameters(sae) -> dict:
    names = ("W_enc", "W_dec", "b_enc", "b_dec")
    return {name: sae.tensors()[name].double().numpy().copy() for name in names}


def reference(p: dict, x: np.ndarray) -> tuple[float, float]:
    """Sum of squared errors and norm-weighted L1, of scaled rows, mean over rows."""
    f = np.maximum(x @ p["W_enc"] + p["b_enc"], 0)
    x_hat = f @ p["W_dec"] + p["b_dec"]
    l1 = sum(f[:, i] * np.sqrt((p["W_dec"][i] ** 2).sum()) for i in range(D_SAE))
    return ((x - x_hat) ** 2).sum(1).mean(), l1.mean()


@pytest.fixture
def small(make):
    def build(**options):
        options = {"l1_coefficient": 0.3, "decoder_init_norm": 0.5, **options}
        sae = make("relu", D_IN, D_SAE, **options).double()
        with torch.no_grad():  # Norms that differ, so that each must find its own latent.
            sae.W_dec.mul_(torch.linspace(0.5, 2, D_SAE).unsqueeze(1))
        return sae

    return build


@pytest.mark.parametrize(("reduction", "name"), [("sum", "sse"), ("mean", "mse")])
def test_loss_and_gradient_are_the_formulas(small, rows, reduction, name):
    sae, x = small(loss_reduction=reduction), rows(20, D_IN).double()
    loss = sae.loss(x, TrainState(penalty=0.25))
    loss.total.backward()
    at, scaled = parameters(sae), x.numpy() * sae.input_scale.item()

    def total(p):
        sse, l1 = reference(p, scaled)
        return (sse if reduction == "sum" else sse / D_IN) + 0.3 * 0.25 * l1

    sse, l1 = reference(at, scaled)
    assert set(loss.parts) == {name, "l1"}
    assert loss.parts[name].item() == pytest.approx(sse / (1 if name == "sse" else D_IN), rel=1e-12)
    assert loss.parts["l1"].item() == pytest.approx(l1, rel=1e-12)
    assert loss.total.item() == pytest.approx(total(at), rel=1e-12)
    for key, values in at.items():
        numeric = np.zeros_like(values)
        for entry in np.ndindex(values.shape):
            step = np.zeros_like(values)
            step[entry] = 1e-6
            numeric[entry] = (
                total(at | {key: values + step}) - total(at | {key: values - step})
            ) / 2e-6
        gradient = (sae.W_enc_rows.grad.T if key == "W_enc" else getattr(sae, key).grad).numpy()
        assert np.abs(numeric).max() > 1e-2
        np.testing.assert_allclose(gradient, numeric, rtol=1e-5, atol=1e-7, err_msg=key)


def test_the_encoder_does_not_subtract_b_dec(small, rows):
    sae, x = small(), rows(20, D_IN).double()
    before = sae.encode(x)
    with torch.no_grad():
        sae.b_dec.add_(100.0)
    assert torch.equal(sae.encode(x), before)


def test_decoder_starts_short_and_is_free(new, stats, rows):
    sae, x = new("relu", 8, 24, decoder_init_norm=0.1), rows(30)
    sae.initialise(stats(x), torch.Generator().manual_seed(0))
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.full((24,), 0.1))
    assert not sae.b_enc.any() and not sae.b_dec.any()
    optimiser = torch.optim.SGD(sae.parameters(), lr=0.05)
    sae.loss(x, TrainState()).total.backward()
    gradient = sae.W_dec.grad.clone()
    sae.before_step()
    assert torch.equal(sae.W_dec.grad, gradient)
    optimiser.step()
    moved = sae.W_dec.detach().clone()
    sae.after_step()
    assert torch.equal(sae.W_dec, moved)


def test_fold_moves_norms_into_the_encoder(small, rows):
    sae, x = small(), rows(20, D_IN).double()
    with torch.no_grad():
        sae.W_dec[2] = 0
    norms, scale = sae.W_dec.norm(dim=1).detach(), sae.input_scale.item()
    before, acts = sae(x), sae.encode(x).detach()
    sae.fold()
    after = sae(x)
    torch.testing.assert_close(after.x_hat, before.x_hat, rtol=1e-6, atol=1e-12)
    expected = torch.ones(D_SAE, dtype=torch.float64)
    expected[2] = 0
    torch.testing.assert_close(sae.W_dec.norm(dim=1), expected)
    # A folded latent is as large as its share of x_hat, in the units of x.
    torch.testing.assert_close(sae.encode(x)[:, 3:], (acts * norms / scale)[:, 3:])
    torch.testing.assert_close(sae.encode(x)[:, 2], acts[:, 2] / scale)


def test_a_negative_coefficient_is_refused(new):
    with pytest.raises(ConfigError, match=r"sae\.l1_coefficient=-1\.0: must be >= 0"):
        new("relu", 8, 24, l1_coefficient=-1.0)


def test_planted_dictionary_is_recovered(new, recovered):
    assert recovered(new("relu", 32, 96, l1_coefficient=1.0), n_steps=1_200) > 0.95
