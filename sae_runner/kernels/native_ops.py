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


class _Int8Rows(ctypes.Structure):
    """`Int8Rows` as C++ reads them."""

    _fields_ = [(name, ctypes.c_void_p) for name in Int8Rows._fields]


def available() -> bool:
    """Whether the kernels can be used here: the first call compiles them, and says if not, why."""
    return load_library() is not None


def multiplies_int8() -> bool:
    """Whether `int8_scores` can be called: the processor, the compiler and the system know AMX."""
    native = load_library()
    return native is not None and bool(native.multiplies_int8())


def write_int8(W: Float32[Tensor, "d_sae d"], to: Int8Rows) -> None:
    """Write all rows of W in int8."""
    d_sae, d = W.shape
    _check("W", W, torch.float32, (d_sae, d))
    _call("int8_rows", W, d_sae, d, _int8_rows(to, d_sae, d))


def int8_scores(
    x: Float32[Tensor, "n d"],
    rows: Int8Rows,
    b: Float32[Tensor, " d_sae"],
    out: BFloat16[Tensor, "n d_sae"],
) -> Float32[Tensor, " n"]:
    """Write about ⟨x_t, W_j⟩ + b_j to `out`; returns four standard deviations of their error.

    That is what both factors are rounded by: with steps a of x and w_j of W_j a product is off by
    a variance of (a² ‖W_j‖² + w_j² ‖x‖²) / 12. Scores are rounded to bfloat16 besides.
    """
    if not multiplies_int8():  # Which also asks the system for tiles.
        raise RuntimeError("this processor, compiler or system has no matrices of int8")
    (n, d), d_sae = x.shape, len(b)
    _check("x", x, torch.float32, (n, d))
    _check("b", b, torch.float32, (d_sae,))
    _check("out", out, torch.bfloat16, (n, d_sae))
    error = torch.empty(n)
    longest, step = (ctypes.c_float(float(most.max())) for most in (rows.lengths, rows.steps))
    _call("int8_scores", x, _int8_rows(rows, d_sae, d), longest, step, b, n, d_sae, d, out, error)
    return error


def topk(scores: Float[Tensor, "n d_sae"], k: int) -> Int32[Tensor, "n k"]:
    """See `Ops.topk`: ascending; of equal scores the first, and NaN only for want of numbers.

    Scores are float32 or bfloat16.
    """
    n, d_sae = scores.shape
    half = scores.dtype == torch.bfloat16
    _check("scores", scores, torch.bfloat16 if half else torch.float32, (n, d_sae))
    if not 1 <= k <= d_sae:
        raise ValueError(f"k must lie in 1..{d_sae}, not be {k}")
    places = torch.empty(n, k, dtype=torch.int32)
    _call("topk_bf16" if half else "topk_fp32", scores, n, d_sae, k, places)
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
    _check("scores", scores, torch.bfloat16, (n, d_sae))
    _check("error", error, torch.float32, (n,))
    _check("x", x, torch.float32, (n, d))
    _check("W", W, torch.float32, (d_sae, d))
    _check("b", b, torch.float32, (d_sae,))
    if not 1 <= k <= d_sae:
        raise ValueError(f"k must lie in 1..{d_sae}, not be {k}")
    values, indices = torch.empty(n, k), torch.empty(n, k, dtype=torch.int32)
    candidates = torch.empty(n, dtype=torch.int32)
    _call("largest_within", scores, error, x, W, b, n, d_sae, d, k, values, indices, candidates)
    return values, indices, int(candidates.sum())


