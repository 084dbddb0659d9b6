"""Matching pursuit against a loop over rows, in NumPy and float64."""

import copy

import numpy as np
import pytest
import torch
from sklearn.linear_model import orthogonal_mp

from sae_runner.errors import ConfigError
from sae_runner.saes.base import TrainState
from sae_runner.training.dead_latents import DEAD_LATENTS

D_IN, D_SAE, K = 5, 12, 4


def pursuit(r: np.ndarray, w: np.ndarray, k: int, threshold: float, stop_on_repeat: bool):
    """Latents of one row, the order they were taken in, and the residual after each step."""
    f, order, residuals = np.zeros(len(w)), [], [r]
    for _ in range(k):
        projections = np.maximum(w @ r, 0)
        best = int(projections.argmax())
        if projections[best] == 0:
            break
        f[best] += projections[best]
        r = r - projections[best] * w[best]
        residuals.append(r)
        if np.linalg.norm(r) < threshold or (stop_on_repeat and best in order):
            break
        order.append(best)
    return f, order, residuals


def reference(p: dict, x: np.ndarray, sae) -> np.ndarray:
    centred = sae.input_scale.item() * x - p["b_dec"]
    rules = sae.k, sae.residual_threshold, sae.stop_on_repeat
    return np.stack([pursuit(row, p["W_dec"], *rules)[0] for row in centred])


def parameters(sae) -> dict:
    return {name: sae.tensors()[name].double().numpy().copy() for name in ("W_dec", "b_dec")}


@pytest.fixture
def small(make):
    def build(d_sae=D_SAE, **options):
        sae = make("matching_pursuit", D_IN, d_sae, **{"k": K, **options}).double()
        sae.normalise_decoder()  # The rows were drawn in single precision.
        return sae

    return build


@pytest.mark.parametrize("stop_on_repeat", [True, False])
@pytest.mark.parametrize("threshold", [0.0, 0.7])
@pytest.mark.parametrize("k", [1, 4, 12])
def test_latents_are_those_of_the_loop(small, rows, k, threshold, stop_on_repeat):
    sae = small(k=k, residual_threshold=threshold, stop_on_repeat=stop_on_repeat)
    x = rows(300, D_IN).double()
    expected = reference(parameters(sae), x.numpy(), sae)
    np.testing.assert_allclose(sae.encode(x).detach(), expected, atol=1e-12)
    latents = sae.encode_sparse(x)
    np.testing.assert_allclose(latents.dense().detach(), expected, atol=1e-12)
    assert latents.counts.tolist() == (expected > 0).sum(1).tolist()
    assert all(row.diff().min() > 0 for row in latents.indices.split(latents.counts.tolist())
               if len(row) > 1)  # fmt: skip
    loss = sae.loss(x, TrainState())
    assert loss.fired.tolist() == (expected > 0).sum(0).tolist()
    assert loss.l0.item() == pytest.approx((expected > 0).sum(1).mean())
    if k == 12:  # The cases in which the rules differ did occur.
        counts = (expected > 0).sum(1)
        assert counts.min() < counts.max() < 12


def test_rules_for_stopping_by_hand(small):
    """Rows at 60 degrees: each step leaves half of what the one before it left, in turn."""
    sae = small(d_sae=2, k=2, input_scaling="none", residual_threshold=0.0)
    with torch.no_grad():
        sae.b_dec.zero_()
        sae.W_dec.zero_()
        sae.W_dec[0, 0], sae.W_dec[1, 0], sae.W_dec[1, 1] = 1.0, -0.5, 0.75**0.5
    x = torch.zeros(1, D_IN, dtype=torch.float64)
    x[0, 0], x[0, 1] = 1.0, 2.0

    def encoded(k, **options):
        for name, value in options.items():
            setattr(sae, name, value)
        sae.k = k
        return sae.encode(x)[0].tolist()

    v = -0.5 + 2 * 0.75**0.5  # Along the second, which is the larger; then 1 + v/2 along the first.
    assert encoded(1) == pytest.approx([0, v])
    assert encoded(2) == pytest.approx([1 + v / 2, v])
    again = (1 + v / 2) / 2  # The second once more: taking the first away leaves half of it there.
    assert encoded(3) == pytest.approx([1 + v / 2, v + again])
    assert encoded(9, stop_on_repeat=True) == pytest.approx([1 + v / 2, v + again])
    assert encoded(4, stop_on_repeat=False) == pytest.approx([1 + v / 2 + again / 2, v + again])
    left = np.linalg.norm(x[0, :2].numpy() - v * sae.W_dec[1, :2].detach().numpy())
    assert encoded(9, residual_threshold=left * 1.001) == pytest.approx([0, v])
    assert encoded(2, residual_threshold=left * 0.999) == pytest.approx([1 + v / 2, v])
    x[0, :2] = torch.tensor([-1.0, -1.0])  # Neither is positive.
    assert encoded(9) == [0, 0]
    assert sae.loss(x, TrainState()).l0 == 0


