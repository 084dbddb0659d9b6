"""BatchTopK SAE (Bussmann, Leask and Nanda 2024, arXiv 2412.06410)."""

import math
from collections.abc import Iterator
from typing import Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from sae_runner.config import Fraction, PositiveFloat
from sae_runner.saes import SAES
from sae_runner.saes.base import SAE, Common, Latents, Loss, TrainState
from sae_runner.saes.topk import annealed, k_or_target, with_k


@SAES.register("batch_topk")
class BatchTopK(SAE):
    """The ⌊k n⌋ largest activations of a batch of n rows in training; a threshold at inference.

    z = (s x − b_dec) W_enc + b_enc,    x_hat = (f W_dec + b_dec) / s,    and with a = ReLU(z)

        training     f = a where a is among the ⌊k n⌋ largest entries of the whole batch, else 0
        inference    f = a · 1[a > θ]

    so that rows may have different numbers of latents, k on average; k need not be whole. The batch
    is what a step sees at once: a micro batch, where there are any. The paper estimates θ by the
    mean of the least activation of training batches; here `calibrate` measures the θ at which the
    mean L0 is k. θ is 0, and every positive pre-activation fires, until it was measured.

    Raises:
        ConfigError: more latents are to be chosen than there are.
    """

    kind = "batch_topk"
    sparse = True
    pre_act_refused = "a latent fires by being among the largest, not by passing a threshold"
    calibrates = True
    threshold: Tensor
    """θ; `thresholds` stays 0, for training must not depend on when θ was measured."""

    def __init__(
        self,
        d_in: int,
        *,
        k: PositiveFloat,
        k_start: PositiveFloat | None,
        k_anneal: Fraction,
        **common: Unpack[Common],
    ) -> None:
        self.k = k_or_target(d_in, k, k_start, common)
        self.k_start, self.k_anneal = k_start, k_anneal
        options = {"k": self.k, "k_start": k_start, "k_anneal": k_anneal}
        super().__init__(d_in, options=options, **common)
        self.register_buffer("threshold", torch.zeros(()))

    def encode(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_sae"]:
        """See `SAE.encode`."""
        pre_acts = self.pre_activations(self.scaled(x))
        return torch.where(pre_acts > self.threshold, pre_acts, 0)

    def encode_chunk(self, x: Float[Tensor, "n d_in"]) -> Latents:
        """See `SAE.encode_chunk`."""
        pre_acts = self.pre_activations(self.scaled(x))
        return Latents.where(pre_acts > self.threshold, pre_acts)

    def chosen(
        self, scaled: Float[Tensor, "n d_in"], centred: Float[Tensor, "n d_in"], k: float
    ) -> Latents:
        """The positive ones of the ⌊k n⌋ largest pre-activations of a batch."""
        entries = self.selector.largest(
            centred, self.W_enc_rows, self.b_enc, whole(k * len(scaled))
        )
        return self.scored(scaled, centred, entries)

    def loss(self, x: Float[Tensor, "n d_in"], state: TrainState) -> Loss:
        """The reduced squared error on scaled activations, of what training selects."""
        scaled = self.scaled(x)
        centred = self.centred(scaled)
        k = annealed(self.k, self.k_start, self.k_anneal, state.progress)
        return self.loss_from(x, scaled, centred, self.chosen(scaled, centred, k))

    def loss_from(
        self,
        x: Float[Tensor, "n d_in"],
        scaled: Float[Tensor, "n d_in"],
        centred: Float[Tensor, "n d_in"],
        latents: Latents,
    ) -> Loss:
        """The loss of a batch, given the latents that were selected."""
        found = self.reconstruct(latents, scaled, self.b_dec, centred)
        return self.loss_of(x, scaled, found, latents.fired)

    def settle(self, progress: float) -> None:
        """See `SAE.settle`."""
        self.k = annealed(self.k, self.k_start, self.k_anneal, progress)
        self.options = with_k(self.options, self.k)

    # -- The threshold ---------------------------------------------------------------------------

    @torch.no_grad()
    def calibrate(self, batches: Iterator[Float[Tensor, "n d_in"]], n_rows: int) -> float:
        """See `SAE.calibrate`: θ at which exactly ⌊k n⌋ of the activations of n rows are above it.

        No more than 2 k n_rows of them are kept at a time, besides those of a chunk. Of activations
        that are equal at the threshold none fires, so that L0 is at most k; where fewer than ⌊k n⌋
        are positive all of those fire.
        """
        largest, n = Largest(whole(self.k * n_rows) + 1), 0
        for x in batches:
            for part in self.chunks(x[: n_rows - n]):
                largest.add(self.pre_activations(self.scaled(part)))
                n += len(part)
        found = largest.found()
        self.threshold.fill_(threshold_above(found, whole(self.k * n)))
        return int((found > self.threshold).sum()) / max(n, 1)

    def match_encoder(self, sample: Float[Tensor, "n d_in"]) -> None:
        """See `SAE.match_encoder`; how long x̂ is depends on how many latents it is made of."""
        self.calibrate(iter([sample]), len(sample))
        super().match_encoder(sample)

    def scale_latents(self, factor: Tensor) -> None:
        """See `SAE.scale_latents`; the threshold is one, and so must the factor be."""
        super().scale_latents(factor)
        self.threshold.mul_(factor)


class Largest:
    """The `n` largest positive values of a stream, whatever pieces it comes in."""

    def __init__(self, n: int) -> None:
        self.n, self.floor = n, 0.0
        self.parts: list[Tensor] = []

    def add(self, values: Tensor) -> None:
        """Take values of any shape."""
        self.parts.append(values[values > self.floor])
        if sum(map(len, self.parts)) > 2 * self.n:
            self.parts = [self.found()]
            self.floor = float(self.parts[0].min())  # Of what is not above it none is missed.

    def found(self) -> Float[Tensor, " m"]:
        """Those of what has come so far, in no order."""
        values = torch.cat(self.parts) if self.parts else torch.zeros(0)
        return values.topk(min(self.n, len(values)), sorted=False).values


def threshold_above(values: Float[Tensor, " m"], n: int) -> float:
    """A number that n positive values exceed: fewer if some are equal, all if there are no more.

    It lies halfway to the next value, so that sums in another order, which differ in their last
    bits, choose the same.
    """
    if len(values) <= n:
        return 0.0
    values = values.topk(n + 1, sorted=False).values
    below = values.min()
    above = values[values > below]
    halfway = (above.min() + below) / 2 if len(above) else below
    return float(halfway if not len(above) or halfway < above.min() else below)


def whole(number: float) -> int:
    """⌊number⌋, where 0.29 · 100 = 28.999… is meant to be 29."""
    return math.floor(round(number, 6))
