"""Run directories: finding them, reading their reports, choosing among their metrics."""

import fnmatch
import glob
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sae_runner.config import options_of
from sae_runner.errors import ConfigError, InputError, StoreError, did_you_mean
from sae_runner.report.expected import judge
from sae_runner.report.schema import flat_ci, flat_metrics, load_report


@dataclass(frozen=True)
class Run:
    """One run directory with a valid report."""

    name: str
    path: Path
    report: dict[str, Any]
    metrics: dict[str, float | int | None]
    """`category.metric`"""
    ci: dict[str, dict[str, float | int]]
    config: dict[str, Any]
    """Dotted keys; without `expected`, which is no part of the experiment."""
    verdicts: list[dict[str, Any]]
    """Published against measured numbers, as judged when the report was written, or now."""

    @property
    def evaluators(self) -> dict[str, Any]:
        """The envelopes by the evaluators' names."""
        return dict(self.report["evaluators"])


def load_runs(folders: Iterable[Path]) -> tuple[list[Run], list[str]]:
    """The runs that can be read, and one line for each that is damaged."""
    runs, damaged = [], []
    for folder in folders:
        try:
            runs.append(load_run(folder))
        except InputError as error:
            damaged.append(" ".join(str(error).split()))
    names = [run.name for run in runs]
    repeated = {name for name in names if names.count(name) > 1}
    runs = [replace(r, name=str(r.path)) if r.name in repeated else r for r in runs]
    return runs, damaged


def load_run(folder: Path) -> Run:
    """The run of a run directory.

    Raises:
        InputError: its report is damaged.
    """
    report = load_report(folder)
    config = {k: v for k, v in report["config"].items() if k != "expected"}
    metrics, ci = flat_metrics(report["evaluators"]), flat_ci(report["evaluators"])
    try:
        verdicts = report["expected"] or judge(report["config"].get("expected") or [], metrics, ci)
    except ConfigError as error:
        raise StoreError(f"{folder / 'report.json'}: config.{error}") from None
    return Run(folder.name, folder, report, metrics, ci, flat(config), verdicts)


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys; lists and empty mappings are values."""
    items: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            items |= flat(value, f"{prefix}{key}.")
        else:
            items[f"{prefix}{key}"] = value
    return items


def find_runs(patterns: Sequence[str], train_dir: Path) -> tuple[list[Path], list[Path]]:
    """Run directories with a report, and those without one.

    A pattern is a run directory, its report.json, a folder of run directories, or a glob of
    these, or the name of a run below `train_dir`; without any, every run there is meant.

    Raises:
        InputError: a pattern that matches nothing, or no run at all.
    """
    found: dict[Path, Path] = {}  # However a path is spelled, its run counts once.
    for pattern in patterns:
        expanded = str(Path(pattern).expanduser())
        paths = [Path(expanded)] if Path(expanded).exists() else map(Path, glob.glob(expanded))
        runs = [run for path in sorted(paths) for run in _runs_at(path)]
        if not runs and "/" not in pattern:  # A run's name, or a glob of names.
            named = sorted(p for p in train_dir.glob(pattern) if not p.name.startswith("."))
            runs = [run for path in named for run in _runs_at(path)]
        if not runs:
            near = [*_runs_at(Path(expanded).parent), *_runs_at(train_dir)]
            hint = did_you_mean(Path(expanded).name, {run.name for run in near}, limit=8)
            raise InputError(f"runs={pattern}: no run directory there.{hint}")
        for run in runs:
            found.setdefault(run.resolve(), run)
    known = list(found.values()) if patterns else _runs_at(train_dir)
    with_report = [run for run in known if (run / "report.json").is_file()]
    without = [run for run in known if run not in with_report]
    if not with_report:
        where = ", ".join(patterns) or train_dir
        also = [f"; {len(without)} without: run `sae-run eval checkpoint={p}`" for p in without[:1]]
        raise InputError(f"no run with a report.json in {where}{''.join(also)}")
    return with_report, without


def _runs_at(path: Path) -> list[Path]:
    """The run directory that `path` is or belongs to, or those directly below it."""
    if path.is_file():
        return [path.parent] if path.name == "report.json" else []
    if _is_run(path):
        return [path]
    return sorted(p for p in path.iterdir() if _is_run(p)) if path.is_dir() else []


def _is_run(path: Path) -> bool:
    return any((path / name).exists() for name in ("report.json", "config.yaml", "checkpoints"))


def choose_metrics(wanted: Sequence[str], runs: Sequence[Run], key: str) -> list[str]:
    """The metrics that names and globs mean, in that order, those that no run has left out.

    Raises:
        ConfigError: a name that is no metric: its evaluator ran and does not give it, or there
            is no such evaluator.
    """
    measured = list(dict.fromkeys(name for run in runs for name in run.metrics))
    categories = {name.split(".")[0] for name in measured}
    chosen: dict[str, None] = {}
    for name in wanted:
        matches = fnmatch.filter(measured, name) if any(c in name for c in "*?[") else []
        matches = [name] if name in measured else matches
        category = name.split(".")[0]
        was_not_run = category not in categories and category in options_of("evaluators")
        if not matches and not was_not_run:
            raise ConfigError(f"{key}={name}: no run measured it.{did_you_mean(name, measured)}")
        chosen |= dict.fromkeys(matches)
    return list(chosen)
