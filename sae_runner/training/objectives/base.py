"""What a step of training minimises, and of what: rows of a site, or inputs of a model."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from sae_runner.models.base import Inputs
from sae_runner.saes.base import SAE, Loss, TrainState
from sae_runner.store.activations import Batch, Position
from sae_runner.store.inputs import InputBatch


@runtime_checkable
class Source(Protocol):
    """Where batches come from: a store of rows, or the inputs themselves."""

    def shuffled(
        self, batch_size: int, seed: int, *, start: Position, device: torch.device
    ) -> Iterator[Batch | InputBatch]:
        """Batches of about `batch_size` rows, without end, on `device`; (seed, t) makes batch t."""
        ...


class Share(NamedTuple):
    """What a part has of its batch."""

    rows: float = 1.0
    tokens: float = 1.0
    """Of those that are no padding."""
    examples: float = 1.0


WHOLE = Share()


class Objective(ABC):
    """Judges the reconstructions of one SAE."""

    on_inputs: ClassVar[bool] = False
    """Whether its batches are inputs, which it runs the model on, and not rows."""

    def __init__(self, sae: SAE) -> None:
        self.sae = sae

    @abstractmethod
    def loss(self, x: Tensor | Inputs, state: TrainState, share: Share = WHOLE) -> Loss:
        """What a step minimises on a batch, or on a part of one; `Loss.x` are the rows in it.

        Losses of parts, each times its share of the rows, add up to that of the batch.
        """

    def shares(self, parts: Sequence[Tensor | Inputs]) -> list[Share]:
        """What each part has of the batch that they make."""
        n = sum(map(len, parts))
        return [Share(*(len(part) / n for _ in Share._fields)) for part in parts]
