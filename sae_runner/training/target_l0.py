"""Control of a penalty's coefficient, so that training ends at an asked-for L0."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from sae_runner.saes.base import SAE
from sae_runner.store.activations import Activations

LEAST, MOST = 0.1, 6.0
"""Bounds of the gain: what log λ gets, at once, for an L0 that is e times too large."""
GROWTH, CUT = 1.02, 0.7
"""Of the gain, at a step that leaves the sign of the error, and at one that changes it."""
INTEGRAL = 0.03
"""What stays of it with every step: this times 1 + gain."""
SMOOTHING = 0.2
"""Weight of the last batch in the mean error."""
DESCENT = 0.25
"""Share of training in which the L0 that is aimed at comes down to the target."""
MOST_DESCENDING = 1.0
"""Bound of the gain in that time."""
FARTHEST = 10.0
"""Of log λ from the configured coefficient: a factor of 22,000 either way."""
N_COMPARED, N_LATEST = 16, 8
"""How often, in the second half, the L0 of held-out rows is compared with that of a batch, and how
many of these comparisons count: one has a batch's noise."""
FEWEST_ROWS, MOST_ROWS = 1024, 8192
"""On how many rows; between these, a hundredth of those that are trained on."""
MOST_APART = 0.25
"""Of the logarithms of these two."""


class TargetL0:
    """A proportional-integral controller in logarithms: log λ follows log(L0 / aim).

    The aim starts at the L0 of the first batch, half of all latents as a rule, and comes down to
    the target on a straight line in logarithms. To ask for the target at once would drive λ up
    while nothing is learned yet, until no latent fires, and then far below what it should be. A
    penalty's own warm-up ends with the descent, or the controller would run after it.

    The gain is found on the way. The L0 of a ReLU SAE falls by 2.5 times what λ rises, ten steps
    later: a gain of 1 makes it swing, once in twenty steps. Thresholds of a JumpReLU SAE take
    hundreds of steps, and the λ that they need falls all the while: with a gain of 1 they come too
    late. So the gain grows while the mean error keeps its sign, and is cut when it changes: it
    settles where it changes every 18 steps, or at a bound. While the aim comes down the bound is
    lower: to follow it closely takes a λ many times that of the end, before latents have learned
    what to fire for, and many of them never fire again.

    What is asked for is the L0 of held-out rows. Rows that are seen often have another one, so the
    aim is moved by what lies between the two. The integral goes on at full pace while the learning
    rate decays: the L0 drifts there, as weights come to rest.
    """

    def __init__(self, target: float) -> None:
        self.target = target
        self.log_factor = 0.0
        self.push = 0.0
        """What the last batch adds for one step, within ±1: more only says that it is far."""
        self.gain, self.mean_off = 1.0, 0.0
        self.apart, self.n_compared = 0.0, 0.0
        """Mean log(L0 of held-out rows / L0 of a batch), and of how many comparisons."""
        self.compared: float | None = None
        """log(L0 of held-out rows / target) under the weights that the next batch will meet."""
        self.start: float | None = None
        """log(L0 / target) of the first batch."""
        self.heldout: list[Float[Tensor, "n width"]] = []
        """What L0s are compared on; no part of the state, a store has them again."""

    @property
    def factor(self) -> float:
        """What multiplies the configured coefficient."""
        return math.exp(max(-FARTHEST, min(FARTHEST, self.log_factor + self.push)))

    @property
    def ratio(self) -> float:
        """L0 of held-out rows by that of a batch."""
        return math.exp(self.apart)

    def update(self, l0: float, progress: float) -> None:
        """Learn the mean L0 of a batch, taken when this share of the steps was done."""
        off = self._off(l0)
        if self.start is None:
            self.start = off
        if self.compared is not None:
            self._move_aim(self.compared - off)
        off += self.apart - self.start * max(0.0, 1 - progress / DESCENT)
        mean_off = self.mean_off + SMOOTHING * (off - self.mean_off)
        change = GROWTH if mean_off * self.mean_off >= 0 else CUT
        most = MOST_DESCENDING if progress < DESCENT else MOST
        self.gain = max(LEAST, min(most, self.gain * change))
        self.mean_off = mean_off
        self.push = max(-1.0, min(1.0, self.gain * off))
        kept = INTEGRAL * max(-1.0, min(1.0, (1 + self.gain) * off))
        # Bounded: where no penalty at all leaves the L0 below its aim, it would run away.
        self.log_factor = max(-FARTHEST, min(FARTHEST, self.log_factor + kept))

    def _move_aim(self, apart: float) -> None:
        """Take up one comparison."""
        apart = max(-MOST_APART, min(MOST_APART, apart))
        self.n_compared += 1
        change = (apart - self.apart) / min(self.n_compared, N_LATEST)
        self.apart += change
        self.mean_off += change
        self.compared = None

    def _off(self, l0: float) -> float:
        return math.log(max(l0, 1e-2 * self.target) / self.target)

    def compares_at(self, step: int, n_steps: int) -> bool:
        """Whether `compare` is due after this step, from 0; without held-out rows it never is."""
        first = n_steps // 2
        due = {first + i * (n_steps - first) // N_COMPARED for i in range(N_COMPARED)}
        return bool(self.heldout) and step in due

    def read(self, store: Activations, n_trained: int) -> None:
        """Take the rows that L0s are compared on into memory: a stream cannot go back for them."""
        n = min(MOST_ROWS, max(FEWEST_ROWS, n_trained // 100))
        self.heldout = [part.x for part in store.rows("heldout", FEWEST_ROWS, n)]

    @torch.no_grad()
    def heldout_l0(self, sae: SAE) -> float:
        """Mean L0 of these rows."""
        rows = (sae.input_of(part.to(sae.b_dec.device)) for part in self.heldout)
        active = sum(len(sae.encode_sparse(part).indices) for part in rows)
        return active / sum(map(len, self.heldout))

    def compare(self, l0: float) -> None:
        """Learn the mean L0 of held-out rows, to be compared with that of the next batch."""
        self.compared = self._off(l0)

    def state(self) -> dict[str, float | None]:
        """What a checkpoint keeps."""
        return {name: getattr(self, name) for name in _STATE}

    def restore(self, state: dict[str, float | None]) -> None:
        """Go on from `state`."""
        for name in _STATE:
            setattr(self, name, state[name])


_STATE = ("log_factor", "push", "gain", "mean_off", "apart", "n_compared", "compared", "start")
