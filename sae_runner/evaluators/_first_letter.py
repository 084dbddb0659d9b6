"""A task on a tokenizer's own words: which letter each begins with, asked in a prompt of examples.

A prompt is lines such as `word has the first letter: W`, then a word. What is read is the site at
that word's last token, which is the last of the row: what a causal model reads later (the rest of
the line) cannot change it, and so is left out.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from sae_runner.models._text import TakesPrompts
from sae_runner.models.base import Model
from sae_runner.saes.base import SAE, Latents

LETTERS = "abcdefghijklmnopqrstuvwxyz"
LINE = "{word} has the first letter: {letter}\n"


class Words(NamedTuple):
    """Single tokens that are words or parts of words."""

    tokens: npt.NDArray[np.int64]
    texts: list[str]
    """Without the space before."""
    letter: npt.NDArray[np.int64]
    """Place of the first letter in `LETTERS`."""

    def __len__(self) -> int:
        return len(self.texts)


class Shown(NamedTuple):
    """Words at the site."""

    x: Float[Tensor, "n d"]
    """As the SAE scales its input."""
    latents: Latents


def words_of(model: TakesPrompts, n: int | None, seed: int) -> Words:
    """Tokens of Latin letters alone or after a space: a seeded sample of n, in order of id."""
    pieces = model.pieces(range(model.n_vocab))
    texts = [piece.removeprefix(" ") for piece in pieces]
    found = np.array([i for i, t in enumerate(texts) if t.isascii() and t.isalpha()], np.int64)
    if n is not None and n < len(found):
        drawn = np.random.default_rng(seed).choice(len(found), n, replace=False)
        found = found[np.sort(drawn)]
    kept = [texts[i] for i in found]
    letter = np.array([LETTERS.index(text[0].lower()) for text in kept], dtype=np.int64)
    return Words(found, kept, letter)


def prompts_for(
    words: Words, model: TakesPrompts, n_lines: int, seed: int
) -> tuple[list[list[int]], int]:
    """A row of tokens that ends with each word, after lines about other words drawn by seed.

    Returns:
        The rows, and how many lines each has: fewer where the model reads no longer rows.
    """
    generator = np.random.default_rng(seed)
    others = [_others(i, len(words), n_lines, generator) for i in range(len(words))]
    lines = [
        LINE.format(word=text, letter=LETTERS[letter].upper())
        for text, letter in zip(words.texts, words.letter.tolist(), strict=True)
    ]
    for n in range(min(n_lines, len(words) - 1), -1, -1):
        begun = model.begun(["".join(lines[j] for j in chosen[:n]) for chosen in others])
        rows = [[*row, token] for row, token in zip(begun, words.tokens.tolist(), strict=True)]
        if max(map(len, rows)) <= model.context or n == 0:
            break
    return rows, n


def _others(word: int, n_words: int, n: int, generator: np.random.Generator) -> list[int]:
    drawn = generator.choice(n_words - 1, min(n, n_words - 1), replace=False)
    return [j + (j >= word) for j in drawn.tolist()]


def shown(
    rows: Sequence[Sequence[int]], model: Model, sae: SAE, site: str, batch_size: int
) -> Iterator[Shown]:
    """The last token of each row at the site, and its latents, in batches."""
    assert isinstance(model, TakesPrompts)
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        seen = model.record(model.token_rows(part).to(model.device), [site])[site]
        last = torch.tensor([len(row) - 1 for row in part], device=seen.device)
        x = seen[torch.arange(len(part), device=seen.device), last].to(sae.b_dec)
        yield Shown(sae.scaled(x), sae.encode_sparse(x))
