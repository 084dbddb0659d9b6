"""Rows on their way to a device, while it computes on those before them."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Delivery:
    """Brings batches to a device; whoever reads ahead does it on a thread of its own.

    To CUDA they go through pinned memory and on a stream of their own, so that neither the reading
    and copying of batches nor the computation on those before waits for the other.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def room(self, n: int, width: int, at: torch.device) -> Tensor:
        """Where n rows can be gathered: memory of `at`, from which they can be delivered."""
        pinned = self.stream is not None and at.type == "cpu"
        return torch.empty(n, width, device=at, pin_memory=pinned)

    @contextmanager
    def under_way(self) -> Iterator[None]:
        """What is asked of the device within it does not wait for what computes there."""
        if self.stream is None:
            yield
        else:
            with torch.cuda.stream(self.stream):
                yield

    def delivered(self, x: Tensor) -> Tensor:
        """The same rows on the device, there to be used."""
        with self.under_way():
            there = x.to(self.device, non_blocking=self.stream is not None)
        if self.stream is not None:
            self.stream.synchronize()
            # Who computes frees them, on another stream than they were made on.
            there.record_stream(torch.cuda.default_stream(self.device))
        return there
