"""report.json and the evaluators' envelopes: written and read in one place, always validated.

A report is a run header and one envelope for each evaluator. No NaN and no infinity is ever
written: what cannot be computed is null and has a note. Times and memory are in `cost` blocks,
outside every comparison.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from sae_runner.errors import StoreError

REPORT_SCHEMA = "sae-run.report/1"
EVAL_SCHEMA = "sae-run.eval/1"

# Key: the type that its value must have.
ENVELOPE: dict[str, type | tuple[type, ...]] = {
    "schema": str, "evaluator": str, "type": str, "evaluator_version": str, "axis": str,
    "run_id": str, "timestamp_utc": str, "seed": int, "host": dict, "site": dict, "sae": dict,
    "data": dict, "config": dict, "metrics": dict, "ci": dict, "notes": list, "series": dict,
    "artifacts": dict, "cost": dict,
}  # fmt: skip
REPORT: dict[str, type | tuple[type, ...]] = {
    "schema": str, "run": dict, "config": dict, "choices": dict, "overrides": list, "seed": int,
    "versions": dict, "git": (dict, type(None)), "fingerprints": dict, "warnings": list,
    "training": dict, "evaluators": dict, "expected": list, "cost": dict,
}  # fmt: skip
METRIC = (int, float, type(None))
EXPECTED: dict[str, type | tuple[type, ...]] = {
    "metric": str, "value": METRIC, "low": METRIC, "high": METRIC, "unit": (str, type(None)),
    "source": (str, type(None)), "why": (str, type(None)), "measured": METRIC, "verdict": str,
}  # fmt: skip
NOTE: dict[str, type] = {"code": str, "metric": str, "detail": str}
CI = dict.fromkeys(("se", "lo", "hi", "n"), (int, float))
# `fingerprints` of a run header name at least these; runs are comparable when both are equal.
MODEL_FINGERPRINT, DATASET_FINGERPRINT = "model", "dataset"


def check(value: Any, keys: Mapping[str, Any], where: str) -> None:
    """Refuse what lacks a key, has one of another type, or holds a number JSON cannot carry.

    Raises:
        StoreError: the first thing that is wrong, by its path.
    """
    if not isinstance(value, Mapping):
        raise StoreError(f"{where}: is a {type(value).__name__}, not a mapping")
    for key, kind in keys.items():
        if key not in value:
            raise StoreError(f"{where}: key {key!r} is missing")
        if not isinstance(value[key], kind):
            raise StoreError(f"{where}: {key!r} is a {type(value[key]).__name__}")
    for path in not_finite(value):
        raise StoreError(f"{where}: {path} is not a finite number; null and a note are expected")


def not_finite(value: Any, path: str = "") -> Iterable[str]:
    """Paths of every NaN and infinity in nested dicts and lists."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from not_finite(inner, f"{path}.{key}".lstrip("."))
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            yield from not_finite(inner, f"{path}[{i}]")
    elif isinstance(value, float) and not math.isfinite(value):
        yield path


def check_envelope(envelope: Any, where: str = "envelope") -> None:
    """Refuse an evaluator's envelope that does not follow the schema."""
    check(envelope, ENVELOPE, where)
    if envelope["schema"] != EVAL_SCHEMA:
        raise StoreError(f"{where}: schema {envelope['schema']!r}, expected {EVAL_SCHEMA!r}")
    for i, note in enumerate(envelope["notes"]):
        check(note, NOTE, f"{where}: notes[{i}]")
    noted = {note["metric"] for note in envelope["notes"]}
    for key, interval in envelope["ci"].items():
        check(interval, CI, f"{where}: ci.{key}")
    for category, metrics in envelope["metrics"].items():
        check(metrics, {}, f"{where}: metrics.{category}")
        check(metrics, dict.fromkeys(metrics, METRIC), f"{where}: metrics.{category}")
        for name, value in metrics.items():
            if value is None and f"{category}.{name}" not in noted:
                raise StoreError(f"{where}: {category}.{name} is null without a note")


def check_report(report: Any, where: str = "report") -> None:
    """Refuse a report that does not follow the schema, or one of its envelopes that does not."""
    check(report, REPORT, where)
    if report["schema"] != REPORT_SCHEMA:
        raise StoreError(f"{where}: schema {report['schema']!r}, expected {REPORT_SCHEMA!r}")
    for i, verdict in enumerate(report["expected"]):
        check(verdict, EXPECTED, f"{where}: expected[{i}]")
    for name, envelope in report["evaluators"].items():
        check_envelope(envelope, f"{where}: evaluators.{name}")


def load_report(path: str | Path) -> dict[str, Any]:
    """The validated report of a run directory, or of a report.json.

    Raises:
        StoreError: there is none, it is damaged, or it follows another schema.
    """
    path = Path(path)
    path = path / "report.json" if path.is_dir() else path
    if not path.is_file():
        raise StoreError(f"no report at {path}: run `sae-run eval checkpoint={path.parent}`")
    try:
        report: dict[str, Any] = json.loads(path.read_bytes())
    except ValueError as error:
        raise StoreError(f"{path} is no JSON: {error}") from None
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror}") from None
    check_report(report, str(path))
    return report


def flat_metrics(evaluators: Mapping[str, Any]) -> dict[str, float | int | None]:
    """Every metric of a report's envelopes as `category.metric`.

    Where two evaluators of one type give the same name, the one that is called like its type
    keeps it, and the others' names begin with `<evaluator>/`.
    """
    return _flat(evaluators, metric_names)


def flat_ci(evaluators: Mapping[str, Any]) -> dict[str, dict[str, float | int]]:
    """The intervals that belong to `flat_metrics`, by the same names."""
    return _flat(evaluators, lambda envelope: envelope["ci"])


def metric_names(envelope: Mapping[str, Any]) -> dict[str, float | int | None]:
    """The metrics of one envelope as `category.metric`."""
    return {f"{c}.{m}": v for c, metrics in envelope["metrics"].items() for m, v in metrics.items()}


def _flat(evaluators: Mapping[str, Any], values: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    taken: set[str] = set()
    for key in sorted(evaluators, key=lambda k: (evaluators[k]["type"] != k, k)):
        names = metric_names(evaluators[key]).keys()
        prefix = f"{key}/" if names & taken else ""
        merged |= {f"{prefix}{name}": value for name, value in values(evaluators[key]).items()}
        taken |= names
    return merged
