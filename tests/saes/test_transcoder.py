"""The transcoder against formulas written a second time, in NumPy and float64."""

import copy

import numpy as np
import pytest
import torch

from sae_runner.checkpoint import load_sae, save_checkpoint
from sae_runner.config import preset
from sae_runner.errors import ConfigError
from sae_runner.saes import SAES
from sae_runner.saes.base import TrainState

D_IN, D_OUT, D_SAE, K = 5, 4, 12, 3
NAMES = ("W_enc", "W_dec", "b_enc", "b_dec", "W_skip")


def build(**options):
    cfg = preset("sae", "transcoder") | {"d_sae": D_SAE, "expansion": None, "k": K, **options}
    return SAES.build(cfg, d_in=D_IN, d_out=D_OUT)


def pairs(n, seed=3):
    """Inputs of another size and place than outputs, side by side."""
    drawn = torch.randn(n, D_IN + D_OUT, generator=torch.Generator().manual_seed(seed))
    return torch.cat([3 * drawn[:, :D_IN] + 1, 0.2 * drawn[:, D_IN:] - 2], dim=1)


@pytest.fixture
def small(stats):
    def initialised(**options):
        sae, rows = build(**options), pairs(64)
        norms = rows[:, :D_IN].norm(dim=1)  # As a paired store has them: of the input alone.
        found = stats(rows)._replace(
            mean_norm=norms.mean().item(), mean_square_norm=norms.square().mean().item()
        )
        sae.initialise(found, torch.Generator().manual_seed(1))
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in sae.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        sae.after_step()
        return sae.double()

    return initialised


def parameters(sae):
    found = sae.tensors()
    return {name: found[name].double().numpy().copy() for name in NAMES if name in found}


def reference(p, x, s, k):
    """The prediction of scaled y."""
    z = s * x @ p["W_enc"] + p["b_enc"]
    f = np.zeros_like(z)
    for row, values in enumerate(z):
        best = np.argsort(-values)[:k]
        f[row, best] = np.maximum(values[best], 0)
    return f @ p["W_dec"] + p["b_dec"] + (s * x @ p["W_skip"].T if "W_skip" in p else 0)


def test_each_side_has_its_own_scale(small):
    sae, rows = small(), pairs(64).double()
    x, y = sae.scaled(sae.input_of(rows)), sae.scaled_target(rows)
    assert x.norm(dim=1).mean().item() == pytest.approx(D_IN**0.5, rel=1e-6)
    assert y.norm(dim=1).mean().item() == pytest.approx(D_OUT**0.5, rel=1e-6)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("multi", [0.0, 0.25])
def test_loss_and_gradient_are_the_formulas(small, skip, multi):
    sae, rows = small(skip=skip, multi_topk=multi), pairs(20).double()
    x, y = rows[:, :D_IN].numpy(), rows[:, D_IN:].numpy()
    s, t = sae.input_scale.item(), sae.target_scale.item()
    baseline = sae.mean_baseline_mse.item()

    def total(p):
        errors = [((t * y - reference(p, x, s, k)) ** 2).mean() for k in (K, D_SAE)]
        return (errors[0] + multi * errors[1]) / baseline

    at, loss = parameters(sae), sae.loss(rows, TrainState())
    assert loss.total.item() == pytest.approx(total(at), rel=1e-12)
    x_hat = loss.x_hat.detach()
    np.testing.assert_allclose(x_hat, reference(at, x, s, K) / t, rtol=1e-10)
    np.testing.assert_allclose(sae(sae.input_of(rows)).x_hat.detach(), x_hat, rtol=1e-10)
    loss.total.backward()
    assert ("W_skip" in at) == skip
    for name, values in at.items():
        numeric = np.zeros_like(values)
        for entry in np.ndindex(values.shape):
            step = np.zeros_like(values)
            step[entry] = 1e-6
            up, down = at | {name: values + step}, at | {name: values - step}
            numeric[entry] = (total(up) - total(down)) / 2e-6
        gradient = (sae.W_enc_rows.grad.T if name == "W_enc" else getattr(sae, name).grad).numpy()
        assert np.abs(numeric).max() > 1e-4
        np.testing.assert_allclose(gradient, numeric, rtol=1e-5, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("scaling", ["none", "sqrt_d"])
def test_inputs_are_read_as_they_lie_in_pairs(small, scaling):
    """In float32 kernels read whole rows of memory, of which an input is a part."""
    sae = small(input_scaling=scaling).float()
    one, other, x = copy.deepcopy(sae), copy.deepcopy(sae).double(), pairs(16)
    for made, rows in ((one, x), (other, x.double())):
        made.loss(rows, TrainState()).total.backward()
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad.double(), q.grad, rtol=1e-4, atol=1e-5)
    inputs = x[:, :D_IN]
    assert not inputs.is_contiguous()
    found, wanted = sae(inputs), sae(inputs.clone())
    assert found.latents.indices.equal(wanted.latents.indices)


