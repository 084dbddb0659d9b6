"""Files of tasks: which there are, and whether a probe can be made of each."""

import re
from collections.abc import Sequence

import numpy as np

from sae_runner.data._labelled_files import LabelledFile
from sae_runner.data.base import SPLITS, Split
from sae_runner.errors import ConfigError, DataError
from sae_runner.evaluators._given_files import given_files

OWN = ("labels", "text")
"""Families that are no files."""


def opened(patterns: Sequence[str], *, seed: int, n_train: int, n_test: int) -> list[LabelledFile]:
    """The files that paths and globs mean, each with as many examples of its splits at most.

    Raises:
        ConfigError: none is there, or one that is no file of labelled examples.
    """
    files = []
    for path in given_files("files", patterns):
        limits: dict[Split, int | None] = {"train": n_train, "heldout": n_test}
        try:
            files.append(LabelledFile(path, seed=seed, limits=limits, where=f"files={path}"))
        except DataError as error:
            raise ConfigError(str(error)) from None
    return files


def family_of(file: LabelledFile) -> str:
    """The name of a file's tasks in names of metrics."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", file.name)


def names_of_tasks(file: LabelledFile) -> list[str]:
    """Of each class against the rest: the file's name, with that of the class if there are many."""
    names = file.label_names or ()
    return [file.name if len(names) == 2 else f"{file.name}/{name}" for name in names]


def check_files(files: Sequence[LabelledFile], reads: str, least: int) -> None:
    """Refuse files that a model does not read, or that have too few examples of their classes.

    Args:
        files: all of them.
        reads: the model's modality.
        least: examples of either answer, in either split, that a task needs.

    Raises:
        ConfigError: one of these, or two files by one name.
    """
    known = dict.fromkeys(OWN, "a family of tasks of the dataset")
    for file in files:
        if (other := known.get(family_of(file))) is not None:
            raise ConfigError(f"{file.where}: {family_of(file)!r} is {other} already; rename it")
        known[family_of(file)] = str(file.path)
        if file.modality != reads:
            raise ConfigError(
                f"{file.where}: its inputs are {file.modality}, and the model reads {reads}"
            )
        names = file.label_names or ()
        if len(names) < 2:
            raise ConfigError(
                f"{file.where}: it has one class, {names[0]!r}: nothing to tell apart"
            )
        counts = np.array([
            np.bincount(file.classes[file.ids(split)], minlength=len(names)) for split in SPLITS
        ])  # fmt: skip
        rest = counts.sum(1, keepdims=True) - counts
        if not ((counts >= least) & (rest >= least)).all(0).any():
            split, c = np.unravel_index(int(counts.argmin()), counts.shape)
            raise ConfigError(
                f"{file.where}: {counts[split, c]} examples of {names[c]!r} to "
                f"{('train', 'test')[split]} on; at least min_per_class={least} of either answer"
            )
