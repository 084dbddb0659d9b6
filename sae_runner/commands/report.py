"""`sae-run report`: many runs in one table, one trade-off figure and one self-contained page."""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from sae_runner.commands.job import Job
from sae_runner.config import construct, fingerprint
from sae_runner.errors import ConfigError, InputError
from sae_runner.files import atomic, remove, require_writable, write_json
from sae_runner.log import working
from sae_runner.report.comparison import Comparison, compare
from sae_runner.report.figures import FIGURES, draw_run, figure_sources
from sae_runner.report.heatmap import draw_heatmap
from sae_runner.report.html import page
from sae_runner.report.options import Compared, ProxyOptions, ReportOptions
from sae_runner.report.pareto import draw_pareto
from sae_runner.report.proxy import Correlation, proxy_correlations
from sae_runner.report.runs import choose_metrics, find_runs, load_runs
from sae_runner.report.sections import (
    attribution_section,
    comparisons_json,
    firing_section,
    proxy_section,
    retention_section,
    section_csv,
    similarity_section,
)
from sae_runner.report.table import (
    EXPECTED_HEADS,
    Column,
    Section,
    columns_of,
    csv_text,
    expected_rows,
    fitting,
    markdown,
    plain_text,
    rich_table,
)  # fmt: skip

log = logging.getLogger("sae_runner")
MOST_ROWS = 20
"""Rows of a comparison that are printed; the files have them all."""


def main(job: Job) -> None:
    """Compare the runs; exit 1 at the end if the report of one of them is damaged.

    Raises:
        InputError: there is no sound run, a metric that no evaluator gives, nowhere to write.
    """
    options: ReportOptions = construct(ReportOptions.from_config, job.cfg, where="")
    folders, without = find_runs(options.runs, options.outputs / "train")
    with working("reading reports"):
        runs, damaged = load_runs(folders)
    if not runs:
        raise InputError(f"all {len(damaged)} reports are damaged, the first: {damaged[0]}")
    left_out = [f"left out, damaged: {line}" for line in damaged]
    if without:
        names = ", ".join(path.name for path in without)
        left_out.append(f"left out, {len(without)} without a report.json: {names}")
    for line in left_out:
        log.warning("%s", line)
    metrics = choose_metrics(options.metrics, runs, "metrics")
    for key, name in (("x", options.x), ("y", options.y)):
        choose_metrics([name], runs, key)
    comparison = compare(runs, metrics, options.x, options.y)
    out = options.out or options.outputs / "reports" / fingerprint(sorted(run.name for run in runs))
    require_writable(out, "out" if options.out else "outputs")
    sections = compared(comparison, options)
    show(comparison, sections)
    path = write(comparison, left_out, out, sections, options)
    print(f"\n{path}")
    if damaged:
        sys.exit(1)


def compared(comparison: Comparison, options: ReportOptions) -> list[Section]:
    """What `compare` asks for, without its figure; torch is needed for none but the first three.

    Raises:
        InputError: runs that cannot be compared, a metric that no evaluator gives.
    """
    sections = []
    if "similarity" in options.compare:
        from sae_runner.commands.between import similarities

        found = similarities(comparison, options.similarity)
        sections.append(similarity_section(*found, options.similarity.shared_cosine))
    if "firing" in options.compare:
        from sae_runner.commands.firings import firings

        sections.append(firing_section(*firings(comparison, options.firing)))
    if "attribution" in options.compare:
        from sae_runner.commands.attributions import attributions

        sections.append(attribution_section(*attributions(comparison, options.attribution)))
    if "retention" in options.compare:
        from sae_runner.commands.corpora import retentions

        sections.append(retention_section(*retentions(comparison)))
    if "proxy" in options.compare:
        sections.append(proxies(comparison, options.proxy))
    return sections


def proxies(comparison: Comparison, options: ProxyOptions) -> Section:
    """Rank correlations of the metrics that `proxy.x` and `proxy.y` mean.

    Raises:
        ConfigError: fewer runs than any correlation needs, or no two metrics.
    """
    runs = comparison.runs
    if len(runs) < options.min_runs:
        raise ConfigError(
            f"compare=proxy: needs {options.min_runs} runs or more (proxy.min_runs), {len(runs)} "
            "given"
        )
    xs, ys = (
        comparison.metrics if names is None else choose_metrics(names, runs, f"proxy.{axis}")
        for axis, names in (("x", options.x), ("y", options.y))
    )
    found = proxy_correlations(comparison, xs, ys, options)
    if not found:
        raise ConfigError("compare=proxy: proxy.x and proxy.y name no two metrics")
    notes = []
    if len(comparison.groups) > 1 and options.group_by is None:
        letters = ", ".join(group.letter for group in comparison.groups)
        notes.append(
            f"the runs are of groups {letters}, which are not comparable: differences between "
            "groups are in these correlations; proxy.group_by=group keeps them apart"
        )
    return proxy_section(found, notes)


