"""Do latents of two SAEs say the same: correlation of what they attribute to the next token.

The evaluator `attribution` kept for both what each latent a_j(t) says at a token t for the token
that comes next. Over the rows (example, position) that both have, and at which both mean the same
next token, ρ_jk is the Pearson correlation of a¹_j and a²_k, as `firing` takes it of activations:
after Bricken et al. 2023, logit similarity. It needs no common space and no common model, but one
tokenizer. The baselines are those of `firing`: shuffled within positions, and neurons, which are
the attributions of the raw coordinates of both sites.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from sae_runner.evaluators._codes import Codes
from sae_runner.report.firing import firing, unit_keys, unknown

LEAST_SAME = 0.5
"""Share of common rows with one next token, below which two tokenizers agree by chance alone."""


class Attributions(NamedTuple):
    """What one run's evaluator kept."""

    example_id: npt.NDArray[np.int64]
    position: npt.NDArray[np.int64]
    next_token: npt.NDArray[np.int64]
    matrix: Any
    """scipy CSR [n, d_sae]."""
    neurons: Any = None
    """[n, d]; None where the evaluator kept none."""


def attribution(
    one: Attributions, two: Attributions, *, neurons: bool, seed: int
) -> tuple[dict[str, Any], str]:
    """Metrics of `firing`, of attributions, by name, and why those of latents are null if they are.

    Args:
        one: of the first run.
        two: of the second.
        neurons: whether raw coordinates are compared too; null where one side has none.
        seed: of the shuffled baseline.
    """
    keys = [unit_keys(side.example_id, side.position) for side in (one, two)]
    _, of_one, of_two = np.intersect1d(keys[0], keys[1], True, return_indices=True)
    same = one.next_token[of_one] == two.next_token[of_two]
    n_common, n_same, why = len(same), int(same.sum()), ""
    if not n_common:
        why = "they have no row in common"
    elif n_same < LEAST_SAME * n_common:
        why = (
            f"the next token is the same at {n_same:,} of {n_common:,} common rows: their "
            "tokenizers differ, or how texts begin (model.prepend_bos)"
        )
        same[:] = False
    # In the order of their keys, as units are.
    chosen = [(one, of_one[same]), (two, of_two[same])]
    codes = (codes_of(side, rows) for side, rows in chosen)
    placed = [(side.neurons, rows) for side, rows in chosen]
    kept = neurons and all(x is not None for x, _ in placed)
    found = firing(*codes, by_row=True, seed=seed, neurons=placed if kept else None)
    if not why and found["max_corr_mean_12"] is None:
        why = f"no latent varies over the {found['n_units']} rows"
    if neurons and not kept:
        found |= unknown("_neurons")
    return {"n_common": n_common, "n_other_token": n_common - n_same, **found}, why


def codes_of(side: Attributions, rows: npt.NDArray[np.int64]) -> Codes:
    """Some rows, with attributions in the place of activations."""
    part = side.matrix[rows]
    example_id, position, offsets, indices, values = map(
        torch.from_numpy,
        (
            side.example_id[rows], side.position[rows], part.indptr.astype(np.int64),
            part.indices.astype(np.int32), part.data.astype(np.float32),
        ),
    )  # fmt: skip
    return Codes(example_id, position, None, offsets, indices, values, part.shape[1])
