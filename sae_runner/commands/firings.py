"""Latents and raw coordinates of runs on the same held-out rows, for what compares their firing."""

import itertools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from sae_runner.checkpoint import load_sae
from sae_runner.commands.between import Member, Record, begun_alike, on_same_data, pair_record
from sae_runner.errors import ConfigError, StoreError
from sae_runner.evaluators._codes import Codes
from sae_runner.evaluators._collecting import CodesCollector, hashed
from sae_runner.evaluators.base import Rows
from sae_runner.log import Progress
from sae_runner.report.comparison import Comparison
from sae_runner.report.firing import firing, keys_of, unit_keys
from sae_runner.report.options import FiringOptions
from sae_runner.saes.base import SAE
from sae_runner.site import layout_key
from sae_runner.store.reader import ActivationStore

UNBOUNDED = 2**62


def firings(comparison: Comparison, options: FiringOptions) -> tuple[list[Record], list[str]]:
    """How alike the latents of each two runs of one dataset fire; notes on the others.

    Raises:
        ConfigError: no two runs have stored rows of the same examples.
    """
    stores, groups, notes = on_same_data(comparison, store_of, "stored rows of", "firing")
    pairs = [pair for group in groups for pair in itertools.combinations(group, 2)]
    codes = {}
    for group in groups:
        ids = sampled([stores[m.number] for m in group], options)
        for m in group:
            codes[m.number] = codes_of(
                load_sae(m.folder), stores[m.number], ids, options.batch_size
            )
    records = []
    with Progress("firing", len(pairs), "pairs") as progress:
        for a, b in pairs:
            by_row = layout(a, stores[a.number]) == layout(b, stores[b.number])
            both = codes[a.number], codes[b.number]
            with tempfile.TemporaryDirectory() as folder:
                neurons = None
                if options.neurons:
                    coordinates = [
                        coordinates_of(
                            stores[m.number], own, by_row, options.batch_size, Path(folder) / str(i)
                        )
                        for i, (m, own) in enumerate(zip((a, b), both, strict=True))
                    ]
                    neurons = [(x, np.arange(len(x))) for x in coordinates]
                found = firing(*both, by_row=by_row, seed=options.seed, neurons=neurons)
            record = pair_record(a, b) | found
            record["notes"] = begun_alike(a, b)
            if None in found.values():
                record["notes"] += [f"no latent varies over the {found['n_units']} units"]
            records.append(record)
            progress.advance(1)
    return records, notes


def store_of(member: Member) -> ActivationStore:
    """The rows that a run was trained on and measured with.

    Raises:
        InputError: they were streamed, are gone, or are no longer those rows.
    """
    where = str(member.facts["store"])
    if where == "stream":
        raise StoreError("its rows were not stored (store=stream)")
    below = Path(*Path(where).parts[-3:])  # Where `outputs` has been moved as a whole.
    folder = next(
        (p for p in (Path(where), member.run.path.parent.parent / below) if p.is_dir()), None
    )
    if folder is None:
        raise StoreError(
            f"its store {where} is gone; `sae-run eval checkpoint={member.run.path} force=true` "
            "writes it again"
        )
    limit = member.run.config.get("store.max_norm_multiple")
    store = ActivationStore(folder, max_norm_multiple=limit)
    for what in ("model", "dataset"):
        if store.source[what]["fingerprint"] != member.facts[what]["fingerprint"]:
            raise StoreError(f"its store {folder} was written again, from another {what}")
    return store


def layout(member: Member, store: ActivationStore) -> tuple[Any, ...]:
    """What two runs must share for their rows to be of the same tokens."""
    return (*layout_key(store.site), member.facts["tokens"])


def sampled(stores: Sequence[ActivationStore], options: FiringOptions) -> Int64[Tensor, " n"]:
    """Ids of held-out examples that all have: a seeded sample of at most `n_rows` rows in each.

    Raises:
        ConfigError: they have none in common.
    """
    ids = [store.example_ids("heldout") for store in stores]
    shared = ids[0]
    for other in ids[1:]:
        shared = np.intersect1d(shared, other, assume_unique=True)
    if not len(shared):
        raise ConfigError("compare=firing: the runs' stores have no held-out example in common")
    most = max(store.n_rows("heldout") / len(own) for store, own in zip(stores, ids, strict=True))
    chosen = shared[np.argsort(hashed(shared, options.seed))][: max(2, int(options.n_rows / most))]
    return torch.from_numpy(np.sort(chosen))


def codes_of(sae: SAE, store: ActivationStore, ids: Int64[Tensor, " n"], batch_size: int) -> Codes:
    """An SAE's latents on the held-out rows of some examples."""
    kept = CodesCollector(UNBOUNDED, seed=0)
    with Progress("encoding", store.n_rows("heldout"), "rows") as progress:
        for rows in store.rows("heldout", batch_size):
            wanted = torch.isin(rows.example_id, ids)
            progress.advance(len(wanted))
            if wanted.any():
                x = rows.x[wanted]
                kept.add(Rows(x, sae(x).latents, x, rows.example_id[wanted], rows.position[wanted],
                              None))  # fmt: skip
    return kept.finish()


def coordinates_of(
    store: ActivationStore, codes: Codes, by_row: bool, batch_size: int, path: Path
) -> Any:
    """The coordinates of the site that an SAE reads, on the units of its latents, in a file.

    Float32 [rows, d], or [examples, d] with each coordinate at its greatest in the example.
    """
    keys = keys_of(codes, by_row)
    found = np.memmap(path, np.float32, "w+", shape=(len(keys), store.d_in))
    if not by_row:
        found[:] = -np.inf
    with Progress("coordinates", store.n_rows("heldout"), "rows") as progress:
        for rows in store.rows("heldout", batch_size):
            progress.advance(len(rows.x))
            wanted = torch.isin(rows.example_id, codes.example_ids)
            x, ids = rows.x[wanted].float().numpy(), rows.example_id[wanted].numpy()
            if by_row:
                found[np.searchsorted(keys, unit_keys(ids, rows.position[wanted].numpy()))] = x
            else:
                np.maximum.at(found, np.searchsorted(keys, ids), x)
    return found
