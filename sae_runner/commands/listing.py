"""Small tables on standard output: with lines on a terminal, plain and whole in a pipe."""

import sys
from collections.abc import Collection, Mapping, Sequence

from sae_runner.report.table import Column, plain_text, rich_table


def show_table(columns: Mapping[str, Sequence[str]], *, right: Collection[str] = ()) -> None:
    """Print columns by their heads; those in `right` are aligned to the right."""
    table = []
    for head, cells in columns.items():
        name, kind = (head, "metric") if head in right else ("run", "run")
        table.append(Column(name, head, list(cells), kind))
    if not sys.stdout.isatty():
        print(plain_text(table))
        return
    from rich.console import Console

    lined = rich_table(table)
    lined.columns[0].no_wrap = True  # Names and paths can be copied whole.
    Console().print(lined)
