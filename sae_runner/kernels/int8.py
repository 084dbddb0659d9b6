"""Rows in int8 on a CPU, and about their products where a processor multiplies int8 (AMX).

Beside PyTorch's own product in bfloat16 it takes a third of the time. Done in C++: native/int8.h.
"""

import ctypes
import math

import torch
from jaxtyping import BFloat16, Float32
from torch import Tensor

from sae_runner.kernels._native_call import call, check
from sae_runner.kernels._native_library import load_library
from sae_runner.kernels.base import Int8Rows


class RowsInC(ctypes.Structure):
    """`Int8Rows` as C++ reads them."""

    _fields_ = [(name, ctypes.c_void_p) for name in Int8Rows._fields]


def available() -> bool:
    """Whether `scores` can be called: the processor, the compiler and the system know AMX."""
    native = load_library()
    return native is not None and bool(native.multiplies_int8())


def write(W: Float32[Tensor, "d_sae d"], to: Int8Rows) -> None:
    """Write all rows of W in int8."""
    d_sae, d = W.shape
    check("W", W, torch.float32, (d_sae, d))
    call("int8_rows", W, d_sae, d, in_c(to, d_sae, d))


def scores(
    x: Float32[Tensor, "n d"],
    rows: Int8Rows,
    b: Float32[Tensor, " d_sae"],
    out: BFloat16[Tensor, "n d_sae"],
) -> Float32[Tensor, " n"]:
    """Write about ⟨x_t, W_j⟩ + b_j to `out`; returns what those of a row are off by at most.

    Both factors are rounded. With steps a of x and w_j of W_j that has a variance of
    (a² ‖W_j‖² + w_j² ‖x‖²) / 12, of which four roots are counted on, and what is less than half a
    step is lost: see native/int8.h. Scores are rounded to bfloat16 besides.
    """
    if not available():  # Which also asks the system for tiles.
        raise RuntimeError("this processor, compiler or system has no matrices of int8")
    (n, d), d_sae = x.shape, len(b)
    check("x", x, torch.float32, (n, d))
    check("b", b, torch.float32, (d_sae,))
    check("out", out, torch.bfloat16, (n, d_sae))
    error = torch.empty(n)
    most = [ctypes.c_float(float(x.max())) for x in (rows.lengths, rows.steps, rows.lost)]
    call("int8_scores", x, in_c(rows, d_sae, d), *most, b, n, d_sae, d, out, error)
    return error.nan_to_num_(math.inf, math.inf)


def in_c(rows: Int8Rows, d_sae: int, d: int) -> RowsInC:
    """The same rows for C++, which they must outlive.

    Raises:
        ValueError: there is no room for so many rows, or for more.
    """
    for tensor, shape in zip(rows, Int8Rows.shapes(d_sae, d), strict=True):
        dtype = torch.int8 if tensor is rows.tiles else torch.float32
        check("rows in int8", tensor, dtype, shape)
    return RowsInC(*(tensor.data_ptr() for tensor in rows))
