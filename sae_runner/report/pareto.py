"""The trade-off between two metrics over many runs, with its frontier."""

from pathlib import Path
from typing import Any

from sae_runner.report.comparison import Comparison, higher_is_better
from sae_runner.report.style import GREY, MARKERS, colour_of, house_style, new_figure, save

MAX_LABELS = 60


def draw_pareto(comparison: Comparison, folder: Path) -> list[Path]:
    """`pareto.png` and `pareto.svg`, or nothing if no run has both metrics."""
    with house_style():
        figure = pareto_figure(comparison)
        return save(figure, folder, "pareto") if figure else []


def pareto_figure(comparison: Comparison) -> Any:
    """Runs as numbered points: colour by kind of SAE, marker and frontier by comparable group."""
    runs, x, y = comparison.runs, comparison.x, comparison.y
    known = [i for i, run in enumerate(runs) if run.metrics.get(x) is not None
             and run.metrics.get(y) is not None]  # fmt: skip
    if not known:
        return None
    better = [
        f"{name} ({'higher' if higher_is_better(name) else 'lower'} is better)" for name in (x, y)
    ]
    figure = new_figure(
        7.2, 4.8, f"{y} against {x}", "numbers as in the table; bars: 95% intervals"
    )
    panel = figure.subplots()
    kinds = sorted({str(runs[i].config.get("sae.type", "sae")) for i in known})
    for n, (group, front) in enumerate(zip(comparison.groups, comparison.fronts, strict=True)):
        _draw_front(panel, [_point(comparison, i) for i in front], n)
        for i in (i for i in group.runs if i in known):
            kind = kinds.index(str(runs[i].config.get("sae.type", "sae")))
            _draw_run(panel, comparison, i, colour_of(kind), n, filled=i in front)
    _draw_labels(panel, comparison, known)
    _draw_legend(panel, comparison, kinds, known)
    for axis, name in (("x", x), ("y", y)):
        values = [float(runs[i].metrics[name] or 0) for i in known]
        if min(values) > 0 and max(values) / min(values) > 20:
            getattr(panel, f"set_{axis}scale")("log")
    panel.set_xlabel(better[0])
    panel.set_ylabel(better[1])
    panel.margins(0.08)
    return figure


def _point(comparison: Comparison, i: int) -> tuple[float, float]:
    metrics = comparison.runs[i].metrics
    return float(metrics[comparison.x] or 0), float(metrics[comparison.y] or 0)


def _draw_front(panel: Any, points: list[tuple[float, float]], n: int) -> None:
    """The frontier as a staircase: between two runs, the worse one's value is what is reached."""
    style = ("-", "--", ":", "-.")[n % 4]
    if len(points) > 1:
        xs, ys = zip(*points, strict=True)
        panel.plot(xs, ys, style, drawstyle="steps-post", color=GREY, linewidth=1.2, zorder=1)


def _draw_run(
    panel: Any, comparison: Comparison, i: int, colour: str, group: int, *, filled: bool
) -> None:
    run, (x, y) = comparison.runs[i], _point(comparison, i)
    arms: dict[str, Any] = {}
    for axis, name, value in (("x", comparison.x, x), ("y", comparison.y, y)):
        if interval := run.ci.get(name):
            # A bootstrap interval may, rarely, lie beside the value: an arm has no length then.
            arms[f"{axis}err"] = [
                [max(value - interval["lo"], 0)],
                [max(interval["hi"] - value, 0)],
            ]
    panel.errorbar(
        x, y, **arms, fmt=MARKERS[group % len(MARKERS)], color=colour, ecolor=colour, zorder=3,
        markersize=6.5, markerfacecolor=colour if filled else "white", elinewidth=1, capsize=0,
    )  # fmt: skip


def _draw_labels(panel: Any, comparison: Comparison, known: list[int]) -> None:
    """The number of each run; points that lie on each other share one label."""
    if len(comparison.runs) > MAX_LABELS:
        return
    together: dict[tuple[str, str], list[int]] = {}
    for i in known:
        x, y = _point(comparison, i)
        together.setdefault((f"{x:.3g}", f"{y:.3g}"), []).append(i)
    for runs in together.values():
        text, place = ", ".join(str(i + 1) for i in runs), _point(comparison, runs[0])
        panel.annotate(text, place, (4, 4), textcoords="offset points", fontsize=7.5)


def _draw_legend(panel: Any, comparison: Comparison, kinds: list[str], known: list[int]) -> None:
    for n, kind in enumerate(kinds):
        panel.plot([], [], "s", color=colour_of(n), label=kind)
    for n, group in enumerate(comparison.groups if len(comparison.groups) > 1 else []):
        if not set(group.runs) & set(known):
            continue
        marker = MARKERS[n % len(MARKERS)]
        label = f"group {group.letter}{', not comparable with A' if n else ''}"
        panel.plot([], [], marker, color=GREY, label=label)
    panel.plot(
        [],
        [],
        "o",
        color=GREY,
        label=f"on the frontier{' of its group' if len(comparison.groups) > 1 else ''}",
    )
    panel.plot([], [], "o", color=GREY, markerfacecolor="white", label="not on it")
    panel.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
