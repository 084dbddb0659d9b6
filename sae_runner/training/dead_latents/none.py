"""Latents that do not fire are counted and left alone."""

from sae_runner.saes.base import SAE
from sae_runner.training.dead_latents import DEAD_LATENTS
from sae_runner.training.dead_latents.base import DeadLatents


@DEAD_LATENTS.register("none")
class NoRevival(DeadLatents):
    """The counter alone."""

    revives = False

    def __init__(self, sae: SAE, window: int) -> None:
        super().__init__(sae, window)
