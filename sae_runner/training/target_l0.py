"""Control of a penalty's coefficient, so that training ends at an asked-for L0."""

import math

GAIN, BRAKE = 0.02, 0.1
"""Of log λ per step for an L0 that is e times too large: integral part, and proportional part."""
SMOOTHING = 0.9


class TargetL0:
    """A proportional-integral controller in logarithms: log λ moves with log(L0 / target).

    Its steps are as long as the learning rate's (`lr_factor`): where weights move slowly, at the
    end of training, the coefficient does too.
    """

    def __init__(self, target: float) -> None:
        self.target = target
        self.log_factor = 0.0
        self.level: float | None = None
        """Smoothed log(L0 / target)."""

    @property
    def factor(self) -> float:
        """What multiplies the configured coefficient."""
        brake = BRAKE * (self.level or 0.0)
        return math.exp(max(-20.0, min(20.0, self.log_factor + brake)))

    def update(self, l0: float, lr_factor: float) -> None:
        """Learn the mean L0 of a batch."""
        off = math.log(max(l0, 1e-2 * self.target) / self.target)
        before = off if self.level is None else self.level
        self.level = SMOOTHING * before + (1 - SMOOTHING) * off
        # A step of more than a factor e says no more than that it is far.
        self.log_factor += GAIN * lr_factor * max(-1.0, min(1.0, self.level))

    def state(self) -> dict[str, float | None]:
        """What a checkpoint keeps."""
        return {"log_factor": self.log_factor, "level": self.level}

    def restore(self, state: dict[str, float | None]) -> None:
        """Go on from `state`."""
        self.log_factor, self.level = state["log_factor"] or 0.0, state["level"]
