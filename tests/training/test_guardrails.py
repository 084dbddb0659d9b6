import logging

import pytest
import torch

from sae_runner.errors import ConfigError
from sae_runner.saes.base import TrainState
from sae_runner.training.guardrails import Guardrails
from sae_runner.training.parts import Taken


@pytest.fixture
def guarded(make, options):
    def build(revives=True, kind="relu"):
        sae = make(kind)
        return sae, Guardrails(sae, options(), 3e-3, revives)

    return build


ALIVE, DEAD = torch.zeros(24, dtype=torch.bool), torch.ones(24, dtype=torch.bool)


def test_an_exploding_loss_is_said_once(guarded, caplog):
    _, guard = guarded()
    with caplog.at_level(logging.WARNING):
        for step, total in enumerate((5.0, 1.0, 99.0)):
            guard.look(step, total, ALIVE)
        assert caplog.text == ""
        for step, total in enumerate((101.0, 500.0)):
            guard.look(step, total, ALIVE)
    assert len(caplog.records) == 1
    assert "101 times its least; lower trainer.lr (0.003)" in caplog.text


def test_all_dead_is_the_end_unless_something_revives(guarded, caplog):
    _, guard = guarded(revives=False)
    almost = DEAD.clone()
    almost[3] = False
    guard.look(7, 1.0, almost)
    with pytest.raises(ConfigError, match=r"step 7: all 24 latents are dead; .*dead_latents=resa"):
        guard.look(7, 1.0, DEAD)
    _, guard = guarded(revives=True)
    for _ in range(2):
        guard.look(7, 1.0, DEAD)
    assert caplog.text.count("all 24 latents are dead") == 1


def test_a_threshold_that_never_moves_is_said(guarded, caplog, monkeypatch):
    sae, guard = guarded()
    threshold = torch.full((24,), 0.1, requires_grad=True)
    monkeypatch.setattr(sae, "thresholds", lambda latents: 1 * threshold[latents])
    guard.look(0, 1.0, ALIVE)
    guard.look(2, 1.0, ALIVE)  # A tenth of the 20 steps: too early to tell.
    assert caplog.text == ""
    guard.look(3, 1.0, ALIVE)
    assert "no threshold has moved" in caplog.text
    caplog.clear()
    sae, guard = guarded()
    monkeypatch.setattr(sae, "thresholds", lambda latents: 1 * threshold[latents])
    guard.look(0, 1.0, ALIVE)
    with torch.no_grad():
        threshold[5] *= 1.01
    guard.look(19, 1.0, ALIVE)
    assert caplog.text == ""


def test_a_run_that_goes_on_late_gives_thresholds_as_long(guarded, caplog, monkeypatch):
    sae, guard = guarded()
    threshold = torch.full((24,), 0.1, requires_grad=True)
    monkeypatch.setattr(sae, "thresholds", lambda latents: 1 * threshold[latents])
    guard.look(15, 1.0, ALIVE)
    guard.look(17, 1.0, ALIVE)
    assert caplog.text == ""
    guard.look(18, 1.0, ALIVE)
    assert "no threshold has moved" in caplog.text


def test_two_l0_apart_are_said(guarded, caplog):
    _, guard = guarded()
    guard.compare_l0(5, 32.0, 33.0)
    assert caplog.text == ""
    guard.compare_l0(5, 32.0, 50.0)
    assert "L0 is 32 in training and 50 at inference" in caplog.text


def test_a_missed_target_is_said(make, options, caplog):
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(3))
    for target, l0, said in ((32.0, 31.0, ""), (None, 5.0, ""), (20.0, 15.0, "20 was asked for")):
        sae = make("relu", target_l0=min(target, 24.0) if target else None)
        sae.target_l0 = target
        guard = Guardrails(sae, options(), 3e-3, True)
        guard.look_at_end(20, l0, sae, x)
        assert said in caplog.text if said else caplog.text == ""


def test_a_threshold_that_lets_more_fire_than_training_is_said(make, options, caplog):
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(3))
    sae = make("batch_topk")
    guard = Guardrails(sae, options(), 3e-3, True)
    guard.look_at_end(20, float(sae.encode_sparse(x).counts.float().mean()), sae, x)
    assert caplog.text == ""
    with torch.no_grad():
        sae.threshold.zero_()
    guard.look_at_end(20, 3.0, sae, x)
    assert "L0 is 3 in training and" in caplog.text


def test_a_wide_sae_may_start_long(make, options):
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(3))
    for d_sae in (64, 2048):
        sae = make("gated", 8, d_sae)
        sound, wrong = Taken(sae, x.mean(0)), Taken(sae, x.mean(0))
        with torch.no_grad():
            loss = sae.loss(x, TrainState())
        sound.add(loss)
        wrong.add(loss._replace(x_hat=150 * x))  # Of 22,201 times the squared norm.
        guard = Guardrails(sae, options(), 3e-3, True)
        guard.check_sound(1, sound, torch.tensor(1.0))
        if d_sae == 64:
            with pytest.raises(ConfigError, match="squared error / squared norm is"):
                guard.check_sound(1, wrong, torch.tensor(1.0))
        else:
            guard.check_sound(1, wrong, torch.tensor(1.0))


def test_weights_that_are_not_finite_are_not_saved(trainer):
    run = trainer("relu")
    run.begin()
    with torch.no_grad():
        run.sae.W_dec[3, 2] = float("nan")
    with pytest.raises(ConfigError, match="training diverged at step 0: W_dec is nan"):
        run.save()
    assert not list(run.run_dir.glob("checkpoints/*"))
