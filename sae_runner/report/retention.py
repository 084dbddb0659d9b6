"""Does what was said of latents hold elsewhere: explanations of one corpus, scored on others.

With ρ_j(A) the Spearman score of latent j's explanation on the corpus A that it was made from (on
examples that it is not from), ρ_j(B) that of the same explanation on another corpus B, and a
constant prediction explaining nothing (0):

    retention_j(B) = ρ_j(B) / ρ_j(A)   where ρ_j(A) ≥ 0.1; mean and median, if scored on both
    uni_interp = mean_j min_B ρ_j(B)   over latents scored on every B
    active_overlap = latents alive on A and on every B / all latents
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

FAINT = 0.1
"""Below, a score is no ground to divide by."""
Scores = Mapping[int, float]


def scores_of(columns: Mapping[str, list[Any]]) -> dict[int, float]:
    """The Spearman score of each latent that was scored, from the table `latents`."""
    rows = zip(columns["feature"], columns["scored"], columns["spearman"], strict=True)
    return {int(feature): float(rho or 0.0) for feature, scored, rho in rows if scored}


def retention(explained: Scores, scored: Scores) -> tuple[dict[str, Any], list[str]]:
    """Metrics of one other corpus by name, and why those that are null are.

    Args:
        explained: scores on the corpus of the explanations by latent.
        scored: scores of the same explanations on the other.
    """
    both = sorted(explained.keys() & scored.keys())
    base, other = (np.array([scores[j] for j in both]) for scores in (explained, scored))
    known = base >= FAINT
    ratio = other[known] / base[known] if both else base
    found: dict[str, Any] = {
        "n_latents": len(both),
        "spearman_explained": float(base.mean()) if both else None,
        "spearman": float(other.mean()) if both else None,
        "n_retention": len(ratio),
        "retention": float(ratio.mean()) if len(ratio) else None,
        "retention_median": float(np.median(ratio)) if len(ratio) else None,
    }
    notes = []
    if not both:
        notes.append("no latent was scored on both corpora")
    elif not len(ratio):
        notes.append(f"retention: no latent scores {FAINT:g} or more where it was explained")
    return found, notes


def everywhere(
    scored: Sequence[Scores], alive: Sequence[Any] | None
) -> tuple[dict[str, Any], list[str]]:
    """Metrics of all other corpora together, and why those that are null are.

    Args:
        scored: scores on each of the other corpora.
        alive: whether each latent fired, on the first corpus and each other; None where that was
            not measured on all.
    """
    shared = sorted(set[int].intersection(*(set(scores) for scores in scored)))
    lowest = [min(scores[j] for scores in scored) for j in shared]
    found: dict[str, Any] = {
        "n_corpora": len(scored),
        "n_everywhere": len(shared),
        "uni_interp": float(np.mean(lowest)) if lowest else None,
        "active_overlap": None if alive is None else float(np.logical_and.reduce(alive).mean()),
    }
    notes = [] if shared else ["uni_interp: no latent was scored on every corpus"]
    if alive is None:
        notes.append("active_overlap: needs the evaluator density on all")
    return found, notes
