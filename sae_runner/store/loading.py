"""Examples read and preprocessed in the background, in order, while the model computes."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from sae_runner.data.base import Dataset, Ids, Unreadable
from sae_runner.models.base import Inputs, Model


class Loaded(NamedTuple):
    """One batch of examples, ready for the model."""

    inputs: Inputs | None
    """None when no example of the batch could be read."""
    bad: list[Unreadable]


def load_batches(
    dataset: Dataset, model: Model, ids: Ids, batch_size: int, workers: int
) -> Iterator[Loaded]:
    """Batches of `ids`, in order; see `load_chunks`."""
    chunks = (ids[start : start + batch_size] for start in range(0, len(ids), batch_size))
    return load_chunks(dataset, model, chunks, workers)


def load_chunks(
    dataset: Dataset, model: Model, chunks: Iterable[Ids], workers: int
) -> Iterator[Loaded]:
    """A batch of each chunk of ids, in order; at most `workers + 1` are held at a time.

    Threads, not processes: decoding and tokenising release the interpreter's lock, and nothing has
    to be copied between processes or imported again.
    """

    def load(chunk: Ids) -> Loaded:
        found = dataset.load(chunk)
        bad = [example for example in found if isinstance(example, Unreadable)]
        good = [example for example in found if not isinstance(example, Unreadable)]
        return Loaded(model.prepare(good) if good else None, bad)

    if workers == 0 or not dataset.random_access:
        yield from map(load, chunks)
        return
    with ThreadPoolExecutor(workers, thread_name_prefix="load") as pool:
        waiting: deque[Future[Loaded]] = deque()
        try:
            for chunk in chunks:
                waiting.append(pool.submit(load, chunk))
                if len(waiting) > workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
