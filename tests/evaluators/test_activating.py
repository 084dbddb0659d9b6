"""Which examples stand for a latent, against dense tables and the laws they are drawn by."""

import numpy as np
import pytest
import torch
from codes_fixtures import codes_of

from sae_runner.evaluators import _activating as activating
from sae_runner.evaluators._activating import (
    chunks,
    sampled_latents,
    silent,
    spread,
    strata,
    strongest_first,
    take,
    top,
    weighted,
)

N_EXAMPLES, N_TOKENS, D_SAE = 60, 3, 7


@pytest.fixture
def dense():
    """Latent 5 is dead, 6 is active everywhere; the others in a share of the tokens."""
    generator = torch.Generator().manual_seed(0)
    f = torch.rand(N_EXAMPLES * N_TOKENS, D_SAE, generator=generator)
    f[:, :5][f[:, :5] < torch.linspace(0.3, 0.98, 5)] = 0
    f[:, 5] = 0
    return f * torch.arange(1, D_SAE + 1)


def by_example(dense):
    return dense.view(N_EXAMPLES, N_TOKENS, D_SAE)


@pytest.mark.parametrize(("batch", "order_seed"), [(1, 1), (7, 2), (1000, None)])
def test_top_is_the_largest_of_each_residue_class(batch, order_seed):
    """The reference's planted order: f_ij = i where j = i mod F."""
    n, d_sae, k = 53, 5, 4
    f = torch.zeros(n, d_sae)
    f[torch.arange(n), torch.arange(n) % d_sae] = torch.arange(n).float()
    codes = codes_of(f, ids=10 * torch.arange(n), batch=batch, order_seed=order_seed)
    chosen = top(codes, 0, d_sae, k)
    for j in range(d_sae):
        wanted = [i for i in range(n) if i % d_sae == j][::-1][:k]
        assert codes.example_ids[chosen.slot[j]].tolist() == [10 * i for i in wanted]
        assert chosen.value[j].tolist() == wanted


def test_top_has_one_entry_an_example_the_lower_id_first_and_nothing_in_empty_slots(dense):
    dense[:, 3] = 0
    f = by_example(dense)
    f[4, 1, 3] = f[9, 2, 3] = f[9, 0, 3] = 0.5  # Two examples, equal.
    f[2, 0, 3] = -4.0  # Below 0: no activation of a feature.
    codes = codes_of(dense, N_TOKENS)
    chosen = top(codes, 0, D_SAE, 8)
    assert chosen.slot[3].tolist() == [4, 9, -1, -1, -1, -1, -1, -1]
    assert chosen.position[3].tolist() == [1, 0, -1, -1, -1, -1, -1, -1]
    assert chosen.value[3].tolist() == [0.5, 0.5, 0, 0, 0, 0, 0, 0]
    assert (chosen.slot[5] == -1).all()
    best = f.amax(1)
    for j in (0, 1, 2, 6):
        value, order = best[:, j].sort(descending=True, stable=True)
        n = min(8, int((value > 0).sum()))
        assert chosen.slot[j, :n].tolist() == order[:n].tolist()
        assert torch.equal(chosen.value[j, :n], value[:n])
        assert chosen.position[j, :n].tolist() == f[order[:n], :, j].argmax(1).tolist()


def test_strata_are_drawn_from_their_intervals(dense):
    codes, best = codes_of(dense, N_TOKENS), by_example(dense).amax(1)
    chosen = strata(codes, 0, D_SAE, n_intervals=4, per_interval=3, seed=0)
    assert (chosen.slot[5] == -1).all()
    for j in (0, 1, 2, 3, 4, 6):
        edges = np.linspace(0, float(best[:, j].max()), 5)
        values = best[:, j][best[:, j] > 0].double().numpy()
        counts = np.histogram(values, edges)[0]
        for b in range(4):
            slots = [s for s in chosen.slot[j, b].tolist() if s >= 0]
            assert len(slots) == len(set(slots)) == min(3, counts[b])
            assert chosen.value[j, b, : len(slots)].tolist() == best[slots, j].tolist()
            assert all(edges[b] <= best[s, j] <= edges[b + 1] for s in slots)


def test_strata_are_drawn_evenly():
    n = 12
    f = torch.linspace(0.91, 1.0, n)[:, None].repeat(1, 3000)
    codes = codes_of(f)
    chosen = strata(codes, 0, 3000, n_intervals=11, per_interval=3, seed=0)
    drawn = np.bincount(chosen.slot[:, 10].flatten().numpy(), minlength=n)
    assert drawn.sum() == 9000
    assert abs(drawn - 750).max() < 5 * np.sqrt(750)


