"""Explanations of one corpus that other evaluations scored: whose they are, and their scores."""

from pathlib import Path
from typing import Any, NamedTuple

from sae_runner import files
from sae_runner.commands.between import Member, Record, alive, members_of, pair_record
from sae_runner.errors import ConfigError, StoreError
from sae_runner.report.comparison import Comparison
from sae_runner.report.retention import everywhere, retention, scores_of

EXPLAINS, KEPT = "autointerp", "explanations.json"
COLUMNS = ["feature", "scored", "spearman"]


class Scored(NamedTuple):
    """One evaluation of explanations."""

    member: Member
    name: str
    """Of the evaluator."""
    scores: dict[int, float]
    data: str
    """Name of the dataset."""


def retentions(comparison: Comparison) -> tuple[list[Record], list[str]]:
    """What explanations of one run are worth on the data of each other that scored them.

    Raises:
        ConfigError: no run scored the explanations of another of these.
    """
    members, notes = members_of(comparison)
    explained: dict[str, Scored] = {}
    others: dict[str, list[Scored]] = {}
    for member in members:
        for name, envelope in member.run.evaluators.items():
            if envelope["type"] != EXPLAINS:
                continue
            taken = envelope["config"].get("reads", {}).get("explanations")
            if taken is not None:
                others.setdefault(str(taken), []).append(scored(member, name))
            elif KEPT in envelope["artifacts"].get("texts", {}):
                place = folder_of(member) / envelope["artifacts"]["texts"][KEPT]
                explained.setdefault(hash_of(place), scored(member, name))
    records = []
    for source, first in explained.items():
        mine = others.pop(source, [])
        records += compared(first, mine)
        if not mine:
            notes.append(f"left out, {label(first)}: its explanations are scored by no other")
    notes += [
        f"left out, {label(one)}: the explanations that it scored are of none of these runs"
        for group in others.values() for one in group
    ]  # fmt: skip
    if not records:
        why = "; ".join(notes) or "none of them has scores of explanations"
        raise ConfigError(
            "compare=retention: no run scored the explanations of another of these "
            f"(evaluators.{EXPLAINS}.explanations=RUN): {why}"
        )
    return records, notes


def compared(first: Scored, others: list[Scored]) -> list[Record]:
    """A record for each corpus that scored the explanations of the first."""
    if not others:
        return []
    fired = [alive(one.member) for one in (first, *others)]
    known = [f.numpy() for f in fired if f is not None]
    total, why = everywhere(
        [one.scores for one in others], known if len(known) == len(fired) else None
    )
    records = []
    for one in others:
        found, own = retention(first.scores, one.scores)
        records.append({
            **pair_record(first.member, one.member), "notes": [*own, *why],
            "evaluators": [first.name, one.name], "data": [first.data, one.data], **found, **total,
        })  # fmt: skip
    return records


def label(one: Scored) -> str:
    """`#2 autointerp`."""
    return f"#{one.member.number} {one.name}"


def folder_of(member: Member) -> Path:
    """Where a run's evaluators left what is no number."""
    return member.run.path / "eval" / member.folder.name


def hash_of(path: Path) -> str:
    """SHA-256 of a file.

    Raises:
        StoreError: it cannot be read.
    """
    try:
        return files.sha256(path)
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror}") from None


def scored(member: Member, name: str) -> Scored:
    """The scores of an evaluator's latents.

    Raises:
        StoreError: its table is damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    envelope = member.run.evaluators[name]
    path = folder_of(member) / str(envelope["artifacts"].get("tables", {}).get("latents"))
    try:
        columns: dict[str, list[Any]] = pq.read_table(path, columns=COLUMNS).to_pydict()
    except (OSError, pa.ArrowInvalid, KeyError) as error:
        raise StoreError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    return Scored(member, name, scores_of(columns), str(envelope["data"]["name"]))
