"""Where texts come from: plain files, or tables and streams of Hugging Face `datasets`."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sae_runner.data._columns import NO_COLUMN
from sae_runner.data._sources import local_files, open_source
from sae_runner.data._streams import Stream, features_of
from sae_runner.data._text_files import LABEL_NAMES, SUFFIXES, TEXT_NAMES, TextFiles
from sae_runner.errors import DataError, did_you_mean

log = logging.getLogger("sae_runner")

GUESS_FROM = 100
"""Records that are looked at to guess a column."""


class Table:
    """Records of a Hugging Face table, or of a stream of one."""

    def __init__(self, path: str, split: str | None, key: str, **options: Any) -> None:
        source = open_source(path, split, key=key, **options)
        self.table, self.identity = source.table, source.identity
        self.features = features_of(source, path)
        self.stream = Stream(self.table, path) if options["streaming"] else None
        if self.stream is None and not len(self.table):
            raise DataError(f"dataset.{key}={path}: no examples in it")

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, i: int) -> Mapping[str, Any]:
        row: Mapping[str, Any] = (
            self.table[i] if self.stream is None else self.stream.rows([i])[0][1]
        )
        return row

    def first(self, n: int) -> list[Mapping[str, Any]]:
        """The first `n` records."""
        return (
            list(self.table.take(n)) if self.stream else [self[i] for i in range(min(n, len(self)))]
        )


Records = Table | TextFiles


def is_plain(path: str) -> bool:
    """Whether `path` means files that are read here, without `datasets`."""
    return any(file.suffix.lower() in SUFFIXES for file in local_files(path)[:1])


def open_records(
    path: str, split: str | None, columns: list[str] | None, key: str, options: dict[str, Any]
) -> Records:
    """The records of files in a plain format, or of anything that `datasets` reads."""
    where = f"dataset.{key}={path}"
    if not path:
        raise DataError(f"{where}: name a file or a dataset on the hub")
    if Path(path).suffix.lower() in SUFFIXES and not local_files(path):
        # Not to be looked up on the hub, whose names have no such endings.
        path = path if path.startswith(("/", ".", "~")) else f"./{path}"
    if not is_plain(path):
        return Table(path, split, key, **options)
    return TextFiles(local_files(path), columns, where)


def plain_label(value: Any) -> Any:
    """`"1"` as 1, so that a file without types has the classes of one with types."""
    if isinstance(value, str) and value.strip().lstrip("-").isdigit():
        return int(value)
    return int(value) if isinstance(value, bool | float) and value == int(value) else value


def columns_of(records: Records) -> list[str]:
    """Names of the columns."""
    if isinstance(records, Table):
        return list(records.features)
    found = records.first(GUESS_FROM)
    return list(dict.fromkeys(name for record in found for name in record))


def text_column_of(records: Records, given: str | None) -> str:
    """The column that `dataset.text_column` names, or the likely one if it is None.

    Raises:
        DataError: no such column, or none with text.
    """
    columns = columns_of(records)
    if given is not None:
        return _named("text_column", given, columns)
    lengths: dict[str, int] = dict.fromkeys(columns, 0)
    for record in records.first(GUESS_FROM):
        for name, value in record.items():
            lengths[name] += len(value) if isinstance(value, str) else 0
    usual = [name for name in TEXT_NAMES if lengths.get(name)]
    found = usual[0] if usual else max(columns, key=lambda name: lengths[name], default="")
    if not lengths.get(found):
        raise DataError(f"dataset.text_column=null: no column has text.{did_you_mean('', columns)}")
    if len(columns) > 1:
        log.info("dataset.text_column: took %r", found)
    return found


def label_column_of(records: Records, given: str | None, text_column: str) -> str | None:
    """The column that `dataset.label_column` names, or the likely one if it is None."""
    columns = columns_of(records)
    if given == NO_COLUMN:
        return None
    if given is not None:
        return _named("label_column", given, columns)
    features = getattr(records, "features", {})
    typed = [name for name in columns if hasattr(features.get(name), "names")]
    usual = [name for name in LABEL_NAMES if name in columns and name != text_column]
    found = next(iter([*typed, *usual]), None)
    log.info("dataset.label_column: took %s", "none" if found is None else repr(found))
    return found


def _named(key: str, given: str, columns: list[str]) -> str:
    if given not in columns:
        raise DataError(f"dataset.{key}={given}: no such column.{did_you_mean(given, columns)}")
    return given
