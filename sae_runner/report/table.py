"""The comparison as a table: one row per run, for a terminal, a pipe, a spreadsheet, Markdown."""

import csv
import io
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sae_runner.report.comparison import ABSENT, Comparison
from sae_runner.report.expected import interval

MISSING = "—"
"""Not measured, or no key of this config. What could not be computed is `null`."""

KEPT = {"config": 3, "metric": 2}
MAX_CELL = 24
SEPARATOR = 2
"""Width of what stands between two columns of a terminal's table."""


class Section(NamedTuple):
    """One comparison as report.md, the page, the terminal and a CSV file show it."""

    name: str
    """`similarity`, `firing`, `proxy`: the CSV's name and its key in comparisons.json."""
    title: str
    about: str
    """What the columns mean."""
    heads: list[str]
    rows: list[list[str]]
    notes: list[str]
    records: list[dict[str, Any]]
    """All that was found, for JSON and CSV: every digit."""
    figure: Path | None = None
    """SVG; a PNG of the same name is beside it."""


class Column(NamedTuple):
    """One column of the table."""

    name: str
    """In full: a dotted config key or a `category.metric`."""
    short: str
    """For a terminal: without what the others do not need to be told apart from it."""
    cells: list[str]
    kind: str
    """`run`, `config` or `metric`."""


def columns_of(comparison: Comparison) -> list[Column]:
    """Number, run, group if there are several, differing config keys, then the metrics."""
    runs, keys = comparison.runs, list(comparison.telling)
    columns = [
        Column("#", "#", [str(i + 1) for i in range(len(runs))], "run"),
        Column("run", "run", [run.name for run in runs], "run"),
    ]
    if len(comparison.groups) > 1:
        letters = [comparison.group_of(i).letter for i in range(len(runs))]
        columns.append(Column("group", "group", letters, "run"))
    short = short_names([*keys, *comparison.metrics])
    for key, values in comparison.telling.items():
        columns.append(Column(key, short[key], [show_value(v) for v in values], "config"))
    for name in comparison.metrics:
        cells = [
            show_metric(run.metrics[name], run.ci.get(name)) if name in run.metrics else MISSING
            for run in runs
        ]
        columns.append(Column(name, short[name], cells, "metric"))
    return columns


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Each dotted name by its last part, where that is enough to tell it from the others."""
    last = [name.rsplit(".", 1)[-1] for name in names]
    return {
        name: part if last.count(part) == 1 else name
        for name, part in zip(names, last, strict=True)
    }


def show_value(value: Any) -> str:
    """A config value as YAML users type it."""
    if value is ABSENT:
        return MISSING
    return value if isinstance(value, str) else json.dumps(value, default=str)


def show_metric(value: float | int | None, ci: dict[str, float | int] | None = None) -> str:
    """`0.8612 ±0.0031`: a value to the digits its 95% interval leaves it, or to four.

    ± is half the width of the interval. One that is lopsided, or does not hold the value, is
    written out: `0.861 [0.84, 0.87]`.
    """
    if value is None:
        return "null"
    half = (ci["hi"] - ci["lo"]) / 2 if ci else 0.0
    if ci is None or half <= 0:
        return show_number(value) + (" ±0" if ci else "")
    # Of the half as it will be shown: 0.0996 is 0.10 and leaves two decimals, not three.
    decimals = max(0, 1 - math.floor(math.log10(float(f"{half:.1e}"))))
    if decimals > 6:  # Fixed notation would be mostly zeros.
        numbers = [f"{v:.3g}" for v in (value, ci["lo"], ci["hi"], half)]
    else:
        numbers = [f"{v:,.{decimals}f}" for v in (value, ci["lo"], ci["hi"], half)]
    arms = value - ci["lo"], ci["hi"] - value
    if min(arms) < 0 or max(arms) > 1.5 * min(arms):
        return f"{numbers[0]} [{numbers[1]}, {numbers[2]}]"
    return f"{numbers[0]} ±{numbers[3]}"


def show_number(value: float | int) -> str:
    """Four digits of a fraction, all digits of a whole number."""
    if isinstance(value, int) or (value.is_integer() and abs(value) < 1e15):
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


def plain_text(columns: Sequence[Column]) -> str:
    """Columns aligned by spaces; words to the left, numbers to the right."""
    lines = zip(*[aligned(column) for column in columns], strict=True)
    return "\n".join("  ".join(line).rstrip() for line in lines)


def aligned(column: Column) -> list[str]:
    """The head and the cells of a column, padded to one width."""
    width = max(len(cell) for cell in [column.short, *column.cells])
    pad = str.ljust if is_text(column) else str.rjust
    return [pad(cell, width) for cell in [column.short, *column.cells]]


def is_text(column: Column) -> bool:
    """Whether a column holds words rather than numbers."""
    return column.name == "run" or (column.kind != "metric" and not all(map(_number, column.cells)))


def _number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return cell in (MISSING, "null")
    return True


def fitting(columns: Sequence[Column], width: int) -> tuple[list[Column], list[str]]:
    """The columns that a terminal has room for, and the names of those left out.

    Of a long config value the end is shown, where paths differ. The first config keys and metrics
    (KEPT) stay longest: they tell the runs apart, and how good they are.
    """
    columns = [c._replace(cells=[*map(shortened, c.cells)]) if c.kind == "config" else c
               for c in columns]  # fmt: skip
    of_kind = {kind: [c for c in columns if c.kind == kind] for kind in KEPT}
    expendable = [c for kind, n in KEPT.items() for c in reversed(of_kind[kind][n:])]
    expendable += reversed(of_kind["config"][: KEPT["config"]])
    kept = list(columns)
    dropped: list[Column] = []
    room = {id(c): max(map(len, [c.short, *c.cells])) + SEPARATOR for c in columns}
    for column in expendable:
        if sum(room[id(c)] for c in kept) <= width:
            break
        kept.remove(column)
        dropped.append(column)
    return kept, [column.name for column in columns if column in dropped]


def shortened(cell: str) -> str:
    """The last MAX_CELL characters of a longer cell."""
    return cell if len(cell) <= MAX_CELL else f"…{cell[1 - MAX_CELL :]}"


def rich_table(columns: Sequence[Column]) -> Any:
    """The same for a terminal, with colours."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        box=box.SIMPLE_HEAD, header_style="bold", padding=(0, SEPARATOR - 1, 0, 0), show_edge=False
    )
    styles = {"run": "", "config": "cyan", "metric": ""}
    for column in columns:
        justify: Any = "left" if is_text(column) else "right"
        # Text, not str: a name in square brackets is no markup.
        head = Text(column.short)
        table.add_column(head, justify=justify, style=styles[column.kind], overflow="fold")
    for row in zip(*[column.cells for column in columns], strict=True):
        table.add_row(*map(Text, row))
    return table


