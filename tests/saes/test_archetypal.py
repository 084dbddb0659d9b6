"""The decoder of RA-SAE against its formula, in NumPy and float64, and where its rows may be."""

import copy
import itertools

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment, nnls

from sae_runner.checkpoint import load_sae, load_state, save_checkpoint
from sae_runner.errors import ConfigError, DataError
from sae_runner.saes import SAES
from sae_runner.saes._initialisation import k_means
from sae_runner.saes.base import TrainState
from sae_runner.training.dead_latents import DEAD_LATENTS

D_IN, D_SAE, K, P = 5, 12, 3, 20
WEIGHTS = ("mixture", "relaxation", "log_scale", "W_enc", "b_enc", "b_dec")


@pytest.fixture
def small(make):
    """With every weight off its start: mixtures of all candidates, some relaxation, m ≠ 0."""

    def build(**options):
        options = {"k": K, "n_candidates": P, **options}
        sae = make("archetypal", D_IN, D_SAE, **options).double()
        generator = torch.Generator().manual_seed(8)
        with torch.no_grad():
            sae.mixture.add_(torch.rand(D_SAE, P, generator=generator))
            sae.relaxation.add_(0.3 * torch.randn(D_SAE, D_IN, generator=generator))
            sae.log_scale.add_(0.2)
        sae.after_step()
        return sae

    return build


def parameters(sae) -> dict:
    return {name: sae.tensors()[name].double().numpy().copy() for name in WEIGHTS}


def decoder(p: dict, candidates: np.ndarray) -> np.ndarray:
    return np.exp(p["log_scale"]) * (p["mixture"] @ candidates + p["relaxation"])


def train(sae, x, stats, *, seed: int, n_steps: int, lr: float = 2e-3) -> None:
    generator = torch.Generator().manual_seed(seed)
    sae.initialise(stats(x), generator)
    optimiser = torch.optim.Adam(sae.parameters(), lr=lr)
    for _ in range(n_steps):
        optimiser.zero_grad()
        batch = x[torch.randint(len(x), (256,), generator=generator)]
        sae.loss(batch, TrainState()).total.backward()
        sae.before_step()
        optimiser.step()
        sae.after_step()


def test_loss_and_gradient_are_the_papers(small, rows):
    sae, x = small(), rows(20, D_IN).double()
    candidates = sae.candidates.numpy().copy()

    def total(p):
        scaled = sae.input_scale.item() * x.numpy()
        z = (scaled - p["b_dec"]) @ p["W_enc"] + p["b_enc"]
        f = np.zeros_like(z)
        for row, values in enumerate(z):
            best = np.argsort(-values)[:K]
            f[row, best] = np.maximum(values[best], 0)
        x_hat = f @ decoder(p, candidates) + p["b_dec"]
        return ((scaled - x_hat) ** 2).mean() / sae.mean_baseline_mse.item()

    at, loss = parameters(sae), sae.loss(x, TrainState())
    np.testing.assert_allclose(sae.W_dec.detach(), decoder(at, candidates), rtol=1e-12)
    assert loss.total.item() == pytest.approx(total(at), rel=1e-12)
    loss.total.backward()
    found = {name: p.grad.numpy() for name, p in sae.named_parameters()}
    found["W_enc"] = found.pop("W_enc_rows").T
    assert found.keys() == at.keys()
    for name, values in at.items():
        numeric = np.zeros_like(values)
        for entry in np.ndindex(values.shape):
            step = np.zeros_like(values)
            step[entry] = 1e-6
            numeric[entry] = (
                total(at | {name: values + step}) - total(at | {name: values - step})
            ) / 2e-6
        assert np.abs(numeric).max() > 1e-4
        np.testing.assert_allclose(found[name], numeric, rtol=1e-5, atol=1e-7, err_msg=name)


def test_weights_of_zero_can_come_back(new, stats, rows):
    """A gradient through a ReLU would be none there, and rows start with one weight above it."""
    sae, x = new("archetypal", 8, 24), rows(200)
    sae.initialise(stats(x), torch.Generator().manual_seed(0))
    sae.loss(x, TrainState()).total.backward()
    off = sae.mixture == 0
    assert off.float().mean() > 0.9 and sae.mixture.grad[off].count_nonzero() > 0.5 * off.sum()


