"""Train an image classifier on labels, and measure it on images that it has not seen."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from sae_runner.data.base import Dataset, Example, Split
from sae_runner.errors import ConfigError, DataError
from sae_runner.models._artefact import chunks_of, seeded
from sae_runner.models._fitting import fit


@dataclass(frozen=True)
class Recipe:
    """How to train."""

    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    seed: int


@dataclass(frozen=True)
class Labelled:
    """Images in memory."""

    pixels: UInt8[Tensor, "n c h w"]
    labels: Int64[Tensor, " n"]

    @classmethod
    def of(
        cls,
        dataset: Dataset,
        split: Split,
        to_bytes: Callable[[Sequence[Example]], UInt8[Tensor, "n c h w"]],
    ) -> "Labelled":
        """The readable images of a split.

        Raises:
            ConfigError: an image has no label.
            DataError: there is no image.
        """
        pixels, labels = [], []
        for examples in chunks_of(dataset, dataset.ids(split)):
            known = [e.label for e in examples if e.label is not None]
            if len(known) < len(examples):
                raise ConfigError(
                    f"model.weights=null trains on labels, and dataset {dataset.name!r} has "
                    "examples without: give model.weights=FOLDER or random"
                )
            pixels.append(to_bytes(examples))
            labels += known
        if not pixels:
            raise DataError(f"dataset {dataset.name!r}: no image of its {split} split is readable")
        return cls(torch.cat(pixels), torch.tensor(labels))


def train(
    network: nn.Module,
    data: Labelled,
    normalise: Callable[[UInt8[Tensor, "n c h w"]], Float[Tensor, "n c h w"]],
    recipe: Recipe,
    device: torch.device,
    kept: Path,
) -> float:
    """Minimise cross-entropy by AdamW with a cosine to zero; the mean loss of the last epoch.

    What was stopped in between goes on from what lies in `kept`.
    """
    per_epoch = math.ceil(len(data.labels) / recipe.batch_size)
    n_steps = recipe.epochs * per_epoch
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
    )

    def loss_of(rows: Tensor) -> Tensor:
        logits = network(normalise(data.pixels[rows].to(device)))
        return F.cross_entropy(logits, data.labels[rows].to(device))

    with seeded(recipe.seed + 1):  # Dropout, if there is any, draws from the global generator.
        losses = fit(
            network, optimizer, batches(len(data.labels), recipe), loss_of,
            lambda step: 0.5 * (1 + math.cos(math.pi * step / n_steps)),
            n_steps=n_steps, kept=kept, what="the classifier",
            generators=[torch.default_generator],
        )  # fmt: skip
    return sum(losses[-per_epoch:]) / per_epoch


def batches(n: int, recipe: Recipe) -> Iterator[Int64[Tensor, " batch"]]:
    """Rows of every step; each epoch is shuffled anew and leaves none out."""
    generator = torch.Generator().manual_seed(recipe.seed)
    for _ in range(recipe.epochs):
        yield from torch.split(torch.randperm(n, generator=generator), recipe.batch_size)


@torch.no_grad()
def accuracy(
    network: nn.Module,
    data: Labelled,
    normalise: Callable[[UInt8[Tensor, "n c h w"]], Float[Tensor, "n c h w"]],
    device: torch.device,
) -> dict[str, Any]:
    """Share of right answers, and what always naming the commonest class would get."""
    right = 0
    for rows in torch.split(torch.arange(len(data.labels)), 1024):
        logits = network(normalise(data.pixels[rows].to(device)))
        right += int((logits.argmax(1).cpu() == data.labels[rows]).sum())
    n = len(data.labels)
    most = int(torch.bincount(data.labels).max())
    return {"accuracy": right / n, "commonest_class": most / n, "n": n}
