"""Published numbers against measured ones: reproduced, not reproduced, or not comparable.

An experiment's YAML states what a study published in its `expected:` block, a list of

    - metric: reconstruction.explained_variance_uncentred_per_token
      value: 0.86          # as published
      low: 0.84            # the range that counts as the same result; one bound may be null
      high: 0.90
      unit: fraction
      source: where it stands
      comparable: true     # false: measured otherwise than here; `why` says how
      why: null
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from sae_runner.errors import ConfigError, did_you_mean

Verdict = Literal["reproduced", "not reproduced", "not comparable"]

KEYS: dict[str, tuple[type, ...]] = {
    "metric": (str,), "value": (int, float, type(None)), "low": (int, float, type(None)),
    "high": (int, float, type(None)), "unit": (str, type(None)), "source": (str, type(None)),
    "comparable": (bool,), "why": (str, type(None)),
}  # fmt: skip


def check_expected(expected: Sequence[Any]) -> list[dict[str, Any]]:
    """The entries of an `expected:` block with all their keys, or a complaint.

    Raises:
        ConfigError: an unknown key, a wrong type, a range that is empty, missing or excludes the
            published value, or `comparable: false` without its reason.
    """
    entries = []
    for i, given in enumerate(expected):
        where = f"expected[{i}]"
        if not isinstance(given, Mapping):
            raise ConfigError(f"{where}={given}: must be a mapping with `metric`, `low` and `high`")
        if unknown := sorted(set(map(str, given)) - KEYS.keys()):
            raise ConfigError(f"no key '{where}.{unknown[0]}'.{did_you_mean(unknown[0], KEYS)}")
        entry = dict.fromkeys(KEYS) | {"comparable": True} | dict(given)
        for key, kinds in KEYS.items():
            value = entry[key]
            if not isinstance(value, kinds) or (isinstance(value, bool) and key != "comparable"):
                names = " or ".join(kind.__name__ for kind in kinds if kind is not type(None))
                raise ConfigError(f"{where}.{key}={value}: must be {names}")
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(f"{where}.{key}={value}: must be finite")
        _check_range(entry, where)
        entries.append(entry)
    return entries


def _check_range(entry: Mapping[str, Any], where: str) -> None:
    low, high, value = entry["low"], entry["high"], entry["value"]
    if not entry["comparable"]:
        if not entry["why"]:
            raise ConfigError(f"{where}.why needs a value: what makes it not comparable")
    elif low is None and high is None:
        raise ConfigError(f"{where}.low needs a value (or {where}.high): nothing can be judged")
    if low is not None and high is not None and low > high:
        raise ConfigError(f"{where}.low={low}: must be <= {where}.high={high}")
    if value is not None and not within(value, low, high):
        raise ConfigError(f"{where}.value={value}: outside its own range {interval(low, high)}")


def judge(
    expected: Sequence[Any],
    metrics: Mapping[str, float | int | None],
    ci: Mapping[str, Mapping[str, float | int]] | None = None,
) -> list[dict[str, Any]]:
    """Each expected number with `measured`, its `verdict` and, where needed, `why`.

    `metrics` and `ci` are named `category.metric` (`schema.flat_metrics`). What was not measured,
    or is null, is not comparable. A verdict that the 95% interval leaves open says so.

    Raises:
        ConfigError: the block is not well formed (see `check_expected`).
    """
    verdicts = []
    for entry in check_expected(expected):
        name = entry["metric"]
        measured = metrics.get(name)
        verdict: Verdict = "not comparable"
        why = entry["why"]
        if name not in metrics:
            why = _and(why, "not measured by this run")
        elif measured is None:
            why = _and(why, "could not be computed (null)")
        elif entry["comparable"]:
            inside = within(measured, entry["low"], entry["high"])
            verdict = "reproduced" if inside else "not reproduced"
            if name in (ci or {}) and (doubt := _doubt(entry, inside, (ci or {})[name])):
                why = _and(why, doubt)
        verdicts.append(entry | {"measured": measured, "verdict": verdict, "why": why})
    return verdicts


def _doubt(entry: Mapping[str, Any], inside: bool, bounds: Mapping[str, float | int]) -> str | None:
    """What the measured interval says against the verdict on the measured value."""
    low, high, lo, hi = entry["low"], entry["high"], bounds["lo"], bounds["hi"]
    if inside and not (within(lo, low, high) and within(hi, low, high)):
        return f"but the 95% interval {interval(lo, hi)} reaches out of the range"
    if not inside and (high is None or lo <= high) and (low is None or hi >= low):
        return f"but the 95% interval {interval(lo, hi)} reaches into the range"
    return None


def within(value: float, low: float | None, high: float | None) -> bool:
    """Whether low <= value <= high; a bound that is None is no bound."""
    return (low is None or value >= low) and (high is None or value <= high)


def interval(low: float | None, high: float | None) -> str:
    """`[0.84, 0.9]`, `>= 0.84`, `<= 0.9`, or nothing."""
    if low is None or high is None:
        return f">= {low:g}" if low is not None else f"<= {high:g}" if high is not None else ""
    return f"[{low:g}, {high:g}]"


def _and(why: str | None, more: str) -> str:
    return f"{why}; {more}" if why else more
