"""Which latents of each row are chosen: the encoder's product, in chunks, and what is kept of it.

The product of all rows and all latents is most of a step and never exists whole. In bfloat16 it
costs a quarter to a seventh of float32 where a processor multiplies bfloat16 matrices, but its
rounding changes 1% of a selection and a tenth of the gradient. As a *screen* it only proposes
candidates, more than are wanted; their scores are then computed exactly, and the best are kept.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int32, Int64
from torch import Tensor

from sae_runner.kernels.choice import ops_for

Precision = Literal["fp32", "screened", "bf16"]
SCREEN_ERROR = 4 * 2.0**-9
"""What a threshold is lowered by, in units of the rounding of a sum: see `screen_error`."""
CHUNK_BYTES = {"cpu": 24 * 2**20, "cuda": 2**29}
"""What a chunk of scores may take. On a CPU it should stay in the last cache until it is searched.
After each its threads wait for each other: long, where another process has one of the cores."""
BESIDE = 32
"""On a CPU, columns of W's bfloat16 copy after its own, a whole tile: the bias, which meets a one
in each row, and zeros. A vector would be copied over each chunk of scores before the product is
added to it, which takes a quarter as long as the product."""
LEAST_ROWS = 256
"""Rows of a chunk, if there are so many: a product of fewer reads W too often."""


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the device has units for products of bfloat16 matrices."""
    if device.type == "cpu":
        return bool(torch.cpu._is_amx_tile_supported())
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def beside(device: torch.device) -> int:
    """How many columns the bfloat16 copy of W has after its own."""
    return BESIDE if device.type == "cpu" else 0


class Entries(NamedTuple):
    """Chosen entries in CSR form, and their scores."""

    offsets: Int64[Tensor, " n_plus_1"]
    indices: Int32[Tensor, " nnz"]
    values: Float[Tensor, " nnz"]


