"""Weights that were trained here: a folder whose name says what decides them.

    <outputs>/models/<name>-<fingerprint>/{weights.safetensors, facts.json}

The folder appears whole or not at all; a second process that wants the same weights waits for the
first and reads what it made.
"""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from sae_runner.config import fingerprint
from sae_runner.data.base import SPLITS, Dataset, Example, Ids, Unreadable, check_bad
from sae_runner.errors import ConfigError, StoreError
from sae_runner.files import atomic, locked, sha256, write_json, write_tensors
from sae_runner.log import duration

WEIGHTS, FACTS = "weights.safetensors", "facts.json"
TRAINING = "training"
"""What a training that was stopped needs to go on, in the folder of its model until it is done."""

log = logging.getLogger("sae_runner")


class Artefact(NamedTuple):
    """Trained weights and what is known of them."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]
    """What `train` measured; `identity`, `sha256` and `path` where they were trained here."""


def trained(
    outputs: Path,
    name: str,
    identity: Mapping[str, Any],
    train: Callable[[Path], tuple[Mapping[str, Tensor], Mapping[str, Any]]],
) -> Artefact:
    """The weights that `identity` decides, from disk or from `train`.

    Args:
        outputs: the folder of all results.
        name: begins the folder's name.
        identity: JSON of everything that decides the weights (seed, sizes, data, budget).
        train: gives the weights and the facts to keep beside them, e.g. held-out accuracy; what it
            needs to go on after a stop it may keep in the folder that it is given.

    Raises:
        StoreError: the folder exists but is damaged.
    """
    folder = Path(outputs) / "models" / f"{name}-{fingerprint(identity)}"
    with locked(folder):
        if not (folder / FACTS).is_file():
            start = time.perf_counter()
            tensors, facts = train(folder / TRAINING)
            with atomic(folder) as temporary:
                write_tensors(temporary / WEIGHTS, tensors)
                digest = sha256(temporary / WEIGHTS)
                write_json(
                    temporary / FACTS, {**facts, "identity": dict(identity), "sha256": digest}
                )
            took = duration(time.perf_counter() - start)
            log.info("trained %s in %s: %s", name, took, folder)
    return load(folder)


def load(path: str | Path) -> Artefact:
    """The weights in an artefact's folder, or in a bare .safetensors file.

    Raises:
        ConfigError: there is nothing to read at `path`.
        StoreError: the weights are not those that the facts were written for.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(path).expanduser()
    file = path / WEIGHTS if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(f"model.weights={path}: no file {file}")
    if file.suffix != ".safetensors":
        raise ConfigError(f"model.weights={path}: only .safetensors files are read")
    facts: dict[str, Any] = {}
    if (file.parent / FACTS).is_file() and file.name == WEIGHTS:
        try:
            facts = json.loads((file.parent / FACTS).read_text())
        except ValueError as error:
            raise StoreError(f"{file.parent / FACTS} is no JSON: {error}") from None
        if "sha256" in facts and facts["sha256"] != sha256(file):
            raise StoreError(f"{file}: not the bytes that {FACTS} was written for; delete {path}")
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise StoreError(f"{file} is no safetensors file: {error}") from None
    return Artefact(tensors, {**facts, "path": str(file.parent if path.is_dir() else file)})


def assign(network: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Copy weights into a network that has exactly these.

    Raises:
        ConfigError: a tensor is missing, surplus or of another shape; `where` begins the line.
    """
    own = network.state_dict()
    if odd := sorted(own.keys() ^ tensors.keys()):
        lacks = "the file lacks" if odd[0] in own else "the model has no"
        raise ConfigError(f"{where}: {lacks} tensor {odd[0]!r} ({len(odd)} do not match)")
    for name, tensor in own.items():
        if tensor.shape != tensors[name].shape:
            found, wanted = tuple(tensors[name].shape), tuple(tensor.shape)
            raise ConfigError(f"{where}: {name} has shape {found}, the model needs {wanted}")
    network.load_state_dict(dict(tensors))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers of the CPU's global generator from `seed`; its own go on afterwards.

    Constructors of libraries draw their weights from the global generator.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def identity_of(dataset: Dataset) -> dict[str, str]:
    """Which data, and which of them are for training."""
    train_ids = dataset.ids("train").tobytes()
    return {
        "fingerprint": dataset.fingerprint(),
        "train_ids": hashlib.sha256(train_ids).hexdigest(),
    }


def chunks_of(dataset: Dataset, ids: Ids, size: int = 512) -> Iterator[list[Example]]:
    """The readable examples of `ids`, which are of one split, `size` at a time.

    Raises:
        DataError: of these and of the other split's more than `dataset.max_bad` are unreadable.
    """
    others = [split for split in SPLITS if not np.isin(ids[:1], dataset.ids(split)).any()]
    n_examples = len(ids) + sum(len(dataset.ids(split)) for split in others)
    n_bad = 0
    for start in range(0, len(ids), size):
        found = dataset.load(ids[start : start + size])
        bad = [example for example in found if isinstance(example, Unreadable)]
        n_bad += len(bad)
        check_bad(bad, n_bad, n_examples, dataset.max_bad)
        if good := [example for example in found if isinstance(example, Example)]:
            yield good
