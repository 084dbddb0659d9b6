"""Matryoshka BatchTopK against formulas written a second time, in NumPy and float64."""

import copy

import numpy as np
import pytest
import torch
from sae_fixtures import planted_rows, train

from sae_runner.errors import ConfigError
from sae_runner.saes.base import TrainState
from sae_runner.saes.matryoshka import nested_widths

D_IN, D_SAE, K = 5, 12, 2.7
FRACTIONS, WIDTHS = [0.25, 1 / 3, 5 / 12], [3, 7, 12]
PARTS = {
    "sum": "sse", "mean": "mse", "normalised": "normalised_mse", "row_norm": "mse_by_norm",
}  # fmt: skip


def reference(p: dict, x: np.ndarray, sae) -> list[dict]:
    """The error of each nested SAE, under every reduction."""
    scaled = sae.input_scale.item() * x
    z = (scaled - p["b_dec"]) @ p["W_enc"] + p["b_enc"]
    f = np.zeros_like(z)  # One selection, over all latents.
    chosen = np.unravel_index(np.argsort(-z, axis=None)[: int(K * len(x))], z.shape)
    f[chosen] = np.maximum(z[chosen], 0)
    norms = np.sqrt((scaled**2).sum(1, keepdims=True))
    baseline = sae.mean_baseline_mse.item() if sae.loss_reduction == "normalised" else 1.0
    errors = []
    for m in WIDTHS:
        square = (scaled - f[:, :m] @ p["W_dec"][:m] - p["b_dec"]) ** 2
        errors.append({
            "sse": square.mean() * x.shape[1],
            "mse": square.mean(),
            "normalised_mse": square.mean() / baseline,
            "mse_by_norm": (square / norms).mean(),
        })  # fmt: skip
    return errors


def parameters(sae) -> dict:
    names = ("W_enc", "W_dec", "b_enc", "b_dec")
    return {name: sae.tensors()[name].double().numpy().copy() for name in names}


@pytest.fixture
def small(make):
    def build(**options):
        given = {"k": K, "group_fractions": FRACTIONS, **options}
        return make("matryoshka", D_IN, D_SAE, **given).double()

    return build


@pytest.mark.parametrize("group_reduction", ["sum", "mean"])
@pytest.mark.parametrize("reduction", PARTS)
def test_loss_and_gradient_are_the_formulas(small, rows, reduction, group_reduction):
    sae = small(loss_reduction=reduction, group_reduction=group_reduction)
    x, name = rows(21, D_IN).double(), PARTS[reduction]
    loss, at = sae.loss(x, TrainState()), parameters(sae)

    def total(p):
        errors = [errors[name] for errors in reference(p, x.numpy(), sae)]
        return sum(errors) / (1 if group_reduction == "sum" else 3)

    first, second, whole = reference(at, x.numpy(), sae)
    expected = {name: whole[name], "first_3": first[name], "first_7": second[name]}
    assert {k: v.item() for k, v in loss.parts.items()} == pytest.approx(expected, rel=1e-12)
    assert loss.total.item() == pytest.approx(total(at), rel=1e-12)
    loss.total.backward()
    for key, values in at.items():
        numeric = np.zeros_like(values)
        for entry in np.ndindex(values.shape):
            step = np.zeros_like(values)
            step[entry] = 1e-6
            numeric[entry] = (
                total(at | {key: values + step}) - total(at | {key: values - step})
            ) / 2e-6
        gradient = (sae.W_enc_rows.grad.T if key == "W_enc" else getattr(sae, key).grad).numpy()
        assert np.abs(numeric).max() > 1e-4
        np.testing.assert_allclose(gradient, numeric, rtol=1e-5, atol=1e-7, err_msg=key)


def test_one_group_is_batch_topk(small, make, rows):
    x = rows(20, D_IN).double()
    one, plain = small(group_fractions=[1.0]), make("batch_topk", D_IN, D_SAE, k=K).double()
    losses = [sae.loss(x, TrainState()) for sae in (one, plain)]
    assert losses[0].total.item() == pytest.approx(losses[1].total.item(), rel=1e-12)
    assert torch.equal(one.encode(x), plain.encode(x)) and one.threshold > 0
    assert set(losses[0].parts) == {"normalised_mse"}


