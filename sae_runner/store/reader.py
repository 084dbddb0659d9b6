"""Activations on disk, memory-mapped: nothing is read before it is used."""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae_runner import files
from sae_runner.data.base import SPLITS, Split
from sae_runner.errors import StoreError
from sae_runner.models._precision import DTYPES
from sae_runner.statistics import ActivationStats
from sae_runner.store.activations import Activations as Activations
from sae_runner.store.activations import mixed
from sae_runner.store.manifest import (
    REMEDY,
    SELECTION_SCHEMA,
    STORE_SCHEMA,
    is_complete,
    read_json,
    site_from_json,
)


class ActivationStore(Activations):
    """One site and token selection of a store on disk.

    With `verify` every file is compared with its hash when it is first read: a flipped bit would
    otherwise be trained on.
    """

    def __init__(
        self,
        folder: Path,
        *,
        max_norm_multiple: float | None = None,
        mix_rows: int = 2**20,
        keep_bytes: int = 0,
        verify: bool = True,
    ) -> None:
        self.folder = Path(folder)
        path = self.folder / "manifest.json"
        self.manifest = read_json(path, SELECTION_SCHEMA, "finished store")
        self.max_norm_multiple, self.keep_bytes = max_norm_multiple, keep_bytes
        self._verify_reads, self._verified = verify, set[str]()
        try:
            self.site = site_from_json(self.manifest["site"])
            shards = self.manifest["splits"]["train"]["shards"]
            # By the rows that were planned, as a stream does, which cannot know what will come.
            self.mix_windows = mixed(mix_rows, self.manifest["window_rows"], len(shards))
            for file in self._files():
                self._check_size(self.folder / file["file"], file["bytes"])
        except (KeyError, TypeError) as error:
            raise StoreError(f"{path} is damaged: it lacks {error}") from None

    def _files(self) -> Iterator[dict[str, Any]]:
        """The manifest's record of every file: its name, bytes, hash."""
        for split in SPLITS:
            yield from self.manifest["splits"][split]["shards"]
        yield self.manifest["stats"]

    def _check_size(self, path: Path, n_bytes: int) -> None:
        if not path.is_file() or path.stat().st_size != n_bytes:
            raise StoreError(f"{path} is absent or cut short: {REMEDY}")

    @property
    def source(self) -> dict[str, Any]:
        """store.json: whose activations these are."""
        return read_json(self.folder.parent / "store.json", STORE_SCHEMA, "activation store")

    def n_windows(self, split: Split) -> int:
        """See `Activations`."""
        return len(self.manifest["splits"][split]["shards"])

    def n_rows(self, split: Split) -> int:
        """Rows of a split, norm outliers left out."""
        return int(self.manifest["splits"][split]["n_rows"]) - self.n_dropped(split)

    def n_bytes(self, split: Split) -> int:
        """See `Activations`; those of outliers are among them."""
        itemsize = DTYPES[self.manifest["dtype"]].itemsize
        return int(self.manifest["splits"][split]["n_rows"]) * self.width * itemsize

    def window(self, split: Split, index: int) -> dict[str, Tensor]:
        """A shard, memory-mapped: nothing is read before it is used."""
        tensors = self._shard(split, index)
        if self.norm_limit is not None:
            tensors["keep"] = (tensors["norm"] <= self.norm_limit).nonzero().squeeze(1)
        return tensors

    def _shard(self, split: Split, index: int) -> dict[str, Tensor]:
        from safetensors import SafetensorError, safe_open

        path = self._to_read(self.manifest["splits"][split]["shards"][index])
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
        return self._n_dropped[split]

    @cached_property
    def _n_dropped(self) -> dict[Split, int]:
        dropped = dict[Split, int].fromkeys(SPLITS, 0)
        if (limit := self.norm_limit) is None:
            return dropped
        for split in SPLITS:
            for i in range(self.n_windows(split)):
                dropped[split] += int((self._shard(split, i)["norm"] > limit).sum())
        return dropped

    def stats(self, n_sample: int = 32768) -> ActivationStats:
        """From the manifest; with an outlier filter, from the rows that are kept.

        Raises:
            DataError: the filter leaves no row.
        """
        n_sample = max(1, min(n_sample, self.n_rows("train")))
        return self._moments._replace(sample=next(self.shuffled(n_sample, seed=0)).x)

    @cached_property
    def _moments(self) -> ActivationStats:
        none = torch.empty(0, self.d_in)
        if self.norm_limit is None:
            split = self.manifest["splits"]["train"]
            mean = self._mean("train").float()
            return ActivationStats(mean, split["mean_norm"], split["mean_square_norm"], none)
        total, norm, square = torch.zeros(self.width, dtype=torch.float64), 0.0, 0.0
        for rows in self.rows("train", 8192):
            x = rows.x.double()
            norms = x[:, : self.d_in].norm(dim=1)
            total += x.sum(0)
            norm, square = norm + float(norms.sum()), square + float(norms.square().sum())
        n = max(1, self.n_rows("train"))
        return ActivationStats((total / n).float(), norm / n, square / n, none)

    def _mean(self, split: Split) -> Float[Tensor, " d"]:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self._to_read(self.manifest["stats"])
        try:
            mean: Tensor = load_file(path)[f"{split}.mean"]
        except (SafetensorError, OSError, KeyError) as error:
            raise StoreError(f"{path} is damaged: {error}") from None
        return mean

    def heldout_mean(self) -> Float[Tensor, " d"] | None:
        """See `Activations`; unknown when outliers are left out."""
        return self._mean("heldout") if self.norm_limit is None else None

    def verify(self) -> None:
        """Compare every file with its hash.

        Raises:
            StoreError: a file is absent or not what was written.
        """
        for file in self._files():
            self._check_hash(file)

    def _check_hash(self, file: dict[str, Any]) -> None:
        path = self.folder / file["file"]
        self._check_size(path, file["bytes"])
        if files.sha256(path) != file["sha256"]:
            raise StoreError(f"{path} is damaged: it differs from its hash; {REMEDY}")

    def _to_read(self, file: dict[str, Any]) -> Path:
        """The path of a file that is about to be read; the first time its hash is compared."""
        if self._verify_reads and file["file"] not in self._verified:
            self._check_hash(file)
            self._verified.add(file["file"])
        return self.folder / str(file["file"])


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
