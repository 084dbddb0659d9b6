"""Latents that are planted dead, and what becomes of them."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from sae_fixtures import planted_rows, stats_of

from sae_runner.saes.base import SAE, TrainState
from sae_runner.training.dead_latents import DEAD_LATENTS


def endless(x: torch.Tensor, generator: torch.Generator) -> Iterator[torch.Tensor]:
    while True:
        yield x[torch.randint(len(x), (256,), generator=generator)]


@pytest.fixture
def revived(one_thread: None) -> Callable[..., float]:
    """The share of latents, dead from the start, that fire after some training."""

    def measure(
        sae: SAE, strategy: dict[str, Any], *, n_steps: int = 300, lr: float = 1e-2
    ) -> float:
        n_dead = 16
        generator = torch.Generator().manual_seed(0)
        x, _ = planted_rows(4_096)
        sae.initialise(stats_of(x), generator)
        with torch.no_grad():  # No row brings them near to firing.
            sae.b_enc[:n_dead] = -1.1 * sae.pre_activations(sae.scaled(x)).max()
        assert not sae.encode(x)[:, :n_dead].any()
        optimiser = torch.optim.Adam(sae.parameters(), lr=lr)
        dead = DEAD_LATENTS.build(strategy, sae=sae, window=2_560)
        interventions = dead.steps(n_steps)
        for step in range(n_steps):
            if step in interventions:
                dead.intervene(endless(x, generator), optimiser, generator)
            batch = next(endless(x, generator))
            loss = dead.add_to(sae.loss(batch, TrainState(min(1.0, step / 100))), batch)
            optimiser.zero_grad()
            loss.total.backward()
            sae.before_step()
            optimiser.step()
            sae.after_step()
            dead.update(loss.fired, len(batch))
        return (sae.encode(x)[:, :n_dead] != 0).any(0).double().mean().item()

    return measure
