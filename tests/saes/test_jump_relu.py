"""JumpReLU against formulas written a second time, in NumPy and float64."""

import numpy as np
import pytest
import torch

from sae_runner.config import preset
from sae_runner.errors import ConfigError
from sae_runner.saes._pre_acts import All
from sae_runner.saes._straight_through import jump, step
from sae_runner.saes.base import TrainState

D_IN, D_SAE, BANDWIDTH = 5, 12, 0.8
NAMES = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
COEFFICIENT, SHARE, TARGET, C = 0.3, 0.25, 3.0, 1.5


def recipe(penalty: str) -> dict:
    """The options of a penalty's YAML over those that it is based on."""
    own = {} if penalty == "step" else preset("sae", f"jump_relu_{penalty}")
    widths = {"d_sae", "expansion"}
    return {k: v for k, v in (preset("sae", "jump_relu") | own).items() if k not in widths}


def parameters(sae) -> dict:
    return {name: sae.tensors()[name].double().numpy().copy() for name in NAMES}


def gradients(sae) -> dict:
    found = {name: getattr(sae, name).grad for name in NAMES if name != "W_enc"}
    found["W_enc"] = sae.W_enc_rows.grad.T
    return {name: np.zeros_like(parameters(sae)[name]) if g is None else g.numpy()
            for name, g in found.items()}  # fmt: skip


def pre_acts(p: dict, scaled: np.ndarray, penalty: str) -> np.ndarray:
    z = scaled @ p["W_enc"] + p["b_enc"]
    return z if penalty == "tanh" else np.maximum(z, 0)


def loss_of(p: dict, scaled: np.ndarray, penalty: str) -> tuple[float, float]:
    """Squared error and penalty by their definition."""
    z = pre_acts(p, scaled, penalty)
    fires = z > p["threshold"]
    f = z * fires
    sse = ((scaled - f @ p["W_dec"] - p["b_dec"]) ** 2).sum(1).mean()
    l0 = fires.sum(1).mean()
    if penalty == "tanh":
        return sse, np.tanh(C * f * np.linalg.norm(p["W_dec"], axis=1)).sum(1).mean()
    return sse, l0 if penalty == "step" else (l0 / TARGET - 1) ** 2


def pseudo_gradient(p: dict, scaled: np.ndarray, penalty: str, weight: float) -> dict:
    """By the chain rule on paper, from the published pseudo-derivatives."""
    n, w = len(scaled), np.linalg.norm(p["W_dec"], axis=1)
    z = pre_acts(p, scaled, penalty)
    fires, near = z > p["threshold"], np.abs((z - p["threshold"]) / BANDWIDTH) < 0.5
    f = z * fires
    error = 2 * (f @ p["W_dec"] + p["b_dec"] - scaled) / n
    by_f, by_w_dec = error @ p["W_dec"].T, f.T @ error
    by_theta = np.zeros(D_SAE)
    if penalty == "tanh":
        slope = weight * C * (1 - np.tanh(C * f * w) ** 2) / n
        by_f = by_f + slope * w
        by_w_dec = by_w_dec + (slope * f).sum(0)[:, None] * p["W_dec"] / w[:, None]
    else:
        l0 = fires.sum(1).mean()
        by_l0 = weight * (1.0 if penalty == "step" else 2 * (l0 / TARGET - 1) / TARGET)
        by_theta -= (near / BANDWIDTH * by_l0 / n).sum(0)
    by_theta += (-p["threshold"] / BANDWIDTH * near * by_f).sum(0)
    by_z = by_f * fires
    if penalty == "tanh":
        by_z = by_z + by_f * p["threshold"] / BANDWIDTH * near
    return {
        "W_enc": scaled.T @ by_z, "b_enc": by_z.sum(0), "W_dec": by_w_dec, "b_dec": error.sum(0),
        "threshold": by_theta,
    }  # fmt: skip


