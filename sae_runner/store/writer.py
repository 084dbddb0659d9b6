"""Run a model once over a dataset and write activations, window by window.

A killed write goes on at the first window that is not there, and ends with the same bytes as one
that was never stopped: a window's rows and their order depend on nothing outside it.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_runner import files
from sae_runner.data.base import SPLITS, Dataset, Split, check_bad
from sae_runner.errors import DataError
from sae_runner.log import Progress
from sae_runner.models._precision import DTYPES
from sae_runner.models.base import Model, SiteInfo
from sae_runner.site import TokenSelection
from sae_runner.store.manifest import (
    SELECTION_SCHEMA,
    STORE_SCHEMA,
    check_same_source,
    is_complete,
    n_missing,
    read_json,
    records_dir,
    selection_dir,
    site_to_json,
)
from sae_runner.store.window import WindowPlan, WindowRows, compute_window

log = logging.getLogger("sae_runner")


def begin_store(
    store_dir: Path,
    model: Model,
    dataset: Dataset,
    config: dict[str, Any],
    names: dict[str, str],
    source: dict[str, str] | None = None,
) -> None:
    """Write store.json, or check that the one there is of the same weights and data."""
    files.remove_partials(store_dir)
    fingerprints = (model.fingerprint(), dataset.fingerprint())
    if (store_dir / "store.json").exists():
        store = read_json(store_dir / "store.json", STORE_SCHEMA, "activation store")
        return check_same_source(store_dir, store, *fingerprints)
    files.write_json(
        store_dir / "store.json",
        {
            "schema": STORE_SCHEMA,
            "model": {
                "name": names["model"],
                "fingerprint": fingerprints[0],
                **model.describe(),
            },
            "dataset": {**dataset.describe(), "name": names["dataset"]},
            "config": config,
            "source": source or {},
            "sites": {name: site_to_json(info) for name, info in model.sites().items()},
        },
    )


def estimate_bytes(plan: WindowPlan, rows_per_example: int, d: int, dtype: str) -> int:
    """The most that one selection will take on disk."""
    n_examples = sum(len(ids) for ids in plan.ids.values())
    return n_examples * rows_per_example * (d * DTYPES[dtype].itemsize + 16)


def write_selections(
    store_dir: Path,
    model: Model,
    dataset: Dataset,
    infos: Sequence[SiteInfo],
    selection: TokenSelection,
    plan: WindowPlan,
    *,
    dtype: str,
    batch_size: int,
    workers: int,
    max_bad: float,
) -> None:
    """Write the selections of `infos`, which share rows, in one pass of the model over the data.

    Raises:
        DataError: NaN, Inf or overflow in an activation; more than `max_bad` unreadable examples.
        InputError: not enough disk.
    """
    every = {info: selection_dir(store_dir, info.name, selection) for info in infos}
    for folder in every.values():
        if (folder / "manifest.json").is_file():
            files.remove(records_dir(folder))
        files.remove_partials(folder)
        files.remove_partials(records_dir(folder))
    infos = [info for info in infos if not is_complete(every[info])]
    folders = {info.name: every[info] for info in infos}
    if not infos:
        return
    todo: dict[bool, list[tuple[Split, int]]] = {True: [], False: []}
    for split in SPLITS:
        for window in range(plan.n_windows(split)):
            done = all(_done(folder, split, window) for folder in folders.values())
            todo[done].append((split, window))
    written, missing = todo[True], todo[False]
    if written:
        log.info("%d of %d windows are there already", len(written), len(written + missing))
    n_examples = sum(map(len, plan.ids.values()))
    n_done = sum(len(plan.examples(*window)) for window in written)
    n_bad = sum(len(_bad(folders[infos[0].name], *window)) for window in written)
    progress = Progress("cache", n_examples, "examples", done=n_done)
    with progress, ThreadPoolExecutor(1, thread_name_prefix="write") as pool:
        writing: Future[None] | None = None
        for split, window in missing:
            rows = compute_window(
                model, dataset, infos, selection, plan, split, window,
                batch_size=batch_size, workers=workers, dtype=dtype,
                on_batch=progress.advance,
            )  # fmt: skip
            n_bad += len(rows.bad)
            check_bad(rows.bad, n_bad, n_examples, max_bad)
            if writing:
                writing.result()  # At most one window waits to be written: memory stays bounded.
            writing = pool.submit(_write_window, folders, split, window, rows)
            progress.advance(0, f"{n_bad} unreadable" if n_bad else "")
        if writing:
            writing.result()
    for info in infos:
        _finish(folders[info.name], info, selection, plan, dtype)


def _done(folder: Path, split: Split, window: int) -> bool:
    return _record(folder, split, window).is_file()


def _bad(folder: Path, split: Split, window: int) -> list[Any]:
    found: list[Any] = json.loads(_record(folder, split, window).read_text())["bad"]
    return found


def _record(folder: Path, split: Split, window: int) -> Path:
    return records_dir(folder) / f"{split}-{window:05d}.json"


def _write_window(folders: dict[str, Path], split: Split, window: int, rows: WindowRows) -> None:
    """One shard for each site, then its record: a shard counts only once that is there."""
    for name, folder in folders.items():
        x = rows.activations.pop(name)
        tensors: dict[str, Tensor] = {
            "activations": x,
            "example_id": rows.example_id,
            "position": rows.position,
            "norm": torch.linalg.vector_norm(x, dim=1, dtype=torch.float32),
        }
        if rows.label is not None:
            tensors["label"] = rows.label
        path = folder / f"{split}-{window:05d}.safetensors"
        files.write_tensors(path, tensors)
        norms = tensors["norm"].double()
        record = {
            **_file(path),
            "rows": len(x),
            "sum": column_sums(x).tolist(),
            "sum_norm": float(norms.sum()),
            "sum_square_norm": float(norms.square().sum()),
            "bad": [bad._asdict() for bad in rows.bad],
        }
        files.write_json(_record(folder, split, window), record)


def _file(path: Path) -> dict[str, Any]:
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": files.sha256(path)}


def column_sums(x: Tensor) -> Tensor:
    """Sum of the rows [d] in float64, without a float64 copy of all of x."""
    return torch.stack([part.double().sum(0) for part in torch.split(x, 8192)]).sum(0)


def _finish(
    folder: Path, info: SiteInfo, selection: TokenSelection, plan: WindowPlan, dtype: str
) -> None:
    """Gather the records into the manifest, which makes the selection complete."""
    splits, means, bad = {}, {}, []
    for split in SPLITS:
        paths = [_record(folder, split, w) for w in range(plan.n_windows(split))]
        records = [json.loads(path.read_text()) for path in paths]
        n_rows = sum(r["rows"] for r in records)
        if not n_rows:
            raise DataError(
                f"site.tokens={selection.tokens}: no token of the {split} split is left at "
                f"{info.name}; see site.drop_special, site.drop_positions, dataset.max_bad"
            )
        means[f"{split}.mean"] = (
            torch.tensor([r["sum"] for r in records], dtype=torch.float64).sum(0) / n_rows
        )
        bad += [b for r in records for b in r["bad"]]
        splits[split] = {
            "n_examples": len(plan.ids[split]),
            "n_rows": n_rows,
            "mean_norm": sum(r["sum_norm"] for r in records) / n_rows,
            "mean_square_norm": sum(r["sum_square_norm"] for r in records) / n_rows,
            "shards": [{k: r[k] for k in ("file", "rows", "bytes", "sha256")} for r in records],
        }
    stats = folder / "stats.safetensors"
    files.write_tensors(stats, means)
    files.write_json(
        folder / "manifest.json",
        {
            "schema": SELECTION_SCHEMA,
            "site": site_to_json(info),
            "selection": asdict(selection),
            "d": info.d,
            "dtype": dtype,
            "seed": plan.seed,
            "window_examples": plan.window_examples,
            "window_rows": plan.window_rows,
            "splits": splits,
            "stats": _file(stats),
            "unreadable": bad,
        },
    )
    files.remove(records_dir(folder))
    _say_missing(info, selection, splits, len(bad))


def _say_missing(
    info: SiteInfo, selection: TokenSelection, splits: Mapping[Split, dict[str, Any]], n_bad: int
) -> None:
    """Count the rows that shorter examples did not give, where each was asked for so many."""
    if n := n_missing(selection.rows_asked, splits, n_bad):
        log.warning(
            "site.tokens=%s: %s of %s rows of %s are not there, where an example has fewer tokens",
            selection.tokens, f"{n:,}",
            f"{n + sum(split['n_rows'] for split in splits.values()):,}", info.name,
        )  # fmt: skip