@working("writing the report")
def write(
    comparison: Comparison,
    left_out: Sequence[str],
    out: Path,
    sections: Sequence[Section],
    options: ReportOptions,
) -> Path:
    """table.csv, report.md, figures/, report.html, whose path is returned, and the comparisons."""
    pareto = draw_pareto(comparison, out / "figures")
    if not pareto:
        log.info("no figure: no run has both %s and %s", comparison.x, comparison.y)
    svg = next((path for path in pareto if path.suffix == ".svg"), None)
    figures = {i: figures_of(run.path) for i, run in enumerate(comparison.runs)}
    sections = [illustrated(section, out / "figures") for section in sections]
    texts = {
        "table.csv": csv_text(comparison),
        **{f"{section.name}.csv": section_csv(section) for section in sections},
        "report.md": markdown(
            comparison, left_out, "figures/pareto.png" if pareto else None, sections
        ),
        "report.html": page(comparison, left_out, svg, figures, sections),
    }
    for name, text in texts.items():
        with atomic(out / name) as temporary:
            temporary.write_bytes(text.encode())
    if sections:
        # `retention` has no options.
        asked = {n: o._asdict() for n in options.compare if (o := getattr(options, n, None))}
        write_json(out / "comparisons.json", comparisons_json(sections, asked))
    for name in [f"{known}.csv" for known in get_args(Compared) if known not in options.compare]:
        remove(out / name)  # Of an earlier command, which asked for more.
    if not sections:
        remove(out / "comparisons.json")
    return out / "report.html"


def illustrated(section: Section, folder: Path) -> Section:
    """A section with its figure, where there is one to draw."""
    if section.name != "proxy":
        return section
    drawn = draw_heatmap([Correlation(**record) for record in section.records], folder)
    return section._replace(figure=next((p for p in drawn if p.suffix == ".svg"), None))


def figures_of(run_dir: Path) -> list[Path]:
    """The SVG figures of a run, drawn again if what they show has changed since."""
    changed = max((path.stat().st_mtime_ns for path in figure_sources(run_dir)), default=0)
    files = [run_dir / "figures" / f"{name}.svg" for name in FIGURES]
    drawn = [path for path in files if path.is_file()]
    if not drawn or min(path.stat().st_mtime_ns for path in drawn) < changed:
        try:
            drawn = [path for path in draw_run(run_dir) if path.suffix == ".svg"]
        # A series of another shape, a folder of someone else's: the numbers are shown all the same.
        except (OSError, LookupError, TypeError, ValueError) as error:
            log.warning("no figures of %s: %s", run_dir, " ".join(repr(error).split()))
            return []
    return drawn


def show(comparison: Comparison, sections: Sequence[Section] = ()) -> None:
    """Print the table, what to know before comparing, published numbers and comparisons."""
    columns = columns_of(comparison)
    judged = expected_rows(comparison)
    verdicts = [
        Column(head, head, [row[i] for row in judged], "run")
        for i, head in enumerate(EXPECTED_HEADS)
    ]
    for table in [columns, verdicts] if judged else [columns]:
        print_table(table, "table.csv")
    if comparison.axes:
        print(comparison.axes)
    for line in comparison.remarks:
        print(f"! {line}")
    for section in sections:
        print(f"\n{section.title}")
        if section.rows:
            heads = zip(section.heads, zip(*section.rows[:MOST_ROWS], strict=True), strict=True)
            columns = [Column(head, head, list(cells), "run") for head, cells in heads]
            print_table(columns, f"{section.name}.csv")
        if (more := len(section.rows) - MOST_ROWS) > 0:
            print(f"{more} more rows: see the page, or {section.name}.csv")
        for line in section.notes:
            print(f"! {line}")


def print_table(table: Sequence[Column], file: str) -> None:
    """For a terminal what it has room for, in colour; all of it for a pipe."""
    if not sys.stdout.isatty():
        print(plain_text(table))
        return print()
    from rich.console import Console

    console = Console()
    kept, dropped = fitting(table, console.width)
    console.print(rich_table(kept))
    if dropped:
        print(f"no room here for {', '.join(dropped)}: see the page, or {file}")
