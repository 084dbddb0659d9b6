"""Ghost gradients against formulas written a second time, in NumPy and float64."""

import numpy as np
import pytest
import torch

from sae_runner.saes.base import TrainState
from sae_runner.training.dead_latents.ghost_grads import GhostGrads

D_IN, D_SAE = 5, 12
DEAD = np.array([0, 1, 0, 0, 1, 1, 0, 0, 0, 1, 0, 1], dtype=bool)
NAMES = ("W_enc", "W_dec", "b_enc")


def parameters(sae) -> dict:
    return {name: sae.tensors()[name].double().numpy().copy() for name in NAMES}


def ghost(p: dict, scaled: np.ndarray) -> np.ndarray:
    z = scaled @ p["W_enc"] + p["b_enc"]
    return np.exp(z[:, DEAD]) @ p["W_dec"][DEAD]


def held(p: dict, e: np.ndarray, scaled: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The factors that no gradient flows through: of rows, and of single numbers."""
    g = ghost(p, scaled)
    length = np.linalg.norm(e, axis=1, keepdims=True) / 2 / np.linalg.norm(g, axis=1, keepdims=True)
    square = (length * g - e) ** 2
    return length, e**2 / (square + 1e-6 * (e**2).mean())


def reference(p: dict, e: np.ndarray, scaled: np.ndarray, factors) -> float:
    length, weight = factors
    return (weight * (length * ghost(p, scaled) - e) ** 2).sum(1).mean()


@pytest.fixture
def small(make):
    def build(dead=DEAD, coefficient=0.5, **options):
        sae = make("relu", D_IN, D_SAE, **{"decoder_init_norm": 0.7, **options}).double()
        strategy = GhostGrads(sae, 10, coefficient=coefficient)
        strategy.rows_since_fired[torch.from_numpy(np.asarray(dead))] = 10
        return sae, strategy

    return build


def test_value_and_gradient_are_the_formulas_with_the_factors_held(small, rows):
    (sae, strategy), x = small(), rows(20, D_IN).double()
    at, plain = parameters(sae), sae.loss(x, TrainState())
    scaled, e = sae.scaled(x).numpy(), plain.residual.numpy()
    factors = held(at, e, scaled)
    loss = strategy.add_to(plain, x)
    assert loss.parts["ghost_grads"].item() == pytest.approx(
        reference(at, e, scaled, factors), rel=1e-9
    )
    (loss.total - plain.total).backward()
    for name, values in at.items():
        numeric = np.zeros_like(values)
        for entry in np.ndindex(values.shape):
            step = np.zeros_like(values)
            step[entry] = 1e-6
            up, down = at | {name: values + step}, at | {name: values - step}
            numeric[entry] = (
                reference(up, e, scaled, factors) - reference(down, e, scaled, factors)
            ) / 4e-6
        found = sae.W_enc_rows.grad.T if name == "W_enc" else getattr(sae, name).grad
        assert np.abs(numeric).max() > 1e-3
        scale = np.abs(numeric).max()
        np.testing.assert_allclose(
            found.numpy(), numeric, rtol=1e-5, atol=1e-6 * scale, err_msg=name
        )
    assert not sae.b_dec.grad.any()  # A ghost has no bias of the decoder.


@pytest.mark.parametrize(
    ("reduction", "name"), [("sum", "sse"), ("mean", "mse"), ("row_norm", "mse_by_norm")]
)
def test_it_is_as_large_as_the_error_in_any_units(small, rows, reduction, name):
    for factor in (1e-4, 1.0, 1e4):
        sae, strategy = small(loss_reduction=reduction, input_scaling="none")
        with torch.no_grad():
            sae.b_enc.mul_(factor)
            sae.b_dec.mul_(factor)
        x = factor * rows(20, D_IN).double()
        plain = sae.loss(x, TrainState())
        term = strategy.term(plain, x).item()
        assert term == pytest.approx(plain.parts[name].item(), rel=1e-3)


def test_it_moves_dead_latents_far_below_firing_and_nothing_of_the_living(small, rows):
    x = rows(20, D_IN).double()
    sae, strategy = small()
    with torch.no_grad():
        sae.b_enc[DEAD] = -50.0
    plain = sae.loss(x, TrainState())
    assert not plain.fired[DEAD].any()
    (strategy.add_to(plain, x).total - plain.total).backward()
    for gradient in (sae.W_enc_rows.grad, sae.W_dec.grad, sae.b_enc.grad):
        assert (gradient[DEAD].reshape(DEAD.sum(), -1).abs().amax(1) > 0).all()
        assert not gradient[~DEAD].any()


def test_it_stays_finite(small, rows):
    x = rows(20, D_IN)
    sae, strategy = small()
    sae.float()
    with torch.no_grad():  # Beyond what exp can hold.
        sae.b_enc[DEAD] = 1e4
    plain = sae.loss(x, TrainState())
    nothing = plain._replace(residual=torch.zeros_like(plain.residual))
    for given in (plain, nothing):
        sae.zero_grad()
        term = strategy.term(given, x)
        term.backward()
        assert term.isfinite()
        assert all(p.grad is None or p.grad.isfinite().all() for p in sae.parameters())


def test_without_dead_latents_it_is_zero(small, rows):
    sae, strategy = small(np.zeros(D_SAE, dtype=bool))
    x = rows(9, D_IN).double()
    plain = sae.loss(x, TrainState())
    loss = strategy.add_to(plain, x)
    assert loss.parts["ghost_grads"] == 0 and loss.total.item() == plain.total.item()


def test_dead_latents_fire_again(new, revived):
    def sae():
        return new("relu", 32, 64, l1_coefficient=0.5)

    assert revived(sae(), {"type": "none"}) == 0
    assert revived(sae(), {"type": "ghost_grads", "coefficient": 1.0}, n_steps=600) > 0.8
