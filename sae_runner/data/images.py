"""Images from parquet, arrow, image folders, webdataset tars or the Hugging Face hub."""

import logging
import re
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

from sae_runner.config import Fraction, NonNegative, Positive
from sae_runner.data import DATASETS
from sae_runner.data._columns import choose, require_columns
from sae_runner.data._sources import (
    OneSplit,
    fingerprint_of,
    open_source,
    refuse_same,
    say_without_splits,
    without_splits,
)
from sae_runner.data._streams import Stream, features_of, refuse_short_stream
from sae_runner.data.base import Dataset, Example, Ids, Split, Unreadable, split_ids
from sae_runner.errors import ConfigError, DataError

log = logging.getLogger("sae_runner")


@DATASETS.register("images")
class Images(Dataset):
    """Images with labels, captions, both or neither; decoded when they are asked for.

    Ids count the examples at `path` first, then those held out elsewhere, if they are. A stream is
    read in ascending order; its first `n_heldout` examples are held out.

    Args:
        name: what runs and reports call it.
        path: a .parquet, .arrow or .tar (webdataset) file, a glob of them, a folder of such files
            or of images in folders named by class, a `save_to_disk` folder, or a hub name.
        split: of a folder or hub dataset; a file has none.
        subset: of a hub dataset ("configuration").
        revision: of a hub dataset.
        heldout_path: where the held-out images are, if not at `path`.
        heldout_split: which split they are, if they are one.
        heldout: share that is held out where neither of the two is given.
        image_column: None to guess.
        label_column: None to guess, `none` for no labels.
        caption_column: None to guess, `none` for no captions.
        caption_template: sentence with `{}` for the label's name, where there is no caption column.
        n_examples: at most so many to train on: a seeded sample; of a stream the first.
        n_heldout: at most so many held out.
        streaming: read in order without keeping a copy.
        seed: decides splits and samples.

    Raises:
        DataError: nothing at a path, no such split or column, or nothing in it.
        ConfigError: options that contradict each other.
    """

    modality = "image"

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
        heldout: Fraction,
        image_column: str | None,
        label_column: str | None,
        caption_column: str | None,
        caption_template: str | None,
        n_examples: Positive | None,
        n_heldout: Positive | None,
        streaming: bool,
        seed: NonNegative,
    ) -> None:
        self.name, self.path, self.streaming = name, path, streaming
        self.random_access = not streaming
        self.heldout, self.seed = heldout, seed
        self.limits: dict[Split, int | None] = {"train": n_examples, "heldout": n_heldout}
        hub: dict[str, Any] = {"subset": subset, "revision": revision, "streaming": streaming}
        self.sources = [open_source(path, split, **hub)]
        if heldout_path is None and without_splits(self.sources[0].identity):
            say_without_splits(heldout_split)
            heldout_split = None
        if heldout_path is not None or heldout_split is not None:
            self._refuse_second_source()
            where = heldout_path or path
            key = "path" if heldout_path is None else "heldout_path"
            try:
                self.sources.append(open_source(where, heldout_split or split, **hub, key=key))
                first, second = (source.identity for source in self.sources)
                refuse_same(first, second, f"dataset.{key}={where}")
            except OneSplit as error:
                if heldout_path is not None:
                    raise
                log.info("%s: a share of it is held out", error)
        features = features_of(self.sources[0], path)
        wanted = {
            "image_column": image_column, "label_column": label_column,
            "caption_column": caption_column,
        }  # fmt: skip
        self.columns = {key: choose(key, given, features) for key, given in wanted.items()}
        for source in self.sources[1:]:
            require_columns(self.columns.values(), features_of(source, where), where)
        self.template = caption_template
        self.label_names = self._label_names(features)
        if self.template is not None and self.label_names is None:
            raise ConfigError(
                f"dataset.caption_template={self.template}: there are no label names to put in it"
            )
        self._tables = [self._undecoded(source.table) for source in self.sources]
        self._stream = Stream(self._tables[0], path) if streaming else None
        self._check_lengths()

    def _refuse_second_source(self) -> None:
        if self.streaming:
            raise ConfigError(
                "dataset.streaming=true holds out its first dataset.n_heldout examples: set "
                "dataset.heldout_path and dataset.heldout_split to null"
            )

    def _check_lengths(self) -> None:
        if self.streaming:
            for key in ("n_examples", "n_heldout"):
                if self.limits["train" if key == "n_examples" else "heldout"] is None:
                    raise ConfigError(f"dataset.streaming=true needs dataset.{key}=N")
            n_wanted = sum(limit or 0 for limit in self.limits.values())
            refuse_short_stream(self.path, self._tables[0], n_wanted)
            return
        for key, table in zip(("path", "heldout_path"), self._tables, strict=False):
            if not len(table):
                raise DataError(f"dataset.{key}={self.path}: no examples in it")

    def ids(self, split: Split) -> Ids:
        """See `Dataset.ids`."""
        limit = self.limits[split]
        if self.streaming:
            first = self.limits["heldout"] or 0
            span = (0, first) if split == "heldout" else (first, first + (limit or 0))
            return np.arange(*span, dtype=np.int64)
        n = len(self._tables[0])
        if len(self._tables) == 1:
            return split_ids(n, split, heldout=self.heldout, seed=self.seed, limit=limit)
        start, count = (0, n) if split == "train" else (n, len(self._tables[1]))
        if limit is None or limit >= count:
            return np.arange(start, start + count, dtype=np.int64)
        chosen = np.random.default_rng(self.seed).permutation(count)[:limit]
        return np.sort(chosen + start).astype(np.int64)

    def load(self, ids: Sequence[int] | Ids) -> list[Example | Unreadable]:
        """The images of `ids` in RGB."""
        if self._stream is not None:
            return [self._example(int(i), row) for i, row in self._stream.rows(ids)]
        n, found = len(self._tables[0]), dict[int, dict[str, Any]]()
        numbers = [int(i) for i in ids]
        for table, start, own in zip(self._tables, (0, n), self._own_names, strict=False):
            mine = [i for i in numbers if start <= i < start + len(table)]
            columns = table[[i - start for i in mine]] if mine else {}
            if own and mine:  # Numbers of classes that another table may count otherwise.
                labels = columns[str(self.columns["label_column"])]
                named = [own[x] if x is not None and x >= 0 else None for x in labels]
                columns = {**columns, self.columns["label_column"]: named}
            for row, i in enumerate(mine):
                found[i] = {name: values[row] for name, values in columns.items()}
        return [self._example(i, found[i]) for i in numbers]

    def fingerprint(self) -> str:
        """See `Dataset.fingerprint`."""
        identities = [source.identity for source in self.sources]
        return fingerprint_of([identities, self.columns, self.template])

    def describe(self) -> dict[str, Any]:
        """See `Dataset.describe`."""
        return super().describe() | {"path": self.path, **self.columns}

    def _example(self, i: int, row: Mapping[str, Any]) -> Example | Unreadable:
        try:
            image = decode(row[self.columns["image_column"] or ""])
        except Exception as error:  # Whatever a decoder raises, the image cannot be used.
            reason = re.sub(r" ?<[^<>]* at 0x\w+>", "", str(error))  # An address helps nobody.
            return Unreadable(i, f"{type(error).__name__}: {reason}")
        label = self._label(row)
        caption = row.get(self.columns["caption_column"] or "")
        if isinstance(caption, list | tuple):
            caption = caption[0] if caption else None
        if caption is None and self.template and self.label_names and label is not None:
            caption = self.template.format(self.label_names[label])
        return Example(i, image, label, caption.strip() if caption else None)

    def _label(self, row: Mapping[str, Any]) -> int | None:
        value = row.get(self.columns["label_column"] or "")
        if isinstance(value, str):
            return self._index.get(value)
        return None if value is None or int(value) < 0 else int(value)  # -1: kept secret.

    def _label_names(self, features: Mapping[str, Any]) -> tuple[str, ...] | None:
        """Names from the column's type; strings are their own names, sorted; numbers count them."""
        column = self.columns["label_column"]
        self._index: dict[str, int] = {}
        self._own_names: list[list[str] | None] = [None for _ in self.sources]
        if column is None:
            return None
        if names := getattr(features[column], "names", None):
            others = [
                getattr(s.table.features.get(column), "names", None) or names
                for s in self.sources[1:]
            ]
            if any(other != names for other in others):  # Folders of classes, some of them absent.
                self._own_names = [names, *others]
                every = dict.fromkeys(name for own in self._own_names for name in own or ())
                self._index = {name: i for i, name in enumerate(every)}
                return tuple(every)
            return tuple(names)
        dtype = str(getattr(features[column], "dtype", ""))
        if self.streaming or dtype.rstrip("0123456789") not in ("string", "int", "uint"):
            return None
        values = {v for s in self.sources for v in s.table.unique(column)} - {None, ""}
        if dtype == "string":
            self._index = {name: i for i, name in enumerate(sorted(values))}
            return tuple(self._index)
        n_classes, n_examples = 1 + max(values, default=-1), sum(len(s.table) for s in self.sources)
        # Larger numbers are ids of something.
        return tuple(map(str, range(n_classes))) if 0 < n_classes <= n_examples else None

    def _undecoded(self, table: Any) -> Any:
        """The columns that are used, images as bytes: decoding is ours, so that it can fail."""
        import datasets

        column = self.columns["image_column"] or ""
        table = table.select_columns([c for c in self.columns.values() if c])
        if isinstance((table.features or {}).get(column), datasets.Image):
            table = table.cast_column(column, datasets.Image(decode=False))
        return table


def decode(value: Any) -> Image.Image:
    """A picture in RGB from bytes, a file's name, a PIL image or an array [h, w, 3] of bytes.

    Raises:
        OSError: the bytes are no whole image. ValueError: there is no image.
    """
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if not isinstance(value, Image.Image | bytes | str | list | np.ndarray) or not len_of(value):
        raise ValueError("no image")
    if isinstance(value, bytes | str):
        image: Image.Image = Image.open(BytesIO(value) if isinstance(value, bytes) else value)
    elif isinstance(value, Image.Image):
        image = value
    else:
        image = Image.fromarray(np.asarray(value, dtype=np.uint8))
    if image.mode == "F":
        raise ValueError("floating-point pixels, whose range is not known")
    if image.mode.startswith("I"):  # PIL would clip 16 bits to 8 instead of scaling them.
        image = Image.fromarray((np.asarray(image).astype(np.int64) // 257).astype(np.uint8))
    if "transparency" in image.info and image.mode == "P":
        image = image.convert("RGBA")  # Else PIL warns that it drops the palette's alpha.
    return image.convert("RGB")


def len_of(value: Any) -> int:
    """Bytes, rows or pixels; 0 is nothing to decode."""
    return value.width * value.height if isinstance(value, Image.Image) else len(value)
