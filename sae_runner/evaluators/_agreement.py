"""How well a prediction agrees with what happened; None where that is undefined."""

import numpy as np
import numpy.typing as npt

from sae_runner.ranks import average_ranks

Numbers = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]


def pearson(a: Numbers, b: Numbers) -> float | None:
    """Linear correlation; None where one side is constant."""
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    a, b = a - a.mean(), b - b.mean()
    return float(np.clip(a @ b / np.sqrt((a @ a) * (b @ b)), -1, 1))


def spearman(a: Numbers, b: Numbers) -> float | None:
    """Correlation of average ranks; None where one side is constant."""
    return pearson(average_ranks(a), average_ranks(b)) if len(a) else None


def auc(score: Numbers, positive: Flags) -> float | None:
    """Probability that a positive has the higher score, ties counted half; None for one class."""
    n = int(positive.sum())
    if n in (0, len(positive)):
        return None
    above = average_ranks(score)[positive].sum() - n * (n + 1) / 2
    return float(above / (n * (len(positive) - n)))


def balanced_accuracy(truth: Flags, said: Flags) -> float | None:
    """½ (true positive rate + true negative rate); None for one class."""
    if truth.all() or not truth.any():
        return None
    return float((said[truth].mean() + (~said[~truth]).mean()) / 2)


def precision(truth: Flags, said: Flags) -> float | None:
    """Share of what was said that is true; None where nothing was said."""
    return float(truth[said].mean()) if said.any() else None


def recall(truth: Flags, said: Flags) -> float | None:
    """Share of what is true that was said; None where nothing is true."""
    return float(said[truth].mean()) if truth.any() else None
