import numpy as np
import pytest
import torch
from codes_fixtures import codes_of

from sae_runner.evaluators._sampling import Amounts, sample

AMOUNTS = Amounts(10, 5, 10, 10, 20)
N_TOKENS = 4


def codes_with(n_active, n_silent, seed=0):
    """One latent, active with different strengths in the first examples."""
    generator = torch.Generator().manual_seed(seed)
    best = torch.rand(n_active, generator=generator) + 0.1
    f = torch.zeros(n_active + n_silent, N_TOKENS)
    f[torch.arange(n_active), torch.randint(0, N_TOKENS, (n_active,), generator=generator)] = best
    order = torch.randperm(len(f), generator=generator)
    return codes_of(f[order].view(-1, 1), N_TOKENS), f[order].amax(1)


@pytest.mark.parametrize("n_active", [15, 16, 34, 35, 60, 500])
def test_sets_are_disjoint_by_example_and_silent_ones_are_silent(n_active):
    codes, best = codes_with(n_active, 40)
    drawn = sample(codes, 0, AMOUNTS, seed=0)
    explain, active = drawn.explain.slot.tolist(), drawn.active.slot.tolist()
    assert len({*explain, *active, *drawn.silent}) == len(explain) + len(active) + 20
    assert (best[drawn.silent] == 0).all() and len(drawn.silent) == 20
    for peaks in (drawn.explain, drawn.active):
        assert torch.equal(peaks.value, best[peaks.slot]) and (peaks.value > 0).all()
    assert len(explain) == min(15, n_active // 2)
    assert len(active) == min(20, n_active - len(explain))
    begin = codes.example_offsets[torch.tensor(drawn.silent)]
    assert all(0 <= p < N_TOKENS for p in drawn.silent_positions) and len(begin) == 20


def test_the_kinds_of_examples_are_what_they_say():
    codes, best = codes_with(500, 40)
    rank = best.argsort(descending=True).argsort()
    explained, tenths, rest, drawn_places = [], [], [], set()
    for seed in range(30):
        drawn = sample(codes, 0, AMOUNTS, seed)
        explain, active = rank[drawn.explain.slot].tolist(), rank[drawn.active.slot].tolist()
        assert explain[:10] == list(range(10))
        explained += explain[10:]
        assert all(10 <= r < 50 for r in active[:10]), "of the strongest tenth"
        tenths += active[:10]
        left = sorted({*range(500)} - {*explain, *active[:10]})
        bins = [next(i for i, p in enumerate(np.array_split(left, 10)) if r in p)
                for r in active[10:]]  # fmt: skip
        assert bins == list(range(10)), "one of each quantile"
        rest += active[10:]
        drawn_places |= set(drawn.silent_positions)
    assert len(set(explained)) > 60 and len(set(tenths)) > 30 and len(set(rest)) > 100
    assert sum(r < 250 for r in explained) > sum(r >= 250 for r in explained)  # By strength.
    assert drawn_places == set(range(N_TOKENS))


def test_the_same_seed_draws_the_same():
    codes, _ = codes_with(100, 40)
    one, other = (sample(codes, 0, AMOUNTS, seed=3) for _ in range(2))
    assert one.silent == other.silent and one.silent_positions == other.silent_positions
    assert torch.equal(one.active.slot, other.active.slot)
    assert torch.equal(one.explain.slot, other.explain.slot)


def test_there_may_be_no_silent_example():
    codes, _ = codes_with(60, 0)
    assert sample(codes, 0, AMOUNTS, seed=0).silent == []
