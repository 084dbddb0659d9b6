"""Binary tasks on examples: one class against the rest, and which examples a probe sees."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Family = Literal["labels", "text"]
Ints = npt.NDArray[np.int64]
Labels = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Part:
    """The examples of one split that take part in a task."""

    rows: Ints
    """Their places among the pooled examples."""
    y: Labels
    counts: tuple[int, int]
    """How many positives and negatives there were to draw them from."""


@dataclass(frozen=True)
class Task:
    """A question with yes or no for an answer."""

    name: str
    family: str
    """A `Family`, or the file that it is from."""
    train: Part
    test: Part

    def too_few(self, least: int) -> str:
        """Why it cannot be measured, if it cannot: a class with fewer examples than `least`."""
        for split, part in (("train", self.train), ("test", self.test)):
            if min(part.counts) < least:
                return "{} positive and {} negative {} examples".format(*part.counts, split)
        return ""


def balanced(y: Labels, group: Ints, generator: np.random.Generator) -> Ints:
    """Which examples to keep so that both answers are equally frequent.

    Of the more frequent answer they are drawn, as equally from its groups as these allow.
    """
    n = min(int(y.sum()), int((~y).sum()))
    kept = []
    for answer in (True, False):
        candidates = generator.permutation((y == answer).nonzero()[0])
        groups = group[candidates]
        # The rank of each within its group; ties between groups are in a drawn order already.
        order = np.argsort(groups, kind="stable")
        starts = np.searchsorted(groups[order], groups[order])
        rank = np.empty(len(order), dtype=np.int64)
        rank[order] = np.arange(len(order)) - starts
        kept.append(candidates[np.argsort(rank, kind="stable")][:n])
    return np.sort(np.concatenate(kept))


def part_of(
    y: Labels, among: Ints, group: Ints, *, balance: bool, generator: np.random.Generator
) -> Part:
    """The examples at the places `among`, subsampled if they are to be balanced."""
    n_true = int(y[among].sum())
    counts = (n_true, len(among) - n_true)
    if balance:
        among = among[balanced(y[among], group[among], generator)]
    return Part(among, y[among], counts)


def class_tasks(
    train: Ints,
    test: Ints,
    names: Sequence[str],
    *,
    family: str = "labels",
    balance: bool,
    seed: int,
    most: int,
) -> tuple[list[Task], int]:
    """Each class against the rest, the most frequent first; of two classes, the second alone.

    Args:
        train: class of each pooled training example, -1 where it has none.
        test: of each test example.
        names: of the classes.
        family: of the tasks.
        balance: whether to subsample.
        seed: of what is drawn.
        most: as many tasks at most.

    Returns:
        Tasks, and how many classes are left out.
    """
    counts = np.bincount(train[train >= 0], minlength=len(names))
    present = [int(c) for c in np.argsort(-counts, kind="stable") if counts[c]]
    if len(present) == 2:
        present = [max(present)]
    tasks = []
    for c in present[:most]:
        generator = np.random.default_rng([seed, c])
        parts = [
            part_of(label == c, (label >= 0).nonzero()[0], label, balance=balance,
                    generator=generator)
            for label in (train, test)
        ]  # fmt: skip
        tasks.append(Task(names[c], family, *parts))
    return tasks, len(present) - len(tasks)


def text_tasks(
    train: Mapping[str, Labels], test: Mapping[str, Labels], *, balance: bool, seed: int
) -> list[Task]:
    """A task for each question, from its answers for all pooled examples."""
    tasks = []
    for i, name in enumerate(train):
        generator = np.random.default_rng([seed, 2**16 + i])
        parts = [
            part_of(y[name], np.arange(len(y[name])), np.zeros(len(y[name]), dtype=np.int64),
                    balance=balance, generator=generator)
            for y in (train, test)
        ]  # fmt: skip
        tasks.append(Task(name, "text", *parts))
    return tasks
