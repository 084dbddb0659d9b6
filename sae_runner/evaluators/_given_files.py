"""Files that an option of an evaluator names."""

import glob
from collections.abc import Sequence
from pathlib import Path

from sae_runner.errors import ConfigError, nearest


def given_files(key: str, patterns: Sequence[str]) -> list[Path]:
    """The files that paths and globs mean.

    Raises:
        ConfigError: one that means none.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        expanded = Path(pattern).expanduser()
        paths = [expanded] if expanded.is_file() else map(Path, sorted(glob.glob(str(expanded))))
        files = [path for path in paths if path.is_file()]
        if not files:
            beside = expanded.parent.iterdir() if expanded.parent.is_dir() else ()
            close = nearest(expanded.name, [path.name for path in beside if path.is_file()])
            hint = f". Did you mean {expanded.parent / close[0]}?" if close else ""
            raise ConfigError(f"{key}={pattern}: there is no such file{hint}")
        found |= dict.fromkeys(files)
    return list(found)
