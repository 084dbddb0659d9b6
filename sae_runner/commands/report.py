"""`sae-run report`: many runs in one table, one trade-off figure and one self-contained page."""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from sae_runner.commands.job import Job
from sae_runner.config import Name, construct, fingerprint
from sae_runner.errors import InputError
from sae_runner.files import atomic, require_writable
from sae_runner.log import working
from sae_runner.report.comparison import Comparison, compare
from sae_runner.report.figures import FIGURES, draw_run, figure_sources
from sae_runner.report.html import page
from sae_runner.report.pareto import draw_pareto
from sae_runner.report.runs import choose_metrics, find_runs, load_runs
from sae_runner.report.table import (
    EXPECTED_HEADS,
    Column,
    columns_of,
    csv_text,
    expected_rows,
    fitting,
    markdown,
    plain_text,
    rich_table,
)  # fmt: skip

log = logging.getLogger("sae_runner")


class ReportOptions(NamedTuple):
    """What configs/report.yaml sets."""

    outputs: Path
    runs: list[str]
    out: Path | None
    x: str
    y: str
    metrics: list[str]

    @classmethod
    def from_config(
        cls, *, outputs: Name, runs: list[str] | str, out: str | None, x: str, y: str,
        metrics: list[str] | str,
    ) -> "ReportOptions":  # fmt: skip
        """Typed; a lone run or metric need not be a list."""
        return cls(
            Path(outputs).expanduser(), [runs] if isinstance(runs, str) else runs,
            Path(out).expanduser() if out else None, x, y,
            [metrics] if isinstance(metrics, str) else metrics,
        )  # fmt: skip


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
    show(comparison)
    path = write(comparison, left_out, out)
    print(f"\n{path}")
    if damaged:
        sys.exit(1)


@working("writing the report")
def write(comparison: Comparison, left_out: Sequence[str], out: Path) -> Path:
    """table.csv, report.md, figures/pareto.* and report.html, whose path is returned."""
    pareto = draw_pareto(comparison, out / "figures")
    if not pareto:
        log.info("no figure: no run has both %s and %s", comparison.x, comparison.y)
    svg = next((path for path in pareto if path.suffix == ".svg"), None)
    figures = {i: figures_of(run.path) for i, run in enumerate(comparison.runs)}
    texts = {
        "table.csv": csv_text(comparison),
        "report.md": markdown(comparison, left_out, "figures/pareto.png" if pareto else None),
        "report.html": page(comparison, left_out, svg, figures),
    }
    for name, text in texts.items():
        with atomic(out / name) as temporary:
            temporary.write_bytes(text.encode())
    return out / "report.html"


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


def show(comparison: Comparison) -> None:
    """Print the table, what to know before comparing, and published against measured numbers."""
    columns = columns_of(comparison)
    judged = expected_rows(comparison)
    verdicts = [
        Column(head, head, [row[i] for row in judged], "run")
        for i, head in enumerate(EXPECTED_HEADS)
    ]
    for table in [columns, verdicts] if judged else [columns]:
        if sys.stdout.isatty():
            from rich.console import Console

            console = Console()
            kept, dropped = fitting(table, console.width)
            console.print(rich_table(kept))
            if dropped:
                print(f"no room here for {', '.join(dropped)}: see the page, or table.csv")
        else:
            print(plain_text(table))
            print()
    for line in comparison.remarks:
        print(f"! {line}")
