"""Control of a penalty's coefficient, so that training ends at an asked-for L0."""

import math

PROPORTIONAL, INTEGRAL = 1.0, 0.05
"""Of log λ for an L0 that is e times too large: at once, and more with every step."""
DESCENT = 0.25
"""Share of training in which the L0 that is aimed at comes down to the target."""
FARTHEST = 10.0
"""Of log λ from the configured coefficient: a factor of 22,000 either way."""


class TargetL0:
    """A proportional-integral controller in logarithms: log λ follows log(L0 / aim).

    The aim starts at the L0 of the first batch, half of all latents as a rule, and comes down to
    the target on a straight line in logarithms. To ask for the target at once would drive λ up
    while nothing is learned yet, until no latent fires, and then far below what it should be.

    The L0 is taken as it is: an average of the last ten batches has less noise but comes ten steps
    late, which is enough to make a ReLU SAE swing. The integral goes on at full pace while the
    learning rate decays: the L0 drifts there, as weights come to rest.
    """

    def __init__(self, target: float) -> None:
        self.target = target
        self.log_factor = 0.0
        self.off = 0.0
        """log(L0 / aim) of the last batch, within ±1: more than that only says that it is far."""
        self.start: float | None = None
        """log(L0 / target) of the first batch."""

    @property
    def factor(self) -> float:
        """What multiplies the configured coefficient."""
        exponent = self.log_factor + PROPORTIONAL * self.off
        return math.exp(max(-FARTHEST, min(FARTHEST, exponent)))

    def update(self, l0: float, progress: float) -> None:
        """Learn the mean L0 of a batch, taken when this share of the steps was done."""
        off = math.log(max(l0, 1e-2 * self.target) / self.target)
        if self.start is None:
            self.start = off
        aim = self.start * max(0.0, 1 - progress / DESCENT)
        self.off = max(-1.0, min(1.0, off - aim))
        # Bounded: where no penalty at all leaves the L0 below its aim, it would run away.
        self.log_factor = max(-FARTHEST, min(FARTHEST, self.log_factor + INTEGRAL * self.off))

    def state(self) -> dict[str, float | None]:
        """What a checkpoint keeps."""
        return {"log_factor": self.log_factor, "off": self.off, "start": self.start}

    def restore(self, state: dict[str, float | None]) -> None:
        """Go on from `state`."""
        self.log_factor, self.off = state["log_factor"] or 0.0, state["off"] or 0.0
        self.start = state["start"]
