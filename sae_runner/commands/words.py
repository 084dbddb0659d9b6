"""Which things below `outputs/` the words after `ls` and `rm` mean: paths, names, globs of both."""

import fnmatch
import glob
from collections.abc import Sequence
from pathlib import Path

from sae_runner.commands.entries import Entry
from sae_runner.errors import InputError, did_you_mean


def restricted(words: Sequence[str], inventory: Sequence[Entry], outputs: Path) -> list[Entry]:
    """What the words mean, with all that lies in it: of a store its selections too.

    Raises:
        InputError: a word that means nothing.
    """
    chosen: set[Path] = set()
    for word in words:
        places = {_real(path) for path in _paths(word, outputs)}
        found = [e for e in inventory if places & {_real(e.path), *_real(e.path).parents}]
        found = found or _called(word, inventory)
        found = found or [e for e in inventory if fnmatch.fnmatchcase(e.path.name, word)]
        if not found:
            raise InputError(_nothing(word, inventory, outputs))
        chosen.update(e.path for e in found)
    return [e for e in inventory if {e.path, e.path.parent} & chosen]


def named(words: Sequence[str], inventory: Sequence[Entry], outputs: Path) -> list[Entry]:
    """Exactly the things that the words mean; a folder of things means none of them.

    Raises:
        InputError: a word that means nothing, something else, or something outside `outputs`.
    """
    chosen: set[Path] = set()
    for word in words:
        places = {_real(path): path for path in _paths(word, outputs)}
        found = [e for e in inventory if _real(e.path) in places] or _called(word, inventory)
        if not found and places:
            place = next(iter(places))
            if not place.is_relative_to(outputs.resolve()):
                raise InputError(f"{word} is outside outputs={outputs}: nothing is removed there")
            raise InputError(
                f"{word} is no store, run, model or anything else that `sae-run ls` shows; name "
                "what is in it, or a glob such as 'outputs/train/toy-*'"
            )
        if not found:
            raise InputError(_nothing(word, inventory, outputs))
        chosen.update(e.path for e in found)
    return [e for e in inventory if e.path in chosen]


def _real(path: Path) -> Path:
    """Absolute, with links on the way followed, but not a link that the path itself is."""
    path = path.absolute()
    return path.parent.resolve() / path.name if path.name not in ("", "..") else path.resolve()


def _paths(word: str, outputs: Path) -> list[Path]:
    """Existing paths that a word spells, from here or from `outputs`."""
    expanded = str(Path(word).expanduser())
    for pattern in (expanded, str(outputs / expanded)):
        if Path(pattern).exists() or Path(pattern).is_symlink():
            return [Path(pattern)]
        if found := glob.glob(pattern):
            return [Path(path) for path in sorted(found)]
    return []


def _called(word: str, inventory: Sequence[Entry]) -> list[Entry]:
    """Things of that name, or whose name a glob matches."""
    names = [e for e in inventory if e.name == word]
    return names or [e for e in inventory if fnmatch.fnmatchcase(e.name, word)]


def _nothing(word: str, inventory: Sequence[Entry], outputs: Path) -> str:
    hint = did_you_mean(Path(word).name, [e.name for e in inventory], limit=8)
    return f"{word}: nothing of that name or path in outputs={outputs}.{hint}"
