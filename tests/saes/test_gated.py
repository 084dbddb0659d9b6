"""The gated SAE against formulas written a second time, in NumPy and float64."""

import numpy as np
import pytest
import torch

from sae_runner.errors import ConfigError
from sae_runner.saes.base import TrainState

D_IN, D_SAE = 5, 12
NAMES = ("W_enc", "W_dec", "b_gate", "b_mag", "r_mag", "b_dec")
PARTS = {"sum": "sse", "mean": "mse", "row_norm": "mse_by_norm"}


def parameters(sae) -> dict:
    return {name: sae.tensors()[name].double().numpy().copy() for name in NAMES}


def both_paths(p: dict, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """π and f of scaled rows, as equations 6 and 7 of the paper have them."""
    a = (x - p["b_dec"]) @ p["W_enc"]
    gate = a + p["b_gate"]
    magnitude = np.maximum(np.exp(p["r_mag"]) * a + p["b_mag"], 0)
    return gate, (gate > 0) * magnitude


def reference(p: dict, x: np.ndarray, frozen: dict, reduction: str = "sum") -> tuple:
    """The reduced error, the penalty and the error of the gate's own reconstruction."""
    gate, f = both_paths(p, x)
    opened = np.maximum(gate, 0)

    def error(residual):
        if reduction == "row_norm":
            residual = residual / np.sqrt(np.sqrt((x**2).sum(1, keepdims=True)))
        return (residual**2).sum(1).mean() / (1 if reduction == "sum" else x.shape[1])

    return (
        error(x - f @ p["W_dec"] - p["b_dec"]),
        opened.sum(1).mean(),
        error(x - opened @ frozen["W_dec"] - frozen["b_dec"]),
    )


@pytest.fixture
def small(make):
    def build(**options):
        sae = make("gated", D_IN, D_SAE, **{"l1_coefficient": 0.3, **options}).double()
        generator = torch.Generator().manual_seed(11)
        with torch.no_grad():  # Paths that differ: a gate may be open where M is 0.
            sae.r_mag.copy_(0.3 * torch.randn(D_SAE, generator=generator))
            sae.b_mag.copy_(0.2 * torch.randn(D_SAE, generator=generator))
        return sae

    return build


@pytest.mark.parametrize("reduction", PARTS)
def test_loss_and_gradient_are_the_papers(small, rows, reduction):
    sae, x = small(loss_reduction=reduction), rows(20, D_IN).double()
    loss = sae.loss(x, TrainState(penalty=0.25))
    loss.total.backward()
    at, scaled = parameters(sae), x.numpy() * sae.input_scale.item()

    def total(p):
        error, l1, gate_error = reference(p, scaled, at, reduction)
        return error + 0.3 * 0.25 * l1 + gate_error

    expected = reference(at, scaled, at, reduction)
    assert set(loss.parts) == {PARTS[reduction], "l1", "gate_error"}
    for name, value in zip((PARTS[reduction], "l1", "gate_error"), expected, strict=True):
        assert loss.parts[name].item() == pytest.approx(value, rel=1e-9), name
    assert loss.total.item() == pytest.approx(total(at), rel=1e-9)
    for key, values in at.items():
        numeric = np.zeros_like(values)
        for entry in np.ndindex(values.shape):
            step = np.zeros_like(values)
            step[entry] = 1e-6
            numeric[entry] = (
                total(at | {key: values + step}) - total(at | {key: values - step})
            ) / 2e-6
        parameter = {"b_gate": "b_enc"}.get(key, key)
        own = sae.W_enc_rows.grad.T if key == "W_enc" else getattr(sae, parameter).grad
        assert np.abs(numeric).max() > 1e-3
        np.testing.assert_allclose(own.numpy(), numeric, rtol=1e-5, atol=1e-7, err_msg=key)


def test_latents_are_chosen_by_the_gate_and_sized_by_the_magnitude(small, rows):
    sae, x = small(), rows(60, D_IN).double()
    gate, f = both_paths(parameters(sae), x.numpy() * sae.input_scale.item())
    assert ((gate > 0) & (f == 0)).any() and ((gate <= 0) & (f == 0)).any()
    np.testing.assert_allclose(sae.pre_activations(sae.scaled(x)).detach(), gate, atol=1e-12)
    some = torch.tensor([3, 0, 7])
    np.testing.assert_allclose(
        sae.pre_activations(sae.scaled(x), some).detach(), gate[:, some], atol=1e-12
    )
    np.testing.assert_allclose(sae.encode(x).detach(), f, atol=1e-12)
    latents = sae.encode_sparse(x)
    assert latents.counts.tolist() == (f > 0).sum(1).tolist()
    # Open gates without a magnitude are not active.
    loss = sae.loss(x, TrainState())
    assert loss.fired.tolist() == (f > 0).sum(0).tolist()
    assert loss.l0.item() == pytest.approx((f > 0).sum(1).mean())


def test_the_gate_learns_from_its_own_terms_alone(small, rows):
    """The error through f moves b_mag and r_mag; b_gate only hears of it through the encoder."""
    sae, x = small(l1_coefficient=0.0), rows(20, D_IN).double()
    acts = sae.encode(x)
    error = (sae.scaled(x) - acts @ sae.W_dec - sae.b_dec).square().sum()
    by_error = torch.autograd.grad(error, (sae.b_enc, sae.b_mag, sae.r_mag))
    assert by_error[0].abs().max() < 1e-12
    assert by_error[1].abs().max() > 0.1 and by_error[2].abs().max() > 0.1


def test_free_decoder_norms_weight_the_penalty_as_constants(small, rows):
    sae, x = small(decoder_norm="free", decoder_init_norm=0.5), rows(20, D_IN).double()
    with torch.no_grad():
        sae.W_dec.mul_(torch.linspace(0.5, 2, D_SAE).unsqueeze(1))
    gate, _ = both_paths(parameters(sae), x.numpy() * sae.input_scale.item())
    norms = np.sqrt((parameters(sae)["W_dec"] ** 2).sum(1))
    expected = (np.maximum(gate, 0) * norms).sum(1).mean()
    loss = sae.loss(x, TrainState())
    assert loss.parts["l1"].item() == pytest.approx(expected, rel=1e-9)
    before, latents = sae(x).x_hat, sae.encode_sparse(x)
    sae.fold()
    torch.testing.assert_close(sae(x).x_hat, before)
    assert torch.equal(sae.encode_sparse(x).indices, latents.indices)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE).double())


