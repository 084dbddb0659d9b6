"""JumpReLU SAE (arXiv 2407.14435), with three penalties: step, quadratic and tanh."""

from typing import ClassVar, Literal, Unpack, get_args

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from sae_runner.config import NonNegativeFloat, PositiveFloat
from sae_runner.errors import ConfigError
from sae_runner.saes import SAES
from sae_runner.saes._pre_acts import All
from sae_runner.saes._straight_through import jump, step
from sae_runner.saes._weights import Weights
from sae_runner.saes.base import SAE, Common, Loss, PreActs, TrainState
from sae_runner.statistics import ActivationStats

Penalty = Literal["step", "quadratic", "tanh"]


@SAES.register("jump_relu")
class JumpReLU(SAE):
    """Pre-activations above a threshold θ that every latent learns for itself.

    z = s x W_enc + b_enc,    f = z H(z − θ),    x_hat = (f W_dec + b_dec) / s.    Penalties:

        step       λ Σ_i H(ReLU(z_i) − θ_i)          Rajamanoharan et al. 2024; Gemma Scope
        quadratic  λ (L0 / L0* − 1)²                 the same, with the batch's mean L0
        tanh       λ Σ_i tanh(c f_i ‖W_dec,i‖₂)      Anthropic, Circuits Updates, January 2025

    H has the pseudo-derivatives of `_straight_through`; those of step and quadratic lead to θ
    alone, those of tanh to z too. The batch's mean L0 (as in dictionary_learning) leaves rows free
    to differ; with micro batches it is that of each.

    θ itself is the parameter, kept ≥ 0. Its logarithm, which both papers train, moves θ by
    θ · lr a step under Adam, which is next to never (SAELens issues #494, #718).

    Raises:
        ConfigError: the penalty is not the one that `units` names; quadratic has no target.
    """

    kind = "jump_relu"
    own_units: ClassVar[tuple[str, ...]] = get_args(Penalty)

    def __init__(
        self,
        d_in: int,
        *,
        penalty: Penalty,
        l0_coefficient: NonNegativeFloat,
        bandwidth: PositiveFloat,
        initial_threshold: PositiveFloat,
        initial_l0: PositiveFloat | None,
        tanh_scale: PositiveFloat,
        **common: Unpack[Common],
    ) -> None:
        self.penalty, self.l0_coefficient = penalty, l0_coefficient
        self.bandwidth, self.tanh_scale = bandwidth, tanh_scale
        self.initial_threshold, self.initial_l0 = initial_threshold, initial_l0
        options = {
            "penalty": penalty, "l0_coefficient": l0_coefficient, "bandwidth": bandwidth,
            "initial_threshold": initial_threshold, "initial_l0": initial_l0,
            "tanh_scale": tanh_scale,
        }  # fmt: skip
        super().__init__(d_in, options=options, **common)
        self.penalised = penalty != "quadratic"  # Which leads to the target by itself.
        self.threshold = nn.Parameter(torch.full((self.d_sae,), float(initial_threshold)))

    def _check_options(self, common: Common) -> None:
        meant = [unit for unit in common["units"] or () if unit in get_args(Penalty)]
        if meant and self.penalty not in meant:
            recipe = self.kind if self.penalty == "step" else f"{self.kind}_{self.penalty}"
            raise ConfigError(
                f"sae.penalty={self.penalty}: the coefficients of this recipe are for {meant[0]}; "
                f"take sae={recipe}, or choose your own and set sae.units=null"
            )
        super()._check_options(common)
        if self.penalty == "quadratic" and common["target_l0"] is None:
            raise ConfigError("sae.penalty=quadratic: aims at sae.target_l0, which is null; set it")
        if self.initial_l0 is not None and self.initial_l0 >= self.d_sae:
            raise ConfigError(f"sae.initial_l0={self.initial_l0:g}: must be < d_sae={self.d_sae}")

    def encode(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_sae"]:
        """See `SAE.encode`."""
        return self.activate(All(self.pre_activations(self.scaled(x))))

    def activate(self, pre_acts: PreActs) -> Float[Tensor, "..."]:
        """F of pre-activations, which are compared in the thresholds' precision."""
        z = pre_acts.z.to(self.threshold.dtype)
        to_z = self.penalty == "tanh"
        threshold = pre_acts.per_latent(self.threshold)
        return jump(z if to_z else z.relu(), threshold, self.bandwidth, to_z=to_z)

    def floor(self) -> Float[Tensor, " d_sae"]:
        """What a pre-activation must exceed to be active, or to move its threshold.

        That of a latent whose threshold is within half a bandwidth of 0 is moved by each ReLU(z)
        that is 0, and so by all.
        """
        threshold = self.threshold.detach()
        reach = 0.501 * self.bandwidth  # A little more than half, as sums are rounded.
        floor = threshold - reach
        return floor if self.penalty == "tanh" else floor.where(floor > 0, -torch.inf)

    def loss(self, x: Float[Tensor, "n d_in"], state: TrainState) -> Loss:
        """Squared error on scaled activations, and the penalty, mean over rows."""
        scaled = self.scaled(x)
        pre_acts = self.above(scaled, self.floor())
        acts = self.activate(pre_acts)
        found = pre_acts.reconstruct(acts, self.W_dec, self.b_dec, scaled)
        term = (self.l0_coefficient * state.penalty, self.sparsity(pre_acts, acts))
        terms = {f"{self.penalty}_penalty": term}
        return self.loss_of(x, scaled, found, pre_acts.fired(acts), **terms)

    def sparsity(self, pre_acts: PreActs, acts: Float[Tensor, "..."]) -> Float[Tensor, ""]:
        """The penalty without its coefficient."""
        if self.penalty == "tanh":
            norms = pre_acts.per_latent(self.W_dec.norm(dim=1))
            return (self.tanh_scale * acts * norms).tanh().sum() / pre_acts.n
        z = pre_acts.z.to(self.threshold.dtype).relu()
        l0 = step(z, pre_acts.per_latent(self.threshold), self.bandwidth).sum() / pre_acts.n
        off: Tensor = l0 / float(self.target_l0 or 1) - 1
        return l0 if self.penalty == "step" else off.square()

    @torch.no_grad()
    def initialise_weights(self, stats: ActivationStats, generator: torch.Generator) -> None:
        """See `SAE.initialise_weights`; with `initial_l0`, latents fire equally often at first."""
        self.threshold.fill_(self.initial_threshold)
        super().initialise_weights(stats, generator)
        if self.initial_l0 is not None:
            scaled, share = self.scaled(stats.sample[:8192]), self.initial_l0 / self.d_sae
            for latents in torch.split(torch.arange(self.d_sae, device=scaled.device), 1024):
                z = self.pre_activations(scaled, latents)
                self.b_enc[latents] = self.threshold[latents] - z.quantile(1 - share, dim=0)

    @torch.no_grad()
    def after_step(self, *, normalised: bool = False) -> None:
        """See `SAE.after_step`; thresholds stay ≥ 0.

        At 0, a pseudo-derivative of tanh, in proportion to θ, would stay 0 for ever.
        """
        super().after_step(normalised=normalised)
        self.threshold.clamp_(min=0.01 * self.initial_threshold if self.penalty == "tanh" else 0)

    @torch.no_grad()
    def reset_latents(
        self, latents: Int64[Tensor, " m"], directions: Float[Tensor, "m d_in"], norm: float
    ) -> None:
        """See `SAE.reset_latents`; the threshold is that of the start."""
        super().reset_latents(latents, directions, norm)
        self.threshold[latents] = self.initial_threshold

    def thresholds(self, latents: Int64[Tensor, " m"]) -> Float[Tensor, " m"]:
        """See `SAE.thresholds`; with a gradient."""
        return self.threshold[latents]

    def scale_latents(self, factor: Tensor) -> None:
        """See `SAE.scale_latents`."""
        super().scale_latents(factor)
        self.threshold.mul_(factor)

    @torch.no_grad()
    def fold(self) -> Weights:
        """See `SAE.fold`; norms of a free decoder go into the encoder, as in `relu`."""
        super().fold()
        if self.decoder_norm == "free":
            self.move_norms()
        return self
