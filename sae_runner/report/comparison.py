"""Many runs side by side: what differs in their configs, which may be compared, who is ahead."""

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sae_runner.config import RUNTIME_KEYS
from sae_runner.report.runs import Run, flat
from sae_runner.report.schema import DATASET_FINGERPRINT, MODEL_FINGERPRINT

# Top-level keys that name no part of an experiment: where it ran, where its files lie, what it is
# called. Differences in them are listed, but make no column.
MEASURING = ("evaluators", "eval")
OUTSIDE = ("device", "outputs", "force", "run_name", "run_dir", "logger", "name")

HIGHER_IS_BETTER = re.compile(
    r".*\.(explained_variance|cosine|alive_frac|mmcs|f1|precision|recall|hungarian"
    r"|fraction_recovered|kl_score|.*recovered|.*accuracy|(top1_)?acc5?_|.*agreement|embed_cos"
    r"|.*auc|total_me|superiority|alpha_|kappa_|interpretable|repeat_exact)[^.]*$"
)


class Absent:
    """The value of a key that a config does not have."""

    def __repr__(self) -> str:
        return "absent"


ABSENT = Absent()


HOW_TRAINED = ("trainer.", "sae.dead_latents.", "sae.target_l0")
"""Keys of which an SAE that was not trained where it was measured has no record."""


class Differences(NamedTuple):
    """Config keys of several runs. Where a run lacks a key, the value is ABSENT."""

    differing: dict[str, list[Any]]
    """One value per run; these may explain a difference in the metrics."""
    measuring: dict[str, list[Any]]
    """Also different: which evaluators ran, and how."""
    runtime: dict[str, list[Any]]
    """Also different, but they change no number."""
    same: dict[str, Any]
    """The value that all runs share."""


def config_differences(configs: Sequence[Mapping[str, Any]]) -> Differences:
    """Which of the flat configs' keys differ, by group, in the order in which they appear."""
    found = Differences({}, {}, {}, {})
    keys = dict.fromkeys(itertools.chain.from_iterable(configs))
    groups = list(dict.fromkeys(key.split(".")[0] for key in keys))
    trained = [any(key.startswith("trainer.") for key in config) for config in configs]
    for key in sorted(keys, key=lambda key: groups.index(key.split(".")[0])):
        values = [config.get(key, ABSENT) for config in configs]
        known = values
        if key.startswith("evaluators."):  # One that a run lacks measured nothing differently.
            known = [value for value in values if value is not ABSENT]
        elif key.startswith(HOW_TRAINED) and any(trained):
            values = [v if t else ABSENT for v, t in zip(values, trained, strict=True)]
            known = [value for value, t in zip(values, trained, strict=True) if t]
        if len({json.dumps(v, sort_keys=True, default=repr) for v in known}) == 1:
            found.same[key] = known[0]
        elif key in RUNTIME_KEYS or key.split(".")[0] in OUTSIDE:
            found.runtime[key] = values
        elif key.split(".")[0] in MEASURING:
            found.measuring[key] = values
        else:
            found.differing[key] = values
    return found


class Identity(NamedTuple):
    """What must be equal before the numbers of two runs may be compared; None is unknown."""

    model: str | None
    data: str | None
    site: str | None


def identity(run: Run) -> Identity:
    """Fingerprints of weights and data, and the site as the run or its evaluators resolved it."""
    fingerprints, header = run.report["fingerprints"], run.report["run"]
    sites = [envelope["site"] for envelope in run.evaluators.values() if envelope["site"]]
    if "site" in header:
        sites = [{"name": header["site"], "tokens": header["tokens"]}]
    text = f"name {sites[0]['name']}; tokens {sites[0]['tokens']}" if sites else None
    return Identity(
        fingerprints.get(MODEL_FINGERPRINT), fingerprints.get(DATASET_FINGERPRINT), text
    )


def _shown(value: str, other: str) -> str:
    """The start of a fingerprint, or of a site what the other one has otherwise."""
    if ";" not in value:
        return value[:12]
    return "; ".join(part for part in value.split("; ") if part not in other.split("; ")) or "less"


class Group(NamedTuple):
    """Runs that may be compared with each other."""

    letter: str
    runs: list[int]
    why: str
    """What keeps them apart from group A; empty for A itself."""