@pytest.mark.parametrize("delta", [0.0, 0.4])
def test_rows_stay_near_the_hull(new, stats, rows, delta):
    sae, x = new("archetypal", D_IN, D_SAE, n_candidates=P, delta=delta), rows(400, D_IN)
    train(sae, x, stats, seed=0, n_steps=60, lr=0.05)
    w, relaxation = sae.mixture.detach().double().numpy(), sae.relaxation.detach().double()
    assert (w >= 0).all() and ((w > 0).sum(1) > 1).any()
    np.testing.assert_allclose(w.sum(1), 1, atol=1e-6)
    lengths = relaxation.norm(dim=1)
    assert (lengths <= delta * (1 + 1e-6)).all()
    assert delta == 0 or (lengths > 0.99 * delta).any()
    # Each row of D / exp(m) is a convex combination of C plus at most delta, found independently:
    # non-negative least squares, with a heavy row that asks the weights to sum to 1.
    candidates = sae.candidates.double().numpy()
    system = np.vstack([candidates.T, 1e3 * np.ones(P)])
    for row in sae.W_dec.detach().double().numpy() / np.exp(sae.log_scale.item()):
        weights, _ = nnls(system, np.append(row, 1e3))
        assert weights.sum() == pytest.approx(1, abs=1e-4)
        assert np.linalg.norm(weights @ candidates - row) <= delta + 1e-3


def test_projection_by_hand(new):
    sae = new("archetypal", 2, 3, k=1, n_candidates=3, delta=0.5)
    with torch.no_grad():
        sae.mixture.copy_(torch.tensor([[3.0, -1, 1], [-2, -1, -3], [0.2, 0.2, 0.0]]))
        sae.relaxation.copy_(torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.1, -0.2]]))
    sae.after_step()
    expected = torch.tensor([[0.75, 0, 0.25], [0, 1, 0], [0.5, 0.5, 0]])
    torch.testing.assert_close(sae.mixture.detach(), expected)
    torch.testing.assert_close(
        sae.relaxation.detach(), torch.tensor([[0.3, 0.4], [0.0, 0.0], [0.1, -0.2]])
    )


def test_it_starts_at_candidates(new, stats, rows):
    x = rows(300)
    sae = new("archetypal", 8, 24, n_candidates=40, b_dec_init="mean", decoder_init_norm=0.5)
    sae.initialise(stats(x), torch.Generator().manual_seed(3))
    assert ((sae.mixture == 1).sum(1) == 1).all() and (sae.mixture != 0).sum() == 24
    assert (sae.mixture.sum(0) <= 1).all()  # No candidate twice.
    assert sae.W_dec.norm(dim=1).mean().item() == pytest.approx(0.5, rel=1e-5)
    centred = sae.scaled(x) - sae.b_dec
    assert torch.cdist(sae.candidates, centred).min(1).values.max() < 8**0.5
    few = new("archetypal", 8, 24, n_candidates=4)  # Rows beyond: between two.
    few.initialise(stats(x), torch.Generator().manual_seed(3))
    torch.testing.assert_close(few.mixture.sum(1), torch.ones(24))
    assert set(few.mixture.detach().flatten().tolist()) == {0.0, 0.5, 1.0}
    with pytest.raises(DataError, match=r"sae\.n_candidates=32: there are 31 rows"):
        new("archetypal", 8, 24).initialise(stats(rows(31)), torch.Generator())


def test_k_means_finds_clusters_and_is_at_rest():
    generator = torch.Generator().manual_seed(0)
    middles = torch.tensor([[0.0, 0], [9, 0], [0, 9]])
    x = torch.cat([m + 0.1 * torch.randn(50, 2, generator=generator) for m in middles])
    centres = k_means(x, 12, generator)
    assert torch.cdist(middles, centres).min(1).values.max() < 0.2
    nearest = torch.cdist(x, centres).argmin(1).numpy()
    for i in range(12):
        np.testing.assert_allclose(centres[i], x.numpy()[nearest == i].mean(0), atol=1e-5)
    few = torch.tensor([[1.0], [2.0]])
    assert sorted(k_means(few, 2, generator).flatten().tolist()) == [1.0, 2.0]


