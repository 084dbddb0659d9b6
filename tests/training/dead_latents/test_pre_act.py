"""The pre-activation loss against its formula written a second time, in NumPy and float64."""

import numpy as np
import pytest
import torch

from sae_runner.errors import ConfigError
from sae_runner.saes.base import TrainState
from sae_runner.training.dead_latents import DEAD_LATENTS
from sae_runner.training.dead_latents.pre_act import PreAct

D_IN, D_SAE = 5, 12
DEAD = np.array([0, 1, 0, 0, 1, 1, 0, 0, 0, 1, 0, 1], dtype=bool)
NAMES = ("W_enc", "W_dec", "b_enc", "threshold")


def parameters(sae) -> dict:
    tensors = {"threshold": torch.zeros(D_SAE), **sae.tensors()}
    return {name: tensors[name].double().numpy().copy() for name in NAMES}


def reference(p: dict, scaled: np.ndarray, latents: np.ndarray) -> float:
    z = scaled @ p["W_enc"] + p["b_enc"]
    short = np.maximum(p["threshold"] - z, 0) * np.linalg.norm(p["W_dec"], axis=1)
    return short[:, latents].sum(1).mean()


@pytest.fixture
def small(make):
    def build(kind="jump_relu", only_dead=False):
        sae = make(
            kind, D_IN, D_SAE, penalty="tanh", decoder_norm="free", decoder_init_norm=0.7,
            initial_threshold=0.4, input_scaling="sqrt_d",
        ).double()  # fmt: skip
        strategy = PreAct(sae, 10, coefficient=0.5, only_dead=only_dead)
        strategy.rows_since_fired[torch.from_numpy(DEAD)] = 10
        return sae, strategy

    return build


@pytest.mark.parametrize("kind", ["jump_relu", "relu"])
@pytest.mark.parametrize("only_dead", [False, True])
def test_value_and_gradient_are_the_formula(small, rows, kind, only_dead):
    (sae, strategy), x = small(kind, only_dead), rows(20, D_IN).double()
    at, plain, scaled = parameters(sae), sae.loss(x, TrainState()), sae.scaled(x).numpy()
    latents = DEAD if only_dead else np.ones(D_SAE, dtype=bool)
    loss = strategy.add_to(plain, x)
    assert loss.parts["pre_act"].item() == pytest.approx(reference(at, scaled, latents), rel=1e-12)
    (loss.total - plain.total).backward()
    for name, values in at.items():
        if name == "threshold" and kind == "relu":
            continue
        numeric = np.zeros_like(values)
        for entry in np.ndindex(values.shape):
            step = np.zeros_like(values)
            step[entry] = 1e-6
            up, down = at | {name: values + step}, at | {name: values - step}
            numeric[entry] = (
                reference(up, scaled, latents) - reference(down, scaled, latents)
            ) / 4e-6
        found = sae.W_enc_rows.grad.T if name == "W_enc" else getattr(sae, name).grad
        assert np.abs(numeric).max() > 1e-3
        np.testing.assert_allclose(found.numpy(), numeric, rtol=1e-5, atol=1e-7, err_msg=name)


def test_dead_latents_alone_can_be_meant(small, rows):
    (sae, strategy), x = small(only_dead=True), rows(20, D_IN).double()
    with torch.no_grad():
        sae.b_enc[DEAD] = -100.0
    plain = sae.loss(x, TrainState())
    assert not plain.fired[DEAD].any()
    (strategy.add_to(plain, x).total - plain.total).backward()
    for gradient in (sae.W_enc_rows.grad, sae.b_enc.grad, sae.threshold.grad):
        assert (gradient[DEAD].reshape(DEAD.sum(), -1).abs().amax(1) > 0).all()
        assert not gradient[~DEAD].any()
    strategy.rows_since_fired.zero_()
    assert strategy.add_to(plain, x).parts["pre_act"] == 0


def test_it_pulls_no_further_than_to_the_threshold(small, rows):
    (sae, strategy), x = small(), rows(20, D_IN).double()
    with torch.no_grad():
        sae.b_enc.fill_(100.0)
    assert strategy.term(x) == 0


@pytest.mark.parametrize("kind", ["topk", "batch_topk", "matryoshka", "matching_pursuit"])
def test_kinds_that_choose_by_rank_are_refused(new, kind):
    cfg = {"type": "pre_act", "coefficient": 1.0, "only_dead": True}
    with pytest.raises(ConfigError, match=r"sae/dead_latents=pre_act: a latent fires by .* auxk"):
        DEAD_LATENTS.build(cfg, sae=new(kind, 32, 64), window=1)


@pytest.mark.parametrize(
    ("kind", "coefficient", "lr"), [("relu", 3e-6, 1e-2), ("jump_relu", 1e-3, 2e-3)]
)
def test_dead_latents_fire_again(new, revived, kind, coefficient, lr):
    def sae():
        return new(kind, 32, 64, l1_coefficient=0.5)

    strategy = {"type": "pre_act", "coefficient": coefficient, "only_dead": False}
    assert revived(sae(), {"type": "none"}, lr=lr) == 0
    assert revived(sae(), strategy, n_steps=500, lr=lr) > 0.5
