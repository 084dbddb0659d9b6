"""What lies below `outputs/`, and what needs what.

outputs/stores/<store>/<selection>/     cached activations
outputs/models/<model>/                 weights that were trained here
outputs/data/<data>/                    packed text
outputs/reports/<report>/               comparisons of runs
outputs/exports/<export>/               SAEs as other libraries write them
outputs/sweeps/                         what Hydra and its launchers keep of sweeps
outputs/<kind>/<run>/config.yaml        runs, of which `train` is the usual kind
"""

from collections.abc import Sequence
from pathlib import Path

from sae_runner.commands.entries import (
    RUN,
    Entry,
    folders,
    is_left_over,
    left_over,
    read_data,
    read_model,
    read_run,
    read_selection,
    read_store,
)
from sae_runner.commands.products import read_export, read_report, read_sweeps
from sae_runner.log import working

PLACES = ("stores", "models", "data", "reports", "exports", "sweeps")
"""Folders of outputs/ whose entries are no runs."""

Related = dict[Path, list[Entry]]


@working("looking through outputs")
def take_inventory(outputs: Path) -> list[Entry]:
    """Everything there is: stores, each followed by its selections, runs, models, and so on."""
    found: list[Entry] = []
    for folder in folders(outputs / "stores"):
        found.append(read_store(folder))
        found += [read_selection(path) for path in folders(folder)]
    for place in folders(outputs):
        if place.name not in PLACES:
            runs = [path for path in folders(place) if any((path / n).exists() for n in RUN)]
            found += [read_run(path, place.name, outputs) for path in runs]
    found += [read_model(path) for path in folders(outputs / "models")]
    found += [read_data(path) for path in folders(outputs / "data")]
    found += [read_report(path) for path in folders(outputs / "reports")]
    found += [read_export(path) for path in folders(outputs / "exports")]
    found += [read_sweeps(path) for path in [outputs / "sweeps"] if path.is_dir()]
    for place in folders(outputs):
        found += [left_over(path) for path in sorted(place.iterdir()) if is_left_over(path)]
    return found


def users_of(entry: Entry, inventory: Sequence[Entry]) -> list[Entry]:
    """What needs `entry`; for a store, what needs any of its selections."""
    called = entry.called
    if entry.kind == "store":
        called = called.union(*(e.called for e in inventory if e.path.parent == entry.path))
    return [e for e in inventory if e.mentions & called and e.path.parent != entry.path]


def relations(inventory: Sequence[Entry]) -> tuple[Related, Related]:
    """Of every path what it needs, and what needs it.

    What needs a selection is not said to need the store around it too.
    """
    users = {entry.path: users_of(entry, inventory) for entry in inventory}
    needs: Related = {entry.path: [] for entry in inventory}
    for entry in inventory:
        for user in users[entry.path]:
            needs[user.path].append(entry)
    for path, found in needs.items():
        around = {e.path.parent for e in found}
        needs[path] = [e for e in found if e.path not in around]
    return needs, users
