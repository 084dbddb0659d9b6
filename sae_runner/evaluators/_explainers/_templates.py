"""N-gram templates: which last tokens make a latent fire, and predictions from them.

A template is the shortest suffix of an example that the latent still fires on, with the tokens that
do not matter replaced by a wildcard (Foote et al. 2023, "N2G"; Gao et al. 2024):

1. suffix: of a text that ends with the activating token, whose activation is a0, the last L tokens
   for the first L with a_L / a0 ≥ 1/2. It may occur anywhere if a(filler + suffix) / a0 ≥ 1/2, else
   only at the start of a text. Where none does, the longest that was tried, with a0.
2. saliency: a token is a wildcard where a(it replaced by the filler) / a_L > 1/2.
3. prediction at position t: along the tokens from t backwards through the trie of the reversed
   templates, the token's own branch before the wildcard's and never back; the value of the first
   node that has one; 0 where there is no branch.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

WILDCARD, START = -1, -2
KEEPS = 0.5
"""Share of an activation that counts as still firing."""

Activate = Callable[[Sequence[int], Sequence[Sequence[int]]], npt.NDArray[np.float64]]
"""Latents and a row of tokens for each, to that latent's activation at the row's last token."""


class Document(NamedTuple):
    """A text that ends with the token on which a latent is active."""

    latent: int
    tokens: tuple[int, ...]
    act: float


class Template(NamedTuple):
    """Tokens in reading order, `WILDCARD` for any, and the activation they stand for."""

    tokens: tuple[int, ...]
    value: float
    at_start: bool
    """Whether it must begin a text."""


class Found(NamedTuple):
    """The templates of some documents, one of each."""

    templates: list[Template]
    n_not_reproduced: int
    """Documents none of whose suffixes kept half of the activation."""


def find_templates(
    documents: Sequence[Document], activate: Activate, filler: int, longest: int
) -> Found:
    """The template of each document; each step runs the rows of all of them at once."""
    latents = [document.latent for document in documents]
    a0 = np.array([document.act for document in documents])
    suffixes, a_suffix, lost = _minimal_suffixes(documents, activate, longest)
    padded = activate(latents, [(filler, *suffix) for suffix in suffixes])
    anywhere = padded / a0 >= KEEPS
    owner = [i for i, suffix in enumerate(suffixes) for _ in suffix]
    masked = [
        (*suffix[:i], filler, *suffix[i + 1 :]) for suffix in suffixes for i in range(len(suffix))
    ]
    without = activate([latents[i] for i in owner], masked)
    salient = iter((1 - without / a_suffix[owner] >= KEEPS).tolist())
    templates = [
        Template(
            tuple(token if next(salient) else WILDCARD for token in suffix), float(a), not free
        )
        for suffix, a, free in zip(suffixes, a_suffix, anywhere, strict=True)
    ]
    return Found(templates, lost)


def _minimal_suffixes(
    documents: Sequence[Document], activate: Activate, longest: int
) -> tuple[list[tuple[int, ...]], npt.NDArray[np.float64], int]:
    """The suffix of each document, its activation, and how many keep too little of it."""
    suffixes = [document.tokens[-longest:] for document in documents]
    a_suffix = np.array([document.act for document in documents])
    waiting, lost = list(range(len(documents))), 0
    for length in range(1, longest + 1):
        if not waiting:
            break
        rows = [documents[i].tokens[-length:] for i in waiting]
        acts = activate([documents[i].latent for i in waiting], rows)
        left = []
        for i, row, act in zip(waiting, rows, acts.tolist(), strict=True):
            if act / documents[i].act >= KEEPS:
                suffixes[i], a_suffix[i] = row, act
            else:
                left.append(i)
        waiting = [i for i in left if length < min(longest, len(documents[i].tokens))]
        lost += len(left) - len(waiting)
    return suffixes, a_suffix, lost


class _Node:
    __slots__ = ("children", "value")

    def __init__(self) -> None:
        self.children: dict[int, _Node] = {}
        self.value: float | None = None


class Trie:
    """Templates by their last token first; of two equal ones the last counts."""

    def __init__(self, templates: Iterable[Template]) -> None:
        self.root = _Node()
        self.templates = tuple(templates)
        for template in self.templates:
            node = self.root
            path = [*reversed(template.tokens), *([START] if template.at_start else [])]
            for token in path:
                node = node.children.setdefault(token, _Node())
            node.value = template.value

    def predict(self, tokens: Sequence[int], begin: int = 0) -> npt.NDArray[np.float64]:
        """The activation at each position from `begin` on."""
        return np.array([self._at(tokens, t) for t in range(begin, len(tokens))], dtype=np.float64)

    def _at(self, tokens: Sequence[int], t: int) -> float:
        node = self.root
        for j in range(t, -1, -1):
            child = node.children.get(tokens[j]) or node.children.get(WILDCARD)
            if child is None:
                return 0.0
            if child.value is not None:
                return child.value
            if j == 0:
                start = child.children.get(START)
                return 0.0 if start is None or start.value is None else start.value
            node = child
        return 0.0
