"""Whitening, layer norm and the loss reductions, for every architecture, against NumPy."""

import copy

import numpy as np
import pytest
import torch

from sae_runner.checkpoint import build_sae, load_sae, read_facts, save_checkpoint
from sae_runner.config import preset
from sae_runner.errors import ConfigError
from sae_runner.saes import SAES
from sae_runner.saes._scaling import ScaledOnce, whitening_of
from sae_runner.saes.base import TrainState

AUTOENCODERS = [kind for kind in SAES.names() if kind != "transcoder"]
"""Two sites would have to be whitened or normalised apart: a transcoder refuses both."""
every_kind = pytest.mark.parametrize("kind", AUTOENCODERS)
WHITENS = [kind for kind in AUTOENCODERS if kind != "matching_pursuit"]
"""One matrix cannot take in a whitening and its inverse: matching pursuit refuses it."""
every_whitening_kind = pytest.mark.parametrize("kind", WHITENS)


def correlated(n: int, d: int = 8, seed: int = 3) -> torch.Tensor:
    """Rows off centre whose directions differ in size by a factor of 30 and are not the axes."""
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(0)))[0]
    return (torch.randn(n, d, generator=generator) * torch.logspace(-1, 0.5, d)) @ turn + 2


@pytest.fixture
def trained(new, stats):
    """An SAE a few steps into training on correlated rows, in double precision."""

    def build(kind, **options):
        sae = new(kind, 8, 24, **options)
        x, generator = correlated(400), torch.Generator().manual_seed(1)
        sae.initialise(stats(x), generator)
        with torch.no_grad():
            sae.b_enc.add_(0.1 * torch.randn(24, generator=generator))
            sae.b_dec.add_(0.1 * torch.randn(8, generator=generator))
            if kind == "gated":
                sae.r_mag.add_(0.3 * torch.randn(24, generator=generator))
        sae = sae.double()
        optimiser = torch.optim.SGD(sae.parameters(), lr=1e-3)
        for batch in x.double().split(100):
            optimiser.zero_grad()
            sae.loss(batch, TrainState()).total.backward()
            sae.before_step()
            optimiser.step()
            sae.after_step()
        return sae

    return build


# -- Whitening -----------------------------------------------------------------------------------


