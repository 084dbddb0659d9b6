"""Matching-pursuit SAE (Costa et al. 2025, arXiv 2506.03093)."""

from typing import NamedTuple, Unpack

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from sae_runner.config import NonNegativeFloat, Positive
from sae_runner.errors import ConfigError
from sae_runner.kernels.autograd import Reconstruction
from sae_runner.saes import SAES
from sae_runner.saes.base import SAE, Common, Latents, Loss, TrainState
from sae_runner.saes.topk import chosen_k

ONE_MATRIX = {"apply_b_dec_to_input": True, "encoder_init": "transposed", "decoder_norm": "unit"}


class Pursuit(NamedTuple):
    """What was taken out of each row, in order, and what is left."""

    values: Float[Tensor, "n k"]
    """Zero from where a row has stopped."""
    indices: Int64[Tensor, "n k"]
    residual: Float[Tensor, "n d_in"]


@SAES.register("matching_pursuit")
class MatchingPursuit(SAE):
    """Latents one after another, each the best for what those before it left over.

    With unit rows w_i of W_dec, which is the encoder too: r = s x − b_dec, then k times

        i = argmax_j ⟨r, w_j⟩,    v = ReLU⟨r, w_i⟩,    f_i ← f_i + v,    r ← r − v w_i

    and x_hat = (f W_dec + b_dec) / s. A row stops early where no projection is positive, where
    ‖r‖ < `residual_threshold` (in scaled units) and, with `stop_on_repeat`, once it takes a latent
    for the second time (that step counts): the rules of SAELens. Gradients flow through values and
    residuals, not through the choice.

    There is neither W_enc nor b_enc, in memory or on disk. Strategies for dead latents see
    ⟨s x − b_dec, w_i⟩.

    Raises:
        ConfigError: an option would need an encoder of its own, or k exceeds d_sae.
    """

    kind = "matching_pursuit"
    pre_act_refused = "a latent fires by being the best match, not by passing a threshold"
    no_pre_acts = "what a latent sees depends on those that are taken before it"

    def __init__(
        self,
        d_in: int,
        *,
        k: Positive,
        residual_threshold: NonNegativeFloat,
        stop_on_repeat: bool,
        **common: Unpack[Common],
    ) -> None:
        self.k = chosen_k(d_in, k, None, common)
        self.residual_threshold, self.stop_on_repeat = residual_threshold, stop_on_repeat
        options = {
            "k": self.k, "residual_threshold": residual_threshold, "stop_on_repeat": stop_on_repeat,
        }  # fmt: skip
        super().__init__(d_in, options=options, **common)
        for key, value in ONE_MATRIX.items():
            if (found := self.options[key]) != value:
                raise ConfigError(
                    f"sae.{key}={str(found).lower()}: encoder and decoder are one matrix of unit "
                    f"rows here; set it to {str(value).lower()}"
                )
        if self.input_scaling == "whitening":
            raise ConfigError(
                "sae.input_scaling=whitening: one matrix cannot take in both the whitening and its "
                "inverse, so it could not be folded; choose another"
            )

    def make_weights(self) -> None:
        """See `SAE.make_weights`; the decoder is the encoder."""
        self.W_dec = nn.Parameter(torch.empty(self.d_sae, self.d_in))
        self.b_dec = nn.Parameter(torch.zeros(self.d_in))

    @property
    def W_enc_rows(self) -> Tensor:  # type: ignore[override]
        """The decoder."""
        return self.W_dec

    @property
    def b_enc(self) -> Tensor:  # type: ignore[override]
        """Zeros."""
        return self.W_dec.new_zeros(self.d_sae)

    @torch.no_grad()
    def choose(
        self, residual: Float[Tensor, "n d_in"]
    ) -> tuple[Int64[Tensor, "n k"], Bool[Tensor, "n k"]]:
        """Which latents are taken in turn, and whether the row had not stopped yet."""
        going = torch.ones(len(residual), dtype=torch.bool, device=residual.device)
        indices = torch.zeros(len(residual), self.k, dtype=torch.int64, device=residual.device)
        taken = torch.zeros_like(indices, dtype=torch.bool)
        for t in range(self.k):
            best = nn.functional.linear(residual, self.W_dec).argmax(1)
            row = self.W_dec[best]
            value = (residual * row).sum(1)
            going = going & (value > 0)
            repeated = ((indices == best.unsqueeze(1)) & taken).any(1)
            indices[:, t], taken[:, t] = best, going
            residual = residual - (value * going).unsqueeze(1) * row
            going = going & (residual.norm(dim=1) >= self.residual_threshold)
            if self.stop_on_repeat:
                going = going & ~repeated
            if not going.any():
                break
        return indices, taken

    def pursue(self, scaled: Float[Tensor, "n d_in"]) -> Pursuit:
        """The choice, then the same steps once more for the gradient: no [n, k, d_sae] anywhere."""
        residual, values = scaled - self.b_dec, []
        indices, taken = self.choose(residual)
        rows = nn.functional.embedding(indices, self.W_dec)
        for row, alive in zip(rows.unbind(1), taken.unbind(1), strict=True):
            value = (residual * row).sum(1).relu() * alive
            residual = residual - value.unsqueeze(1) * row
            values.append(value)
        return Pursuit(torch.stack(values, dim=1), indices, residual)

    def merged(self, found: Pursuit) -> Latents:
        """Sparse latents, with the values of a latent that was taken more than once summed."""
        active = found.values > 0
        starts = self.d_sae * torch.arange(len(active), device=active.device).unsqueeze(1)
        places, which = torch.unique((starts + found.indices)[active], return_inverse=True)
        values = found.values.new_zeros(len(places)).index_add(0, which, found.values[active])
        counts = torch.bincount(places // self.d_sae, minlength=len(active))
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return Latents(offsets, places % self.d_sae, values, self.d_sae)

    def encode(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_sae"]:
        """See `SAE.encode`."""
        found = self.pursue(self.scaled(x))
        zeros = found.values.new_zeros(len(x), self.d_sae)
        return zeros.scatter_add(1, found.indices, found.values)

    def encode_chunk(self, x: Float[Tensor, "n d_in"]) -> Latents:
        """See `SAE.encode_chunk`; no dense latents are made."""
        return self.merged(self.pursue(self.scaled(x)))

    def loss(self, x: Float[Tensor, "n d_in"], state: TrainState) -> Loss:
        """The reduced squared norm of what is left after the last step."""
        scaled = self.scaled(x)
        found = self.pursue(scaled)
        fired = torch.bincount(self.merged(found).indices, minlength=self.d_sae)
        rebuilt = Reconstruction.of(scaled, scaled - found.residual)
        return self.loss_of(x, scaled, rebuilt, fired)

    @torch.no_grad()
    def reset_latents(
        self, latents: Int64[Tensor, " m"], directions: Float[Tensor, "m d_in"], norm: float
    ) -> None:
        """See `SAE.reset_latents`; rows have norm 1, whatever `norm` is."""
        self.W_dec[latents] = directions.to(self.W_dec)

    def scale_latents(self, factor: Tensor) -> None:
        """See `SAE.scale_latents`; what is compared is the residual."""
        self.residual_threshold *= float(factor)
        self.options = {**self.options, "residual_threshold": self.residual_threshold}
