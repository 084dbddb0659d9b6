"""Rows in windows, from wherever: in order with their ids, or shuffled without end for training.

Shuffling: an epoch visits the windows in a seeded order, `mix_windows` at a time; the rows of such
a group come in one seeded permutation. A window's rows are permuted already, so rows of one example
are no neighbours even when one window is all that fits. Batch t is a function of (seed, t) alone.

Windows that fit in `keep_bytes` together are asked for once and then kept, on the device that
computes: what is small is not fetched, computed or moved again every epoch.
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from sae_runner.data.base import Ids, Split
from sae_runner.errors import DataError
from sae_runner.models.base import SiteInfo
from sae_runner.statistics import ActivationStats
from sae_runner.store.delivery import Delivery

SIDES = ("activations", "target")
CPU = torch.device("cpu")
_TAG = 0x6D6978  # "mix"


class StoredRows(NamedTuple):
    """Rows with what is known of each."""

    x: Float[Tensor, "n d"]
    example_id: Int64[Tensor, " n"]
    position: Int64[Tensor, " n"]
    label: Int64[Tensor, " n"] | None
    """-1 where an example has none; None where the dataset has no classes."""


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
    keep_bytes: int = 0
    """Up to which size the windows of a split are kept once they were asked for."""

    @property
    def d_in(self) -> int:
        """Width of what is encoded."""
        return self.site.d

    @property
    def d_out(self) -> int:
        """Width of what is reconstructed."""
        return self.site.d

    @property
    def width(self) -> int:
        """Width of a row: where a target lies beside the input, that of both."""
        return self.d_in

    @abstractmethod
    def n_windows(self, split: Split) -> int:
        """How many windows a split has."""

    @abstractmethod
    def n_rows(self, split: Split) -> int:
        """How many rows a split has (a stream that cannot know says the most there can be)."""

    def n_bytes(self, split: Split) -> int:
        """The most that the rows of a split take in memory; 0 where it is not known."""
        return 0

    @abstractmethod
    def window(self, split: Split, index: int) -> dict[str, Tensor]:
        """One window: activations [n, d], example_id, position, perhaps label, perhaps keep."""

    @abstractmethod
    def stats(self, n_sample: int = 32768) -> ActivationStats:
        """What initialisation may know of the training rows."""

    def example_ids(self, split: Split) -> Ids:
        """Ids of the examples that rows come from, ascending."""
        windows = (self.window(split, i)["example_id"] for i in range(self.n_windows(split)))
        return np.unique(np.concatenate([np.unique(w.numpy()) for w in windows])).astype(np.int64)

    def heldout_mean(self) -> Float[Tensor, " d"] | None:
        """Mean of the held-out rows in float64, where it is known without reading them."""
        return None

    in_order: bool = False
    """A stream without random access must be visited front to back."""

    def rows(
        self,
        split: Split,
        batch_size: int,
        limit: int | None = None,
        *,
        n_examples: int | None = None,
    ) -> Iterator[StoredRows]:
        """Rows in stored order, never a part of an example's rows, at most `limit` of them.

        One example comes however low the limit is, unless it is 0. Of the window in which the limit
        lies, examples are drawn: its order of ids may be one of classes. `n_examples` limits the
        examples in the same way: the first that are visited, which are a seeded sample.
        """
        left = limit if limit is not None else np.inf
        left_examples = n_examples if n_examples is not None else np.inf
        for index in range(self.n_windows(split)):
            window = self.window(split, index)
            keep = window.get("keep")
            chosen = keep if keep is not None else torch.arange(len(window["activations"]))
            cut = len(chosen) > left
            if cut or n_examples is not None:
                of_rows = window["example_id"][chosen]
                whole = _Examples(of_rows, index)
                least = int(left == limit and left > 0)
                n = max(whole.fitting(int(left)), least) if cut else whole.n
                cut = cut or whole.n >= left_examples
                chosen = chosen[whole.rows(int(min(n, left_examples)))]
                left_examples -= min(n, left_examples)
            for part in torch.split(chosen, batch_size) if len(chosen) else ():
                left -= len(part)
                yield StoredRows(
                    torch.cat([side[part].float() for side in _sides(window)], dim=1),
                    window["example_id"][part].long(),
                    window["position"][part].long(),
                    window["label"][part].long() if "label" in window else None,
                )
            if cut or left <= 0:
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
        device: torch.device = CPU,
    ) -> Iterator[Batch]:
        """Batches without end, on `device`; every row comes exactly once an epoch.

        `batch_size` counts rows over all ranks; this rank gets its equal share of each batch.
        """
        delivery, size = Delivery(device), len(range(rank, batch_size, world_size))
        cursor = _Cursor(self, seed, split, start, device)
        while True:
            with delivery.under_way():
                x = delivery.room(size, self.width, cursor.home)
                begun = taken = 0
                while begun < batch_size:
                    piece = cursor.group.order[cursor.position.offset :][: batch_size - begun]
                    # A rank's share is a stride of the batch, so that all ranks see all windows.
                    share = piece[(rank - begun) % world_size :: world_size]
                    cursor.group.gather(share, x[taken : taken + len(share)])
                    begun, taken = begun + len(piece), taken + len(share)
                    cursor.advance(len(piece))
            yield Batch(delivery.delivered(x), cursor.position)


class _Examples:
    """The examples of some rows, in an order drawn by seed."""

    def __init__(self, example_id: Tensor, seed: int) -> None:
        _, self.example, sizes = np.unique(
            example_id.numpy(), return_inverse=True, return_counts=True
        )
        self.n = len(sizes)
        self.drawn = np.random.default_rng(seed).permutation(self.n)
        self.sizes = sizes[self.drawn]

    def fitting(self, limit: int) -> int:
        """How many of them have at most `limit` rows together."""
        return int((self.sizes.cumsum() <= limit).sum())

    def rows(self, n: int) -> Int64[Tensor, " kept"]:
        """Which rows are of the first n."""
        return torch.from_numpy(np.isin(self.example, self.drawn[:n]).nonzero()[0])


def _sides(window: dict[str, Tensor]) -> list[Tensor]:
    """What makes up a row: activations, and those of a target site where there is one."""
    return [window[name] for name in SIDES if name in window]


class _Group:
    """Some windows and one permutation of all their rows."""

    def __init__(self, windows: list[dict[str, Tensor]], generator: torch.Generator) -> None:
        self.sides = [_sides(w) for w in windows]
        self.keep = [w.get("keep") for w in windows]
        sizes = [len(k if k is not None else s[0]) for s, k in zip(self.sides, self.keep)]  # noqa: B905
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
        keep = self.keep[i]
        index = rows if keep is None else keep[rows]
        begin = 0
        for source in self.sides[i]:
            part = out[:, begin : begin + source.shape[1]]
            index = index.to(source.device)
            if source.dtype == out.dtype and part.is_contiguous():
                torch.index_select(source, 0, index, out=part)
            else:
                part.copy_(source.index_select(0, index))
            begin += source.shape[1]


class _Cursor:
    """Walks groups and epochs; the group at hand is loaded once, and only when it is needed."""

    def __init__(
        self, source: Activations, seed: int, split: Split, start: Position, device: torch.device
    ) -> None:
        self.source, self.seed, self.split = source, seed, split
        self.position = start
        n_bytes = source.n_bytes(split)
        keeps = 0 < n_bytes <= source.keep_bytes
        self._kept: dict[int, dict[str, Tensor]] | None = {} if keeps else None
        self.home = device if keeps and has_room(device, n_bytes) else CPU  # Where windows are.
        self._group: _Group | None = None
        self._n_empty = 0
        """Groups without a row, one after another."""

    @property
    def n_groups(self) -> int:
        return -(-self.source.n_windows(self.split) // self.source.mix_windows)

    @property
    def group(self) -> _Group:
        """The group that `position` is in."""
        if self._group is None:
            self._group = self._load()
        return self._group

    def advance(self, n: int) -> None:
        """Count `n` rows as out and move to the next group at the end of this one.

        Raises:
            DataError: no group has a row.
        """
        place, size = self.position, len(self.group.order)
        self._n_empty = 0 if size else self._n_empty + 1
        if self._n_empty >= self.n_groups:
            raise DataError(
                f"no row of the {self.split} split of {self.source.site.name} is left: see "
                "site.tokens, dataset.max_bad and store.max_norm_multiple"
            )
        self.position = Position(place.epoch, place.group, place.offset + n)
        if self.position.offset < size:
            return
        self._group = None  # Freed before the next one is loaded.
        last = place.group + 1 >= self.n_groups
        self.position = (
            Position(place.epoch + 1) if last else Position(place.epoch, place.group + 1)
        )

    def _load(self) -> _Group:
        n, size = self.source.n_windows(self.split), self.source.mix_windows
        order = torch.arange(n)
        if not self.source.in_order:
            order = torch.randperm(n, generator=self._generator(self.position.epoch))
        chosen = order[self.position.group * size : (self.position.group + 1) * size].tolist()
        windows = [self._window(i) for i in chosen]
        return _Group(windows, self._generator(self.position.epoch, self.position.group + 1))

    def _window(self, index: int) -> dict[str, Tensor]:
        if self._kept is None:
            return self.source.window(self.split, index)
        if index not in self._kept:
            window = self.source.window(self.split, index)
            moved = {name: window[name].to(self.home) for name in SIDES if name in window}
            self._kept[index] = moved | ({"keep": window["keep"]} if "keep" in window else {})
        return self._kept[index]

    def _generator(self, *key: int) -> torch.Generator:
        # The tag keeps these apart from the seeds of the windows' own permutations.
        state = np.random.SeedSequence([self.seed, *key, _TAG]).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))


def has_room(device: torch.device, n_bytes: int) -> bool:
    """Whether so much may be kept on a device: on a GPU half of what is free now, at most."""
    return device.type != "cuda" or 2 * n_bytes <= torch.cuda.mem_get_info(device)[0]


def mixed(mix_rows: int, window_rows: int, n_windows: int) -> int:
    """How many windows of at most `window_rows` rows are mixed when read."""
    return max(1, min(n_windows, mix_rows // window_rows))