def test_whitened_rows_have_unit_covariance(stats):
    x = correlated(5_000)
    found = whitening_of(stats(x), ridge=0.0)
    z = (x.double().numpy() - found.mean.numpy()) @ found.forward.numpy()
    np.testing.assert_allclose(np.cov(z.T, bias=True), np.eye(8), atol=1e-5)
    np.testing.assert_allclose(z.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(found.forward @ found.backward, np.eye(8), atol=1e-12)
    # Of all matrices that whiten it is the one that turns nothing.
    np.testing.assert_allclose(found.forward, found.forward.T, atol=1e-12)


def test_ridge_keeps_directions_without_variance_small(stats):
    x = correlated(5_000)
    x[:, 0] = x[:, 1]  # The difference of the two is always 0.
    found = whitening_of(stats(x))
    values, vectors = np.linalg.eigh(np.cov(x.double().numpy().T, bias=True))
    expected = values / (values + 1e-3 * values.mean())
    z = (x.double().numpy() - found.mean.numpy()) @ found.forward.numpy()
    found_values = np.diag(vectors.T @ np.cov(z.T, bias=True) @ vectors)
    np.testing.assert_allclose(found_values, expected, atol=1e-6)
    assert np.linalg.norm(found.forward.numpy(), 2) <= (1e-3 * values.mean()) ** -0.5 * 1.001


@every_whitening_kind
def test_the_weights_see_whitened_rows(trained, kind):
    x = correlated(400).double()
    sae = trained(kind, input_scaling="whitening")
    z = sae.scaled(x)
    values, vectors = np.linalg.eigh(np.cov(x.numpy().T, bias=True))
    expected = (vectors * (values / (values + 1e-3 * values.mean()))) @ vectors.T
    np.testing.assert_allclose(np.cov(z.numpy().T, bias=True), expected, atol=1e-4)
    np.testing.assert_allclose(expected, np.eye(8), atol=0.1)  # The ridge takes that much.
    torch.testing.assert_close(sae.unscaled(z), x, rtol=1e-5, atol=1e-5)
    assert sae.input_scale == 1
    torch.testing.assert_close(sae(x).x_hat, sae.decode(sae.encode(x)), rtol=1e-6, atol=1e-9)


@every_whitening_kind
@pytest.mark.parametrize("subtracts", [True, False])
def test_folded_whitening_takes_raw_rows(trained, kind, subtracts):
    x = correlated(300, seed=5).double()
    sae = trained(kind, input_scaling="whitening", apply_b_dec_to_input=subtracts)
    before = sae(x)
    after = sae.fold()(x)
    assert torch.equal(sae.scaled(x), x)
    assert sae.config()["input_scaling"] == "none" and sae.config()["units"] is None
    assert not {"whitening", "unwhitening", "input_mean"} & sae.tensors().keys()
    assert torch.equal(after.latents.indices, before.latents.indices)
    error = (after.x_hat - before.x_hat).norm() / before.x_hat.norm()
    assert error < 1e-6


@every_whitening_kind
@pytest.mark.parametrize("reduction", ["sum", "normalised"])
def test_whitening_is_taken_up_again(trained, kind, reduction):
    x = correlated(300, seed=5).double()
    sae = trained(kind, input_scaling="whitening", loss_reduction=reduction)
    like, state = copy.deepcopy(sae), TrainState(0.5)
    before, loss = sae(x).x_hat, sae.loss(x, state)
    assert sae.fold().unfold_like(like) is sae
    # The whitening and its inverse are rounded to float32, each: 30 times 1e-7, and some.
    torch.testing.assert_close(sae(x).x_hat, before, rtol=1e-5, atol=1e-5)
    assert sae.loss(x, state).total.item() == pytest.approx(loss.total.item(), rel=1e-4)
    for name in ("input_scaling", "loss_reduction"):
        assert sae.config()[name] == like.config()[name]


@every_whitening_kind
def test_a_saved_whitening_sae_is_the_same_map(trained, kind, tmp_path):
    x = correlated(300, seed=5)
    sae = trained(kind, input_scaling="whitening").float()
    save_checkpoint(tmp_path / "step_1", sae, {"step": 1})
    loaded = load_sae(tmp_path / "step_1")
    assert loaded.kind == kind
    expected = copy.deepcopy(sae).double()(x.double()).x_hat
    error = (loaded(x).x_hat - expected).norm() / expected.norm()
    assert error < 1e-5
    assert build_sae(read_facts(tmp_path / "step_1")).config() == loaded.config()


# -- Layer norm ----------------------------------------------------------------------------------


def normalised(x: torch.Tensor) -> torch.Tensor:
    """By torch: its deviations are over d, those of Gao et al. over d − 1."""
    d = x.shape[1]
    return torch.nn.functional.layer_norm(x, (d,), eps=0.0) * ((d - 1) / d) ** 0.5


@every_kind
def test_layer_norm_is_applied_and_undone(trained, kind):
    x = correlated(100, seed=5).double()
    sae = trained(kind, input_scaling="layer_norm")
    if sae.calibrates:  # The threshold of these rows selects what training does.
        sae.calibrate(iter([x]), len(x))
    z = sae.scaled(x)
    torch.testing.assert_close(z, normalised(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sae.unscaled(z, x), x, rtol=1e-4, atol=1e-4)
    out, numbers = sae(x), x.numpy()
    mean, deviation = numbers.mean(1, keepdims=True), numbers.std(1, ddof=1, keepdims=True)
    f = sae.encode(x).detach().numpy()
    in_rows = f @ sae.W_dec.detach().numpy() + sae.b_dec.detach().numpy()
    np.testing.assert_allclose(out.x_hat.detach(), in_rows * deviation + mean, rtol=1e-9)
    # Without the rows there is nothing to undo it with.
    np.testing.assert_allclose(sae.decode(out.latents).detach(), in_rows, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(sae.loss(x, TrainState()).residual, z - torch.from_numpy(in_rows))


@every_kind
def test_layer_norm_takes_no_notice_of_size_and_offset(trained, kind):
    x = correlated(100, seed=5).double()
    sae = trained(kind, input_scaling="layer_norm")
    latents = sae.encode(x)
    torch.testing.assert_close(sae.encode(7 * x - 3), latents, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(sae(7 * x - 3).x_hat, 7 * sae(x).x_hat - 3, rtol=1e-3, atol=1e-3)
    flat = torch.full((2, 8), 4.0, dtype=torch.float64)  # All numbers of a row are equal.
    torch.testing.assert_close(sae(flat).x_hat, flat)


@every_kind
def test_layer_norm_stays_part_of_a_folded_sae(trained, kind, tmp_path):
    x = correlated(100, seed=5)
    sae = trained(kind, input_scaling="layer_norm")
    before = sae(x.double()).x_hat
    folded = copy.deepcopy(sae).fold()
    assert folded.config()["input_scaling"] == "layer_norm"
    torch.testing.assert_close(folded(x.double()).x_hat, before, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(folded.unfold_like(sae)(x.double()).x_hat, before)
    save_checkpoint(tmp_path / "step_1", sae.float(), {"step": 1})
    loaded = load_sae(tmp_path / "step_1")(x).x_hat
    assert (loaded - before).norm() / before.norm() < 1e-6


def test_gradients_pass_through_layer_norm(trained):
    x = correlated(6, seed=5).double().requires_grad_()
    sae = trained("relu", input_scaling="layer_norm")
    assert torch.autograd.gradcheck(lambda rows: sae(rows).x_hat, x, atol=1e-5)


# -- Reductions ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scaling", ["none", "sqrt_d", "unit_mean_square", "layer_norm", "whitening"]
)
@pytest.mark.parametrize("reduction", ["sum", "mean", "normalised", "row_norm"])
def test_reductions_are_of_scaled_rows(new, stats, scaling, reduction):
    x = correlated(400)
    sae = new("topk", 8, 24, input_scaling=scaling, loss_reduction=reduction)
    sae.initialise(stats(x), torch.Generator().manual_seed(0))
    z = sae.scaled(x)
    loss = sae.loss(x, TrainState())
    z, e = z.double().numpy(), loss.residual.double().numpy()
    expected = {
        "sum": (e**2).sum(1).mean(),
        "mean": (e**2).mean(),
        "normalised": (e**2).mean() / ((z - z.mean(0)) ** 2).mean(),
        "row_norm": (e**2 / np.linalg.norm(z, axis=1, keepdims=True)).mean(),
    }[reduction]
    assert loss.total.item() == pytest.approx(expected, rel=1e-4)


def test_empty_rows_do_not_outweigh_all_others(new, stats):
    x = correlated(400)
    sae = new("topk", 8, 24, loss_reduction="row_norm")
    sae.initialise(stats(x), torch.Generator().manual_seed(0))
    before = sae.loss(x, TrainState()).total.item()
    x[0] = 0
    assert sae.loss(x, TrainState()).total.item() < 2 * before
    assert torch.isfinite(sae.loss(torch.zeros(3, 8), TrainState()).total)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"units": ["sqrt_d", "sum"], "input_scaling": "whitening", "loss_reduction": "sum"},
            r"sae\.input_scaling=whitening: the coefficients of this recipe are for sqrt_d; "
            r"set sae\.input_scaling=sqrt_d, or choose your own and set sae\.units=null",
        ),
        (
            {"units": ["sqrt_d", "sum"], "input_scaling": "sqrt_d", "loss_reduction": "mean"},
            r"sae\.loss_reduction=mean: the coefficients of this recipe are for sum; "
            r"set sae\.loss_reduction=sum",
        ),
    ],
)
@pytest.mark.parametrize("kind", ["relu", "topk"])
def test_coefficients_of_other_units_are_refused(new, kind, options, message):
    with pytest.raises(ConfigError, match=message):
        new(kind, 8, 24, **options)
    new(kind, 8, 24, **{**options, "units": None})
    new(kind, 8, 24, **{**options, "input_scaling": "sqrt_d", "loss_reduction": "sum"})
    either = ["layer_norm", options["input_scaling"]]
    new(kind, 8, 24, **{**options, "units": either})


