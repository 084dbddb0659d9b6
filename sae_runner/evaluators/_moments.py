"""The sums that reconstruction metrics are made of: moments, and what is centred row by row."""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from sae_runner.evaluators._numbers import chunks, float64_home, plain_list

# Squared, per row: below it, what is divided by counts as 0.
FLAT, ON_THE_MEAN = 1e-10, 1e-8


class Squares(NamedTuple):
    """Of each row, in float64 on the CPU."""

    error: Float64[Tensor, " n"]
    """‖r‖²"""
    x: Float64[Tensor, " n"]
    """‖x‖²"""
    x_hat: Float64[Tensor, " n"]
    """‖x̂‖²"""
    product: Float64[Tensor, " n"]
    """x·x̂"""
    from_shift: Float64[Tensor, " n"]
    """‖x − shift‖²"""


class Moments:
    """First and second moments of x and r.

    x is taken from a shift near its mean, so that Σ‖x − x̄‖² loses no digits to a large mean.
    """

    def __init__(self, d_in: int, shift: Float64[Tensor, " d_in"] | None) -> None:
        self.n = 0
        self.shift = shift
        self.sum_error, self.sum_from_shift = 0.0, 0.0
        self.sum_r = torch.zeros(d_in, dtype=torch.float64)
        self.sum_x = torch.zeros(d_in, dtype=torch.float64)

    def add(self, x: Float[Tensor, "n d_in"], x_hat: Float[Tensor, "n d_in"]) -> Squares:
        """Take one row or more into account, and say what each contributed."""
        x, x_hat = float64_home(x.detach()), float64_home(x_hat.detach())
        if self.shift is None:
            self.shift = x[0].cpu().double()
        shift = self.shift.to(x.device)
        pairs = zip(chunks(x), chunks(x_hat), strict=True)
        parts = [self._add(ours, theirs, shift) for ours, theirs in pairs]
        squares = Squares(*torch.cat(parts, dim=1).cpu())
        self.n += len(x)
        self.sum_error += float(squares.error.sum())
        self.sum_from_shift += float(squares.from_shift.sum())
        return squares

    def _add(self, x: Tensor, x_hat: Tensor, shift: Tensor) -> Tensor:
        x, x_hat = x.double(), x_hat.double()
        r, from_shift = x - x_hat, x - shift
        self.sum_r += r.sum(0).cpu()
        self.sum_x += from_shift.sum(0).cpu()
        pairs = ((r, r), (x, x), (x_hat, x_hat), (x, x_hat), (from_shift, from_shift))
        return torch.stack([torch.linalg.vecdot(a, b) for a, b in pairs])

    @property
    def mean(self) -> Float64[Tensor, " d_in"]:
        """x̄ of the rows so far."""
        from_shift = self.sum_x / max(self.n, 1)
        return from_shift if self.shift is None else from_shift + self.shift

    @property
    def spread(self) -> float:
        """Σ‖x − x̄‖², with x̄ of the rows so far."""
        return self._spread(self.sum_from_shift, self.sum_x)

    @property
    def error_spread(self) -> float:
        """Σ‖r − r̄‖²."""
        return self._spread(self.sum_error, self.sum_r)

    def _spread(self, sum_of_squares: float, total: Tensor) -> float:
        spread = sum_of_squares - float(total @ total) / max(self.n, 1)
        return 0.0 if spread < 0 else spread  # Not max(): that would turn a NaN into a 0.


class Centred:
    """What is centred row by row: mean relative error, its histogram, errors by position."""

    edges = np.linspace(-6, 3, 91)

    def __init__(self) -> None:
        self.n, self.n_skipped = 0, 0
        self.sum_relative = 0.0
        self.n_below, self.n_above = 0, 0
        self.histogram = np.zeros(len(self.edges) - 1, dtype=np.int64)
        self.by_position = torch.zeros(0, 3, dtype=torch.float64)

    def add(
        self,
        error: Float64[Tensor, " n"],
        spread: Float64[Tensor, " n"],
        position: Int64[Tensor, " n"],
    ) -> None:
        """Take ‖r‖² and ‖x − x̄‖² of rows into account."""
        counted = spread >= ON_THE_MEAN
        relative = error[counted] / spread[counted]
        self.n += len(relative)
        self.n_skipped += int((~counted).sum())
        self.sum_relative += float(relative.sum())
        log10 = relative.log10().numpy()
        self.n_below += int((log10 < self.edges[0]).sum())
        self.n_above += int((log10 > self.edges[-1]).sum())
        self.histogram += np.histogram(log10, self.edges)[0]
        placed = position >= 0  # Averaged tokens have none.
        if not placed.any():
            return
        grow = int(position.max()) + 1 - len(self.by_position)
        self.by_position = torch.nn.functional.pad(self.by_position, (0, 0, 0, max(0, grow)))
        row = torch.stack([torch.ones_like(error), error, spread], dim=1)
        self.by_position.index_add_(0, position[placed], row[placed])

    def series(self, d_in: int) -> dict[str, object]:
        """`error_by_position` (with two positions or more) and `error_histogram`."""
        found: dict[str, object] = {
            "error_histogram": {
                "edges": plain_list(self.edges),
                "counts": plain_list(self.histogram),
                "n_below": self.n_below,
                "n_above": self.n_above,
                "n_skipped": self.n_skipped,
            }
        }
        position = self.by_position[:, 0].nonzero().squeeze(1)
        if len(position) > 1:
            n, error, spread = self.by_position[position].T
            fvu = torch.where(spread < FLAT * n, torch.nan, error / spread)
            found["error_by_position"] = {
                "position": plain_list(position),
                "fvu": plain_list(fvu),
                "mse": plain_list(error / (n * d_in)),
                "n": plain_list(n.long()),
            }
        return found
