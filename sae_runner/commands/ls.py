"""`sae-run ls`: what is below `outputs/`: size, age, state, what it needs and what needs it."""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from sae_runner import files
from sae_runner.commands.entries import Entry
from sae_runner.commands.inventory import Related, relations, take_inventory
from sae_runner.commands.job import Job
from sae_runner.commands.listing import show_table
from sae_runner.commands.words import restricted
from sae_runner.config import Name, convert
from sae_runner.errors import InputError

NOTHING = "–"


def main(job: Job) -> None:
    """Print one table for each kind of thing, then the total.

    Raises:
        InputError: no such folder, or a word that matches nothing.
    """
    outputs = Path(convert(job.cfg["outputs"], Name, "outputs")).expanduser()
    words = convert(job.cfg["runs"], list[str], "runs")
    if not outputs.is_dir() and any(word.startswith("outputs=") for word in job.overrides):
        raise InputError(f"outputs={outputs}: there is no such folder")
    inventory = take_inventory(outputs)
    shown = restricted(words, inventory, outputs) if words else inventory
    if not shown:
        return print(f"nothing in {outputs} yet")
    needs, users = relations(inventory)
    for title, entries in sections(shown).items():
        show_section(title, entries, needs, users)
    inside = {entry.path for entry in shown}
    total = sum(entry.n_bytes for entry in shown if entry.path.parent not in inside)
    print(f"{files.size(total)} in all; {files.size(files.free_bytes(outputs))} free")


def sections(entries: Sequence[Entry]) -> dict[str, list[Entry]]:
    """Stores first, then runs by kind, models, data, products, and what killed processes left."""
    runs = sorted({e.kind for e in entries if e.is_run})
    kinds = {
        "stores": ("store", "selection"),
        **{f"runs: {kind}" if kind != "train" else "runs": (kind,) for kind in runs},
        "models": ("model",), "data": ("data",), "reports": ("report",), "exports": ("export",),
        "sweeps": ("sweeps",), "left over": ("leftover",),
    }  # fmt: skip
    found = {title: [e for e in entries if e.kind in wanted] for title, wanted in kinds.items()}
    return {title: group for title, group in found.items() if group}


def show_section(title: str, entries: Sequence[Entry], needs: Related, users: Related) -> None:
    """One table, under its name."""
    columns = {
        title: [shown_path(entry.path) for entry in entries],
        "state": [entry.state for entry in entries],
        "holds": [entry.holds or NOTHING for entry in entries],
        "size": [files.size(entry.n_bytes) for entry in entries],
        "age": [age(entry) for entry in entries],
        "needs": [names(needs[entry.path]) for entry in entries],
        "used by": [names(users[entry.path]) for entry in entries],
    }
    constant = {head for head in ("needs", "used by", "holds") if set(columns[head]) == {NOTHING}}
    show_table({k: v for k, v in columns.items() if k not in constant}, right=("size", "age"))
    print()


def shown_path(path: Path) -> str:
    """Relative to where we are, if it lies below: what other commands take."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def names(entries: Sequence[Entry], limit: int = 3) -> str:
    """Some names and how many more there are."""
    found = [entry.name for entry in entries]
    more = f" and {len(found) - limit} more" if len(found) > limit else ""
    # In a pipe nothing is cut short: the reader may be a program.
    return (", ".join(found[:limit]) + more if sys.stdout.isatty() else ",".join(found)) or NOTHING


def age(entry: Entry) -> str:
    """Time since the newest file was written, in its largest unit."""
    seconds = max(0, time.time() - entry.modified)
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= length:
            return f"{seconds // length:.0f}{unit}"
    return f"{seconds:.0f}s"
