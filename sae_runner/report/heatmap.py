"""Rank correlations of metrics as a grid of colours and numbers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sae_runner.report.proxy import Correlation
from sae_runner.report.style import DARK, GREY, house_style, new_figure, save

MOST = 32
"""Metrics along one side; more could not be read."""
MOST_GROUPS = 6
NEGATIVE, POSITIVE = np.array([0.84, 0.37, 0.0]), np.array([0.0, 0.45, 0.70])
FAINT = 0.22
"""How much of its colour a cell keeps whose interval holds 0."""


def draw_heatmap(found: Sequence[Correlation], folder: Path) -> list[Path]:
    """`proxy.png` and `proxy.svg`, or nothing if no correlation could be computed."""
    if all(c.rho is None for c in found):
        return []
    with house_style():
        return save(heatmap_figure(found), folder, "proxy")


def heatmap_figure(found: Sequence[Correlation]) -> Any:
    """A panel for each group that has a correlation; cells whose interval holds 0 are faint."""
    groups = list(dict.fromkeys(c.group for c in found if c.rho is not None))[:MOST_GROUPS]
    with_any = [c for c in found if c.rho is not None and c.group in groups]
    # A metric that is constant, or that too few runs have, would be an empty row.
    xs, ys = (
        [name for name in in_order(found, axis) if name in kept][:MOST]
        for axis in ("x", "y")
        for kept in [{getattr(c, axis) for c in with_any}]
    )
    labels = max(map(len, ys)) * 0.075
    width, height = labels + 0.56 * len(xs) + 1.0, 0.36 * len(ys)
    below = max(map(len, xs)) * 0.06 + 0.4
    figure = new_figure(
        max(width, 6.0), 1.0 + len(groups) * (height + below + 0.3),
        "Which metric goes with which",
        "Spearman rank correlation over runs; faint: its 95% interval holds 0, or it has none",
    )  # fmt: skip
    panels = np.atleast_1d(figure.subplots(len(groups), 1))
    for panel, group in zip(panels, groups, strict=True):
        cells = {(c.x, c.y): c for c in with_any if c.group == group}
        _draw_cells(panel, xs, ys, cells)
        n = sorted({c.n for c in cells.values()})
        runs = f"{n[0]}" if len(n) == 1 else f"{n[0]} to {n[-1]}"
        panel.set_title(f"{group} ({runs})")
        panel.set_xticks(range(len(xs)), xs, rotation=45, ha="right")
        panel.set_yticks(range(len(ys)), ys)
    return figure


def _draw_cells(
    panel: Any, xs: Sequence[str], ys: Sequence[str], cells: dict[tuple[str, str], Correlation]
) -> None:
    colours = np.ones((len(ys), len(xs), 3))
    for j, y in enumerate(ys):
        for i, x in enumerate(xs):
            cell = cells.get((x, y))
            if cell is None or cell.rho is None:
                panel.text(i, j, "" if x == y else "—", ha="center", va="center", color=GREY)
                continue
            colours[j, i] = colour(cell)
            dark = cell.is_firm and abs(cell.rho) > 0.6
            panel.text(
                i, j, f"{cell.rho:+.2f}".replace("-", "−"), ha="center", va="center",
                fontsize=7.5 if cell.is_firm else 6.5, fontweight="bold" if cell.is_firm else None,
                color="white" if dark else DARK if cell.is_firm else GREY,
            )  # fmt: skip
    panel.imshow(colours, aspect="auto")
    panel.grid(visible=False)
    panel.set_xticks(np.arange(len(xs) - 1) + 0.5, minor=True)
    panel.set_yticks(np.arange(len(ys) - 1) + 0.5, minor=True)
    panel.grid(visible=True, which="minor", color="white", linewidth=1.5)
    panel.tick_params(which="minor", length=0)


def colour(cell: Correlation) -> Any:
    """White at 0; the deeper, the stronger; blue for a positive ρ, orange for a negative one."""
    rho = cell.rho or 0.0
    depth = abs(rho) * (1.0 if cell.is_firm else FAINT)
    return 1 - depth * (1 - (POSITIVE if rho > 0 else NEGATIVE))


def in_order(found: Sequence[Correlation], axis: str) -> list[str]:
    """The metrics of a side. Those on both come in one order: no metric meets itself, so that the
    first of y would be the last of x."""
    xs, ys = dict.fromkeys(c.x for c in found), dict.fromkeys(c.y for c in found)
    if axis == "y":
        return list(ys)
    return [*(name for name in ys if name in xs), *(name for name in xs if name not in ys)]
