"""Ghost gradients (Jermyn and Templeton, Circuits Updates, January 2024)."""

import torch
from jaxtyping import Float
from torch import Tensor

from sae_runner.config import NonNegativeFloat
from sae_runner.saes.base import SAE, Loss
from sae_runner.training.dead_latents import DEAD_LATENTS
from sae_runner.training.dead_latents.base import DeadLatents


@DEAD_LATENTS.register("ghost_grads")
class GhostGrads(DeadLatents):
    """Dead latents, with exp for their activation, predict the residual.

    With e the residual and g = exp(z_dead) W_dec, brought to half of e's length row by row, the
    term is the squared error (g − e)² in proportion: each number is scaled to be as large as e²
    there, by factors that no gradient flows through, then reduced as the own error of `sae` is.
    """

    def __init__(self, sae: SAE, window: int, *, coefficient: NonNegativeFloat) -> None:
        super().__init__(sae, window)
        self.coefficient = coefficient

    @property
    def adds_now(self) -> bool:
        """See `DeadLatents.adds_now`."""
        return bool(self.dead.any())

    def add_to(self, loss: Loss, x: Float[Tensor, "n d_in"]) -> Loss:
        """See `DeadLatents.add_to`; 0 while nothing is dead."""
        return self.add_term(loss, "ghost_grads", self.coefficient, self.term(loss, x))

    def term(self, loss: Loss, x: Float[Tensor, "n d_in"]) -> Float[Tensor, ""]:
        """The ghost loss of a batch."""
        dead = self.dead.nonzero().squeeze(1)
        if len(dead) == 0:
            return loss.residual.new_zeros(())
        sae, residual = self.sae, loss.residual
        scaled = sae.scaled(x)
        pre_acts = sae.pre_activations(scaled, dead)
        # One factor a row changes nothing: the row's length is set below. It keeps exp in range.
        ghost = (pre_acts - pre_acts.amax(1, keepdim=True).detach()).exp() @ sae.W_dec[dead]
        length = residual.norm(dim=1, keepdim=True) / 2
        ghost = ghost * (length / (ghost.norm(dim=1, keepdim=True) + 1e-12)).detach()
        square = (ghost - residual).square()
        # In proportion to e², so that units do not matter; nor may a row without error divide by 0.
        least = 1e-6 * residual.square().mean() + torch.finfo(square.dtype).tiny
        factor = (residual.square() / (square + least)).detach()
        return sae.error((factor * square).sum(1), scaled)[1]