def test_decoder_stays_on_the_sphere(small, rows):
    sae, x = small(), rows(20, D_IN).double()
    optimiser = torch.optim.Adam(sae.parameters(), lr=0.1)
    sae.loss(x, TrainState()).total.backward()
    sae.before_step()
    along = (sae.W_dec.grad * sae.W_dec).sum(1)
    assert along.abs().max() < 1e-6 * sae.W_dec.grad.abs().max()
    optimiser.step()
    sae.after_step()
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE).double())


def test_names_on_disk_are_the_fields(small):
    assert set(small().tensors()) == {*NAMES, "input_scale"}


def test_reset_latents_start_with_both_paths_alike(small, rows):
    sae, x = small(), rows(40, D_IN).double()
    chosen = torch.tensor([2, 9])
    directions = torch.nn.functional.normalize(rows(2, D_IN, seed=8), dim=1)
    sae.reset_latents(chosen, directions, 0.5)
    gate = sae.pre_activations(sae.scaled(x), chosen)
    torch.testing.assert_close(sae.encode(x)[:, chosen], gate.relu())
    assert (gate > 0).any()
    expected = 0.5 * (sae.scaled(x) - sae.b_dec) @ directions.double().T
    torch.testing.assert_close(gate, expected)


def test_a_negative_coefficient_is_refused(new):
    with pytest.raises(ConfigError, match=r"sae\.l1_coefficient=-1\.0: must be >= 0"):
        new("gated", 8, 24, l1_coefficient=-1.0)


def test_planted_dictionary_is_recovered(new, recovered):
    assert recovered(new("gated", 32, 96, l1_coefficient=0.8), n_steps=1_200) > 0.95
