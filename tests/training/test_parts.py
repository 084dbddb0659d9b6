"""What is left of a step that was taken in parts."""

import gc
import weakref

import pytest
import torch

from sae_runner.saes.base import TrainState
from sae_runner.training.parts import Taken


@pytest.fixture
def losses(make):
    """Losses of 12 rows in parts of unequal size, with their graphs."""
    sae = make("relu", loss_reduction="sum")
    x = torch.randn(12, 8, generator=torch.Generator().manual_seed(3))
    return sae, x, [sae.loss(part, TrainState()) for part in x.split([5, 4, 3])]


def test_sums_and_means_are_those_of_the_whole(losses):
    sae, x, parts = losses
    taken, whole = Taken(sae, x.mean(0)), sae.loss(x, TrainState())
    for loss in parts:
        taken.shed()
        taken.add(loss)
    assert not any(loss.requires_grad for loss in (taken.total, *taken.parts.values()))
    torch.testing.assert_close(taken.total, whole.total.detach())
    torch.testing.assert_close(taken.parts, {k: v.detach() for k, v in whole.parts.items()})
    torch.testing.assert_close(taken.l0, whole.l0)
    assert torch.equal(taken.fired, whole.fired)
    error = (x - whole.x_hat.detach()).square().sum()
    expected = (error, x.square().sum(), (x - x.mean(0)).square().sum())
    torch.testing.assert_close(tuple(taken.fit), expected)
    assert torch.equal(taken.last.x, x[9:])


def test_rows_of_earlier_parts_do_not_stay_in_memory(losses):
    sae, _, parts = losses
    taken, n = Taken(sae, torch.zeros(8)), len(parts)
    kept = [weakref.ref(loss.x_hat.untyped_storage()) for loss in parts]
    for i in range(n):
        taken.shed()
        taken.add(parts[i])
        parts[i] = None
    gc.collect()
    assert [ref() is not None for ref in kept] == [False, False, True]
