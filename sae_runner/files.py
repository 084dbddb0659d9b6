"""Files that are whole or absent: atomic writes, hashes, locks between processes, free space."""

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from sae_runner.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger("sae_runner")
RESERVE = 64 * 10**6
"""Bytes that are left free: for records, logs and whatever else is small."""


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path of the same name that replaces `path`, on disk, when the block succeeds.

    The block may write a file or make a folder there. It has a folder to itself, so that what a
    library puts beside the file goes too. On any failure nothing is left behind.
    """
    path = Path(path)
    scratch = path.parent / f".{path.name}.{os.getpid()}.partial"
    remove(scratch)
    scratch.mkdir(parents=True)
    temporary, old = scratch / path.name, scratch / f"{path.name}.old"
    try:
        yield temporary
        for written in [temporary, *temporary.rglob("*")]:  # Folders too: their entries count.
            flush(written)
        if path.is_dir():  # A folder cannot replace a full one in one step.
            path.rename(old)
        temporary.replace(path)
        flush(path.parent)
    finally:
        if old.exists() and not path.exists():
            old.rename(path)
        remove(scratch)


def remove_partials(folder: Path) -> None:
    """Delete what processes that were killed left behind; the caller holds the lock."""
    for path in folder.glob(".*.partial"):
        remove(path)


def flush(path: Path) -> None:
    """Force a file, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # Some file systems have no fsync for folders.
            raise
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Delete a file or a folder; an absent one is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic(path) as temporary:
        temporary.write_text(text)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, refusing NaN and infinity."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_tensors(path: Path, tensors: "Mapping[str, Tensor]", **metadata: str) -> None:
    """Write a safetensors file atomically.

    Raises:
        OSError: the system's refusal, which the library only quotes.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with atomic(path) as temporary:
        try:
            save_file({k: v.contiguous().cpu() for k, v in tensors.items()}, temporary, metadata)
        except SafetensorError as error:
            if number := re.search(r"os error (\d+)", str(error)):
                raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None
            raise
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # safetensors makes files that nobody else may read.


def sha256(path: Path) -> str:
    """Hash of a file's bytes (hex)."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock that goes with `path`; others wait for it and say so.

    The lock is the kernel's, on `.<name>.lock` beside `path`, so it ends with the process that
    holds it, however that ends.

    Raises:
        InputError: another process holds it, and `wait` is False.
    """
    try:
        import fcntl
    except ImportError:  # Windows has no flock; one process at a time is up to the user there.
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with lock_path(path).open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = _holder(file)
                if not wait:
                    raise InputError(f"{path} is in use by process {holder}") from None
                log.info("waiting for %s, which process %s is writing", path, holder)
                fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_at(file, lock_path(path)):
                continue  # Removed while we waited: the lock that counts is a newer file.
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            try:
                yield
            finally:
                file.truncate(0)
            return


def lock_path(path: Path) -> Path:
    """The file whose lock goes with `path`."""
    return path.parent / f".{path.name}.lock"


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock that goes with `path`, this one included."""
    try:
        import fcntl

        with lock_path(path).open() as file:
            # Shared, and let go at once: two that only look do not see each other.
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except (ImportError, OSError):
        return False
    return False


def _holder(file: IO[str]) -> str:
    file.seek(0)
    return file.read().strip() or "unknown"


def _is_at(file: IO[str], path: Path) -> bool:
    """Whether an open file is still the one that `path` names."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def existing_parent(path: Path) -> Path:
    """The nearest folder above `path` (or itself) that exists."""
    path = Path(path).absolute()
    return next(p for p in [path, *path.parents] if p.exists())


def free_bytes(path: Path) -> int:
    """Free space where `path` is or would be."""
    return shutil.disk_usage(existing_parent(path)).free


def lack_of_space(path: Path, n_bytes: int) -> str:
    """`68 MB and 64 MB in reserve, 126 MB free in DIR` where that will not fit, else nothing."""
    free = free_bytes(path)
    if not n_bytes or n_bytes + RESERVE <= free:
        return ""
    return (
        f"{size(n_bytes)} and {size(RESERVE)} in reserve, {size(free)} free in "
        f"{existing_parent(path)}"
    )


def require_space(
    path: Path,
    n_bytes: int,
    what: str,
    or_else: str = "lower dataset.n_examples, or use store=stream",
) -> None:
    """Refuse to start what will not fit.

    Args:
        path: where it is to lie.
        n_bytes: how much it is.
        what: it is, with its verb: `store needs`.
        or_else: what can be done about it besides a larger disk.

    Raises:
        InputError: fewer than `n_bytes` and the reserve are free.
    """
    if lack := lack_of_space(path, n_bytes):
        raise InputError(f"{what} {lack}: set outputs=DIR on a larger disk, {or_else}")


def require_writable(folder: Path, key: str = "outputs") -> None:
    """Refuse a folder, the value of `key`, that cannot be written, before anything is computed.

    Raises:
        InputError: the folder is a file, or no file can be made in it.
    """
    parent = existing_parent(folder)
    try:
        if not parent.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "Not a directory", str(parent))
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise InputError(f"{key}={folder}: cannot write in {parent}: {error.strerror}") from None


def folder_bytes(path: Path) -> int:
    """Bytes of all files below a folder, or of a file; what goes meanwhile counts nothing."""
    path, total = Path(path), 0
    found = [path] if path.is_file() else []
    for folder, _, names in os.walk(path):
        found += [Path(folder, name) for name in names]
    for file in found:
        with contextlib.suppress(FileNotFoundError):
            total += file.lstat().st_size
    return total


def size(n_bytes: float) -> str:
    """`1.4 GB`, `674 GB` and the like (powers of 1000, as disks are sold)."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(n_bytes) < 999.5 or unit == "TB":
            digits = 0 if unit in ("B", "kB") or abs(n_bytes) >= 99.95 else 1
            return f"{n_bytes:.{digits}f} {unit}"
        n_bytes /= 1000
    raise AssertionError
