"""Read activations: in order with their ids, or shuffled without end for training.

Shuffling: an epoch visits the windows in a seeded order, `mix_windows` at a time; the rows of such
a group come in one seeded permutation. On disk the rows of a window are permuted already, so rows
of one example are no neighbours even when one window is all that fits. Batch t is a function of
(seed, t) alone.
"""

import itertools
import queue
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from sae_runner import files
from sae_runner.data.base import Split
from sae_runner.errors import StoreError
from sae_runner.models.base import SiteInfo
from sae_runner.statistics import ActivationStats
from sae_runner.store.manifest import (
    SELECTION_SCHEMA,
    STORE_SCHEMA,
    is_complete,
    read_json,
    site_from_json,
)


class StoredRows(NamedTuple):
    """Rows with what is known of each."""

    x: Float[Tensor, "n d"]
    example_id: Int64[Tensor, " n"]
    position: Int64[Tensor, " n"]
    label: Int64[Tensor, " n"] | None


class Batch(NamedTuple):
    """One training batch."""

    x: Float[Tensor, "n d"]
    position: "Position"
    """Where the stream stands after this batch."""


@dataclass(frozen=True)
class Position:
    """A place in the endless shuffled stream; part of a checkpoint."""

    epoch: int = 0
    group: int = 0
    offset: int = 0
    """Rows of the group that are already out."""


class Activations(ABC):
    """Rows of one site in windows, wherever they come from."""

    site: SiteInfo
    mix_windows: int = 1

    @property
    def d_in(self) -> int:
        """Width of a row."""
        return self.site.d

    @abstractmethod
    def n_windows(self, split: Split) -> int:
        """How many windows a split has."""

    @abstractmethod
    def n_rows(self, split: Split) -> int:
        """How many rows a split has (a stream that cannot know says the most there can be)."""

    @abstractmethod
    def window(self, split: Split, index: int) -> dict[str, Tensor]:
        """One window: activations [n, d], example_id, position, perhaps label, perhaps keep."""

    @abstractmethod
    def stats(self, n_sample: int = 32768) -> ActivationStats:
        """What initialisation may know of the training rows."""

    def heldout_mean(self) -> Float[Tensor, " d"] | None:
        """Mean of the held-out rows in float64, where it is known without reading them."""
        return None

    in_order: bool = False
    """A stream without random access must be visited front to back."""

    def rows(self, split: Split, batch_size: int, limit: int | None = None) -> Iterator[StoredRows]:
        """Rows in stored order, at most `limit` of them."""
        left = limit if limit is not None else np.inf
        for index in range(self.n_windows(split)):
            window = self.window(split, index)
            keep = window.get("keep")
            chosen = keep if keep is not None else torch.arange(len(window["activations"]))
            for part in torch.split(chosen[: int(min(left, len(chosen)))], batch_size):
                left -= len(part)
                yield StoredRows(
                    window["activations"][part].float(),
                    window["example_id"][part].long(),
                    window["position"][part].long(),
                    window["label"][part].long() if "label" in window else None,
                )
            if left <= 0:
                return

    def shuffled(
        self,
        batch_size: int,
        seed: int,
        *,
        start: Position = Position(),
        rank: int = 0,
        world_size: int = 1,
        split: Split = "train",
    ) -> Iterator[Batch]:
        """Batches without end; every row comes exactly once an epoch.

        `batch_size` counts rows over all ranks; this rank gets its equal share of each batch.
        """
        cursor = _Cursor(self, seed, split, start)
        while True:
            pieces, begun = [], 0
            while begun < batch_size:
                group, offset = cursor.group, cursor.position.offset
                piece = group.order[offset : offset + batch_size - begun]
                # A rank's share is a stride of the batch, so that all ranks see all windows.
                pieces.append((group, piece[(rank - begun) % world_size :: world_size]))
                begun += len(piece)
                cursor.advance(len(piece))
            x = torch.empty(sum(len(piece) for _, piece in pieces), self.d_in)
            taken = 0
            for group, piece in pieces:
                group.gather(piece, x[taken : taken + len(piece)])
                taken += len(piece)
            yield Batch(x, cursor.position)


