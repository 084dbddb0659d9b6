"""What compares runs two by two: which of them can be, and the weights and latents it takes."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Bool
from torch import Tensor

from sae_runner.checkpoint import load_sae, read_facts
from sae_runner.errors import ConfigError, InputError, StoreError
from sae_runner.log import Progress
from sae_runner.report.comparison import Comparison, config_differences
from sae_runner.report.options import SimilarityOptions
from sae_runner.report.runs import Run
from sae_runner.report.similarity import Directions, similarity

Record = dict[str, Any]
Held = TypeVar("Held")
ALL_ALIVE = "{} has no column n_fired (evaluator density): all its latents count as alive"
BEGUN_ALIKE = (
    "both SAEs were drawn from seed {}: latents of one number began alike, and may be partners for "
    "that; another seed says what training makes of them"
)


class Member(NamedTuple):
    """One run that takes part, by its number in the table (from 1)."""

    number: int
    run: Run
    folder: Path
    """The checkpoint that its report is of."""
    facts: dict[str, Any]


def members_of(comparison: Comparison) -> tuple[list[Member], list[str]]:
    """The runs whose checkpoint is sound and the one that was measured, and why others are not."""
    found, left_out = [], []
    for number, run in enumerate(comparison.runs, 1):
        folder = run.path / "checkpoints" / str(run.report["run"]["checkpoint"])
        try:
            facts = read_facts(folder)
            if facts["sha256"]["sae.safetensors"] != run.report["fingerprints"]["sae"]:
                raise StoreError(f"{folder} is not what its report was measured on")
        except StoreError as error:
            left_out.append(f"left out, #{number}: {error}")
            continue
        found.append(Member(number, run, folder, facts))
    return found, left_out


class Space(NamedTuple):
    """Where directions live: two dictionaries are comparable in the same one alone."""

    model: str
    site: str
    target: str | None
    d_in: int
    d_out: int

    def __str__(self) -> str:
        target = f" → {self.target}" if self.target else ""
        return f"model {self.model[:12]}, {self.site}{target}, d_in {self.d_in}"


def space_of(member: Member) -> Space:
    """The space of a run's directions."""
    facts = member.facts
    return Space(
        facts["model"]["fingerprint"], facts["site"], facts.get("target"), facts["d_in"],
        facts["d_out"],
    )  # fmt: skip


def together(
    members: Sequence[Member],
    key_of: Callable[[Member], Any],
    what: str,
    key: str,
    left_out: Sequence[str],
) -> tuple[list[list[Member]], list[str]]:
    """Runs that share `what`, and a line for those that share it with no other.

    Raises:
        ConfigError: no two runs do.
    """
    groups: dict[Any, list[Member]] = {}
    for member in members:
        groups.setdefault(key_of(member), []).append(member)
    said = {k: f"{numbers(group)} ({k})" for k, group in groups.items()}
    if all(len(group) < 2 for group in groups.values()):
        raise ConfigError(
            f"compare={key}: no two of these runs have {what}: "
            f"{'; '.join([*said.values(), *left_out])}"
        )
    alone = [f"left out, no other run has {what}: {said[k]}"
             for k, group in groups.items() if len(group) < 2]  # fmt: skip
    if len(groups) - len(alone) > 1:
        kept = [said[k] for k, group in groups.items() if len(group) > 1]
        alone.append(f"compared among themselves: {'; '.join(kept)}")
    return [group for group in groups.values() if len(group) > 1], alone


def on_same_data(
    comparison: Comparison, read: Callable[[Member], Held], what: str, key: str
) -> tuple[dict[int, Held], list[list[Member]], list[str]]:
    """What `read` finds of each run, by its number; runs of the same data; lines on the others.

    Raises:
        ConfigError: no two runs of the same data have `what`.
    """
    members, notes = members_of(comparison)
    held = {}
    for member in members:
        try:
            held[member.number] = read(member)
        except InputError as error:
            notes.append(f"left out, #{member.number}: {error}")
    groups, alone = together(
        [m for m in members if m.number in held],
        lambda m: f"data {m.facts['dataset']['fingerprint'][:12]}",
        f"{what} the same data", key, notes,
    )  # fmt: skip
    return held, groups, [*notes, *alone]


