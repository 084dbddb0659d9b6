import numpy as np
import torch

from sae_runner.checkpoint import load_sae
from sae_runner.config import preset
from sae_runner.training.ema import AveragedWeights
from sae_runner.training.intervention import intervene


def test_the_average_has_the_weights_of_a_corrected_ema(new, stats, rows):
    sae = new("relu", 8, 24)
    sae.initialise(stats(rows(20)), torch.Generator().manual_seed(0))
    averaged, seen = AveragedWeights(sae, 0.9), []
    generator = torch.Generator().manual_seed(1)
    for t in range(1, 8):
        with torch.no_grad():
            sae.W_dec.add_(torch.randn(24, 8, generator=generator))
        averaged.update(sae)
        seen.append(sae.W_dec.detach().double().numpy().copy())
        weights = np.array([0.9 ** (t - i) for i in range(1, t + 1)])
        expected = np.tensordot(weights / weights.sum(), np.stack(seen), 1)
        np.testing.assert_allclose(averaged.applied(sae).W_dec.detach(), expected, atol=1e-5)


def test_constraints_hold_for_the_average_too(make):
    sae = make("topk")
    averaged = AveragedWeights(sae, 0.5)
    for _ in range(3):
        with torch.no_grad():
            sae.W_dec.copy_(sae.W_dec.roll(1, 0))
        averaged.update(sae)
    assert (averaged.weights["W_dec"].norm(dim=1) - 1).abs().max() > 0.1
    torch.testing.assert_close(averaged.applied(sae).W_dec.norm(dim=1), torch.ones(24))


def test_resampled_latents_have_no_past(make):
    sae = make("relu", d_sae=8)  # As wide as its input: b_dec is no row of latents.
    averaged = AveragedWeights(sae, 0.9)
    averaged.update(sae)
    before = {name: tensor.clone() for name, tensor in averaged.weights.items()}
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(1.0)
    chosen = torch.zeros(8, dtype=torch.bool)
    chosen[[2, 5]] = True
    averaged.begin_again(sae, chosen)
    for name, tensor in averaged.weights.items():
        now = sae.get_parameter(name).detach()
        if name == "b_dec":
            assert torch.equal(tensor, before[name])
        else:
            assert torch.equal(tensor[chosen], now[chosen])
            assert torch.equal(tensor[~chosen], before[name][~chosen])


def test_a_run_that_resamples_begins_their_average_again(trainer, monkeypatch):
    taken = []
    monkeypatch.setattr(AveragedWeights, "begin_again", lambda _, sae, dead: taken.append(dead))
    resample = {"type": "resample", **preset("sae/dead_latents", "resample")}
    run = trainer("relu", dead_latents=resample, ema=0.9)
    run.begin()
    run.initialise()
    run.dead.rows_since_fired[:3] = 10**9
    intervene(run)
    assert taken[0].nonzero().flatten().tolist() == [0, 1, 2]


def test_what_is_saved_for_use_is_the_average(trainer):
    run = trainer("topk", ema=0.9)
    run.run()
    x = run.store.x
    saved = load_sae(run.run_dir)(x).x_hat
    torch.testing.assert_close(saved, run.averaged.applied(run.sae)(x).x_hat, rtol=1e-4, atol=1e-4)
    assert (saved - run.sae(x).x_hat).abs().max() > 1e-2
