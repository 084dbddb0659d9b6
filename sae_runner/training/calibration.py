"""Thresholds of what is saved, measured on held-out rows."""

from collections.abc import Iterator

from torch import Tensor

from sae_runner.saes.base import SAE
from sae_runner.store.activations import Activations
from sae_runner.training.options import TrainOptions

N_AT_HAND = 8192
"""Rows that stay in memory; by them the L0 of a threshold is right within a percent or two."""


class Calibration:
    """Measures the threshold of an SAE: on all rows that are asked for, or on some at hand.

    All are for what is kept. A checkpoint that only a resume needs is written every few minutes,
    and when a signal asks for the end: it must not wait for a pass over the store, nor for a model
    that computes the rows.
    """

    def __init__(self, store: Activations, options: TrainOptions) -> None:
        self.store, self.batch_size = store, options.batch_size
        self.n_rows = options.n_calibration
        self.at_hand = list[Tensor]()

    def begin(self) -> None:
        """Take rows into memory; they are no part of the state, for a store has them again."""
        self.at_hand = list(self._first(min(self.n_rows, N_AT_HAND)))

    def measure(self, sae: SAE, *, on_all: bool) -> float:
        """Set the threshold of `sae`; the mean L0 with it."""
        device = sae.b_dec.device
        rows = self._first(self.n_rows) if on_all else iter(self.at_hand)
        return sae.calibrate((x.to(device) for x in rows), self.n_rows)

    def _first(self, n: int) -> Iterator[Tensor]:
        return (part.x for part in self.store.rows("heldout", self.batch_size, n))
