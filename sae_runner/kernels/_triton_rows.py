"""Kernels that go over the entries of each row. See `triton_ops` for what they compute."""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def products(
    x, W, offsets, indices, out, D: tl.constexpr, ENTRIES: tl.constexpr, BLOCK: tl.constexpr
):
    """A row a program."""
    row = tl.program_id(0).to(tl.int64)
    x += row * D
    start = tl.load(offsets + row).to(tl.int32)
    end = tl.load(offsets + row + 1).to(tl.int32)
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
def decode(
    W, offsets, indices, values, out,
    D: tl.constexpr, ENTRIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of columns of a row a program."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    start = tl.load(offsets + row).to(tl.int32)
    end = tl.load(offsets + row + 1).to(tl.int32)
    sums = tl.zeros([ENTRIES, BLOCK], tl.float32)
    for first in range(start, end, ENTRIES):
        entry = first + tl.arange(0, ENTRIES)
        inside = entry < end
        latent = tl.load(indices + entry, mask=inside, other=0).to(tl.int64)
        value = tl.load(values + entry, mask=inside, other=0)
        mask = inside[:, None] & (column < D)[None, :]
        part = tl.load(W + latent[:, None] * D + column[None, :], mask=mask, other=0)
        sums += value[:, None] * part
    tl.store(out + row * D + column, tl.sum(sums, 0), mask=column < D)


@triton.jit
@no_type_check
def reconstruct(
    W, offsets, indices, values, wanted, residual, parts, nnz,
    D: tl.constexpr, ENTRIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of columns of a row a program: what it adds to products is a row of `parts`.

    Of the first ENTRIES rows of W it keeps its columns; those of others are read twice.
    """
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    column = block * BLOCK + tl.arange(0, BLOCK)
    start = tl.load(offsets + row).to(tl.int32)
    end = tl.load(offsets + row + 1).to(tl.int32)
    place = row * D + column
    parts += block.to(tl.int64) * nnz
    goal = tl.load(wanted + place, mask=column < D, other=0)
    entry = start + tl.arange(0, ENTRIES)
    inside = entry < end
    latent = tl.load(indices + entry, mask=inside, other=0).to(tl.int64)
    value = tl.load(values + entry, mask=inside, other=0)
    mask = inside[:, None] & (column < D)[None, :]
    kept = tl.load(W + latent[:, None] * D + column[None, :], mask=mask, other=0)
    left = goal - tl.sum(value[:, None] * kept, 0)
    for first in range(start + ENTRIES, end, ENTRIES):
        more = first + tl.arange(0, ENTRIES)
        within = more < end
        latent = tl.load(indices + more, mask=within, other=0).to(tl.int64)
        value = tl.load(values + more, mask=within, other=0)
        mask = within[:, None] & (column < D)[None, :]
        part = tl.load(W + latent[:, None] * D + column[None, :], mask=mask, other=0)
        left -= tl.sum(value[:, None] * part, 0)
    tl.store(residual + place, left, mask=column < D)
    tl.store(parts + entry, tl.sum(kept * left[None, :], 1), mask=inside)
    for first in range(start + ENTRIES, end, ENTRIES):
        entry = first + tl.arange(0, ENTRIES)
        inside = entry < end
        latent = tl.load(indices + entry, mask=inside, other=0).to(tl.int64)
        mask = inside[:, None] & (column < D)[None, :]
        again = tl.load(W + latent[:, None] * D + column[None, :], mask=mask, other=0)
        tl.store(parts + entry, tl.sum(again * left[None, :], 1), mask=inside)
