"""What stores and runs are called: by content, so that whoever composes the same finds the same."""

from collections.abc import Mapping
from typing import Any

from sae_runner.config import fingerprint

STORE_GROUPS = ("model", "dataset")
STORE_KEYS = ("dtype", "seed", "window_rows")
RUN_GROUPS = ("model", "site", "dataset", "store", "sae", "trainer", "seed", "init_from")


def store_identity(groups: Mapping[str, Any], store: Mapping[str, Any]) -> dict[str, Any]:
    """What decides the bytes of a store, from the identity of a config and its store options.

    A run's own record of its identity serves too: `store_identity(recorded, recorded["store"])`.
    """
    return {
        **{group: groups[group] for group in STORE_GROUPS},
        "store": {key: store[key] for key in STORE_KEYS},
    }


def store_name(choices: Mapping[str, str], identity: Mapping[str, Any]) -> str:
    """`<model>-<dataset>-<fingerprint>`."""
    return f"{choices['model']}-{choices['dataset']}-{fingerprint(identity)}"


def run_name(choices: Mapping[str, str], identity: Mapping[str, Any]) -> str:
    """`<model>-<sae>-<fingerprint>`."""
    return f"{choices['model']}-{choices['sae']}-{fingerprint(identity)}"