@pytest.mark.parametrize("scaling", ["sqrt_d", "whitening"])
def test_a_folded_one_has_topks_tensors_and_the_same_map(small, new, rows, scaling):
    sae, x = small(input_scaling=scaling), rows(50, D_IN).double()
    before, decoder_before = sae(x), sae.W_dec.detach().clone()
    folded = copy.deepcopy(sae).fold()
    assert folded.config()["n_candidates"] is None and sae.config()["n_candidates"] == P
    reduction = folded.loss_reduction
    topk = new("topk", D_IN, D_SAE, k=K, loss_reduction=reduction, input_scaling="none")
    assert {name: t.shape for name, t in folded.tensors().items()} == {
        name: t.shape for name, t in topk.tensors().items()
    }
    torch.testing.assert_close(folded(x).x_hat, before.x_hat, rtol=1e-6, atol=1e-9)
    assert torch.equal(sae.W_dec, decoder_before)
    other = SAES.build(folded.config(), d_in=D_IN).double()
    other.load_tensors(folded.tensors())
    assert torch.equal(other(x).x_hat, folded(x).x_hat)
    assert copy.deepcopy(other).fold()(x).x_hat.isfinite().all()
    other.loss(x, TrainState()).total.backward()
    assert other.W_dec.grad.any()


def test_a_checkpoint_keeps_both_forms(small, rows, tmp_path):
    sae, x = small().float(), rows(50, D_IN)
    save_checkpoint(tmp_path / "step_1", sae, {"step": 1}, state={}, optimizer={"n": x})
    torch.testing.assert_close(load_sae(tmp_path / "step_1")(x).x_hat, sae(x).x_hat.detach())
    resumed = SAES.build(sae.config(), d_in=D_IN)
    resumed.load_tensors(load_state(tmp_path / "step_1")[1])
    state = TrainState(0.5)
    assert torch.equal(resumed.loss(x, state).total, sae.loss(x, state).total)
    for name, tensor in sae.tensors().items():
        assert torch.equal(resumed.tensors()[name], tensor), name


def test_without_candidates_it_is_topk(new, stats, rows):
    x, made = rows(100), []
    for kind in ("topk", "archetypal"):
        same = {"decoder_norm": "free", "encoder_init": "transposed"}
        sae = new(kind, 8, 24, n_candidates=None, **same)
        train(sae, x, stats, seed=0, n_steps=5)
        made.append(sae.tensors())
    assert made[0].keys() == made[1].keys()
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])


def test_what_would_leave_the_hull_is_refused(new):
    with pytest.raises(ConfigError, match=r"sae\.decoder_norm=unit: .* set it to free"):
        new("archetypal", 8, 24, decoder_norm="unit")
    options = {"at": [0.5], "n_rows": 9, "encoder_norm": 0.2, "lr_warmup": 0.0}
    with pytest.raises(ConfigError, match="sae/dead_latents=resample: decoder rows are mixtures"):
        DEAD_LATENTS.build({"type": "resample", **options}, sae=new("archetypal", 8, 24), window=1)


def test_planted_dictionary_is_recovered(new, recovered):
    """One planted row in seven is a single direction, so that the hull reaches them."""
    assert recovered(new("archetypal", 32, 96, k=4, n_candidates=256), n_steps=800) > 0.95


def test_auxk_revives_faint_latents(new, recovered):
    auxk = {"type": "auxk", "coefficient": 0.03125, "k_aux": 16}
    options = {"k": 4, "n_candidates": 128}
    without = recovered(new("archetypal", 32, 64, **options), 400, n_faint=32)
    with_auxk = recovered(new("archetypal", 32, 64, **options), 400, n_faint=32, strategy=auxk)
    assert with_auxk > without + 0.02


def test_seeds_agree_more_than_topks(new, stats, one_thread):
    """Mean cosine of decoder rows of two seeds, matched one to one: about 0.70 against 0.51."""
    generator = torch.Generator().manual_seed(11)
    centres = 3 * torch.randn(40, 32, generator=generator)
    x = centres[torch.randint(40, (4_096,), generator=generator)]
    x = x + 0.5 * torch.randn(4_096, 32, generator=generator)

    def agreement(kind):
        decoders = []
        for seed in range(3):
            sae = new(kind, 32, 64, k=4, n_candidates=64)
            train(sae, x, stats, seed=seed, n_steps=400)
            decoders.append(torch.nn.functional.normalize(sae.W_dec.detach(), dim=1))
        found = []
        for one, other in itertools.combinations(decoders, 2):
            cosines = (one @ other.T).numpy()
            found.append(cosines[linear_sum_assignment(-cosines)].mean())
        return float(np.mean(found))

    assert agreement("archetypal") > agreement("topk") + 0.1
