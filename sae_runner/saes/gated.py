"""Gated SAE (Rajamanoharan et al. 2024, arXiv 2404.16014)."""

from typing import ClassVar, Unpack

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from sae_runner.config import NonNegativeFloat
from sae_runner.saes import SAES
from sae_runner.saes._pre_acts import All
from sae_runner.saes._weights import Weights
from sae_runner.saes.base import SAE, Common, Loss, PreActs, TrainState


@SAES.register("gated")
class Gated(SAE):
    """One path decides which latents are active, another how large they are.

        a = (s x − b_dec) W_enc,    π = a + b_gate,    M = ReLU(exp(r_mag) ⊙ a + b_mag),
        f = 1[π > 0] ⊙ M,    x_hat = (f W_dec + b_dec) / s

    with decoder rows of norm 1. The step lets no gradient through; the gate learns from the penalty
    and from a reconstruction of its own, ReLU(π) W_dec + b_dec, in which W_dec and b_dec are
    constants (§3.2). The pre-activations of this kind are π, so b_gate is the base's b_enc.
    """

    kind = "gated"
    penalised = True
    units_of_penalty = True
    stored_names: ClassVar[dict[str, str]] = {"b_enc": "b_gate"}

    def __init__(
        self, d_in: int, *, l1_coefficient: NonNegativeFloat, **common: Unpack[Common]
    ) -> None:
        super().__init__(d_in, options={"l1_coefficient": l1_coefficient}, **common)
        self.l1_coefficient = l1_coefficient
        self.r_mag = nn.Parameter(torch.zeros(self.d_sae))
        self.b_mag = nn.Parameter(torch.zeros(self.d_sae))

    def gated(self, gate: PreActs) -> Float[Tensor, "..."]:
        """Latents f from the gate's pre-activations π; what is open may still be 0."""
        scale = self.r_mag.exp()
        # exp(r_mag) ⊙ a + b_mag, with a = π − b_gate: one product with W_enc serves both paths.
        shift = gate.per_latent(self.b_mag - scale * self.b_enc)
        magnitude = gate.z * gate.per_latent(scale) + shift
        return torch.where(gate.z > 0, magnitude.relu(), 0)

    def encode(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_sae"]:
        """See `SAE.encode`."""
        return self.gated(All(self.pre_activations(self.scaled(x))))

    def loss(self, x: Float[Tensor, "n d_in"], state: TrainState) -> Loss:
        """`error(x, x_hat) + λ Σ_i ReLU(π_i) + error(x, ReLU(π) W_dec + b_dec)`.

        Both errors are reduced alike. The sum is weighted by decoder norms where those are free,
        as constants: what is frozen in one term must not be moved by the other.
        """
        scaled = self.scaled(x)
        gate = self.above(scaled, torch.zeros_like(self.b_enc))
        acts, opened = self.gated(gate), gate.z.relu()
        found = gate.reconstruct(acts, self.W_dec, self.b_dec, scaled)
        frozen = self.W_dec.detach()
        by_gate = gate.reconstruct(opened, frozen, self.b_dec.detach(), scaled).square
        free = self.decoder_norm == "free"
        weights = frozen.norm(dim=1) if free else torch.ones_like(self.b_enc)
        l1 = gate.weighted_sum(opened, weights) / len(x)
        return self.loss_of(
            x, scaled, found, gate.fired(acts),
            l1=(self.l1_coefficient * state.penalty, l1),
            gate_error=(1.0, self.error(by_gate, scaled)[1]),
        )  # fmt: skip

    @torch.no_grad()
    def reset_latents(
        self, latents: Int64[Tensor, " m"], directions: Float[Tensor, "m d_in"], norm: float
    ) -> None:
        """See `SAE.reset_latents`; both paths begin alike again."""
        super().reset_latents(latents, directions, norm)
        self.r_mag[latents] = 0
        self.b_mag[latents] = 0

    def scale_latents(self, factor: Tensor) -> None:
        """See `SAE.scale_latents`."""
        super().scale_latents(factor)
        self.b_mag.mul_(factor)

    def shift_latents(self, by: Float[Tensor, " d_sae"]) -> None:
        """See `SAE.shift_latents`."""
        super().shift_latents(by)
        self.b_mag.add_(self.r_mag.exp() * by)

    @torch.no_grad()
    def fold(self) -> Weights:
        """See `SAE.fold`; free decoder norms go into the encoder, and every gate stays as it is."""
        super().fold()
        if self.decoder_norm == "free":
            self.move_norms()
        return self
