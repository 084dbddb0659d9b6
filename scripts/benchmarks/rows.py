"""Rows to measure with: sums of a few directions, and stores of random ones."""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sae_runner import files
from sae_runner.data.base import SPLITS, Split
from sae_runner.models.base import SiteInfo
from sae_runner.site import TokenSelection
from sae_runner.statistics import ActivationStats
from sae_runner.store.activations import Activations
from sae_runner.store.manifest import selection_dir, site_to_json
from sae_runner.store.reader import ActivationStore
from sae_runner.store.window import WindowPlan, WindowRows
from sae_runner.store.writer import _finish, _write_window

N_ACTIVE = 16
NOISE = 0.05


class Directions:
    """Rows that are sums of 16 of 4 d random directions, with factors in [0.5, 1.5], and noise."""

    def __init__(self, d: int, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(4 * d, d, generator=self.generator)
        self.directions = torch.nn.functional.normalize(drawn, dim=1)

    def rows(self, n: int) -> Float[Tensor, "n d"]:
        """The next n rows."""
        n_directions, d = self.directions.shape
        active = torch.randint(n_directions, (n, N_ACTIVE), generator=self.generator)
        factors = 0.5 + torch.rand(n, N_ACTIVE, generator=self.generator)
        summed = torch.nn.functional.embedding_bag(
            active, self.directions, mode="sum", per_sample_weights=factors
        )
        return summed + NOISE * torch.randn(n, d, generator=self.generator)


def site_of(d: int) -> SiteInfo:
    """A site with one token for each example."""
    return SiteInfo("blocks.0.resid_post", "blocks.0", d, "vector", 1)


class HeldRows(Activations):
    """Rows that are in memory, as a store."""

    def __init__(self, x: Float[Tensor, "n d"]) -> None:
        self.x, self.site = x, site_of(x.shape[1])

    def n_windows(self, split: Split) -> int:
        """See `Activations`."""
        return 1

    def n_rows(self, split: Split) -> int:
        """See `Activations`."""
        return len(self.x)

    def window(self, split: Split, index: int) -> dict[str, Tensor]:
        """See `Activations`."""
        ids = torch.arange(len(self.x))
        return {"activations": self.x, "example_id": ids, "position": torch.zeros_like(ids)}

    def stats(self, n_sample: int = 32768) -> ActivationStats:
        """See `Activations`."""
        norms = self.x.double().norm(dim=1)
        square = float(norms.square().mean())
        return ActivationStats(self.x.mean(0), float(norms.mean()), square, self.x[:n_sample])


def random_store(folder: Path, n_rows: int, d: int, n_heldout: int = 1024) -> ActivationStore:
    """A store of random rows, written as the writer writes."""
    info, selection = site_of(d), TokenSelection("all", drop_positions=(0,))
    ids = {"train": np.arange(n_rows), "heldout": np.arange(n_rows, n_rows + n_heldout)}
    plan = WindowPlan(ids, 65_536, 0)  # type: ignore[arg-type]
    target = selection_dir(folder, info.name, selection)
    generator = torch.Generator().manual_seed(0)
    for split in SPLITS:
        for w in range(plan.n_windows(split)):
            own = torch.as_tensor(plan.examples(split, w))
            x = torch.randn(len(own), d, generator=generator)
            rows = WindowRows({info.name: x}, own.int(), torch.zeros_like(own).int(), None, [])
            _write_window({info.name: target}, split, w, rows)
    _finish(target, info, selection, plan, "fp32")
    files.write_json(folder / "store.json", {"sites": {info.name: site_to_json(info)}})
    return ActivationStore(target, mix_rows=2**20)
