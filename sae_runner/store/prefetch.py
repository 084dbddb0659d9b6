"""Batches read ahead in the background, while the device computes."""

import queue
import threading
import time
from collections.abc import Iterator
from typing import Generic, TypeVar

Batch = TypeVar("Batch")


class Prefetched(Generic[Batch]):
    """An iterator read ahead by a thread; `wait_s` is the time its user stood waiting."""

    def __init__(self, source: Iterator[Batch], depth: int) -> None:
        self.source, self.wait_s = source, 0.0
        self.queue: queue.Queue[Batch | BaseException] = queue.Queue(max(1, depth))
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._fill, daemon=True, name="prefetch")
        self.thread.start()

    def _fill(self) -> None:
        try:
            for item in self.source:
                if not self._put(item):
                    return
        except BaseException as error:
            self._put(error)
        else:
            self._put(StopIteration())

    def _put(self, item: Batch | BaseException) -> bool:
        while not self.stopped.is_set():
            try:
                self.queue.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def __iter__(self) -> "Prefetched[Batch]":
        return self

    def __next__(self) -> Batch:
        batch = self.next_unless(False)
        assert batch is not None
        return batch

    def next_unless(self, stop: object) -> Batch | None:
        """The next batch, or None as soon as `stop` is true while there is none to take."""
        start = time.perf_counter()
        item: Batch | BaseException | None = None
        while item is None:
            try:
                item = self.queue.get(timeout=0.2)
            except queue.Empty:
                if stop:
                    return None
        self.wait_s += time.perf_counter() - start
        if isinstance(item, BaseException):
            self.stopped.set()
            self.queue.put(item)  # Nothing follows: asking again says the same.
            raise item
        return item

    def close(self) -> None:
        """Stop reading ahead. A window that is being computed is not waited for."""
        self.stopped.set()
        self.thread.join(timeout=1)
