"""Trainers as `sae-run train` makes them, without a command line."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sae_runner.config import construct, preset
from sae_runner.saes import SAES
from sae_runner.saes.base import SAE
from sae_runner.store.activations import Activations
from sae_runner.training.trainer import Trainer, TrainOptions


def topk_options(own: Mapping[str, Any]) -> dict[str, Any]:
    """The options of `sae=topk`, but for some."""
    return preset("sae", "topk") | {"d_sae": None, "expansion": None} | dict(own)


def train_options(own: Mapping[str, Any]) -> TrainOptions:
    """The options of `trainer=default`, but for some."""
    options: TrainOptions = construct(
        TrainOptions.from_config, preset("trainer", "default") | dict(own), where="trainer"
    )
    return options


def trainer_on(
    store: Activations,
    run_dir: Path,
    sae_options: Mapping[str, Any],
    own: Mapping[str, Any],
    *,
    seed: int = 0,
    device: str = "cpu",
    prefetch: int = 2,
    dead_latents: dict[str, Any] | None = None,
    sae: SAE | None = None,
) -> Trainer:
    """A trainer at its first step: of `sae`, or of a TopK SAE with these options."""
    trainer = Trainer(
        sae or SAES.build(topk_options(sae_options), d_in=store.d_in), store, train_options(own),
        run_dir, seed=seed, data_seed=0, device=torch.device(device), facts={},
        dead_latents=dead_latents, prefetch=prefetch,
    )  # fmt: skip
    trainer.initialise()
    return trainer
