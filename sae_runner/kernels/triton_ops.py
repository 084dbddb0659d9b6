"""The operations on selected latents in Triton, for CUDA devices.

Nothing here waits for the device, and every sum has a fixed order: the same inputs give the same
bits. Triton is imported with the first operation.
"""

import functools
import importlib.util
from types import ModuleType
from typing import Any

import torch
from jaxtyping import BFloat16, Float, Float32, Float64, Int, Int32, Int64
from torch import Tensor

from sae_runner.kernels import torch_ops
from sae_runner.kernels.base import ByLatent, Factor

SEGMENT = 64
"""Entries of one latent that are summed by one program: a frequent latent has many."""
MOST_CANDIDATES = 256
"""Candidates of a row that one program holds in its registers."""
MOST_SURVIVORS = 16_384
"""Places of a row that one program holds in its registers."""
Scalar = float | Tensor
Offsets = Int64[Tensor, " n_plus_1"]
Indices = Int[Tensor, " nnz"]
Values = Float32[Tensor, " nnz"]


@functools.cache
def available() -> bool:
    """Whether there are a CUDA device with bfloat16 and Triton."""
    if not torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability() >= (8, 0)


def topk(scores: Float[Tensor, "n d_sae"], k: int) -> Int32[Tensor, "n k"]:
    """See `Ops.topk`; a NaN only where numbers run out, and of equals always the same."""
    n, width = scores.shape
    groups = _groups(width, k)
    if not groups:
        return _keys(scores).topk(k, dim=1, sorted=False).indices.int()
    out = scores.new_empty(n, k, dtype=torch.int32)
    tiles, slots = -(-width // groups), _power(k)
    _launch(
        _selection().topk, (n,), scores, out, width, k,
        BITS=16 if scores.dtype == torch.bfloat16 else 32, GROUPS=groups, TILES=tiles,
        SLOTS=slots, TILE_SLOTS=_power(tiles),
        num_warps=max(_warps(min(groups, 2048), 512), groups // 2048),
    )  # fmt: skip
    return out


def largest_within(
    scores: BFloat16[Tensor, "n d_sae"],
    error: Float32[Tensor, " n"] | None,
    x: Float32[Tensor, "n d"],
    W: Float32[Tensor, "d_sae d"],
    b: Float32[Tensor, " d_sae"],
    k: int,
) -> tuple[Float32[Tensor, "n k"], Int32[Tensor, "n k"], int]:
    """See `Ops.largest_within`."""
    m = min(torch_ops.n_candidates(k), len(b))
    return *rescore(x, W, b, topk(scores, m), k), len(x) * m


def above(
    scores: Float[Tensor, "n d_sae"], least: Float32[Tensor, " d_sae"], error: Float32[Tensor, " n"]
) -> tuple[Int64[Tensor, " n_plus_1"], Int32[Tensor, " nnz"]]:
    """See `Ops.above`: how many there are is waited for."""
    return torch_ops.above(scores, least, error)


def rescore(
    x: Float32[Tensor, "n d"],
    W: Float32[Tensor, "d_sae d"],
    b: Float32[Tensor, " d_sae"],
    candidates: Int[Tensor, "n m"],
    k: int,
) -> tuple[Float32[Tensor, "n k"], Int32[Tensor, "n k"]]:
    """⟨x_t, W_j⟩ + b_j of the k best of each row's candidates, and which they are."""
    (n, d), m = x.shape, candidates.shape[1]
    if m > MOST_CANDIDATES:
        offsets = torch.arange(0, n * m + 1, m, device=x.device)
        scores = products(x, W, offsets, candidates.view(-1)).view(n, m) + b[candidates]
        places = topk(scores, k).long()
        return scores.gather(1, places), candidates.gather(1, places).int()
    values = x.new_empty(n, k)
    indices = candidates.new_empty(n, k, dtype=torch.int32)
    slots = _power(m)
    warps = 4 if slots <= 64 else 8
    _launch(
        _selection().rescore, (n,), x, W, b, candidates, values, indices, m, k,
        D=d, SLOTS=slots, BLOCK=_block(d, most=max(16, min(256, 512 * warps // slots))),
        num_warps=warps,
    )  # fmt: skip
    return values, indices


def products(
    x: Float32[Tensor, "n d"], W: Float32[Tensor, "d_sae d"], offsets: Offsets, indices: Indices
) -> Values:
    """See `Ops.products`."""
    out = x.new_empty(len(indices))
    d = x.shape[1]
    _launch(
        _rows().products, (len(x),), x, W, offsets, indices, out,
        D=d, ENTRIES=32, BLOCK=_block(d, most=64), num_warps=4,
    )  # fmt: skip
    return out


def decode(
    W: Float32[Tensor, "d_sae d"], offsets: Offsets, indices: Indices, values: Values
) -> Float32[Tensor, "n d"]:
    """See `Ops.decode`."""
    n, d, block = len(offsets) - 1, W.shape[1], _block(W.shape[1])
    out = W.new_empty(n, d)
    _launch(
        _rows().decode, (n, -(-d // block)), W, offsets, indices, values, out,
        D=d, ENTRIES=8, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return out


def reconstruct(
    W: Float32[Tensor, "d_sae d"],
    offsets: Offsets,
    indices: Indices,
    values: Values,
    wanted: Float32[Tensor, "n d"],
) -> tuple[Float32[Tensor, "n d"], Values]:
    """See `Ops.reconstruct`."""
    (n, d), nnz = wanted.shape, len(values)
    block = _block(d, most=128)  # Of widths and warps tried on an H100 the fastest at all shapes.
    residual, parts = torch.empty_like(wanted), values.new_empty(-(-d // block), nnz)
    entries = max(4, min(32, _power(-(-nnz // max(n, 1)))))  # As a row has, where all have as many.
    _launch(
        _rows().reconstruct, (n, len(parts)),
        W, offsets, indices, values, wanted, residual, parts, nnz,
        D=d, ENTRIES=entries, BLOCK=block, num_warps=2,
    )  # fmt: skip
    return residual, parts.sum(0) if len(parts) > 1 else parts[0]


def by_latent(offsets: Offsets, indices: Indices, d_sae: int) -> ByLatent:
    """See `Ops.by_latent`; a stable sort, of 16 bits where these are enough."""
    n, nnz = len(offsets) - 1, len(indices)
    shift = 2**15 if d_sae <= 2**16 else 0
    keys, order = torch.sort((indices - shift).short() if shift else indices, stable=True)
    starts = offsets.new_empty(d_sae + 1)
    rows, entries = (indices.new_empty(nnz, dtype=torch.int32) for _ in range(2))
    _launch(
        _latents().index, (-(-max(nnz, d_sae + 1) // 256),),
        keys, order, offsets, starts, rows, entries, n, d_sae, nnz,
        n.bit_length(), nnz.bit_length(), SHIFT=shift, BLOCK=256, num_warps=4,
    )  # fmt: skip
    return ByLatent(starts, rows, entries)


def sums_by_latent(
    by_latent: ByLatent, values: Float32[Tensor, " nnz"]
) -> Float32[Tensor, " d_sae"]:
    """See `Ops.sums_by_latent`."""
    starts, _, entries = by_latent
    out = values.new_empty(len(starts) - 1)
    _launch(_latents().sums, (len(out),), starts, entries, values, out, ENTRIES=128, num_warps=4)
    return out


def weighted_sum(
    W: Float32[Tensor, "m d"], weights: Float32[Tensor, " m"]
) -> Float32[Tensor, " d"]:
    """See `Ops.weighted_sum`."""
    return torch_ops.weighted_sum(W, weights)


def weight_gradient(factor: Factor, d_sae: int) -> Float32[Tensor, "d_sae d"]:
    """See `Ops.weight_gradient`."""
    out = factor.dense.new_empty(d_sae, factor.dense.shape[1])
    tensors, meta = _gradient_of([factor])
    _launch(_latents().weight_gradient, (d_sae,), out, *tensors, **meta)
    return out


def gradient_norm2(
    factors: list[Factor], W: Float32[Tensor, "d_sae d"] | None
) -> Float64[Tensor, ""]:
    """See `Ops.gradient_norm2`, which stays on the device."""
    starts = factors[0].by_latent.starts
    out = factors[0].dense.new_empty(len(starts) - 1)
    tensors, meta = _gradient_of(factors)
    unit = W is not None
    _launch(_latents().squares, (len(out),), W if unit else out, out, *tensors, UNIT=unit, **meta)
    return out.sum(dtype=torch.float64)


def adam_(
    W: Float32[Tensor, "d_sae d"],
    exp_avg: Float32[Tensor, "d_sae d"],
    exp_avg_sq: Float32[Tensor, "d_sae d"],
    factors: list[Factor],
    *,
    lr: Scalar,
    beta1: float,
    beta2: float,
    eps: float,
    step: Scalar,
    scale: Scalar,
    unit: bool,
    shadow: BFloat16[Tensor, "d_sae d"] | None,
) -> None:
    """See `Ops.adam_`; Kingma and Ba 2015, algorithm 1.

    `lr`, `step` and `scale` may be tensors on the device, for a step that is recorded once.
    """
    scalars = _scalars(lr, beta1, beta2, step, scale, W.device)
    tensors, meta = _gradient_of(factors)
    _launch(
        _latents().adam, (len(W),), W, exp_avg, exp_avg_sq, W if shadow is None else shadow,
        *scalars, 1 - beta1, beta2, 1 - beta2, eps, *tensors,
        UNIT=unit, SHADOW=shadow is not None, POINTERS=isinstance(scalars[0], Tensor), **meta,
    )  # fmt: skip


def _scalars(
    lr: Scalar, beta1: float, beta2: float, step: Scalar, scale: Scalar, device: torch.device
) -> list[Scalar]:
    """The step's size, the root of the second moment's correction, and the gradient's factor.

    All three are numbers, or where one argument is a tensor all are float32 tensors.
    """
    if not any(isinstance(value, Tensor) for value in (lr, step, scale)):
        return [float(lr) / (1 - beta1**step), (1 - beta2**step) ** 0.5, float(scale)]
    if isinstance(step, Tensor):
        step = step.to(device, torch.float64)  # float32 has no 1 − 0.999 to 7 digits.
    parts = (lr / (1 - beta1**step), (1 - beta2**step) ** 0.5, scale)
    return [
        part.to(device, torch.float32) if isinstance(part, Tensor)
        else torch.full((), float(part), device=device)
        for part in parts
    ]  # fmt: skip


def _gradient_of(factors: list[Factor]) -> tuple[list[Tensor], dict[str, Any]]:
    """What the kernels over latents take: the tensors of two factors, and their shapes."""
    if len(factors) > 2:
        factors = [_joined(factors)]
    d = factors[0].dense.shape[1]
    width = _power(d)
    tensors = [
        tensor
        for factor in factors
        for tensor in (*factor.by_latent, factor.coefs, factor.dense, _segment_sums(factor))
    ]
    warps = _warps(width, 128)
    meta = {
        "D": d, "SEGMENT": SEGMENT, "WIDTH": width, "TWO": len(factors) == 2,
        "ENTRIES": max(1, min(16, 512 * warps // width)), "num_warps": warps,
    }  # fmt: skip
    return (tensors if len(factors) == 2 else tensors * 2), meta


def _joined(factors: list[Factor]) -> Factor:
    """One factor that stands for the sum of all; each latent's entries in the order of factors."""
    starts = torch.stack([factor.by_latent.starts for factor in factors]).sum(0)
    rows, entries = (
        factors[0].by_latent.rows.new_empty(sum(len(factor.coefs) for factor in factors))
        for _ in range(2)
    )
    free, n_rows, n_entries = starts[:-1].clone(), 0, 0
    for (own, of_rows, of_entries), coefs, dense in factors:
        counts, nnz = own.diff(), len(coefs)
        shift = torch.repeat_interleave(free - own[:-1], counts, output_size=nnz)
        places = shift + torch.arange(nnz, device=shift.device)
        rows[places] = of_rows + n_rows
        entries[places] = of_entries + n_entries
        free, n_rows, n_entries = free + counts, n_rows + len(dense), n_entries + nnz
    return Factor(
        ByLatent(starts, rows, entries),
        torch.cat([factor.coefs for factor in factors]),
        torch.cat([factor.dense for factor in factors]),
    )


def _segment_sums(factor: Factor) -> Float32[Tensor, "segments d"]:
    """Sums over the segments that one latent owns; the others are not written, nor read."""
    (starts, rows, entries), d = factor.by_latent, factor.dense.shape[1]
    block, count, d_sae = _block(d), len(rows) // SEGMENT, len(starts) - 1
    out = factor.dense.new_empty(count, d)
    _launch(
        _latents().segment_sums, (count, -(-d // block)),
        starts, rows, entries, factor.coefs, factor.dense, out, d_sae, d_sae.bit_length(),
        D=d, SEGMENT=SEGMENT, ENTRIES=16, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return out


def _groups(width: int, k: int) -> int:
    """Into how many groups `topk` puts a row; 0 where its places would be too many to hold.

    Places of the chosen groups cost more than groups: half as many are wanted.
    """
    groups = max(_power(k), min(1024, _power(width)))
    while (survivors := _power(k) * _power(-(-width // groups))) > MOST_SURVIVORS or (
        survivors > groups // 2 and groups < min(4096, _power(width))
    ):
        groups *= 2
        if groups > MOST_SURVIVORS:
            return 0
    return groups


def _keys(scores: Float[Tensor, "n d_sae"]) -> Int32[Tensor, "n d_sae"]:
    """Integers in the order of the scores, NaN below every number."""
    bits = scores.float().view(torch.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).masked_fill_(scores.isnan(), -(2**31))


def _power(number: int) -> int:
    """The least power of two that is no smaller."""
    return 1 << (number - 1).bit_length()


def _block(d: int, most: int = 256) -> int:
    """How many dimensions are taken at once."""
    return max(16, min(most, _power(d)))


def _warps(width: int, each: int) -> int:
    """Warps for a row of `width` numbers, of which one warp takes `each`."""
    return max(1, min(16, width // each))


def _launch(kernel: Any, grid: tuple[int, ...], *tensors: Any, **meta: Any) -> None:
    """Start a kernel on the device of its first tensor; an empty grid is no work.

    Raises:
        ValueError: a tensor is not contiguous, as every kernel takes it to be.
    """
    for tensor in tensors:
        if isinstance(tensor, Tensor) and not tensor.is_contiguous():
            raise ValueError(f"{tuple(tensor.shape)} with strides {tensor.stride()}: no contiguous")
    if 0 in grid:
        return
    with torch.cuda.device(tensors[0].get_device()):
        kernel[grid](*tensors, **meta)


def _selection() -> ModuleType:
    from sae_runner.kernels import _triton_selection

    return _triton_selection


def _rows() -> ModuleType:
    from sae_runner.kernels import _triton_rows

    return _triton_rows


def _latents() -> ModuleType:
    from sae_runner.kernels import _triton_latents

    return _triton_latents
