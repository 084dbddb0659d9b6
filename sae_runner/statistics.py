"""Statistics of activations: what the store knows and an SAE's initialisation may use."""

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor


class ActivationStats(NamedTuple):
    """What initialisation may know of the training activations."""

    mean: Float[Tensor, " d_in"]
    mean_norm: float
    """E‖x‖₂"""
    mean_square_norm: float
    """E‖x‖₂²"""
    sample: Float[Tensor, "n d_in"]
    """Some shuffled rows."""