@pytest.fixture
def small(make):
    def build(penalty="step", **options):
        options = {
            "input_scaling": "sqrt_d", "decoder_norm": "free", "decoder_init_norm": 0.7,
            "l0_coefficient": COEFFICIENT, "bandwidth": BANDWIDTH, "initial_threshold": 0.5,
            "tanh_scale": C, "target_l0": TARGET, **options,
        }  # fmt: skip
        sae = make("jump_relu", D_IN, D_SAE, penalty=penalty, **options).double()
        with torch.no_grad():  # Different for every latent, one of them lower than ε / 2.
            sae.W_dec.mul_(torch.linspace(0.5, 2, D_SAE).unsqueeze(1))
            sae.threshold.copy_(torch.linspace(0.1, 0.9, D_SAE))
        return sae

    return build


# -- Definition ----------------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", ["step", "quadratic", "tanh"])
def test_loss_and_pseudo_gradient_are_the_published_ones(small, rows, penalty):
    sae, x = small(penalty), rows(30, D_IN).double()
    loss = sae.loss(x, TrainState(penalty=SHARE))
    loss.total.backward()
    at, scaled = parameters(sae), x.numpy() * sae.input_scale.item()
    sse, value = loss_of(at, scaled, penalty)
    assert set(loss.parts) == {"sse", f"{penalty}_penalty"}  # "step" is a column of its own.
    assert loss.parts["sse"].item() == pytest.approx(sse, rel=1e-12)
    assert loss.parts[f"{penalty}_penalty"].item() == pytest.approx(value, rel=1e-12)
    assert loss.total.item() == pytest.approx(sse + COEFFICIENT * SHARE * value, rel=1e-12)
    expected, found = pseudo_gradient(at, scaled, penalty, COEFFICIENT * SHARE), gradients(sae)
    for name in NAMES:
        assert np.abs(expected[name]).max() > 1e-3, name
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-9, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("penalty", ["step", "quadratic", "tanh"])
def test_away_from_jumps_the_gradient_is_that_of_finite_differences(small, rows, penalty):
    sae, x = small(penalty, bandwidth=1e-12), rows(30, D_IN).double()
    sae.loss(x, TrainState(penalty=SHARE)).total.backward()
    at, scaled, found = parameters(sae), x.numpy() * sae.input_scale.item(), gradients(sae)

    def total(p):
        sse, value = loss_of(p, scaled, penalty)
        return sse + COEFFICIENT * SHARE * value

    for name, values in at.items():
        numeric = np.zeros_like(values)
        for entry in np.ndindex(values.shape):
            shift = np.zeros_like(values)
            shift[entry] = 1e-7
            numeric[entry] = (
                total(at | {name: values + shift}) - total(at | {name: values - shift})
            ) / 2e-7
        np.testing.assert_allclose(found[name], numeric, rtol=1e-5, atol=1e-6, err_msg=name)


