"""Which latents of each row are chosen: the encoder's product, in chunks, and what is kept of it.

The product of all rows and all latents is most of a step and never exists whole. In bfloat16 it
costs a quarter to a seventh of float32 where a processor multiplies bfloat16 matrices, but its
rounding changes 1% of a selection and a tenth of the gradient. As a *screen* it only proposes
candidates, more than are wanted; their scores are then computed exactly, and the best are kept.
Where the processor multiplies int8 the screen is in int8, in a third of the time of bfloat16; how
many candidates a row needs then follows from how much its numbers were rounded.
"""

import logging
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int32, Int64
from torch import Tensor

from sae_runner.kernels import int8, native_ops
from sae_runner.kernels.base import Int8Rows
from sae_runner.kernels.choice import ops_for
from sae_runner.kernels.screen_error import ScreenError
from sae_runner.kernels.torch_ops import n_candidates

logger = logging.getLogger(__name__)

Precision = Literal["fp32", "screened", "bf16"]
CHUNK_BYTES = {"cpu": 24 * 2**20, "cuda": 2**29}
"""What a chunk of scores may take. On a CPU it should stay in the last cache until it is searched.
After each its threads wait for each other: long, where another process has one of the cores."""
BESIDE, B_COLUMNS = 32, 3
"""On a CPU, columns of W's bfloat16 copy after its own, a whole tile: the bias, in as many parts as
hold all of it, each of which meets a one in each row, and zeros. A vector would be copied over each
chunk of scores before the product is added to it, which takes a quarter as long as the product."""
PER_CANDIDATE = 200
"""An exact score takes as long as a product in int8 spares, beside bfloat16, of so many latents."""
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
        precision: `fp32` (the weights' own), `screened` (the same results, candidates being looked
            for in int8 or bfloat16) or `bf16` (scores are those of a product in bfloat16).
    """

    def __init__(self, precision: Precision = "fp32") -> None:
        self.precision = precision
        self._buffers = dict[str, Tensor]()
        self._int8 = Int8Rows.empty(0, 0)
        self._in_int8 = False  # Which of its two copies W has.
        self._version = -1  # Of the W that whoever wrote it last wrote to the copy too.
        self._coarse = False  # Int8 had too many candidates.

    def __deepcopy__(self, memo: dict[int, Any]) -> "Selector":
        return Selector()  # A copy is for use, which is exact; buffers are nobody's state.

    @torch.no_grad()
    def top(
        self, x: Float[Tensor, "n d"], W: Float[Tensor, "d_sae d"], b: Float[Tensor, " d_sae"],
        k: int,
    ) -> tuple[Float[Tensor, "n k"], Int32[Tensor, "n k"]]:  # fmt: skip
        """The k largest scores of each row, in any order, and whose they are."""
        ops, half = ops_for(W), self._half(W, n_candidates(k))
        screened = half and self.precision == "screened"
        values = x.new_empty(len(x), k)
        indices = torch.empty(len(x), k, dtype=torch.int32, device=x.device)
        done = looked_at = 0
        bounded = screened and ops is native_ops  # The others do without.
        for part, scores, error in self._chunks(x, W, b, half, bounded):
            rows = slice(done, done + len(part))
            done += len(part)
            if screened:
                found = ops.largest_within(scores, error, part, W, b, k)
                values[rows], indices[rows], n = found
                looked_at += n
            else:
                indices[rows] = ops.topk(scores, k)
                values[rows] = scores.gather(1, indices[rows].long()).to(values.dtype)
        self._weigh(looked_at, len(x) * n_candidates(k), len(x) * len(W) / PER_CANDIDATE)
        return values, indices

    @torch.no_grad()
    def above(
        self, x: Float[Tensor, "n d"], W: Float[Tensor, "d_sae d"], b: Float[Tensor, " d_sae"],
        floor: Float[Tensor, " d_sae"],
    ) -> Entries:  # fmt: skip
        """All entries whose score exceeds their latent's floor."""
        ops, half = ops_for(W), self._half(W, 0)
        screened = half and self.precision == "screened"
        least = floor.to(W.dtype)
        if screened:  # Scores are rounded too, and so is b where it has no columns of its own.
            least = floor - 2**-8 * (floor.abs() + (0 if beside(W.device) else b.abs()))
        least, parts, looked_at = least.contiguous(), [], 0
        for part, scores, error in self._chunks(x, W, b, half, screened):
            off = part.new_zeros(len(part)) if error is None else error
            offsets, indices = ops.above(scores, least, off)
            rows = torch.repeat_interleave(offsets.diff(), output_size=len(indices))
            if screened:
                looked_at += len(indices)
                values = ops.products(part, W, offsets, indices) + b[indices]
                keep = values > floor[indices]
                rows, indices, values = rows[keep], indices[keep], values[keep]
            else:
                values = scores[rows, indices.long()].to(W.dtype)
            parts.append((torch.bincount(rows, minlength=len(part)), indices, values))
        counts = torch.cat([counts for counts, _, _ in parts])
        found = Entries(
            torch.cat([counts.new_zeros(1), counts.cumsum(0)]),
            torch.cat([indices for _, indices, _ in parts]),
            torch.cat([values for _, _, values in parts]),
        )
        usual = len(found.values) + 16 * len(x)
        self._weigh(looked_at, usual, len(x) * len(W) / PER_CANDIDATE)
        return found

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

    def _weigh(self, looked_at: int, usual: int, spared: float) -> None:
        """Leave int8 for bfloat16 if more candidates are looked at than its product spares.

        Half as many more than usual cost little. There are far more where a column of x is far
        larger than the others: the numbers of a row are in steps of its size.
        """
        if self._in_int8 and looked_at > 1.5 * usual + spared:
            logger.info("candidates are looked for in bfloat16: int8 is too coarse for these rows")
            self._coarse = True

    def _chunks(
        self, x: Tensor, W: Tensor, b: Tensor, half: bool, bounded: bool
    ) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Rows, few at a time, with their scores, which the next chunk overwrites.

        And, if they are `bounded`, what the scores of each are off by at most.
        """
        dtype = torch.bfloat16 if half else W.dtype
        limit = CHUNK_BYTES.get(x.device.type, CHUNK_BYTES["cuda"])
        n_rows = max(1, min(len(x), max(LEAST_ROWS, limit // (len(W) * dtype.itemsize))))
        buffer = self._buffer("scores", (n_rows, len(W)), dtype, x.device)
        product: Callable[[Tensor, Tensor], Tensor | None] = partial(_product, W, b)
        if half:
            self._copy_in(int8=self._multiplies_int8(W))
            in_int8 = self._in_int8
            product = self._int8_product(W, b) if in_int8 else self._half_product(W, b, n_rows)
        off = ScreenError(W, b) if bounded and not self._in_int8 else None
        with torch.autocast(x.device.type, enabled=False):
            for part in torch.split(x, n_rows):
                scores = buffer[: len(part)]
                error = product(part, scores)
                yield part, scores, off.of(part) if off is not None else error

    def _multiplies_int8(self, W: Tensor) -> bool:
        """Whether there is a product in int8, and it is of use."""
        wanted = self.precision == "screened" and not self._coarse
        return wanted and ops_for(W) is native_ops and int8.available()

    def _int8_product(self, W: Tensor, b: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """About the scores of rows, written to the second argument; and their error."""
        copy = self.shadow_of(W)
        assert isinstance(copy, Int8Rows)
        if self._version != W._version:
            int8.write(W, copy)
        return lambda part, out: int8.scores(part, copy, b, out)

    def _half_product(self, W: Tensor, b: Tensor, n_rows: int) -> Callable[[Tensor, Tensor], None]:
        """Scores in bfloat16 of up to `n_rows` rows, written to the second argument."""
        shadow = self.shadow_of(W)
        assert isinstance(shadow, Tensor)
        if self._version != W._version:
            shadow.copy_(W)
        if not beside(W.device):
            return partial(
                _product, shadow, self._buffer("b", b.shape, shadow.dtype, b.device).copy_(b)
            )
        whole, d = self._buffers["W"], W.shape[1]
        left = b.clone()
        for column in range(d, d + B_COLUMNS):
            whole[:, column] = left
            left -= whole[:, column]
        rows = self._buffer("rows", (n_rows, d + BESIDE), shadow.dtype, W.device)
        rows[:, d : d + B_COLUMNS] = 1

        def product(part: Tensor, out: Tensor) -> None:
            with_one = rows[: len(part)]
            with_one[:, :d] = part
            torch.mm(with_one, whole.T, out=out)

        return product

    def shadow_of(self, W: Tensor) -> Tensor | Int8Rows:
        """Where W in bfloat16 or int8 is kept; who writes it with W says so by `shadow_written`.

        Rows in bfloat16 are apart from each other on a CPU.
        """
        self._copy_in(int8=self._in_int8 and ops_for(W) is native_ops)
        if self._in_int8:
            room = Int8Rows.shapes(*W.shape)
            if tuple(tensor.shape for tensor in self._int8) != room:
                self._int8 = Int8Rows.empty(*W.shape)
            return self._int8
        shape = (len(W), W.shape[1] + beside(W.device))
        return self._buffer("W", shape, torch.bfloat16, W.device)[:, : W.shape[1]]

    def _copy_in(self, *, int8: bool) -> None:
        """From now on W's copy is in int8, or in bfloat16; the other is given up."""
        if self._in_int8 != int8:
            self._in_int8, self._version, self._int8 = int8, -1, Int8Rows.empty(0, 0)
            self._buffers.pop("W", None)

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


def _product(W: Tensor, b: Tensor, part: Tensor, out: Tensor) -> None:
    """Scores of rows: x Wᵀ + b."""
    torch.addmm(b, part.to(W.dtype), W.T, out=out)