def test_silent_examples_are_silent_different_and_exhausted_only_when_there_are_no_more(dense):
    best = by_example(dense).amax(1)
    best[7, 6] = 0
    by_example(dense)[7, :, 6] = 0  # Only example 7 is without latent 6.
    codes = codes_of(dense, N_TOKENS)
    for n in (1, 5, N_EXAMPLES):
        found = silent(codes, 0, D_SAE, n, seed=3)
        for j in range(D_SAE):
            slots = [s for s in found[j].tolist() if s >= 0]
            assert len(slots) == len(set(slots)) == min(n, int((best[:, j] == 0).sum()))
            assert (best[slots, j] == 0).all()
            assert found[j].tolist() == slots + [-1] * (n - len(slots))


def test_negative_values_are_not_silent():
    f = torch.zeros(6, 1)
    f[:5] = -1.0
    assert silent(codes_of(f), 0, 1, 3, seed=0).tolist() == [[5, -1, -1]]


def test_chunks_cover_all_and_change_nothing(dense, monkeypatch):
    codes = codes_of(dense, N_TOKENS)
    options = {"n_intervals": 4, "per_interval": 2, "seed": 0}
    whole = top(codes, 0, D_SAE, 5), strata(codes, 0, D_SAE, **options)
    none = silent(codes, 0, D_SAE, 4, 0)
    for size in (1, 100, 200):
        monkeypatch.setattr(activating, "ENTRIES_AT_ONCE", size)
        ranges = list(chunks(codes))
        assert [i for begin, end in ranges for i in range(begin, end)] == list(range(D_SAE))
        assert len(ranges) > 1
        for field in range(3):
            parts = [top(codes, *r, 5)[field] for r in ranges]
            assert torch.equal(torch.cat(parts), whole[0][field])
            parts = [strata(codes, *r, **options)[field] for r in ranges]
            assert torch.equal(torch.cat(parts), whole[1][field])
        assert torch.equal(torch.cat([silent(codes, *r, 4, 0) for r in ranges]), none)


def test_batches_and_order_do_not_matter_and_the_seed_does(dense):
    one = codes_of(dense, N_TOKENS)
    other = codes_of(dense, N_TOKENS, batch=11, order_seed=4)
    options = {"n_intervals": 2, "per_interval": 3}
    first = strata(one, 0, D_SAE, **options, seed=0)
    assert all(map(torch.equal, first, strata(other, 0, D_SAE, **options, seed=0)))
    assert not torch.equal(first.slot, strata(one, 0, D_SAE, **options, seed=1).slot)
    assert torch.equal(silent(one, 0, D_SAE, 5, 0), silent(other, 0, D_SAE, 5, 0))
    assert not torch.equal(silent(one, 0, D_SAE, 5, 0), silent(one, 0, D_SAE, 5, 1))


def test_sampled_latents_are_alive_and_drawn_evenly(dense):
    codes = codes_of(dense, N_TOKENS)
    assert sampled_latents(codes, 100, 0).tolist() == [0, 1, 2, 3, 4, 6]
    n_fired = codes.n_examples_fired
    assert sampled_latents(codes, 100, 0, fewest=40).tolist() == [
        j for j in range(D_SAE) if n_fired[j] >= 40
    ]
    counts = np.zeros(D_SAE)
    for seed in range(600):
        counts[sampled_latents(codes, 2, seed)] += 1
    assert counts[5] == 0 and abs(counts[[0, 1, 2, 3, 4, 6]] - 200).max() < 5 * np.sqrt(200)


def test_weighted_draws_follow_the_activation():
    f = torch.tensor([1.0, 2.0, 5.0])[:, None]
    codes = codes_of(f)
    peaks, first = strongest_first(codes.peaks(0)), np.zeros(3)
    assert peaks.value.tolist() == [5, 2, 1]
    n = 4000
    for seed in range(n):
        drawn = weighted(codes, 0, peaks, 2, seed)
        assert len(set(drawn.tolist())) == 2
        first[drawn[0]] += 1
    wanted = n * np.array([5, 2, 1]) / 8
    assert abs(first - wanted).max() < 5 * np.sqrt(wanted.max())


def test_spread_takes_one_of_each_quantile():
    f = torch.arange(1.0, 41.0)[:, None]
    codes = codes_of(f)
    peaks = strongest_first(codes.peaks(0))
    drawn = [take(peaks, spread(codes, 0, peaks, 10, seed)).value for seed in range(20)]
    for values in drawn:
        assert [int((40 - v) // 4) for v in values.tolist()] == list(range(10))
    assert len({tuple(v.tolist()) for v in drawn}) == 20
    assert spread(codes, 0, peaks, 50, 0).tolist() == list(range(40))
