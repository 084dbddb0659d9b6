import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from PIL import Image

from sae_runner.report.comparison import compare
from sae_runner.report.curves import MAX_POINTS, curves_figure, draw_curve, read_curves
from sae_runner.report.figures import (
    density_figure,
    downstream_figure,
    draw_run,
    error_figure,
    figure_sources,
    l0_figure,
    last_eval,
    read_envelopes,
    run_title,
)
from sae_runner.report.pareto import draw_pareto, pareto_figure
from sae_runner.report.runs import load_runs
from sae_runner.report.style import house_style, new_figure, plain_count

MakeRun = Callable[..., Path]
X, Y = "sparsity.l0", "reconstruction.fvu"


def texts(svg: Path) -> str:
    return " ".join(re.findall(r"<text[^>]*>([^<]*)</text>", svg.read_text()))


def test_a_run_has_four_figures_in_two_formats(make_run: MakeRun) -> None:
    run = make_run()
    paths = draw_run(run)
    assert [path.name for path in paths] == [
        f"{name}.{kind}" for name in ("loss", "density", "l0", "error") for kind in ("png", "svg")
    ]
    for path in paths:
        assert path.parent == run / "figures"
        if path.suffix == ".png":
            with Image.open(path) as image:
                assert image.width > 800 and image.height > 400
        else:
            assert "toy · activations (all) · topk 512" in texts(path)
    assert "128 of 512 latents (25%) never fired:" in texts(run / "figures" / "density.svg")
    assert "measured on 8,192 rows of toy (heldout)" in texts(run / "figures" / "l0.svg")


