"""Kernels that go over the entries of each row. See `triton_ops` for what they compute."""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def _row_products(
    x, W, indices, out, start, end, D: tl.constexpr, ENTRIES: tl.constexpr, BLOCK: tl.constexpr
):
    """Store <x, W_j> of the entries from `start` to `end`, with x one row."""
    for first in range(start, end, ENTRIES):
        entry = first + tl.arange(0, ENTRIES)
        inside = entry < end
        latent = tl.load(indices + entry, mask=inside, other=0).to(tl.int64)
        rows = W + latent[:, None] * D
        sums = tl.zeros([ENTRIES, BLOCK], tl.float32)
        for begin in range(0, D, BLOCK):
            column = begin + tl.arange(0, BLOCK)
            part = tl.load(x + column, mask=column < D, other=0)
            mask = inside[:, None] & (column < D)[None, :]
            sums += tl.load(rows + column[None, :], mask=mask, other=0) * part[None, :]
        tl.store(out + entry, tl.sum(sums, 1), mask=inside)


@triton.jit
@no_type_check
def _row_sum(
    W, indices, values, start, end, column,
    D: tl.constexpr, ENTRIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Σ values · W_j over the entries from `start` to `end`, in the columns given."""
    sums = tl.zeros([ENTRIES, BLOCK], tl.float32)
    for first in range(start, end, ENTRIES):
        entry = first + tl.arange(0, ENTRIES)
        inside = entry < end
        latent = tl.load(indices + entry, mask=inside, other=0).to(tl.int64)
        value = tl.load(values + entry, mask=inside, other=0)
        mask = inside[:, None] & (column < D)[None, :]
        part = tl.load(W + latent[:, None] * D + column[None, :], mask=mask, other=0)
        sums += value[:, None] * part
    return tl.sum(sums, 0)


@triton.jit
@no_type_check
def products(
    x, W, offsets, indices, out, D: tl.constexpr, ENTRIES: tl.constexpr, BLOCK: tl.constexpr
):
    """A row a program."""
    row = tl.program_id(0).to(tl.int64)
    start = tl.load(offsets + row).to(tl.int32)
    end = tl.load(offsets + row + 1).to(tl.int32)
    _row_products(x + row * D, W, indices, out, start, end, D, ENTRIES, BLOCK)


@triton.jit
@no_type_check
def decode(
    W, offsets, indices, values, out,
    D: tl.constexpr, ENTRIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of columns of a row a program."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    start = tl.load(offsets + row).to(tl.int32)
    end = tl.load(offsets + row + 1).to(tl.int32)
    total = _row_sum(W, indices, values, start, end, column, D, ENTRIES, BLOCK)
    tl.store(out + row * D + column, total, mask=column < D)


@triton.jit
@no_type_check
def reconstruct(
    W, offsets, indices, values, wanted, residual, out,
    D: tl.constexpr, ENTRIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row a program: the second reading of its rows of W finds them in a cache."""
    row = tl.program_id(0).to(tl.int64)
    start = tl.load(offsets + row).to(tl.int32)
    end = tl.load(offsets + row + 1).to(tl.int32)
    wanted += row * D
    residual += row * D
    for begin in range(0, D, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        goal = tl.load(wanted + column, mask=column < D, other=0)
        total = _row_sum(W, indices, values, start, end, column, D, ENTRIES, BLOCK)
        tl.store(residual + column, goal - total, mask=column < D)
    tl.debug_barrier()  # Other threads read what these wrote.
    _row_products(residual, W, indices, out, start, end, D, ENTRIES, BLOCK)
