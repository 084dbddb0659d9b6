import math

import pytest

from sae_runner.training.schedules import learning_rate, lr_factor, warmup


def test_the_learning_rate_by_hand():
    """10 steps, warm over 4, decaying over the last 5."""
    factors = [lr_factor(t, 10, warmup_fraction=0.4, decay_fraction=0.5) for t in range(10)]
    expected = [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2]
    assert factors == pytest.approx(expected)


def test_phases_that_overlap_multiply():
    factors = [lr_factor(t, 4, warmup_fraction=1.0, decay_fraction=1.0) for t in range(4)]
    assert factors == pytest.approx([0.25 * 1, 0.5 * 0.75, 0.75 * 0.5, 1 * 0.25])


@pytest.mark.parametrize("fraction", [0.0, 0.05])
def test_a_phase_shorter_than_a_step_is_none(fraction):
    options = {"warmup_fraction": fraction, "decay_fraction": fraction}
    assert [lr_factor(t, 10, **options) for t in range(10)] == [1.0] * 10


def test_no_step_stands_still():
    for n in (1, 2, 7, 100):
        for warm in (0.0, 0.3, 1.0):
            for decay in (0.0, 0.5, 1.0):
                for t in range(n):
                    factor = lr_factor(t, n, warmup_fraction=warm, decay_fraction=decay)
                    assert 0 < factor <= 1


def test_warm_up_is_linear_to_one():
    assert [warmup(t, 4) for t in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert warmup(0, 0.5) == 1.0


def test_auto_falls_with_the_root_of_the_width():
    assert learning_rate("auto", 2**14) == pytest.approx(2e-4)
    assert learning_rate("auto", 2**16) == pytest.approx(1e-4)
    assert learning_rate("auto", 2**12) == pytest.approx(4e-4)
    assert learning_rate(0.3, 2**12) == 0.3


def test_a_cosine_goes_down_to_zero_and_is_half_in_the_middle():
    shape = {"warmup_fraction": 0.0, "decay_fraction": 0.5, "shape": "cosine"}
    found = [lr_factor(step, 100, **shape) for step in (0, 50, 75, 99)]
    assert found[:2] == [1.0, 1.0] and found[2] == pytest.approx(0.5)
    assert found[3] == pytest.approx((1 - math.cos(math.pi / 50)) / 2)
