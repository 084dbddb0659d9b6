"""Kernels that choose the largest of a row. See `triton_ops` for what they compute."""

from typing import no_type_check

import triton
import triton.language as tl

# The type checker of the tests would wrap what the compiler must read: hence `no_type_check`.


@triton.jit
@no_type_check
def _key(values, BITS: tl.constexpr):
    """Integers in the order of float32 `values`; NaN is below every number, `_least` below NaN.

    With 16 bits: of values that were bfloat16.
    """
    bits = values.to(tl.int32, bitcast=True)
    key = tl.where(values == values, bits ^ ((bits >> 31) & 0x7FFFFFFF), -0x7FFFFFFF)
    return (key >> 16) + 0x8000 if BITS == 16 else key


@triton.jit
@no_type_check
def _least(BITS: tl.constexpr):
    return -1 if BITS == 16 else -0x80000000


@triton.jit
@no_type_check
def _kth_largest(keys, k, low):
    """The largest number that at least k keys reach, as they do `low`; by bisection."""
    high = tl.max(keys, 0)
    while low < high:
        middle = (low | high) - ((low ^ high) >> 1)  # Their mean, rounded up, never beyond 32 bits.
        enough = tl.sum((keys >= middle).to(tl.int32)) >= k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    return low


@triton.jit
@no_type_check
def _largest(keys, k, least):
    """Which k of fewer than 2^15 keys are the largest (of equals the first), and their ranks.

    `least` is the k-th largest key.
    """
    above = keys > least
    equal = keys == least
    # Two counts in one scan.
    counts = tl.cumsum((above.to(tl.int32) << 16) + equal.to(tl.int32), 0)
    missing = k - tl.sum(above.to(tl.int32))
    equals = counts & 0xFFFF
    chosen = above | (equal & (equals <= missing))
    return chosen, (counts >> 16) + tl.minimum(equals, missing) - 1


@triton.jit
@no_type_check
def topk(
    scores, out, S, k,
    BITS: tl.constexpr, GROUPS: tl.constexpr, TILES: tl.constexpr,
    SLOTS: tl.constexpr, TILE_SLOTS: tl.constexpr,
):  # fmt: skip
    """A row a program. Place p is of group p mod GROUPS.

    The k groups of the largest maxima hold k largest of the row: what is elsewhere is no larger
    than each of k maxima. So one pass over the row finds k groups, and the k largest of their
    places are the answer. `out` holds the groups in between.
    """
    row = tl.program_id(0).to(tl.int64)
    scores += row * S
    out += row * k
    group = tl.arange(0, GROUPS)
    best = tl.full([GROUPS], float("nan"), tl.float32)
    for tile in tl.range(0, TILES, loop_unroll_factor=4):
        place = tile * GROUPS + group
        score = tl.load(scores + place, mask=place < S, other=float("nan")).to(tl.float32)
        best = tl.maximum(best, score)  # A NaN gives way to a number.
    keys = tl.where(group < S, _key(best, BITS), _least(BITS))
    least = _kth_largest(keys, k, tl.min(keys, 0))
    chosen, rank = _largest(keys, k, least)
    tl.store(out + rank, group, mask=chosen)
    tl.debug_barrier()

    slot = tl.arange(0, SLOTS * TILE_SLOTS)
    member = slot % SLOTS
    place = (slot // SLOTS) * GROUPS + tl.load(out + member, mask=member < k, other=0)
    inside = (member < k) & (slot < SLOTS * TILES) & (place < S)
    score = tl.load(scores + place, mask=inside, other=0).to(tl.float32)
    keys = tl.where(inside, _key(score, BITS), _least(BITS))
    chosen, rank = _largest(keys, k, _kth_largest(keys, k, least))  # As k maxima reach it.
    tl.debug_barrier()
    tl.store(out + rank, place, mask=chosen)


@triton.jit
@no_type_check
def rescore(
    x, W, b, candidates, values, indices, m, k,
    D: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row a program: all its candidates at once, a block of dimensions after the other."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, SLOTS)
    inside = slot < m
    latent = tl.load(candidates + row * m + slot, mask=inside, other=0)
    bias = tl.load(b + latent, mask=inside, other=0)
    rows = W + latent.to(tl.int64)[:, None] * D
    sums = tl.zeros([SLOTS, BLOCK], tl.float32)
    for begin in range(0, D, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        part = tl.load(x + row * D + column, mask=column < D, other=0)
        mask = inside[:, None] & (column < D)[None, :]
        sums += tl.load(rows + column[None, :], mask=mask, other=0) * part[None, :]
    score = tl.sum(sums, 1) + bias
    key = tl.where(inside, _key(score, 32), _least(32))
    if SLOTS <= 64:  # Each is compared with each.
        other, earlier = key[None, :], slot[None, :] < slot[:, None]
        before = (other > key[:, None]) | ((other == key[:, None]) & earlier)
        rank = tl.sum(before.to(tl.int32), 1)
        chosen = inside & (rank < k)
    else:
        chosen, rank = _largest(key, k, _kth_largest(key, k, tl.min(key, 0)))
    tl.store(values + row * k + rank, score, mask=chosen)
    tl.store(indices + row * k + rank, latent, mask=chosen)
