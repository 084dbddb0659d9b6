"""ReLU SAE with a decoder-norm-weighted L1 penalty (Anthropic, April 2024 update)."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sae_runner.config import NonNegativeFloat, Positive, PositiveFloat
from sae_runner.errors import ConfigError
from sae_runner.saes import SAES
from sae_runner.saes.base import SAE, InputScaling, Loss, TrainState, width
from sae_runner.statistics import ActivationStats


@SAES.register("relu")
class ReLU(SAE):
    """Rectified pre-activations, kept few by an L1 penalty.

    f = ReLU(s x W_enc + b_enc),    x_hat = (f W_dec + b_dec) / s;    decoder norms are free.

    Raises:
        ConfigError: a target L0 is given, which only a coefficient can lead to.
    """

    kind = "relu"

    def __init__(
        self,
        d_in: int,
        *,
        d_sae: Positive | None,
        expansion: PositiveFloat | None,
        target_l0: PositiveFloat | None,
        l1_coefficient: NonNegativeFloat,
        loss_reduction: Literal["sum", "mean"],
        input_scaling: InputScaling,
        decoder_init_norm: PositiveFloat,
    ) -> None:
        if target_l0 is not None:
            raise ConfigError(
                f"sae.target_l0={target_l0:g}: type relu reaches an L0 through "
                f"sae.l1_coefficient={l1_coefficient:g}; set target_l0 to null"
            )
        options = {
            "target_l0": None,
            "l1_coefficient": l1_coefficient,
            "loss_reduction": loss_reduction,
            "input_scaling": input_scaling,
            "decoder_init_norm": decoder_init_norm,
        }
        n_latents = width(d_in, d_sae, expansion)
        super().__init__(d_in, n_latents, input_scaling=input_scaling, options=options)
        self.l1_coefficient, self.loss_reduction = l1_coefficient, loss_reduction
        self.decoder_init_norm = decoder_init_norm

    def encode(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_sae"]:
        """See `SAE.encode`; there is no bias before the encoder."""
        return nn.functional.linear(self.scaled(x), self.W_enc_rows, self.b_enc).relu()

    def loss(self, x: Float[Tensor, "n d_in"], state: TrainState) -> Loss:
        """`squared error + λ Σ_i f_i ‖W_dec,i‖₂` on scaled activations, mean over rows."""
        acts = self.encode(x)
        x_hat = acts @ self.W_dec + self.b_dec
        error = (self.scaled(x) - x_hat).square().sum(1).mean()
        if self.loss_reduction == "mean":
            error = error / self.d_in
        norms = self.W_dec.norm(dim=1)
        # The mean over rows first: [n, d_sae] products would cost more than the decoder's input.
        l1 = (acts.mean(0, dtype=norms.dtype) * norms).sum()
        total = error + self.l1_coefficient * state.penalty * l1
        name = "sse" if self.loss_reduction == "sum" else "mse"
        parts = {name: error.detach(), "l1": l1.detach()}
        fired = acts.detach().count_nonzero(dim=0)
        l0 = fired.sum() / max(len(x), 1)
        return Loss(total, parts, x_hat.detach() / self.input_scale, fired, l0)

    def initialise(self, stats: ActivationStats, generator: torch.Generator) -> None:
        """See `SAE.initialise`."""
        self.set_input_scale(stats)
        self.initialise_weights(self.decoder_init_norm, generator)

    @torch.no_grad()
    def fold(self) -> "SAE":
        """See `SAE.fold`; decoder norms go into the encoder, which leaves decoder rows of norm 1.

        A row of zeros keeps its norm.
        """
        norms = self.W_dec.norm(dim=1)
        norms = torch.where(norms > 0, norms, 1)
        self.W_enc_rows.mul_(norms.unsqueeze(1))
        self.b_enc.mul_(norms)
        self.W_dec.div_(norms.unsqueeze(1))
        return super().fold()