def test_what_is_left_never_grows(small, rows):
    x = rows(200, D_IN).double()
    sae = small(k=12, stop_on_repeat=False, residual_threshold=0.0)
    p = parameters(sae)
    lengths = []
    for k in range(1, 13):
        sae.k = k
        left = sae.scaled(x) - sae.decode_scaled(sae.encode_sparse(x))
        lengths.append(left.norm(dim=1).detach().numpy())
    assert (np.diff(lengths, axis=0) <= 1e-12).all()
    assert lengths[-1].mean() < 0.3 * lengths[0].mean()
    first = sae.scaled(x)[0].numpy() - p["b_dec"]
    by_loop = [np.linalg.norm(r) for r in pursuit(first, p["W_dec"], 12, 0.0, False)[2][1:]]
    np.testing.assert_allclose([length[0] for length in lengths][: len(by_loop)], by_loop)


def orthonormal(sae) -> np.ndarray:
    drawn = np.linalg.qr(np.random.default_rng(0).normal(size=(sae.d_in, sae.d_in)))[0]
    with torch.no_grad():
        sae.W_dec.copy_(torch.from_numpy(drawn.T))
    return drawn.T


def test_orthonormal_rows_are_chosen_as_topk_would(small, rows):
    sae, x = small(d_sae=D_IN, k=3, residual_threshold=0.0), rows(100, D_IN).double()
    w = orthonormal(sae)
    z = (sae.scaled(x) - sae.b_dec).detach().numpy() @ w.T
    kept = np.zeros_like(z)
    for row, values in enumerate(z):
        best = np.argsort(-values)[:3]
        kept[row, best] = np.maximum(values[best], 0)
    np.testing.assert_allclose(sae.encode(x).detach(), kept, atol=1e-12)


def test_orthonormal_rows_are_chosen_as_scikit_learns_pursuit_would(small, rows):
    """It takes negative projections too: rows whose projections are positive are compared."""
    sae = small(d_sae=D_IN, k=3, residual_threshold=0.0, input_scaling="none")
    w = orthonormal(sae)
    positive = np.abs(np.random.default_rng(1).normal(size=(50, D_IN)))
    x = torch.from_numpy(positive @ w) + sae.b_dec.detach()
    expected = orthogonal_mp(w.T, (x - sae.b_dec).detach().numpy().T, n_nonzero_coefs=3)
    np.testing.assert_allclose(sae.encode(x).detach(), expected.T, atol=1e-12)


@pytest.mark.parametrize("reduction", ["sum", "normalised"])
@pytest.mark.parametrize("threshold", [0.0, 0.7])
def test_loss_and_gradient_are_those_of_the_loop(small, rows, threshold, reduction):
    sae = small(k=6, residual_threshold=threshold, loss_reduction=reduction)
    x = rows(20, D_IN).double()

    def total(p):
        scaled = sae.input_scale.item() * x.numpy()
        x_hat = reference(p, x.numpy(), sae) @ p["W_dec"] + p["b_dec"]
        sse = ((scaled - x_hat) ** 2).sum(1).mean()
        return sse if reduction == "sum" else sse / D_IN / sae.mean_baseline_mse.item()

    at, loss = parameters(sae), sae.loss(x, TrainState())
    assert loss.total.item() == pytest.approx(total(at), rel=1e-12)
    loss.total.backward()
    assert dict(sae.named_parameters()).keys() == at.keys()
    for name, values in at.items():
        numeric = np.zeros_like(values)
        for entry in np.ndindex(values.shape):
            step = np.zeros_like(values)
            step[entry] = 1e-6
            numeric[entry] = (
                total(at | {name: values + step}) - total(at | {name: values - step})
            ) / 2e-6
        assert np.abs(numeric).max() > 1e-4
        np.testing.assert_allclose(getattr(sae, name).grad, numeric, rtol=1e-5, atol=1e-7)


def test_there_is_one_matrix(small, rows):
    sae = small()
    assert {"W_dec", "b_dec"} <= sae.tensors().keys()
    assert not {"W_enc", "b_enc", "W_enc_rows"} & sae.tensors().keys()
    assert torch.equal(sae.W_enc, sae.W_dec.T) and not sae.b_enc.any()
    x, some = sae.scaled(rows(9, D_IN).double()), torch.tensor([7, 2])
    z = (x - sae.b_dec) @ sae.W_dec.T
    torch.testing.assert_close(sae.pre_activations(x), z)
    torch.testing.assert_close(sae.pre_activations(x, some), z[:, some])
    directions = torch.nn.functional.normalize(rows(2, D_IN, seed=5), dim=1)
    sae.reset_latents(some, directions, 0.2)
    torch.testing.assert_close(sae.W_dec[some], directions.double())