def above(
    scores: Float[Tensor, "n d_sae"], least: Float32[Tensor, " d_sae"], error: Float32[Tensor, " n"]
) -> tuple[Int64[Tensor, " n_plus_1"], Int32[Tensor, " nnz"]]:
    """See `Ops.above`; scores are float32 or bfloat16."""
    n, d_sae = scores.shape
    half = scores.dtype == torch.bfloat16
    _check("scores", scores, torch.bfloat16 if half else torch.float32, (n, d_sae))
    _check("least", least, torch.float32, (d_sae,))
    _check("error", error, torch.float32, (n,))
    offsets, dtype = torch.zeros(n + 1, dtype=torch.int64), "bf16" if half else "fp32"
    _call(f"count_above_{dtype}", scores, least, error, n, d_sae, offsets[1:])
    torch.cumsum(offsets[1:], 0, out=offsets[1:])
    indices = torch.empty(int(offsets[-1]), dtype=torch.int32)
    _call(f"list_above_{dtype}", scores, least, error, offsets, n, d_sae, indices)
    return offsets, indices


def products(
    x: Float32[Tensor, "n d"],
    W: Float32[Tensor, "d_sae d"],
    offsets: Int64[Tensor, " n_plus_1"],
    indices: Int32[Tensor, " nnz"],
) -> Float32[Tensor, " nnz"]:
    """See `Ops.products`."""
    n, d = x.shape
    _check("x", x, torch.float32, (n, d))
    _check("W", W, torch.float32, (len(W), d))
    _check_selection(offsets, indices, n)
    out = torch.empty(len(indices))
    _call("products", x, W, offsets, indices, n, d, out)
    return out


def decode(
    W: Float32[Tensor, "d_sae d"],
    offsets: Int64[Tensor, " n_plus_1"],
    indices: Int32[Tensor, " nnz"],
    values: Float32[Tensor, " nnz"],
) -> Float32[Tensor, "n d"]:
    """See `Ops.decode`."""
    n, d = len(offsets) - 1, W.shape[1]
    _check("W", W, torch.float32, (len(W), d))
    _check_selection(offsets, indices, n)
    _check("values", values, torch.float32, (len(indices),))
    out = torch.empty(n, d)
    _call("decode", W, offsets, indices, values, n, d, out)
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
    _check("wanted", wanted, torch.float32, (n, d))
    _check("W", W, torch.float32, (len(W), d))
    _check_selection(offsets, indices, n)
    _check("values", values, torch.float32, (len(indices),))
    residual, out = torch.empty(n, d), torch.empty(len(indices))
    _call("reconstruct", W, offsets, indices, values, wanted, n, d, residual, out)
    return residual, out


def by_latent(
    offsets: Int64[Tensor, " n_plus_1"], indices: Int32[Tensor, " nnz"], d_sae: int
) -> ByLatent:
    """See `Ops.by_latent`."""
    n, nnz = len(offsets) - 1, len(indices)
    _check_selection(offsets, indices, n)
    starts = torch.empty(d_sae + 1, dtype=torch.int64)
    rows, entries = torch.empty(nnz, dtype=torch.int32), torch.empty(nnz, dtype=torch.int32)
    _call("by_latent", offsets, indices, n, d_sae, starts, rows, entries)
    return ByLatent(starts, rows, entries)


def sums_by_latent(
    by_latent: ByLatent, values: Float32[Tensor, " nnz"]
) -> Float32[Tensor, " d_sae"]:
    """See `Ops.sums_by_latent`; in float64."""
    d_sae = len(by_latent.starts) - 1
    _check("starts", by_latent.starts, torch.int64, (d_sae + 1,))
    _check("entries", by_latent.entries, torch.int32, (len(values),))
    _check("values", values, torch.float32, (len(values),))
    out = torch.empty(d_sae)
    _call("sums_by_latent", by_latent.starts, by_latent.entries, values, d_sae, out)
    return out


def weighted_sum(
    W: Float32[Tensor, "m d"], weights: Float32[Tensor, " m"]
) -> Float32[Tensor, " d"]:
    """See `Ops.weighted_sum`; rows without weight are not read."""
    m, d = W.shape
    _check("W", W, torch.float32, (m, d))
    _check("weights", weights, torch.float32, (m,))
    out = torch.empty(d)
    _call("weighted_sum", W, weights, m, d, out)
    return out


