"""Pre-activations and reconstructions of selected latents, and their gradients, all sparse.

No [n, d_sae] latents and no products with them: forwards and backwards only entries of the
selection are touched. Gradients of weights are factors; a `Tape` keeps them for an optimizer that
takes them row by row, else they become the usual dense gradient.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor

from sae_runner.kernels.base import ByLatent, Factor, Ops
from sae_runner.kernels.choice import ops_for


class Selection:
    """Which latents of each row are looked at, in CSR form; read by latents when first asked."""

    def __init__(
        self, offsets: Int64[Tensor, " n_plus_1"], indices: Int[Tensor, " nnz"], d_sae: int
    ) -> None:
        self.offsets, self.indices, self.d_sae = offsets, indices.int(), d_sae
        self._by_latent: ByLatent | None = None

    def by_latent(self, ops: Ops) -> ByLatent:
        """The same selection, read by latents."""
        if self._by_latent is None:
            self._by_latent = ops.by_latent(self.offsets, self.indices, self.d_sae)
        return self._by_latent


class Tape:
    """Gradients of weight matrices, as factors, by the parameter they belong to."""

    def __init__(self) -> None:
        self.factors: dict[Tensor, list[Factor]] = {}

    def add(self, W: Tensor, factor: Factor) -> None:
        """Add to the gradient of W."""
        self.factors.setdefault(W, []).append(factor)


_tape: ContextVar[Tape | None] = ContextVar("tape", default=None)


@contextmanager
def taped() -> Iterator[Tape]:
    """Gradients of what is computed within go to the tape, and not to `W.grad`."""
    tape = Tape()
    token = _tape.set(tape)
    try:
        yield tape
    finally:
        _tape.reset(token)


def tape_for(W: Tensor) -> Tape | None:
    """Where gradients of W go; those of a computed W go on to what it was computed from."""
    return _tape.get() if W.is_leaf else None


def selected_scores(
    x: Float[Tensor, "n d"],
    W: Float[Tensor, "d_sae d"],
    b: Float[Tensor, " d_sae"],
    centre: Float[Tensor, " d"] | None,
    selection: Selection,
    values: Float[Tensor, " nnz"],
    centred: Float[Tensor, "n d"],
) -> Float[Tensor, " nnz"]:
    """z_tj = ⟨x_t − centre, W_j⟩ + b_j of selected entries, whose `values` are known.

    So is x − centre, as `centred`. The gradient by W is a factor; that by `centre` is −Wᵀ (gradient
    by b), a matrix times a vector.
    """
    found: Tensor = _Scores.apply(x, W, b, centre, selection, values, centred, tape_for(W))
    return found


class _Scores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, b: Tensor, centre: Tensor | None, selection: Selection,
        values: Tensor, centred: Tensor, tape: Tape | None,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(W, centred)
        # CUDA's backward pass has a thread of its own, which knows nothing of `using`.
        ctx.selection, ctx.tape, ctx.ops = selection, tape, ops_for(W)
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        W, centred = ctx.saved_tensors
        selection: Selection = ctx.selection
        ops, g = ctx.ops, g.contiguous()
        by_latent = selection.by_latent(ops)
        g_x = g_W = g_b = g_centre = None
        if ctx.needs_input_grad[0]:
            g_x = ops.decode(W, selection.offsets, selection.indices, g)
        if ctx.needs_input_grad[1]:
            g_W = _gradient(ctx.tape, W, Factor(by_latent, g, centred), ops)
        if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
            g_b = ops.sums_by_latent(by_latent, g)
            if ctx.needs_input_grad[3]:
                g_centre = -ops.weighted_sum(W, g_b)
        return g_x, g_W, g_b, g_centre, None, None, None, None


class Reconstruction(NamedTuple):
    """Rows as latents give them."""

    x_hat: Float[Tensor, "n d"]
    square: Float[Tensor, " n"]
    """‖target − x̂‖² of each row."""
    residual: Float[Tensor, "n d"]
    """target − x̂; no gradient flows through it."""

    @classmethod
    def of(cls, target: Float[Tensor, "n d"], x_hat: Float[Tensor, "n d"]) -> "Reconstruction":
        """Of an x̂ that was made in another way."""
        residual = target - x_hat
        return cls(x_hat, residual.square().sum(1), residual.detach())


def reconstruct(
    values: Float[Tensor, " nnz"],
    W: Float[Tensor, "d_sae d"],
    base: Float[Tensor, " d"] | Float[Tensor, "n d"],
    target: Float[Tensor, "n d"],
    selection: Selection,
    wanted: Float[Tensor, "n d"] | None = None,
) -> Reconstruction:
    """x̂_t = base + Σ_j f_tj W_j, and ‖target_t − x̂_t‖².

    One pass over the chosen rows of W gives x̂, the error and ⟨error, W_j⟩, which is what the
    gradient of the squared error by f_tj is made of. `wanted` is target − base, if it is there.
    """
    if wanted is None:
        wanted = target.detach() - base.detach()
    return Reconstruction(
        *_Reconstruction.apply(values, W, base, target, wanted, selection, tape_for(W))
    )


class _Reconstruction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, W: Tensor, base: Tensor, target: Tensor, wanted: Tensor,
        selection: Selection, tape: Tape | None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        ctx.ops = ops_for(W)
        residual, products = ctx.ops.reconstruct(
            W, selection.offsets, selection.indices, values, wanted.contiguous()
        )
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(values, W, residual, products)
        ctx.selection, ctx.tape, ctx.base_dims = selection, tape, base.ndim
        ctx.mark_non_differentiable(residual)
        # The norm reads the rows once, and writes no squares.
        square = torch.linalg.vector_norm(residual, dim=1).square()
        return target - residual, square, residual

    @staticmethod
    def backward(ctx: Any, g_x_hat: Tensor | None, g_square: Tensor | None, _: object) -> Any:
        values, W, residual, products = ctx.saved_tensors
        selection: Selection = ctx.selection
        ops: Ops = ctx.ops
        if g_square is None and g_x_hat is None:
            return None, None, None, None, None, None, None
        # The gradient of x̂ is `scale` times `rows`: by the squared error the residual, as it is.
        if g_x_hat is None:
            assert g_square is not None
            rows, scale = residual, -2 * g_square
        else:
            rows, scale = g_x_hat, None
            if g_square is not None:
                rows = torch.addcmul(rows, residual, g_square.unsqueeze(1), value=-2)
        rows, coefs = rows.contiguous(), values.detach()
        of_entries = None
        if scale is not None:
            of_entries = torch.repeat_interleave(  # Of a size that no device is asked for.
                scale, selection.offsets.diff(), output_size=len(products)
            )
            coefs = coefs * of_entries
        g_values = g_W = g_base = g_target = None
        if ctx.needs_input_grad[0]:
            if of_entries is not None:
                g_values = products * of_entries
            else:
                g_values = ops.products(rows, W, selection.offsets, selection.indices)
        if ctx.needs_input_grad[1]:
            g_W = _gradient(ctx.tape, W, Factor(selection.by_latent(ops), coefs, rows), ops)
        if ctx.needs_input_grad[2]:
            if ctx.base_dims == 1:
                g_base = rows.sum(0) if scale is None else ops.weighted_sum(rows, scale)
            else:
                g_base = rows if scale is None else rows * scale.unsqueeze(1)
        if ctx.needs_input_grad[3] and g_square is not None:
            g_target = residual * (2 * g_square).unsqueeze(1)
        return g_values, g_W, g_base, g_target, None, None, None


def per_latent(vector: Float[Tensor, " d_sae"], selection: Selection) -> Float[Tensor, " nnz"]:
    """vector[j] of every entry; its gradient is summed in an order that does not vary."""
    found: Tensor = _PerLatent.apply(vector, selection)
    return found


class _PerLatent(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, vector: Tensor, selection: Selection) -> Tensor:
        ctx.selection, ctx.ops = selection, ops_for(vector)
        return vector[selection.indices.long()]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        selection: Selection = ctx.selection
        ops: Ops = ctx.ops
        return ops.sums_by_latent(selection.by_latent(ops), g.contiguous()), None


def rows_of(W: Float[Tensor, "d_sae d"], latents: Int64[Tensor, " m"]) -> Float[Tensor, "m d"]:
    """W[latents], each at most once: the gradient is that of these rows alone."""
    found: Tensor = _Rows.apply(W, latents, tape_for(W))
    return found


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, W: Tensor, latents: Tensor, tape: Tape | None) -> Tensor:
        ctx.save_for_backward(W, latents)
        ctx.tape, ctx.ops = tape, ops_for(W)
        return W[latents]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        W, latents = ctx.saved_tensors
        ops, m = ctx.ops, len(latents)
        offsets = torch.arange(m + 1, device=W.device)
        by_latent = ops.by_latent(offsets, latents.int(), len(W))
        factor = Factor(by_latent, g.new_ones(m), g.contiguous())
        return _gradient(ctx.tape, W, factor, ops), None, None


def _gradient(tape: Tape | None, W: Tensor, factor: Factor, ops: Ops) -> Tensor | None:
    """What a backward pass returns for W."""
    if tape is None:
        return ops.weight_gradient(factor, len(W))
    tape.add(W, factor)
    return None