def numbers(members: Sequence[Member]) -> str:
    """`#1, #3`."""
    return ", ".join(f"#{member.number}" for member in members)


def pair_record(a: Member, b: Member) -> Record:
    """What a pair's record begins with."""
    return {
        "numbers": [a.number, b.number],
        "runs": [a.run.name, b.run.name],
        "differ_in": differing(a.run, b.run),
        "notes": [],
    }


def begun_alike(a: Member, b: Member) -> list[str]:
    """A note on two SAEs whose weights were drawn alike: their latents may be alike for that.

    In another model's coordinates, the same start is another.
    """
    starts = [
        (m.run.config.get("seed"), m.run.config.get("init_from"), m.facts["sae"]["d_sae"],
         m.facts["d_in"], m.facts["d_out"], m.facts["model"]["fingerprint"])
        for m in (a, b)
    ]  # fmt: skip
    weights = [m.facts["sha256"]["sae.safetensors"] for m in (a, b)]
    is_foreign = any("source" in m.facts for m in (a, b))  # Their seed is not known.
    if is_foreign or starts[0] != starts[1] or weights[0] == weights[1]:
        return []
    return [BEGUN_ALIKE.format(starts[0][0])]


def differing(a: Run, b: Run) -> list[str]:
    """Config groups of which two runs took another option, and keys that differ elsewhere."""
    chosen = [run.report["choices"] for run in (a, b)]
    found: dict[str, None] = {}
    for key in config_differences([a.config, b.config]).differing:
        group = key.split(".")[0]
        found[group if len({str(c.get(group)) for c in chosen}) > 1 else key] = None
    return list(found)


# -- Directions ----------------------------------------------------------------------------------


def similarities(
    comparison: Comparison, options: SimilarityOptions
) -> tuple[list[Record], list[str]]:
    """Similarity of the dictionaries of each two runs of one space; notes on the others.

    Raises:
        ConfigError: no two runs share a space.
    """
    members, notes = members_of(comparison)
    groups, alone = together(
        members, space_of, "the same weights, site and width", "similarity", notes
    )
    notes += alone
    directions = {}
    for member in itertools.chain.from_iterable(groups):
        directions[member.number], note = directions_of(member)
        notes += note
    records = []
    pairs = [pair for group in groups for pair in itertools.combinations(group, 2)]
    with Progress("similarity", len(pairs), "pairs") as progress:
        for a, b in pairs:
            found = similarity(directions[a.number], directions[b.number], options)
            record = pair_record(a, b) | found
            record["notes"] = begun_alike(a, b)
            record["notes"] += [f"no latent of #{m.number} is alive" for m in (a, b)
                                if not len(directions[m.number].decoder)]  # fmt: skip
            records.append(record)
            progress.advance(1)
    return records, notes


def directions_of(member: Member) -> tuple[Directions, list[str]]:
    """The directions of a run's latents that fired where it was measured.

    Raises:
        StoreError: weights that are not finite.
    """
    sae, fired = load_sae(member.folder), alive(member)
    found = Directions(sae.W_dec.detach(), sae.W_enc_rows.detach())
    if not all(weights.isfinite().all() for weights in found):
        raise StoreError(f"#{member.number} {member.run.name}: its weights are not all finite")
    if fired is None:
        return found, [ALL_ALIVE.format(f"#{member.number}")]
    return Directions(*(weights[fired] for weights in found)), []


def alive(member: Member) -> Bool[Tensor, " d_sae"] | None:
    """Whether each latent fired on the held-out rows; None where it was not measured.

    Raises:
        StoreError: features.parquet is of another width.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = member.run.path / "features.parquet"
    try:
        n_fired = pq.read_table(path, columns=["n_fired"])["n_fired"].to_numpy()
    except (FileNotFoundError, pa.ArrowInvalid):
        return None
    if len(n_fired) != member.facts["sae"]["d_sae"]:
        raise StoreError(f"{path} has {len(n_fired)} latents, {member.folder} another number")
    return torch.from_numpy(n_fired > 0)
