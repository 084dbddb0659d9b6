"""TopK against formulas written a second time, in NumPy and float64."""

import numpy as np
import pytest
import torch

from sae_runner.errors import ConfigError, DataError
from sae_runner.saes.base import TrainState

D_IN, D_SAE, K = 5, 12, 3


def topk_relu(z: np.ndarray, k: int) -> np.ndarray:
    kept = np.zeros_like(z)
    for row, values in enumerate(z):
        chosen = np.argsort(-values)[:k]
        kept[row, chosen] = np.maximum(values[chosen], 0)
    return kept


def reference(p: dict, x: np.ndarray, sae, k: int | None = None) -> dict:
    """The error under every reduction."""
    scaled = sae.input_scale.item() * x
    z = (scaled - p["b_dec"]) @ p["W_enc"] + p["b_enc"]
    x_hat = topk_relu(z, k or sae.k) @ p["W_dec"] + p["b_dec"]
    mse = ((scaled - x_hat) ** 2).mean()
    norms = np.sqrt((scaled**2).sum(1, keepdims=True))
    baseline = sae.mean_baseline_mse.item() if sae.loss_reduction == "normalised" else 1.0
    return {
        "sse": mse * x.shape[1],
        "mse": mse,
        "normalised_mse": mse / baseline,
        "mse_by_norm": ((scaled - x_hat) ** 2 / norms).mean(),
    }


def parameters(sae) -> dict:
    names = ("W_enc", "W_dec", "b_enc", "b_dec")
    return {name: sae.tensors()[name].double().numpy().copy() for name in names}


PARTS = {
    "sum": "sse", "mean": "mse", "normalised": "normalised_mse", "row_norm": "mse_by_norm",
}  # fmt: skip


@pytest.fixture
def small(make):
    def build(**options):
        return make("topk", D_IN, D_SAE, **{"k": K, **options}).double()

    return build


@pytest.mark.parametrize("multi", [0.0, 0.125])
@pytest.mark.parametrize("reduction", PARTS)
def test_loss_and_gradient_are_the_papers(small, rows, reduction, multi):
    sae = small(loss_reduction=reduction, multi_topk=multi)
    x, name = rows(20, D_IN).double(), PARTS[reduction]
    loss = sae.loss(x, TrainState())
    at = parameters(sae)

    def total(p):
        more = reference(p, x.numpy(), sae, k=min(4 * K, D_SAE))[name]
        return reference(p, x.numpy(), sae)[name] + multi * more

    assert set(loss.parts) == {name} | ({"multi_topk"} if multi else set())
    assert loss.parts[name].item() == pytest.approx(reference(at, x.numpy(), sae)[name], rel=1e-12)
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


def test_multi_topk_reaches_the_encoder_of_latents_beyond_the_k_largest(small, rows):
    """One library's fused encoder gives them no gradient at all."""
    sae, x = small(k=1, multi_topk=1.0), rows(1, D_IN).double()
    sae.loss(x, TrainState()).total.backward()
    z = sae.pre_activations(sae.scaled(x))[0]
    beyond = z.argsort(descending=True)[1:4]
    beyond = beyond[z[beyond] > 0]
    assert len(beyond) > 0 and (sae.W_enc_rows.grad[beyond].abs().amax(1) > 0).all()


def test_groupmax_is_the_largest_of_each_group(small, rows):
    sae, x = small(selection="groupmax", k=4), rows(50, D_IN).double()
    z = sae.pre_activations(sae.scaled(x)).detach().numpy()
    expected = np.zeros_like(z)
    for group in range(4):
        best = 3 * group + z[:, 3 * group : 3 * group + 3].argmax(1)
        expected[np.arange(50), best] = np.maximum(z[np.arange(50), best], 0)
    np.testing.assert_array_equal(sae.encode(x).detach(), expected)


def test_abstopk_keeps_signs(small, rows):
    sae, x = small(selection="abstopk"), rows(50, D_IN).double()
    z = sae.pre_activations(sae.scaled(x)).detach().numpy()
    expected = np.zeros_like(z)
    for row in range(50):
        best = np.argsort(-np.abs(z[row]))[:K]
        expected[row, best] = z[row, best]
    np.testing.assert_array_equal(sae.encode(x).detach(), expected)
    assert (expected < 0).any() and sae.encode_sparse(x).counts.tolist() == [K] * 50


def test_k_comes_down_over_its_share_of_training(small, rows):
    sae, x = small(k=2, k_start=10, k_anneal=0.5), rows(400, D_IN).double()
    with torch.no_grad():
        sae.b_enc.fill_(100.0)  # All positive: L0 is k.
    l0 = [sae.loss(x, TrainState(progress=p)).l0.item() for p in (0, 0.125, 0.25, 0.5, 0.9)]
    assert l0 == [10, 8, 6, 2, 2]
    assert sae.encode_sparse(x).counts.max() == 2


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
        ({"k": 3, "target_l0": 2.5}, r"sae\.target_l0=2\.5: k is a whole number here"),
        ({"k": 3, "k_start": 99}, r"sae\.k_start=99: must be <= d_sae=24"),
        ({"k": 3, "k_start": 2}, r"sae\.k_start=2: k comes down from it; must be >= 3"),
        ({"k": 5, "selection": "groupmax"}, r"sae\.k=5: groupmax needs a divisor of d_sae=24"),
        ({"k": 0}, r"sae\.k=0: must be > 0"),
        ({"k": 3, "multi_topk": -1.0}, r"sae\.multi_topk=-1\.0: must be >= 0"),
        ({"k": 3, "loss_reduction": "total"}, "sae.loss_reduction=total: not one of its values"),
    ):
        with pytest.raises(ConfigError, match=message):
            new("topk", 8, 24, **options)


def test_planted_dictionary_is_recovered(new, recovered):
    assert recovered(new("topk", 32, 96, k=4), n_steps=1_200) > 0.95


def test_fold_keeps_the_normalised_loss(small, rows):
    sae, x = small(), rows(20, D_IN).double()
    before = sae.loss(x, TrainState())
    after = sae.fold().loss(x, TrainState())
    assert after.total.item() == pytest.approx(before.total.item(), rel=1e-6)


@pytest.mark.parametrize("selection", ["topk", "abstopk"])
def test_what_is_used_has_the_gradient_of_the_dense_map(make, rows, selection):
    sae = make("topk", D_IN, D_SAE, selection=selection, k=4).double()
    x, weight = rows(20, D_IN).double().requires_grad_(), rows(20, D_IN, seed=9).double()
    found, expected = ((y * weight).sum() for y in (sae(x).x_hat, sae.decode(sae.encode(x))))
    inputs = [x, *sae.parameters()]
    for a, b in zip(
        torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs), strict=True
    ):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
