"""Transcoder: latents of one site predict another (Dunefsky et al. 2024, arXiv 2406.11944)."""

from typing import Literal, Unpack

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sae_runner.config import Fraction, NonNegativeFloat, Positive
from sae_runner.errors import ConfigError
from sae_runner.saes import SAES, _scaling
from sae_runner.saes._initialisation import geometric_median, random_directions
from sae_runner.saes._weights import Weights
from sae_runner.saes.base import Common, SAEOutput
from sae_runner.saes.topk import TopK
from sae_runner.statistics import ActivationStats


@SAES.register("transcoder")
class Transcoder(TopK):
    """TopK latents of x that reconstruct y, such as an MLP's output from its input.

    z = s x W_enc + b_enc,    f = ReLU(TopK_k(z)),    y_hat = (f W_dec + s x W_skip^T + b_dec) / t

    with a scale t of y alone and, with `skip`, a matrix W_skip [d_out, d_in] past the latents
    (Paulo et al. 2025, arXiv 2501.18823). Rows of a store hold x and y side by side; a loss takes
    such rows [n, d_in + d_out], `transcoder(x)` takes x alone.

    Raises:
        ConfigError: an option that only an autoencoder can have.
    """

    kind = "transcoder"
    end_to_end_refused = "it predicts another site than it reads"
    resampling_refused = (
        "latents write to another site than they read: no row shows both directions"
    )

    def __init__(
        self,
        d_in: int,
        d_out: int,
        *,
        k: Positive,
        skip: bool,
        selection: Literal["topk", "groupmax", "abstopk"],
        multi_topk: NonNegativeFloat,
        k_start: Positive | None,
        k_anneal: Fraction,
        **common: Unpack[Common],
    ) -> None:
        self.d_out, self.skip = d_out, skip
        for key, value, needed in (
            ("apply_b_dec_to_input", common["apply_b_dec_to_input"], False),
            ("encoder_init", common["encoder_init"], "random"),
        ):
            if value != needed:
                raise ConfigError(
                    f"sae.{key}={str(value).lower()}: a transcoder reads another site than it "
                    f"writes; set it to {str(needed).lower()}"
                )
        if common["input_scaling"] in ("layer_norm", "whitening"):
            raise ConfigError(
                f"sae.input_scaling={common['input_scaling']}: a transcoder takes none, sqrt_d or "
                "unit_mean_square"
            )
        super().__init__(
            d_in, k=k, selection=selection, multi_topk=multi_topk, k_start=k_start,
            k_anneal=k_anneal, **common,
        )  # fmt: skip
        self.options["skip"] = skip
        self.register_buffer("target_scale", torch.ones(()))

    target_scale: Tensor
    """t; 1 after `fold`."""

    def make_weights(self) -> None:
        """See `SAE.make_weights`."""
        super().make_weights()
        if self.skip:
            self.W_skip = nn.Parameter(torch.zeros(self.d_out, self.d_in))

    def input_of(self, rows: Float[Tensor, "n width"]) -> Float[Tensor, "n d_in"]:
        """See `SAE.input_of`."""
        return rows[:, : self.d_in]

    def target_of(self, rows: Float[Tensor, "n width"]) -> Float[Tensor, "n d_out"]:
        """See `SAE.target_of`."""
        return rows[:, self.d_in :]

    def target_for(
        self, x: Float[Tensor, "n width"], scaled: Float[Tensor, "n d_in"]
    ) -> Float[Tensor, "n d_out"]:
        """See `TopK.target_for`."""
        return self.scaled_target(x)

    def scaled_target(self, x: Float[Tensor, "n width"]) -> Float[Tensor, "n d_out"]:
        """The target y as the loss sees it."""
        return self.target_of(x).to(self.b_dec.dtype) * self.target_scale

    def unscaled(self, x_hat: Tensor, x: Tensor | None = None) -> Tensor:
        """See `SAE.unscaled`: the units of y."""
        return x_hat / self.target_scale

    def base_of(self, scaled: Float[Tensor, "n d_in"]) -> Tensor:
        """See `TopK.base_of`: b_dec and what the skip connection gives."""
        if not self.skip:
            return self.b_dec
        return nn.functional.linear(scaled, self.W_skip, self.b_dec)

    def forward(self, x: Float[Tensor, "n d_in"]) -> SAEOutput:
        """Latents of x, and y as they predict it."""
        latents = self.encode_sparse(x)
        skipped = self.base_of(self.scaled(x)) - self.b_dec
        return SAEOutput(self.unscaled(self.decode_scaled(latents) + skipped), latents)

    @torch.no_grad()
    def set_input_scale(self, stats: ActivationStats) -> None:
        """Learn both scales from statistics of rows that hold x and y."""
        sample = self.target_of(stats.sample)
        norms = sample.double().norm(dim=1) if sample.device.type != "mps" else sample.norm(dim=1)
        target = ActivationStats(
            self.target_of(stats.mean.unsqueeze(0))[0],
            float(norms.mean()), float(norms.square().mean()), sample,
        )  # fmt: skip
        self.input_scale.fill_(_scaling.factor(stats, self.input_scaling, self.d_in))
        self.target_scale.fill_(_scaling.factor(target, self.input_scaling, self.d_out))
        if self.loss_reduction == "normalised":
            t = float(self.target_scale)
            mean = target.mean.cpu().double().unsqueeze(0)
            self.set_baseline(t * sample.cpu().double(), t * mean)

    @torch.no_grad()
    def initialise_weights(self, stats: ActivationStats, generator: torch.Generator) -> None:
        """Independent random directions on both sides; b_dec a centre of y; the skip zero."""
        self.W_dec.copy_(random_directions(self.d_sae, self.d_out, generator))
        self.W_dec.mul_(self.options["decoder_init_norm"])
        self.W_enc_rows.copy_(random_directions(self.d_sae, self.d_in, generator))
        self.b_enc.zero_()
        self.b_dec.zero_()
        if self.b_dec_init != "zero":
            sample = self.scaled_target(stats.sample.float())
            mean = self.b_dec_init == "mean"
            self.b_dec.copy_(sample.mean(0) if mean else geometric_median(sample))
        if self.skip:
            self.W_skip.zero_()

    @torch.no_grad()
    def fold(self) -> Weights:
        """See `SAE.fold`: the decoder is kept, so latents are in the units of y."""
        return self._rescale(self.input_scale, self.target_scale)

    @torch.no_grad()
    def unfold_like(self, other: Weights) -> Weights:
        """See `SAE.unfold_like`."""
        assert isinstance(other, Transcoder)
        return self._rescale(1 / other.input_scale, 1 / other.target_scale)

    def _rescale(self, s: Tensor, t: Tensor) -> Weights:
        s, t = s.clone(), t.clone()
        self.W_enc_rows.mul_(s / t)
        self.scale_latents(1 / t)
        self.b_dec.div_(t)
        if self.skip:
            self.W_skip.mul_(s / t)
        if self.loss_reduction == "normalised":
            self.mean_baseline_mse.div_(t**2)
        self.input_scale.div_(s)
        self.target_scale.div_(t)
        return self
