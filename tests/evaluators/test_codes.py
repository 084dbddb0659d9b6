"""Latents by example and by latent, against a dense table."""

import numpy as np
import pytest
import torch

from sae_runner.evaluators._codes import Codes
from sae_runner.evaluators._collecting import CodesCollector, hashed
from sae_runner.evaluators.base import Rows
from sae_runner.saes.base import Latents

N_EXAMPLES, N_TOKENS, D_SAE = 9, 4, 6


@pytest.fixture
def dense():
    generator = torch.Generator().manual_seed(0)
    f = torch.rand(N_EXAMPLES * N_TOKENS, D_SAE, generator=generator)
    f[f < 0.6] = 0
    f[:, 5] = 0
    return f


def collected(dense, *, batch=7, seed=0, keep_bytes=10**9, order_seed=1) -> Codes:
    n = len(dense)
    ids = 10 * (torch.arange(n) // N_TOKENS) + 3
    position, label = torch.arange(n) % N_TOKENS, (torch.arange(n) // N_TOKENS) % 2
    collector = CodesCollector(keep_bytes, seed)
    order = torch.from_numpy(np.random.default_rng(order_seed).permutation(n))
    for part in order.split(batch):
        latents, x = Latents.from_dense(dense[part]), torch.zeros(len(part), 2)
        collector.add(Rows(x, latents, x, ids[part], position[part], label[part]))
    return collector.finish()


@pytest.mark.parametrize("batch", [1, 7, 100])
def test_codes_are_the_dense_latents_in_order(dense, batch):
    codes = collected(dense, batch=batch)
    assert codes.example_ids.tolist() == [10 * i + 3 for i in range(N_EXAMPLES)]
    assert codes.label.tolist() == [i % 2 for i in range(N_EXAMPLES)]
    assert codes.position.tolist() == list(range(N_TOKENS)) * N_EXAMPLES
    rebuilt = torch.zeros_like(dense)
    rebuilt[codes.entry_row.long(), codes.indices.long()] = codes.values
    assert torch.equal(rebuilt, dense)
    assert torch.equal(codes.n_fired, (dense > 0).sum(0))
    by_example = dense.view(N_EXAMPLES, N_TOKENS, D_SAE)
    assert torch.equal(codes.n_examples_fired, (by_example > 0).any(1).sum(0))


def test_peaks_are_the_maxima_over_the_tokens_of_an_example(dense):
    dense[1, 2] = dense[2, 2] = 2.0  # Two equal maxima: the first counts.
    codes, by_example = collected(dense), dense.view(N_EXAMPLES, N_TOKENS, D_SAE)
    for latent in range(D_SAE):
        best, where = by_example[:, :, latent].max(1)
        peaks = codes.peaks(latent)
        assert peaks.slot.tolist() == best.nonzero().flatten().tolist()
        assert torch.equal(peaks.value, best[best > 0])
        if latent == 2:
            where[0] = 1
        assert torch.equal(peaks.position, where[best > 0])


def test_activations_of_an_example_have_their_zeros(dense):
    codes = collected(dense)
    for latent, slot in ((0, 0), (3, 8), (5, 2)):
        position, acts = codes.activations(latent, slot)
        assert position.tolist() == list(range(N_TOKENS))
        assert torch.equal(acts, dense.view(N_EXAMPLES, N_TOKENS, D_SAE)[slot, :, latent])


def test_what_does_not_fit_is_left_out_by_whole_examples_whatever_the_order(dense):
    every = 8 * int((dense > 0).sum())
    kept = [
        collected(dense, keep_bytes=every // 2, batch=batch, order_seed=order)
        for batch, order in ((1, 1), (7, 2), (36, 3))
    ]
    ids = kept[0].example_ids.tolist()
    assert 0 < len(ids) < N_EXAMPLES
    assert all(codes.example_ids.tolist() == ids for codes in kept)
    assert all(len(codes) == N_TOKENS * len(ids) for codes in kept)
    assert all(codes.n_left_out == N_EXAMPLES - len(ids) for codes in kept)
    other = collected(dense, keep_bytes=every // 2, seed=5)
    assert other.example_ids.tolist() != ids


def test_no_rows_are_no_codes():
    codes = CodesCollector(10**6, 0).finish()
    assert len(codes) == 0 and codes.n_examples == 0


def test_hashes_are_spread_evenly_and_differ_by_seed():
    ids = np.arange(20_000)
    first, second = (hashed(ids, seed).astype(float) / 2**63 for seed in (0, 1))
    counts = np.histogram(first, bins=20, range=(0, 1))[0]
    assert counts.sum() == 20_000 and abs(counts - 1000).max() < 5 * 1000**0.5
    assert abs(np.corrcoef(first, second)[0, 1]) < 5 / 20_000**0.5
