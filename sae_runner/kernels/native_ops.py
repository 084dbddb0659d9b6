"""The operations on selected latents in C++ on the CPU: float32, compiled at first use.

Same functions and same results as `torch_ops`, to the rounding of float32; no gradient flows. The
threads are torch's, and their number changes no bit. Types, shapes and contiguity are checked; that
each index is a row of W is the caller's promise.
"""

import ctypes
from collections.abc import Sequence

import torch
from jaxtyping import BFloat16, Float, Float32, Float64, Int32, Int64
from torch import Tensor

from sae_runner.kernels import int8
from sae_runner.kernels._native_call import call, check
from sae_runner.kernels._native_library import load_library
from sae_runner.kernels.base import ByLatent, Factor, Int8Rows


class _Factor(ctypes.Structure):
    """A `Factor` as C++ reads it."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("starts", "rows", "entries", "coefs", "dense")]


class _Step(ctypes.Structure):
    """What one step of Adam has in common for all weights, as C++ reads it."""

    _fields_ = [
        (name, ctypes.c_float) for name in ("scale", "new1", "keep2", "new2", "size", "eps")
    ]


def available() -> bool:
    """Whether the kernels can be used here: the first call compiles them, and says if not, why."""
    return load_library() is not None


def topk(scores: Float[Tensor, "n d_sae"], k: int) -> Int32[Tensor, "n k"]:
    """See `Ops.topk`: ascending; of equal scores the first, and NaN only for want of numbers.

    Scores are float32 or bfloat16.
    """
    n, d_sae = scores.shape
    half = scores.dtype == torch.bfloat16
    check("scores", scores, torch.bfloat16 if half else torch.float32, (n, d_sae))
    if not 1 <= k <= d_sae:
        raise ValueError(f"k must lie in 1..{d_sae}, not be {k}")
    places = torch.empty(n, k, dtype=torch.int32)
    call("topk_bf16" if half else "topk_fp32", scores, n, d_sae, k, places)
    return places


def largest_within(
    scores: BFloat16[Tensor, "n d_sae"],
    error: Float32[Tensor, " n"] | None,
    x: Float32[Tensor, "n d"],
    W: Float32[Tensor, "d_sae d"],
    b: Float32[Tensor, " d_sae"],
    k: int,
) -> tuple[Float32[Tensor, "n k"], Int32[Tensor, "n k"], int]:
    """See `Ops.largest_within`: in the order of latents, and chosen as by `topk`.

    A row's candidates are those with no less than its k-th largest score less two errors.
    """
    if error is None:
        raise ValueError("error must be known")
    (n, d), d_sae = x.shape, len(b)
    check("scores", scores, torch.bfloat16, (n, d_sae))
    check("error", error, torch.float32, (n,))
    check("x", x, torch.float32, (n, d))
    check("W", W, torch.float32, (d_sae, d))
    check("b", b, torch.float32, (d_sae,))
    if not 1 <= k <= d_sae:
        raise ValueError(f"k must lie in 1..{d_sae}, not be {k}")
    values, indices = torch.empty(n, k), torch.empty(n, k, dtype=torch.int32)
    candidates = torch.empty(n, dtype=torch.int32)
    call("largest_within", scores, error, x, W, b, n, d_sae, d, k, values, indices, candidates)
    return values, indices, int(candidates.sum())


def above(
    scores: Float[Tensor, "n d_sae"], least: Float32[Tensor, " d_sae"], error: Float32[Tensor, " n"]
) -> tuple[Int64[Tensor, " n_plus_1"], Int32[Tensor, " nnz"]]:
    """See `Ops.above`; scores are float32 or bfloat16."""
    n, d_sae = scores.shape
    half = scores.dtype == torch.bfloat16
    check("scores", scores, torch.bfloat16 if half else torch.float32, (n, d_sae))
    check("least", least, torch.float32, (d_sae,))
    check("error", error, torch.float32, (n,))
    offsets, dtype = torch.zeros(n + 1, dtype=torch.int64), "bf16" if half else "fp32"
    call(f"count_above_{dtype}", scores, least, error, n, d_sae, offsets[1:])
    torch.cumsum(offsets[1:], 0, out=offsets[1:])
    indices = torch.empty(int(offsets[-1]), dtype=torch.int32)
    call(f"list_above_{dtype}", scores, least, error, offsets, n, d_sae, indices)
    return offsets, indices


def products(
    x: Float32[Tensor, "n d"],
    W: Float32[Tensor, "d_sae d"],
    offsets: Int64[Tensor, " n_plus_1"],
    indices: Int32[Tensor, " nnz"],
) -> Float32[Tensor, " nnz"]:
    """See `Ops.products`."""
    n, d = x.shape
    check("x", x, torch.float32, (n, d))
    check("W", W, torch.float32, (len(W), d))
    _check_selection(offsets, indices, n)
    out = torch.empty(len(indices))
    call("products", x, W, offsets, indices, n, d, out)
    return out


def decode(
    W: Float32[Tensor, "d_sae d"],
    offsets: Int64[Tensor, " n_plus_1"],
    indices: Int32[Tensor, " nnz"],
    values: Float32[Tensor, " nnz"],
) -> Float32[Tensor, "n d"]:
    """See `Ops.decode`."""
    n, d = len(offsets) - 1, W.shape[1]
    check("W", W, torch.float32, (len(W), d))
    _check_selection(offsets, indices, n)
    check("values", values, torch.float32, (len(indices),))
    out = torch.empty(n, d)
    call("decode", W, offsets, indices, values, n, d, out)
    return out


def reconstruct(
    W: Float32[Tensor, "d_sae d"],
    offsets: Int64[Tensor, " n_plus_1"],
    indices: Int32[Tensor, " nnz"],
    values: Float32[Tensor, " nnz"],
    wanted: Float32[Tensor, "n d"],
) -> tuple[Float32[Tensor, "n d"], Float32[Tensor, " nnz"]]:
    """See `Ops.reconstruct`; the rows of W are read from memory once."""
    n, d = wanted.shape
    check("wanted", wanted, torch.float32, (n, d))
    check("W", W, torch.float32, (len(W), d))
    _check_selection(offsets, indices, n)
    check("values", values, torch.float32, (len(indices),))
    residual, out = torch.empty(n, d), torch.empty(len(indices))
    call("reconstruct", W, offsets, indices, values, wanted, n, d, residual, out)
    return residual, out


def by_latent(
    offsets: Int64[Tensor, " n_plus_1"], indices: Int32[Tensor, " nnz"], d_sae: int
) -> ByLatent:
    """See `Ops.by_latent`."""
    n, nnz = len(offsets) - 1, len(indices)
    _check_selection(offsets, indices, n)
    starts = torch.empty(d_sae + 1, dtype=torch.int64)
    rows, entries = torch.empty(nnz, dtype=torch.int32), torch.empty(nnz, dtype=torch.int32)
    call("by_latent", offsets, indices, n, d_sae, starts, rows, entries)
    return ByLatent(starts, rows, entries)


def sums_by_latent(
    by_latent: ByLatent, values: Float32[Tensor, " nnz"]
) -> Float32[Tensor, " d_sae"]:
    """See `Ops.sums_by_latent`; in float64."""
    d_sae = len(by_latent.starts) - 1
    check("starts", by_latent.starts, torch.int64, (d_sae + 1,))
    check("entries", by_latent.entries, torch.int32, (len(values),))
    check("values", values, torch.float32, (len(values),))
    out = torch.empty(d_sae)
    call("sums_by_latent", by_latent.starts, by_latent.entries, values, d_sae, out)
    return out


def weighted_sum(
    W: Float32[Tensor, "m d"], weights: Float32[Tensor, " m"]
) -> Float32[Tensor, " d"]:
    """See `Ops.weighted_sum`; rows without weight are not read."""
    m, d = W.shape
    check("W", W, torch.float32, (m, d))
    check("weights", weights, torch.float32, (m,))
    out = torch.empty(d)
    call("weighted_sum", W, weights, m, d, out)
    return out


def weight_gradient(factor: Factor, d_sae: int) -> Float32[Tensor, "d_sae d"]:
    """See `Ops.weight_gradient`."""
    d = factor.dense.shape[1]
    array = _factors([factor], d_sae, d)
    gradient = torch.empty(d_sae, d)
    call("weight_gradient", array, d_sae, d, gradient)
    return gradient


def gradient_norm2(
    factors: Sequence[Factor], W: Float32[Tensor, "d_sae d"] | None
) -> Float64[Tensor, ""]:
    """See `Ops.gradient_norm2`."""
    d_sae, d = len(factors[0].by_latent.starts) - 1, factors[0].dense.shape[1]
    array = _factors(factors, d_sae, d)
    if W is not None:
        check("W", W, torch.float32, (d_sae, d))
    norm2 = torch.empty((), dtype=torch.float64)
    call("gradient_norm2", array, len(factors), W, d_sae, d, norm2)
    return norm2


def adam_(
    W: Float32[Tensor, "d_sae d"],
    exp_avg: Float32[Tensor, "d_sae d"],
    exp_avg_sq: Float32[Tensor, "d_sae d"],
    factors: Sequence[Factor],
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    step: int | Tensor,
    scale: float | Tensor,
    unit: bool,
    shadow: BFloat16[Tensor, "d_sae d"] | Int8Rows | None,
) -> None:
    """See `Ops.adam_`: a row is summed and used up at once, and no gradient is ever written.

    The new rows can also be received in int8.
    """
    d_sae, d = W.shape
    array = _factors(factors, d_sae, d)
    written = [W, exp_avg, exp_avg_sq]
    for name, tensor in zip(("W", "exp_avg", "exp_avg_sq"), written, strict=True):
        check(name, tensor, torch.float32, (d_sae, d))
    in_int8 = int8.RowsInC()
    if isinstance(shadow, Int8Rows):
        in_int8, shadow = int8.in_c(shadow, d_sae, d), None
    if shadow is not None:
        check("a row of shadow", shadow[0], torch.bfloat16, (d,))
        if len(shadow) != d_sae:
            raise ValueError(f"shadow has {len(shadow)} rows for {d_sae} of W")
        written.append(shadow)
    root = (1 - beta2 ** int(step)) ** 0.5
    size = float(lr) * root / (1 - beta1 ** int(step))
    numbers = _Step(float(scale), 1 - beta1, beta2, 1 - beta2, size, eps * root)
    stride = 0 if shadow is None else shadow.stride(0)
    call("adam", W, exp_avg, exp_avg_sq, shadow, stride, in_int8, array, len(factors), d_sae, d,
          numbers, int(unit))  # fmt: skip
    torch.autograd.graph.increment_version(written)


def _check_selection(offsets: Tensor, indices: Tensor, n: int) -> None:
    """Refuse a selection of other types or another number of rows or entries."""
    check("offsets", offsets, torch.int64, (n + 1,))
    check("indices", indices, torch.int32, (len(indices),))
    if offsets[-1] != len(indices):
        raise ValueError(f"offsets end at {offsets[-1]}, and there are {len(indices)} indices")


def _factors(factors: Sequence[Factor], d_sae: int, d: int) -> ctypes.Array[_Factor]:
    """The factors as one array of C; they must outlive it."""
    array = (_Factor * len(factors))()
    for i, (by_latent, coefs, dense) in enumerate(factors):
        nnz = len(coefs)
        check("starts", by_latent.starts, torch.int64, (d_sae + 1,))
        check("rows", by_latent.rows, torch.int32, (nnz,))
        check("entries", by_latent.entries, torch.int32, (nnz,))
        check("coefs", coefs, torch.float32, (nnz,))
        check("dense", dense, torch.float32, (len(dense), d))
        array[i] = _Factor(*(t.data_ptr() for t in (*by_latent, coefs, dense)))
    return array
