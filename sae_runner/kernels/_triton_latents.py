"""Kernels that go over the entries of each latent. See `triton_ops` for what they compute.

A frequent latent would keep one program busy long after the others: whole segments of its entries
(SEGMENT places, at multiples of SEGMENT) are summed before, each by a program of its own.
"""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def index(
    keys, order, offsets, starts, rows, entries, n, S, nnz, row_steps, key_steps,
    SHIFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """From sorted keys (latent − SHIFT) and their order: starts, rows and entries, by bisection."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)

    inside = place < nnz
    entry = tl.load(order + place, mask=inside, other=0).to(tl.int32)
    low = tl.zeros([BLOCK], tl.int32)
    high = low + n
    for _ in range(row_steps):
        middle = (low + high) // 2
        reached = tl.load(offsets + middle, mask=inside, other=0) <= entry
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle)
    tl.store(rows + place, low, mask=inside)
    tl.store(entries + place, entry, mask=inside)

    inside = place <= S
    low = tl.zeros([BLOCK], tl.int32)
    high = low + nnz
    for _ in range(key_steps):
        middle = (low + high) // 2
        open_ = inside & (low < high)
        key = tl.load(keys + middle, mask=open_, other=0).to(tl.int32) + SHIFT
        low = tl.where(open_ & (key < place), middle + 1, low)
        high = tl.where(open_ & (key >= place), middle, high)
    tl.store(starts + place, low.to(tl.int64), mask=inside)


@triton.jit
@no_type_check
def segment_sums(
    starts, rows, entries, coefs, dense, out, S, latent_steps,
    D: tl.constexpr, SEGMENT: tl.constexpr, ENTRIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sum of a segment, a block of columns a program, where one latent owns all of it."""
    segment = tl.program_id(0)
    first = segment * SEGMENT
    low = 0
    high = S
    for _ in range(latent_steps):
        middle = (low + high) // 2
        reached = tl.load(starts + middle) <= first
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle)
    if tl.load(starts + low + 1) >= first + SEGMENT:
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        sums = tl.zeros([ENTRIES, BLOCK], tl.float32)
        for begin in range(0, SEGMENT, ENTRIES):
            place = first + begin + tl.arange(0, ENTRIES)
            coef = tl.load(coefs + tl.load(entries + place))
            part = dense + tl.load(rows + place).to(tl.int64)[:, None] * D + column[None, :]
            sums += coef[:, None] * tl.load(part, mask=(column < D)[None, :], other=0)
        tl.store(out + segment.to(tl.int64) * D + column, tl.sum(sums, 0), mask=column < D)


@triton.jit
@no_type_check
def sums(starts, entries, values, out, ENTRIES: tl.constexpr):
    """A latent a program: the sum of its values."""
    latent = tl.program_id(0)
    first = tl.load(starts + latent).to(tl.int32)
    last = tl.load(starts + latent + 1).to(tl.int32)
    found = tl.zeros([ENTRIES], tl.float32)
    for begin in range(first, last, ENTRIES):
        place = begin + tl.arange(0, ENTRIES)
        entry = tl.load(entries + place, mask=place < last, other=0)
        found += tl.load(values + entry, mask=place < last, other=0)
    tl.store(out + latent, tl.sum(found, 0))


