"""Which columns of a table hold images, labels and captions."""

import logging
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from sae_runner.errors import DataError, did_you_mean

NO_COLUMN = "none"
_NAMES = {
    "image_column": ("image", "img", "jpg", "jpeg", "png", "webp", "pixel_values"),
    "label_column": ("label", "labels", "fine_label", "cls", "class", "target"),
    "caption_column": ("caption", "captions", "text", "txt", "sentence"),
}

log = logging.getLogger("sae_runner")


def choose(key: str, given: str | None, features: Mapping[str, Any]) -> str | None:
    """The column that `dataset.<key>` names, or the likely one when it is None.

    Raises:
        DataError: no such column, or no image column that one could guess.
    """
    if given == NO_COLUMN and key != "image_column":
        return None
    if given is not None:
        if given not in features:
            raise DataError(
                f"dataset.{key}={given}: no such column.{did_you_mean(given, features)}"
            )
        return given
    kind = {"image_column": "Image", "label_column": "ClassLabel"}.get(key)
    typed = [name for name, feature in features.items() if type(feature).__name__ == kind]
    named = [name for name in _NAMES[key] if name in features]
    found = next(iter([*typed, *named]), None)
    if found is None and key == "image_column":
        hint = did_you_mean("", features)
        raise DataError(f"dataset.image_column=null: no column looks like images.{hint}")
    if found is not None:
        log.info("dataset.%s: took %r", key, found)
    return found


def require_columns(wanted: Iterable[str | None], found: Collection[str], path: str) -> None:
    """Refuse what is held out at `path` if it lacks a column that training data have.

    Raises:
        DataError: one is absent; those that there are, are listed.
    """
    for name in wanted:
        if name is not None and name not in found:
            raise DataError(
                f"dataset.heldout_path={path}: no column {name!r}, which the data at dataset.path "
                f"have.{did_you_mean(name, found)}"
            )
