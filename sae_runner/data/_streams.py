"""Tables that are read in order and never kept: rows by ascending number, and their count."""

import tarfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sae_runner.data._sources import Source, local_files
from sae_runner.data.base import Ids
from sae_runner.errors import DataError

_COUNTED = 200_000  # Examples of an archive: their headers take a second or two.


class Stream:
    """Rows of an iterable table by ascending number; asking for an earlier one starts again."""

    def __init__(self, table: Any, path: str) -> None:
        self.table, self.path = table, path
        self.lock = threading.Lock()
        self.position = 0
        self.iterator: Iterator[dict[str, Any]] = iter(table)

    def rows(self, ids: Sequence[int] | Ids) -> list[tuple[int, dict[str, Any]]]:
        """Each id with its row.

        Raises:
            DataError: the stream is shorter.
        """
        with self.lock:
            return [(int(i), self._row(int(i))) for i in ids]

    def _row(self, i: int) -> dict[str, Any]:
        if i < self.position:
            self.iterator, self.position = iter(self.table), 0
        for row in self.iterator:
            self.position += 1
            if self.position == i + 1:
                return row
        raise ends_early(self.path, self.position)


def features_of(source: Source, path: str) -> Mapping[str, Any]:
    """Columns and their types; of a stream that does not tell, its first row stands for them."""
    features = source.table.features
    if features is None:
        features = next(iter(source.table), None)
    if not features:
        raise DataError(f"dataset.path={path}: no examples in it")
    found: Mapping[str, Any] = features
    return found


def refuse_short_stream(path: str, table: Any, n_wanted: int) -> None:
    """Refuse a stream that is known to end too early, before anybody waits for its end.

    Raises:
        DataError: it has fewer than `n_wanted` examples.
    """
    n = count_ahead(local_files(path), n_wanted) if Path(path).suffix or "*" in path else None
    splits = table.info.splits or {}
    if n is None and str(table.split) in splits:
        n = splits[str(table.split)].num_examples or None
    if n is not None and n < n_wanted:
        raise ends_early(path, n)


def ends_early(path: str, n: int) -> DataError:
    """What is said of a stream of `n` examples where more were asked for."""
    return DataError(
        f"dataset.path={path}: the stream ends after {n} examples; lower dataset.n_examples or "
        "dataset.n_heldout"
    )


def count_ahead(files: Sequence[Path], n_wanted: int) -> int | None:
    """Examples in these files, counted no further than `n_wanted`; None where that takes long.

    Of a tar only the headers are read: a webdataset's example is all members of one name up to its
    first dot.
    """
    suffixes = {file.suffix.lower() for file in files}
    try:
        if suffixes == {".parquet"}:
            import pyarrow.parquet as pq

            return sum(int(pq.ParquetFile(file).metadata.num_rows) for file in files)
        if suffixes != {".tar"} or n_wanted > _COUNTED:
            return None
        n = 0
        for file in files:
            last = None
            with tarfile.open(file) as archive:
                for member in archive:
                    key = member.name.partition(".")[0] if member.isfile() else last
                    n, last = n + (key != last), key
                    if n >= n_wanted:
                        return n
        return n
    except (OSError, ValueError, tarfile.TarError):  # What is wrong is said when it is read.
        return None