def test_figures_are_the_same_bytes_again_whatever_the_settings(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run()
    first = {path.name: path.read_bytes() for path in draw_run(run)}
    monkeypatch.setitem(mpl.rcParams, "font.size", 20.0)
    monkeypatch.setitem(mpl.rcParams, "axes.grid", True)
    assert {path.name: path.read_bytes() for path in draw_run(run)} == first
    assert mpl.rcParams["font.size"] == 20.0
    assert not any(b"Matplotlib v" in data or b"<dc:date>" in data for data in first.values())


def test_what_has_no_series_is_skipped(make_run: MakeRun) -> None:
    run = make_run()
    for name in ("sparsity", "reconstruction"):
        (run / "eval" / "step_00000060" / f"{name}.json").unlink()
    (run / "metrics.jsonl").unlink()
    assert [path.name for path in draw_run(run)] == ["density.png", "density.svg"]
    assert draw_run(run.parent) == []


def test_pyplot_stays_out() -> None:
    assert "matplotlib.pyplot" not in sys.modules


def test_the_last_step_counts_by_number_not_by_spelling(make_run: MakeRun) -> None:
    run = make_run()
    for step in ("step_9", "step_100", "step_x"):
        (run / "eval" / step).mkdir()
    assert last_eval(run) == run / "eval" / "step_100"
    assert read_envelopes(run) == {}
    assert figure_sources(run) == [run / "metrics.jsonl"]


def test_titles_fall_back_on_the_config_then_on_the_name(tmp_path: Path) -> None:
    assert run_title(tmp_path, {}) == tmp_path.name
    config = {"model": {"type": "timm"}, "site": {"name": "pooled", "tokens": "all"}, "sae": None}
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    assert run_title(tmp_path, {}) == "timm · pooled (all)"
    measured = {"sparsity": {"host": {"name": "vit"}, "sae": {"type": "relu", "d_sae": 4096}}}
    assert run_title(tmp_path, measured) == "vit · pooled (all) · relu 4,096"
    (tmp_path / "config.yaml").write_text("a: [")
    assert run_title(tmp_path, {}) == tmp_path.name


def test_curves_of_a_resumed_and_interrupted_run(tmp_path: Path) -> None:
    lines = [
        '{"step": 1, "n_tokens": 10, "loss": 3.0}',
        '{"step": 2, "n_tokens": 20, "loss": 2.0}',
        '{"step": 3, "n_tokens": 30, "loss": 9.0}',
        '{"step": 3, "n_tokens": 30, "loss": 1.0, "auxk": NaN}',  # trained again after a resume
        '{"step": 4, "n_to',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    columns = read_curves(tmp_path / "metrics.jsonl")
    assert columns["loss"].tolist() == [3.0, 2.0, 1.0]
    assert columns["n_tokens"].tolist() == [10, 20, 30]
    assert np.isnan(columns["auxk"]).all()
    assert read_curves(tmp_path / "absent.jsonl") == {}


def panel_titles(figure: Any) -> list[str]:
    titles = [panel.get_title(loc="left") or panel.get_title() for panel in figure.axes]
    return [title for title in titles if title]


def test_every_curve_has_a_panel_and_an_empty_one_has_none(make_run: MakeRun) -> None:
    columns = read_curves(make_run() / "metrics.jsonl")
    columns["ghost"] = np.full(60, np.nan)
    with house_style():
        figure = curves_figure(columns, "title")
    assert panel_titles(figure) == [
        "Loss (total, as minimised)", "auxk (loss part)",
        "mse (loss part)", "L0", "FVU of the training batch", "Dead latents",
        "Learning rate", "Gradient norm before clipping",
    ]  # fmt: skip
    assert all(panel.get_xlabel() for panel in figure.axes if panel.get_title(loc="left"))
    (line,) = figure.axes[0].lines
    assert line.get_ydata().tolist() == columns["loss"].tolist()


def test_many_points_are_means_inside_the_band_of_their_extremes() -> None:
    x = np.arange(10_000.0)
    y = np.sin(x) + 2
    with house_style():
        panel = new_figure(4, 3, "t").subplots()
        draw_curve(panel, x, y, "k", can_be_log=True)
    (line,), (band,) = panel.lines, panel.collections
    assert len(line.get_ydata()) == MAX_POINTS
    assert line.get_ydata()[0] == pytest.approx(y[: 10_000 // MAX_POINTS].mean())
    vertices = band.get_paths()[0].vertices[:, 1]
    assert vertices.min() == pytest.approx(y.min())
    assert vertices.max() == pytest.approx(y.max())


@pytest.mark.parametrize(("top", "scale"), [(19.0, "linear"), (21.0, "log")])
def test_a_wide_range_is_drawn_on_a_log_axis(top: float, scale: str) -> None:
    panel = new_figure(4, 3, "t").subplots()
    draw_curve(panel, np.arange(3.0), np.array([top, 5.0, 1.0]), "k", can_be_log=True)
    assert panel.get_yscale() == scale


def bars(panel: Any) -> tuple[Any, Any]:
    (stairs,) = [patch for patch in panel.patches if type(patch).__name__ == "StepPatch"]
    data = stairs.get_data()
    return data.values, data.edges


def test_l0_bars_are_shares_of_rows_and_a_constant_l0_is_one_bar() -> None:
    figure = l0_figure({"l0": [32], "counts": [500]}, {}, "t")
    heights, edges = bars(figure.axes[0])
    assert heights.tolist() == [0, 0, 0, 1, 0, 0, 0]
    assert edges[3] == 31.5 and edges[4] == 32.5
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels == [
        "mean 32",
        "5th percentile 32",
        "95th percentile 32",
        "median 32",
        "largest 32",
    ]


def test_l0_bars_count_every_row_in_any_order_of_the_series() -> None:
    rng = np.random.default_rng(0)
    values, counts = np.unique(rng.poisson(300, 5000), return_counts=True)
    order = rng.permutation(len(values))
    figure = l0_figure({"l0": values[order].tolist(), "counts": counts[order].tolist()}, {}, "t")
    heights, edges = bars(figure.axes[0])
    assert heights.sum() == pytest.approx(1)
    sample = np.repeat(values, counts)
    assert heights == pytest.approx(np.histogram(sample, edges)[0] / 5000)
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    quantiles = np.percentile(sample, [5, 95, 50], method="inverted_cdf")
    assert labels == [
        f"mean {sample.mean():.4g}", f"5th percentile {quantiles[0]:g}",
        f"95th percentile {quantiles[1]:g}", f"median {quantiles[2]:g}", f"largest {sample.max()}",
    ]  # fmt: skip


def test_one_row_with_thousands_of_latents_stays_visible() -> None:
    figure = l0_figure({"l0": [0, 20, 30, 6458], "counts": [5, 500, 400, 1]}, {}, "t")
    heights, edges = bars(figure.axes[0])
    assert figure.axes[0].get_xscale() == "symlog"
    assert heights.sum() == pytest.approx(1)
    assert edges[0] < 0 and edges[-1] > 6458
    assert "largest 6,458" in [t.get_text() for t in figure.axes[0].get_legend().get_texts()]


def test_density_bars_leave_out_the_dead() -> None:
    edges = np.linspace(-8, 0, 81).tolist()
    counts = [0] * 80
    counts[50] = 7
    figure = density_figure({"edges": edges, "counts": counts, "n_dead": 3}, {}, "t")
    heights, _ = bars(figure.axes[0])
    assert heights.sum() == 7
    assert "3 of 10 latents (30%) never fired" in figure.axes[0].texts[0].get_text()
    low, high = figure.axes[0].get_xlim()
    assert low <= edges[50] and edges[51] <= high


def test_no_dead_latents_need_no_bound() -> None:
    histogram = {"edges": [-2, -1, 0], "counts": [3, 4], "n_dead": 0}
    envelope = {"metrics": {"density": {"dead_upper_bound": 0.01, "n_tokens": 300}}}
    figure = density_figure(histogram, envelope, "t")
    assert figure.axes[0].texts[0].get_text() == "0 of 7 latents (0%) never fired"
    figure = density_figure(histogram | {"n_dead": 1}, envelope, "t")
    assert "their frequency is below 0.01 (95%)" in figure.axes[0].texts[0].get_text()


def test_all_dead_is_drawn_too() -> None:
    edges = np.linspace(-8, 0, 81).tolist()
    figure = density_figure({"edges": edges, "counts": [0] * 80, "n_dead": 10}, {}, "t")
    assert "10 of 10 latents (1e+02%)" not in figure.axes[0].texts[0].get_text()
    assert "10 of 10 latents (100%)" in figure.axes[0].texts[0].get_text()


def test_error_shares_count_rows_beyond_the_bars() -> None:
    histogram = {"edges": [-1, 0, 1], "counts": [6, 2], "n_below": 1, "n_above": 1}
    figure = error_figure(None, histogram, {}, "t")
    heights, _ = bars(figure.axes[0])
    assert heights.tolist() == [0.6, 0.2]
    said = figure.axes[0].texts[0].get_text()
    assert "1 rows below" in said and "1 rows above" in said


def test_error_by_position_has_gaps_where_it_is_null() -> None:
    series = {"position": [0, 1, 2], "fvu": [None, 0.2, 0.3], "mse": [1, 1, 1], "n": [5, 6, 7]}
    figure = error_figure(series, None, {}, "t")
    (line,) = figure.axes[0].lines
    assert np.isnan(line.get_ydata()[0]) and line.get_ydata()[1:].tolist() == [0.2, 0.3]
    assert panel_titles(figure) == ["Error by token position (5 to 7 rows each)"]


def test_one_position_makes_no_curve(make_run: MakeRun) -> None:
    one = {"position": [0], "fvu": [0.2], "mse": [1.0], "n": [5]}
    run = make_run(n_steps=0)
    path = run / "eval" / "step_00000060" / "reconstruction.json"
    envelope = json.loads(path.read_text())
    envelope["series"] = {"error_by_position": one}
    path.write_text(json.dumps(envelope))
    assert not any("error" in path.name for path in draw_run(run))
    envelope["series"]["error_histogram"] = {"edges": [-1, 0, 1], "counts": [6, 2]}
    path.write_text(json.dumps(envelope))
    draw_run(run)
    drawn = texts(run / "figures" / "error.svg")
    assert "Relative error of single rows" in drawn
    assert "position" not in drawn


def test_errors_at_later_sites_have_gaps_where_they_are_null() -> None:
    by_site = {"site": ["blocks.4.resid_post", "blocks.5.resid_post", "pooled"],
               "fvu": [0.1, None, 0.3]}  # fmt: skip
    envelope = {"data": {"name": "text", "split": "heldout", "n_examples": 2048}}
    figure = downstream_figure(by_site, envelope, "it")
    (panel,) = figure.axes
    x, y = panel.lines[0].get_data()
    assert x.tolist() == [0, 1, 2]
    assert y[0] == 0.1 and np.isnan(y[1]) and y[2] == 0.3 and panel.get_ylim()[0] == 0
    assert [label.get_text() for label in panel.get_xticklabels()] == by_site["site"]
    names = [f"blocks.{i}.resid_post" for i in range(50)]
    (panel,) = downstream_figure({"site": names, "fvu": [0.5] * 50}, envelope, "it").axes
    labels = [label.get_text() for label in panel.get_xticklabels()]
    assert labels == names[::3]


@pytest.mark.parametrize("n_sites", [1, 2])
def test_one_later_site_makes_no_curve(make_run: MakeRun, n_sites: int) -> None:
    run = make_run(n_steps=0)
    path = run / "eval" / "step_00000060" / "reconstruction.json"
    envelope = json.loads(path.read_text())
    sites = {"site": ["a", "b"][:n_sites], "fvu": [0.1, 0.2][:n_sites]}
    envelope["series"] = {"downstream_by_site": sites}
    path.write_text(json.dumps(envelope))
    drawn = {p.stem for p in draw_run(run)}
    assert ("downstream" in drawn) == (n_sites == 2)


def pareto_points(figure: Any) -> dict[str, tuple[float, float, bool]]:
    """Number → x, y, filled."""
    panel = figure.axes[0]
    points = [line for line in panel.lines if len(line.get_xdata()) == 1]
    drawn = {
        (float(p.get_xdata()[0]), float(p.get_ydata()[0])): p.get_markerfacecolor() != "white"
        for p in points
    }
    return {t.get_text(): (*t.xy, drawn[tuple(map(float, t.xy))]) for t in panel.texts}


def test_pareto_points_are_the_runs_and_filled_on_the_frontier(
    make_run: MakeRun, tmp_path: Path
) -> None:
    values = [(10.0, 0.5), (20.0, 0.2), (30.0, 0.3)]
    folders = [make_run(f"r{i}", metrics={X: a, Y: b}, ci={}) for i, (a, b) in enumerate(values)]
    runs, _ = load_runs(folders)
    comparison = compare(runs, [], X, Y)
    figure = pareto_figure(comparison)
    assert pareto_points(figure) == {
        "1": (10.0, 0.5, True), "2": (20.0, 0.2, True), "3": (30.0, 0.3, False),
    }  # fmt: skip
    (stairs,) = [line for line in figure.axes[0].lines if len(line.get_xdata()) > 1]
    assert stairs.get_drawstyle() == "steps-post"
    assert list(zip(stairs.get_xdata(), stairs.get_ydata(), strict=True)) == values[:2]
    assert figure.axes[0].get_xlabel() == f"{X} (lower is better)"
    paths = draw_pareto(comparison, tmp_path)
    assert [path.name for path in paths] == ["pareto.png", "pareto.svg"]
    first = [path.read_bytes() for path in paths]
    assert [path.read_bytes() for path in draw_pareto(comparison, tmp_path)] == first


def test_points_on_each_other_share_a_label(make_run: MakeRun) -> None:
    values = [(10.0, 0.5), (20.0, 0.2), (10.001, 0.5)]
    folders = [make_run(f"r{i}", metrics={X: a, Y: b}, ci={}) for i, (a, b) in enumerate(values)]
    figure = pareto_figure(compare(load_runs(folders)[0], [], X, Y))
    assert [text.get_text() for text in figure.axes[0].texts] == ["1, 2", "3"]


def test_pareto_without_both_metrics_is_no_figure(make_run: MakeRun, tmp_path: Path) -> None:
    runs, _ = load_runs([make_run()])
    assert draw_pareto(compare(runs, [], X, "recovery.f1_firing"), tmp_path) == []
    assert list(tmp_path.glob("pareto*")) == []


def test_a_dollar_in_a_name_is_no_formula(make_run: MakeRun) -> None:
    run = make_run("a", n_steps=0)
    path = run / "eval" / "step_00000060" / "density.json"
    text = path.read_text().replace('"host": {"name": "toy"}', '"host": {"name": "$x$"}')
    path.write_text(text)
    draw_run(run)
    assert "$x$ · activations (all) · topk 512" in texts(run / "figures" / "density.svg")


def test_counts_on_an_axis() -> None:
    assert [plain_count(v) for v in (0, 512, 24_000, 2_621_440, 1e9)] == [
        "0", "512", "24k", "2.621M", "1B",
    ]  # fmt: skip
