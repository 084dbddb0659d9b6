"""A dataset whose rows say which example and position they are of, and a host that shows it."""

import hashlib
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sae_runner.data.base import Dataset, Example, Ids, Split, Unreadable, split_ids
from sae_runner.models.base import HookedModel, Inputs, Tap
from sae_runner.site import TokenSelection
from sae_runner.store.manifest import selection_dir
from sae_runner.store.reader import ActivationStore
from sae_runner.store.stream import StreamStore
from sae_runner.store.window import WindowPlan
from sae_runner.store.writer import begin_store, write_selections

LONGEST = 7


class Texts(Dataset):
    """Example i has 1 + 5 i mod 7 tokens; token p of it is 64 i + p."""

    modality = "tokens"
    name = "texts"
    label_names = ("a", "b", "c")

    def __init__(
        self, n: int = 60, *, bad: Sequence[int] = (), random_access: bool = True, same: int = 0
    ) -> None:
        self.n, self.bad, self.random_access, self.same = n, set(bad), random_access, same
        self.loaded: list[int] = []

    def length(self, example: int) -> int:
        return self.same or 1 + 5 * example % LONGEST

    def ids(self, split: Split) -> Ids:
        return split_ids(self.n, split, heldout=0.25, seed=3)

    def load(self, ids: Sequence[int] | Ids) -> list[Example | Unreadable]:
        found: list[Example | Unreadable] = []
        for i in map(int, ids):
            self.loaded.append(i)
            tokens = 64 * i + np.arange(self.length(i))
            found.append(Unreadable(i, "torn") if i in self.bad else Example(i, tokens, i % 3))
        return found

    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self.n}{self.same}".encode()).hexdigest()


class Embed(nn.Module):
    """Token 64 i + p becomes (i, p, i p, 1), each exact in fp32."""

    def forward(self, tokens: Tensor) -> Tensor:
        i, p = tokens.div(64, rounding_mode="floor"), tokens % 64
        return torch.stack([i, p, i * p, torch.ones_like(i)], dim=-1).float()


class Block(nn.Linear):
    """A linear map plus what a test puts in."""

    def __init__(self) -> None:
        super().__init__(4, 6)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
        self.spoil: Callable[[Tensor], Tensor] = lambda x: x

    def forward(self, x: Tensor) -> Tensor:
        return self.spoil(super().forward(x))


class Host(HookedModel):
    modality = "text"

    def __init__(self) -> None:
        super().__init__()
        self.device = torch.device("cpu")
        self.network = nn.Sequential()
        self.network.add_module("embed", Embed())
        self.network.add_module("block", Block())
        self.block_paths = ("block",)
        self.n_forward = 0
        self.threads: set[int] = set()

    def forward(self, inputs: Inputs) -> Tensor:
        self.n_forward += 1
        self.threads.add(threading.get_ident())
        output: Tensor = self.network(inputs.tensors["tokens"])
        return output

    def taps(self) -> dict[str, Tap]:
        return {"embed": Tap("embed"), "blocks.0.resid_post": Tap("block")}

    def probe(self, n: int) -> Inputs:
        return Inputs(torch.arange(n), {"tokens": torch.zeros(n, 5, dtype=torch.int64)})

    def prepare(self, examples: Sequence[Example]) -> Inputs:
        length = max(len(example.value) for example in examples)
        tokens = torch.zeros(len(examples), length, dtype=torch.int64)
        attended = torch.zeros(len(examples), length, dtype=torch.bool)
        for row, example in enumerate(examples):
            tokens[row, : len(example.value)] = torch.from_numpy(example.value)
            attended[row, : len(example.value)] = True
        ids = torch.tensor([example.id for example in examples])
        labels = torch.tensor([example.label for example in examples])
        return Inputs(ids, {"tokens": tokens}, attended, labels=labels)

    def fingerprint(self) -> str:
        return hashlib.sha256(b"host").hexdigest()

    def describe(self) -> dict[str, Any]:
        return {"type": "host"}


EVERY = TokenSelection("all")


class World:
    """Everything that a store is made of; `write` and `stream` give stores of it."""

    dataset_type, host_type = Texts, Host

    def __init__(self, folder: Path) -> None:
        self.folder, self.dataset, self.host = folder, Texts(), Host()
        self.selection, self.seed = EVERY, 0
        self.window_rows, self.batch_size, self.workers = 50, 4, 0
        self.dtype, self.max_bad = "fp32", 0.0

    def plan(self) -> WindowPlan:
        rows_per_example = self.selection.rows_per_example(self.host.sites()["embed"], LONGEST)
        return WindowPlan.make(
            self.dataset, window_rows=self.window_rows, rows_per_example=rows_per_example,
            seed=self.seed,
        )  # fmt: skip

    def write(self, *sites: str, folder: str = "store") -> list[Path]:
        infos = [self.host.sites()[site] for site in sites or ("embed",)]
        store_dir = self.folder / folder
        names = {"model": "host", "dataset": "texts"}
        begin_store(store_dir, self.host, self.dataset, {"seed": self.seed}, names, {"data": "x"})
        write_selections(
            store_dir, self.host, self.dataset, infos, self.selection, self.plan(),
            dtype=self.dtype, batch_size=self.batch_size, workers=self.workers,
            max_bad=self.max_bad,
        )  # fmt: skip
        return [selection_dir(store_dir, info.name, self.selection) for info in infos]

    def store(self, *, folder: str = "store", **options: Any) -> ActivationStore:
        return ActivationStore(self.write(folder=folder)[0], **options)

    def stream(self, site: str = "embed", *, mix_rows: int = 2**20) -> StreamStore:
        return StreamStore(
            lambda: self.host, self.dataset, self.host.sites()[site], self.selection, self.plan(),
            mix_rows=mix_rows, dtype=self.dtype, batch_size=self.batch_size, workers=self.workers,
            max_bad=self.max_bad,
        )  # fmt: skip

    def tokens(self, split: Split) -> set[tuple[int, int]]:
        """(example, position) of every token of a split."""
        ids = self.dataset.ids(split).tolist()
        return {(i, p) for i in ids for p in range(self.dataset.length(i))}


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def files_in() -> Callable[[Path], dict[str, bytes]]:
    """Every file below a folder, hidden ones too: what is in it."""
    return contents