class Selector:
    """Scores x W^T + b and chooses; buffers are kept from call to call.

    Args:
        precision: `fp32` (the weights' own), `screened` (the same results from a bfloat16 screen)
            or `bf16` (scores are those of the screen).
    """

    def __init__(self, precision: Precision = "fp32") -> None:
        self.precision = precision
        self._buffers = dict[str, Tensor]()
        self._version = -1  # Of the W that the buffer of that name is a copy of.

    def __deepcopy__(self, memo: dict[int, Any]) -> "Selector":
        return Selector()  # A copy is for use, which is exact; buffers are nobody's state.

    @torch.no_grad()
    def top(
        self, x: Float[Tensor, "n d"], W: Float[Tensor, "d_sae d"], b: Float[Tensor, " d_sae"],
        k: int,
    ) -> tuple[Float[Tensor, "n k"], Int32[Tensor, "n k"]]:  # fmt: skip
        """The k largest scores of each row, in any order, and whose they are."""
        ops = ops_for(W)
        wanted = k + max(16, k // 2) if self.precision == "screened" else k
        half = self._half(W, wanted)
        values = x.new_empty(len(x), k)
        indices = torch.empty(len(x), k, dtype=torch.int32, device=x.device)
        done = 0
        for part, scores in self._chunks(x, W, b, half):
            rows = slice(done, done + len(part))
            done += len(part)
            if half and self.precision == "screened":
                found = ops.rescore(part, W, b, ops.topk(scores, wanted), k)
                values[rows], indices[rows] = found
            else:
                indices[rows] = ops.topk(scores, k)
                values[rows] = scores.gather(1, indices[rows].long()).to(values.dtype)
        return values, indices

    @torch.no_grad()
    def above(
        self, x: Float[Tensor, "n d"], W: Float[Tensor, "d_sae d"], b: Float[Tensor, " d_sae"],
        floor: Float[Tensor, " d_sae"],
    ) -> Entries:  # fmt: skip
        """All entries whose score exceeds their latent's floor."""
        half = self._half(W, 0)
        screened = half and self.precision == "screened"
        error = SCREEN_ERROR * screen_error(W) if screened else None
        parts = []
        for part, scores in self._chunks(x, W, b, half):
            if error is None:
                rows, indices = (scores > floor).nonzero(as_tuple=True)
                values = scores[rows, indices].to(W.dtype)
            else:
                length = screen_error(part).unsqueeze(1)
                least = floor - 2**-8 * (floor.abs() + b.abs())  # Which are rounded too.
                rows, indices = (scores > least - length * error).nonzero(as_tuple=True)
                counts = torch.bincount(rows, minlength=len(part))
                offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
                values = ops_for(W).products(part, W, offsets, indices.int()) + b[indices]
                keep = values > floor[indices]
                rows, indices, values = rows[keep], indices[keep], values[keep]
            parts.append((torch.bincount(rows, minlength=len(part)), indices.int(), values))
        counts = torch.cat([counts for counts, _, _ in parts])
        return Entries(
            torch.cat([counts.new_zeros(1), counts.cumsum(0)]),
            torch.cat([indices for _, indices, _ in parts]),
            torch.cat([values for _, _, values in parts]),
        )

    @torch.no_grad()
    def largest(
        self, x: Float[Tensor, "n d"], W: Float[Tensor, "d_sae d"], b: Float[Tensor, " d_sae"],
        n_wanted: int,
    ) -> Entries:  # fmt: skip
        """The positive ones of the `n_wanted` largest scores of the whole batch.

        A floor below which none of them lies is guessed from some rows; where the guess was too
        high it is 0, which is never wrong.
        """
        sample = x[:: max(1, len(x) // 64)]
        scores = torch.addmm(b, sample, W.T).flatten()
        share = min(1.0, 1.5 * n_wanted / (len(x) * len(W)) + 16 / len(scores))
        guess = scores.topk(max(1, math.ceil(share * len(scores))), sorted=False).values.min()
        for floor in (guess.clamp_min(0), torch.zeros_like(guess)):
            found = self.above(x, W, b, floor.expand(len(W)))
            if len(found.values) >= n_wanted or not floor > 0:
                break
        if len(found.values) <= n_wanted:
            return found
        places = found.values.topk(n_wanted, sorted=False).indices.sort().values
        offsets = torch.searchsorted(places, found.offsets)
        return Entries(offsets, found.indices[places], found.values[places])

    def _half(self, W: Tensor, wanted: int) -> bool:
        """Whether a product in bfloat16 is worth it."""
        exact = self.precision == "fp32" or W.dtype != torch.float32
        # Where most are candidates there is nothing to screen.
        return not exact and (self.precision == "bf16" or 4 * wanted < len(W))

    def _chunks(self, x: Tensor, W: Tensor, b: Tensor, half: bool) -> Any:
        """Rows, few at a time, with their scores, which the next chunk overwrites."""
        dtype = torch.bfloat16 if half else W.dtype
        limit = CHUNK_BYTES.get(x.device.type, CHUNK_BYTES["cuda"])
        n_rows = max(1, min(len(x), max(LEAST_ROWS, limit // (len(W) * dtype.itemsize))))
        buffer = self._buffer("scores", (n_rows, len(W)), dtype, x.device)
        product = self._half_product(W, b, n_rows) if half else partial(_product, W, b)
        with torch.autocast(x.device.type, enabled=False):
            for part in torch.split(x, n_rows):
                yield part, product(part, buffer[: len(part)])

    def _half_product(
        self, W: Tensor, b: Tensor, n_rows: int
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """Scores in bfloat16 of up to `n_rows` rows, written to the second argument."""
        shadow = self.shadow_of(W)
        if self._version != W._version:
            shadow.copy_(W)
        if not beside(W.device):
            return partial(
                _product, shadow, self._buffer("b", b.shape, shadow.dtype, b.device).copy_(b)
            )
        whole, d = self._buffers["W"], W.shape[1]
        whole[:, d] = b
        rows = self._buffer("rows", (n_rows, d + BESIDE), shadow.dtype, W.device)
        rows[:, d] = 1

        def product(part: Tensor, out: Tensor) -> Tensor:
            with_one = rows[: len(part)]
            with_one[:, :d] = part
            return torch.mm(with_one, whole.T, out=out)

        return product

    def shadow_of(self, W: Tensor) -> Tensor:
        """Where W in bfloat16 is kept; whoever writes it with W says so by `shadow_written`.

        Its rows are apart from each other on a CPU.
        """
        shape = (len(W), W.shape[1] + beside(W.device))
        return self._buffer("W", shape, torch.bfloat16, W.device)[:, : W.shape[1]]

    def shadow_written(self, W: Tensor) -> None:
        """The shadow is W as it is now."""
        self._version = W._version

    def forget_shadow(self) -> None:
        """W is about to change in a way that its version does not show."""
        self._version = -1

    def buffers(self) -> list[Tensor]:
        """What is kept from call to call; other shapes take the place of some."""
        return list(self._buffers.values())

    def _buffer(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        kept = self._buffers.get(name)
        wanted = (tuple(shape), dtype, device)
        if kept is None or (tuple(kept.shape), kept.dtype, kept.device) != wanted:
            kept = self._buffers[name] = torch.zeros(shape, dtype=dtype, device=device)
        return kept


def _product(W: Tensor, b: Tensor, part: Tensor, out: Tensor) -> Tensor:
    """Scores of rows: x Wᵀ + b."""
    return torch.addmm(b, part.to(W.dtype), W.T, out=out)


def screen_error(x: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """‖x‖₄ of each row: times ‖W_j‖₄ and `SCREEN_ERROR` it bounds the rounding of ⟨x, W_j⟩.

    Factors are off by a relative 2^-9 at most, at random, so the sum is off by less than
    2^-9 √(Σ_i x_i² W_ji²), which is at most 2^-9 ‖x‖₄ ‖W_j‖₄ (Cauchy-Schwarz), a few times.
    """
    squares = x.square()
    return torch.einsum("nd,nd->n", squares, squares).sqrt().sqrt()
