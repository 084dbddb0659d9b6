"""Ctrl-C and SIGTERM: stop at the next safe place, say how to go on."""

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from sae_runner.errors import Interrupted

log = logging.getLogger("sae_runner")
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Whether the process was asked to stop; true from the first signal on."""

    signum: int | None = None

    def __bool__(self) -> bool:
        return self.signum is not None

    def interrupt(self, hint: str) -> None:
        """Raise Interrupted for the signal that came."""
        raise Interrupted(self.signum or signal.SIGTERM, hint)


def raise_on_signals() -> None:
    """Let both signals raise Interrupted at once: right wherever files are whole or absent."""

    def handler(signum: int, _: FrameType | None) -> None:
        raise Interrupted(signum)

    for number in SIGNALS:
        signal.signal(number, handler)


@contextmanager
def deferred() -> Iterator[StopRequest]:
    """Inside the block a signal only sets the request; a second one raises Interrupted."""
    request = StopRequest()

    def handler(signum: int, _: FrameType | None) -> None:
        if request:
            raise Interrupted(signum)
        request.signum = signum
        log.info("%s: saving; once more stops at once", signal.Signals(signum).name)

    try:
        before = {number: signal.signal(number, handler) for number in SIGNALS}
    except ValueError:  # Not the main thread (a test, a notebook): nothing to defer.
        yield request
        return
    try:
        yield request
    finally:
        for number, old in before.items():
            signal.signal(number, old)
