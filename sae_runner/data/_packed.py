"""Running text as rows of tokens: split by document, joined, cut to one length, kept on disk."""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int32

from sae_runner.config import fingerprint
from sae_runner.data.base import SPLITS, Dataset, Example, Ids, Split, Unreadable, refuse_bad
from sae_runner.errors import DataError
from sae_runner.files import atomic, locked, sha256, write_json, write_tensors
from sae_runner.log import Progress

log = logging.getLogger("sae_runner")

Encode = Callable[[list[str]], list[list[int]]]
"""Texts to token ids, without any special token."""

DOCUMENTS_AT_ONCE = 512
TOKENS_AT_ONCE = 2**20

Tokens32 = Int32[np.ndarray, " tokens"]
Rows32 = Int32[np.ndarray, "rows context"]


@dataclass(frozen=True)
class Framing:
    """What a row of tokens looks like."""

    context: int
    """Tokens in a row, special ones included."""
    prefix: tuple[int, ...] = ()
    """Tokens that every row begins with: BOS or CLS."""
    suffix: tuple[int, ...] = ()
    """Tokens that every row ends with: SEP."""
    separator: int | None = None
    """Token put after every document."""

    @property
    def body(self) -> int:
        """Tokens of text in a row."""
        return self.context - len(self.prefix) - len(self.suffix)


class Packer:
    """Joins documents, a separator after each, and cuts them into framed rows."""

    def __init__(self, framing: Framing) -> None:
        self.framing, self.n_documents, self.n_tokens = framing, 0, 0
        after = [] if framing.separator is None else [framing.separator]
        self._after = np.array(after, dtype=np.int32)
        self._waiting: list[Tokens32] = []
        self._n_waiting = 0
        self._rows: list[Rows32] = []

    def add(self, document: Sequence[int]) -> None:
        """Take one document's tokens."""
        tokens = np.asarray(document, dtype=np.int32)
        self._waiting += [tokens, self._after]
        self._n_waiting += len(tokens) + len(self._after)
        self.n_documents += 1
        self.n_tokens += len(tokens)
        if self._n_waiting > TOKENS_AT_ONCE:
            self._cut()

    def _cut(self) -> None:
        body, first = self.framing.body, len(self.framing.prefix)
        stream = np.concatenate([*self._waiting, self._after[:0]])
        n_rows = len(stream) // body
        rows = np.empty((n_rows, self.framing.context), dtype=np.int32)
        rows[:, :first], rows[:, first + body :] = self.framing.prefix, self.framing.suffix
        rows[:, first : first + body] = stream[: n_rows * body].reshape(n_rows, body)
        self._rows.append(rows)
        self._waiting = [stream[n_rows * body :]]
        self._n_waiting = len(self._waiting[0])

    def rows(self) -> Rows32:
        """All whole rows; what is left of the last one is dropped."""
        self._cut()
        return np.concatenate(self._rows)


def split_key(dataset: Dataset) -> str:
    """SHA-256 over a dataset's content and over who is in which split (hex)."""
    digest = hashlib.sha256(dataset.fingerprint().encode())
    for split in SPLITS:
        digest.update(split.encode() + dataset.ids(split).tobytes())
    return digest.hexdigest()