@triton.jit
@no_type_check
def _add_gradient(
    sums, latent, starts, rows, entries, coefs, dense, segments, column,
    D: tl.constexpr, SEGMENT: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """`sums` [ENTRIES, WIDTH] + the gradient of a latent's row, still to be summed over entries."""
    first = tl.load(starts + latent).to(tl.int32)
    last = tl.load(starts + latent + 1).to(tl.int32)
    # From `low` to `high` there are whole segments; what is left lies on both sides of them.
    low = (first + SEGMENT - 1) // SEGMENT * SEGMENT
    high = last // SEGMENT * SEGMENT
    whole = low < high
    low = tl.where(whole, low, last)
    high = tl.where(whole, high, last)
    left = low - first
    lane = tl.arange(0, ENTRIES)
    for begin in range(0, left + last - high, ENTRIES):
        count = begin + lane
        inside = count < left + last - high
        place = tl.where(count < left, first + count, high - left + count)
        entry = tl.load(entries + place, mask=inside, other=0)
        row = tl.load(rows + place, mask=inside, other=0).to(tl.int64)
        coef = tl.load(coefs + entry, mask=inside, other=0)
        mask = inside[:, None] & (column < D)[None, :]
        part = tl.load(
            dense + row[:, None] * D + column[None, :], mask=mask, other=0,
            eviction_policy="evict_last",
        )  # fmt: skip
        sums += coef[:, None] * part
    for begin in range(low // SEGMENT, high // SEGMENT, ENTRIES):
        segment = begin + lane
        mask = (segment < high // SEGMENT)[:, None] & (column < D)[None, :]
        part = segments + segment.to(tl.int64)[:, None] * D + column[None, :]
        sums += tl.load(part, mask=mask, other=0)
    return sums


@triton.jit
@no_type_check
def _gradient(
    latent, column,
    starts, rows, entries, coefs, dense, segments,
    starts_2, rows_2, entries_2, coefs_2, dense_2, segments_2,
    D: tl.constexpr, SEGMENT: tl.constexpr, ENTRIES: tl.constexpr, WIDTH: tl.constexpr,
    TWO: tl.constexpr,
):  # fmt: skip
    sums = tl.zeros([ENTRIES, WIDTH], tl.float32)
    sums = _add_gradient(
        sums, latent, starts, rows, entries, coefs, dense, segments, column, D, SEGMENT, ENTRIES
    )
    if TWO:
        sums = _add_gradient(
            sums, latent, starts_2, rows_2, entries_2, coefs_2, dense_2, segments_2, column,
            D, SEGMENT, ENTRIES,
        )  # fmt: skip
    return tl.sum(sums, 0)


@triton.jit
@no_type_check
def _orthogonal(gradient, weight):
    """`gradient` without its part along `weight`."""
    square = tl.maximum(tl.sum(weight * weight, 0), 1e-24)
    return gradient - tl.sum(gradient * weight, 0) / square * weight


@triton.jit
@no_type_check
def weight_gradient(
    out,
    starts, rows, entries, coefs, dense, segments,
    starts_2, rows_2, entries_2, coefs_2, dense_2, segments_2,
    D: tl.constexpr, SEGMENT: tl.constexpr, ENTRIES: tl.constexpr, WIDTH: tl.constexpr,
    TWO: tl.constexpr,
):  # fmt: skip
    """A latent a program."""
    latent = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    gradient = _gradient(
        latent, column,
        starts, rows, entries, coefs, dense, segments,
        starts_2, rows_2, entries_2, coefs_2, dense_2, segments_2,
        D, SEGMENT, ENTRIES, WIDTH, TWO,
    )  # fmt: skip
    tl.store(out + latent * D + column, gradient, mask=column < D)


@triton.jit
@no_type_check
def squares(
    W, out,
    starts, rows, entries, coefs, dense, segments,
    starts_2, rows_2, entries_2, coefs_2, dense_2, segments_2,
    D: tl.constexpr, SEGMENT: tl.constexpr, ENTRIES: tl.constexpr, WIDTH: tl.constexpr,
    TWO: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """A latent a program: the squared norm of its gradient."""
    latent = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    gradient = _gradient(
        latent, column,
        starts, rows, entries, coefs, dense, segments,
        starts_2, rows_2, entries_2, coefs_2, dense_2, segments_2,
        D, SEGMENT, ENTRIES, WIDTH, TWO,
    )  # fmt: skip
    if UNIT:
        weight = tl.load(W + latent * D + column, mask=column < D, other=0)
        gradient = _orthogonal(gradient, weight)
    tl.store(out + latent, tl.sum(gradient * gradient, 0))


@triton.jit
@no_type_check
def adam(
    W, exp_avg, exp_avg_sq, shadow, step_size, root_correction, scale,
    weight_1, beta2, weight_2, eps,
    starts, rows, entries, coefs, dense, segments,
    starts_2, rows_2, entries_2, coefs_2, dense_2, segments_2,
    D: tl.constexpr, SEGMENT: tl.constexpr, ENTRIES: tl.constexpr, WIDTH: tl.constexpr,
    TWO: tl.constexpr, UNIT: tl.constexpr, SHADOW: tl.constexpr, POINTERS: tl.constexpr,
):  # fmt: skip
    """A latent a program: its gradient lives in registers alone."""
    latent = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < D
    place = latent * D + column
    # Asked for before the gradient, to arrive meanwhile; read once, so not to be kept in a cache.
    weight = tl.load(W + place, mask=inside, other=0, eviction_policy="evict_first")
    first = tl.load(exp_avg + place, mask=inside, other=0, eviction_policy="evict_first")
    second = tl.load(exp_avg_sq + place, mask=inside, other=0, eviction_policy="evict_first")
    if POINTERS:
        step_size = tl.load(step_size)
        root_correction = tl.load(root_correction)
        scale = tl.load(scale)
    gradient = scale * _gradient(
        latent, column,
        starts, rows, entries, coefs, dense, segments,
        starts_2, rows_2, entries_2, coefs_2, dense_2, segments_2,
        D, SEGMENT, ENTRIES, WIDTH, TWO,
    )  # fmt: skip
    if UNIT:
        gradient = _orthogonal(gradient, weight)
    first += weight_1 * (gradient - first)
    second = beta2 * second + weight_2 * (gradient * gradient)
    tl.store(exp_avg + place, first, mask=inside, eviction_policy="evict_first")
    tl.store(exp_avg_sq + place, second, mask=inside, eviction_policy="evict_first")
    weight -= step_size * (first / (tl.sqrt(second) / root_correction + eps))
    if UNIT:
        weight /= tl.maximum(tl.sqrt(tl.sum(weight * weight, 0)), 1e-12)
    tl.store(W + place, weight, mask=inside, eviction_policy="evict_first")
    if SHADOW:
        half = weight.to(tl.bfloat16)
        tl.store(shadow + place, half, mask=inside, eviction_policy="evict_first")
