"""What the operations on selected latents speak of, whoever computes them.

A selection is in CSR form: row t of n owns the entries from offsets[t] to offsets[t + 1], each the
index of a latent, no latent twice in a row. W is [d_sae, d]: a latent is a row.
"""

from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import BFloat16, Float, Float32, Float64, Int, Int8, Int32, Int64
from torch import Tensor


class ByLatent(NamedTuple):
    """A selection read by latents: latent j owns the places from starts[j] to starts[j + 1]."""

    starts: Int64[Tensor, " d_sae_plus_1"]
    rows: Int[Tensor, " nnz"]
    """The row of each; ascending within a latent."""
    entries: Int[Tensor, " nnz"]
    """Its place in the order of rows."""


class Factor(NamedTuple):
    """A gradient that is a sparse product: g_j = Σ over entries of latent j of coef · dense[row].

    The gradient of a decoder has the latents as coefficients and that of x̂ as rows; that of an
    encoder the gradient of the pre-activations and the inputs.
    """

    by_latent: ByLatent
    coefs: Float[Tensor, " nnz"]
    """In the order of rows."""
    dense: Float[Tensor, "n d"]


class Int8Rows(NamedTuple):
    """Rows W_j in int8: each is close to its step times whole numbers, of at most 127."""

    tiles: Int8[Tensor, "pairs_of_panels bytes"]
    """The numbers as AMX reads them: see native/int8.h."""
    steps: Float32[Tensor, " d_sae_padded"]
    lengths: Float32[Tensor, " d_sae_padded"]
    """‖W_j‖."""
    lost: Float32[Tensor, " d_sae_padded"]
    """The length of what is less than half a step, times the root of its share of the columns."""

    @staticmethod
    def shapes(d_sae: int, d: int) -> tuple[tuple[int, ...], ...]:
        """Of the room that so many rows take."""
        pairs = -(-d_sae // 32)
        return (pairs, 32 * 64 * -(-d // 64)), (32 * pairs,), (32 * pairs,), (32 * pairs,)

    @classmethod
    def empty(cls, d_sae: int, d: int) -> "Int8Rows":
        """Room for so many rows; whatever pads them is zero."""
        tiles, *others = cls.shapes(d_sae, d)
        return cls(torch.zeros(tiles, dtype=torch.int8), *map(torch.zeros, others))


@runtime_checkable
class Ops(Protocol):
    """What `torch_ops`, `native_ops` and `triton_ops` each offer, with the same results."""

    def topk(self, scores: Float[Tensor, "n d_sae"], k: int) -> Int32[Tensor, "n k"]:
        """Places of the k largest scores of each row, in any order."""
        ...

    def largest_within(
        self,
        scores: BFloat16[Tensor, "n d_sae"],
        error: Float[Tensor, " n"] | None,
        x: Float[Tensor, "n d"],
        W: Float[Tensor, "d_sae d"],
        b: Float[Tensor, " d_sae"],
        k: int,
    ) -> tuple[Float[Tensor, "n k"], Int32[Tensor, "n k"], int]:
        """The k largest ⟨x_t, W_j⟩ + b_j of each row, whose they are, and how many it looked at.

        They are exact. Candidates are all latents that may be among them by their score, which is
        off by up to `error`, and rounded to bfloat16 besides. Only C++ asks for it: PyTorch sees
        how far scores are off, and Triton takes half as many more than wanted, as no device is to
        be waited for.
        """
        ...

    def above(
        self,
        scores: Float[Tensor, "n d_sae"],
        least: Float[Tensor, " d_sae"],
        error: Float[Tensor, " n"],
    ) -> tuple[Int64[Tensor, " n_plus_1"], Int32[Tensor, " nnz"]]:
        """All entries with scores_tj > least_j − error_t, as a selection, latents in order."""
        ...

    def products(
        self,
        x: Float[Tensor, "n d"],
        W: Float[Tensor, "d_sae d"],
        offsets: Int64[Tensor, " n_plus_1"],
        indices: Int[Tensor, " nnz"],
    ) -> Float[Tensor, " nnz"]:
        """⟨x_t, W_j⟩ of every entry."""
        ...

    def decode(
        self,
        W: Float[Tensor, "d_sae d"],
        offsets: Int64[Tensor, " n_plus_1"],
        indices: Int[Tensor, " nnz"],
        values: Float[Tensor, " nnz"],
    ) -> Float[Tensor, "n d"]:
        """Σ_j f_tj W_j of every row."""
        ...

    def reconstruct(
        self,
        W: Float[Tensor, "d_sae d"],
        offsets: Int64[Tensor, " n_plus_1"],
        indices: Int[Tensor, " nnz"],
        values: Float[Tensor, " nnz"],
        wanted: Float[Tensor, "n d"],
    ) -> tuple[Float[Tensor, "n d"], Float[Tensor, " nnz"]]:
        """r_t = wanted_t − Σ_j f_tj W_j, and ⟨r_t, W_j⟩ of every entry."""
        ...

    def by_latent(
        self, offsets: Int64[Tensor, " n_plus_1"], indices: Int[Tensor, " nnz"], d_sae: int
    ) -> ByLatent:
        """The same selection, read by latents."""
        ...

    def sums_by_latent(
        self, by_latent: ByLatent, values: Float[Tensor, " nnz"]
    ) -> Float[Tensor, " d_sae"]:
        """Σ of each latent's entries; the values come in the order of rows."""
        ...

    def weighted_sum(
        self, W: Float[Tensor, "m d"], weights: Float[Tensor, " m"]
    ) -> Float[Tensor, " d"]:
        """Σ_j weights_j W_j."""
        ...

    def weight_gradient(self, factor: Factor, d_sae: int) -> Float[Tensor, "d_sae d"]:
        """The gradient that a factor stands for."""
        ...

    def gradient_norm2(
        self, factors: list[Factor], W: Float[Tensor, "d_sae d"] | None
    ) -> Float64[Tensor, ""]:
        """Squared norm of the sum of `factors`; with W, less each row's part along W_j."""
        ...

    def adam_(
        self,
        W: Float[Tensor, "d_sae d"],
        exp_avg: Float[Tensor, "d_sae d"],
        exp_avg_sq: Float[Tensor, "d_sae d"],
        factors: list[Factor],
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
        """One step of Adam on W, whose gradient is `scale` times the sum of `factors`.

        `step` counts from 1. With `unit` the gradient loses its part along each row of W, and rows
        are brought back to norm 1. `shadow` receives the new rows in bfloat16; of C++ in int8 too.
        Triton's reads numbers that are tensors on the device, without waiting for them.
        """
        ...
