"""What an example looks like to a reader: tokens around a place, or an image and its patches.

Activations are those of one latent, from the codes: 0 where it is inactive, and where a token is
none of the rows that the SAE reads (special tokens, padding).
"""

from collections.abc import Sequence
from typing import NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Float32, Int64
from PIL import Image
from torch import Tensor

from sae_runner.data.base import Dataset, Example
from sae_runner.errors import DataError
from sae_runner.evaluators._codes import Codes
from sae_runner.models._text import ReadsTokens
from sae_runner.models.base import Model, SiteInfo

LOADED_AT_ONCE = 256


class TextWindow(NamedTuple):
    """Some tokens of an example in a row."""

    example_id: int
    begin: int
    """Position of the first of them in the example."""
    tokens: Int64[Tensor, " t"]
    pieces: list[str]
    """The text of each token."""
    acts: Float32[Tensor, " t"]
    read: Bool[Tensor, " t"]
    """Which of the tokens are rows of the SAE."""
    special: Bool[Tensor, " t"]
    """Which are BOS, EOS, CLS, SEP and their like."""
    before: Int64[Tensor, " b"] = torch.zeros(0, dtype=torch.int64)
    """The example's tokens that come before them."""

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(self.pieces)


class ImageView(NamedTuple):
    """An image and where in it a latent is active."""

    example_id: int
    image: Image.Image
    """As the dataset has it, before the model's preprocessing."""
    heat: Float32[Tensor, "h w"] | None
    """Per patch or cell; None where the site's rows are no parts of the image."""


class Showing:
    """Shows examples of codes by loading them from the dataset, many at a time.

    Args:
        codes: whose examples these are.
        dataset: as the model reads it.
        model: the host, for the tokens of a text.
        site: where the rows come from.
    """

    def __init__(self, codes: Codes, dataset: Dataset, model: Model, site: SiteInfo) -> None:
        self.codes, self.dataset, self.model, self.site = codes, dataset, model, site

    def load(self, slots: Sequence[int]) -> list[Example]:
        """The examples with these numbers in the codes.

        Raises:
            DataError: one was readable when it was stored, and is no longer.
        """
        found = []
        for example in self.dataset.load(self.codes.example_ids[list(slots)].tolist()):
            if not isinstance(example, Example):
                raise DataError(f"example {example.id} can no longer be read: {example.reason}")
            found.append(example)
        return found

    def texts(
        self, latent: int, slots: Sequence[int], positions: Sequence[int], radius: int
    ) -> list[TextWindow]:
        """Up to `radius` tokens on each side of a position in each of the examples.

        A row that stands for a whole example has position -1: the window is of its beginning.
        """
        windows = []
        for start in range(0, len(slots), LOADED_AT_ONCE):
            part = slots[start : start + LOADED_AT_ONCE]
            inputs = self.model.prepare(self.load(part))
            tokens = inputs.tensors["tokens"]
            own = torch.ones_like(tokens, dtype=torch.bool)
            own = own if inputs.attended is None else inputs.attended
            special = torch.zeros_like(own) if inputs.special is None else inputs.special
            for i, slot in enumerate(part):
                n = int(own[i].sum())
                at = positions[start + i]
                at = radius if at < 0 else at
                begin, end = max(0, at - radius), min(n, at + radius + 1)
                every = tokens[i][own[i]]
                row = every[begin:end]
                acts, read = self._acts(latent, slot, n)
                windows.append(
                    TextWindow(
                        int(self.codes.example_ids[slot]), begin, row, self._pieces(row),
                        acts[begin:end], read[begin:end], special[i][own[i]][begin:end],
                        every[:begin],
                    )
                )  # fmt: skip
        return windows

    def images(self, latent: int, slots: Sequence[int]) -> list[ImageView]:
        """The images, and the latent on the grid of their patches."""
        return [
            ImageView(example.id, example.value.convert("RGB"), self.heat(latent, slot))
            for slot, example in zip(slots, self.load(slots), strict=True)
        ]

    def heat(self, latent: int, slot: int) -> Float32[Tensor, "h w"] | None:
        """A latent on the grid of an image's patches, where its rows are such."""
        grid = grid_of(self.site)
        positions, _ = self.codes.activations(latent, slot)
        if grid is None or not (positions >= self.site.n_prefix).any():
            return None
        n = self.site.n_prefix + grid[0] * grid[1]
        acts, _ = self._acts(latent, slot, n)
        return acts[self.site.n_prefix :].view(grid)

    def _acts(self, latent: int, slot: int, n: int) -> tuple[Tensor, Tensor]:
        """Activation at each of n tokens of an example, and which of them are rows."""
        positions, values = self.codes.activations(latent, slot)
        acts, read = torch.zeros(n), torch.zeros(n, dtype=torch.bool)
        placed = positions >= 0  # Not the mean over an example.
        acts[positions[placed]], read[positions[placed]] = values[placed], True
        return acts, read

    def _pieces(self, tokens: Tensor) -> list[str]:
        return cast(ReadsTokens, self.model).pieces(tokens.tolist())


def grid_of(site: SiteInfo) -> tuple[int, int] | None:
    """Rows and columns of a site's patches, where its tokens are those and class tokens."""
    grid = site.grid
    fits = grid is not None and site.n_tokens == site.n_prefix + int(np.prod(grid))
    return grid if fits else None


def marked(window: TextWindow, above: float, marks: tuple[str, str] = ("<<", ">>")) -> str:
    """A window's text with the tokens above an activation between marks, neighbours together."""
    return marked_at(window, ((window.acts > above) & ~window.special).numpy(), marks)


def marked_at(window: TextWindow, flags: npt.NDArray[np.bool_], marks: tuple[str, str]) -> str:
    """A window's text with some of its tokens between marks, neighbours together."""
    begin, end = marks
    parts, open_ = [], False
    for piece, on in zip(window.pieces, flags.tolist(), strict=True):
        if on != open_:
            parts.append(begin if on else end)
        parts.append(piece)
        open_ = on
    return "".join(parts) + (end if open_ else "")
