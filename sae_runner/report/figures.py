"""Figures of one run: what its evaluators counted, and the course of its training."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml

from sae_runner import files
from sae_runner.log import working
from sae_runner.report.curves import curves_figure, read_curves
from sae_runner.report.style import COLOURS, DARK, GREY, house_style, new_figure, plain_count, save

FIGURES = ("loss", "density", "l0", "error", "downstream")
MAX_BARS = 60
MAX_NAMES = 24
"""Sites named on an axis."""


@working("drawing figures")
def draw_run(run_dir: Path) -> list[Path]:
    """Draw what a run directory holds into its `figures/`, each as PNG and SVG.

    `loss` from metrics.jsonl; `density`, `l0`, `error` and `downstream` from the series of the
    envelopes of the last evaluated step. What has no data is skipped.
    """
    run_dir = Path(run_dir)
    envelopes = read_envelopes(run_dir)
    series: dict[str, tuple[Any, Mapping[str, Any]]] = {}
    for envelope in envelopes.values():
        for name, value in envelope.get("series", {}).items():
            series.setdefault(name, (value, envelope))
    title = run_title(run_dir, envelopes)
    with house_style():
        figures = {}
        columns = read_curves(run_dir / "metrics.jsonl")
        if columns:
            figures["loss"] = curves_figure(columns, title)
        if "log10_hist" in series:
            figures["density"] = density_figure(*series["log10_hist"], title)
        if "l0_histogram" in series:
            figures["l0"] = l0_figure(*series["l0_histogram"], title)
        nothing = (None, None)
        by_position, of_positions = series.get("error_by_position", nothing)
        # One position (a class token, a pooled vector) makes no curve.
        if by_position and len(by_position["position"]) < 2:
            by_position = None
        histogram, of_rows = series.get("error_histogram", nothing)
        if by_position or histogram:
            measured_by = of_positions or of_rows or {}
            figures["error"] = error_figure(by_position, histogram, measured_by, title)
        by_site, of_sites = series.get("downstream_by_site", nothing)
        if of_sites and by_site and len(by_site["site"]) > 1:  # As above.
            figures["downstream"] = downstream_figure(by_site, of_sites, title)
        # All or none: whoever finds the folder need not ask what is missing in it.
        with files.atomic(run_dir / "figures") as temporary:
            temporary.mkdir()
            drawn = [p for name, figure in figures.items() for p in save(figure, temporary, name)]
        return [run_dir / "figures" / path.name for path in drawn]


def figure_sources(run_dir: Path) -> list[Path]:
    """The files that `draw_run` reads."""
    folder = last_eval(run_dir)
    sources = [run_dir / "metrics.jsonl", *(sorted(folder.glob("*.json")) if folder else [])]
    return [path for path in sources if path.is_file()]


def last_eval(run_dir: Path) -> Path | None:
    """`eval/step_N` of the largest N."""
    steps = [p for p in run_dir.glob("eval/step_*") if p.name.removeprefix("step_").isdigit()]
    return max(steps, key=lambda p: int(p.name.removeprefix("step_")), default=None)


def read_envelopes(run_dir: Path) -> dict[str, dict[str, Any]]:
    """The envelopes of the last evaluated step by evaluator; what is no JSON is passed over."""
    envelopes = {}
    folder = last_eval(run_dir)
    for path in sorted(folder.glob("*.json")) if folder else []:
        try:
            value = json.loads(path.read_bytes())
        except ValueError:
            continue
        if isinstance(value, dict):
            envelopes[path.stem] = value
    # Of two evaluators of one type, the one that is called like it is the one that is drawn.
    return dict(sorted(envelopes.items(), key=lambda item: item[1].get("type") != item[0]))


def run_title(run_dir: Path, envelopes: Mapping[str, Mapping[str, Any]]) -> str:
    """`model · site (tokens) · sae`, as measured, or as the config has it."""
    config: dict[str, Any] = {}
    try:
        loaded = yaml.safe_load((run_dir / "config.yaml").read_bytes())
        config = {str(k): v for k, v in loaded.items()} if isinstance(loaded, dict) else {}
    except (OSError, ValueError, yaml.YAMLError):
        pass
    blocks = {key: value for key, value in config.items() if isinstance(value, dict)}
    envelope = next(iter(envelopes.values()), {})
    host, site, sae = (
        {**blocks.get(ours, {}), **{k: v for k, v in envelope.get(theirs, {}).items() if v}}
        for ours, theirs in (("model", "host"), ("site", "site"), ("sae", "sae"))
    )
    tokens = f" ({site['tokens']})" if site.get("tokens") else ""
    names = [
        host.get("name") or host.get("type"),
        f"{site.get('hook') or site.get('name')}{tokens}" if site else None,
        sae.get("arch") or sae.get("type"),
    ]
    width = f" {sae['d_sae']:,}" if isinstance(sae.get("d_sae"), int) else ""
    return " · ".join(str(name) for name in names if name) + width if any(names) else run_dir.name


def measured_on(envelope: Mapping[str, Any], n: int, unit: str = "rows") -> str:
    """`measured on 8,192 rows of toy (heldout)`; n 0: unknown."""
    data = envelope.get("data", {})
    rows = f"{n:,} {unit}" if n else unit
    split = f" ({data['split']})" if data.get("split") else ""
    return f"measured on {rows} of {data.get('name') or 'the data'}{split}"


def density_figure(histogram: Mapping[str, Any], envelope: Mapping[str, Any], title: str) -> Any:
    """How often latents fire; those that never did stand apart, in words."""
    metrics = envelope.get("metrics", {}).get("density", {})
    figure = new_figure(6.4, 3.6, title, measured_on(envelope, metrics.get("n_tokens") or 0))
    panel = figure.subplots()
    edges, counts = np.array(histogram["edges"]), np.array(histogram["counts"])
    draw_bars(panel, edges, counts)
    shown = counts.nonzero()[0]
    if len(shown):
        panel.set_xlim(edges[max(shown[0] - 2, 0)], edges[min(shown[-1] + 3, len(edges) - 1)])
    dead, total = int(histogram.get("n_dead", 0)), int(counts.sum() + histogram.get("n_dead", 0))
    share = f" ({100 * dead / total:.3g}%)" if total else ""
    never = f"{dead:,} of {total:,} latents{share} never fired"
    bound = metrics.get("dead_upper_bound")
    if dead and bound:
        never += f":\ntheir frequency is below {bound:.2g} (95%)"
    panel.set_title(f"Firing frequency of the {total - dead:,} latents that fired")
    panel.text(0.02, 0.97, never, transform=panel.transAxes, va="top", fontsize=8, color=DARK)
    panel.set_ylim(top=1.25 * max(counts.max(initial=0), 1))
    panel.set_xlabel("log10 share of rows in which a latent fires")
    panel.set_ylabel("latents")
    return figure


def l0_figure(histogram: Mapping[str, Any], envelope: Mapping[str, Any], title: str) -> Any:
    """How many latents are active in a row: share of rows, with mean and percentiles."""
    n_rows = int(sum(histogram["counts"]))
    figure = new_figure(6.4, 3.6, title, measured_on(envelope, n_rows))
    panel = figure.subplots()
    l0, counts = np.array(histogram["l0"], float), np.array(histogram["counts"], float)
    order = np.argsort(l0)
    l0, counts = l0[order], counts[order]
    total = max(counts.sum(), 1.0)
    # The largest row may have a thousand times the median's latents: then the axis is a log one.
    p05, p50, p95 = (l0[np.searchsorted(counts.cumsum(), q * total)] for q in (0.05, 0.5, 0.95))
    wide = bool(l0.max() > 30 * max(p50, 1))
    edges = _l0_edges(l0, wide)
    draw_bars(panel, edges, np.histogram(l0, edges, weights=counts)[0] / total)
    if wide:
        panel.set_xscale("symlog", linthresh=1, linscale=0.3)
        panel.xaxis.set_major_formatter(lambda value, _: plain_count(value))
        panel.set_xlim(left=-0.5)
    mean = float((l0 * counts).sum() / total)
    panel.axvline(mean, color=COLOURS[1], linewidth=1.4, label=f"mean {mean:.4g}")
    for quantile, name in ((p05, "5th percentile"), (p95, "95th percentile")):
        panel.axvline(
            quantile, color=GREY, linewidth=1, linestyle="--", label=f"{name} {quantile:g}"
        )
    panel.plot([], [], " ", label=f"median {p50:g}")
    panel.plot([], [], " ", label=f"largest {l0.max():,.0f}")
    panel.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    panel.set_title("Active latents per row")
    panel.set_xlabel("L0, active latents")
    panel.set_ylabel("share of rows")
    return figure


def _l0_edges(l0: npt.NDArray[np.float64], wide: bool) -> npt.NDArray[np.float64]:
    """Bins that each hold equally many whole numbers, or grow by a factor when `wide`."""
    low, high = l0.min(), l0.max()
    if wide:
        grown = np.geomspace(1, high + 1, MAX_BARS)
        return np.unique(np.concatenate([[-0.5], np.floor(grown) - 0.5, [high + 0.5]]))
    step = max(1, math.ceil((high - low + 1) / MAX_BARS))
    # A lone value (a top-k SAE's k) gets neighbours, else its bar would fill the axis.
    low, high = (low - 3, high + 3) if high == low else (low, high)
    return np.arange(max(low, 0) - 0.5, high + step + 0.5, step)


def error_figure(
    by_position: Mapping[str, Any] | None,
    histogram: Mapping[str, Any] | None,
    envelope: Mapping[str, Any],
    title: str,
) -> Any:
    """Reconstruction error of rows: by token position, and its distribution; one may be absent."""
    n_panels = bool(by_position) + bool(histogram)
    counted = histogram or {}
    n_rows = sum(counted.get("counts", [])) + sum(
        counted.get(f"n_{name}", 0) for name in ("below", "above", "skipped")
    )
    width = 6.4 if n_panels < 2 else 10
    figure = new_figure(width, 3.6, title, measured_on(envelope, n_rows))
    axes = iter(np.atleast_1d(figure.subplots(1, n_panels)))
    if by_position:
        draw_error_by_position(next(axes), by_position)
    if histogram:
        draw_error_histogram(next(axes), histogram)
    return figure


def draw_error_by_position(panel: Any, series: Mapping[str, Sequence[Any]]) -> None:
    """FVU over token positions, in which the number of rows behind a point is its weight."""
    position = np.array(series["position"], float)
    fvu = np.array([math.nan if v is None else v for v in series["fvu"]], float)
    marker = "o" if len(position) <= 64 else None
    panel.plot(position, fvu, color=COLOURS[0], marker=marker, markersize=3.5, linewidth=1.2)
    finite = fvu[np.isfinite(fvu)]
    if len(finite) and finite.min() > 0 and finite.max() / finite.min() > 20:
        panel.set_yscale("log")
    else:
        panel.set_ylim(bottom=0)
    n = np.array(series.get("n") or [0], float)
    spread = f"{n.min():,.0f} to {n.max():,.0f}" if n.min() < n.max() else f"{n.max():,.0f}"
    panel.set_title(f"Error by token position ({spread} rows each)")
    panel.set_xlabel("token position in the example")
    panel.set_ylabel("fraction of variance unexplained")


def draw_error_histogram(panel: Any, series: Mapping[str, Any]) -> None:
    """Relative errors of rows; those beyond the edges count in the shares and are named."""
    edges, counts = np.array(series["edges"]), np.array(series["counts"])
    beyond = {name: int(series.get(f"n_{name}", 0)) for name in ("below", "above")}
    draw_bars(panel, edges, counts / max(counts.sum() + sum(beyond.values()), 1))
    shown = counts.nonzero()[0]
    if len(shown):
        panel.set_xlim(edges[max(shown[0] - 2, 0)], edges[min(shown[-1] + 3, len(edges) - 1)])
    said = [f"{n:,} rows {name} the bars' range" for name, n in beyond.items() if n]
    if skipped := int(series.get("n_skipped", 0)):
        said.append(f"{skipped:,} rows left out: no distance from the mean row")
    panel.text(0.02, 0.97, "\n".join(said), transform=panel.transAxes, va="top", fontsize=8)
    panel.set_title("Relative error of single rows")
    panel.set_xlabel("log10 of squared error / squared distance from the mean row")
    panel.set_ylabel("share of rows")
    if said:
        panel.set_ylim(top=1.2 * panel.get_ylim()[1])


def downstream_figure(
    by_site: Mapping[str, Sequence[Any]], envelope: Mapping[str, Any], title: str
) -> Any:
    """What the reconstruction's error becomes in later blocks; gaps where it is null."""
    n = envelope.get("data", {}).get("n_examples") or 0
    figure = new_figure(6.4, 3.6, title, measured_on(envelope, n, "examples"))
    panel = figure.subplots()
    fvu = np.array([math.nan if v is None else v for v in by_site["fvu"]], float)
    panel.plot(np.arange(len(fvu)), fvu, color=COLOURS[0], marker="o", markersize=3.5)
    panel.set_ylim(0, 1.1 * fvu[np.isfinite(fvu)].max(initial=0) or 1)
    named = np.arange(0, len(fvu), math.ceil(len(fvu) / MAX_NAMES))
    panel.set_xticks(named, [by_site["site"][int(i)] for i in named], rotation=40, ha="right")
    panel.set_title("Error at later sites, with the reconstruction in the model")
    panel.set_ylabel("fraction of variance unexplained")
    return figure


def draw_bars(
    panel: Any, edges: npt.NDArray[Any], heights: npt.NDArray[Any], colour: str = COLOURS[0]
) -> None:
    """Histogram bars between edges, from zero."""
    panel.stairs(heights, edges, fill=True, color=colour, alpha=0.85, linewidth=0)
    panel.grid(axis="x", visible=False)
