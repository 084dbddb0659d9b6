"""What models can say in words: a text tower beside images, or tokens that are pieces of text."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sae_runner.errors import ConfigError
from sae_runner.models.base import Inputs


class TextTower(ABC):
    """A model that embeds texts where it embeds images."""

    templates: Sequence[str] = ("a photo of a {}.",)
    """Sentences that stand for a class, with {} for its name."""

    @abstractmethod
    def encode_text(self, texts: list[str]) -> Float[Tensor, "n d"]:
        """Text embeddings, not normalised."""

    @property
    @abstractmethod
    def logit_scale(self) -> float:
        """Factor on cosine similarities (already exponentiated)."""

    @property
    @abstractmethod
    def logit_bias(self) -> float:
        """Term added to scaled similarities; 0 for models that have none."""

    def class_embeddings(
        self, names: Sequence[str], templates: Sequence[str] | None = None
    ) -> Float[Tensor, "n d"]:
        """Unit embeddings of classes: the mean over templates of unit embeddings, normalised."""
        templates = self.templates if templates is None else templates
        texts = [
            nn.functional.normalize(self.encode_text([t.format(n) for t in templates]), dim=-1)
            for n in names
        ]
        means = torch.stack([text.mean(0) for text in texts])
        return nn.functional.normalize(means, dim=-1)


class ReadsTokens(ABC):
    """A model of text: its tokens can be shown, and made-up rows of them can be run."""

    @property
    @abstractmethod
    def filler(self) -> int:
        """A token that says nothing, to mask others with: [MASK] of an encoder, else " _"."""

    @abstractmethod
    def pieces(self, tokens: Sequence[int]) -> list[str]:
        """The text of each token, as it would stand in a running text."""

    @abstractmethod
    def token_rows(self, rows: Sequence[Sequence[int]]) -> Inputs:
        """A batch of rows of token ids as they are, none added; padded on the right."""


def spoken(name: str) -> str:
    """A label's name as one says it."""
    return name.replace("_", " ")


def check_templates(templates: Sequence[str], key: str) -> None:
    """Refuse sentences that a label's name cannot be put into; `key` holds them."""
    if not templates:
        raise ConfigError(f"{key}=[]: give at least one sentence with {{}} for the label")
    for template in templates:
        try:
            complete = template.format("\0").count("\0") > 0
        except (IndexError, KeyError, ValueError):
            complete = False
        if not complete:
            raise ConfigError(f"{key}={template}: needs one {{}}, for the label's name")


class TakesPrompts(ReadsTokens):
    """A model of text that can be given the beginning of one, to go on with word by word."""

    context: int
    """Most tokens of a row."""

    @property
    @abstractmethod
    def n_vocab(self) -> int:
        """How many tokens there are; ids are below."""

    @abstractmethod
    def begun(self, texts: list[str]) -> list[list[int]]:
        """Token ids of texts as the model begins one, with nothing after: they may go on."""
