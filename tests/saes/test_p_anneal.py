"""p-annealing against formulas written a second time, in NumPy and float64."""

import copy

import numpy as np
import pytest
import torch

from sae_runner.errors import ConfigError, StoreError
from sae_runner.saes.base import TrainState

D_IN, D_SAE = 5, 12


def parameters(sae) -> dict:
    names = ("W_enc", "W_dec", "b_enc", "b_dec")
    return {name: sae.tensors()[name].double().numpy().copy() for name in names}


def reference(p: dict, x: np.ndarray, power: float, epsilon: float) -> tuple[float, float]:
    """Sum of squared errors and S_p of scaled rows, mean over rows."""
    f = np.maximum((x - p["b_dec"]) @ p["W_enc"] + p["b_enc"], 0)
    x_hat = f @ p["W_dec"] + p["b_dec"]
    s_p = np.where(f > 0, (f + epsilon) ** power - epsilon**power, 0)
    return ((x - x_hat) ** 2).sum(1).mean(), s_p.sum(1).mean()


@pytest.fixture
def small(make):
    def build(**options):
        options = {
            "sparsity_coefficient": 0.3,
            "n_p": 5,
            "anneal_start": 0.2,
            "anneal_end": 1.0,
            **options,
        }
        return make("p_anneal", D_IN, D_SAE, **options).double()

    return build


@pytest.mark.parametrize(("progress", "p"), [(0.1, 1.0), (0.5, 0.8), (1.0, 0.2)])
@pytest.mark.parametrize(("reduction", "name"), [("sum", "sse"), ("mean", "mse")])
def test_loss_and_gradient_are_the_formulas(small, rows, reduction, name, progress, p):
    sae, x = small(loss_reduction=reduction, epsilon=1e-2), rows(20, D_IN).double()
    loss = sae.loss(x, TrainState(penalty=0.25, progress=progress))
    loss.total.backward()
    at, scaled = parameters(sae), x.numpy() * sae.input_scale.item()

    def total(q):
        sse, s_p = reference(q, scaled, p, 1e-2)
        return (sse if reduction == "sum" else sse / D_IN) + 0.3 * 0.25 * s_p

    sse, s_p = reference(at, scaled, p, 1e-2)
    assert set(loss.parts) == {name, "sparsity", "p"}
    assert loss.parts["p"].item() == pytest.approx(p)
    assert loss.parts[name].item() == pytest.approx(sse / (1 if name == "sse" else D_IN), rel=1e-9)
    assert loss.parts["sparsity"].item() == pytest.approx(s_p, rel=1e-9)
    assert loss.total.item() == pytest.approx(total(at), rel=1e-9)
    for key, values in at.items():
        numeric = np.zeros_like(values)
        for entry in np.ndindex(values.shape):
            step = np.zeros_like(values)
            step[entry] = 1e-7
            numeric[entry] = (
                total(at | {key: values + step}) - total(at | {key: values - step})
            ) / 2e-7
        gradient = (sae.W_enc_rows.grad.T if key == "W_enc" else getattr(sae, key).grad).numpy()
        assert np.abs(numeric).max() > 1e-3
        np.testing.assert_allclose(gradient, numeric, rtol=1e-4, atol=1e-6, err_msg=key)


def test_p_falls_from_anneal_start_on_in_equal_parts(small, rows):
    sae, x = small(), rows(4, D_IN).double()
    seen = [sae.loss(x, TrainState(1.0, t / 100)).parts["p"].item() for t in range(100)]
    expected = [1.0] * 36 + [0.8] * 16 + [0.6] * 16 + [0.4] * 16 + [0.2] * 16
    np.testing.assert_allclose(seen, expected, atol=1e-6)


def test_p_has_fallen_by_anneal_end(small, rows):
    sae, x = small(anneal_end=0.7), rows(4, D_IN).double()
    seen = [sae.loss(x, TrainState(1.0, t / 100)).parts["p"].item() for t in range(100)]
    expected = [1.0] * 30 + [0.8] * 10 + [0.6] * 10 + [0.4] * 10 + [0.2] * 40
    np.testing.assert_allclose(seen, expected, atol=1e-6)
    with pytest.raises(ConfigError, match=r"sae\.anneal_end=0\.1: before anneal_start=0\.2"):
        small(anneal_end=0.1)


def test_without_an_anneal_p_stays(small, rows):
    sae, x = small(n_p=1, p_end=0.5, p_start=0.5), rows(4, D_IN).double()
    parts = [sae.loss(x, TrainState(1.0, progress)).parts for progress in (0.0, 0.9)]
    assert [part["p"].item() for part in parts] == [0.5, 0.5]
    sae.after_step()
    assert sae.p_scale == 1


def test_the_penalty_is_continuous_over_the_last_ten_steps(small, rows):
    """20 steps with p = 1, then the first with 0.8: λ is scaled by the mean of the last ten."""
    sae, old, new = small(), [], []
    for t in range(16, 36):
        x = rows(30, D_IN, seed=t).double()
        sae.loss(x, TrainState(1.0, t / 100, 0.01))
        scaled = x.numpy() * sae.input_scale.item()
        old.append(reference(parameters(sae), scaled, 1.0, 1e-3)[1])
        new.append(reference(parameters(sae), scaled, 0.8, 1e-3)[1])
        with torch.no_grad():  # Latents of a size that changes.
            sae.W_enc_rows.mul_(0.97)
        sae.after_step()
    assert sae.p_scale == 1
    x = rows(30, D_IN, seed=99).double()
    loss = sae.loss(x, TrainState(1.0, 0.36, 0.01))
    ratio = np.mean(old[-10:]) / np.mean(new[-10:])
    assert abs(ratio - np.mean(old) / np.mean(new)) > 1e-2
    assert sae.p_scale.item() == pytest.approx(ratio, rel=1e-5)
    s_p = reference(parameters(sae), x.numpy() * sae.input_scale.item(), 0.8, 1e-3)[1]
    assert loss.parts["sparsity"].item() == pytest.approx(ratio * s_p, rel=1e-5)
    sae.after_step()
    again = sae.loss(x, TrainState(1.0, 0.37, 0.01))  # Scaled once, not at every step.
    assert again.parts["sparsity"].item() == pytest.approx(loss.parts["sparsity"].item(), rel=1e-5)


