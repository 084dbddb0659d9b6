"""ReLU SAE with a decoder-norm-weighted L1 penalty (Anthropic: Bricken et al. 2023, April 2024)."""

from typing import Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from sae_runner.config import NonNegativeFloat
from sae_runner.saes import SAES
from sae_runner.saes._weights import Weights
from sae_runner.saes.base import SAE, Common, Loss, TrainState


@SAES.register("relu")
class ReLU(SAE):
    """Rectified pre-activations, kept few by an L1 penalty.

    f = ReLU(s x W_enc + b_enc),    x_hat = (f W_dec + b_dec) / s;    decoder norms are free:
    Circuits Updates, April 2024. With `decoder_norm: unit` and `apply_b_dec_to_input: true` it is
    the form of Bricken et al. 2023, Towards Monosemanticity.
    """

    kind = "relu"
    penalised = True
    units_of_penalty = True

    def __init__(
        self, d_in: int, *, l1_coefficient: NonNegativeFloat, **common: Unpack[Common]
    ) -> None:
        super().__init__(d_in, options={"l1_coefficient": l1_coefficient}, **common)
        self.l1_coefficient = l1_coefficient

    def encode(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_sae"]:
        """See `SAE.encode`."""
        return self.pre_activations(self.scaled(x)).relu()

    def loss(self, x: Float[Tensor, "n d_in"], state: TrainState) -> Loss:
        """`squared error + λ Σ_i f_i ‖W_dec,i‖₂` on scaled activations, mean over rows."""
        scaled = self.scaled(x)
        pre_acts = self.above(scaled, torch.zeros_like(self.b_enc))
        acts = pre_acts.z.relu()
        found = pre_acts.reconstruct(acts, self.W_dec, self.b_dec, scaled)
        l1 = pre_acts.weighted_sum(acts, self.W_dec.norm(dim=1)) / len(x)
        coefficient = self.l1_coefficient * state.penalty
        fired = pre_acts.fired(acts)
        return self.loss_of(x, scaled, found, fired, l1=(coefficient, l1))

    @torch.no_grad()
    def fold(self) -> Weights:
        """See `SAE.fold`; decoder norms go into the encoder: decoder rows have norm 1."""
        super().fold()
        self.move_norms()
        return self
