"""Pooled examples against a dense table of tokens."""

import numpy as np
import pytest
import torch

from sae_runner.config import preset
from sae_runner.errors import DataError
from sae_runner.evaluators._pooling import PooledPreActs, pooled
from sae_runner.evaluators.base import Rows
from sae_runner.saes import SAES
from sae_runner.saes import base as saes_base
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


def sae_of(kind="topk", scale=0.5):
    """An SAE with weights drawn by seed, of which every part matters."""
    options = {k: v for k, v in preset("sae", kind).items() if k != "dead_latents"}
    options |= {"d_sae": D_SAE, "expansion": None, "k": 2, "apply_b_dec_to_input": True}
    sae = SAES.build(options, d_in=D, d_out=D)
    generator = torch.Generator().manual_seed(1)
    for parameter in sae.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    sae.input_scale.fill_(scale)
    return sae


@pytest.mark.parametrize("how", ["mean", "max", "last", "cls"])
@pytest.mark.parametrize("size", [1, 4, 15])
def test_pooled_pre_activations_are_those_of_numpy(how, size, monkeypatch):
    f, x, ids, position = tokens()
    sae, x = sae_of(), x.astype(np.float32)
    monkeypatch.setattr(saes_base, "ENCODE_CHUNK_BYTES", 3 * 4 * D_SAE)  # Three rows at a time.
    w, b, centre = (t.detach().numpy() for t in (sae.W_enc, sae.b_enc, sae.b_dec))
    z = (0.5 * x - centre) @ w + b
    order = np.random.default_rng(1).permutation(15)
    rows = batches(f, x, ids, position, size=size, order=order)
    found = pooled(rows, how, PooledPreActs(sae, how, 9))
    assert found.latents.dtype == np.float32 and found.latents.shape == (5, D_SAE)
    assert (found.latents < 0).any()
    for row, example in enumerate(found.ids):
        own = {"mean": lambda a: a.mean(0), "max": lambda a: a.max(0), "last": lambda a: a[-1],
               "cls": lambda a: a[0]}[how]  # fmt: skip
        np.testing.assert_allclose(found.latents[row], own(z[ids == example]), rtol=1e-4, atol=1e-5)


def test_pre_activations_are_of_what_a_transcoder_reads():
    f, x, ids, position = tokens()
    sae, read = sae_of(), torch.from_numpy(x.astype(np.float32))
    (rows,) = batches(f, x + 100, ids, position, size=15)
    found = pooled([rows._replace(read=read)], "last", PooledPreActs(sae, "last", 5))
    (alike,) = batches(f, x.astype(np.float32), ids, position, size=15)
    wanted = pooled([alike], "last", PooledPreActs(sae, "last", 5))
    np.testing.assert_array_equal(found.latents, wanted.latents)
