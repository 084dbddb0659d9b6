"""Exceptions of Hydra, OmegaConf, torch and the system as one line that says what to change."""

import errno
import re
from collections.abc import Iterator
from typing import Any

from sae_runner.composition import keys_of
from sae_runner.config import options_of
from sae_runner.errors import Incomplete, InputError, did_you_mean

ALREADY_THERE = re.compile(r"An item is already at '(.+?)'|Multiple values for (\S+)\.")
NOT_TAKEN = re.compile(r"Could not (?:override|delete) '([^'@]+?)'")
CANNOT_WRITE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG, errno.EDQUOT, errno.EIO,
                errno.ENAMETOOLONG)  # fmt: skip
NO_SPACE = "No space left on device"
NO_MEMORY = ("can't allocate memory", "out of memory", "Cannot allocate memory")


def explain(error: BaseException, command: str = "") -> str | None:
    """One line for what a user of `command` can mend; None for any other exception."""
    if isinstance(error, InputError | Incomplete):
        return " ".join(str(error).split())
    if is_full_disk(error):
        return (
            f"no space left on device ({error}): nothing is half-written; free some, set "
            "outputs=DIR on a larger disk, and type the same command to go on"
        )
    if isinstance(error, FileExistsError | NotADirectoryError):
        return f"{error.filename} is a file, and a folder is needed there: move it"
    if isinstance(error, OSError) and error.errno in CANNOT_WRITE:
        return f"cannot write {error.filename or 'a file'}: {error.strerror}; set outputs=DIR"
    if is_out_of_memory(error):
        return (
            "out of memory: lower trainer.micro_batch_size, sae.d_sae, model.batch_size, "
            "store.window_rows or store.mix_rows; finished steps stay and are skipped"
        )
    return explain_hydra(error, command)


def is_bad_input(error: BaseException) -> bool:
    """Whether the user's input is what is wrong (exit code 2)."""
    other = is_out_of_memory(error) or isinstance(error, Incomplete)
    return not other and explain(error) is not None


def is_full_disk(error: BaseException) -> bool:
    """ENOSPC, however it is wrapped."""
    return (isinstance(error, OSError) and error.errno == errno.ENOSPC) or NO_SPACE in str(error)


def is_out_of_memory(error: BaseException) -> bool:
    """The allocator of Python, of torch on the CPU or of a device gave up."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in NO_MEMORY)


def explain_hydra(error: BaseException, command: str) -> str | None:
    """Errors of composition: unknown keys and options, wrong types, missing values."""
    from hydra.errors import HydraException, MissingConfigException, OverrideParseException
    from omegaconf.errors import OmegaConfBaseException

    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        options = error.options or options_of(group)
        what = f"option {option!r} in group {group!r}" if group else f"config {option!r}"
        return f"no {what}.{did_you_mean(option, options)}"
    cause = error if isinstance(error, OmegaConfBaseException) else error.__cause__
    if isinstance(cause, OmegaConfBaseException):
        return explain_key(cause)
    if there := ALREADY_THERE.search(str(error)):
        return f"no new key {there[1] or there[2]!r}: there is one already; leave out the +"
    if other := NOT_TAKEN.search(str(error)):
        known = f" {command} takes {', '.join(keys_of(command))}." if command else ""
        return f"no key {other[1]!r} here.{known}"
    if isinstance(error, OverrideParseException):
        key = error.override.partition("=")[0]
        return (
            f"{error.override}: cannot be read; a value with special characters needs quotes, "
            f"and these others from the shell: \"{key}='…'\""
        )
    if isinstance(error, HydraException):
        return " ".join(str(error).split())
    return None


def explain_key(error: Any) -> str:
    """A key that is not there, or a value of another type."""
    first_line = str(error).splitlines()[0]
    if first_line.startswith("Key ") and error.parent_node is not None:
        if elsewhere := same_key_elsewhere(str(error.key), error.parent_node):
            return f"no key {error.full_key!r}. Did you mean {' or '.join(map(repr, elsewhere))}?"
        known = [key for key in error.parent_node if key != "hydra"]
        return f"no key {error.full_key!r}.{did_you_mean(str(error.key), known)}"
    if "Missing mandatory value" in first_line:
        return f"{error.full_key!r} needs a value"
    return f"{error.full_key}: {first_line}" if error.full_key else first_line


def same_key_elsewhere(key: str, node: Any) -> list[str]:
    """Where else in the config of `node` a key of just this name is: `k` is there as `sae.k`."""
    from omegaconf import DictConfig

    def below(parent: Any, at: str) -> Iterator[str]:
        for name in parent:
            child = parent._get_node(name)
            if name == key and at:
                yield f"{at}{name}"
            if isinstance(child, DictConfig) and f"{at}{name}" != "hydra" and not child._is_none():
                yield from below(child, f"{at}{name}.")

    return sorted(below(node._get_root(), ""))