def test_predicting_the_mean_has_normalised_error_one(small):
    sae, rows = small(), pairs(64).double()
    with torch.no_grad():
        sae.b_enc.fill_(-1e3)
        sae.b_dec.copy_(sae.scaled_target(rows).mean(0))
    assert sae.loss(rows, TrainState()).total.item() == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("scaling", ["none", "sqrt_d", "unit_mean_square"])
def test_fold_and_its_undoing_change_units_only(small, skip, scaling, tmp_path):
    sae, rows = small(skip=skip, input_scaling=scaling), pairs(40).double()
    like, x = copy.deepcopy(sae), sae.input_of(rows)
    before, loss = sae(x), sae.loss(rows, TrainState()).total.item()
    save_checkpoint(tmp_path / "step_1", copy.deepcopy(sae).float(), {"step": 1})
    loaded = load_sae(tmp_path / "step_1")
    assert (loaded.d_in, loaded.d_out) == (D_IN, D_OUT)
    torch.testing.assert_close(loaded(x.float()).x_hat, before.x_hat.float(), rtol=1e-4, atol=1e-5)
    after = sae.fold()(x)
    assert sae.input_scale.item() == sae.target_scale.item() == 1
    torch.testing.assert_close(after.x_hat, before.x_hat, rtol=1e-6, atol=1e-9)
    assert torch.equal(after.latents.indices, before.latents.indices)
    assert sae.loss(rows, TrainState()).total.item() == pytest.approx(loss, rel=1e-6)
    sae.unfold_like(like)
    for name, tensor in like.tensors().items():
        torch.testing.assert_close(sae.tensors()[name], tensor, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"apply_b_dec_to_input": True}, r"sae\.apply_b_dec_to_input=true: .*set it to false"),
        ({"encoder_init": "transposed"}, r"sae\.encoder_init=transposed: .*set it to random"),
        ({"input_scaling": "whitening"}, r"sae\.input_scaling=whitening: a transcoder takes none"),
    ],
)
def test_what_only_an_autoencoder_has_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        build(**options)


def test_config_keeps_every_option_of_the_yaml():
    assert build().config().keys() == preset("sae", "transcoder").keys()


def test_a_planted_map_is_learned(stats):
    """y = relu(A x) B of a random A and B: a third of its variance is left to a linear map."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=generator) for shape in ((8, 32), (32, 6)))
    x = torch.randn(4096, 8, generator=generator)
    rows = torch.cat([x, (x @ a - 2).relu() @ b], dim=1)
    cfg = preset("sae", "transcoder") | {"d_sae": 128, "expansion": None, "k": 16}
    sae = SAES.build(cfg, d_in=8, d_out=6)
    sae.initialise(stats(rows), torch.Generator().manual_seed(1))
    optimiser = torch.optim.Adam(sae.parameters(), lr=3e-3)
    for _ in range(600):
        batch = rows[torch.randint(4096, (256,), generator=generator)]
        loss = sae.loss(batch, TrainState())
        optimiser.zero_grad()
        loss.total.backward()
        sae.before_step()
        optimiser.step()
        sae.after_step()
    y = sae.target_of(rows)
    design = torch.cat([x, torch.ones(4096, 1)], dim=1)
    linear = design @ torch.linalg.lstsq(design, y).solution

    def fvu(y_hat):
        return ((y - y_hat).square().sum() / (y - y.mean(0)).square().sum()).item()

    assert fvu(sae(x).x_hat.detach()) < 0.1 < 0.3 < fvu(linear)