def csv_text(comparison: Comparison) -> str:
    """Every digit: config keys, metrics, and `.se .lo .hi .n` of those that have an interval.

    A cell is empty where nothing was measured, and `null` where nothing could be computed.
    """
    runs, keys = comparison.runs, comparison.differences.differing
    parts = {
        name: [p for p in ("se", "lo", "hi", "n") if any(name in run.ci for run in runs)]
        for name in comparison.metrics
    }
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    heads = [head for m in comparison.metrics for head in (m, *(f"{m}.{p}" for p in parts[m]))]
    writer.writerow(["run", "path", "group", *keys, *heads])
    for i, run in enumerate(runs):
        row: list[Any] = [run.name, run.path, comparison.group_of(i).letter]
        for values in keys.values():
            row.append("" if values[i] is ABSENT else show_value(values[i]))
        for name in comparison.metrics:
            value = run.metrics.get(name)
            row.append("null" if name in run.metrics and value is None else value)
            row += [run.ci.get(name, {}).get(part) for part in parts[name]]
        writer.writerow(row)
    return buffer.getvalue()


def escaped(text: str) -> str:
    """Text on one line in which Markdown finds no markup."""
    return re.sub(r"([\\|`*_<\[])", r"\\\1", " ".join(str(text).split()))


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A pipe table."""
    lines = [[escaped(cell) for cell in line] for line in (heads, *rows)]
    lines.insert(1, ["---"] * len(heads))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def markdown(
    comparison: Comparison,
    left_out: Sequence[str],
    figure: str | None,
    sections: Sequence[Section] = (),
) -> str:
    """report.md: table, remarks, published numbers, comparisons, config keys, the Pareto figure."""
    columns = columns_of(comparison)
    rows = list(zip(*[column.cells for column in columns], strict=True))
    text = ["# Comparison of SAE runs", markdown_table([c.name for c in columns], rows)]
    text.append(
        f"± is half the 95% interval. {MISSING}: not measured, or no such key; "
        "a metric that is null could not be computed."
        + (f" What they measure: {comparison.axes}." if comparison.axes else "")
    )
    if remarks := [*comparison.remarks, *left_out]:
        text += ["## Read before comparing", "\n".join(f"- {escaped(line)}" for line in remarks)]
    if judged := expected_rows(comparison):
        text += ["## Published against measured", markdown_table(EXPECTED_HEADS, judged)]
    if figure:
        text += ["## Trade-off", f"![{comparison.y} against {comparison.x}]({figure})"]
    for section in sections:
        text += [f"## {section.title}", escaped(section.about)]
        if section.figure:
            text.append(f"![{section.title}](figures/{section.figure.stem}.png)")
        if section.rows:
            text.append(markdown_table(section.heads, section.rows))
        if section.notes:
            text.append("\n".join(f"- {escaped(note)}" for note in section.notes))
    shown = comparison.telling
    others = {
        "Differs with the kind of SAE": [
            k for k in comparison.differences.differing if k not in shown
        ],
        "Measured differently": list(comparison.differences.measuring),
        "Different, but without effect on results": list(comparison.differences.runtime),
    }
    for title, keys in others.items():
        if keys:
            text += [f"## {title}", ", ".join(f"`{key}`" for key in keys)]
    same = [[key, show_value(value)] for key, value in comparison.differences.same.items()]
    text += ["## Same in all runs", markdown_table(["key", "value"], same)]
    return "\n\n".join(text) + "\n"


EXPECTED_HEADS = ["#", "metric", "verdict", "measured", "published", "range", "source", "why"]


def expected_rows(comparison: Comparison) -> list[list[str]]:
    """One row for each published number of each run, under EXPECTED_HEADS."""
    rows = []
    for i, run in enumerate(comparison.runs):
        for entry in run.verdicts:
            unit = f" {entry['unit']}" if entry["unit"] else ""
            measured, value = entry["measured"], entry["value"]
            rows.append([
                str(i + 1), entry["metric"], entry["verdict"],
                MISSING if measured is None else show_metric(measured, run.ci.get(entry["metric"])),
                MISSING if value is None else f"{show_number(value)}{unit}",
                interval(entry["low"], entry["high"]), entry["source"] or "", entry["why"] or "",
            ])  # fmt: skip
    return rows
