"""What latents say for the next token, as runs kept it: read, and compared two by two."""

import itertools

import numpy as np

from sae_runner.commands.between import Member, Record, begun_alike, on_same_data, pair_record
from sae_runner.commands.corpora import folder_of
from sae_runner.errors import StoreError
from sae_runner.log import Progress
from sae_runner.report.attribution import Attributions, attribution
from sae_runner.report.comparison import Comparison
from sae_runner.report.options import AttributionOptions

TYPE, KEPT = "attribution", "attributions"
MEASURING = f"`sae-run eval checkpoint={{}} evaluators=[{TYPE}]` does"
OTHER_TOKEN = "the next token differs at {:,} of {:,} common rows, which are left out"
NO_NEURONS = f"#{{}} kept no attributions of raw coordinates; {MEASURING}"


def attributions(
    comparison: Comparison, options: AttributionOptions
) -> tuple[list[Record], list[str]]:
    """How alike the attributions of each two runs of one dataset are; notes on the others.

    Raises:
        ConfigError: no two runs kept attributions on the same data.
    """
    kept, groups, notes = on_same_data(comparison, attributions_of, "attributions on", TYPE)
    records = []
    pairs = [pair for group in groups for pair in itertools.combinations(group, 2)]
    with Progress("attribution", len(pairs), "pairs") as progress:
        for a, b in pairs:
            found, why = attribution(
                kept[a.number], kept[b.number], neurons=options.neurons, seed=options.seed
            )
            notes_of = begun_alike(a, b)
            if why:
                notes_of.append(why)
            elif found["n_other_token"]:
                notes_of.append(OTHER_TOKEN.format(found["n_other_token"], found["n_common"]))
            if options.neurons:
                notes_of += [NO_NEURONS.format(m.number, m.run.path) for m in (a, b)
                            if kept[m.number].neurons is None]  # fmt: skip
            records.append({**pair_record(a, b), "notes": notes_of, **found})
            progress.advance(1)
    return records, notes


def name_of(member: Member) -> str:
    """The evaluator of a run that kept attributions; the empty string if none did."""
    named = member.run.evaluators.items()
    return next(
        (
            name for name, envelope in named
            if envelope["type"] == TYPE and KEPT in envelope["artifacts"].get("arrays", {})
        ),
        "",
    )  # fmt: skip


def attributions_of(member: Member) -> Attributions:
    """What the evaluator of a run kept; its dense part memory-mapped.

    Raises:
        StoreError: there is none, or the file is damaged.
    """
    from safetensors import SafetensorError, safe_open
    from scipy.sparse import csr_array

    if not (name := name_of(member)):
        raise StoreError(f"it kept none; {MEASURING.format(member.run.path)}")
    envelope = member.run.evaluators[name]
    path = folder_of(member) / str(envelope["artifacts"]["arrays"][KEPT])
    try:
        with safe_open(path, "pt") as file:  # Which reads nothing before it is used.
            found = {key: file.get_tensor(key).numpy() for key in file.keys()}  # noqa: SIM118
        entries = (found["values"], found["indices"], found["offsets"])
        shape = (len(found["offsets"]) - 1, int(envelope["sae"]["d_sae"]))
        matrix = csr_array(entries, shape=shape)
        matrix.check_format(full_check=True)
        ids, place, token = (
            found[key].astype(np.int64) for key in ("example_id", "position", "next_token")
        )
        neurons = found.get("neurons")
        columns = [ids, place, token, *([] if neurons is None else [neurons])]
        if any(len(column) != shape[0] for column in columns):
            raise ValueError("columns of several lengths")
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise StoreError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    return Attributions(ids, place, token, matrix, neurons)
