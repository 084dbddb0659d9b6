"""AuxK: dead latents predict what the living leave over (Gao et al. 2024, arXiv 2406.04093)."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from sae_runner.config import NonNegativeFloat, Positive
from sae_runner.errors import ConfigError
from sae_runner.kernels.autograd import rows_of
from sae_runner.saes.base import SAE, Loss
from sae_runner.training.dead_latents import DEAD_LATENTS
from sae_runner.training.dead_latents.base import DeadLatents


@DEAD_LATENTS.register("auxk")
class AuxK(DeadLatents):
    """A second reconstruction, of the residual, from the `k_aux` strongest dead latents.

    With e the residual (no gradient flows into it) and z the pre-activations of dead latents,

        L_aux = min(n_dead / k_aux, 1) · MSE(e, ReLU(TopK_{k_aux}(z)) W_dec) / MSE(e, mean row of e)

    and 0 where the residual has no variance (appendix A.2). The first factor, so that a few dead
    latents are not asked to explain everything, is not in the paper.

    Raises:
        ConfigError: k_aux is more than there are latents.
    """

    def __init__(
        self,
        sae: SAE,
        window: int,
        *,
        coefficient: NonNegativeFloat,
        k_aux: Positive | None,
    ) -> None:
        super().__init__(sae, window)
        if k_aux is not None and k_aux > sae.d_sae:
            raise ConfigError(f"sae.dead_latents.k_aux={k_aux}: must be <= d_sae={sae.d_sae}")
        self.coefficient = coefficient
        self.k_aux = k_aux or min(default_k_aux(sae.d_in), sae.d_sae)

    @property
    def adds_now(self) -> bool:
        """See `DeadLatents.adds_now`."""
        return bool(self.dead.any())

    def add_to(self, loss: Loss, x: Float[Tensor, "n d_in"]) -> Loss:
        """See `DeadLatents.add_to`; 0 while nothing is dead."""
        return self.add_term(loss, "auxk", self.coefficient, self.term(loss, x))

    def term(self, loss: Loss, x: Float[Tensor, "n d_in"]) -> Float[Tensor, ""]:
        """L_aux of a batch."""
        dead = self.dead.nonzero().squeeze(1)
        if len(dead) == 0:
            return loss.residual.new_zeros(())
        sae, residual = self.sae, loss.residual
        pre_acts = sae.pre_activations(sae.scaled(x), dead)
        values, chosen = sae.strongest(pre_acts, min(self.k_aux, len(dead)))
        # A large part of few latents: dense products are cheaper than gathering rows.
        acts = torch.zeros_like(pre_acts).scatter(1, chosen, values)
        predicted = acts @ rows_of(sae.W_dec, dead)
        variance = (residual - residual.mean(0)).square().mean()
        # A NaN that is replaced afterwards would still be one in the gradient.
        weight = torch.where(variance > 0, 1 / variance, 0) * min(len(dead) / self.k_aux, 1)
        return weight * (predicted - residual).square().mean()


def default_k_aux(d_in: int) -> int:
    """The power of two nearest to d_in / 2 on a log scale (Gao et al., appendix A.2)."""
    return int(2 ** max(0, round(math.log2(d_in / 2))))
