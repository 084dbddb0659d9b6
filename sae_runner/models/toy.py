"""A host that passes rows on: for data that already are activations."""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sae_runner.data.base import Dataset, Example, Unreadable
from sae_runner.errors import ConfigError
from sae_runner.models import MODELS
from sae_runner.models.base import HookedModel, Inputs, Tap

SITE = "activations"


@MODELS.register("toy")
class ToyHost(HookedModel):
    """The identity, with one site that holds the dataset's own rows. It has no weights."""

    modality = "rows"

    def __init__(self, device: torch.device, dataset: Dataset) -> None:
        super().__init__()
        if dataset.modality != "rows":
            raise ConfigError(
                f"model.type=toy reads rows of numbers, but dataset {dataset.name!r} has "
                f"{dataset.modality}: use dataset=toy or another model"
            )
        self.device = torch.device(device)
        self.network = nn.Sequential()
        self.network.add_module(SITE, nn.Identity())
        first = dataset.load(dataset.ids("train")[:1])[0]
        if isinstance(first, Unreadable):
            raise ConfigError(f"dataset {dataset.name!r}: row {first.id}: {first.reason}")
        self.d = len(first.value)

    def forward(self, inputs: Inputs) -> Tensor:
        """The rows [n, d]."""
        rows: Tensor = self.network(inputs.tensors["rows"])
        return rows

    def taps(self) -> dict[str, Tap]:
        """The rows, as one token each."""
        return {SITE: Tap(SITE, layout="ND")}

    def probe(self, n: int) -> Inputs:
        """Rows of zeros."""
        rows = torch.zeros(n, self.d, device=self.device)
        return Inputs(torch.arange(n, device=self.device), {"rows": rows})

    def prepare(self, examples: Sequence[Example]) -> Inputs:
        """See `Model.prepare`."""
        rows = torch.from_numpy(np.stack([example.value for example in examples]))
        return Inputs(torch.tensor([example.id for example in examples]), {"rows": rows})

    def fingerprint(self) -> str:
        """See `Model.fingerprint`."""
        return hashlib.sha256(f"toy {self.d}".encode()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """See `Model.describe`."""
        return {"type": "toy", "weights": None, "d": self.d}
