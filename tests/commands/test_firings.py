from pathlib import Path
from typing import Any

import numpy as np
import torch
from codes_fixtures import codes_of

from sae_runner.commands.firings import coordinates_of
from sae_runner.evaluators.base import Rows
from sae_runner.saes.base import Latents
from sae_runner.store.reader import ActivationStore


class Store(ActivationStore):
    """Rows of some examples, in an order that is not theirs."""

    def __init__(self) -> None:
        self.ids = torch.tensor([7, 3, 5, 3, 7, 9])
        self.places = torch.tensor([1, 0, 0, 1, 0, 0])
        self.x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)) - 5

    @property
    def d_in(self) -> int:
        return 3

    def n_rows(self, split: Any) -> int:
        return len(self.x)

    def rows(self, split: Any, batch_size: int, *_: Any, **__: Any) -> Any:
        for at in torch.arange(6).split(batch_size):
            latents = Latents.from_dense(torch.ones(len(at), 1))
            yield Rows(self.x[at], latents, self.x[at], self.ids[at], self.places[at], None)


def test_coordinates_are_in_the_order_of_the_units_and_of_an_example_the_greatest(
    tmp_path: Path,
) -> None:
    store = Store()
    order = [3, 1, 4, 0]  # Examples 3 and 7; 5 and 9 are not among the codes.
    codes = codes_of(torch.ones(4, 2), ids=store.ids[order], position=store.places[order])
    for batch in (2, 6):
        rows = coordinates_of(store, codes, True, batch, tmp_path / "r")
        np.testing.assert_array_equal(rows, store.x[[1, 3, 4, 0]].numpy())
        peaks = coordinates_of(store, codes, False, batch, tmp_path / "e")
        expected = [store.x[[1, 3]].amax(0).numpy(), store.x[[0, 4]].amax(0).numpy()]
        np.testing.assert_array_equal(peaks, expected)
