"""Pooled examples against a dense table of tokens."""

import numpy as np
import pytest
import torch

from sae_runner.errors import DataError
from sae_runner.evaluators._pooling import pooled
from sae_runner.evaluators.base import Rows
from sae_runner.saes.base import Latents

D_SAE, D = 6, 3


def tokens(seed=0, signed=False):
    """Examples of one to five tokens, whose ids are not in order."""
    rng = np.random.default_rng(seed)
    lengths = [3, 1, 5, 2, 4]
    ids = np.repeat([30, 7, 12, 4, 25], lengths)
    position = np.concatenate([np.arange(n) for n in lengths])
    f = (rng.random((15, D_SAE)) < 0.5) * rng.exponential(1, (15, D_SAE))
    if signed:
        f *= rng.choice([-1, 1], f.shape)
    f[:, 5] = 0
    return f, rng.normal(size=(15, D)), ids, position


def batches(f, x, ids, position, *, size=4, order=None):
    order = np.arange(len(f)) if order is None else order
    for start in range(0, len(f), size):
        part = order[start : start + size]
        raw = torch.from_numpy(x[part])
        latents = Latents.from_dense(torch.from_numpy(f[part]))
        label = torch.from_numpy(ids[part] % 3)
        where = (torch.from_numpy(ids[part]), torch.from_numpy(position[part]))
        yield Rows(raw, latents, raw, *where, label)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("how", ["mean", "max", "last", "cls"])
@pytest.mark.parametrize("size", [1, 4, 15])
def test_pooled_rows_are_those_of_numpy(how, size, signed):
    f, x, ids, position = tokens(signed=signed)
    order = np.random.default_rng(1).permutation(15)
    found = pooled(batches(f, x, ids, position, size=size, order=order), how)
    assert found.ids.tolist() == [4, 7, 12, 25, 30]
    assert found.label.tolist() == [i % 3 for i in found.ids]
    for row, example in enumerate(found.ids):
        own = {"mean": lambda a: a.mean(0), "max": lambda a: a.max(0), "last": lambda a: a[-1],
               "cls": lambda a: a[0]}[how]  # fmt: skip
        np.testing.assert_allclose(found.raw[row], own(x[ids == example]), rtol=1e-12)
        np.testing.assert_allclose(
            found.latents[[row]].toarray()[0], own(f[ids == example]), rtol=1e-12
        )
    assert (found.latents.data != 0).all()


def test_no_rows_to_pool_are_refused():
    f, x, ids, position = tokens()
    with pytest.raises(DataError, match="no row of position 0"):
        pooled(batches(f, x, ids, position + 1), "cls")
    with pytest.raises(DataError, match="no row of any example"):
        pooled(iter(()), "mean")
