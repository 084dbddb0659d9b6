"""Control of the L0 against plants whose answer to λ is known."""

import json
import math

import numpy as np
import pytest
import torch

from sae_runner.training import target_l0
from sae_runner.training.schedules import lr_factor, warmup
from sae_runner.training.target_l0 import DESCENT, TargetL0
from tests.training.conftest import Rows, planted


class Plant:
    """log L0 approaches `rest − slope · log λ` with a lag in steps, at the pace of the lr.

    `rest` drifts, as it does while an SAE learns, and each batch adds noise. λ counts `late` steps
    after it was set, as it does under an optimizer with momentum.
    """

    def __init__(self, lag, slope=0.7, rest=4.0, drift=0.0, noise=0.02, start=400.0, late=0):
        self.lag, self.slope, self.rest, self.drift = lag, slope, rest, drift
        self.penalties = [1e-9] * late
        self.level, self.noise = math.log(start), noise
        self.generator = np.random.default_rng(0)

    def step(self, penalty: float, lr: float) -> float:
        self.rest += self.drift * lr
        self.penalties.append(penalty)
        penalty = self.penalties.pop(0)
        wanted = self.rest - self.slope * math.log(max(penalty, 1e-9))
        self.level += lr / self.lag * (wanted - self.level)
        return math.exp(self.level + self.noise * self.generator.standard_normal())


def run(plant, control, n_steps, steps=None):
    """L0 without noise after each step, as the trainer would control it."""
    levels = []
    for step in steps or range(n_steps):
        lr = lr_factor(step, n_steps, warmup_fraction=0.05, decay_fraction=0.2)
        l0 = plant.step(control.factor * warmup(step, 0.05 * n_steps), lr)
        control.update(l0, step / n_steps)
        levels.append(math.exp(plant.level))
    return levels


@pytest.mark.parametrize("target", [8, 32, 200])
@pytest.mark.parametrize("drift", [0.0, -1e-3, 1e-3])
@pytest.mark.parametrize(("lag", "n_steps"), [(20, 600), (60, 1_000), (200, 3_000)])
def test_a_plant_with_a_lag_ends_at_the_target(lag, n_steps, drift, target):
    levels = run(Plant(lag, drift=drift), TargetL0(target), n_steps)
    assert levels[-1] == pytest.approx(target, rel=0.05)


@pytest.mark.parametrize("rest", [-2.0, 1.0, 7.0])
def test_a_coefficient_far_from_the_right_one_is_no_hindrance(rest):
    """λ has to change by e^6 in both directions."""
    levels = run(Plant(40, rest=rest), TargetL0(32), 1_500)
    assert levels[-1] == pytest.approx(32, rel=0.05)


def test_the_l0_comes_down_without_falling_far_below_the_target():
    """Latents that never fire again are the price of an overshoot."""
    levels = run(Plant(20, rest=5.0), TargetL0(8), 1_000)
    assert min(levels) > 5
    assert levels[60] > 2 * 8


def swing(monkeypatch=None, gain=None):
    """How much the L0 of a plant like a ReLU SAE's, steep and quick but late, goes up and down."""
    if gain is not None:
        monkeypatch.setattr(target_l0, "LEAST", gain)
        monkeypatch.setattr(target_l0, "MOST", gain)
    levels = run(Plant(4, slope=2.5, late=5), TargetL0(8), 1_000)
    assert levels[-1] == pytest.approx(8, rel=0.03)
    return np.log(levels[500:800]).std()


def test_a_quick_plant_does_not_swing(monkeypatch):
    assert swing() < 0.04
    assert swing(monkeypatch, gain=1.0) > 0.1


@pytest.mark.parametrize("lag", [60, 150])
def test_a_slow_plant_that_drifts_is_followed(monkeypatch, lag):
    """As the thresholds of a JumpReLU SAE: what they rest at falls all the while."""

    def miss():
        levels = run(Plant(lag, rest=5.5, drift=-4e-3), TargetL0(16), 488)
        return abs(levels[-1] / 16 - 1)

    assert miss() < 0.04
    monkeypatch.setattr(target_l0, "MOST", 0.5)
    assert miss() > 0.05