def comparable_groups(runs: Sequence[Run]) -> list[Group]:
    """Runs by equal data, model weights and site; the largest group is the first, A.

    What is unknown equals nothing: such a run stands alone.
    """
    identities = [identity(run) for run in runs]
    members: dict[Any, list[int]] = {}
    for i, mine in enumerate(identities):
        members.setdefault((mine, i if None in mine else None), []).append(i)
    ordered = sorted(members.values(), key=lambda group: (-len(group), group[0]))
    first = identities[ordered[0][0]] if ordered else None
    return [
        Group(letter(n), group, _contrast(identities[group[0]], first) if n and first else "")
        for n, group in enumerate(ordered)
    ]


def _contrast(mine: Identity, first: Identity) -> str:
    """`model weights differ (1f2e3d4c; A has 5a6b7c8d), site differs (tokens cls; A has …)`."""
    verbs = {"model": "model weights differ", "data": "data differ", "site": "site differs"}
    reasons = []
    for (part, verb), value, other in zip(verbs.items(), mine, first, strict=True):
        if value is None or other is None:
            reasons.append(f"{part} of {'this run' if value is None else 'A'} is unknown")
        elif value != other:
            reasons.append(f"{verb} ({_shown(value, other)}; A has {_shown(other, value)})")
    return ", ".join(reasons)