def weight_gradient(factor: Factor, d_sae: int) -> Float32[Tensor, "d_sae d"]:
    """See `Ops.weight_gradient`."""
    d = factor.dense.shape[1]
    array = _factors([factor], d_sae, d)
    gradient = torch.empty(d_sae, d)
    _call("weight_gradient", array, d_sae, d, gradient)
    return gradient


def gradient_norm2(
    factors: Sequence[Factor], W: Float32[Tensor, "d_sae d"] | None
) -> Float64[Tensor, ""]:
    """See `Ops.gradient_norm2`."""
    d_sae, d = len(factors[0].by_latent.starts) - 1, factors[0].dense.shape[1]
    array = _factors(factors, d_sae, d)
    if W is not None:
        _check("W", W, torch.float32, (d_sae, d))
    norm2 = torch.empty((), dtype=torch.float64)
    _call("gradient_norm2", array, len(factors), W, d_sae, d, norm2)
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
        _check(name, tensor, torch.float32, (d_sae, d))
    in_int8 = _Int8Rows()
    if isinstance(shadow, Int8Rows):
        in_int8, shadow = _int8_rows(shadow, d_sae, d), None
    if shadow is not None:
        _check("a row of shadow", shadow[0], torch.bfloat16, (d,))
        if len(shadow) != d_sae:
            raise ValueError(f"shadow has {len(shadow)} rows for {d_sae} of W")
        written.append(shadow)
    root = (1 - beta2 ** int(step)) ** 0.5
    size = float(lr) * root / (1 - beta1 ** int(step))
    numbers = _Step(float(scale), 1 - beta1, beta2, 1 - beta2, size, eps * root)
    stride = 0 if shadow is None else shadow.stride(0)
    _call("adam", W, exp_avg, exp_avg_sq, shadow, stride, in_int8, array, len(factors), d_sae, d,
          numbers, int(unit))  # fmt: skip
    torch.autograd.graph.increment_version(written)


def _call(
    name: str,
    *arguments: Tensor | int | ctypes.Structure | ctypes.Array[_Factor] | ctypes.c_float | None,
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


def _check(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
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


def _int8_rows(rows: Int8Rows, d_sae: int, d: int) -> _Int8Rows:
    """The same for C++, if there is room for as many rows as that."""
    dtypes = (torch.int8, torch.float32, torch.float32)
    for tensor, dtype, shape in zip(rows, dtypes, Int8Rows.shapes(d_sae, d), strict=True):
        _check("rows in int8", tensor, dtype, shape)
    return _Int8Rows(*(tensor.data_ptr() for tensor in rows))


def _check_selection(offsets: Tensor, indices: Tensor, n: int) -> None:
    """Refuse a selection of other types or another number of rows or entries."""
    _check("offsets", offsets, torch.int64, (n + 1,))
    _check("indices", indices, torch.int32, (len(indices),))
    if offsets[-1] != len(indices):
        raise ValueError(f"offsets end at {offsets[-1]}, and there are {len(indices)} indices")


def _factors(factors: Sequence[Factor], d_sae: int, d: int) -> ctypes.Array[_Factor]:
    """The factors as one array of C; they must outlive it."""
    array = (_Factor * len(factors))()
    for i, (by_latent, coefs, dense) in enumerate(factors):
        nnz = len(coefs)
        _check("starts", by_latent.starts, torch.int64, (d_sae + 1,))
        _check("rows", by_latent.rows, torch.int32, (nnz,))
        _check("entries", by_latent.entries, torch.int32, (nnz,))
        _check("coefs", coefs, torch.float32, (nnz,))
        _check("dense", dense, torch.float32, (len(dense), d))
        array[i] = _Factor(*(t.data_ptr() for t in (*by_latent, coefs, dense)))
    return array
