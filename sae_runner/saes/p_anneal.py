"""ReLU SAE with p-annealing (Karvonen et al. 2024, arXiv 2408.00113)."""

from typing import ClassVar, Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from sae_runner.config import Fraction, NonNegativeFloat, Positive, PositiveFloat
from sae_runner.errors import ConfigError
from sae_runner.saes import SAES
from sae_runner.saes._weights import Weights
from sae_runner.saes.base import SAE, Common, Loss, TrainState

N_RECORDED = 10
"""Steps whose mean keeps the penalty continuous where p changes."""


@SAES.register("p_anneal")
class PAnneal(SAE):
    """Rectified pre-activations under a penalty that comes nearer to counting them.

        f = ReLU((s x − b_dec) W_enc + b_enc),    x_hat = (f W_dec + b_dec) / s,
        S_p = mean over rows of Σ_i (f_i + ε)^p − ε^p

    with decoder rows of norm 1. p is `p_start` until `anneal_start` (a share of training), takes
    `n_p` evenly spaced values, each for an equal part of the time until `anneal_end`, and keeps the
    last of them, `p_end`. Where it changes λ is multiplied by mean S_p,old / mean S_p,new of the
    last 10 steps. ε is not in the paper: without it the gradient at a latent that barely fires has
    no bound if p < 1; with it, it has p ε^(p−1). Latents that are 0 add nothing.

    Raises:
        ConfigError: p is to grow, or to end falling before it begins.
    """

    kind = "p_anneal"
    penalised = True
    units_of_penalty = True
    training_buffers: ClassVar[tuple[str, ...]] = ("p_index", "p_scale", "recorded")

    def __init__(
        self,
        d_in: int,
        *,
        sparsity_coefficient: NonNegativeFloat,
        p_start: PositiveFloat,
        p_end: PositiveFloat,
        n_p: Positive,
        anneal_start: Fraction,
        anneal_end: Fraction,
        epsilon: PositiveFloat,
        **common: Unpack[Common],
    ) -> None:
        if p_end > p_start:
            raise ConfigError(f"sae.p_end={p_end:g}: must be <= p_start={p_start:g}")
        if anneal_end < anneal_start:
            raise ConfigError(
                f"sae.anneal_end={anneal_end:g}: before anneal_start={anneal_start:g}"
            )
        options = {
            "sparsity_coefficient": sparsity_coefficient, "p_start": p_start, "p_end": p_end,
            "n_p": n_p, "anneal_start": anneal_start, "anneal_end": anneal_end, "epsilon": epsilon,
        }  # fmt: skip
        super().__init__(d_in, options=options, **common)
        self.sparsity_coefficient, self.epsilon = sparsity_coefficient, epsilon
        self.p_start, self.p_end, self.n_p = p_start, p_end, n_p
        self.anneal_start, self.anneal_end = anneal_start, anneal_end
        self.register_buffer("p_index", torch.zeros((), dtype=torch.int64))
        self.register_buffer("p_scale", torch.ones((), dtype=torch.float32))
        self.register_buffer("recorded", torch.zeros(N_RECORDED, 2, dtype=torch.float32))
        self._progress, self._n_rows = -1.0, 0
        """Of the step whose batches are being added up; 0 rows: none."""
        self._sums = torch.zeros(2)

    p_index: Tensor
    """Which value of p is in use."""
    p_scale: Tensor
    """Product of the ratios that λ was multiplied by."""
    recorded: Tensor
    """S_p of the last steps before a change, with the p in use and with the next; else 0."""

    def encode(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_sae"]:
        """See `SAE.encode`."""
        return self.pre_activations(self.scaled(x)).relu()

    def index_at(self, progress: float) -> int:
        """The number of the value of p at this share of the steps."""
        length = max(self.anneal_end - self.anneal_start, 1e-9)
        share = (progress - self.anneal_start) / length
        return min(max(int(share * self.n_p + 1e-9), 0), self.n_p - 1)

    def changes_soon(self, state: TrainState) -> bool:
        """Whether this step is one of the `N_RECORDED` before p changes."""
        then = state.progress + N_RECORDED * state.per_step
        return self.index_at(then) != self.index_at(state.progress)

    def p_of(self, index: int) -> float:
        """The value of p with this number, or the last."""
        share = min(index, self.n_p - 1) / max(self.n_p - 1, 1)
        return self.p_start + (self.p_end - self.p_start) * share

    def power_sum(self, lengths: Float[Tensor, "..."], p: float, n: int) -> Float[Tensor, ""]:
        """S_p of the latents of n rows."""
        if p == 1:
            return lengths.sum() / n
        powers: Tensor = (lengths + self.epsilon).pow(p) - self.epsilon**p
        return powers.sum() / n

    def loss(self, x: Float[Tensor, "n d_in"], state: TrainState) -> Loss:
        """`squared error + λ S_p` on scaled activations."""
        scaled = self.scaled(x)
        pre_acts = self.above(scaled, torch.zeros_like(self.b_enc))
        acts = pre_acts.z.relu()
        found = pre_acts.reconstruct(acts, self.W_dec, self.b_dec, scaled)
        lengths = acts  # Where decoder norms are free, what a latent adds to x̂ is as long.
        if self.decoder_norm == "free":
            lengths = acts * pre_acts.per_latent(self.W_dec.norm(dim=1))
        index = self.index_at(state.progress)
        self._take_up(index)
        p = self.p_of(index)
        power_sum = self.power_sum(lengths, p, len(x))
        if self.changes_soon(state):
            with torch.no_grad():
                following = self.power_sum(lengths, self.p_of(index + 1), len(x))
                self._note(state.progress, torch.stack([power_sum, following]), len(x))
        coefficient = self.sparsity_coefficient * state.penalty
        loss = self.loss_of(
            x,
            scaled,
            found,
            pre_acts.fired(acts),
            sparsity=(coefficient, self.p_scale * power_sum),
        )
        return loss._replace(parts={**loss.parts, "p": scaled.new_tensor(p)})

    @torch.no_grad()
    def _take_up(self, index: int) -> None:
        """Go over to a value of p; without a branch, which would wait for the device."""
        changed = self.p_index != index
        old, new = self.recorded.sum(0)
        self.p_scale.mul_(torch.where(changed & (new > 0), old / new, 1))
        self.recorded.mul_(~changed)
        self.p_index.fill_(index)

    def _note(self, progress: float, sums: Float[Tensor, " 2"], n_rows: int) -> None:
        """Add up what the parts of a batch say; `after_step` counts them as one step."""
        if progress != self._progress or self._n_rows == 0:
            self._progress, self._n_rows, self._sums = progress, 0, torch.zeros_like(sums)
        self._sums = self._sums + n_rows * sums
        self._n_rows += n_rows

    @torch.no_grad()
    def after_step(self, *, normalised: bool = False) -> None:
        """See `SAE.after_step`."""
        super().after_step(normalised=normalised)
        if self._n_rows:
            latest = (self._sums / self._n_rows).to(self.recorded).unsqueeze(0)
            self.recorded.copy_(torch.cat([self.recorded[1:], latest]))
            self._n_rows = 0

    @torch.no_grad()
    def fold(self) -> Weights:
        """See `SAE.fold`; free decoder norms go into the encoder."""
        super().fold()
        if self.decoder_norm == "free":
            self.move_norms()
        return self