@pytest.mark.parametrize("kind", ["relu", "gated", "p_anneal"])
def test_a_coefficient_is_of_its_own_units_unless_a_target_finds_it(new, kind):
    own = preset("sae", kind)["units"]
    for changes in ({"input_scaling": "layer_norm"}, {"loss_reduction": "mean"}):
        with pytest.raises(ConfigError, match=r"coefficients of this recipe .*sae\.units=null"):
            new(kind, 8, 24, units=own, **changes)
        new(kind, 8, 24, units=own, target_l0=3, **changes)
    with pytest.raises(ConfigError, match=r"sae\.input_scaling=none"):  # ε and θ are of units too.
        new("jump_relu", 8, 24, units=["unit_mean_square"], target_l0=3, input_scaling="none")


# -- How the encoder starts ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["relu", "topk", "archetypal"])
@pytest.mark.parametrize("scaling", ["sqrt_d", "layer_norm", "whitening"])
def test_a_matched_encoder_reconstructs_rows_of_their_length(new, stats, kind, scaling):
    x = correlated(500)
    sae = new(kind, 8, 24, input_scaling=scaling, encoder_init="matched", b_dec_init="mean")
    sae.initialise(stats(x), torch.Generator().manual_seed(0))
    z, b = sae.scaled(x), sae.b_dec
    x_hat = sae.decode_scaled(sae.encode(x))
    lengths = [(rows - b).norm(dim=1).mean().item() for rows in (x_hat, z)]
    assert lengths[0] == pytest.approx(lengths[1], rel=1e-5)
    cosines = torch.cosine_similarity(sae.W_enc_rows, sae.W_dec)
    torch.testing.assert_close(cosines, torch.ones(24))


