"""Excerpts of text with marks, as a language model is shown them."""

from collections.abc import Sequence
from typing import cast

import numpy as np
import numpy.typing as npt

from sae_runner.evaluators._activating import uniform
from sae_runner.evaluators._explainers._prompts import MARKS
from sae_runner.evaluators._explainers.base import Case, Shown
from sae_runner.evaluators._showing import TextWindow, marked_at

MARKED = 0.3
"""Share of a latent's strongest activation from which a token is marked."""
ORDER, MOVED, PLACE = 10, 11, 12
"""What is drawn, so that no drawing says anything of another."""
Flags = npt.NDArray[np.bool_]


def window_of(shown: Shown) -> TextWindow:
    """The tokens that are shown."""
    return cast(TextWindow, shown.window)


def active_tokens(shown: Sequence[Shown], strongest: float) -> list[Flags]:
    """Which tokens of each excerpt are marked; of an active one at least its strongest."""
    found = []
    for one in shown:
        window = window_of(one)
        above = min(MARKED * strongest, 0.999 * one.act)
        found.append(((window.acts > above) & (window.acts > 0) & ~window.special).numpy())
    return found


def explained_excerpts(case: Case) -> list[str]:
    """The examples to explain, marked."""
    strongest = max((shown.act for shown in case.explain), default=0.0)
    marks = active_tokens(case.explain, strongest)
    return [
        marked_at(window_of(shown), flags, MARKS)
        for shown, flags in zip(case.explain, marks, strict=True)
    ]


def marked_excerpts(case: Case, seed: int) -> tuple[list[str], Flags]:
    """The active scored examples with marks, in a drawn order; True where these are right.

    In every other one they are moved to as many tokens on which the latent is not active: the mean
    number over these examples, rounded up.
    """
    active = [shown for shown in case.score if shown.act > 0]
    strongest = max((shown.act for shown in [*case.explain, *active]), default=0.0)
    marks = active_tokens(active, strongest)
    n_moved = int(np.ceil(np.mean([flags.sum() for flags in marks]))) if marks else 0
    order = drawn(case, active, seed, MOVED)
    texts, right = [], np.arange(len(order)) % 2 == 0
    for i, is_right in zip(order.tolist(), right.tolist(), strict=True):
        flags = marks[i] if is_right else moved(case, active[i], n_moved, seed)
        texts.append(marked_at(window_of(active[i]), flags, MARKS))
    return texts, right


def moved(case: Case, shown: Shown, n: int, seed: int) -> Flags:
    """Marks on n drawn tokens on which the latent is not active."""
    window = window_of(shown)
    free = ((window.acts == 0) & window.read).nonzero().flatten().numpy()
    places = free + 2**20 * shown.example_id
    u = uniform(case.latent, places.astype(np.int64), seed, PLACE)
    flags = np.zeros(len(window.pieces), dtype=bool)
    flags[free[np.argsort(u, kind="stable")[:n]]] = True
    return flags


def drawn(case: Case, shown: Sequence[Shown], seed: int, purpose: int) -> npt.NDArray[np.int64]:
    """An order of examples that their ids decide."""
    ids = np.array([one.example_id for one in shown], dtype=np.int64)
    return np.argsort(uniform(case.latent, ids, seed, purpose), kind="stable")
