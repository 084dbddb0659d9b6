"""`store=stream`: the store's interface straight from the model, for what does not fit on disk.

Windows are computed when they are asked for, by the function that writes them to disk elsewhere, so
a stream and a disk store of equal options give the same batches. An epoch costs one pass of the
model, and going on after an interruption computes the windows at hand again.
"""

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from sae_runner.data.base import Dataset, Split
from sae_runner.models.base import Model, SiteInfo
from sae_runner.site import TokenSelection
from sae_runner.statistics import ActivationStats
from sae_runner.store.reader import Activations
from sae_runner.store.window import WindowPlan, compute_window


class StreamStore(Activations):
    """Activations of one site, computed window by window as they are read."""

    def __init__(
        self,
        model: Callable[[], Model],
        dataset: Dataset,
        site: SiteInfo,
        selection: TokenSelection,
        plan: WindowPlan,
        *,
        rows_per_example: int,
        mix_rows: int,
        dtype: str,
        batch_size: int,
        workers: int,
    ) -> None:
        self.load_model, self.dataset, self.site = model, dataset, site
        self.selection, self.plan, self.dtype = selection, plan, dtype
        self.rows_per_example, self.batch_size, self.workers = rows_per_example, batch_size, workers
        window_rows = plan.window_examples * rows_per_example
        self.mix_windows = max(1, min(self.n_windows("train"), mix_rows // window_rows))
        self.in_order = not dataset.random_access

    def n_windows(self, split: Split) -> int:
        """See `Activations`."""
        return self.plan.n_windows(split)

    def n_rows(self, split: Split) -> int:
        """The most rows there can be: how many tokens a text has is known once it is read."""
        return len(self.plan.ids[split]) * self.rows_per_example

    def window(self, split: Split, index: int) -> dict[str, Tensor]:
        """Compute one window."""
        rows = compute_window(
            self.load_model(), self.dataset, [self.site], self.selection, self.plan, split, index,
            batch_size=self.batch_size, workers=self.workers, dtype=self.dtype,
        )  # fmt: skip
        tensors = {
            "activations": rows.activations[self.site.name],
            "example_id": rows.example_id,
            "position": rows.position,
        }
        return tensors if rows.label is None else {**tensors, "label": rows.label}

    def stats(self, n_sample: int = 32768) -> ActivationStats:
        """From the first window, the only one that can be afforded ahead of training."""
        first = self._first
        return first._replace(sample=first.sample[:n_sample])

    @cached_property
    def _first(self) -> ActivationStats:
        x = self.window("train", 0)["activations"].float()
        norms = torch.linalg.vector_norm(x, dim=1, dtype=torch.float64)
        return ActivationStats(
            x.double().mean(0).float(), float(norms.mean()), float(norms.square().mean()), x[:32768]
        )
