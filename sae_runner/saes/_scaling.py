"""How activations are brought to a standard size before the weights see them, and back."""

from collections.abc import Callable, Hashable
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sae_runner.statistics import ActivationStats

InputScaling = Literal["none", "sqrt_d", "unit_mean_square", "layer_norm", "whitening"]
EPSILON = 1e-5
"""Added to the deviation of a row before dividing by it, as Gao et al. and SAELens do."""


def factor(stats: ActivationStats, scaling: InputScaling, d: int) -> float:
    """S with E‖s x‖ = √d (`sqrt_d`) or E‖s x‖² = 1 (`unit_mean_square`); 1 for all others."""
    if scaling == "sqrt_d":
        return float(d**0.5 / max(stats.mean_norm, 1e-12))
    if scaling == "unit_mean_square":
        return float(max(stats.mean_square_norm, 1e-24) ** -0.5)
    return 1.0


class ScaledOnce:
    """Scaled rows of the batch that several SAEs are trained on: the first computes, others take.

    Rows are known by where they lie in the batch, which is kept for as long: so are parts of it.
    """

    def __init__(self) -> None:
        self.batch: Tensor | None = None
        self._found = dict[Hashable, Tensor]()

    def begin(self, batch: Tensor | None) -> None:
        """Go over to another batch, or to none."""
        self.batch, self._found = batch, {}

    def of(self, x: Tensor, scaling: Hashable, scale: Callable[[Tensor], Tensor]) -> Tensor:
        """`scale(x)`, which is not to be written into; rows of elsewhere are not remembered."""
        batch = self.batch
        if batch is None or x.untyped_storage().data_ptr() != batch.untyped_storage().data_ptr():
            return scale(x)
        key = (scaling, x.data_ptr(), x.shape, x.stride())
        if key not in self._found:
            self._found[key] = scale(x)
        return self._found[key]

    def __deepcopy__(self, _: object) -> "ScaledOnce":
        return ScaledOnce()  # A copy of an SAE may be folded, and scales no more.


class Rows(NamedTuple):
    """What layer norm takes out of each row."""

    mean: Float[Tensor, "n 1"]
    deviation: Float[Tensor, "n 1"]


def rows_of(x: Float[Tensor, "n d"]) -> Rows:
    """Mean and standard deviation (over d − 1) of each row."""
    mean = x.mean(1, keepdim=True)
    square = (x - mean).square().sum(1, keepdim=True)
    return Rows(mean, (square / max(x.shape[1] - 1, 1)).sqrt())


class Whitening(NamedTuple):
    """z = (x − mean) forward, and x = z backward + mean."""

    mean: Float[Tensor, " d"]
    forward: Float[Tensor, "d d"]
    backward: Float[Tensor, "d d"]


def whitening_of(stats: ActivationStats, *, ridge: float = 1e-3) -> Whitening:
    """The symmetric matrix that gives the sample's coordinates unit covariance (ZCA).

    A = E (Λ + ridge · mean Λ)^(−1/2) Eᵀ of the covariance E Λ Eᵀ, in float64 on the CPU. The ridge
    keeps directions without variance from being blown up.
    """
    mean = stats.mean.cpu().double()
    deviations = stats.sample.cpu().double() - mean
    covariance = deviations.T @ deviations / max(len(deviations), 1)
    values, vectors = torch.linalg.eigh(covariance)
    values = values.clamp_min(0)
    root = (values + ridge * values.mean()).clamp_min(1e-24).sqrt()
    return Whitening(mean, (vectors / root) @ vectors.T, (vectors * root) @ vectors.T)