def test_fold_keeps_where_rows_stop(small, rows):
    sae, x = small(k=12, residual_threshold=0.7), rows(300, D_IN).double()
    before, like = sae(x), copy.deepcopy(sae)
    counts = before.latents.counts
    assert counts.min() < counts.max()
    after = sae.fold()(x)
    assert sae.residual_threshold == pytest.approx(0.7 / like.input_scale.item())
    assert sae.config()["residual_threshold"] == sae.residual_threshold
    assert torch.equal(after.latents.counts, counts)
    torch.testing.assert_close(after.x_hat, before.x_hat, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE).double())
    sae.unfold_like(like)
    assert sae.residual_threshold == pytest.approx(0.7)


def test_options_that_need_an_encoder_are_refused(new):
    for options, message in (
        ({"apply_b_dec_to_input": False}, r"sae\.apply_b_dec_to_input=false: .* set it to true"),
        ({"encoder_init": "random"}, r"sae\.encoder_init=random: .* set it to transposed"),
        ({"decoder_norm": "free"}, r"sae\.decoder_norm=free: .* set it to unit"),
        ({"input_scaling": "whitening"}, r"sae\.input_scaling=whitening: one matrix cannot"),
        ({"k": 25}, r"sae\.k=25: must be <= d_sae=24"),
        ({"residual_threshold": -1.0}, r"sae\.residual_threshold=-1\.0: must be >= 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            new("matching_pursuit", 8, 24, **options)
    assert new("matching_pursuit", 8, 24, target_l0=7).k == 7


def test_nothing_as_large_as_all_steps_of_all_latents_is_made(new, stats, rows):
    """By sizes alone: [n, k, d_sae] would be 8 GB here, [n, d_sae] is 32 MB."""
    sae = new("matching_pursuit", 8, 65_536, k=256)
    x = rows(128)
    sae.initialise(stats(x), torch.Generator())
    largest = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            largest.extend(t.numel() for t in [out] if isinstance(t, torch.Tensor))
            return out

    sae.k = 16
    with Sizes():
        sae.loss(x, TrainState()).total.backward()
    assert max(largest) == 128 * 65_536


def test_planted_dictionary_is_recovered(new, recovered):
    assert recovered(new("matching_pursuit", 32, 96, k=4), n_steps=1_200) > 0.95


def test_auxk_trains_the_one_matrix_of_dead_latents(small, rows):
    """As encoder and as decoder: both ways count in the gradient."""
    sae, x = small(), rows(20, D_IN).double()
    auxk = DEAD_LATENTS.build({"type": "auxk", "coefficient": 0.5, "k_aux": 2}, sae=sae, window=10)
    auxk.rows_since_fired[:3] = 10
    plain = sae.loss(x, TrainState())
    centred, e = (sae.scaled(x) - sae.b_dec).detach().numpy(), plain.residual.numpy()

    def term(w):
        z = np.maximum(centred @ w[:3].T, 0)
        z[np.arange(len(z)), z.argmin(1)] = 0  # The 2 largest of 3.
        return ((z @ w[:3] - e) ** 2).mean() / ((e - e.mean(0)) ** 2).mean()

    w, loss = parameters(sae)["W_dec"], auxk.add_to(plain, x)
    assert loss.parts["auxk"].item() == pytest.approx(term(w), rel=1e-12)
    (loss.total - plain.total).backward()
    numeric = np.zeros_like(w)
    for entry in np.ndindex(w.shape):
        step = np.zeros_like(w)
        step[entry] = 1e-6
        numeric[entry] = 0.5 * (term(w + step) - term(w - step)) / 2e-6
    assert np.abs(numeric[:3]).min() > 0
    np.testing.assert_allclose(sae.W_dec.grad, numeric, rtol=1e-5, atol=1e-7)


def test_resampled_latents_fire_again(new, stats, rows):
    """Rows that point away from all data are never taken."""
    x = rows(4_096).abs() + 1
    sae = new("matching_pursuit", 8, 24, k=2, b_dec_init="zero")
    sae.initialise(stats(x), torch.Generator().manual_seed(0))
    with torch.no_grad():
        sae.W_dec[:6] = -sae.W_dec[:6].abs()
    options = {"at": [0.5], "n_rows": 2_000, "encoder_norm": 0.2, "lr_warmup": 0.0}
    dead = DEAD_LATENTS.build({"type": "resample", **options}, sae=sae, window=1_000)
    dead.rows_since_fired[:6] = 1_000
    assert not sae.loss(x, TrainState()).fired[:6].any()
    optimiser = torch.optim.Adam(sae.parameters())
    dead.intervene(iter([x[:2_000]]), optimiser, torch.Generator().manual_seed(0))
    assert (sae.loss(x, TrainState()).fired[:6] > 0).all()
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(24))
