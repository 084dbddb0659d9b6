"""Sparse scores and reconstructions against dense products, forwards and backwards."""

import pytest
import torch

from sae_runner.kernels import autograd, torch_ops
from sae_runner.kernels.autograd import (
    Selection,
    per_latent,
    reconstruct,
    rows_of,
    selected_scores,
    taped,
)  # fmt: skip
from sae_runner.kernels.choice import using

N, D, S = 7, 5, 11


@pytest.fixture
def drawn():
    """Weights, rows and a selection in which rows have 0 to 4 latents and some latents none."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    active = torch.rand(N, S, generator=generator) < 0.25
    active[2] = False
    active[:, 3] = False
    rows, indices = active.nonzero(as_tuple=True)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), active.sum(1).cumsum(0)])
    return normal, active, Selection(offsets, indices, S), rows, indices


def assert_same_gradients(found, expected, inputs, weight):
    """Of a scalar made of outputs, by inputs that need one."""
    a = torch.autograd.grad((found * weight).sum(), inputs, retain_graph=True)
    b = torch.autograd.grad((expected * weight).sum(), inputs)
    for mine, theirs in zip(a, b, strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("with_centre", [True, False])
def test_scores_have_the_gradient_of_the_dense_product(drawn, with_centre):
    normal, _, selection, rows, indices = drawn
    x, W, b = normal(N, D).requires_grad_(), normal(S, D).requires_grad_(), normal(S)
    b.requires_grad_()
    centre = normal(D).requires_grad_() if with_centre else None
    dense = ((x - centre if with_centre else x) @ W.T + b)[rows, indices]
    centred = (x - centre if with_centre else x).detach()
    sparse = selected_scores(x, W, b, centre, selection, dense.detach().clone(), centred)
    assert sparse.equal(dense)
    inputs = [t for t in (W, b, centre) if t is not None]
    assert_same_gradients(sparse, dense, inputs, normal(len(indices)))


def test_scores_have_a_gradient_by_rows_too(drawn):
    normal, _, selection, rows, indices = drawn
    x, W, b = normal(N, D).requires_grad_(), normal(S, D), normal(S)
    dense = (x @ W.T + b)[rows, indices]
    sparse = selected_scores(x, W, b, None, selection, dense.detach().clone(), x.detach())
    assert_same_gradients(sparse, dense, [x], normal(len(indices)))


@pytest.mark.parametrize("of", ["x_hat", "square", "both"])
@pytest.mark.parametrize("base_of_rows", [True, False])
@pytest.mark.parametrize("is_known", [True, False])
def test_reconstructions_and_their_errors_are_the_dense_ones(drawn, of, base_of_rows, is_known):
    normal, _, selection, rows, indices = drawn
    values, W = normal(len(indices)).requires_grad_(), normal(S, D).requires_grad_()
    base = (normal(N, D) if base_of_rows else normal(D)).requires_grad_()
    target = normal(N, D)
    acts = torch.zeros(N, S, dtype=torch.float64).index_put((rows, indices), values)
    dense = acts @ W + base
    dense_square = (target - dense).square().sum(1)
    wanted = (target - base).detach() if is_known else None
    x_hat, square, residual = reconstruct(values, W, base, target, selection, wanted)
    torch.testing.assert_close(x_hat, dense, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(square, dense_square, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(residual, target - dense.detach(), rtol=1e-13, atol=1e-13)
    assert not residual.requires_grad
    weight, weights = normal(N), normal(N, D)
    if of == "x_hat":
        assert_same_gradients(x_hat, dense, [values, W, base], weights)
    elif of == "square":
        assert_same_gradients(square, dense_square, [values, W, base], weight)
    else:
        found = (x_hat * weights).sum() + (square * weight).sum()
        expected = (dense * weights).sum() + (dense_square * weight).sum()
        assert_same_gradients(found, expected, [values, W, base], torch.ones(()))


def test_rows_and_numbers_of_latents_have_the_gradient_of_an_index(drawn):
    normal, _, selection, _, indices = drawn
    W, vector = normal(S, D).requires_grad_(), normal(S).requires_grad_()
    some = torch.tensor([9, 0, 4])
    assert_same_gradients(rows_of(W, some), W[some], [W], normal(3, D))
    assert_same_gradients(
        per_latent(vector, selection), vector[indices], [vector], normal(len(indices))
    )


def test_a_tape_keeps_factors_of_leaves_and_lets_others_through(drawn):
    normal, _, selection, _, indices = drawn
    W, made_of = normal(S, D).requires_grad_(), normal(S, D).requires_grad_()
    values, target = normal(len(indices)), normal(N, D)
    base = torch.zeros(D, dtype=torch.float64)
    reconstruct(values, W, base, target, selection).square.sum().backward()
    expected, W.grad = W.grad, None
    with taped() as tape:
        loss = reconstruct(values, W, base, target, selection).square.sum()
        loss = loss + reconstruct(values, 2 * made_of, base, target, selection).square.sum()
    loss.backward()  # Where it was computed counts, not where it is gone back through.
    assert W.grad is None and list(tape.factors) == [W]
    (factor,) = tape.factors[W]
    torch.testing.assert_close(torch_ops.weight_gradient(factor, S), expected)
    assert made_of.grad is not None


def test_a_backward_pass_is_by_the_kernels_of_its_forward_pass(monkeypatch):
    """Whatever is chosen by then, as on CUDA, where it has a thread of its own."""
    W = torch.randn(6, 4, requires_grad=True)
    selection = Selection(torch.tensor([0, 2, 3]), torch.tensor([1, 4, 0]), 6)
    with using("torch"):
        values, rows = torch.ones(3, requires_grad=True), torch.zeros(2, 4)
        square = reconstruct(values, W, rows[0], rows, selection).square.sum()
        scores = selected_scores(rows, W, W[:, 0], None, selection, values, rows).sum()
        total = square + scores + per_latent(W[:, 1], selection).sum()
        total = total + rows_of(W, torch.tensor([3])).sum()
    monkeypatch.setattr(autograd, "ops_for", None)
    total.backward()
    assert W.grad.isfinite().all()