def letter(n: int) -> str:
    """From A to Z, then AA, AB and so on."""
    return (letter(n // 26 - 1) if n >= 26 else "") + chr(ord("A") + n % 26)


def cautions(runs: Sequence[Run], groups: Sequence[Group]) -> list[str]:
    """One line for each way in which comparable runs were nevertheless not measured alike."""
    lines: dict[str, list[str]] = {}
    for group in groups:
        of_group = [(i + 1, runs[i]) for i in group.runs]
        for name in dict.fromkeys(name for _, run in of_group for name in run.evaluators):
            measured = {
                i: measurement(run.evaluators[name])
                for i, run in of_group
                if name in run.evaluators
            }
            for line in _who_has_what(measured):
                lines.setdefault(f"measured differently: {line}", []).append(name)
        code = {
            i: flat({k: run.report[k] for k in ("versions", "git") if run.report[k]})
            for i, run in of_group
        }
        for line in _who_has_what(code):
            lines.setdefault(f"made by different code: {line}", [])
    return [f"{', '.join(names)} {line}".strip() for line, names in lines.items()]


def measurement(envelope: Mapping[str, Any]) -> dict[str, Any]:
    """What decides an evaluator's numbers besides the SAE, by dotted key."""
    decisive = flat({key: envelope[key] for key in ("evaluator_version", "config", "data")})
    # How rows are batched changes no metric by more than rounding.
    decisive.pop("config.eval.batch_size", None)
    # A stream cannot count them ahead, and those that are held out are missing from n_tokens.
    decisive.pop("data.n_unreadable", None)
    rows = {name: metrics["n_tokens"] for name, metrics in envelope["metrics"].items()
            if "n_tokens" in metrics}  # fmt: skip
    return decisive | {f"{name}.n_tokens": n for name, n in rows.items()}


def _who_has_what(of_runs: Mapping[int, Mapping[str, Any]]) -> list[str]:
    """`data.n_tokens is 4096 (#1, #3), 8192 (#2)` for every key that differs."""
    lines = []
    for key, values in config_differences(list(of_runs.values())).differing.items():
        holders: dict[str, list[str]] = {}
        for i, value in zip(of_runs, values, strict=True):
            text = str(value)
            length = 12 if re.fullmatch("[0-9a-f]{32,}", text) else 48  # Hashes need no more.
            text = text if len(text) <= length else f"{text[:length]}…"
            holders.setdefault(text, []).append(f"#{i}")
        said = [f"{value} ({_these(who)})" for value, who in holders.items()]
        lines.append(f"{key} is {', '.join(said)}")
    return lines


def _these(who: Sequence[str]) -> str:
    """`#1, #3`, and of many how many more there are."""
    return ", ".join(who[:4]) + (f" and {len(who) - 4} more" if len(who) > 4 else "")


def higher_is_better(metric: str) -> bool:
    """Whether more of a metric is better; an unknown one is an error or a count, so less is."""
    return HIGHER_IS_BETTER.match(metric) is not None


def frontier(points: Sequence[tuple[float, float]]) -> list[int]:
    """Pareto-optimal points, both coordinates minimised, by ascending x.

    A point is on the frontier if no other is at most as large in both and smaller in one; equal
    points are on it together.
    """
    best: tuple[float, float] | None = None
    chosen = []
    for i in sorted(range(len(points)), key=lambda i: points[i]):
        if best is None or points[i][1] < best[1] or points[i] == best:
            best = points[i]
            chosen.append(i)
    return chosen


def run_frontier(runs: Sequence[Run], among: Sequence[int], x: str, y: str) -> list[int]:
    """Which of the runs `among` are Pareto-optimal in metrics x and y, each in its direction."""
    known = [i for i in among if None not in (runs[i].metrics.get(x), runs[i].metrics.get(y))]
    sign = [-1.0 if higher_is_better(metric) else 1.0 for metric in (x, y)]
    points = [
        (sign[0] * float(runs[i].metrics[x] or 0), sign[1] * float(runs[i].metrics[y] or 0))
        for i in known
    ]
    return [known[j] for j in frontier(points)]


@dataclass(frozen=True)
class Comparison:
    """Everything that table, page and figure show of many runs."""

    runs: list[Run]
    """In the order of the table; #1 is the first."""
    metrics: list[str]
    x: str
    y: str
    differences: Differences
    groups: list[Group]
    cautions: list[str]
    fronts: list[list[int]]
    """Pareto-optimal runs of each group, by ascending x (or descending, where more is better)."""

    def group_of(self, i: int) -> Group:
        """The group of run i."""
        return next(group for group in self.groups if i in group.runs)

    @property
    def telling(self) -> dict[str, list[Any]]:
        """The table's columns: which option of a group a run took, and what differs beyond that.

        A key whose value follows from the option (or, where options are not known apart, from the
        type) says nothing that the option does not say.
        """
        columns: dict[str, list[Any]] = {}
        for key, values in self.differences.differing.items():
            name, options = self._options(key.split(".")[0])
            pairs = {(option, repr(value)) for option, value in zip(options, values, strict=True)}
            if len(set(options)) > 1:
                columns.setdefault(name, list(options))
            if len(set(options)) == 1 or len(pairs) > len(set(options)):
                columns.setdefault(key, values)
        return columns

    def _options(self, group: str) -> tuple[str, list[str]]:
        """The column that tells a config group's options apart, and each run's value in it."""
        chosen = [str(run.report["choices"].get(group, "—")) for run in self.runs]
        if len(set(chosen)) > 1:
            return group, chosen
        return f"{group}.type", [str(run.config.get(f"{group}.type")) for run in self.runs]

    @property
    def axes(self) -> str:
        """What the metrics of the table measure: `faithfulness: reconstruction.fvu; …`.

        In full: the table's heads are short, and this is all that explains them in a terminal.
        """
        axis_of = {
            category: envelope["axis"]
            for run in self.runs
            for envelope in run.evaluators.values()
            for category in envelope["metrics"]
        }
        groups: dict[str, list[str]] = {}
        for name in self.metrics:
            category = name.partition(".")[0]
            if category in axis_of:
                groups.setdefault(axis_of[category], []).append(name)
        parts = [f"{axis}: {', '.join(names)}" for axis, names in groups.items()]
        return "; ".join(sorted(parts))

    @property
    def remarks(self) -> list[str]:
        """What a reader must know before comparing rows: a line each."""
        apart = [
            f"group {group.letter} ({', '.join(f'#{i + 1}' for i in group.runs)}) is not "
            f"comparable with group A: {group.why}"
            for group in self.groups[1:]
        ]
        warned: dict[str, list[str]] = {}
        for i, run in enumerate(self.runs):
            for warning in run.report["warnings"]:
                warned.setdefault(str(warning), []).append(f"#{i + 1}")
        return [
            *(f"{_these(who)}: {warning}" for warning, who in warned.items()),
            *apart,
            *self.cautions,
        ]


def compare(runs: Sequence[Run], metrics: Sequence[str], x: str, y: str) -> Comparison:
    """The comparison of runs, ordered by group, kind of SAE, and metric x."""
    group_of = {i: n for n, group in enumerate(comparable_groups(runs)) for i in group.runs}

    def place(i: int) -> tuple[int, str, float, str]:
        value = runs[i].metrics.get(x)
        kind = str(runs[i].config.get("sae.type"))
        return group_of[i], kind, float("inf") if value is None else float(value), runs[i].name

    ordered = [runs[i] for i in sorted(group_of, key=place)]
    groups = comparable_groups(ordered)
    return Comparison(
        runs=ordered, metrics=list(metrics), x=x, y=y, groups=groups,
        differences=config_differences([run.config for run in ordered]),
        cautions=cautions(ordered, groups),
        fronts=[run_frontier(ordered, group.runs, x, y) for group in groups],
    )  # fmt: skip
