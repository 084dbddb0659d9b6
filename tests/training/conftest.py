"""A trainer over rows in memory: what a run is made of, without a config and without a model."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sae_runner.config import construct, preset
from sae_runner.data.base import Split
from sae_runner.models.base import SiteInfo
from sae_runner.saes import SAES
from sae_runner.saes.base import SAE
from sae_runner.statistics import ActivationStats
from sae_runner.store.activations import Activations
from sae_runner.training.trainer import Trainer, TrainOptions

D_IN, D_SAE = 8, 32


def planted(n: int, d: int = D_IN, seed: int = 0) -> Tensor:
    """Rows made of a few of 24 directions, off centre and of no standard size."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(24, d, generator=generator)
    codes = torch.rand(n, 24, generator=generator) * (torch.rand(n, 24, generator=generator) < 0.1)
    return 3 * codes @ directions + 1


class Rows(Activations):
    """Windows of 64 rows of a tensor."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.site = x, SiteInfo("rows", "rows", x.shape[1], "vector", 1)
        self.mix_windows = 3
        self.n_read = 0

    def n_windows(self, split: Split) -> int:
        return -(-len(self.x) // 64)

    def n_rows(self, split: Split) -> int:
        return len(self.x)

    def window(self, split: Split, index: int) -> dict[str, Tensor]:
        self.n_read += 1
        rows = torch.arange(len(self.x))[64 * index : 64 * index + 64]
        return {"activations": self.x[rows], "example_id": rows, "position": 0 * rows}

    def stats(self, n_sample: int = 32768) -> ActivationStats:
        norms = self.x.norm(dim=1)
        return ActivationStats(
            self.x.mean(0), float(norms.mean()), float(norms.square().mean()), self.x[:n_sample]
        )


def options_of(**changes: Any) -> TrainOptions:
    cfg = preset("trainer", "default")
    small = {"n_tokens": 640, "batch_size": 32, "lr": 3e-3, "dead_window": 96, "log_every": 1}
    options: TrainOptions = construct(
        TrainOptions.from_config, {**cfg, **small, **changes}, where="trainer"
    )
    return options


def sae_of(kind: str, d_in: int = D_IN, **options: Any) -> SAE:
    cfg = preset("sae", kind) | {"d_sae": D_SAE, "expansion": None}
    small = {"k": 4, "l1_coefficient": 0.5, **options}
    cfg.update({key: value for key, value in small.items() if key in cfg})
    sae: SAE = SAES.build(cfg, d_in=d_in)
    return sae


@pytest.fixture
def stored() -> Callable[..., Rows]:
    return lambda n=500, d=D_IN: Rows(planted(n, d))


@pytest.fixture
def options() -> Callable[..., TrainOptions]:
    return options_of


@pytest.fixture
def sae() -> Callable[..., SAE]:
    return sae_of


@pytest.fixture
def trainer(tmp_path: Path) -> Iterator[Callable[..., Trainer]]:
    """`trainer("topk", "run", sae={…}, **options)`: an initialised one in tmp_path/run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # Steps are tiny.

    def make(
        kind: str = "relu", name: str = "run", *, store: Activations | None = None,
        sae: dict[str, Any] | None = None, seed: int = 0, data_seed: int = 0,
        sinks: tuple[Any, ...] = (), initialise: bool = True,
        dead_latents: dict[str, Any] | None = None, device: str = "cpu", **options: Any,
    ) -> Trainer:  # fmt: skip
        run_dir = tmp_path / name
        run_dir.mkdir(exist_ok=True)
        store = store or Rows(planted(500))
        made = Trainer(
            sae_of(kind, store.d_in, **(sae or {})), store, options_of(**options), run_dir,
            seed=seed, data_seed=data_seed, device=torch.device(device), facts={}, sinks=sinks,
            dead_latents=dead_latents,
        )  # fmt: skip
        if initialise:
            made.initialise()
        return made

    yield make
    torch.set_num_threads(threads)