@pytest.mark.parametrize("n_steps", [100, 1000, 12])
def test_the_next_power_sum_is_computed_in_the_ten_steps_before_a_change(small, rows, n_steps):
    sae, x, seen, used = small(), rows(4, D_IN).double(), [], []
    real = sae.power_sum
    sae.power_sum = lambda acts, p, n: (seen.append(p), real(acts, p, n))[1]
    for t in range(n_steps):
        seen.clear()
        sae.loss(x, TrainState(1.0, t / n_steps, 1 / n_steps))
        sae.after_step()
        used.append(list(seen))
    p = [values[0] for values in used]
    changes = [t for t in range(1, n_steps) if p[t] != p[t - 1]]
    assert len(changes) == 4
    due = [t for t in range(n_steps) if any(c - 10 <= t < c for c in changes)]
    assert [t for t, values in enumerate(used) if len(values) == 2] == due


def test_parts_of_a_batch_count_as_one_step(small, rows):
    whole, parts, x = small(), small(), rows(30, D_IN).double()
    for t in range(33, 36):
        state = TrainState(1.0, t / 100, 0.01)
        whole.loss(x, state)
        for part in x.split([10, 20]):
            parts.loss(part, state)
        for sae in (whole, parts):
            sae.after_step()
            sae.after_step()  # As after a resampling: no step of its own.
    torch.testing.assert_close(parts.recorded, whole.recorded)
    assert (whole.recorded[:, 0] > 0).tolist() == [False] * 7 + [True] * 3


def test_gradient_is_finite_where_latents_barely_fire_or_do_not(small, rows):
    sae, x = small(p_end=0.1), rows(20, D_IN).double()
    with torch.no_grad():
        sae.W_enc_rows.zero_()
        sae.b_enc.copy_(torch.tensor([0.0, -1.0, 1e-300, 1e-30] * 3, dtype=torch.float64))
    sae.loss(x, TrainState(progress=1.0)).total.backward()
    assert sae.b_enc.grad.isfinite().all()
    bound = 0.3 * 0.1 * 1e-3 ** (0.1 - 1)
    np.testing.assert_allclose(sae.b_enc.grad[2:4], bound, rtol=0.05)  # And a little of the error.
    assert not sae.b_enc.grad[:2].any()


def test_a_resume_takes_up_what_the_annealing_had_come_to(small, rows):
    sae = small()
    for t in range(50):
        sae.loss(rows(10, D_IN, seed=t).double(), TrainState(1.0, t / 100, 0.01))
        sae.after_step()
    other = small()
    other.load_tensors({name: tensor.clone() for name, tensor in sae.tensors().items()})
    for t in range(50, 60):
        x = rows(10, D_IN, seed=t).double()
        state = TrainState(1.0, t / 100, 0.01)
        assert torch.equal(sae.loss(x, state).total, other.loss(x, state).total)
        sae.after_step()
        other.after_step()
    assert sae.p_scale < 0.9 and torch.equal(sae.p_scale, other.p_scale)


def test_a_folded_sae_is_stored_without_what_training_needs(small, rows):
    sae, x = small(), rows(10, D_IN).double()
    folded = copy.deepcopy(sae).fold()
    state = {"p_index", "p_scale", "recorded"}
    assert set(sae.tensors()) - set(folded.tensors()) == state
    other = small()
    other.load_tensors(folded.tensors())
    torch.testing.assert_close(other(x).x_hat, sae(x).x_hat)
    with pytest.raises(StoreError, match="lacks tensor 'b_dec'"):
        other.load_tensors({k: v for k, v in folded.tensors().items() if k != "b_dec"})


def test_free_decoder_norms_weight_latents(small, rows):
    sae, x = small(decoder_norm="free", decoder_init_norm=0.5), rows(20, D_IN).double()
    with torch.no_grad():
        sae.W_dec.mul_(torch.linspace(0.5, 2, D_SAE).unsqueeze(1))
    p, scaled = parameters(sae), x.numpy() * sae.input_scale.item()
    f = np.maximum((scaled - p["b_dec"]) @ p["W_enc"] + p["b_enc"], 0)
    sized = f * np.sqrt((p["W_dec"] ** 2).sum(1))
    expected = ((sized + 1e-3) ** 0.2 - 1e-3**0.2).sum(1).mean()
    loss = sae.loss(x, TrainState(progress=1.0))
    assert loss.parts["sparsity"].item() == pytest.approx(expected, rel=1e-6)
    before = sae(x).x_hat
    torch.testing.assert_close(sae.fold()(x).x_hat, before)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE).double())


def test_p_cannot_grow(new):
    with pytest.raises(ConfigError, match=r"sae\.p_end=2: must be <= p_start=1"):
        new("p_anneal", 8, 24, p_end=2.0)


def test_planted_dictionary_is_recovered(new, recovered):
    assert recovered(new("p_anneal", 32, 96, sparsity_coefficient=0.3), n_steps=1_200) > 0.95