class _Group:
    """Some windows and one permutation of all their rows."""

    def __init__(self, windows: list[dict[str, Tensor]], generator: torch.Generator) -> None:
        self.activations = [w["activations"] for w in windows]
        self.keep = [w.get("keep") for w in windows]
        sizes = [len(k if k is not None else a) for a, k in zip(self.activations, self.keep)]  # noqa: B905
        self.starts = torch.tensor([0, *np.cumsum(sizes)])
        self.order = torch.randperm(int(self.starts[-1]), generator=generator)

    def gather(self, rows: Tensor, out: Tensor) -> None:
        """Copy rows (numbers within the group) into `out`, in ascending order.

        The order inside a batch does not matter to a sum over it, and ascending reads are faster.
        """
        rows = rows.sort().values
        cuts = torch.searchsorted(rows, self.starts).tolist()
        for i, (a, b) in enumerate(itertools.pairwise(cuts)):
            if b > a:
                self._take(i, rows[a:b] - self.starts[i], out[a:b])

    def _take(self, i: int, rows: Tensor, out: Tensor) -> None:
        keep, source = self.keep[i], self.activations[i]
        index = rows if keep is None else keep[rows]
        if source.dtype == out.dtype:
            torch.index_select(source, 0, index, out=out)
        else:
            out.copy_(source.index_select(0, index))


class _Cursor:
    """Walks groups and epochs; the group at hand is loaded once."""

    def __init__(self, source: Activations, seed: int, split: Split, start: Position) -> None:
        self.source, self.seed, self.split = source, seed, split
        self.position = start
        self.group = self._load()

    @property
    def n_groups(self) -> int:
        return -(-self.source.n_windows(self.split) // self.source.mix_windows)

    def advance(self, n: int) -> None:
        """Count `n` rows as out and move to the next group at the end of this one."""
        place = self.position
        self.position = Position(place.epoch, place.group, place.offset + n)
        while self.position.offset >= len(self.group.order):
            last = self.position.group + 1 >= self.n_groups
            self.position = (
                Position(self.position.epoch + 1)
                if last
                else Position(self.position.epoch, self.position.group + 1)
            )
            self.group = self._load()

    def _load(self) -> _Group:
        n, size = self.source.n_windows(self.split), self.source.mix_windows
        order = torch.arange(n)
        if not self.source.in_order:
            order = torch.randperm(n, generator=self._generator(self.position.epoch))
        chosen = order[self.position.group * size : (self.position.group + 1) * size].tolist()
        windows = [self.source.window(self.split, i) for i in chosen]
        return _Group(windows, self._generator(self.position.epoch, self.position.group + 1))

    def _generator(self, *key: int) -> torch.Generator:
        state = np.random.SeedSequence([self.seed, *key]).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))


