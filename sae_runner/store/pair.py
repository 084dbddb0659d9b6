"""Rows of two sites of one store side by side: what a transcoder is trained on."""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae_runner.data.base import Split
from sae_runner.errors import StoreError
from sae_runner.statistics import ActivationStats
from sae_runner.store.reader import ActivationStore


class PairedStore(ActivationStore):
    """The rows of `folder`, each with the row of the target site beside it [d_in + d_out].

    Both sites were written in one store, so they share row order, example ids and positions. Norm
    outliers are those of the first site.
    """

    def __init__(self, folder: Path, target: Path, **options: Any) -> None:
        super().__init__(folder, **options)
        self.target = ActivationStore(target, **{**options, "max_norm_multiple": None})
        if self.n_windows("train") != self.target.n_windows("train"):
            raise StoreError(f"{folder} and {target} do not hold rows of the same examples")

    @property
    def d_out(self) -> int:
        """Width of the target site."""
        return self.target.d_in

    @property
    def width(self) -> int:
        """Width of both sites."""
        return self.d_in + self.d_out

    def window(self, split: Split, index: int) -> dict[str, Tensor]:
        """See `ActivationStore.window`; `target` holds the other site's activations.

        Raises:
            StoreError: the two sites hold rows of different tokens.
        """
        window, beside = super().window(split, index), self.target.window(split, index)
        for key in ("example_id", "position"):
            if not torch.equal(window[key], beside[key]):
                raise StoreError(
                    f"{self.folder} and {self.target.folder} differ in {key}: `sae-run cache` with "
                    "both sites and force=true writes them together"
                )
        return {**window, "target": beside["activations"]}

    def stats(self, n_sample: int = 32768) -> ActivationStats:
        """Norms are of the first site; mean and sample are of rows that hold both."""
        found = super().stats(n_sample)
        if len(found.mean) == self.width:  # From the rows that a filter keeps.
            return found
        return found._replace(mean=torch.cat([found.mean, self.target._mean("train").float()]))

    def heldout_mean(self) -> Float[Tensor, " d"] | None:
        """See `Activations`; of what is reconstructed."""
        return self.target.heldout_mean() if self.norm_limit is None else None
