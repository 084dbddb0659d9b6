"""Records of plain files: .txt, .jsonl, .csv and .tsv, mapped into memory and read at random.

Each record is parsed when it is asked for, so that a broken one spoils nothing but itself.
"""

import csv
import json
import mmap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sae_runner.data._sources import content_hash
from sae_runner.errors import DataError

SUFFIXES = frozenset({".txt", ".jsonl", ".json", ".csv", ".tsv"})
TEXT_NAMES = ("text", "sentence", "content", "document", "review", "body", "question", "abstract")
LABEL_NAMES = ("label", "labels", "class", "target", "sentiment", "category")

Record = Mapping[str, Any]


class TextFiles:
    """Records of files of one format, in the order of the files.

    `.txt`: a file is a record with one field, `text`. `.jsonl` (and `.json` of lines): an object a
    line. `.tsv`: a line is cut at tabs, quotes mean nothing. `.csv`: with quoting, records may
    span lines.

    Args:
        files: all of one suffix.
        columns: names of the fields of .csv and .tsv; None if the first line has them. A first line
            that has these names too, in any order and among others, is no record.
        where: how messages begin.

    Raises:
        DataError: nothing in the files, other formats, fields that do not fit `columns`, or a first
            line with other names.
    """

    def __init__(self, files: Sequence[Path], columns: Sequence[str] | None, where: str) -> None:
        suffixes = sorted({file.suffix.lower() for file in files})
        if len(suffixes) != 1 or suffixes[0] not in SUFFIXES:
            raise DataError(f"{where}: {', '.join(suffixes)} files are not read together")
        self.suffix, self.where = suffixes[0], where
        self.given = list(columns) if columns is not None else None
        self.columns: dict[int, list[str]] = {}  # Of each file.
        self.maps: list[mmap.mmap] = []
        self.spans: list[tuple[int, int, int]] = []  # File, first and last byte of each record.
        for file in files:
            self._index(file)
        if not self.spans:
            raise DataError(f"{where}: no examples in it")
        self.identity = {
            "files": content_hash(files, files[0].parent),
            "columns": self.given or next(iter(self.columns.values()), None),
        }  # fmt: skip

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, i: int) -> Record:
        """The record.

        Raises:
            ValueError: it cannot be parsed (encoding and JSON errors are ValueErrors too).
        """
        number, start, stop = self.spans[i]
        return self._parse(self.maps[number][start:stop].decode(), number)

    def first(self, n: int) -> list[Record]:
        """The first readable records, `n` of them at most, of the first 10 n."""
        return [record for _, record in zip(range(n), self._readable(10 * n), strict=False)]

    def _readable(self, n: int) -> Iterator[Record]:
        for i in range(min(n, len(self))):
            try:
                yield self[i]
            except ValueError:
                continue

    def _index(self, file: Path) -> None:
        if not file.stat().st_size:
            return
        with file.open("rb") as handle:
            content = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
        number = len(self.maps)
        self.maps.append(content)
        if self.suffix == ".txt":
            self.spans.append((number, 0, len(content)))
            return
        if self.suffix == ".json" and content[:64].lstrip().startswith(b"["):
            raise DataError(
                f"{self.where}: this is no JSON lines; write one object a line (.jsonl)"
            )
        spans = list(_records(content, quoted=self.suffix == ".csv"))
        if self.suffix in (".csv", ".tsv") and spans:
            first = self._fields(content[slice(*spans[0])].decode(errors="replace"))
            names = self._names(first, file)
            self.columns[number] = names or self.given or []
            spans = spans[1:] if names else spans
        self.spans += [(number, start, stop) for start, stop in spans]

    def _names(self, first: list[str], file: Path) -> list[str] | None:
        """The names of the fields, if the first line of a file has them; else it is a record."""
        if self.given is None:
            if set(first) != set(next(iter(self.columns.values()), first)):
                raise DataError(
                    f"{self.where}: the first line of {file} has other names than the file before: "
                    f"{', '.join(first)}"
                )
            return first
        wanted = {name.lower(): name for name in self.given}
        found = [name.strip().lower() for name in first]
        if wanted.keys() <= set(found):
            return [wanted.get(key, name) for key, name in zip(found, first, strict=True)]
        where = f"dataset.columns={','.join(self.given)}: the first line of {file} has"
        if set(found) <= {*wanted, *TEXT_NAMES, *LABEL_NAMES}:
            raise DataError(
                f"{where} other names: {', '.join(first)}; set dataset.columns=null, "
                "dataset.text_column and dataset.label_column"
            )
        if len(first) != len(self.given):
            raise DataError(f"{where} {len(first)} fields; null takes names from there")
        return None

    def _fields(self, text: str) -> list[str]:
        text = text.rstrip("\r\n")
        if self.suffix == ".tsv":
            return text.split("\t")
        return next(csv.reader(text.splitlines(keepends=True), strict=True))

    def _parse(self, text: str, number: int) -> Record:
        if self.suffix == ".txt":
            return {"text": text.replace("\r\n", "\n")}
        if self.suffix in (".jsonl", ".json"):
            found = json.loads(text)
            if not isinstance(found, dict):
                raise ValueError(f"a JSON {type(found).__name__}, not an object")
            return found
        try:
            fields = self._fields(text)
        except csv.Error as error:
            raise ValueError(str(error)) from None
        columns = self.columns[number]
        if len(fields) != len(columns):
            raise ValueError(f"{len(fields)} fields, not {len(columns)}")
        return dict(zip(columns, fields, strict=True))


def _records(content: mmap.mmap, *, quoted: bool) -> Iterator[tuple[int, int]]:
    """First and last byte of every line that is not blank; within quotes, lines go on."""
    start = 3 if content[:3] == b"\xef\xbb\xbf" else 0  # A byte-order mark.
    content.seek(start)
    position, quotes = start, 0
    for line in iter(content.readline, b""):
        position += len(line)
        quotes += line.count(b'"') if quoted else 0
        if quotes % 2:
            continue
        if content[start:position].strip():
            yield start, position
        start, quotes = position, 0
    if content[start:position].strip():
        yield start, position