class PackedText(Dataset):
    """The rows of a corpus: the training documents' first, then the held-out documents'.

    They are made once, under `<folder>/<name>-<fingerprint>/`, and read from there by mapping the
    file into memory. A row's id is its position in that order.

    Args:
        source: the corpus; its split by document is kept.
        encode: texts to tokens.
        framing: the shape of the rows.
        tokenizer_hash: what tells one tokenizer from another.
        folder: `<outputs>/data`.

    Raises:
        DataError: a split has too little text for one row; or more documents are unreadable than
            `source.max_bad` allows.
    """

    modality = "tokens"
    kind = "packed"

    def __init__(
        self, source: Dataset, encode: Encode, framing: Framing, tokenizer_hash: str, folder: Path
    ) -> None:
        self.name, self.framing = source.name, framing
        if framing.body < 1:
            raise DataError(f"model.context={framing.context}: no room for text in a row")
        key = [split_key(source), asdict(framing), tokenizer_hash]
        self.folder = folder / f"{source.name or 'text'}-{fingerprint(key)}"
        with locked(self.folder):
            if not (self.folder / "manifest.json").exists():
                self._write(source, encode)
        self.manifest: dict[str, Any] = json.loads((self.folder / "manifest.json").read_text())
        n_bad = self.manifest["n_unreadable"]  # Rows may have been packed under another limit.
        refuse_bad(n_bad, sum(self.manifest["n_documents"].values()) + n_bad, source.max_bad)
        self.rows = mapped(self.folder / "tokens.safetensors")

    def _write(self, source: Dataset, encode: Encode) -> None:
        packers = {split: Packer(self.framing) for split in SPLITS}
        unreadable = fill(packers, source, encode)
        rows = {split: packers[split].rows() for split in SPLITS}
        for split in SPLITS:
            if not len(rows[split]):
                n_tokens = packers[split].n_tokens
                raise DataError(
                    f"dataset={source.name}: {n_tokens} tokens of {split} text make no row of "
                    f"model.context={self.framing.context}; lower it or give more text"
                )
        with atomic(self.folder) as temporary:
            path = temporary / "tokens.safetensors"
            write_tensors(path, {split: torch.from_numpy(rows[split]) for split in SPLITS})
            manifest = {
                "source": source.describe(),
                "framing": asdict(self.framing),
                "n_rows": {split: len(rows[split]) for split in SPLITS},
                "n_documents": {split: packers[split].n_documents for split in SPLITS},
                "n_unreadable": len(unreadable),
                "sha256": sha256(path),
            }
            write_json(temporary / "manifest.json", manifest)

    def ids(self, split: Split) -> Ids:
        """See `Dataset.ids`."""
        n_train, n_heldout = (self.manifest["n_rows"][name] for name in SPLITS)
        start, stop = (0, n_train) if split == "train" else (n_train, n_train + n_heldout)
        return np.arange(start, stop, dtype=np.int64)

    def load(self, ids: Sequence[int] | Ids) -> list[Example | Unreadable]:
        """Rows as arrays of int64 [context]."""
        n_train = self.manifest["n_rows"]["train"]
        found: list[Example | Unreadable] = []
        for i in map(int, ids):
            split: Split = "train" if i < n_train else "heldout"
            row = self.rows[split][i if i < n_train else i - n_train]
            found.append(Example(i, row.numpy().astype(np.int64)))
        return found

    def fingerprint(self) -> str:
        """SHA-256 of the file of tokens."""
        return str(self.manifest["sha256"])

    def describe(self) -> dict[str, Any]:
        """See `Dataset.describe`; `packed_from` is the corpus."""
        packing = {k: self.manifest[k] for k in ("framing", "n_documents", "n_unreadable")}
        return super().describe() | packing | {"packed_from": self.manifest["source"]}


def mapped(path: Path) -> dict[Split, torch.Tensor]:
    """Both splits' rows; pages of the file come in as they are read."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return {split: file.get_tensor(split) for split in SPLITS}


def fill(packers: Mapping[Split, Packer], source: Dataset, encode: Encode) -> list[Unreadable]:
    """Read and tokenise every document in one ascending pass; what was unreadable is given back.

    Raises:
        DataError: it is too much, said as soon as that is known.
    """
    heldout = source.ids("heldout")
    ids = np.sort(np.concatenate([source.ids("train"), heldout]))
    held = np.isin(ids, heldout)
    unreadable: list[Unreadable] = []
    with Progress(f"tokens of {source.name}", len(ids), "documents") as progress:
        for start in range(0, len(ids), DOCUMENTS_AT_ONCE):
            part = slice(start, start + DOCUMENTS_AT_ONCE)
            loaded = list(zip(source.load(ids[part]), held[part], strict=True))
            unreadable += [example for example, _ in loaded if isinstance(example, Unreadable)]
            refuse_bad(len(unreadable), len(ids), source.max_bad, *unreadable[:1])
            good = [(example, h) for example, h in loaded if isinstance(example, Example)]
            tokens = encode([example.value for example, _ in good])
            for row, (_, h) in zip(tokens, good, strict=True):
                packers["heldout" if h else "train"].add(row)
            progress.advance(len(loaded))
    if unreadable:
        first = unreadable[0]
        log.warning(
            "dataset=%s: %d of %d documents could not be read; the first is %d: %s",
            source.name, len(unreadable), len(ids), first.id, first.reason,
        )  # fmt: skip
    return unreadable
