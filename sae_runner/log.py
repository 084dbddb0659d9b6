"""Console, file and progress output of one command: rich on a terminal, plain lines in a pipe."""

import contextlib
import contextvars
import logging
import math
import os
import shutil
import sys
import threading
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
        from rich.console import Console
        from rich.logging import RichHandler

        class AboveProgress(RichHandler):
            def emit(self, record: logging.LogRecord) -> None:
                with foot.cleared():
                    super().emit(record)

        console: logging.Handler = AboveProgress(
            console=Console(stderr=True), show_path=False, log_time_format="[%X]"
        )
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


ERASE = "\x1b[K"
"""What a terminal takes for: clear the rest of this line."""
QUIET_S, EVERY_S = 2.0, 10.0
"""Seconds before a step is spoken of, and between two lines of it in a pipe."""
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
    """What goes on, its rate and time left: a moving line on a terminal, plain lines in a pipe.

    On a terminal it is painted again and again, in a pipe a line comes every ten seconds, whether
    or not anything advances. Nothing is shown for two seconds, so that short steps stay silent.
    Of several at once the one begun last is shown.
    """

    def __init__(self, what: str, total: int = 0, unit: str = "", *, done: int = 0) -> None:
        """Begin; a `total` of 0: nobody knows how much there is, and time alone is shown."""
        self.what, self.total, self.unit = what, total, unit
        self.done = self.first = done
        self.note = ""
        self.start = self.resumed = time.perf_counter()
        self.spoke = -math.inf
        self.context = contextvars.copy_context()  # Who is speaking, for the thread that speaks.
        self.terminal = sys.stderr.isatty() and os.environ.get("RANK", "0") == "0"
        foot.add(self)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def advance(self, n: int, note: str = "") -> None:
        """Count `n` more units; the last `note` is shown after the rate."""
        self.done += n
        self.note = note or self.note

    def say(self) -> None:
        """Log a line, if the time for one has come."""
        now = time.perf_counter()
        if now - self.resumed >= QUIET_S and now - self.spoke >= EVERY_S:
            self.spoke = now
            self.context.run(logging.getLogger("sae_runner").info, self.line(now))

    def line(self, now: float) -> str:
        """`train 1,024/4,096 rows, 25%, 512/s, 6.0s left, …`."""
        if not self.total:
            return f"{self.what}, {duration(now - self.resumed)}"
        rate = (self.done - self.first) / max(now - self.start, 1e-9)
        left = (self.total - self.done) / rate if rate > 0 else float("inf")
        speed = f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.2g}/s"
        text = f"{self.what} {self.done:,}/{self.total:,} {self.unit}"
        text += f", {100 * self.done / self.total:.0f}%, {speed}"
        if left != float("inf"):
            text += f", {duration(max(left, 0))} left"
        return text + (f", {self.note}" if self.note else "")

    def close(self) -> None:
        """End, and leave no trace on a terminal; more than once is fine."""
        foot.drop(self)


@contextmanager
def working(what: str) -> Iterator[None]:
    """Say what takes so long, and how long by now, while the block runs.

    Steps inside it that have a progress of their own are shown instead while they last.
    """
    with Progress(what):
        yield


class Foot:
    """The line below everything that was said on a terminal: the progress begun last, painted.

    A thread paints it, so that it moves while a step stands in one long call; in a pipe it speaks.
    """

    def __init__(self) -> None:
        self.lock, self.open = threading.RLock(), list[Progress]()
        self.ended, self.painted = threading.Event(), False
        self.thread: threading.Thread | None = None

    def add(self, progress: Progress) -> None:
        """Show `progress` from now on."""
        with self.lock:
            self.open.append(progress)
            if self.thread is None:
                self.ended = threading.Event()
                self.thread = threading.Thread(
                    target=self._keep_painting, args=[self.ended], daemon=True, name="progress"
                )
                self.thread.start()

    def drop(self, progress: Progress) -> None:
        """Show the one that was begun before it, if that goes on."""
        with self.lock:
            self.clear()
            self.open = [other for other in self.open if other is not progress]
            if self.open:
                self.open[-1].resumed = time.perf_counter()
                return
            self.ended.set()
            thread, self.thread = self.thread, None
        if thread is not None:
            thread.join(timeout=1)  # One that writes while the interpreter ends would abort it.

    def end(self) -> None:
        """Show nothing any more."""
        for progress in reversed(self.open.copy()):
            self.drop(progress)

    def _keep_painting(self, ended: threading.Event) -> None:
        while not ended.wait(0.2):
            with self.lock:
                if ended.is_set():
                    return
                progress = self.open[-1]
                if progress.terminal:
                    self.paint()
            if not progress.terminal:  # Not under the lock: a handler has one of its own.
                progress.say()

    def paint(self) -> None:
        """Write the line anew, cut to the width of the terminal."""
        progress, now = self.open[-1], time.perf_counter()
        if now - progress.resumed >= QUIET_S:
            # A plain carriage return costs nothing, and survives whatever else is written.
            width = shutil.get_terminal_size().columns - 1
            self._write("\r" + progress.line(now)[:width] + ERASE)
            self.painted = True

    def clear(self) -> None:
        """Take the line away, if there is one."""
        if self.painted:
            self._write("\r" + ERASE)
            self.painted = False

    @contextmanager
    def cleared(self) -> Iterator[None]:
        """Room for something else that is written to the terminal inside the block."""
        with self.lock:
            self.clear()
            yield

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError):  # No run ends because its terminal was closed.
            print(text, end="", file=sys.stderr, flush=True)


foot = Foot()
