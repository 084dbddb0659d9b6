"""`sae-run rm`: remove stores, selections, runs, models and data, never what something needs."""

import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from sae_runner import files
from sae_runner.commands.entries import Entry
from sae_runner.commands.inventory import take_inventory, users_of
from sae_runner.commands.job import Job
from sae_runner.commands.listing import show_table
from sae_runner.commands.ls import shown_path
from sae_runner.commands.words import named
from sae_runner.config import Name, convert
from sae_runner.errors import InputError, Interrupted
from sae_runner.log import working


def main(job: Job) -> None:
    """Say what goes, ask, remove it.

    Raises:
        InputError: nothing is named, something else needs it or is writing it, or nobody can be
            asked and `yes=true` was not given.
    """
    outputs = Path(convert(job.cfg["outputs"], Name, "outputs")).expanduser()
    yes = convert(job.cfg["yes"], bool, "yes")
    words = convert(job.cfg["runs"], list[str], "runs")
    if not words:
        raise InputError("name what to remove: sae-run rm PATH …; `sae-run ls` shows what is there")
    inventory = take_inventory(outputs)
    doomed = with_contents(named(words, inventory, outputs), inventory)
    check_unused(doomed, inventory)
    top = [e for e in doomed if all(e.path.parent != other.path for other in doomed)]
    show(top)
    if not yes and not agreed():
        return print("nothing was removed")
    freed = remove(top, outputs)
    print(f"{files.size(freed)} freed")


def with_contents(chosen: Sequence[Entry], inventory: Sequence[Entry]) -> list[Entry]:
    """A store goes with its selections."""
    paths = {e.path for e in chosen}
    return [e for e in inventory if {e.path, e.path.parent} & paths]


def check_unused(
    doomed: Sequence[Entry], inventory: Sequence[Entry], *, locked_here: bool = False
) -> None:
    """Refuse to remove what something that stays needs, or what is being written.

    Raises:
        InputError: the first such thing, with the names of what needs it.
    """
    gone = {e.path for e in doomed}
    for entry in doomed:
        if not locked_here and files.is_locked(entry.lock):
            raise InputError(f"{shown_path(entry.path)} is in use by another process")
        needing = [user for user in users_of(entry, inventory) if user.path not in gone]
        if needing:
            shown = [shown_path(user.path) for user in needing[:3]]
            more = f" and {len(needing) - 3} more" if len(needing) > 3 else ""
            raise InputError(
                f"{entry.kind} {shown_path(entry.path)} is needed by {', '.join(shown)}{more}: "
                "remove these in the same call, or first"
            )


def show(entries: Sequence[Entry]) -> None:
    """What would go, and how much it is."""
    columns = {
        "remove": [shown_path(e.path) for e in entries],
        "what": [e.kind if not e.is_run else "run" for e in entries],
        "state": [e.state for e in entries],
        "size": [files.size(e.n_bytes) for e in entries],
    }
    show_table(columns, right=["size"])


def agreed() -> bool:
    """Ask, if there is someone to ask.

    Raises:
        InputError: standard input is no terminal.
    """
    if not sys.stdin.isatty():
        raise InputError("nobody to ask here: add yes=true to remove these")
    try:
        return input("Remove this? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        print()  # No answer has ended the line.
        return False
    except (KeyboardInterrupt, Interrupted):
        print()
        raise


@working("removing")
def remove(entries: Sequence[Entry], outputs: Path) -> int:
    """Remove entries while their locks are held; gives the number of bytes freed.

    Raises:
        InputError: another process has one of them, or has begun to use it since it was shown.
    """
    with contextlib.ExitStack() as held:
        for path in sorted({entry.lock for entry in entries}):
            held.enter_context(files.locked(path, wait=False))
        inventory = take_inventory(outputs)
        paths = {entry.path for entry in entries}
        doomed = with_contents([e for e in inventory if e.path in paths], inventory)
        check_unused(doomed, inventory, locked_here=True)
        for entry in entries:
            discard(entry.path)
            if entry.kind != "selection":  # A selection's lock is its store's.
                files.lock_path(entry.lock).unlink(missing_ok=True)
    return sum(entry.n_bytes for entry in entries)


def discard(path: Path) -> None:
    """Remove a folder so that, killed in between, nothing half of it is taken for whole."""
    if path.is_symlink() or path.name.startswith("."):
        return files.remove(path)
    aside = path.parent / f".{path.name}.{os.getpid()}.old"
    path.rename(aside)
    files.remove(aside)
