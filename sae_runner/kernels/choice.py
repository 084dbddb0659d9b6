"""Which implementation of the operations computes: C++ on a CPU, Triton on CUDA, else PyTorch."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal, cast

import torch
from torch import Tensor

from sae_runner.kernels import native_ops, torch_ops, triton_ops
from sae_runner.kernels.base import Ops

Kernels = Literal["auto", "torch"]
_kernels: ContextVar[Kernels] = ContextVar("kernels", default="auto")


@contextmanager
def using(kernels: Kernels) -> Iterator[None]:
    """Within it, and on its thread, the fastest that there are compute (auto), or PyTorch."""
    token = _kernels.set(kernels)
    try:
        yield
    finally:
        _kernels.reset(token)


def ops_for(W: Tensor) -> Ops:
    """The operations on weights like W; what is fast is so in float32 alone."""
    return ops_on(W.device) if W.dtype == torch.float32 else cast(Ops, torch_ops)


def ops_on(device: torch.device) -> Ops:
    """The operations on float32 weights on a device."""
    if _kernels.get() == "auto":
        if device.type == "cpu" and native_ops.available():
            return cast(Ops, native_ops)
        if device.type == "cuda" and triton_ops.available():
            return cast(Ops, triton_ops)
    return cast(Ops, torch_ops)


def fused(ops: Ops, device: torch.device) -> bool:
    """Whether its Adam is faster than PyTorch's on a gradient that is written out.

    PyTorch's operations take few latents at a time, whose numbers a device would be waited for.
    """
    return device.type == "cpu" or ops is not cast(Ops, torch_ops)
