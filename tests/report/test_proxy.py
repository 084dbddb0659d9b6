from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from scipy.stats import spearmanr

from sae_runner.config import config_dir, construct
from sae_runner.errors import ConfigError
from sae_runner.report.comparison import Comparison, compare
from sae_runner.report.heatmap import colour, draw_heatmap
from sae_runner.report.options import ProxyOptions
from sae_runner.report.proxy import (
    Correlation,
    groups_by,
    proxy_correlations,
    spearman,
)
from sae_runner.report.runs import load_runs

MakeRun = Callable[..., Path]
L0, FVU, COSINE, DEAD = (
    "sparsity.l0", "reconstruction.fvu", "reconstruction.cosine", "density.dead_frac",
)  # fmt: skip


def options(**changes: Any) -> ProxyOptions:
    block = yaml.safe_load((Path(config_dir()) / "report.yaml").read_text())["proxy"]
    made: ProxyOptions = construct(ProxyOptions.from_config, block | changes, where="proxy")
    return made


@pytest.fixture
def table(make_run: MakeRun) -> Callable[..., Comparison]:
    """Runs with given metrics; `kinds` are their sae.type."""

    def make(kinds: list[str] | None = None, **metrics: list[float | None]) -> Comparison:
        names = {"l0": L0, "fvu": FVU, "cosine": COSINE, "dead": DEAD}
        n = len(next(iter(metrics.values())))
        folders = [
            make_run(
                f"run-{i:02}", with_series=False, n_steps=0, ci={},
                config={"sae.type": kinds[i]} if kinds else {},
                metrics={names[k]: v[i] for k, v in metrics.items()},
                notes=[{"code": "zero_denominator", "metric": names[k], "detail": "-"}
                       for k, v in metrics.items() if v[i] is None],
            )
            for i in range(n)
        ]  # fmt: skip
        runs, damaged = load_runs(folders)
        assert damaged == []
        return compare(runs, [L0, FVU], L0, FVU)

    return make


def test_rho_is_scipys_with_and_without_ties() -> None:
    generator = np.random.default_rng(0)
    for values in (generator.normal(size=(40, 12)), generator.integers(0, 4, (40, 12))):
        found = spearman(values[:20], values[20:])
        expected = [
            spearmanr(x, y).statistic for x, y in zip(values[:20], values[20:], strict=True)
        ]
        np.testing.assert_allclose(found, expected, atol=1e-12)
    assert np.isnan(spearman(np.ones(5), np.arange(5)))


def test_a_monotone_table_is_one_and_the_other_way_round_minus_one(
    table: Callable[..., Comparison],
) -> None:
    rising = [float(i) for i in range(12)]
    comparison = table(l0=rising, fvu=[v**3 for v in rising], cosine=[-np.exp(v) for v in rising])
    found = {(c.x, c.y): c for c in proxy_correlations(comparison, [L0], [FVU, COSINE], options())}
    up, down = found[L0, FVU], found[L0, COSINE]
    assert (up.rho, up.lo, up.hi, up.n, up.note) == (1, 1, 1, 12, "")
    assert (down.rho, down.lo, down.hi) == (-1, -1, -1)
    assert up.is_firm and down.is_firm


def test_a_metric_is_not_set_against_itself(table: Callable[..., Comparison]) -> None:
    comparison = table(l0=[float(i) for i in range(10)])
    pairs = {(c.x, c.y) for c in proxy_correlations(comparison, [L0, FVU], [L0, FVU], options())}
    assert pairs == {(L0, FVU), (FVU, L0)}


def test_constant_metrics_and_few_runs_are_null_with_a_reason(
    table: Callable[..., Comparison],
) -> None:
    rising = [float(i) for i in range(12)]
    comparison = table(l0=rising, fvu=[0.5] * 12, cosine=[None] * 3 + rising[3:])
    found = {c.y: c for c in proxy_correlations(comparison, [L0], [FVU, COSINE], options())}
    assert found[FVU].rho is None and found[FVU].note == f"constant: {FVU}"
    assert found[COSINE].rho is None
    assert found[COSINE].note == "9 runs have both; proxy.min_runs=10"
    few = proxy_correlations(comparison, [L0], [COSINE], options(min_runs=9))[0]
    assert (few.rho, few.n) == (1, 9)


