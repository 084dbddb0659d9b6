from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sae_runner.evaluators._codes import Codes
from sae_runner.report.firing import (
    correlations,
    firing,
    max_correlations,
    max_correlations_of_neurons,
    shuffle,
    strata,
)
from sae_runner.saes._latents import Latents


def sparse(n: int, d_sae: int, seed: int = 0, share: float = 0.2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    active = torch.rand(n, d_sae, generator=generator) < share
    return active * torch.rand(n, d_sae, generator=generator)


def codes(acts: Tensor, example_id: Any = None, position: Any = None, order: Any = None) -> Codes:
    """Latents of rows, by default one row an example."""
    n = len(acts)
    ids = torch.arange(n) if example_id is None else torch.as_tensor(example_id)
    place = torch.zeros(n, dtype=torch.int64) if position is None else torch.as_tensor(position)
    order = torch.arange(n) if order is None else order
    latents = Latents.from_dense(acts[order])
    return Codes(
        ids[order], place[order], None, latents.offsets, latents.indices.int(), latents.values,
        latents.d_sae,
    )  # fmt: skip


def csr(acts: Tensor) -> Any:
    from scipy.sparse import csr_array

    return csr_array(acts.double().numpy())


def placed(*coordinates: Any) -> list[Any]:
    """All of their rows, as they are."""
    return [(x, np.arange(len(x))) for x in coordinates]


def test_correlations_are_numpys_and_constant_latents_have_none() -> None:
    one, two = sparse(300, 9), sparse(300, 7, 1)
    one[:, 2], one[:, 3], two[:, 4] = 0, 0.7, 0
    ((begin, found),) = correlations(csr(one), csr(two))
    with np.errstate(invalid="ignore"):
        expected = np.corrcoef(one.T.numpy(), two.T.numpy())[:9, 9:]
    expected[3] = np.nan  # NumPy finds a variance of 1e-17 in a constant.
    assert begin == 0
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_blocks_give_the_maxima_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = csr(sparse(200, 11)), csr(sparse(200, 5, 1))
    whole = max_correlations(one, two)
    monkeypatch.setattr("sae_runner.report.firing.CELLS", 10)
    assert len(list(correlations(one, two))) == 6
    for found, expected in zip(max_correlations(one, two), whole, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_a_rotated_model_and_its_rotated_sae_fire_alike_up_to_a_permutation() -> None:
    d, d_sae = 12, 30
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, d, generator=generator, dtype=torch.float64)
    W_enc = torch.randn(d, d_sae, generator=generator, dtype=torch.float64)
    Q = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q
    order = torch.randperm(d_sae, generator=generator)
    one = torch.relu(x @ W_enc - 1)
    two = torch.relu((x @ Q) @ (Q.T @ W_enc[:, order]) - 1)
    ((_, found),) = correlations(csr(one), csr(two))
    assert (found.argmax(0) == order.numpy()).all()
    np.testing.assert_allclose(found.max(0), 1, atol=1e-9)
    metrics = firing(codes(one.float()), codes(two.float()), by_row=True, seed=0)
    assert metrics["max_corr_mean_12"] == pytest.approx(1, abs=1e-5)
    assert metrics["max_corr_mean_21"] == pytest.approx(1, abs=1e-5)
    assert metrics["frac_above_half_12"] == 1 and metrics["frac_above_half_shuffled_12"] == 0
    assert metrics["max_corr_mean_shuffled_12"] < 0.3


def test_rows_are_joined_by_example_and_position_whatever_order_they_come_in() -> None:
    acts, n = sparse(60, 8), 60
    ids, place = torch.arange(n) // 3 + 100, torch.arange(n) % 3
    one = codes(acts, ids, place)
    kept = torch.randperm(n)[:40]  # The other lacks some rows, and has one of its own.
    two = codes(
        torch.cat([acts[kept], torch.ones(1, 8)]),
        torch.cat([ids[kept], torch.tensor([999])]),
        torch.cat([place[kept], torch.tensor([0])]),
        torch.randperm(41),
    )
    found = firing(one, two, by_row=True, seed=0)
    assert (found["unit"], found["n_units"]) == ("row", 40)
    assert found["max_corr_quantiles_12"]["0.05"] == pytest.approx(1)


def test_where_tokens_differ_examples_are_compared_by_their_peaks() -> None:
    peaks = sparse(50, 6, share=0.4)
    ids = torch.arange(50)
    weaker = 0.3 * peaks
    one = codes(torch.cat([peaks, weaker]), ids.repeat(2), [0] * 50 + [1] * 50)
    two = codes(torch.cat([weaker, peaks, weaker]), ids.repeat(3), [0] * 50 + [1] * 50 + [2] * 50)
    found = firing(one, two, by_row=False, seed=0)
    assert (found["unit"], found["n_units"]) == ("example", 50)
    assert found["max_corr_mean_12"] == pytest.approx(1)


def test_shuffling_keeps_what_depends_on_the_position_alone() -> None:
    n_examples, n_positions = 80, 5
    n = n_examples * n_positions
    place = torch.arange(n) % n_positions
    ids = torch.arange(n) // n_positions
    acts = sparse(n, 3)
    acts[:, 0] = (place == 2).float()
    found = firing(codes(acts, ids, place), codes(acts, ids, place), by_row=True, seed=0)
    assert found["max_corr_quantiles_shuffled_12"]["0.95"] > 0.9
    assert found["max_corr_median_shuffled_12"] < 0.2
    assert found["max_corr_median_12"] == pytest.approx(1)
    stratum = np.array([0, 1, 0, 2, 1, 0, 2, 2])
    permutation = shuffle(stratum, 3)
    assert sorted(permutation) == list(range(8))
    assert (stratum[permutation] == stratum).all()
    assert (permutation != np.arange(8)).any()


def test_shuffling_keeps_what_the_length_of_an_example_makes_of_peaks() -> None:
    """Two unrelated models: dense coordinates are greater at most in texts of more tokens."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 41, (640,), generator=generator)
    ids = torch.arange(640).repeat_interleave(sizes)
    place = torch.cat([torch.arange(int(n)) for n in sizes])
    made, peaks = [], []
    for seed in (0, 1):
        x = torch.randn(len(ids), 6, generator=generator)
        made.append(codes(sparse(len(ids), 6, seed), ids, place))
        best = torch.full((640, 6), -torch.inf)
        best.scatter_reduce_(0, ids[:, None].expand_as(x), x, "amax")
        peaks.append(best.numpy())
    found = firing(made[0], made[1], by_row=False, seed=0, neurons=placed(*peaks))
    for way in ("12", "21"):
        real, chance = (found[f"max_corr_mean_neurons_{s}{way}"] for s in ("", "shuffled_"))
        assert 0.4 < real < 1.15 * chance
        assert found[f"max_corr_mean_{way}"] < 1.2 * found[f"max_corr_mean_shuffled_{way}"]
    at, anywhere = np.arange(640), np.random.default_rng(0).permutation(640)
    dealt_freely, _ = max_correlations_of_neurons((peaks[0], at), (peaks[1], anywhere))
    assert dealt_freely.mean() < 0.15


def test_strata_are_of_about_one_size_and_equal_sizes_share_theirs() -> None:
    size = np.random.default_rng(0).integers(1, 30, 640)
    found = strata(size)
    for s in np.unique(size):
        assert len(np.unique(found[size == s])) == 1
    order = np.argsort(size, kind="stable")
    assert (np.diff(found[order]) >= 0).all()
    counts = np.bincount(found)
    assert 6 < len(counts) <= 10 and counts.min() > 30 and counts.sum() == 640
    assert not np.ptp(strata(np.full(640, 7)))
    # Where one size is frequent, few are left on either side: they go with it.
    for rare in ([1], [2, 3, 4], [90], [1, 90], [*range(8), *range(20, 29)]):
        assert not np.ptp(strata(np.array([*rare, *[10] * 300])))
    kept = strata(np.array([1] * 32 + [10] * 200 + [11]))
    assert np.bincount(kept).tolist() == [32, 201] and kept[0] != kept[-1]
    assert not np.ptp(strata(np.arange(127))) and strata(np.zeros(0, np.int64)).shape == (0,)
    assert len(np.unique(strata(np.arange(100_000)))) == 32


def test_latents_that_never_fire_are_counted_and_left_out() -> None:
    acts = sparse(100, 5)
    acts[:, 1:3] = 0
    found = firing(codes(acts), codes(sparse(100, 4, 1)), by_row=True, seed=0)
    assert (found["n_constant_1"], found["n_constant_2"]) == (2, 0)
    nothing = firing(codes(torch.zeros(10, 2)), codes(sparse(10, 4)), by_row=True, seed=0)
    assert nothing["max_corr_mean_12"] is None and nothing["max_corr_quantiles_21"] is None
    assert nothing.keys() == found.keys()


def test_no_unit_in_common_gives_nulls() -> None:
    other = codes(sparse(10, 3), torch.arange(10) + 50)
    for by_row in (True, False):
        found = firing(codes(sparse(10, 3)), other, by_row=by_row, seed=0)
        assert found["n_units"] == 0 and found["max_corr_mean_12"] is None


def raw(n: int, d: int, seed: int = 0) -> Any:
    """Coordinates with means far from 0, one of them constant."""
    generator = np.random.default_rng(seed)
    x = generator.standard_normal((n, d)) * generator.uniform(0.1, 9, d) + 50
    x[:, 1] = 7.3
    return x.astype(np.float32)


def test_correlations_of_neurons_are_numpys_whatever_the_parts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one, two = raw(300, 9), raw(260, 7, 1)
    two[:, 0] = one[:260, 3] + 0.1 * two[:, 0]
    of_one, of_two = np.arange(250)[::-1] + 2, np.arange(250) + 5
    a, b = one[of_one], two[of_two]
    with np.errstate(invalid="ignore"):
        expected = np.corrcoef(a.T.astype(float), b.T.astype(float))[:9, 9:]
    expected[1], expected[:, 1] = np.nan, np.nan
    best = np.fmax.reduce(expected, axis=1), np.fmax.reduce(expected, axis=0)
    for cells, rows in ((2**23, 4096), (10, 64)):
        monkeypatch.setattr("sae_runner.report.firing.CELLS", cells)
        monkeypatch.setattr("sae_runner.report.firing.ROWS_AT_ONCE", rows)
        found = max_correlations_of_neurons((one, of_one), (two, of_two))
        for mine, theirs in zip(found, best, strict=True):
            np.testing.assert_allclose(mine, theirs, atol=1e-5)
    nothing = max_correlations_of_neurons((one, of_one[:1]), (two, of_two[:1]))
    assert np.isnan(nothing[0]).all() and np.isnan(nothing[1]).all()


def test_neurons_are_compared_on_the_units_of_the_latents() -> None:
    acts, n = sparse(90, 5), 90
    ids, place = torch.arange(n) // 3, torch.arange(n) % 3
    kept = torch.arange(n)[30:]  # The second has no rows of the first ten examples.
    x = raw(n, 4)
    one, two = codes(acts, ids, place), codes(acts[kept], ids[kept], place[kept])
    found = firing(one, two, by_row=True, seed=0, neurons=placed(x, 3 * x[30:] + 1))
    assert found["n_units"] == 60 and found["n_constant_neurons_1"] == 1
    for way in ("12", "21"):
        assert found[f"max_corr_mean_neurons_{way}"] == pytest.approx(1, abs=1e-5)
        assert found[f"max_corr_mean_neurons_shuffled_{way}"] < 0.6
    without = firing(one, two, by_row=True, seed=0)
    assert found.keys() > without.keys()
    assert {k: found[k] for k in without} == without
    turned = firing(one, two, by_row=True, seed=0, neurons=placed(x, -x[30:]))
    assert turned["max_corr_mean_neurons_12"] < 0.5  # A sign is not looked past.