def test_a_threshold_moves_by_one_over_the_bandwidth_and_not_its_square():
    """A library divides by it twice: −10⁶ where the paper says −10³."""
    z = torch.tensor([[0.0012], [0.0004], [0.3]], dtype=torch.float64)
    threshold = torch.tensor([0.001], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(step(z, threshold, 0.001).sum(), threshold)
    assert gradient.tolist() == [-1000.0]
    (gradient,) = torch.autograd.grad(jump(z, threshold, 0.001, to_z=False).sum(), threshold)
    assert gradient.item() == pytest.approx(-1.0)


def test_both_sides_of_a_threshold_count():
    """H is of z: a library that takes it of f loses the half of the kernel below θ."""
    z = torch.tensor([[0.9]])
    threshold = torch.tensor([1.0], requires_grad=True)
    (gradient,) = torch.autograd.grad(step(z, threshold, 0.5).sum(), threshold)
    assert gradient.item() == -2.0


def test_the_l0_penalty_has_no_gradient_to_the_encoder(small, rows):
    for penalty in ("step", "quadratic"):
        sae, x = small(penalty), rows(30, D_IN).double()
        z = All(sae.pre_activations(sae.scaled(x)))
        sae.sparsity(z, sae.activate(z)).backward()
        assert sae.W_enc_rows.grad is None and sae.W_dec.grad is None
        assert (sae.threshold.grad != 0).any()


def test_a_latent_fires_above_its_threshold_alone(small, rows):
    sae, x = small(), rows(50, D_IN).double()
    z = sae.pre_activations(sae.scaled(x)).detach()
    expected = torch.where(z > sae.threshold, z, 0)
    assert torch.equal(sae.encode(x), expected)
    between = (z > 0) & (z < sae.threshold)
    assert between.any() and not sae.encode(x)[between].any()
    with torch.no_grad():  # Equal is not above.
        sae.threshold.copy_(z[0])
    assert not sae.encode(x)[0].any()


def test_thresholds_are_compared_in_their_own_precision(small, rows):
    sae, x = small().float(), rows(50, D_IN)
    with torch.no_grad():
        sae.threshold.fill_(1.0009765625)  # Between two numbers of bfloat16.
    with torch.autocast("cpu", torch.bfloat16):
        acts = sae.encode(x)
    assert acts.dtype == torch.float32
    assert acts[acts > 0].min() > 1.0009765625


# -- Training ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("penalty", "least"), [("step", 0.0), ("tanh", 0.005)])
def test_thresholds_do_not_fall_below_zero(small, penalty, least):
    sae = small(penalty)
    with torch.no_grad():
        sae.threshold[:5] = -1
    sae.after_step()
    assert torch.equal(sae.threshold[:5], torch.full((5,), least, dtype=torch.float64))
    assert (sae.threshold[5:] > 0.1).all()


def test_adam_moves_a_threshold_by_the_learning_rate(small, rows):
    sae, x = small(), rows(30, D_IN).double()
    before = sae.threshold.detach().clone()
    optimiser = torch.optim.Adam(sae.parameters(), lr=1e-3, betas=(0.0, 0.999))
    sae.loss(x, TrainState()).total.backward()
    optimiser.step()
    moved = (sae.threshold - before).abs()[sae.threshold.grad != 0]
    assert len(moved) > 3
    torch.testing.assert_close(moved, torch.full_like(moved, 1e-3), rtol=1e-3, atol=0)


def test_latents_fire_equally_often_at_first_if_asked(new, stats):
    x = torch.randn(4_000, 8, generator=torch.Generator().manual_seed(0)) + 2
    sae = new("jump_relu", 8, 24, initial_l0=3.0)
    sae.initialise(stats(x), torch.Generator().manual_seed(1))
    share = (sae.encode(x) > 0).double().mean(0)
    np.testing.assert_allclose(share.numpy(), 3 / 24, atol=5e-4)
    assert sae.encode_sparse(x).counts.double().mean().item() == pytest.approx(3, rel=5e-3)
    assert torch.equal(sae.threshold, torch.full((24,), 0.001))


def test_a_reset_latent_has_the_first_threshold(small):
    sae = small()
    latents = torch.tensor([3, 7])
    before = sae.threshold.detach().clone()
    sae.reset_latents(latents, torch.eye(D_IN, dtype=torch.float64)[:2], 0.2)
    assert torch.equal(sae.threshold[latents], torch.full((2,), 0.5, dtype=torch.float64))
    others = torch.tensor([i for i in range(D_SAE) if i not in (3, 7)])
    assert torch.equal(sae.threshold[others], before[others])


@pytest.mark.parametrize(
    ("penalty", "options"),
    [
        ("step", {"l0_coefficient": 0.04}),
        ("quadratic", {"target_l0": 2.7}),
        ("tanh", {"l0_coefficient": 0.3}),
    ],
)
def test_planted_dictionary_is_recovered(new, recovered, penalty, options):
    sae = new("jump_relu", 32, 96, **{**recipe(penalty), **options, "units": None})
    assert recovered(sae, n_steps=1_500) > 0.95
    assert sae.threshold.min() > 0.1  # They have found their way from 0.001, or 0.1.


# -- Storing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", ["step", "tanh"])
def test_fold_scales_thresholds_and_moves_norms_of_a_free_decoder(small, rows, penalty):
    sae, x = small(penalty), rows(50, D_IN).double()
    norms, scale = sae.W_dec.norm(dim=1).detach(), sae.input_scale.item()
    threshold, acts, before = sae.threshold.detach().clone(), sae.encode(x).detach(), sae(x).x_hat
    value = sae.loss(x, TrainState()).parts[f"{penalty}_penalty"].item()
    unfolded = sae.input_scale.clone()
    sae.fold()
    torch.testing.assert_close(sae.threshold.detach(), threshold * norms / scale)
    torch.testing.assert_close(sae.encode(x), acts * norms / scale)
    torch.testing.assert_close(sae(x).x_hat, before)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE).double())
    assert tuple(sae.tensors()["threshold"].shape) == (D_SAE,)
    like = small(penalty)
    assert torch.equal(like.input_scale, unfolded)
    sae.unfold_like(like)
    torch.testing.assert_close(sae(x).x_hat, before)
    again = sae.loss(x, TrainState()).parts[f"{penalty}_penalty"].item()
    assert again == pytest.approx(value, rel=1e-9)


