"""Folders of other libraries, read and written; `format=name` is `interchange/<name>.py`.

A folder is recognised by what is in it. What a file says and we cannot honour is refused by name.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from sae_runner.config import Registry

if TYPE_CHECKING:
    from sae_runner.interchange.base import Format

FORMATS = Registry("format", "sae_runner.interchange")


def recognise(folder: Path) -> "Format | None":
    """The format that a folder is in; None if no other library's."""
    if not folder.is_dir():
        return None
    found: list[Format] = [FORMATS[name]() for name in FORMATS.names()]
    return next((known for known in found if known.recognises(folder)), None)