def test_the_aim_is_where_the_first_batch_is_and_then_the_target(monkeypatch):
    monkeypatch.setattr(target_l0, "LEAST", 0.5)
    monkeypatch.setattr(target_l0, "MOST", 0.5)
    control = TargetL0(10)
    control.update(1_000, 0.0)
    assert control.factor == 1
    control.update(100, 0.125)  # Half way down, in logarithms.
    assert control.factor == pytest.approx(1)
    control.update(10 * math.e**0.5, 0.6)
    kept = 0.03 * 1.5 * 0.5
    assert control.factor == pytest.approx(math.exp(0.5 * 0.5 + kept))
    control.update(0.0, 0.6)  # None fires: far, by no more than a factor e.
    assert control.factor == pytest.approx(math.exp(-1 + kept - 0.03))


def test_the_gain_grows_with_a_lasting_error_and_is_cut_where_it_turns():
    control = TargetL0(10)
    for _ in range(10):
        control.update(11, 0.6)
    assert control.gain == pytest.approx(1.02**10)
    control.update(1, 0.6)  # Turns the mean error too.
    assert control.gain == pytest.approx(0.7 * 1.02**10)
    for _ in range(500):
        control.update(9, 0.6)
    assert control.gain == 6
    for i in range(500):
        control.update(1 if i % 2 else 100, 0.6)
    assert control.gain == 0.1


def test_the_gain_is_bounded_while_the_aim_comes_down():
    """What lags behind is not chased: λ is not yet that of the end."""
    control = TargetL0(10)
    for progress, most in ((0.0, 1), (0.99 * DESCENT, 1), (DESCENT, 6), (0.9, 6)):
        for _ in range(500):
            control.update(1_000, progress)
        assert control.gain == most


@pytest.mark.parametrize("ratio", [0.9, 1.0, 1.1])
def test_it_is_held_out_rows_that_end_at_the_target(ratio):
    plant, control, n = Plant(40), TargetL0(8), 1_000
    control.heldout = [torch.zeros(1_000, 1)]
    for step in range(n):
        lr = lr_factor(step, n, warmup_fraction=0.05, decay_fraction=0.2)
        control.update(plant.step(control.factor, lr), step / n)
        if control.compares_at(step, n):
            control.compare(ratio * math.exp(plant.level))
    assert ratio * math.exp(plant.level) == pytest.approx(8, rel=0.03)
    assert control.ratio == pytest.approx(ratio, rel=0.02)


def test_comparisons_are_spread_over_the_second_half():
    control = TargetL0(8)
    assert not any(control.compares_at(step, 800) for step in range(800))
    control.heldout = [torch.zeros(1, 1)]
    due = [step for step in range(800) if control.compares_at(step, 800)]
    assert due == list(range(400, 800, 25))
    for n_steps in (1, 2, 9):
        assert any(control.compares_at(step, n_steps) for step in range(n_steps))


def test_what_was_found_apart_moves_the_aim():
    """A comparison is of a batch under the same weights: the next one."""
    control = TargetL0(10)
    control.update(10, 0.6)
    control.compare(11)
    assert control.ratio == 1
    control.update(10, 0.6)
    assert control.ratio == pytest.approx(1.1)
    off = control.log_factor
    control.update(10 / 1.1, 0.6)  # Held-out rows are at the target now.
    assert control.log_factor == pytest.approx(off) and control.push == pytest.approx(0)
    control.compare(90)  # Far off is a quarter, and half of it is taken from two.
    control.update(10, 0.6)
    assert math.log(control.ratio) == pytest.approx((math.log(1.1) + 0.25) / 2)