def test_where_nothing_fires_a_matched_encoder_is_left_alone(new, stats):
    x = correlated(500)
    sae = new("jump_relu", 8, 24, encoder_init="matched", initial_threshold=1e6)
    sae.initialise(stats(x), torch.Generator().manual_seed(0))
    assert sae.W_enc_rows.norm(dim=1).max() < 2


@pytest.mark.parametrize("kind", ["relu", "topk", "archetypal"])
def test_a_random_encoder_is_not_the_decoder(new, stats, kind):
    x = correlated(500)
    sae = new(kind, 8, 24, encoder_init="random", decoder_norm="free", decoder_init_norm=0.3)
    sae.initialise(stats(x), torch.Generator().manual_seed(0))
    assert torch.cosine_similarity(sae.W_enc_rows, sae.W_dec).abs().mean() < 0.6
    torch.testing.assert_close(sae.W_enc_rows.norm(dim=1), torch.full((24,), 0.3))


def test_a_unit_that_there_is_not_is_refused(new):
    with pytest.raises(
        ConfigError, match=r"sae\.units=sqrtd: no such unit\. Did you mean 'sqrt_d'"
    ):
        new("relu", 8, 24, units=["sqrtd", "sum"])


# -- Several SAEs of one batch ---------------------------------------------------------------------


def test_rows_of_one_batch_are_scaled_once(new, stats):
    x, once, calls = correlated(40), ScaledOnce(), []
    saes = [
        new(kind, 8, 24, input_scaling=scaling, units=None)
        for kind, scaling in (
            ("topk", "layer_norm"), ("relu", "layer_norm"), ("relu", "whitening"),
            ("gated", "whitening"), ("relu", "sqrt_d"), ("relu", "unit_mean_square"),
        )
    ]  # fmt: skip
    for sae in saes:
        sae.initialise(stats(correlated(400)), torch.Generator().manual_seed(1))
    other = new("relu", 8, 24, input_scaling="sqrt_d", units=None)
    other.initialise(stats(3 * correlated(400)), torch.Generator().manual_seed(1))
    saes.append(other)  # Whose scale is another.
    batches = (x[:16], x[16:32].clone())
    expected = [[sae.scaled(batch) for sae in saes] for batch in batches]
    for sae in saes:
        real = sae._scaled
        sae._scaled = lambda rows, real=real: (calls.append(len(rows)), real(rows))[1]
        sae.share_scaling(once)
    for batch, wanted in zip(batches, expected, strict=True):
        once.begin(batch)
        calls.clear()
        for sae, scaled in zip(saes, wanted, strict=True):
            assert torch.equal(sae.scaled(batch), scaled)
            assert torch.equal(torch.cat([sae.scaled(p) for p in batch.split(10)]), scaled)
        assert sorted(calls) == [6] * 5 + [10] * 5 + [16] * 5  # Five scalings of seven SAEs.
    calls.clear()
    for sae in saes:
        sae.scaled(x[32:].clone())  # Of no batch.
    assert calls == [8] * 7


def test_a_copy_that_is_folded_scales_no_more(new, stats):
    x, once = correlated(40), ScaledOnce()
    sae = new("relu", 8, 24, input_scaling="sqrt_d", units=None)
    sae.initialise(stats(x), torch.Generator().manual_seed(1))
    sae.share_scaling(once)
    once.begin(x)
    x_hat = sae(x).x_hat
    torch.testing.assert_close(copy.deepcopy(sae).fold()(x).x_hat, x_hat)
