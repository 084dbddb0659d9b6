"""Pre-activation loss (Anthropic, Circuits Updates, January 2025)."""

import torch
from jaxtyping import Float
from torch import Tensor

from sae_runner.config import NonNegativeFloat
from sae_runner.errors import ConfigError
from sae_runner.saes.base import SAE, Loss
from sae_runner.training.dead_latents import DEAD_LATENTS
from sae_runner.training.dead_latents.base import DeadLatents


@DEAD_LATENTS.register("pre_act")
class PreAct(DeadLatents):
    """λ Σ_i ReLU(θ_i − z_i) ‖W_dec,i‖: pulls silent latents up to their threshold.

    The sum is over all latents, or over dead ones alone (`only_dead`), and its mean over rows. The
    gradient reaches thresholds and norms too.

    Raises:
        ConfigError: latents of this kind of SAE have no threshold to fire at.
    """

    def __init__(
        self, sae: SAE, window: int, *, coefficient: NonNegativeFloat, only_dead: bool
    ) -> None:
        super().__init__(sae, window)
        if sae.pre_act_refused:
            raise ConfigError(f"sae/dead_latents=pre_act: {sae.pre_act_refused}; take auxk")
        self.coefficient, self.only_dead = coefficient, only_dead

    def add_to(self, loss: Loss, x: Float[Tensor, "n d_in"]) -> Loss:
        """See `DeadLatents.add_to`."""
        return self.add_term(loss, "pre_act", self.coefficient, self.term(x))

    def term(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, ""]:
        """The pre-activation loss of a batch, without its coefficient."""
        sae = self.sae
        latents = torch.arange(sae.d_sae, device=x.device)
        if self.only_dead:
            latents = self.dead.nonzero().squeeze(1)
        if len(latents) == 0:
            return sae.b_dec.new_zeros(())
        # All rows are not gathered: that would copy the encoder.
        some = latents if self.only_dead else None
        short = (sae.thresholds(latents) - sae.pre_activations(sae.scaled(x), some)).relu()
        norms: Tensor = sae.W_dec[latents].norm(dim=1)
        return (short.mean(0) * norms).sum()
