"""Images of a dataset with the texts that describe them, in memory, for training a small CLIP."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from sae_runner.data.base import Dataset, Example
from sae_runner.errors import ConfigError, DataError
from sae_runner.models._artefact import chunks_of
from sae_runner.models._contrastive import Pairs
from sae_runner.models._text import spoken
from sae_runner.models.base import Inputs


def pairs_of(
    dataset: Dataset,
    prepare: Callable[[Sequence[Example]], Inputs],
    templates: Sequence[str],
    max_images: int,
    seed: int,
) -> Pairs:
    """The training images, or a seeded sample of them, each with its texts.

    Raises:
        DataError: none can be read. ConfigError: they have neither labels nor captions.
    """
    ids = dataset.ids("train")
    if len(ids) > max_images:
        order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))
        ids = ids[order[:max_images].sort().values.numpy()]
    pixels: list[Tensor] = []
    texts: list[list[str]] = []
    groups: list[int] = []
    captions: dict[str, int] = {}
    for examples in chunks_of(dataset, ids):
        pixels.append(to_bytes(prepare(examples).tensors["pixels"]))
        for example in examples:
            texts.append(texts_of(example, dataset, templates))
            meaning = example.label
            if meaning is None:  # Below zero, so that no caption is taken for a class.
                meaning = -1 - captions.setdefault(texts[-1][0], len(captions))
            groups.append(meaning)
    if not pixels:
        raise DataError(f"dataset {dataset.name!r}: no training image could be read")
    return Pairs(torch.cat(pixels), texts, torch.tensor(groups))


def texts_of(example: Example, dataset: Dataset, templates: Sequence[str]) -> list[str]:
    """The example's caption, or its label in every template.

    Raises:
        ConfigError: it has neither.
    """
    if example.caption is not None:
        return [example.caption]
    if example.label is None or dataset.label_names is None:
        raise ConfigError(
            f"model.type=tiny_clip learns from labels or captions, and example {example.id} of "
            f"dataset {dataset.name!r} has neither: set dataset.label_column or "
            "dataset.caption_column"
        )
    return [template.format(spoken(dataset.label_names[example.label])) for template in templates]


def to_bytes(pixels: Float[Tensor, "n 3 h w"]) -> UInt8[Tensor, "n 3 h w"]:
    """Normalised pixels as the bytes they were: a quarter of the memory, and nothing is lost."""
    return ((pixels * 0.5 + 0.5) * 255).round().clamp(0, 255).to(torch.uint8)


def to_normal(pixels: UInt8[Tensor, "n 3 h w"]) -> Float[Tensor, "n 3 h w"]:
    """The inverse of `to_bytes`."""
    return (pixels.float() / 255 - 0.5) / 0.5
