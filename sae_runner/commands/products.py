"""Reports, exports and records of sweeps below `outputs/`: they need nothing, and nothing them."""

from pathlib import Path

from sae_runner.commands.entries import Entry, make_entry


def read_report(folder: Path) -> Entry:
    """A comparison of runs, which has copied what it shows of them."""
    state = "complete" if (folder / "report.html").is_file() else "unfinished: no report.html"
    table = folder / "table.csv"
    n = len(table.read_text().splitlines()) - 1 if table.is_file() else 0
    return make_entry("report", folder, state, f"{n} run{'s' * (n != 1)}", [], [])


def read_export(folder: Path) -> Entry:
    """An SAE as another library writes it."""
    state = "complete" if (folder / "README.md").is_file() else "unfinished: no README.md"
    return make_entry("export", folder, state, folder.name.rpartition("-")[2], [], [])


def read_sweeps(folder: Path) -> Entry:
    """What Hydra and its launchers keep of sweeps; their runs lie elsewhere."""
    return make_entry("sweeps", folder, "complete", "records of launchers", [], [])
