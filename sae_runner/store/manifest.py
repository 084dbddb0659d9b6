"""What a store says of itself: store.json (whose activations), manifest.json (one selection).

outputs/stores/<model>-<dataset>-<fingerprint>/
    store.json                        model, data, options; every site of the model
    <site>-<tokens>/
        manifest.json                 written last: a folder without it is unfinished
        .windows/                     while it is written: a record of each window that is done
        stats.safetensors             train.mean, heldout.mean [d] float64
        train-00000.safetensors …     activations [n, d], norm [n], example_id [n], position [n]
        heldout-00000.safetensors …   (and label [n] where the dataset has labels)
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sae_runner.data.base import Split
from sae_runner.errors import StoreError
from sae_runner.models.base import SiteInfo
from sae_runner.site import TokenSelection

STORE_SCHEMA = "sae-run.store/1"
SELECTION_SCHEMA = "sae-run.selection/1"
REMEDY = (
    "`sae-run cache` with the same words for model, dataset, site and store, and force=true, "
    "writes it again"
)


def selection_dir(store_dir: Path, site: str, selection: TokenSelection) -> Path:
    """The folder of one site and token selection."""
    return store_dir / f"{re.sub(r'[^A-Za-z0-9._-]', '_', site)}-{selection.slug}"


def is_complete(folder: Path) -> bool:
    """Whether a selection is written to its end, and nothing of the writing is left."""
    return (folder / "manifest.json").is_file() and not records_dir(folder).exists()


def records_dir(folder: Path) -> Path:
    """Where a selection keeps a record of each window while it is being written."""
    return folder / ".windows"


def read_json(path: Path, schema: str, what: str) -> dict[str, Any]:
    """A JSON file that must follow `schema`.

    Raises:
        StoreError: absent, no JSON, or of another schema.
    """
    try:
        value: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        raise StoreError(f"{path.parent} is no {what}: it has no {path.name}; {REMEDY}") from None
    except (ValueError, OSError) as error:
        raise StoreError(f"{path} is damaged: {error}; {REMEDY}") from None
    if not isinstance(value, dict) or value.get("schema") != schema:
        found = value.get("schema") if isinstance(value, dict) else type(value).__name__
        raise StoreError(
            f"{path}: schema {found!r}, expected {schema!r}; written by another tool? {REMEDY}"
        )
    return value


def site_to_json(info: SiteInfo) -> dict[str, Any]:
    """A site as JSON."""
    return asdict(info)


def site_from_json(value: Mapping[str, Any]) -> SiteInfo:
    """A site from JSON."""
    grid = value.get("grid")
    return SiteInfo(**{**value, "grid": tuple(grid) if grid else None})


def sites_of(store: Mapping[str, Any]) -> dict[str, SiteInfo]:
    """Every site of the model that a store.json is of."""
    return {name: site_from_json(value) for name, value in store["sites"].items()}


def check_same_source(path: Path, store: Mapping[str, Any], model: str, data: str) -> None:
    """Refuse to add rows of other weights or other data to a store.

    Raises:
        StoreError: the content differs although the configuration is the same.
    """
    for what, found, wanted in (
        ("model weights", store["model"]["fingerprint"], model),
        ("data", store["dataset"]["fingerprint"], data),
    ):
        if found != wanted:
            raise StoreError(
                f"{path} was written from other {what} ({found[:12]}, now {wanted[:12]}): {REMEDY}"
            )


def n_missing(asked: int, splits: Mapping[Split, Mapping[str, Any]], n_unreadable: int) -> int:
    """Rows that shorter examples did not give, where each was asked for so many (0: for all)."""
    n_examples = sum(int(split["n_examples"]) for split in splits.values()) - n_unreadable
    return max(0, n_examples * asked - sum(int(split["n_rows"]) for split in splits.values()))
