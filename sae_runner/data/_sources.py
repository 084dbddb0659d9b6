"""Tables of examples through Hugging Face `datasets`: files, folders and globs here, or the hub."""

import glob
import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_runner.errors import DataError, did_you_mean, nearest

log = logging.getLogger("sae_runner")
_BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}
_HASHED_WHOLE = 2**28  # bytes; of more than that only samples are read
_BLOCK = 2**20


class OneSplit(DataError):
    """A folder that has one split only was asked for another."""

    def __init__(self, message: str, only: str) -> None:
        super().__init__(message)
        self.only = only


@dataclass
class Source:
    """An opened table and what identifies its content."""

    table: Any
    """`datasets.Dataset`, or an `IterableDataset` when streaming."""
    identity: dict[str, Any]
    """Equal for equal content, wherever it lies."""


def open_source(
    path: str,
    split: str | None,
    *,
    subset: str | None,
    revision: str | None,
    streaming: bool,
    key: str = "path",
) -> Source:
    """Open the examples at `path`.

    Args:
        path: a .parquet, .arrow or .tar (webdataset) file, a glob of them, a folder (parquet,
            webdataset, images in folders named by class, or `save_to_disk`), or a hub name.
        split: of a folder or hub dataset; files have none, and a `heldout_path` that has one alone
            may call it otherwise.
        subset: of a hub dataset.
        revision: of a hub dataset.
        streaming: read in order, without making a local copy.
        key: option of the dataset that `path` came from, for messages.

    Raises:
        DataError: nothing is there, or not that split (OneSplit where a folder has but one).
    """
    import datasets

    where = f"dataset.{key}={path}"
    files = local_files(path)
    try:
        with _quietly():
            if not files:
                _refuse_absent(path, where)
                table = datasets.load_dataset(
                    path, subset, split=split, revision=revision, streaming=streaming
                )
                identity = _hub_identity(table, path, subset, split, revision)
                return Source(table, identity)
            folder = Path(path).expanduser()
            has_splits = folder.is_dir() and not (folder / "state.json").is_file()
            if folder.is_dir() and any((folder / n).is_file() for n in _SAVED):
                table = _pick(datasets.load_from_disk(str(folder)), split, where)
            elif folder.is_dir():
                table = datasets.load_dataset(str(folder), split=split, streaming=streaming)
            else:
                builder = _builder_of(files, where)
                table = datasets.load_dataset(
                    builder, data_files=[str(f) for f in files], split="train", streaming=streaming
                )
    except Exception as error:  # A dozen kinds, by builder; each ends here as one line.
        said = isinstance(error, DataError)
        found = error if said else _explained(error, where, split, bool(files))
        if isinstance(found, OneSplit) and key == "heldout_path":  # All in it is held out.
            return open_source(
                path, found.only, subset=subset, revision=revision, streaming=streaming, key=key
            )
        raise found from None
    root = Path(path).expanduser() if Path(path).expanduser().is_dir() else files[0].parent
    chosen = split if has_splits else None
    return Source(table, {"files": content_hash(files, root), "split": chosen})


def without_splits(identity: Mapping[str, Any]) -> bool:
    """Whether this is of files or of one saved table, which are all of what there is."""
    return "files" in identity and identity.get("split") is None


def say_without_splits(heldout_split: str | None) -> None:
    """Say so if a split was to be held out of what has none."""
    if heldout_split is not None:
        log.info("dataset.path is a file without splits: a share of it is held out")


def refuse_same(first: Mapping[str, Any], second: Mapping[str, Any], where: str) -> None:
    """Refuse to hold out what is trained on.

    Raises:
        DataError: the two are of the same content.
    """
    if first == second:
        raise DataError(
            f"{where}: the same examples as dataset.path, and what is held out is never trained "
            "on; give others, or null to hold out a share"
        )


_SAVED = ("dataset_dict.json", "state.json")


def local_files(path: str) -> list[Path]:
    """The files that a file name, folder or glob means; none if nothing here is called so."""
    found = Path(path).expanduser()
    if found.is_dir():
        return sorted(p for p in found.rglob("*") if p.is_file() and not p.name.startswith("."))
    if found.is_file():
        return [found]
    return sorted(Path(p) for p in glob.glob(str(found), recursive=True) if Path(p).is_file())


