"""How figures look and how they become files: one style, no global state, the same bytes again."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sae_runner.files import atomic

# Okabe & Ito (2008): told apart with every common form of colour blindness, and in print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_SHADES = ((0.0, 1.0), (0.0, 0.55), (0.55, 0.45))
"""Light added and share of the colour kept, in each round through COLOURS."""


def colour_of(n: int) -> str:
    """The n-th colour: darker shades when the palette is used up, then lighter ones."""
    colour = COLOURS[n % len(COLOURS)]
    light, kept = _SHADES[n // len(COLOURS) % len(_SHADES)]
    if light == 0.0 and kept < 1 and colour == "#000000":
        light = 0.45  # No darker than black.
    parts = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(255 * light + kept * part):02X}" for part in parts)


MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY, DARK = "#8A8A8A", "#222222"

STYLE: dict[str, Any] = {
    "figure.dpi": 110, "savefig.dpi": 160, "figure.facecolor": "white", "font.size": 9.0,
    "axes.titlesize": 9.5, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.labelsize": 8.5, "axes.spines.top": False, "axes.spines.right": False,
    "axes.edgecolor": GREY, "axes.grid": True, "axes.axisbelow": True, "grid.color": "#E4E4E4",
    "grid.linewidth": 0.7, "xtick.labelsize": 8.0, "ytick.labelsize": 8.0, "xtick.color": DARK,
    "ytick.color": DARK, "legend.frameon": False, "legend.fontsize": 8.0, "lines.linewidth": 1.6,
    "svg.fonttype": "none", "svg.hashsalt": "sae-run", "font.family": ["DejaVu Sans"],
    "axes.formatter.useoffset": False, "axes.unicode_minus": True,
}  # fmt: skip


@contextmanager
def house_style() -> Iterator[None]:
    """Figures made and saved inside have the project's look, whatever matplotlibrc says."""
    import matplotlib
    import matplotlib.style

    with matplotlib.rc_context(), matplotlib.style.context(["default", STYLE]):
        yield


def new_figure(width: float, height: float, title: str, subtitle: str = "") -> Any:
    """An empty figure (inches) under a title; `house_style` must be on."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    title, subtitle = (text.replace("$", r"\$") for text in (title, subtitle))  # No formulas here.
    # Constrained layout makes room for the title only: a second, empty line keeps the subtitle's.
    lines = f"{title}\n" if subtitle else title
    figure.suptitle(lines, x=0.01, ha="left", fontsize=11, fontweight="bold", linespacing=1.6)
    if subtitle:
        figure.text(0.01, 1 - 0.28 / height, subtitle, fontsize=8.5, color="#555555", va="top")
    return figure


def save(figure: Any, folder: Path, name: str) -> list[Path]:
    """Write a figure as PNG and SVG, without time or version in them."""
    paths = []
    for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, metadata=metadata)
        # Where an SVG's reader lacks the font, another without serifs is better than its default.
        data = buffer.getvalue().replace(b"'DejaVu Sans'", b"'DejaVu Sans', Verdana, sans-serif")
        with atomic(path := folder / f"{name}.{kind}") as temporary:
            temporary.write_bytes(data)
        paths.append(path)
    return paths


def plain_count(value: float) -> str:
    """`2.6M`, `24k`, `512`: a count as an axis shows it."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:g}"
