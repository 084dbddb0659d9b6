import numpy as np
import pytest
import torch

from sae_runner.errors import ConfigError
from sae_runner.evaluators._bootstrap import (
    ClusterSums,
    checked_resamples,
    intervals,
    ratio_of,
    resampled_totals,
)

MEAN = {"a.mean": ratio_of("y", "rows")}


def clustered(rng, n_clusters):
    """Sums of clusters whose rows share an effect and whose sizes go with it; true mean 0.5."""
    sizes = rng.integers(1, 20, n_clusters)
    effect = rng.normal(0, 1, n_clusters)
    y = [np.sum(0.5 + e + rng.normal(0, 0.5, n)) for e, n in zip(effect, sizes, strict=True)]
    return {"y": np.array(y), "rows": sizes.astype(float)}


def linearised_se(y, rows):
    """The textbook standard error of a ratio of two totals over clusters."""
    n = len(y)
    residual = y - y.sum() / rows.sum() * rows
    return np.sqrt(n / (n - 1) * np.sum(residual**2)) / rows.sum()


def test_se_is_that_of_a_ratio_estimator():
    sums = clustered(np.random.default_rng(0), 400)
    ci, notes = intervals(sums, MEAN, n_resamples=4000, seed=1)
    found = ci["a.mean"]
    analytic = linearised_se(sums["y"], sums["rows"])
    # A standard error from 4000 resamples is itself uncertain by 1 / √8000 = 1.1%.
    assert found["se"] == pytest.approx(analytic, rel=0.05)
    point = sums["y"].sum() / sums["rows"].sum()
    assert found["lo"] == pytest.approx(point - 1.96 * analytic, abs=0.15 * analytic)
    assert found["hi"] == pytest.approx(point + 1.96 * analytic, abs=0.15 * analytic)
    assert found["n"] == 400
    assert not notes


def test_95_percent_intervals_cover_the_truth_in_95_percent_of_studies():
    rng = np.random.default_rng(2)
    n_studies, covered, covered_as_if_independent = 400, 0, 0
    for study in range(n_studies):
        sums = clustered(rng, 80)
        found = intervals(sums, MEAN, n_resamples=200, seed=study)[0]["a.mean"]
        covered += found["lo"] <= 0.5 <= found["hi"]
        # What rows taken as independent would give: their variance is 1 + 0.25.
        half = 1.96 * np.sqrt(1.25 / sums["rows"].sum())
        mean = sums["y"].sum() / sums["rows"].sum()
        covered_as_if_independent += abs(mean - 0.5) <= half
    # Binomial standard error: 1.1%. Percentile intervals of 80 clusters fall slightly short.
    assert 0.91 <= covered / n_studies <= 0.98
    assert covered_as_if_independent / n_studies < 0.75


def test_resampled_totals_draw_clusters_with_replacement():
    sums = {"first": np.array([1.0, 0, 0, 0]), "one": np.ones(4)}
    totals = resampled_totals(sums, 5000, seed=3)
    assert (totals["one"] == 4).all()
    # The first of 4 is drawn Binomial(4, 1/4) times: mean 1, variance 3/4.
    assert totals["first"].mean() == pytest.approx(1, abs=0.05)
    assert totals["first"].var() == pytest.approx(0.75, abs=0.05)


def test_the_seed_decides():
    sums = clustered(np.random.default_rng(4), 30)
    first, again, other = (intervals(sums, MEAN, n_resamples=100, seed=s)[0] for s in (5, 5, 6))
    assert first == again
    assert first != other


def test_no_interval_without_examples_or_resamples():
    one = {"y": np.array([2.0]), "rows": np.array([1.0])}
    ci, notes = intervals(one, MEAN, n_resamples=100, seed=0)
    assert ci == {}
    assert [(note.code, note.metric) for note in notes] == [("too_few_examples", "a.mean")]
    assert intervals(one, MEAN, n_resamples=0, seed=0) == ({}, [])


def test_no_interval_where_a_resample_is_undefined():
    sums = {"y": np.array([1.0, 0.0]), "rows": np.array([1.0, 0.0])}
    ci, notes = intervals(sums, MEAN, n_resamples=100, seed=0)
    assert ci == {}
    assert notes[0].code == "zero_denominator"


def test_cluster_sums_take_rows_in_any_order():
    clusters = ClusterSums(np.array([3, 8, 20]), ("rows", "y"))
    for ids, y in (([20, 3], [1.0, 2.0]), ([20], [5.0])):
        clusters.add(torch.tensor(ids), rows=torch.ones(len(ids)), y=torch.tensor(y))
    assert clusters.sums["y"].tolist() == [2, 0, 6]
    seen = clusters.seen("rows")
    assert seen["rows"].tolist() == [1, 2]
    assert seen["y"].tolist() == [2, 6]


@pytest.mark.parametrize("stranger", [0, 5, 99])
def test_cluster_sums_refuse_an_example_that_was_not_announced(stranger):
    clusters = ClusterSums(np.array([3, 8]), ("rows",))
    with pytest.raises(ValueError, match="example_ids lacks"):
        clusters.add(torch.tensor([3, stranger]), rows=torch.ones(2))


def test_too_few_resamples_are_refused_by_their_key():
    assert checked_resamples(0, "sparsity") == 0
    assert checked_resamples(40, "sparsity") == 40
    with pytest.raises(ConfigError, match=r"^evaluators\.sparsity\.n_bootstrap=5: .*=0 for none$"):
        checked_resamples(5, "sparsity")
