"""What a screen in bfloat16 may be off by; that of int8 is in native/int8.h."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

SCREEN_ERROR = 4 * 2.0**-9
"""What a threshold is lowered by, in units of the rounding of a sum: see `ScreenError`."""


class ScreenError:
    """How far a product in bfloat16 is off at most, of all latents: 4 · 2^-9 √(Σ_i x_i² W_ji²).

    Factors are off by a relative 2^-9 at most, at random, so a sum is by less than the root, a few
    times. It is at most ‖x‖₄ ‖W_j‖₄ (Cauchy-Schwarz), and at most ‖x · max_j |W_j|‖: less than the
    former where a column of x is far larger than the others, and W small there.
    """

    def __init__(self, W: Float[Tensor, "d_sae d"], b: Float[Tensor, " d_sae"]) -> None:
        self.length, self.columns = norm4(W).max(), W.abs().amax(0)
        self.of_b = 2**-20 * b.abs().max()  # Sums as large as that are rounded in float32.

    def of(self, x: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        """Of each row."""
        by_columns = torch.linalg.vector_norm(x * self.columns, dim=1)
        error = SCREEN_ERROR * torch.minimum(norm4(x) * self.length, by_columns) + self.of_b
        return error.nan_to_num(math.inf, math.inf)


def norm4(x: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """‖x‖₄ of each row."""
    some = len(x) if x.device.type != "cpu" else max(1, 2**18 // x.shape[1])  # Stay in a cache.
    parts = [torch.linalg.vector_norm(part.square(), dim=1).sqrt() for part in torch.split(x, some)]
    return torch.cat(parts)