def test_rows_of_a_unit_decoder_are_left_as_they_are(make, rows):
    sae = make("jump_relu")
    before = sae.W_dec.detach().clone()
    assert torch.equal(sae.fold().W_dec, before)


# -- Options -------------------------------------------------------------------------------------


def test_only_what_a_penalty_does_not_lead_to_by_itself_is_controlled(new):
    assert new("jump_relu", 8, 24).penalised
    assert new("jump_relu", 8, 24, penalty="tanh").penalised
    assert not new("jump_relu", 8, 24, penalty="quadratic", target_l0=3.0).penalised


@pytest.mark.parametrize(
    ("penalty", "options", "message"),
    [
        (
            "step", {"penalty": "tanh"},
            r"sae\.penalty=tanh: the coefficients of this recipe are for step; "
            r"take sae=jump_relu_tanh, or choose your own and set sae\.units=null",
        ),
        (
            "step", {"penalty": "quadratic", "target_l0": 3.0},
            r"sae\.penalty=quadratic: .* take sae=jump_relu_quadratic",
        ),
        ("tanh", {"penalty": "step"}, r"sae\.penalty=step: .* are for tanh; take sae=jump_relu, "),
        (
            "step", {"input_scaling": "sqrt_d"},
            r"sae\.input_scaling=sqrt_d: .* for unit_mean_square; .*sae\.units=null",
        ),
        ("tanh", {"input_scaling": "none"}, r"sae\.input_scaling=none: .* for sqrt_d; "),
        ("tanh", {"loss_reduction": "mean"}, r"sae\.loss_reduction=mean: .* for sum; "),
        (
            "quadratic", {"target_l0": None},
            r"sae\.penalty=quadratic: aims at sae\.target_l0, which is null; set it",
        ),
        ("step", {"initial_l0": 24.0}, r"sae\.initial_l0=24: must be < d_sae=24"),
        ("step", {"bandwidth": 0.0}, r"sae\.bandwidth=0\.0: must be > 0"),
    ],
)  # fmt: skip
def test_a_recipe_in_other_units_is_refused_with_what_to_set(new, penalty, options, message):
    with pytest.raises(ConfigError, match=message):
        new("jump_relu", 8, 24, **{**recipe(penalty), **options})
    settled = {**recipe(penalty), "target_l0": 3.0}
    new("jump_relu", 8, 24, **settled)
