"""The comparison as one HTML file that needs nothing besides itself, not even a network."""

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from sae_runner.report.comparison import ABSENT, Comparison
from sae_runner.report.runs import Run, flat
from sae_runner.report.table import (
    EXPECTED_HEADS,
    MISSING,
    Column,
    Section,
    columns_of,
    expected_rows,
    is_text,
    show_value,
)  # fmt: skip

# Nothing may be fetched, whatever a name in a report says.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"

HEADERS = {
    "Run": "run", "Versions": "versions", "Code": "git", "Fingerprints": "fingerprints",
    "Training": "training", "Choices": "choices", "Cost": "cost",
}  # fmt: skip


def page(
    comparison: Comparison,
    left_out: Sequence[str],
    pareto: Path | None,
    figures: Mapping[int, Sequence[Path]],
    compared: Sequence[Section] = (),
) -> str:
    """The whole page; `figures` are SVG files of the runs by their place in the comparison."""
    remarks = [*comparison.remarks, *left_out]
    judged = expected_rows(comparison)
    image = embedded(pareto, f"{comparison.y} against {comparison.x}") if pareto else ""
    sections = {
        "Summary": summary_table(comparison),
        "Read before comparing": listing(remarks, "remarks") if remarks else "",
        "Trade-off": image,
        "Published against measured": verdict_table(judged) if judged else "",
        **{section.title: compared_section(section) for section in compared},
        "Config": config_section(comparison),
        "Runs": "".join(
            run_section(run, i, figures.get(i, [])) for i, run in enumerate(comparison.runs)
        ),
    }
    shown = {title: body for title, body in sections.items() if body}
    links = "".join(f'<a href="#{anchor(title)}">{title}</a>' for title in shown)
    bodies = "".join(
        f'<section id="{anchor(title)}"><h2>{title}</h2>{body}</section>\n'
        for title, body in shown.items()
    )
    here = Path(__file__).parent
    n = len(comparison.runs)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{n} SAE run{'s' * (n != 1)} compared</title>\n"
        f"<style>\n{(here / 'page.css').read_text('utf-8')}</style></head>\n<body>\n"
        f"<h1>{n} SAE run{'s' * (n != 1)} compared</h1><nav>{links}</nav>\n{bodies}"
        f"<script>\n{(here / 'page.js').read_text('utf-8')}</script>\n</body></html>\n"
    )


def anchor(title: str) -> str:
    """A section's id."""
    return title.lower().replace(" ", "-")


def embedded(path: Path, alt: str) -> str:
    """A figure inside the page; as an image, so that its ids are its own and it runs nothing."""
    kind = "svg+xml" if path.suffix == ".svg" else "png"
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{escape(alt)}" src="data:image/{kind};base64,{data}">'


def listing(lines: Iterable[str], css: str = "") -> str:
    """A bullet list of plain text."""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f'<div class="{css}"><ul>{items}</ul></div>'


def summary_table(comparison: Comparison) -> str:
    """One row per run, sortable by the full values."""
    columns = columns_of(comparison)
    heads = "".join(
        f'<th scope="col"{_number_class(c)} title="{escape(c.name)}">'
        f'<button type="button">{escape(c.short)}</button></th>'
        for c in columns
    )
    rows = []
    for i, run in enumerate(comparison.runs):
        cells = "".join(_summary_cell(column, i, run) for column in columns)
        rows.append(f"<tr>{cells}</tr>\n")
    hint = (
        "Click a head to sort; its tooltip has the full name. ± is half the 95% interval. "
        f"{MISSING}: not measured, or no such key; a metric that is null could not be computed."
        + (f" What they measure: {comparison.axes}." if comparison.axes else "")
    )
    return (
        f'<div class="wide"><table class="sortable"><thead><tr>{heads}</tr></thead>\n'
        f'<tbody>{"".join(rows)}</tbody></table></div><p class="soft">{escape(hint)}</p>'
    )


def _number_class(column: Column) -> str:
    return "" if is_text(column) else ' class="number"'


def _summary_cell(column: Column, i: int, run: Run) -> str:
    text = column.cells[i]
    value: Any = run.metrics.get(column.name) if column.kind == "metric" else text
    value = "" if value is None or value == MISSING else value
    title = ""
    if interval := run.ci.get(column.name) if column.kind == "metric" else None:
        bounds = f"95% [{interval['lo']:.6g}, {interval['hi']:.6g}], n = {interval['n']:,}"
        title = f' title="{value} {bounds}"'
    shown = escape(text)
    if column.name == "run":
        return f'<td class="name" data-value="{shown}"><a href="#run-{i + 1}">{shown}</a></td>'
    return f'<td{_number_class(column)} data-value="{escape(str(value))}"{title}>{shown}</td>'


