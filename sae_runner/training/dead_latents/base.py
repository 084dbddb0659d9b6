"""Which latents have stopped firing, counted in rows (tokens), and what a strategy may do then."""

from collections.abc import Iterator
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from sae_runner.saes.base import SAE, Loss


class DeadLatents:
    """Rows seen since each latent last fired; dead at `window` rows (Gao et al. 2024).

    A strategy adds a term to the loss, or steps in at certain steps, or both.
    """

    revives: ClassVar[bool] = True
    """Whether a dead latent may come back."""

    def __init__(self, sae: SAE, window: int) -> None:
        self.sae, self.window = sae, window
        self.rows_since_fired = torch.zeros(sae.d_sae, dtype=torch.int64, device=sae.b_dec.device)

    def update(self, fired: Int64[Tensor, " d_sae"], n_rows: int) -> None:
        """Count a batch in which latent i was active in `fired[i]` of `n_rows` rows."""
        self.rows_since_fired += n_rows
        self.rows_since_fired.masked_fill_(fired > 0, 0)

    @property
    def dead(self) -> Bool[Tensor, " d_sae"]:
        """True for latents that are silent for at least `window` rows."""
        return self.rows_since_fired >= self.window

    @property
    def adds_now(self) -> bool:
        """Whether `add_to` may add something to the next loss; a device may be waited for."""
        return type(self).add_to is not DeadLatents.add_to

    def add_to(self, loss: Loss, x: Float[Tensor, "n d_in"]) -> Loss:
        """The loss of a batch with the strategy's own term, if it has one."""
        return loss

    def add_term(self, loss: Loss, name: str, coefficient: float, value: Tensor) -> Loss:
        """`loss` plus `coefficient · value`, which is logged as `name`."""
        parts = {**loss.parts, name: value.detach()}
        return loss._replace(total=loss.total + coefficient * value, parts=parts)

    # -- Stepping in -----------------------------------------------------------------------------

    def steps(self, n_steps: int) -> list[int]:
        """Numbers of steps done at which `intervene` is called, before the next."""
        return []

    def intervene(
        self,
        batches: Iterator[Float[Tensor, "n d_in"]],
        optimizer: torch.optim.Optimizer,
        generator: torch.Generator,
    ) -> None:
        """Change weights by what shuffled training rows show."""

    def milestones(self, n_steps: int) -> set[int]:
        """Steps whose checkpoints show what `intervene` did: before it, and when it has settled."""
        return set(self.steps(n_steps))

    def lr_factor(self, step: int, n_steps: int) -> float:
        """Factor on the learning rate, of a warm-up after `intervene`."""
        return 1.0
