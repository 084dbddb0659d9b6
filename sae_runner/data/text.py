"""Text with labels, or running text, from files here or the Hugging Face hub."""

import logging
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np

from sae_runner.config import NonNegative, Positive, ProperFraction
from sae_runner.data import DATASETS
from sae_runner.data._columns import require_columns
from sae_runner.data._sources import (
    OneSplit,
    fingerprint_of,
    refuse_same,
    say_without_splits,
    without_splits,
)
from sae_runner.data._streams import refuse_short_stream
from sae_runner.data._text_files import TextFiles
from sae_runner.data._text_records import (
    Records,
    Table,
    columns_of,
    is_plain,
    label_column_of,
    open_records,
    plain_label,
    text_column_of,
)
from sae_runner.data.base import Dataset, Example, Ids, Split, Unreadable, split_ids
from sae_runner.errors import ConfigError, DataError

log = logging.getLogger("sae_runner")


@DATASETS.register("text")
class Text(Dataset):
    """One string per example, or running text that a language model packs into rows.

    Ids count the records at `path` first, then those held out elsewhere, if they are. A stream is
    read in ascending order; its first `n_heldout` records are held out.

    Args:
        name: what runs and reports call it.
        path: a .txt, .jsonl, .csv, .tsv, .parquet or .arrow file, a glob of them, a folder of
            parquet, a `save_to_disk` folder, or a hub name.
        split: of a folder or hub dataset; a file has none.
        subset: of a hub dataset ("configuration").
        revision: of a hub dataset.
        heldout_path: where the held-out text is, if not at `path`.
        heldout_split: which split it is, if it is one.
        heldout: share of the documents that is held out where neither of the two is given.
        columns: names of the fields of .csv and .tsv files; None if their first line has them.
        text_column: None to guess.
        label_column: None to guess, `none` for no labels.
        label_names: names of the classes; None to take them from the data.
        kind: `labelled`, one example for each record; `corpus`, running text without labels.
        document_separator: cuts every text of a corpus into documents (`\\n\\n`: at blank lines);
            None if each record (of .txt: each file) is one.
        n_examples: at most so many to train on: a seeded sample; of a stream the first.
        n_heldout: at most so many held out.
        streaming: read a hub dataset or parquet in order without keeping a copy; plain files are
            read in place whatever it says.
        seed: decides splits and samples.

    Raises:
        DataError: nothing at a path, no such split or column, or nothing in it.
        ConfigError: options that contradict each other.
    """

    modality = "text"

    def __init__(
        self,
        *,
        name: str,
        path: str,
        split: str | None,
        subset: str | None,
        revision: str | None,
        heldout_path: str | None,
        heldout_split: str | None,
        heldout: ProperFraction,
        columns: list[str] | None,
        text_column: str | None,
        label_column: str | None,
        label_names: list[str] | None,
        kind: Literal["labelled", "corpus"],
        document_separator: str | None,
        n_examples: Positive | None,
        n_heldout: Positive | None,
        streaming: bool,
        seed: NonNegative,
    ) -> None:
        if streaming and is_plain(path):
            log.info("dataset.streaming=true: plain files are read in place, and so is this one")
            streaming = False
        self.name, self.path, self.kind, self.streaming = name, path, kind, streaming
        self.random_access, self.heldout, self.seed = not streaming, heldout, seed
        self.limits: dict[Split, int | None] = {"train": n_examples, "heldout": n_heldout}
        options = {"subset": subset, "revision": revision, "streaming": streaming}
        if heldout_path is None and is_plain(path):
            say_without_splits(heldout_split)
            heldout_split = None
        self._check_options(bool(heldout_path or heldout_split), document_separator)
        self.records = [open_records(path, split, columns, "path", options)]
        if heldout_path is None and without_splits(self.records[0].identity):
            say_without_splits(heldout_split)
            heldout_split = None
        if isinstance(first := self.records[0], Table) and streaming:
            refuse_short_stream(path, first.table, (n_examples or 0) + (n_heldout or 0))
        if heldout_path or heldout_split:
            where, key = (heldout_path, "heldout_path") if heldout_path else (path, "path")
            try:
                other = open_records(where, heldout_split or split, columns, key, options)
                refuse_same(first.identity, other.identity, f"dataset.{key}={where}")
                self.records.append(other)
            except OneSplit as error:
                log.info("%s: a share of it is held out", error)
        self.text_column = text_column_of(self.records[0], text_column)
        self.label_column = None
        if kind == "labelled":
            self.label_column = label_column_of(self.records[0], label_column, self.text_column)
        for records in self.records[1:]:
            require_columns((self.text_column, self.label_column), columns_of(records), where)
        self._class_of, self.label_names = self._classes(label_names)
        if columns is not None and self.label_column is not None:
            self._refuse_names(columns)
        self.separator = None
        if kind == "corpus" and document_separator is not None:
            self.separator = document_separator.replace(r"\n", "\n")  # As a shell passes it.
        self._documents = [list(self._cut(r)) for r in self.records] if self.separator else None

    def _check_options(self, elsewhere: bool, separator: str | None) -> None:
        if self.streaming:
            if elsewhere:
                raise ConfigError(
                    "dataset.streaming=true holds out its first dataset.n_heldout examples: set "
                    "dataset.heldout_path and dataset.heldout_split to null"
                )
            if separator is not None:
                raise ConfigError("dataset.streaming=true: set dataset.document_separator=null")
            if None in self.limits.values():
                raise ConfigError(
                    "dataset.streaming=true needs dataset.n_examples=N and dataset.n_heldout=N"
                )

    def _refuse_names(self, columns: list[str]) -> None:
        """Refuse a first line whose label can only be a name where it is to be a record."""
        for records in self.records:
            if not isinstance(records, TextFiles) or not (first := records.first(1)):
                continue
            label = plain_label(first[0].get(self.label_column or ""))
            others = self._class_of.keys() - {label}
            alone = (
                isinstance(label, str) and others and not any(isinstance(x, str) for x in others)
            )
            if alone or label not in {*self._class_of, -1}:
                raise DataError(
                    f"dataset.columns={','.join(columns)}: the first record of {records.where} has "
                    f"{self.label_column} {label!r}, which is no class; if these are names, set "
                    "dataset.columns=null, dataset.text_column and dataset.label_column"
                )

    # -- Examples --------------------------------------------------------------------------------

    def _counts(self) -> list[int]:
        return [len(part) for part in self._documents or self.records]

    def ids(self, split: Split) -> Ids:
        """See `Dataset.ids`."""
        limit = self.limits[split]
        if self.streaming:
            first = self.limits["heldout"] or 0
            span = (0, first) if split == "heldout" else (first, first + (limit or 0))
            return np.arange(*span, dtype=np.int64)
        counts = self._counts()
        if len(counts) == 1:
            return split_ids(counts[0], split, heldout=self.heldout, seed=self.seed, limit=limit)
        start, count = (0, counts[0]) if split == "train" else (counts[0], counts[1])
        order = np.random.default_rng(self.seed).permutation(count)[:limit]
        return np.sort(order + start).astype(np.int64)

    def load(self, ids: Sequence[int] | Ids) -> list[Example | Unreadable]:
        """The texts of `ids`, with class indices."""
        n = 0 if self.streaming else self._counts()[0]
        found = []
        for i in map(int, ids):
            part, row = (0, i) if self.streaming or i < n else (1, i - n)
            if self._documents is None:
                found.append(self._example(i, self.records[part], row))
            else:
                text = self._documents[part][row]
                found.append(
                    text._replace(id=i) if isinstance(text, Unreadable) else Example(i, text)
                )
        return found

    def _example(self, i: int, records: Records, row: int) -> Example | Unreadable:
        try:
            record = records[row]
        except DataError:
            raise  # The stream's end, not the record's.
        except (ValueError, OSError) as error:
            return Unreadable(i, f"{type(error).__name__}: {error}")
        text = record.get(self.text_column)
        if not isinstance(text, str) or not text.strip():
            return Unreadable(
                i, f"{self.text_column}: {'empty' if text == '' else repr(text)[:40]}"
            )
        if self.label_column is None:
            return Example(i, text)
        value = plain_label(record.get(self.label_column))
        if value == -1:  # Kept secret, as in the test splits of benchmarks.
            return Example(i, text)
        if value not in self._class_of:
            return Unreadable(i, f"{self.label_column}: {value!r} is no class")
        return Example(i, text, self._class_of[value])

    def _cut(self, records: Records) -> Iterator[str | Unreadable]:
        """Documents of a corpus that are no white space."""
        for row in range(len(records)):
            example = self._example(row, records, row)
            if isinstance(example, Unreadable):
                yield example
            else:
                parts = example.value.split(self.separator)
                yield from (part for part in parts if part.strip())

    def _classes(self, given: list[str] | None) -> tuple[dict[Any, int], tuple[str, ...] | None]:
        """Label values to class indices, and the classes' names."""
        if self.label_column is None:
            return {}, None
        features = getattr(self.records[0], "features", {})
        names = given or getattr(features.get(self.label_column), "names", None)
        if names:
            by_name = {name: i for i, name in enumerate(names)}
            return {**by_name, **{i: i for i in range(len(names))}}, tuple(names)
        if self.streaming:
            raise ConfigError("dataset.streaming=true needs dataset.label_names=[…]")
        values = {plain_label(value) for value in self._labels()} - {-1, None}
        ordered = sorted(values, key=lambda value: (isinstance(value, str), value))
        return {value: i for i, value in enumerate(ordered)}, tuple(map(str, ordered))

    def _labels(self) -> Iterator[Any]:
        for records in self.records:
            if isinstance(records, Table):
                yield from records.table.unique(self.label_column)
            else:
                yield from (r.get(self.label_column or "") for r in records.first(len(records)))

    # -- Identity --------------------------------------------------------------------------------

    def fingerprint(self) -> str:
        """See `Dataset.fingerprint`."""
        facts = [self.text_column, self.label_column, self.label_names, self.kind, self.separator]
        return fingerprint_of([[records.identity for records in self.records], facts])

    def describe(self) -> dict[str, Any]:
        """See `Dataset.describe`."""
        return super().describe() | {
            "path": self.path, "kind": self.kind, "text_column": self.text_column,
            "label_column": self.label_column,
        }  # fmt: skip
