"""SAEs from their YAML, rows to feed them, and a small training loop: for tests of SAEs."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from sae_runner.config import preset
from sae_runner.saes import SAES
from sae_runner.saes.base import SAE, TrainState
from sae_runner.statistics import ActivationStats
from sae_runner.training.dead_latents import DEAD_LATENTS


def build(kind: str, d_in: int, d_sae: int, **options: Any) -> SAE:
    """An SAE from its YAML with a small k, in any units; what its kind lacks is ignored."""
    cfg = preset("sae", kind) | {"d_sae": d_sae, "expansion": None}
    small = {"k": 3, "n_candidates": 32, "units": None, **options}
    cfg.update({key: value for key, value in small.items() if key in cfg})
    return SAES.build(cfg, d_in=d_in)


def drawn(d_in: int, d_sae: int) -> SAE:
    """A topk SAE with random weights in float64."""
    made = build("topk", d_in, d_sae)
    x = torch.randn(64, d_in, generator=torch.Generator().manual_seed(0))
    made.initialise(stats_of(x), torch.Generator().manual_seed(1))
    return made.double()


def stats_of(x: torch.Tensor) -> ActivationStats:
    norms = x.double().norm(dim=1)
    return ActivationStats(x.mean(0), norms.mean().item(), norms.square().mean().item(), x)


def planted_rows(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows that are sums of about 3 of 64 directions in 32 dimensions, and the directions."""
    generator = torch.Generator().manual_seed(7)
    directions = torch.randn(64, 32, generator=generator)
    directions = directions / directions.norm(dim=1, keepdim=True)
    active = torch.rand(n, 64, generator=generator) < 3 / 64
    return (active * (0.5 + torch.rand(n, 64, generator=generator))) @ directions, directions


def train(
    sae: SAE, x: torch.Tensor, *, n_steps: int, n_faint: int, lr: float = 2e-3, strategy: Any = None
) -> None:
    """The order of a training step, without a trainer; `n_faint` latents start unable to win."""
    generator = torch.Generator().manual_seed(0)
    sae.initialise(stats_of(x), generator)
    sae.W_enc_rows.detach()[:n_faint] *= 0.05
    optimiser = torch.optim.Adam(sae.parameters(), lr=lr)
    dead = DEAD_LATENTS.build(
        {"type": "none"} if strategy is None else strategy, sae=sae, window=5_000
    )
    for step in range(n_steps):
        batch = x[torch.randint(len(x), (256,), generator=generator)]
        state = TrainState(min(1.0, step / 100), step / n_steps, 1 / n_steps)
        loss = dead.add_to(sae.loss(batch, state), batch)
        optimiser.zero_grad()
        loss.total.backward()
        sae.before_step()
        optimiser.param_groups[0]["lr"] = lr * min(1.0, 5 * (1 - step / n_steps))
        optimiser.step()
        sae.after_step()
        dead.update(loss.fired, len(batch))


@pytest.fixture
def make() -> Callable[..., SAE]:
    """Build and initialise an SAE on 64 random rows that are off centre and of no standard size."""

    def initialised(kind: str, d_in: int = 8, d_sae: int = 24, **options: Any) -> SAE:
        sae = build(kind, d_in, d_sae, **options)
        generator = torch.Generator().manual_seed(1)
        x = 3 * torch.randn(64, d_in, generator=generator) + 1
        sae.initialise(stats_of(x), torch.Generator().manual_seed(2))
        with torch.no_grad():  # Biases that are not zero, so that tests see where they enter.
            sae.b_enc.copy_(0.1 * torch.randn(d_sae, generator=generator))
            sae.b_dec.add_(0.1 * torch.randn(d_in, generator=generator))
        if sae.calibrates:
            sae.calibrate(iter([x]), len(x))
        return sae

    return initialised


@pytest.fixture
def rows() -> Callable[..., torch.Tensor]:
    def draw(n: int, d_in: int = 8, seed: int = 3) -> torch.Tensor:
        return 3 * torch.randn(n, d_in, generator=torch.Generator().manual_seed(seed)) + 1

    return draw


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Steps of microseconds only wait for one another on several threads."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture
def recovered(one_thread: None) -> Callable[..., float]:
    """Mean over planted directions of the best cosine with a decoder row, after training."""

    def measure(sae: SAE, n_steps: int, n_faint: int = 0, strategy: Any = None) -> float:
        x, directions = planted_rows(8_192)
        train(sae, x, n_steps=n_steps, n_faint=n_faint, strategy=strategy)
        decoder = sae.W_dec.detach() / sae.W_dec.detach().norm(dim=1, keepdim=True)
        return (directions @ decoder.T).max(1).values.mean().item()

    return measure


@pytest.fixture
def new() -> Callable[..., SAE]:
    return build


@pytest.fixture
def stats() -> Callable[..., ActivationStats]:
    return stats_of
