"""What compares runs pair by pair or metric by metric, as parts of the report: tables and notes."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sae_runner.report.heatmap import MOST
from sae_runner.report.proxy import Correlation
from sae_runner.report.schema import check
from sae_runner.report.table import MISSING, Section, show_number

MOST_NAMED = 12
COMPARISONS_SCHEMA = "sae-run.comparisons/1"


SIMILARITY_ABOUT = (
    "Cosines of decoder rows of latents that are alive, # to #. mmcs: mean over the first run's "
    "latents of the greatest cosine with one of the second's (→), and the other way round (←); "
    "random: what as many random directions would score. pw_mcc: mean cosine of a one-to-one "
    "matching. shared_frac: latents that decoder and encoder rows pair alike, with a mean cosine "
    "of {shared_cosine:g} or more."
)
FIRING_ABOUT = (
    "Correlation over the same held-out examples. max_corr: mean over the first run's latents of "
    "the greatest correlation with one of the second's (→), and the other way round (←); shuffled: "
    "the same with the second's examples shuffled (within a position, or among examples of about "
    "one length), which is chance; neurons: the same of the raw coordinates of the two sites. "
    "> .5: share of latents with a partner above 0.5."
)
ATTRIBUTION_ABOUT = (
    "Correlation of what latents say for the next token (activation times logit weight of that "
    "token), over the rows at which both have the same one. max_corr: mean over the first run's "
    "latents of the greatest correlation with one of the second's (→), and the other way round "
    "(←); shuffled: the same with the second's examples shuffled, which is chance; neurons: the "
    "same of the raw coordinates of the two sites. > .5: share of latents with a partner above 0.5."
)
RETENTION_ABOUT = (
    "Explanations of one SAE's latents, made on the first run's data and scored on the second's. "
    "ρ: mean Spearman score, on examples of the first's that they are not from (there) and on the "
    "second's (here). retention: mean over latents of here / there, where there is 0.1 or "
    "more. uni_interp: mean of a latent's lowest score over all the runs that scored these "
    "explanations; active_overlap: share of latents that are alive on all of their data."
)
PROXY_ABOUT = (
    "Spearman rank correlation of two metrics over runs, with a 95% interval by resampling runs. "
    "It says what goes together among these runs, not why."
)


def similarity_section(
    records: Sequence[dict[str, Any]], notes: Sequence[str], shared_cosine: float
) -> Section:
    """A row for each pair of runs."""
    columns = {"mmcs →": "mmcs_12", "mmcs ←": "mmcs_21", "random →": "mmcs_random_12",
               "random ←": "mmcs_random_21", "pw_mcc": "pw_mcc", "shared_frac": "shared_frac",
               "matching": "method"}  # fmt: skip
    return _pairs(
        "similarity", "Similarity of dictionaries",
        SIMILARITY_ABOUT.format(shared_cosine=shared_cosine), columns, records, notes,
    )  # fmt: skip


def firing_section(records: Sequence[dict[str, Any]], notes: Sequence[str]) -> Section:
    """A row for each pair of runs."""
    return _correlations("firing", "Latents that fire together", FIRING_ABOUT, records, notes)


def attribution_section(records: Sequence[dict[str, Any]], notes: Sequence[str]) -> Section:
    """A row for each pair of runs."""
    return _correlations(
        "attribution", "Latents that say the same", ATTRIBUTION_ABOUT, records, notes
    )


def _correlations(
    name: str,
    title: str,
    about: str,
    records: Sequence[dict[str, Any]],
    notes: Sequence[str],
) -> Section:
    neurons = {"neurons →": "max_corr_mean_neurons_12", "neurons ←": "max_corr_mean_neurons_21",
               "shuffled neurons →": "max_corr_mean_neurons_shuffled_12",
               "shuffled neurons ←": "max_corr_mean_neurons_shuffled_21"}  # fmt: skip
    if not any("max_corr_mean_neurons_12" in record for record in records):
        neurons = {}
    columns = {"max_corr →": "max_corr_mean_12", "max_corr ←": "max_corr_mean_21",
               "shuffled →": "max_corr_mean_shuffled_12",
               "shuffled ←": "max_corr_mean_shuffled_21", **neurons, "> .5 →": "frac_above_half_12",
               "> .5 ←": "frac_above_half_21", "over": "over"}  # fmt: skip
    shown = [{**r, "over": f"{r['n_units']:,} {r['unit']}s"} for r in records]
    return _pairs(name, title, about, columns, shown, notes)._replace(records=list(records))


def retention_section(records: Sequence[dict[str, Any]], notes: Sequence[str]) -> Section:
    """A row for each run that scored the explanations of another."""
    columns = {"data": "over", "ρ there": "spearman_explained", "ρ here": "spearman",
               "retention": "retention", "latents": "n_latents", "uni_interp": "uni_interp",
               "active_overlap": "active_overlap"}  # fmt: skip
    shown = [{**r, "over": " → ".join(r["data"])} for r in records]
    section = _pairs(
        "retention", "Explanations on other data", RETENTION_ABOUT, columns, shown, notes
    )
    return section._replace(records=list(records))


def _pairs(
    name: str,
    title: str,
    about: str,
    columns: Mapping[str, str],
    records: Sequence[dict[str, Any]],
    notes: Sequence[str],
) -> Section:
    rows = [
        [*(f"#{i}" for i in record["numbers"]), ", ".join(record["differ_in"]) or MISSING,
         *(_shown(record[key]) for key in columns.values())]
        for record in records
    ]  # fmt: skip
    pairs: dict[str, list[str]] = {}
    for record in records:
        for note in record["notes"]:
            pairs.setdefault(note, []).append(" and ".join(record["runs"]))
    reasons = [f"{_some(of_note)}: {note}" for note, of_note in pairs.items()]
    return Section(
        name, title, about, ["run", "run", "differ in", *columns], rows, [*notes, *reasons],
        list(records),
    )  # fmt: skip


def _some(names: Sequence[str]) -> str:
    """The first names, and how many there are besides."""
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more


def proxy_section(found: Sequence[Correlation], notes: Sequence[str]) -> Section:
    """A row for each pair of metrics, the firmest first; those without ρ in the notes."""
    with_rho = [c for c in found if c.rho is not None]
    pairs: dict[Any, Correlation] = {}
    for c in with_rho:  # ρ(x, y) is ρ(y, x): a pair is listed once.
        pairs.setdefault((c.group, frozenset((c.x, c.y))), c)
    known = list(pairs.values())
    known.sort(key=lambda c: (not c.is_firm, -abs(c.rho or 0.0)))
    rows = [[c.group, c.x, c.y, f"{c.rho:+.3f}", interval_of(c), str(c.n)] for c in known]
    why: dict[str, dict[str, None]] = {}
    for c in found:
        if c.rho is None:
            reason, _, names = c.note.rpartition(": ")
            # What is constant is said once, not with every other metric.
            named = names.split(" and ") if reason else [f"{c.x} with {c.y}"]
            why.setdefault(f"{c.group}, {reason or c.note}", {}).update(dict.fromkeys(named))
    nulls = [f"without a correlation, {reason}: {_some([*names])}" for reason, names in why.items()]
    sides = [len({getattr(c, axis) for c in with_rho}) for axis in ("x", "y")]
    if max(sides) > MOST:
        nulls.append(f"the figure shows {MOST} metrics of a side; the table has all")
    return Section(
        "proxy", "Which metric goes with which", PROXY_ABOUT,
        ["over", "x", "y", "ρ", "95% interval", "runs"], rows, [*notes, *nulls],
        [c._asdict() for c in found],
    )  # fmt: skip


def interval_of(c: Correlation) -> str:
    """`[0.41, 0.93]`, or that there is none."""
    return MISSING if c.lo is None or c.hi is None else f"[{c.lo:+.2f}, {c.hi:+.2f}]"


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    return value if isinstance(value, str) else show_number(value)


def comparisons_json(sections: Iterable[Section], options: Mapping[str, Any]) -> dict[str, Any]:
    """comparisons.json, checked.

    Raises:
        StoreError: a number that JSON cannot carry.
    """
    value = {
        "schema": COMPARISONS_SCHEMA,
        **{
            section.name: {
                "options": options.get(section.name, {}),
                "found": section.records,
                "notes": section.notes,
            }
            for section in sections
        },
    }  # fmt: skip
    check(value, {"schema": str}, "comparisons.json")
    return value


def section_csv(section: Section) -> str:
    """Every digit, a row for each record; nested values by dotted heads."""
    flat = [_flat(record) for record in section.records]
    heads = list(dict.fromkeys(head for record in flat for head in record))
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(heads)
    for record in flat:
        writer.writerow([
            "null" if (value := record.get(head, "")) is None else value for head in heads
        ])  # fmt: skip
    return buffer.getvalue()


def _flat(record: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            found |= {f"{key}.{k}": v for k, v in value.items()}
        else:
            found[key] = "; ".join(map(str, value)) if isinstance(value, list) else value
    return found
