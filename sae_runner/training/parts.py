"""The loss of a step that is taken in parts, each with a backward pass of its own."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from sae_runner.saes.base import SAE, Loss


class Fit(NamedTuple):
    """How well rows are reconstructed: sums over them and their width, in the units of x."""

    error: Float[Tensor, ""]
    """Σ (x − x̂)²."""
    square: Float[Tensor, ""]
    """Σ x²."""
    deviation: Float[Tensor, ""]
    """Σ (x − mean)², of the mean training row."""


class Taken:
    """What is known of a step once it is taken: the numbers of its loss, and a part's rows.

    Of parts that others follow no row is kept: all of them would be as large as a batch is that was
    to be taken in parts for the sake of memory. Means are weighted by rows.
    """

    def __init__(self, sae: SAE, mean: Float[Tensor, " d_out"]) -> None:
        self.sae, self.mean = sae, mean
        self._losses = list[Loss]()
        self._n_rows = list[int]()
        self._fits = list[Fit]()

    def add(self, loss: Loss) -> None:
        """Take in a part whose backward pass is done."""
        self._losses.append(Loss(*(_without_graph(field) for field in loss)))
        self._n_rows.append(len(loss.x))

    def shed(self) -> None:
        """Keep sums alone of the rows so far; before another part needs their memory."""
        for i in range(len(self._fits), len(self._losses)):
            loss = self._losses[i]
            self._fits.append(self._fit_of(loss))
            none = loss.x[:0].clone()  # A view would keep them all.
            self._losses[i] = loss._replace(x=none, x_hat=none, residual=none)

    def _fit_of(self, loss: Loss) -> Fit:
        x = self.sae.target_of(loss.x)
        deviation = (x - self.mean).square().sum()
        return Fit((x - loss.x_hat).square().sum(), x.square().sum(), deviation)

    @property
    def n_rows(self) -> int:
        """Of the whole batch."""
        return sum(self._n_rows)

    @property
    def last(self) -> Loss:
        """The loss of the last part, with its rows."""
        return self._losses[-1]

    @property
    def total(self) -> Float[Tensor, ""]:
        """See `Loss.total`."""
        return self._mean([loss.total for loss in self._losses])

    @property
    def parts(self) -> dict[str, Tensor]:
        """See `Loss.parts`."""
        names = self.last.parts
        return {name: self._mean([loss.parts[name] for loss in self._losses]) for name in names}

    @property
    def l0(self) -> Float[Tensor, ""]:
        """See `Loss.l0`."""
        return self._mean([loss.l0 for loss in self._losses])

    @property
    def fired(self) -> Int64[Tensor, " d_sae"]:
        """See `Loss.fired`."""
        if len(self._losses) == 1:
            return self.last.fired
        return torch.stack([loss.fired for loss in self._losses]).sum(0)

    @property
    def fit(self) -> Fit:
        """Of the whole batch."""
        fits = [*self._fits, *map(self._fit_of, self._losses[len(self._fits) :])]
        return Fit(*(torch.stack(sums).sum() for sums in zip(*fits, strict=True)))

    def _mean(self, values: list[Tensor]) -> Float[Tensor, ""]:
        if len(values) == 1:
            return values[0]
        weights = [n / self.n_rows for n in self._n_rows]
        return torch.stack([w * value for w, value in zip(weights, values, strict=True)]).sum()


def _without_graph(field: Any) -> Any:
    if isinstance(field, dict):
        return {k: v.detach() for k, v in field.items()}
    return field.detach()