def content_hash(files: Sequence[Path], root: Path) -> str:
    """SHA-256 over names, sizes and content (hex).

    Of more than 256 MiB in all, only blocks of 1 MiB are read: four of each of 64 files, evenly
    spread.
    """
    sizes = [file.stat().st_size for file in files]
    digest = hashlib.sha256()
    for file, size in zip(files, sizes, strict=True):
        digest.update(f"{file.relative_to(root)}\0{size}\0".encode())
    whole = sum(sizes) <= _HASHED_WHOLE
    step = 1 if whole else max(1, len(files) // 64)
    for file, size in list(zip(files, sizes, strict=True))[::step]:
        with file.open("rb") as handle:
            if whole:
                digest.update(hashlib.file_digest(handle, "sha256").digest())
                continue
            for part in range(4):
                handle.seek(max(0, size - _BLOCK) * part // 3)
                digest.update(handle.read(_BLOCK))
    return digest.hexdigest()


def _builder_of(files: Sequence[Path], where: str) -> str:
    kinds = {_BUILDERS.get(file.suffix.lower()) for file in files}
    if len(kinds) != 1 or None in kinds:
        odd = sorted({file.suffix for file in files})
        raise DataError(
            f"{where}: cannot read {', '.join(odd)} files together; give .parquet, .arrow or .tar "
            "files, or a folder of images"
        )
    return str(kinds.pop())


def _pick(table: Any, split: str | None, where: str) -> Any:
    import datasets

    if not isinstance(table, datasets.DatasetDict):
        return table
    if split not in table:
        message = f"{where}: no split {split!r}.{did_you_mean(str(split), table)}"
        raise OneSplit(message, next(iter(table))) if len(table) == 1 else DataError(message)
    return table[split]


def _refuse_absent(path: str, where: str) -> None:
    """Say at once that a path is absent, where it cannot be the name of a hub dataset."""
    if Path(path).expanduser().exists():
        raise DataError(f"{where}: there is no file in it")
    is_path = path.startswith(("/", "./", "../", "~")) or path.count("/") > 1
    if not is_path and Path(path).suffix.lower() not in _BUILDERS and not glob.has_magic(path):
        return
    wanted = Path(path).expanduser()
    beside = [p.name for p in wanted.parent.iterdir()] if wanted.parent.is_dir() else []
    beside = [name for name in beside if name != wanted.name]
    close = nearest(wanted.name, beside)
    hint = f" Did you mean {wanted.parent / close[0]}?" if close else ""
    raise DataError(f"{where}: no such file or folder.{hint}")


def _explained(error: Exception, where: str, split: str | None, is_local: bool) -> DataError:
    cause = error.__cause__ or error  # The library wraps what pyarrow says.
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    reason = (lines[0] if lines else type(cause).__name__)[:200]
    if "no data" in reason or "BatchSize must be greater than 0" in reason:
        return DataError(f"{where}: no examples in it")
    if "split" in reason.lower() and isinstance(error, ValueError):
        message = f"{where}: no split {split!r}. {reason}"
        alone = re.search(r"one of \['([^']*)'\]", reason) if is_local else None
        return OneSplit(message, alone[1]) if alone else DataError(message)
    if is_local:
        return DataError(f"{where}: cannot be read ({reason})")
    return DataError(
        f"{where}: not a file or folder here, and the hub did not give it ({reason}); give a local "
        "parquet file, folder or glob"
    )


def _hub_identity(
    table: Any, path: str, subset: str | None, split: str | None, revision: str | None
) -> dict[str, Any]:
    info = table.info
    return {
        "hub": path,
        "subset": subset,
        "split": split,
        "revision": revision,
        "version": str(info.version),
        "bytes": info.dataset_size,
        # Of a table on disk this is a hash of builder, commit and split.
        "fingerprint": getattr(table, "_fingerprint", None),
    }


@contextmanager
def _quietly() -> Iterator[None]:
    """No progress bars and no chatter of the library inside the block."""
    import datasets

    bars, level = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # It logs what it raises, too.
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if not bars:
            datasets.enable_progress_bars()


def fingerprint_of(facts: Any) -> str:
    """SHA-256 of the JSON of `facts` (hex)."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
