"""The course of a training run, from its metrics.jsonl: small panels over the tokens seen."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sae_runner.report.style import COLOURS, new_figure, plain_count

# Panels with a name of their own, in this order and after the loss parts. What metrics.jsonl has
# besides these, `step`, `n_tokens` and `loss` belongs to the loss.
AXES = {
    "l0": "active latents per row",
    "fvu": "share unexplained",
    "dead_fraction": "share of latents",
    "lr": "learning rate",
    "grad_norm": "L2 norm",
}
TITLES = {
    "loss": "Loss (total, as minimised)",
    "l0": "L0",
    "fvu": "FVU of the training batch",
    "dead_fraction": "Dead latents",
    "lr": "Learning rate",
    "grad_norm": "Gradient norm before clipping",
}
MAX_POINTS = 200
"""More are drawn as means of so many stretches, over the band between their extremes."""


def read_curves(path: Path) -> dict[str, npt.NDArray[np.float64]]:
    """Columns of metrics.jsonl by name; NaN where a line lacks one or it is not finite.

    Of a step that was trained twice, since a run was resumed before it, the last line counts. A
    line that is cut short, as an interrupted process leaves it, is passed over.
    """
    lines: dict[int, dict[str, float]] = {}
    for number, text in enumerate(path.read_text().splitlines() if path.is_file() else []):
        try:
            record = json.loads(text)
            numbers = {k: float(v) for k, v in record.items() if isinstance(v, int | float)}
        except (ValueError, AttributeError):
            continue
        lines[int(numbers.get("step", number))] = numbers
    names = dict.fromkeys(name for record in lines.values() for name in record)
    table = {n: np.array([lines[step].get(n, math.nan) for step in sorted(lines)]) for n in names}
    return {name: np.where(np.isfinite(column), column, np.nan) for name, column in table.items()}


def curves_figure(columns: dict[str, npt.NDArray[np.float64]], title: str) -> Any:
    """One panel for the loss, each of its parts, L0, FVU, dead latents, lr and gradient norm."""
    axis = "n_tokens" if "n_tokens" in columns else "step"
    label = "tokens seen" if axis == "n_tokens" else "step"
    parts = sorted(columns.keys() - AXES.keys() - {"step", "n_tokens", "loss"})
    names = [n for n in ["loss", *parts, *AXES] if n in columns and np.isfinite(columns[n]).any()]
    n_columns = min(3, len(names))
    n_rows = math.ceil(len(names) / n_columns)
    per_point = len(columns[axis]) / MAX_POINTS
    figure = new_figure(
        3.4 * n_columns, 2.1 * n_rows + 0.6, title,
        f"lines: means of about {per_point:.0f} logged steps; bands: their extremes"
        if per_point > 1 else "every logged step",
    )  # fmt: skip
    grid = figure.subplots(n_rows, n_columns, squeeze=False)
    for panel, name in zip(grid.flat, names, strict=False):
        colour = COLOURS[1] if name in parts else COLOURS[0]
        can_be_log = name not in ("dead_fraction", "lr")
        draw_curve(panel, columns[axis], columns[name], colour, can_be_log=can_be_log)
        panel.set_title(TITLES.get(name, f"{name} (loss part)"))
        panel.set_ylabel(AXES.get(name, "loss"))
        panel.set_xlabel(label)
        panel.xaxis.set_major_formatter(lambda value, _: plain_count(value))
        panel.xaxis.set_major_locator(_locator(5))
        panel.set_xlim(left=0)
        if name == "dead_fraction":
            panel.set_ylim(0, max(1.05 * float(np.nanmax(columns[name])), 0.01))
    for panel in list(grid.flat)[len(names) :]:
        panel.set_axis_off()
    return figure


def _locator(n: int) -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(n)


def draw_curve(
    panel: Any,
    x: npt.NDArray[np.float64],
    y: npt.NDArray[np.float64],
    colour: str,
    *,
    can_be_log: bool,
) -> None:
    """A line; of many points, the means of stretches and the band of what they contain."""
    known = np.isfinite(x) & np.isfinite(y)
    x, y = x[known], y[known]
    if len(x) > MAX_POINTS:
        stretches = np.array_split(np.arange(len(x)), MAX_POINTS)
        low, high = ([f(y[s]) for s in stretches] for f in (np.min, np.max))
        y_all, x, y = y, *(np.array([v[s].mean() for s in stretches]) for v in (x, y))
        panel.fill_between(x, low, high, color=colour, alpha=0.22, linewidth=0)
    else:
        y_all = y
    panel.plot(x, y, color=colour, marker="o" if len(x) <= 40 else None, markersize=3)
    # A quantity that falls by more than a factor of 20 is unreadable on a linear axis.
    if can_be_log and y_all.min() > 0 and y_all.max() / y_all.min() > 20:
        panel.set_yscale("log")
