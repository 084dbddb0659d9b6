"""`store=stream`: the store's interface straight from the model, for what does not fit on disk.

Windows are computed when they are asked for, by the function that writes them to disk elsewhere, so
a stream and a disk store of equal options give the same batches. An epoch costs one pass of the
model (only the first does, where `keep_bytes` are enough), and going on after an interruption
computes the windows at hand again.
"""

from collections.abc import Callable
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from sae_runner.data.base import Dataset, Ids, Split, check_bad
from sae_runner.models._precision import DTYPES
from sae_runner.models.base import Model, SiteInfo
from sae_runner.site import TokenSelection
from sae_runner.statistics import ActivationStats
from sae_runner.store.activations import Activations, mixed
from sae_runner.store.window import WindowPlan, compute_window


class StreamStore(Activations):
    """Activations of one site, computed window by window as they are read.

    With `target`, the rows of another site lie beside them, as in `PairedStore`; with `norm_limit`,
    longer rows of the first are left out.
    """

    def __init__(
        self,
        model: Callable[[], Model],
        dataset: Dataset,
        site: SiteInfo,
        selection: TokenSelection,
        plan: WindowPlan,
        *,
        target: SiteInfo | None = None,
        norm_limit: float | None = None,
        mix_rows: int,
        keep_bytes: int = 0,
        dtype: str,
        batch_size: int,
        workers: int,
        max_bad: float,
    ) -> None:
        self.load_model, self.dataset, self.site = model, dataset, site
        self.selection, self.plan, self.dtype = selection, plan, dtype
        self.target, self.norm_limit = target, norm_limit
        self.batch_size, self.workers, self.max_bad = batch_size, workers, max_bad
        self.mix_windows = mixed(mix_rows, plan.window_rows, self.n_windows("train"))
        self.keep_bytes = keep_bytes
        self.bad: dict[int, str] = {}
        self.in_order = not dataset.random_access

    @property
    def d_out(self) -> int:
        """See `Activations`."""
        return self.d_in if self.target is None else self.target.d

    @property
    def width(self) -> int:
        """See `Activations`."""
        return self.d_in + (0 if self.target is None else self.target.d)

    def n_windows(self, split: Split) -> int:
        """See `Activations`."""
        return self.plan.n_windows(split)

    def n_rows(self, split: Split) -> int:
        """The most rows there can be: how many tokens a text has is known once it is read."""
        return len(self.plan.ids[split]) * self.plan.rows_per_example

    def n_bytes(self, split: Split) -> int:
        """See `Activations`."""
        return self.n_rows(split) * self.width * DTYPES[self.dtype].itemsize

    def window(self, split: Split, index: int) -> dict[str, Tensor]:
        """Compute one window.

        Raises:
            DataError: as when a store is written; unreadable examples count once, not every epoch.
        """
        infos = [self.site] if self.target is None else [self.site, self.target]
        rows = compute_window(
            self.load_model(), self.dataset, infos, self.selection, self.plan, split, index,
            batch_size=self.batch_size, workers=self.workers, dtype=self.dtype,
        )  # fmt: skip
        new = [bad for bad in rows.bad if bad.id not in self.bad]
        self.bad.update((bad.id, bad.reason) for bad in new)
        check_bad(new, len(self.bad), sum(map(len, self.plan.ids.values())), self.max_bad)
        tensors = {
            "activations": rows.activations[self.site.name],
            "example_id": rows.example_id,
            "position": rows.position,
        }
        if self.target is not None:
            tensors["target"] = rows.activations[self.target.name]
        if self.norm_limit is not None:
            norms = torch.linalg.vector_norm(tensors["activations"].float(), dim=1)
            tensors["keep"] = (norms <= self.norm_limit).nonzero().squeeze(1)
        return tensors if rows.label is None else {**tensors, "label": rows.label}

    def example_ids(self, split: Split) -> Ids:
        """See `Activations`; those of unreadable examples are among them."""
        return np.sort(self.plan.ids[split])

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
