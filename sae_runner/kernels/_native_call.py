"""Calls of the C++ library: what is handed to it, and what it would misread."""

import ctypes
from typing import Any

import torch
from torch import Tensor

from sae_runner.kernels._native_library import load_library


def call(
    name: str,
    *arguments: Tensor | int | ctypes.Structure | ctypes.Array[Any] | ctypes.c_float | None,
) -> None:
    """Call a function of native/native.cpp, with the number of torch's threads as last argument."""
    native = load_library()
    if native is None:
        raise RuntimeError("the native kernels are not available")
    words = [_word(argument) for argument in (*arguments, torch.get_num_threads())]
    getattr(native, name)(*words)


def _word(argument: object) -> object:
    """An argument as C takes it: tensors are pointers, integers have 64 bits."""
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    if argument is None:
        return ctypes.c_void_p()
    return ctypes.c_int64(argument) if isinstance(argument, int) else argument


def check(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Refuse what C++ would misread.

    Raises:
        ValueError: another type, shape, layout or device.
    """
    found = (tensor.dtype, tuple(tensor.shape), tensor.is_contiguous(), tensor.device.type)
    if found != (dtype, shape, True, "cpu"):
        layout = "contiguous" if found[2] else "not contiguous"
        raise ValueError(
            f"{name} must be {dtype} {list(shape)}, contiguous, on the CPU, not "
            f"{found[0]} {list(found[1])}, {layout}, on {found[3]}"
        )
