"""TopK SAE with the AuxK loss (Gao et al. 2024, arXiv 2406.04093)."""

import math
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from sae_runner.config import NonNegativeFloat, Positive, PositiveFloat
from sae_runner.errors import ConfigError, DataError
from sae_runner.saes import SAES
from sae_runner.saes.base import (
    SAE,
    BiasInit,
    InputScaling,
    Latents,
    Loss,
    TrainState,
    sum_rows,
    width,
)
from sae_runner.statistics import ActivationStats


@SAES.register("topk")
class TopK(SAE):
    """The k largest pre-activations of each row, where positive.

    z = (s x − b_dec) W_enc + b_enc,    f = ReLU(TopK_k(z)),    x_hat = (f W_dec + b_dec) / s,
    with decoder rows of norm 1 (Gao et al. 2024, §2.3 and appendix A).

    Raises:
        ConfigError: more latents are to be chosen than there are.
    """

    kind = "topk"

    def __init__(
        self,
        d_in: int,
        *,
        d_sae: Positive | None,
        expansion: PositiveFloat | None,
        k: Positive,
        target_l0: Positive | None,
        auxk_coefficient: NonNegativeFloat,
        k_aux: Positive | None,
        loss_reduction: Literal["sum", "mean", "normalised"],
        input_scaling: InputScaling,
        b_dec_init: BiasInit,
    ) -> None:
        n_latents = width(d_in, d_sae, expansion)
        chosen = k if target_l0 is None else target_l0
        name = "k" if target_l0 is None else "target_l0"
        for key, number in ((name, chosen), ("k_aux", k_aux or 1)):
            if number > n_latents:
                raise ConfigError(f"sae.{key}={number}: must be <= d_sae={n_latents}")
        options = {
            "k": chosen,
            "target_l0": target_l0,
            "auxk_coefficient": auxk_coefficient,
            "k_aux": k_aux,
            "loss_reduction": loss_reduction,
            "b_dec_init": b_dec_init,
            "input_scaling": input_scaling,
        }
        super().__init__(d_in, n_latents, input_scaling=input_scaling, options=options)
        self.k, self.k_aux = chosen, k_aux or min(default_k_aux(d_in), n_latents)
        self.auxk_coefficient = auxk_coefficient
        self.loss_reduction, self.b_dec_init = loss_reduction, b_dec_init
        self.register_buffer("mean_baseline_mse", torch.ones(()))

    mean_baseline_mse: Tensor
    """MSE of predicting the dataset's mean, in scaled units: what `normalised` divides by."""

    def pre_activations(self, scaled: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_sae"]:
        """Z of rows that are already multiplied by s."""
        return nn.functional.linear(scaled - self.b_dec, self.W_enc_rows, self.b_enc)

    def choose(
        self, pre_acts: Float[Tensor, "n d_sae"]
    ) -> tuple[Float[Tensor, "n k"], Int64[Tensor, "n k"]]:
        """Values and indices of exactly k latents of each row; values may be zero."""
        values, indices = pre_acts.topk(self.k, dim=1, sorted=False)
        return values.relu(), indices

    def encode(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_sae"]:
        """See `SAE.encode`."""
        pre_acts = self.pre_activations(self.scaled(x))
        values, indices = self.choose(pre_acts)
        return torch.zeros_like(pre_acts).scatter(1, indices, values)

    def encode_chunk(self, x: Float[Tensor, "n d_in"]) -> Latents:
        """See `SAE.encode_chunk`; no dense latents are made."""
        values, indices = self.choose(self.pre_activations(self.scaled(x)))
        return Latents.from_topk(values, indices, self.d_sae)

    def loss(self, x: Float[Tensor, "n d_in"], state: TrainState) -> Loss:
        """`reduced squared error + α L_aux` on scaled activations (appendix A.2)."""
        scaled = self.scaled(x)
        pre_acts = self.pre_activations(scaled)
        values, indices = self.choose(pre_acts)
        x_hat = sum_rows(self.W_dec, indices, values) + self.b_dec
        sse = (scaled - x_hat).square().sum(1).mean()
        match self.loss_reduction:
            case "sum":
                parts = {"sse": sse}
            case "mean":
                parts = {"mse": sse / self.d_in}
            case "normalised":
                parts = {"normalised_mse": sse / self.d_in / self.mean_baseline_mse}
        total = sum(parts.values(), sse.new_zeros(()))
        if self.auxk_coefficient > 0:
            auxk = sse.new_zeros(())
            if state.dead is not None:
                residual = (scaled - x_hat).detach()
                auxk = auxk_loss(residual, pre_acts, state.dead, self.W_dec, self.k_aux)
            parts["auxk"] = auxk
            total = total + self.auxk_coefficient * auxk
        fired = torch.bincount(indices[values > 0], minlength=self.d_sae)
        l0 = fired.sum() / max(len(x), 1)
        parts = {name: part.detach() for name, part in parts.items()}
        return Loss(total, parts, x_hat.detach() / self.input_scale, fired, l0)

    def initialise(self, stats: ActivationStats, generator: torch.Generator) -> None:
        """See `SAE.initialise`.

        Raises:
            DataError: `normalised` and all activations are equal.
        """
        self.set_input_scale(stats)
        self.initialise_weights(1.0, generator)
        self.initialise_b_dec(stats, self.b_dec_init)
        # On the CPU: Metal has no float64.
        deviations = stats.sample.cpu().double() - stats.mean.cpu().double()
        baseline = deviations.square().mean() * float(self.input_scale) ** 2
        if self.loss_reduction == "normalised" and not baseline > 0:
            raise DataError("sae.loss_reduction=normalised: all training activations are equal")
        self.mean_baseline_mse.copy_(baseline)

    def before_step(self) -> None:
        """See `SAE.before_step`: the step may not lengthen decoder rows."""
        self.remove_parallel_gradient()

    def after_step(self) -> None:
        """See `SAE.after_step`: decoder rows have norm 1."""
        self.normalise_decoder()

    @torch.no_grad()
    def fold(self) -> "SAE":
        """See `SAE.fold`; a normalised loss does not change either."""
        self.mean_baseline_mse.div_(self.input_scale**2)
        return super().fold()

    @torch.no_grad()
    def unfold(self, scale: float) -> "SAE":
        """See `SAE.unfold`."""
        self.mean_baseline_mse.mul_(scale**2)
        return super().unfold(scale)


def default_k_aux(d_in: int) -> int:
    """The power of two nearest to d_in / 2 on a log scale (Gao et al., appendix A.2)."""
    return int(2 ** max(0, round(math.log2(d_in / 2))))


def auxk_loss(
    residual: Float[Tensor, "n d_in"],
    pre_acts: Float[Tensor, "n d_sae"],
    dead: Bool[Tensor, " d_sae"],
    W_dec: Float[Tensor, "d_sae d_in"],
    k_aux: int,
) -> Float[Tensor, ""]:
    """How badly dead latents predict what the live ones leave over (Gao et al., appendix A.2).

    With e the residual (no gradient flows into it) and z the pre-activations of dead latents,

        L_aux = min(n_dead / k_aux, 1) · MSE(e, ReLU(TopK_{k_aux}(z)) W_dec) / MSE(e, mean row of e)

    and 0 where the residual has no variance. The first factor, so that a few dead latents are not
    asked to explain everything, is not in the paper.
    """
    candidates = dead.nonzero().squeeze(1)
    n_dead = len(candidates)
    if n_dead == 0:
        return residual.new_zeros(())
    values, chosen = pre_acts.index_select(1, candidates).topk(min(k_aux, n_dead), dim=1)
    predicted = sum_rows(W_dec, candidates[chosen], values.relu())
    variance = (residual - residual.mean(0)).square().mean()
    # A NaN that is replaced afterwards would still be one in the gradient.
    weight = torch.where(variance > 0, 1 / variance, 0) * min(n_dead / k_aux, 1)
    return weight * (predicted - residual).square().mean()
