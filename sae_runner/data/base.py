"""What a dataset is: examples with stable ids, read at random, split once and for all.

An example's id is its position in the unshuffled dataset. A split is decided by example (for
running text: by document, before anything is packed), so that neither an SAE nor a model that
trains here ever sees what it is measured on.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from sae_runner.errors import DataError

Split = Literal["train", "heldout"]
SPLITS: tuple[Split, Split] = ("train", "heldout")
Ids = npt.NDArray[np.int64]
MOST_NAMED = 5
"""Unreadable examples that are named; more are counted."""

log = logging.getLogger("sae_runner")


class Example(NamedTuple):
    """One input as the dataset holds it, before any model's preprocessing."""

    id: int
    """Position in the unshuffled dataset."""
    value: Any
    """A PIL image, a string, an int array of tokens, or a float array (`rows`)."""
    label: int | None = None
    """Class index into `Dataset.label_names`, if the dataset is labelled."""
    caption: str | None = None
    """Text that goes with an image, if there is one."""


class Unreadable(NamedTuple):
    """An example that could not be read: counted and named, never silently replaced."""

    id: int
    reason: str


def refuse_bad(
    n_bad: int, n_examples: int, max_bad: float, example: Unreadable | None = None
) -> None:
    """Refuse to go on when more than `max_bad` of everything could not be read.

    Raises:
        DataError: past the limit; `example` is named.
    """
    if n_bad > max_bad * n_examples:
        one = f", e.g. {example.id}: {example.reason}" if example else ""
        raise DataError(
            f"dataset.max_bad={max_bad:g}: {n_bad} of {n_examples} examples are unreadable{one}"
        )


def check_bad(new: Sequence[Unreadable], n_bad: int, n_examples: int, max_bad: float) -> None:
    """Name what could not be read; refuse to go on when it is more than `max_bad` of everything.

    Raises:
        DataError: past the limit.
    """
    named = new[: max(0, MOST_NAMED - (n_bad - len(new)))]
    for example in named:
        log.warning("unreadable example %d: %s", example.id, example.reason)
    if len(named) < len(new):
        log.warning("%d unreadable examples so far", n_bad)
    refuse_bad(n_bad, n_examples, max_bad, new[0] if new else None)


class Dataset(ABC):
    """Examples by id, in two splits that never mix."""

    modality: Literal["image", "text", "tokens", "rows"]
    """`text`: one string per example; `tokens`: rows of token ids, already packed."""
    name: str = ""
    label_names: tuple[str, ...] | None = None
    random_access: bool = True
    """Whether any id can be read at any time; a stream is read in ascending order only."""
    limits: Mapping[Split, int | None] = MappingProxyType({})
    """`dataset.n_examples` and `dataset.n_heldout`, where a dataset has them."""
    max_bad: float = 0.0
    """`dataset.max_bad`, the share that may be unreadable; none, unless a config says so."""

    @abstractmethod
    def ids(self, split: Split) -> Ids:
        """Ids of a split, ascending."""

    @abstractmethod
    def load(self, ids: Sequence[int] | Ids) -> list[Example | Unreadable]:
        """The examples of `ids`, in that order. Safe to call from several threads."""

    @abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 over what decides the content of the examples (hex)."""

    def describe(self) -> dict[str, Any]:
        """What a report says about the data."""
        return {
            "name": self.name,
            "modality": self.modality,
            "n_train": len(self.ids("train")),
            "n_heldout": len(self.ids("heldout")),
            "label_names": list(self.label_names) if self.label_names else None,
            "fingerprint": self.fingerprint(),
        }


def split_ids(n: int, split: Split, *, heldout: float, seed: int, limit: int | None = None) -> Ids:
    """Ascending ids of one split of `n` examples; both splits come from one seeded permutation.

    Args:
        n: how many examples there are.
        split: which part.
        heldout: share of the examples that is never trained on.
        seed: decides who is in which part.
        limit: at most so many examples, a seeded sample of the split.

    Raises:
        DataError: a split would be empty.
    """
    order = np.random.default_rng(seed).permutation(n)
    n_heldout = max(1, round(n * heldout))
    if n_heldout >= n:
        raise DataError(f"dataset of {n} examples cannot be split with dataset.heldout={heldout}")
    chosen = order[:n_heldout] if split == "heldout" else order[n_heldout:]
    return np.sort(chosen[:limit]).astype(np.int64)