def test_the_residual_is_that_of_all_latents(small, rows):
    """AuxK would otherwise teach dead latents what later groups already know."""
    sae, x = small(), rows(40, D_IN).double()
    sae.calibrate(iter([x]), 40)
    loss, x_hat = sae.loss(x, TrainState()), sae(x).x_hat
    torch.testing.assert_close(loss.residual, (sae.scaled(x) - sae.scaled(x_hat)).detach())
    torch.testing.assert_close(loss.x_hat, x_hat.detach())


def test_later_groups_leave_the_errors_of_earlier_ones_alone(small, rows):
    sae, x = small(), rows(40, D_IN).double()
    before = sae.loss(x, TrainState())
    changed = copy.deepcopy(sae)
    with torch.no_grad():
        changed.W_dec[3:7] *= -1
    after = changed.loss(x, TrainState())
    assert after.parts["first_3"].item() == before.parts["first_3"].item()
    for name in ("first_7", "normalised_mse"):
        assert after.parts[name].item() > 1.01 * before.parts[name].item()


def test_widths_are_sums_of_fractions():
    published = [1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2 + 1 / 32]
    assert nested_widths(published, 65_536) == [2_048, 6_144, 14_336, 30_720, 65_536]
    assert nested_widths([0.1] * 10, 1_000) == list(range(100, 1_001, 100))
    assert nested_widths([1.0], 7) == [7]


@pytest.mark.parametrize(
    ("fractions", "message"),
    [
        ([0.25, 0.5], r"group_fractions=\[0\.25, 0\.5\]: must sum to 1, not 0\.75"),
        ([0.75, 0.5], "sum to 1, not 1.25"),
        ([1.5, -0.5], r"group_fractions=-0\.5: must be > 0"),
        ([0.0, 1.0], r"group_fractions=0\.0: must be > 0"),
        ([], "sum to 1, not 0"),
        ([0.01, 0.99], "group 1 has no latent of d_sae=24"),
        ([0.5, 0.01, 0.49], "group 2 has no latent of d_sae=24"),
    ],
)
def test_fractions_that_make_no_groups_are_refused(new, fractions, message):
    with pytest.raises(ConfigError, match=message):
        new("matryoshka", 8, 24, group_fractions=fractions)


def test_planted_dictionary_is_recovered(new, recovered):
    """Where the first group has room for it: else its latents stand for several directions each."""
    sae = new("matryoshka", 32, 96, k=4, group_fractions=[0.9, 0.1])
    assert recovered(sae, n_steps=1_200) > 0.95


def test_the_first_latents_are_of_what_is_frequent(new, one_thread):
    _, directions = planted_rows(1)
    generator = torch.Generator().manual_seed(3)
    odds = (0.6 / torch.arange(1, 65)).clamp_max(0.5)
    active = torch.rand(8_192, 64, generator=generator) < odds
    x = (active * (0.5 + torch.rand(8_192, 64, generator=generator))) @ directions
    places = {}
    for kind in ("matryoshka", "batch_topk"):
        sae = new(kind, 32, 96, k=4)
        train(sae, x, n_steps=600, n_faint=0)
        places[kind] = (directions[:6] @ sae.W_dec.detach().T).argmax(1).double().mean().item()
    assert places["matryoshka"] < 15 and places["batch_topk"] > 30


def test_the_first_latents_reconstruct_by_themselves(new, one_thread):
    """Better than as many latents of a BatchTopK, which are any ones."""
    x, _ = planted_rows(4_096)
    errors = {}
    for kind in ("matryoshka", "batch_topk"):
        sae = new(kind, 32, 96, k=4)
        train(sae, x, n_steps=400, n_faint=0)
        sae.calibrate(iter([x]), len(x))
        acts = sae.encode(x).detach()
        acts[:, 45:] = 0
        errors[kind] = (sae.decode(acts) - x).square().mean().item()
    assert errors["matryoshka"] < 0.8 * errors["batch_topk"]
