"""A language model of three blocks in float64, as a host and as a function of NumPy arrays."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sae_runner.data.base import Example
from sae_runner.models.base import HookedModel, Inputs, Tap
from sae_runner.site import TokenSelection

D, VOCAB, N_BLOCKS = 6, 11, 3
SITE = "blocks.0.resid_post"


class Block(nn.Module):
    """x + tanh(mean of x so far · A): every token reaches the later ones."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D, D, generator=generator, dtype=torch.float64))
        self.mlp = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        counts = torch.arange(1, x.shape[1] + 1, dtype=x.dtype).view(1, -1, 1)
        return x + self.mlp(torch.tanh((x.cumsum(1) / counts) @ self.weight))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        draw = {"generator": generator, "dtype": torch.float64}
        self.embed = nn.Parameter(torch.randn(VOCAB, D, **draw))  # type: ignore[call-overload]
        self.blocks = nn.ModuleList(Block(generator) for _ in range(N_BLOCKS))
        self.head = nn.Parameter(torch.randn(D, VOCAB, **draw))  # type: ignore[call-overload]

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed[tokens]
        for block in self.blocks:
            x = block(x)
        return x @ self.head


class Host(HookedModel):
    modality = "text"
    output = "token_logits"

    def __init__(self) -> None:
        super().__init__()
        self.device, self.network = torch.device("cpu"), Network()

    def forward(self, inputs: Inputs) -> Tensor:
        logits: Tensor = self.network(inputs.tensors["tokens"])
        return logits.mean(1) if self.output == "class_logits" else logits

    def taps(self) -> dict[str, Tap]:
        found = {}
        for i in range(N_BLOCKS):
            found[f"blocks.{i}.resid_pre"] = Tap(f"blocks.{i}", side="input")
            found[f"blocks.{i}.mlp_out"] = Tap(f"blocks.{i}.mlp")
            found[f"blocks.{i}.resid_post"] = Tap(f"blocks.{i}")
        return found

    def probe(self, n: int) -> Inputs:
        return Inputs(torch.arange(n), {"tokens": torch.zeros(n, 4, dtype=torch.int64)})

    def prepare(self, examples: Sequence[Example]) -> Inputs:
        raise NotImplementedError

    def fingerprint(self) -> str:
        return "host"

    def describe(self) -> dict[str, Any]:
        return {}


def numpy_run(
    host: Host, tokens: Any, change: Callable[[Any], Any] = lambda x: x
) -> tuple[Any, list[Any]]:
    """Logits and the output of every block, with `change` applied to block 0's."""
    weights = {k: v.detach().numpy() for k, v in host.network.named_parameters()}
    x, seen = weights["embed"][tokens], []
    for i in range(N_BLOCKS):
        mean = x.cumsum(1) / np.arange(1, x.shape[1] + 1)[None, :, None]
        x = x + np.tanh(mean @ weights[f"blocks.{i}.weight"])
        x = change(x) if i == 0 else x
        seen.append(x)
    return x @ weights["head"], seen


@pytest.fixture
def host() -> Host:
    return Host()


@pytest.fixture
def inputs() -> Inputs:
    """Three texts of 5, 4 and 3 tokens, padded on the right; the first token is special."""
    tokens = torch.randint(1, VOCAB, (3, 5), generator=torch.Generator().manual_seed(4))
    attended = torch.arange(5) < torch.tensor([[5], [4], [3]])
    tokens[:, 0] = 0
    return Inputs(torch.arange(3), {"tokens": tokens}, attended, tokens == 0)


@pytest.fixture
def selection() -> TokenSelection:
    return TokenSelection("all", drop_positions=(0,))


@pytest.fixture
def reference() -> Callable[..., tuple[Any, list[Any]]]:
    return numpy_run
