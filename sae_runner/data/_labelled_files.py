"""Labelled examples of one file each: what tasks of probes are made of.

A record has an input (`input`, or a column by one of the usual names), which is a text or the path
of an image, from the file's own folder on; a `label`; and perhaps a `split`, `train` or `test`.
Without that, a fifth of each class is held out, drawn by seed.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sae_runner.data._sources import content_hash, fingerprint_of
from sae_runner.data._text_files import LABEL_NAMES, TEXT_NAMES
from sae_runner.data._text_records import Table, columns_of, open_records, plain_label
from sae_runner.data.base import Dataset, Example, Ids, Split, Unreadable
from sae_runner.data.images import decode
from sae_runner.errors import DataError, did_you_mean

INPUT_NAMES = ("input", *TEXT_NAMES, "image", "img", "path", "file")
SPLITS_OF: dict[Any, Split] = {"train": "train", "test": "heldout"}
HELD_OUT = 0.2
FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
IMAGES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"})


class LabelledFile(Dataset):
    """The records of one .jsonl, .csv, .tsv or .parquet file.

    Args:
        path: the file.
        seed: draws what is held out, and what is left out.
        limits: at most so many examples of each split; None for all.
        where: how messages begin.

    Raises:
        DataError: another format, no such column, a record that has no input, label or split.
    """

    def __init__(
        self, path: Path, *, seed: int, limits: Mapping[Split, int | None], where: str
    ) -> None:
        self.path, self.name, self.where = path, path.stem, where
        self.seed, self.limits = seed, limits
        if path.suffix.lower() not in FORMATS:
            raise DataError(f"{where}: such files are not read; use {', '.join(FORMATS)}")
        options = {"subset": None, "revision": None, "streaming": False}
        try:
            self.records = open_records(str(path), None, None, "path", options)
        except DataError as error:
            raise DataError(str(error).replace(f"dataset.path={path}", where)) from None
        columns = columns_of(self.records)
        self.input_column = self._column(INPUT_NAMES, columns, "input")
        label_column = self._column(LABEL_NAMES, columns, "label")
        self.inputs = self._values(self.input_column)
        self.modality = "image" if self._is_image(self.inputs[0]) else "text"
        for i, value in enumerate(self.inputs):
            self._check_input(i, value)
        labels = [self._label(i, value) for i, value in enumerate(self._values(label_column))]
        ordered = sorted(set(labels), key=lambda label: (isinstance(label, str), label))
        self.label_names = tuple(map(str, ordered))
        place = {label: c for c, label in enumerate(ordered)}
        self.classes: Ids = np.array([place[label] for label in labels], dtype=np.int64)
        self._split = self._given_split() if "split" in columns else self._drawn_split()

    def ids(self, split: Split) -> Ids:
        """See `Dataset.ids`."""
        found = (self._split == (split == "heldout")).nonzero()[0]
        limit = self.limits.get(split)
        if limit is not None and limit < len(found):
            number = int(split == "heldout")
            found = np.random.default_rng([self.seed, number]).choice(found, limit, replace=False)
        return np.sort(found).astype(np.int64)

    def load(self, ids: Sequence[int] | Ids) -> list[Example | Unreadable]:
        """Texts, or images in RGB."""
        return [self._example(int(i)) for i in ids]

    def fingerprint(self) -> str:
        """See `Dataset.fingerprint`; of images their content counts."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        is_path = self.modality == "image" and isinstance(self.inputs[0], str)
        paths = [self._path(value) for value in self.inputs] if is_path else []
        images = [content_hash([path], path.parent) for path in paths]
        return fingerprint_of([self.records.identity, images])

    # -- Records ---------------------------------------------------------------------------------

    def _column(self, names: Sequence[str], columns: Sequence[str], what: str) -> str:
        for name in names:
            if name in columns:
                return name
        raise DataError(f"{self.where}: it has no column {what!r}.{did_you_mean(what, columns)}")

    def _values(self, column: str) -> list[Any]:
        if isinstance(self.records, Table):
            return list(self.records.table[column])
        found = []
        for i in range(len(self.records)):
            try:
                found.append(self.records[i].get(column))
            except ValueError as error:
                raise DataError(f"{self.where}: record {i + 1}: {error}") from None
        return found

    def _is_image(self, value: Any) -> bool:
        return not isinstance(value, str) or Path(value).suffix.lower() in IMAGES

    def _path(self, value: str) -> Path:
        return self.path.parent / Path(value).expanduser()

    def _check_input(self, i: int, value: Any) -> None:
        if value is None or (isinstance(value, str) and not value.strip()):
            raise DataError(f"{self.where}: record {i + 1} has no {self.input_column}")
        if self._is_image(value) != (self.modality == "image"):
            kind = "an image" if self.modality == "image" else "a text"
            raise DataError(f"{self.where}: record {i + 1} is not {kind}, which the first one is")
        if self.modality == "image" and isinstance(value, str) and not self._path(value).is_file():
            raise DataError(f"{self.where}: record {i + 1}: no such file: {self._path(value)}")

    def _label(self, i: int, value: Any) -> str | int:
        label = plain_label(value)
        if not isinstance(label, str | int) or label == "":
            found = "no label" if label in (None, "") else f"label {label!r}, which is no class"
            raise DataError(f"{self.where}: record {i + 1} has {found}")
        return label

    def _example(self, i: int) -> Example | Unreadable:
        value, label = self.inputs[i], int(self.classes[i])
        if self.modality == "text":
            return Example(i, value, label)
        try:
            image = decode(str(self._path(value)) if isinstance(value, str) else value)
        except Exception as error:  # Whatever a decoder raises, the image cannot be used.
            return Unreadable(i, f"{type(error).__name__}: {error}")
        return Example(i, image, label)

    # -- Splits ----------------------------------------------------------------------------------

    def _given_split(self) -> npt.NDArray[np.bool_]:
        """Which records are held out, as their `split` says."""
        held_out = []
        for i, value in enumerate(self._values("split")):
            if value not in SPLITS_OF:
                hint = did_you_mean(str(value), list(SPLITS_OF))
                raise DataError(f"{self.where}: record {i + 1} has split {value!r}.{hint}")
            held_out.append(SPLITS_OF[value] == "heldout")
        return np.array(held_out)

    def _drawn_split(self) -> npt.NDArray[np.bool_]:
        """A fifth of each class, to the nearest whole number."""
        held_out = np.zeros(len(self.classes), dtype=bool)
        for c in range(len(self.label_names or ())):
            own = (self.classes == c).nonzero()[0]
            order = np.random.default_rng([self.seed, c]).permutation(own)
            held_out[order[: round(HELD_OUT * len(own))]] = True
        return held_out