class ActivationStore(Activations):
    """One site and token selection of a store on disk."""

    def __init__(
        self, folder: Path, *, max_norm_multiple: float | None = None, mix_rows: int = 2**20
    ) -> None:
        self.folder = Path(folder)
        self.manifest = read_json(self.folder / "manifest.json", SELECTION_SCHEMA, "finished store")
        self.site = site_from_json(self.manifest["site"])
        self.max_norm_multiple = max_norm_multiple
        shards = self.manifest["splits"]["train"]["shards"]
        largest = max(shard["rows"] for shard in shards)
        self.mix_windows = max(1, min(len(shards), mix_rows // largest))
        for split in ("train", "heldout"):
            for shard in self.manifest["splits"][split]["shards"]:
                path = self.folder / shard["file"]
                if not path.is_file() or path.stat().st_size != shard["bytes"]:
                    raise StoreError(
                        f"{path} is absent or cut short: sae-run rm {self.folder} and cache again"
                    )

    @property
    def source(self) -> dict[str, Any]:
        """store.json: whose activations these are."""
        return read_json(self.folder.parent / "store.json", STORE_SCHEMA, "activation store")

    def n_windows(self, split: Split) -> int:
        """See `Activations`."""
        return len(self.manifest["splits"][split]["shards"])

    def n_rows(self, split: Split) -> int:
        """Rows of a split, norm outliers left out."""
        if self.norm_limit is None:
            return int(self.manifest["splits"][split]["n_rows"])
        return sum(len(self.window(split, i)["keep"]) for i in range(self.n_windows(split)))

    def window(self, split: Split, index: int) -> dict[str, Tensor]:
        """A shard, memory-mapped: nothing is read before it is used."""
        tensors = self._shard(split, index)
        if self.norm_limit is not None:
            tensors["keep"] = (tensors["norm"] <= self.norm_limit).nonzero().squeeze(1)
        return tensors

    def _shard(self, split: Split, index: int) -> dict[str, Tensor]:
        from safetensors import SafetensorError, safe_open

        path = self.folder / self.manifest["splits"][split]["shards"][index]["file"]
        try:
            with safe_open(path, "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise StoreError(f"{path} is damaged: {error}") from None

    @cached_property
    def norm_limit(self) -> float | None:
        """`max_norm_multiple` times the median norm of the training rows."""
        if self.max_norm_multiple is None:
            return None
        norms = [self._shard("train", i)["norm"] for i in range(self.n_windows("train"))]
        return self.max_norm_multiple * float(torch.cat(norms).median())

    def n_dropped(self, split: Split) -> int:
        """Rows left out as norm outliers."""
        return int(self.manifest["splits"][split]["n_rows"]) - self.n_rows(split)

    def stats(self, n_sample: int = 32768) -> ActivationStats:
        """From the manifest; with an outlier filter, from the rows that are kept."""
        sample = next(self.shuffled(min(n_sample, self.n_rows("train")), seed=0)).x
        if self.norm_limit is None:
            from safetensors.torch import load_file

            split = self.manifest["splits"]["train"]
            mean = load_file(self.folder / "stats.safetensors")["train.mean"].float()
            return ActivationStats(mean, split["mean_norm"], split["mean_square_norm"], sample)
        total, norm, square, n = torch.zeros(self.d_in, dtype=torch.float64), 0.0, 0.0, 0
        for rows in self.rows("train", 8192):
            x = rows.x.double()
            norms = x.norm(dim=1)
            total, n = total + x.sum(0), n + len(x)
            norm, square = norm + float(norms.sum()), square + float(norms.square().sum())
        return ActivationStats((total / n).float(), norm / n, square / n, sample)

    def heldout_mean(self) -> Float[Tensor, " d"] | None:
        """See `Activations`; unknown when outliers are left out."""
        if self.norm_limit is not None:
            return None
        from safetensors.torch import load_file

        mean: Tensor = load_file(self.folder / "stats.safetensors")["heldout.mean"]
        return mean

    def example_ids(self, split: Split) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Ids of the examples that rows come from, ascending."""
        shards = (self._shard(split, i)["example_id"] for i in range(self.n_windows(split)))
        return np.unique(np.concatenate([np.unique(s.numpy()) for s in shards])).astype(np.int64)

    def verify(self) -> None:
        """Compare every shard with its hash.

        Raises:
            StoreError: a shard is not what was written.
        """
        for split in ("train", "heldout"):
            for shard in self.manifest["splits"][split]["shards"]:
                if files.sha256(self.folder / shard["file"]) != shard["sha256"]:
                    raise StoreError(
                        f"{self.folder / shard['file']}: content differs from its hash"
                    )


def open_store(path: str | Path) -> ActivationStore:
    """The store of one selection, or of a store folder that holds a single one.

    Raises:
        StoreError: there is no finished store at `path`, or it holds several selections.
    """
    path = Path(path)
    if is_complete(path) or not (path / "store.json").is_file():
        return ActivationStore(path)
    found = sorted(p.parent for p in path.glob("*/manifest.json"))
    if len(found) != 1:
        names = ", ".join(p.name for p in found) or "none finished"
        raise StoreError(f"{path} holds {len(found)} selections ({names}): name one of them")
    return ActivationStore(found[0])


class Prefetched:
    """An iterator read ahead by a thread; `wait_s` is the time its user stood waiting."""

    def __init__(self, source: Iterator[Batch], depth: int) -> None:
        self.source, self.wait_s = source, 0.0
        self.queue: queue.Queue[Batch | BaseException] = queue.Queue(max(1, depth))
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._fill, daemon=True, name="prefetch")
        self.thread.start()

    def _fill(self) -> None:
        try:
            for item in self.source:
                if not self._put(item):
                    return
        except BaseException as error:
            self._put(error)

    def _put(self, item: Batch | BaseException) -> bool:
        while not self.stopped.is_set():
            try:
                self.queue.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def __iter__(self) -> "Prefetched":
        return self

    def __next__(self) -> Batch:
        start = time.perf_counter()
        item = self.queue.get()
        self.wait_s += time.perf_counter() - start
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self) -> None:
        """Stop reading ahead."""
        self.stopped.set()
        self.thread.join(timeout=5)
