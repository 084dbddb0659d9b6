"""Console, file and progress output of one command: rich on a terminal, plain lines in a pipe."""

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

# Libraries that tell at INFO what nobody asked, or warn of what cannot be changed here.
_QUIET = (
    "httpx", "urllib3", "fsspec", "filelock", "matplotlib", "PIL", "datasets", "transformers",
    "transformer_lens", "open_clip", "timm", "huggingface_hub",
)  # fmt: skip


def setup_logging() -> None:
    """Send INFO and above to standard error; ranks above 0 say only what is wrong."""
    rank = int(os.environ.get("RANK", "0"))
    if sys.stderr.isatty():
        from rich.logging import RichHandler

        console: logging.Handler = RichHandler(show_path=False, log_time_format="[%X]")
        console.setFormatter(logging.Formatter("%(message)s"))
    else:
        console = logging.StreamHandler()
        console.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    console.setLevel(logging.INFO if rank == 0 else logging.ERROR)
    logging.basicConfig(level=logging.INFO, handlers=[console], force=True)
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # It sets its level when it is imported.
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.captureWarnings(True)
    logging.getLogger("py.warnings").setLevel(logging.ERROR)


_speaker: ContextVar[Path | None] = ContextVar("speaker", default=None)


@contextmanager
def speaking(path: Path) -> Iterator[None]:
    """What is logged inside the block is meant for the file at `path` alone."""
    token = _speaker.set(path)
    try:
        yield
    finally:
        _speaker.reset(token)


@contextmanager
def log_to(path: Path) -> Iterator[None]:
    """Also append what is logged inside the block to the file at `path`.

    Of several such blocks at once, only one hears what is said inside its `speaking`.
    """
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s"))
    handler.addFilter(lambda _: _speaker.get() in (None, path))
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()


def duration(seconds: float) -> str:
    """`75.2` as `1m15s`: coarse enough to read at a glance."""
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"


class Progress:
    """Rate and time left of a loop: a bar on a terminal, a line every few seconds in a pipe.

    Nothing is shown before `quiet_s` seconds, so short steps stay silent.
    """

    def __init__(
        self, what: str, total: int, unit: str, *, done: int = 0, quiet_s: float = 2.0
    ) -> None:
        self.what, self.total, self.unit = what, total, unit
        self.done = self.first = done
        self.quiet_s, self.start = quiet_s, time.perf_counter()
        self.spoke = self.start - 8.0 + quiet_s
        self.terminal = sys.stderr.isatty() and os.environ.get("RANK", "0") == "0"
        self.width, self.note = 0, ""

    def advance(self, n: int, note: str = "") -> None:
        """Count `n` more units; the last `note` is shown after the rate."""
        self.done += n
        self.note = note or self.note
        now = time.perf_counter()
        if now - self.start < self.quiet_s or now - self.spoke < (0.2 if self.terminal else 10.0):
            return
        self.spoke = now
        line = self.line(now)
        if self.terminal:
            # A plain carriage return: it survives next to rich's log lines and costs nothing.
            print("\r" + line.ljust(self.width), end="", file=sys.stderr, flush=True)
            self.width = len(line)
        else:
            logging.getLogger("sae_runner").info(line)

    def line(self, now: float) -> str:
        """`train 1,024/4,096 rows, 25%, 512 rows/s, 6.0s left, …`."""
        rate = (self.done - self.first) / max(now - self.start, 1e-9)
        left = (self.total - self.done) / rate if rate > 0 else float("inf")
        share = f"{100 * self.done / self.total:.0f}%" if self.total else "?"
        speed = f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.2g}/s"
        text = f"{self.what} {self.done:,}/{self.total:,} {self.unit}, {share}, {speed}"
        if left != float("inf"):
            text += f", {duration(max(left, 0))} left"
        return text + (f", {self.note}" if self.note else "")

    def close(self) -> None:
        """End the bar's line."""
        if self.terminal and self.width:
            print("\r" + " " * self.width + "\r", end="", file=sys.stderr, flush=True)
