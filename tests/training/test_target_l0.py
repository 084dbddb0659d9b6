"""Control of the L0 against plants whose answer to λ is known."""

import json
import math

import numpy as np
import pytest

from sae_runner.training.schedules import lr_factor, warmup
from sae_runner.training.target_l0 import TargetL0


class Plant:
    """log L0 approaches `rest − slope · log λ` with a lag in steps, at the pace of the lr.

    `rest` drifts, as it does while an SAE learns, and each batch adds noise.
    """

    def __init__(self, lag, slope=0.7, rest=4.0, drift=0.0, noise=0.02, start=400.0):
        self.lag, self.slope, self.rest, self.drift = lag, slope, rest, drift
        self.level, self.noise = math.log(start), noise
        self.generator = np.random.default_rng(0)

    def step(self, penalty: float, lr: float) -> float:
        self.rest += self.drift * lr
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


def test_the_aim_is_where_the_first_batch_is_and_then_the_target():
    control = TargetL0(10)
    control.update(1_000, 0.0)
    assert control.factor == 1
    control.update(100, 0.125)  # Half way down, in logarithms.
    assert control.factor == pytest.approx(1)
    control.update(10 * math.e**0.5, 0.6)
    assert control.factor == pytest.approx(math.exp(0.5 + 0.05 * 0.5))
    control.update(0.0, 0.6)  # None fires: far, by no more than a factor e.
    assert control.factor == pytest.approx(math.exp(-1 + 0.05 * (0.5 - 1)))


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
        l0 = plant.step(whole.factor, 1.0)
        for control in (whole, again):
            control.update(l0, step / 300)
        assert again.factor == whole.factor
