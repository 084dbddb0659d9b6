"""All probes of one task, on identical examples: single latents, baselines, few and all.

What is chosen (a latent, a coordinate, a direction, a C) is chosen on the train set; what is
reported is measured on the test set unless its name says train.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from scipy import sparse

from sae_runner.evaluators._agreement import auc, balanced_accuracy
from sae_runner.evaluators._logistic import (
    Singles,
    bce,
    entropy,
    fit_few,
    fit_full,
    fit_singles,
    pieces,
)
from sae_runner.evaluators._pooling import Pooled
from sae_runner.evaluators._tasks import Task

Values = npt.NDArray[np.float64]
Labels = npt.NDArray[np.bool_]
N_FITTED = 64
"""Random directions that get a probe: those of the largest correlation with the answer."""


@dataclass(frozen=True)
class Options:
    """How tasks are measured; see `Probes`."""

    ridge: float
    k: Sequence[int]
    strengths: Sequence[float]
    n_folds: int
    seed: int


class Side(NamedTuple):
    """Features of a task's examples."""

    train: Any
    test: Any


class Measured(NamedTuple):
    """What was found on one task."""

    row: dict[str, Any]
    """Numbers by name; None where there is none."""
    losses: Values
    """Train loss of each latent's own probe."""
    few: list[int]
    """The k for which fewer than k latents tell the classes apart."""
    not_converged: list[str]


def measure_task(task: Task, train: Pooled, test: Pooled, options: Options) -> Measured:
    """Every probe of a task."""
    y, y_test = task.train.y, task.test.y
    latents = Side(train.latents[task.train.rows], test.latents[task.test.rows])
    raw = Side(train.raw[task.train.rows], test.raw[task.test.rows])
    singles = fit_singles(latents.train, y, options.ridge)
    row: dict[str, Any] = {
        "task": task.name, "family": task.family, "n_train": len(y), "n_test": len(y_test),
        "positive_rate_test": float(y_test.mean()), "base_entropy": entropy(y_test),
    }  # fmt: skip
    row |= _best_latent(singles, latents, y_test)
    row["excess"] = row["probe_loss_test"] / row["base_entropy"]
    row |= _baselines(raw, y, y_test, train.latents.shape[1], options)
    not_converged = []
    for name, side in (("llm", raw), ("sae", latents)):
        full = fit_full(side.train, y, side.test, strengths=options.strengths,
                        n_folds=options.n_folds, seed=options.seed)  # fmt: skip
        row |= {f"{name}_full_loss": bce(full.logit, y_test), f"{name}_full_C": full.strength}
        row |= {f"{name}_test_accuracy": accuracy(full.logit, y_test),
                f"{name}_test_auc": auc(full.logit, y_test)}  # fmt: skip
        if not full.converged:
            not_converged.append(name)
    row["gap_to_full"] = row["probe_loss_test"] - row["llm_full_loss"]
    few = []
    for name, side in (("llm", raw), ("sae", latents)):
        order, n_apart = by_difference(side.train, y)
        for k in options.k:
            chosen = order[: min(k, n_apart)]
            row[f"{name}_top_{k}_test_accuracy"] = _accuracy_of(side, chosen, y, y_test)
            if name == "sae" and n_apart < k:
                few.append(k)
    return Measured(row, singles.loss, few, not_converged)


def _best_latent(singles: Singles, latents: Side, y_test: Labels) -> dict[str, Any]:
    best = int(singles.loss.argmin())
    z = picked(latents.test, [best])[:, 0]
    logit = singles.w[best] * z + singles.b[best]
    no_latent = bool(singles.constant[best])  # All are: the base rate is all there is.
    return {
        "probe_loss_test": bce(logit, y_test),
        "probe_loss_train_min": float(singles.loss[best]),
        "best_latent": None if no_latent else best,
        "best_latent_acc": accuracy(logit, y_test),
        "best_latent_balanced_acc": balanced_accuracy(y_test, logit > 0),
        "best_latent_auc": auc(logit, y_test),
        "w": float(singles.w[best]),
        "b": float(singles.b[best]),
        "n_constant": int(singles.constant.sum()),
    }


def _baselines(
    raw: Side, y: Labels, y_test: Labels, n_directions: int, options: Options
) -> dict[str, float]:
    """Losses of probes on one number made of raw activations."""
    difference = raw.train[y].mean(0) - raw.train[~y].mean(0)
    random = likely_directions(raw.train, y, n_directions, options.seed)
    sides = {
        "coordinate": raw,
        "mean_difference": Side(*(h @ difference[:, None] for h in raw)),
        "random_direction": Side(*(h @ random.T for h in raw)),
    }
    found = {}
    for name, side in sides.items():
        singles = fit_singles(side.train, y, options.ridge)
        best = int(singles.loss.argmin())
        logit = singles.w[best] * side.test[:, best] + singles.b[best]
        found[f"{name}_loss"] = bce(logit, y_test)
    return found


def likely_directions(raw: Values, y: Labels, n: int, seed: int) -> Values:
    """Of n random unit directions, those whose projections correlate most with the answer.

    Correlations of all come from the covariance of h: no projection of them is made.
    """
    centred = raw - raw.mean(0)
    covariance, with_y = centred.T @ centred, centred.T @ (y - y.mean())
    generator, d = torch.Generator().manual_seed(seed), raw.shape[1]
    best, scores = np.zeros((0, d)), np.zeros(0)
    for start in range(0, n, 4096):
        drawn = torch.randn(min(4096, n - start), d, generator=generator)
        unit = torch.nn.functional.normalize(drawn, dim=1).double().numpy()
        variance = np.einsum("nd,nd->n", unit @ covariance, unit).clip(1e-300)
        best = np.concatenate([best, unit])
        scores = np.concatenate([scores, np.abs(unit @ with_y) / np.sqrt(variance)])
        kept = np.argsort(-scores, kind="stable")[:N_FITTED]
        best, scores = best[kept], scores[kept]
    return best


def by_difference(features: Any, y: Labels) -> tuple[npt.NDArray[np.int64], int]:
    """Columns by |mean where true − mean where false|, largest first; how many differ at all."""
    means = [_means(features, answer.nonzero()[0]) for answer in (y, ~y)]
    difference = np.abs(means[0] - means[1])
    return np.argsort(-difference, kind="stable"), int((difference > 0).sum())


def _means(features: Any, rows: npt.NDArray[np.int64]) -> Values:
    """Of each column over some rows; of dense ones few are copied at a time."""
    if sparse.issparse(features):
        return np.asarray(features[rows].mean(0)).ravel()
    ends = len(rows) * np.arange(1, features.shape[1] + 1)
    parts = [features[rows, begin:end].mean(0, dtype=np.float64) for begin, end in pieces(ends)]
    return np.concatenate(parts)


def _accuracy_of(
    side: Side, columns: npt.NDArray[np.int64], y: Labels, y_test: Labels
) -> float | None:
    if not len(columns):
        return None
    train, test = (picked(part, columns) for part in side)
    return accuracy(fit_few(train, y, test), y_test)


def picked(features: Any, columns: Any) -> Values:
    """Some columns, dense."""
    found = features[:, columns]
    return np.asarray(found.toarray() if sparse.issparse(found) else found, dtype=np.float64)


def accuracy(logit: Values, y: Labels) -> float:
    """Share of examples on the right side of p = 1/2."""
    return float(((logit > 0) == y).mean())
