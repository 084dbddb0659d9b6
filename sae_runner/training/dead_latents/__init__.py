"""What is done for latents that have stopped firing, one strategy per file."""

from sae_runner.config import Registry

DEAD_LATENTS = Registry("sae.dead_latents", "sae_runner.training.dead_latents")
