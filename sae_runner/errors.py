"""What can go wrong by the user's hand, each said in one line that ends the command.

Exception
├── InputError            exit 2: something given to the command cannot be used
│   ├── ConfigError       a configuration that describes nothing that can be built
│   ├── DataError         a dataset that is absent, empty or of another shape
│   └── StoreError        an activation store or checkpoint that is corrupt or foreign
└── Incomplete            exit 1: part of the work failed and the rest is kept
BaseException
└── Interrupted           exit 128 + signal: state is saved, the command can be typed again
"""

import difflib
import signal
from collections.abc import Iterable


class InputError(ValueError):
    """Something the user gave cannot be used; the message is one line that says what to change."""


class ConfigError(InputError):
    """A configuration that composes but describes nothing that can be built."""


class DataError(InputError):
    """A dataset that is absent, empty, unreadable or lacks what was asked of it."""


class StoreError(InputError):
    """An activation store or a checkpoint that is corrupt, incomplete or made from other inputs."""


class Incomplete(RuntimeError):
    """Part of the work failed, as was said; typing the command again does that part alone."""


class Interrupted(BaseException):
    """The process was asked to stop (SIGINT, SIGTERM) and has left a state it can resume from."""

    def __init__(self, signum: int, hint: str = "type the same command to go on") -> None:
        super().__init__(f"interrupted by {signal.Signals(signum).name}: {hint}")
        self.signum, self.exit_code = signum, 128 + signum


def nearest(word: str, options: Iterable[str], n: int = 1) -> list[str]:
    """Up to n options spelled most like `word`; the best first."""
    return difflib.get_close_matches(str(word), sorted(map(str, options)), n=n, cutoff=0.5)


def did_you_mean(word: str, options: Iterable[str], limit: int = 24) -> str:
    """A sentence that names the nearest option and lists the others (at most `limit`)."""
    options = sorted(set(map(str, options)))
    if not options:
        return ""
    close = nearest(word, options)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    if len(options) > limit:
        shown = nearest(word, options, n=8) or options[:8]
        return f"{hint} Nearest of {len(options)}: {', '.join(shown)}."
    return f"{hint} Choose from: {', '.join(options)}."
