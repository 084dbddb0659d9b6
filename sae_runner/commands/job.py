"""One composed command, as the sub-commands get it."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Job(NamedTuple):
    """One composed command."""

    cfg: dict[str, Any]
    """Resolved, without Hydra's own part."""
    choices: dict[str, str]
    """Which option of each group was taken."""
    overrides: list[str]
    """What was typed."""


IMPLIED = "sae.expansion=null"
"""What `sae.d_sae=` alone implies."""


def typed(overrides: Sequence[str]) -> list[str]:
    """Overrides as they were typed, without what these imply."""
    width = any(word.lstrip("+").startswith("sae.d_sae=") for word in overrides)
    return [word for word in overrides if not (width and word == IMPLIED)]


def chosen(choices: Mapping[str, Any]) -> dict[str, str]:
    """Our own groups of Hydra's choices, those left empty aside."""
    return {k: str(v) for k, v in choices.items() if v is not None and not k.startswith("hydra/")}