def test_the_factor_stays_a_number():
    control = TargetL0(10)
    for _ in range(10_000):
        control.update(1e9, 1.0)
    assert math.isfinite(control.factor)


@pytest.mark.parametrize("at", [0, 1, 137])
def test_going_on_gives_the_same_factors(at):
    whole, plant = TargetL0(8), Plant(30)
    run(plant, whole, 300, range(at))
    again = TargetL0(8)
    again.restore(json.loads(json.dumps(whole.state())))
    assert again.factor == whole.factor
    for step in range(at, 300):
        if step % 50 == 40:
            whole.compare(9)
            again = TargetL0(8)
            again.restore(json.loads(json.dumps(whole.state())))
        l0 = plant.step(whole.factor, 1.0)
        for control in (whole, again):
            control.update(l0, step / 300)
        assert again.factor == whole.factor


# -- In a trainer --------------------------------------------------------------------------------


class Split(Rows):
    """The last rows are held out."""

    def __init__(self, x, n_heldout):
        super().__init__(x[:-n_heldout])
        self.other = Rows(x[-n_heldout:])

    def n_windows(self, split):
        return super().n_windows(split) if split == "train" else self.other.n_windows(split)

    def window(self, split, index):
        return super().window(split, index) if split == "train" else self.other.window(split, index)


@pytest.mark.parametrize(
    ("kind", "beta1"), [("relu", 0.9), ("gated", 0.0), ("p_anneal", 0.9), ("jump_relu", 0.0)]
)
def test_every_kind_with_a_penalty_ends_at_the_target_on_held_out_rows(trainer, kind, beta1):
    """Of so few rows that they come fifty times, and have another L0 than others in the end."""
    made = trainer(
        kind, store=Split(planted(2_500), 1_500), sae={"target_l0": 3.0}, beta1=beta1,
        n_tokens=50_000, batch_size=100,
    )  # fmt: skip
    made.run()
    with torch.no_grad():
        acts = made.sae.encode(made.store.other.x)
    assert (acts != 0).sum(1).float().mean() == pytest.approx(3.0, rel=0.05)


@pytest.mark.parametrize("ema", [None, 0.9])
def test_the_l0_compared_is_of_held_out_rows_under_what_would_be_saved(trainer, ema, monkeypatch):
    made = trainer("relu", store=Split(planted(700), 200), sae={"target_l0": 3.0}, ema=ema)
    seen = []
    measure = made.target_l0.heldout_l0
    monkeypatch.setattr(
        made.target_l0, "heldout_l0", lambda sae: seen.append((made.step, sae, measure(sae))) or 3.0
    )
    made.run()
    assert [step for step, *_ in seen] == list(range(10, 20))
    _, sae, found = seen[-1]
    x = made.store.other.x.double().numpy() * float(sae.input_scale)
    z = x @ sae.W_enc.detach().double().numpy() + sae.b_enc.detach().double().numpy()
    assert found == pytest.approx((z > 0).sum(1).mean(), rel=1e-3)
    wanted = made.sae.W_dec if ema is None else made.averaged.weights["W_dec"]
    assert torch.equal(sae.W_dec, wanted) and not (ema and torch.equal(sae.W_dec, made.sae.W_dec))


def test_a_warm_up_ends_with_the_descent(trainer):
    """Else the penalty would go on rising under the controller, which would run after it."""
    for target, wanted in ((None, 0.5), (3.0, 1.0)):
        made = trainer("relu", str(target), sae={"target_l0": target}, penalty_warmup=1.0)
        seen, loss = [], made.sae.loss

        def noting(x, state, seen=seen, loss=loss, made=made):
            factor = made.target_l0.factor if made.target_l0 else 1
            seen.append(state.penalty / factor)
            return loss(x, state)

        made.sae.loss = noting
        made.run()
        assert seen[9] == pytest.approx(wanted)
        assert seen[1] == pytest.approx(2 / 20 if target is None else 2 / (20 * DESCENT))
