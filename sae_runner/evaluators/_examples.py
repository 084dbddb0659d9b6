"""The cases of autointerp: examples of some latents, drawn and shown."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sae_runner.evaluators._codes import Codes
from sae_runner.evaluators._explainers.base import Case, Shown
from sae_runner.evaluators._sampling import Amounts, sample
from sae_runner.evaluators._showing import Showing
from sae_runner.log import Progress


class Examples(NamedTuple):
    """How examples are drawn and shown."""

    amounts: Amounts
    seed: int
    radius: int
    """Tokens on each side of the peak, of a text."""
    modality: str
    """Texts are shown; images are loaded when they are needed."""

    def cases(
        self,
        codes: Codes,
        showing: Showing,
        latents: Sequence[int],
        elsewhere: Mapping[int, Sequence[int]],
    ) -> list[Case]:
        """The examples of each latent.

        Args:
            codes: the latents' activations.
            showing: of these.
            latents: whose examples are wanted.
            elsewhere: of latents that were explained elsewhere, the ids of the examples here that
                they were explained from.
        """
        cases = []
        with Progress("autointerp: examples", len(latents), "latents") as progress:
            for latent in latents:
                drawn = sample(codes, latent, self.amounts, self.seed, elsewhere.get(latent))
                explain, active, silent = drawn.explain, drawn.active, drawn.silent
                slots = [*explain.slot.tolist(), *active.slot.tolist(), *silent]
                acts = [*explain.value.tolist(), *active.value.tolist(), *([0.0] * len(silent))]
                positions = [*explain.position.tolist(), *active.position.tolist()]
                positions += drawn.silent_positions
                windows: Sequence[Any] = [None] * len(slots)
                if self.modality == "text":
                    windows = showing.texts(latent, slots, positions, self.radius)
                shown = [
                    Shown(slot, int(codes.example_ids[slot]), act, window)
                    for slot, act, window in zip(slots, acts, windows, strict=True)
                ]
                n = 0 if latent in elsewhere else len(explain.slot)
                cases.append(Case(latent, shown[:n], shown[len(explain.slot) :]))
                progress.advance(1)
        return cases
