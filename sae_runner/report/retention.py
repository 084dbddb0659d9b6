"""Do explanations hold elsewhere: scores of one SAE's latents on several corpora.

With ρ_j(C) the Spearman score of latent j on corpus C (a constant prediction explains nothing: 0),
over latents that were scored on both corpora:

    retention_12 = mean_j ρ_j(2) / ρ_j(1)   where ρ_j(1) ≥ 0.1; retention_21 likewise
    uni_interp = mean_j min(ρ_j(1), ρ_j(2))
    active_overlap = latents alive on both / all latents

`sae-run eval` explains each latent anew on each corpus, so what is retained is that a latent can be
explained, not one explanation of it.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

FAINT = 0.1
"""Below, a score is no ground to divide by."""
Scores = Mapping[int, float]


def scores_of(columns: Mapping[str, list[Any]]) -> dict[int, float]:
    """The Spearman score of each latent that was scored, from the table `latents`."""
    rows = zip(columns["feature"], columns["scored"], columns["spearman"], strict=True)
    return {int(feature): float(rho or 0.0) for feature, scored, rho in rows if scored}


def retention(
    one: Scores, two: Scores, alive: tuple[Any, Any] | None
) -> tuple[dict[str, Any], list[str]]:
    """Metrics of two corpora by name, and why those that are null are.

    Args:
        one: scores on the first corpus by latent.
        two: scores on the second.
        alive: whether each latent fired, on either; None where it was not measured.
    """
    both = sorted(one.keys() & two.keys())
    a, b = (np.array([scores[j] for j in both]) for scores in (one, two))
    found: dict[str, Any] = {"n_latents": len(both)}
    notes = [] if both else ["no latent was scored on both corpora"]
    for way, base, other in (("12", a, b), ("21", b, a)):
        known = base >= FAINT
        found[f"n_retention_{way}"] = int(known.sum())
        ratio = float((other[known] / base[known]).mean()) if known.any() else None
        found[f"retention_{way}"] = ratio
        if ratio is None and both:
            notes.append(f"retention_{way}: no latent scores {FAINT:g} or more on #{way[0]} of two")
    found["uni_interp"] = float(np.minimum(a, b).mean()) if both else None
    found["active_overlap"] = None if alive is None else float((alive[0] & alive[1]).mean())
    if alive is None:
        notes.append("active_overlap: needs the evaluator density on both")
    return found, notes
