"""One SAE's latents on several corpora: which runs those are, and their tables of scores."""

import itertools
from typing import Any

from sae_runner.commands.between import Member, Record, alive, members_of, pair_record, together
from sae_runner.errors import ConfigError, StoreError
from sae_runner.report.comparison import Comparison
from sae_runner.report.retention import retention, scores_of

EXPLAINS = "autointerp"
COLUMNS = ["feature", "scored", "spearman"]


def retentions(comparison: Comparison) -> tuple[list[Record], list[str]]:
    """What each two runs of the same weights say of the same latents; notes on the others.

    Raises:
        ConfigError: no two runs have the same weights and scores of explanations.
    """
    members, notes = members_of(comparison)
    explained = [m for m in members if tables_of(m)]
    notes += [
        f"left out, #{m.number}: it has no scores of explanations (evaluators=[{EXPLAINS}])"
        for m in members if m not in explained
    ]  # fmt: skip
    groups, alone = together(
        explained, lambda m: f"SAE {m.facts['sha256']['sae.safetensors'][:12]}",
        "the weights of the same SAE, explained", "retention", notes,
    )  # fmt: skip
    records = []
    for a, b in (pair for group in groups for pair in itertools.combinations(group, 2)):
        first, second = tables_of(a), tables_of(b)
        fired = alive(a), alive(b)
        known = None if fired[0] is None or fired[1] is None else (
            fired[0].numpy(), fired[1].numpy()
        )  # fmt: skip
        for name in sorted(first.keys() & second.keys()):
            found, why = retention(scores_of(first[name]), scores_of(second[name]), known)
            records.append({**pair_record(a, b), "notes": why, "evaluator": name, **found})
    if not records:
        raise ConfigError("compare=retention: no two runs have scores of an evaluator of one name")
    return records, [*notes, *alone]


def tables_of(member: Member) -> dict[str, dict[str, list[Any]]]:
    """The scores of latents that a run's evaluators explained, by evaluator.

    Raises:
        StoreError: a table is damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    found: dict[str, dict[str, list[Any]]] = {}
    for name, envelope in member.run.evaluators.items():
        place = envelope["artifacts"].get("tables", {}).get("latents")
        if envelope["type"] != EXPLAINS or place is None:
            continue
        path = member.run.path / "eval" / member.folder.name / place
        try:
            found[name] = pq.read_table(path, columns=COLUMNS).to_pydict()
        except (OSError, pa.ArrowInvalid, KeyError) as error:
            raise StoreError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    return found
