"""Batches of the model's own inputs, shuffled without end: for what is judged by running it.

Of the training split, as the rows of a store are, and with positions of the same kind: batch t is a
function of (seed, t) alone, and every example comes exactly once an epoch.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from sae_runner.data.base import Dataset, Ids
from sae_runner.errors import ConfigError
from sae_runner.models.base import Inputs, Model, SiteInfo
from sae_runner.site import TokenSelection
from sae_runner.store.activations import CPU, Position
from sae_runner.store.loading import load_chunks

_TAG = 0x657832  # "ex2"


class InputBatch(NamedTuple):
    """One training batch of examples."""

    x: Inputs
    position: Position
    """Where the stream stands after this batch: its `offset` counts examples of the epoch."""


class ShuffledInputs:
    """The examples of the training split, read and preprocessed, in batches without end.

    Args:
        model: prepares the examples.
        dataset: as the model reads it.
        site: whose tokens become rows.
        selection: which of them.
        n_rows: how many rows the split gives in all, which tells how many an example gives.
        workers: threads that read ahead; 0 reads in the caller's.

    Raises:
        ConfigError: see `refuse`.
    """

    def __init__(
        self,
        model: Model,
        dataset: Dataset,
        site: SiteInfo,
        selection: TokenSelection,
        *,
        n_rows: int,
        workers: int,
    ) -> None:
        self.refuse(dataset)
        self.model, self.dataset, self.site, self.selection = model, dataset, site, selection
        self.ids, self.workers = dataset.ids("train"), workers
        self.rows_per_example = max(n_rows, 1) / len(self.ids)
        """On average."""

    @staticmethod
    def refuse(dataset: Dataset) -> None:
        """Refuse a dataset whose examples cannot be read in any order.

        Raises:
            ConfigError: it is one.
        """
        if not dataset.random_access:
            raise ConfigError(
                f"dataset={dataset.name}: its examples come in an order of their own, and "
                "trainer/objective=e2e shuffles them; set dataset.streaming=false"
            )

    def n_examples(self, batch_size: int) -> int:
        """How many examples give `batch_size` rows on average; at least one."""
        return max(1, round(batch_size / self.rows_per_example))

    def shuffled(
        self, batch_size: int, seed: int, *, start: Position, device: torch.device = CPU
    ) -> Iterator[InputBatch]:
        """Batches of so many examples as `n_examples` says, on `device`.

        Examples that cannot be read are left out (the store has named them), and so are those
        without any row.
        """
        n, size, position = self.n_examples(batch_size), len(self.ids), start
        for loaded in load_chunks(
            self.dataset, self.model, self._chunks(n, seed, start), self.workers
        ):
            out = position.offset + n
            position = Position(position.epoch + out // size, 0, out % size)
            inputs = None if loaded.inputs is None else self._with_rows(loaded.inputs)
            if inputs is not None:
                yield InputBatch(inputs.to(device), position)

    def _chunks(self, n: int, seed: int, start: Position) -> Iterator[Ids]:
        """Ids of n examples at a time; in a chunk ascending: neighbours are read together."""
        epoch = start.epoch
        waiting = self._order(seed, epoch)[start.offset :]
        while True:
            while len(waiting) < n:
                epoch += 1
                waiting = np.concatenate([waiting, self._order(seed, epoch)])
            yield np.sort(waiting[:n])
            waiting = waiting[n:]

    def _order(self, seed: int, epoch: int) -> Ids:
        return np.random.default_rng([seed, epoch, _TAG]).permutation(self.ids)

    def _with_rows(self, inputs: Inputs) -> Inputs | None:
        """The examples that have a selected token, if there are any."""
        n_tokens = self.site.n_tokens
        if n_tokens is None:
            if inputs.attended is None:
                return inputs
            n_tokens = inputs.attended.shape[1]
        some = self.selection.mask(self.site, inputs, n_tokens).any(1)
        if some.all():
            return inputs
        return inputs.map(lambda tensor: tensor[some]) if some.any() else None
