"""Train an image classifier on labels, and measure it on images that it has not seen."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from sae_runner.data.base import Dataset, Example, Split
from sae_runner.errors import ConfigError, DataError
from sae_runner.log import Progress
from sae_runner.models._artefact import chunks_of, seeded


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


def fit(
    network: nn.Module,
    data: Labelled,
    normalise: Callable[[UInt8[Tensor, "n c h w"]], Float[Tensor, "n c h w"]],
    recipe: Recipe,
    device: torch.device,
) -> float:
    """Minimise cross-entropy by AdamW with a cosine to zero; the mean loss of the last epoch."""
    per_epoch = math.ceil(len(data.labels) / recipe.batch_size)
    n_steps = recipe.epochs * per_epoch
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_steps)
    progress, losses = Progress("train classifier", n_steps, "steps"), []
    network.train()
    # Dropout, if there is any, draws from the global generator.
    with seeded(recipe.seed + 1):
        for rows in batches(len(data.labels), recipe):
            pixels, labels = data.pixels[rows].to(device), data.labels[rows].to(device)
            loss = F.cross_entropy(network(normalise(pixels)), labels)
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
            progress.advance(1)
    progress.close()
    network.eval()
    last = float(torch.stack(losses[-per_epoch:]).double().mean())
    if not math.isfinite(last):
        raise ConfigError(f"model.learning_rate={recipe.learning_rate:g}: training diverged")
    return last


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
