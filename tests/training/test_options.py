import pytest

from sae_runner.errors import ConfigError


def test_checkpoints_are_even_dense_early_or_listed(options):
    steps = {"n_tokens": 32 * 1000, "batch_size": 32}
    assert options(checkpoints=3, **steps).checkpoint_steps() == {250, 500, 750}
    early = options(checkpoints=14, checkpoint_spacing="exponential", **steps).checkpoint_steps()
    assert sorted(early) == [2, 3, 4, 6, 10, 16, 25, 40, 63, 100, 158, 251, 398, 631]
    assert options(checkpoints=[7, 100], **steps).checkpoint_steps() == {7, 100}
    assert options(checkpoints=0, **steps).checkpoint_steps() == set()


def test_a_step_that_never_comes_is_refused(options):
    with pytest.raises(ConfigError, match=r"trainer\.checkpoints=21: there are only 20 steps"):
        options(checkpoints=[5, 21])
    with pytest.raises(ConfigError, match=r"trainer\.checkpoints=0: must be > 0"):
        options(checkpoints=[0])
    with pytest.raises(ConfigError, match=r"trainer\.ema=1(\.0)?: must be < 1"):
        options(ema=1.0)
