"""Learning rate and penalty as functions of the step: nothing to store, nothing to lose."""

import math
from typing import Literal


def warmup(step: int, n_warmup: float) -> float:
    """Linear from 1/n_warmup at step 0 to 1."""
    return min(1.0, (step + 1) / n_warmup) if n_warmup >= 1 else 1.0


def lr_factor(
    step: int,
    n_steps: int,
    *,
    warmup_fraction: float,
    decay_fraction: float,
    shape: Literal["linear", "cosine"] = "linear",
) -> float:
    """Linear warm-up, then constant, then down to 0 over the last part of the run.

    The last step still moves: on a line it has the factor 1 / (number of decay steps). A cosine
    over all that comes after the warm-up has `decay_fraction = 1 − warmup_fraction`.
    """
    factor = warmup(step, warmup_fraction * n_steps)
    n_decay = decay_fraction * n_steps
    left = min(1.0, (n_steps - step) / n_decay) if n_decay >= 1 else 1.0
    return factor * (left if shape == "linear" else (1 - math.cos(math.pi * left)) / 2)


def learning_rate(lr: float | Literal["auto"], d_sae: int) -> float:
    """`auto` is 2e-4 / √(d_sae / 2¹⁴) (Gao et al. 2024, arXiv:2406.04093, appendix A)."""
    return 2e-4 / (d_sae / 2**14) ** 0.5 if lr == "auto" else lr
