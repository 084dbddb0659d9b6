import pytest
import torch

from sae_runner.training.dead_latents.none import NoRevival


@pytest.fixture
def counter(new):
    return lambda d_sae, window: NoRevival(new("relu", 2, d_sae), window)


def test_a_latent_is_dead_at_so_many_rows_of_silence_and_alive_when_it_fires(counter):
    """Window 10, four latents: one always fires, one once, one never, one again at last."""
    dead = counter(4, 10)
    history = []
    for fired, n_rows in (
        ([4, 1, 0, 2], 4), ([3, 0, 0, 0], 4), ([1, 0, 0, 0], 1),
        ([4, 0, 0, 0], 4), ([2, 0, 0, 0], 2), ([9, 0, 0, 1], 9),
    ):  # fmt: skip
        dead.update(torch.tensor(fired), n_rows)
        history.append((dead.rows_since_fired.tolist(), dead.dead.tolist()))
    assert history == [
        ([0, 0, 4, 0], [False] * 4),
        ([0, 4, 8, 4], [False] * 4),
        ([0, 5, 9, 5], [False] * 4),
        ([0, 9, 13, 9], [False, False, True, False]),
        ([0, 11, 15, 11], [False, True, True, True]),
        ([0, 20, 24, 0], [False, True, True, False]),
    ]


def test_counts_do_not_wrap(counter):
    dead = counter(1, 3 * 10**9)
    for _ in range(2):
        dead.update(torch.tensor([0]), 2 * 10**9)
    assert dead.rows_since_fired.tolist() == [4 * 10**9] and dead.dead.all()
