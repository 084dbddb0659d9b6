"""One composed command, as the sub-commands get it."""

from typing import Any, NamedTuple


class Job(NamedTuple):
    """One composed command."""

    cfg: dict[str, Any]
    """Resolved, without Hydra's own part."""
    choices: dict[str, str]
    """Which option of each group was taken."""
    overrides: list[str]
    """What was typed."""