def test_the_interval_is_a_percentile_bootstrap_over_runs(
    table: Callable[..., Comparison],
) -> None:
    generator = np.random.default_rng(1)
    x = generator.normal(size=20)
    y = x + generator.normal(size=20)
    comparison = table(l0=x.tolist(), fvu=y.tolist())
    (found,) = proxy_correlations(comparison, [L0], [FVU], options(n_bootstrap=4000))
    order = np.argsort(x)  # Runs stand in the order of l0.
    drawn = np.random.default_rng(7).integers(0, 20, (4000, 20))
    rhos = [spearmanr(x[order][d], y[order][d]).statistic for d in drawn]
    low, high = np.quantile(rhos, [0.025, 0.975])
    assert found.lo == pytest.approx(low, abs=0.03) and found.hi == pytest.approx(high, abs=0.03)
    assert found.lo is not None and found.rho is not None and found.hi is not None
    assert found.lo < found.rho < found.hi
    (bare,) = proxy_correlations(comparison, [L0], [FVU], options(n_bootstrap=0))
    assert bare == found._replace(lo=None, hi=None) and not bare.is_firm


def test_what_hangs_on_one_run_is_not_firm(table: Callable[..., Comparison]) -> None:
    rising = [float(i) for i in range(12)]
    (found,) = proxy_correlations(
        table(l0=rising, dead=[0.0] * 11 + [0.3]), [L0], [DEAD], options()
    )
    # A third of the resamples lacks that run, so that the other metric is constant there.
    assert found.rho is not None and found.rho > 0.4
    assert (found.lo, found.is_firm) == (-1, False)


def test_groups_are_correlated_apart(table: Callable[..., Comparison]) -> None:
    rising = [float(i) for i in range(10)]
    comparison = table(
        ["relu"] * 10 + ["topk"] * 10, l0=rising * 2, fvu=[*rising, *(100 - v for v in rising)]
    )
    found = proxy_correlations(comparison, [L0], [FVU], options(group_by="sae.type"))
    assert {c.group: c.rho for c in found} == {"sae.type=relu": 1, "sae.type=topk": -1}
    (together,) = proxy_correlations(comparison, [L0], [FVU], options())
    assert together.rho is not None and abs(together.rho) < 0.2 and together.group == "all runs"
    assert groups_by(comparison, "group") == {"group A": list(range(20))}
    with pytest.raises(ConfigError, match=r"^proxy.group_by=sae.typ: no run has this key. Did you"):
        groups_by(comparison, "sae.typ")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_bootstrap": 39}, "proxy.n_bootstrap=39: a 95% interval needs 40 or more"),
        ({"min_runs": 2}, "proxy.min_runs=2: must be >= 3"),
    ],
)
def test_bad_options_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        options(**changes)
    assert str(error.value).startswith(message)


def test_cells_whose_interval_holds_zero_are_visibly_weaker(tmp_path: Path) -> None:
    firm = Correlation("all runs", L0, FVU, 0.8, 0.5, 0.95, 12, "")
    weak = firm._replace(y=COSINE, lo=-0.1)
    gone = firm._replace(y=DEAD, rho=None, lo=None, hi=None, note="constant")
    assert (1 - colour(weak)).sum() < 0.3 * (1 - colour(firm)).sum()
    assert colour(firm)[2] > colour(firm)[0]  # Blue.
    assert colour(firm._replace(rho=-0.8, lo=-0.9, hi=-0.5))[0] > 0.8  # Orange.
    paths = draw_heatmap([firm, weak, gone], tmp_path)
    text = next(p for p in paths if p.suffix == ".svg").read_text()
    assert text.count("+0.80") == 2 and L0 in text and "dead_frac" not in text
    assert draw_heatmap([gone], tmp_path / "none") == []


def test_a_large_grid_is_cut_to_what_can_be_read(tmp_path: Path) -> None:
    found = [
        Correlation("all runs", f"a.x{i}", f"b.y{j}", 0.1, -0.2, 0.3, 12, "")
        for i in range(40) for j in range(3)
    ]  # fmt: skip
    text = draw_heatmap(found, tmp_path)[1].read_text()
    assert "x31" in text and "x32" not in text


def test_a_pair_is_listed_once_and_both_sides_are_in_one_order() -> None:
    from sae_runner.report.heatmap import in_order
    from sae_runner.report.sections import proxy_section

    names = ["a.x", "b.x", "c.x"]
    found = [
        Correlation("all runs", x, y, 0.5, 0.1, 0.9, 10, "") for y in names for x in names if x != y
    ]
    assert len(proxy_section(found, []).rows) == 3
    assert in_order(found, "x") == in_order(found, "y") == names
    assert in_order([c for c in found if c.x != "b.x"], "x") == ["a.x", "c.x"]
