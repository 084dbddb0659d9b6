"""Between two steps: a strategy for dead latents changes weights by what training rows show."""

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sae_runner.training.trainer import Trainer

log = logging.getLogger("sae_runner")
RESAMPLE_SEED = 0x726573  # "res"


def intervene(trainer: "Trainer") -> None:
    """Let the strategy change weights, by rows in an order of its own."""
    seed = trainer.data_seed + RESAMPLE_SEED + trainer.step
    generator = torch.Generator().manual_seed(trainer.seed + seed)
    dead = trainer.dead.dead
    if trainer.calibration is not None:  # Now: what is drawn rests on what fires.
        trainer.calibration.measure(trainer.sae, on_all=True)
    trainer.dead.intervene(epoch(trainer, seed), trainer.optimizer, generator)
    trainer.sae.after_step()
    if trainer.averaged is not None:
        trainer.averaged.begin_again(trainer.sae, dead & ~trainer.dead.dead)
    n_dead = int(dead.sum())
    log.info("step %d: %d dead latents pointed at badly reconstructed rows", trainer.step, n_dead)


def epoch(trainer: "Trainer", seed: int) -> Iterator[Tensor]:
    """Every stored training row once, in batches, in the order of `seed`."""
    left = trainer.store.n_rows("train")
    for batch in trainer.store.shuffled(trainer.options.batch_size, seed):
        yield batch.x[:left].to(trainer.device)
        left -= len(batch.x)
        if left <= 0:
            return