def verdict_table(rows: Sequence[Sequence[str]]) -> str:
    """Published against measured numbers, the verdict in colour and words."""
    body = "".join(
        "<tr>"
        + "".join(
            f'<td class="{cell.replace(" ", "-")}">{escape(cell)}</td>'
            if head == "verdict"
            else f"<td>{escape(cell)}</td>"
            for head, cell in zip(EXPECTED_HEADS, row, strict=True)
        )
        + "</tr>\n"
        for row in rows
    )
    return plain_table(EXPECTED_HEADS, body)


def compared_section(section: Section) -> str:
    """A comparison of runs or metrics: what it is, its figure, its table, what to know of it."""
    text = f'<p class="soft">{escape(section.about)}</p>'
    if section.figure:
        text += embedded(section.figure, section.title)
    if section.rows:
        body = "".join(
            "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>\n"
            for row in section.rows
        )
        text += plain_table(section.heads, body)
    return text + (listing(section.notes) if section.notes else "")


def plain_table(heads: Sequence[str], body: str) -> str:
    """A table around rows that are already HTML."""
    head = "".join(f'<th scope="col">{escape(h)}</th>' for h in heads)
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def config_section(comparison: Comparison) -> str:
    """Differing keys, one column per run; those that change no number; those all runs share."""
    found = comparison.differences
    heads = ["key", *(f"#{i + 1}" for i in range(len(comparison.runs)))]

    def rows(keys: Mapping[str, Sequence[Any]]) -> str:
        return "".join(
            f"<tr><td>{escape(key)}</td>"
            + "".join(
                f"<td>{escape(MISSING if v is ABSENT else show_value(v))}</td>" for v in values
            )
            + "</tr>\n"
            for key, values in keys.items()
        )

    text = (
        plain_table(heads, rows(found.differing)) if found.differing else "<p>No key differs.</p>"
    )
    others = {
        "Measured differently": found.measuring,
        "Different, but without effect on results": found.runtime,
    }
    for title, keys in others.items():
        if keys:
            text += f"<h3>{title}</h3>{plain_table(heads, rows(keys))}"
    return text + f"<details><summary>Same in all</summary>{definitions(found.same)}</details>"


def definitions(values: Mapping[str, Any]) -> str:
    """Keys and values as a definition list; nested ones by dotted keys."""
    items = (
        f"<dt>{escape(str(key))}</dt><dd>{escape(show_value(value))}</dd>"
        for key, value in flat(values).items()
    )
    return f"<dl>{''.join(items)}</dl>"


def run_section(run: Run, i: int, figures: Sequence[Path]) -> str:
    """One run: its figures, its header, what its evaluators noted, every metric."""
    report = run.report
    images = "".join(embedded(path, f"{path.stem} of {run.name}") for path in figures)
    text = f'<div class="figures">{images}</div>' if images else ""
    if warnings := report["warnings"]:
        text += "<h3>Warnings</h3>" + listing(map(str, warnings), "remarks")
    if notes := notes_of(run):
        text += "<h3>Notes of the evaluators</h3>" + listing(notes)
    text += "<details><summary>Every metric</summary>" + _all_metrics(run) + "</details>"
    header = (
        f"<dl><dt>path</dt><dd>{escape(str(run.path))}</dd><dt>seed</dt><dd>{report['seed']}</dd>"
    )
    header += f"<dt>overrides</dt><dd>{escape(' '.join(map(str, report['overrides'])))}</dd></dl>"
    for title, key in HEADERS.items():
        if report[key]:
            header += f"<h3>{title}</h3>{definitions(report[key])}"
    text += (
        f"<details><summary>Header: versions, code, seed, fingerprints</summary>{header}</details>"
    )
    text += f"<details><summary>Config</summary>{definitions(report['config'])}</details>"
    title = f"#{i + 1} {escape(run.name)}"
    opened = " open" if i == 0 else ""
    return f'<details id="run-{i + 1}"{opened}><summary>{title}</summary>{text}</details>\n'


def notes_of(run: Run) -> list[str]:
    """What the evaluators noted: a line for each reason, however many metrics it is noted of."""
    noted: dict[tuple[str, str], list[str]] = {}
    for name, envelope in run.evaluators.items():
        for note in envelope["notes"]:
            reason = f"{note['code']}: {note['detail']}"
            noted.setdefault((name, reason), []).append(note["metric"])
    return [
        f"{name}: {metrics[0]}{f' and {n} more' if (n := len(metrics) - 1) else ''}: {reason}"
        for (name, reason), metrics in noted.items()
    ]


def _all_metrics(run: Run) -> str:
    rows = []
    for name, value in run.metrics.items():
        interval = run.ci.get(name)
        bounds = f"[{interval['lo']:.6g}, {interval['hi']:.6g}]" if interval else ""
        shown = "null" if value is None else repr(value)
        rows.append(
            f'<tr><td>{escape(name)}</td><td class="number">{shown}</td>'
            f'<td class="number">{bounds}</td></tr>\n'
        )
    return plain_table(["metric", "value", "95% interval"], "".join(rows))
