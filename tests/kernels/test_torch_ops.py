"""The operations in PyTorch that are more than a call of it, against plain definitions."""

import pytest
import torch

from sae_runner.kernels import torch_ops
from sae_runner.kernels.base import Factor

D, D_SAE = 6, 50


@pytest.fixture(params=[1, 7 * 8 * D, 2**21])
def some_at_a_time(request, monkeypatch):
    """One latent at a time, seven, or all."""
    monkeypatch.setattr(torch_ops, "GRADIENT_BYTES", request.param)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def factor_of(n, seed):
    """A factor, in which some rows and some latents have no entry, and its dense gradient."""
    acts = drawn(n, D_SAE, seed=seed)
    active = acts > 1
    active[::3], active[:, ::4] = False, False
    indices = active.nonzero()[:, 1].int()
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), active.sum(1).cumsum(0)])
    x = drawn(n, D, seed=seed + 1)
    by_latent = torch_ops.by_latent(offsets, indices, D_SAE)
    return Factor(by_latent, acts[active], x), (acts * active).T @ x


def without_parallel(gradient, W):
    direction = W / W.norm(dim=1, keepdim=True)
    return gradient - (gradient * direction).sum(1, keepdim=True) * direction


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("n", "d_sae", "k"), [(3, 4096, 48), (2, 4096, 1), (5, 1600, 50), (2, 1601, 7), (1, 64, 64)]
)
def test_topk(n, d_sae, k, dtype):
    scores = drawn(n, d_sae).to(dtype)
    scores[0, d_sae // 2 :] = -torch.inf
    places = torch_ops.topk(scores, k).long()
    assert all(len(set(row.tolist())) == k for row in places)
    found = scores.gather(1, places).sort(dim=1, descending=True).values
    assert torch.equal(found, scores.sort(dim=1, descending=True).values[:, :k])


def test_the_largest_may_all_be_of_one_group():
    scores = drawn(2, 4096)
    scores[:, 5::256] += 100  # Sixteen, each in group 5 of 256.
    expected = set(range(5, 4096, 256))
    assert {*torch_ops.topk(scores, 8)[0].tolist()} < expected
    assert expected < {*torch_ops.topk(scores, 20)[1].tolist()}


@pytest.mark.parametrize(("k", "d_sae"), [(1, 2000), (5, 2000), (5, 300)])
def test_largest_within_looks_further_where_that_may_be_needed(k, d_sae):
    """Scores of row 0 are right, of row 1 off by their differences, of row 2 by far more."""
    x, W, b = drawn(3, 8).float(), drawn(d_sae, 8, seed=1).float(), drawn(d_sae, seed=2).float()
    exact = x @ W.T + b
    off = torch.tensor([0.0, 1.0, 300.0]).unsqueeze(1) * drawn(3, d_sae, seed=3)
    scores = (exact + off).bfloat16()
    values, indices, looked_at = torch_ops.largest_within(scores, None, x, W, b, k)
    expected = exact.topk(k)
    torch.testing.assert_close(values.sort(descending=True).values, expected.values)
    assert torch.equal(indices.long().sort().values, expected.indices.sort().values)
    assert 3 * torch_ops.n_candidates(k) + d_sae <= looked_at < 3 * d_sae
    sure = torch_ops.largest_within(scores[:1], None, x[:1], W, b, k)
    assert sure[2] == torch_ops.n_candidates(k)


@pytest.mark.usefixtures("some_at_a_time")
@pytest.mark.parametrize("unit", [False, True])
def test_gradient_norm(unit):
    (one, of_one), (two, of_two) = factor_of(40, 1), factor_of(9, 3)
    W, gradient = drawn(D_SAE, D), of_one + of_two
    wanted = without_parallel(gradient, W) if unit else gradient
    found = torch_ops.gradient_norm2([one, two], W if unit else None)
    assert found.item() == pytest.approx(float(wanted.square().sum()), rel=1e-12)


@pytest.mark.usefixtures("some_at_a_time")
@pytest.mark.parametrize("scale", [1.0, torch.tensor(0.3)])
@pytest.mark.parametrize("unit", [False, True])
def test_adam_is_pytorchs(unit, scale):
    expected = torch.nn.Parameter(drawn(D_SAE, D, seed=7))
    if unit:
        expected.data /= expected.data.norm(dim=1, keepdim=True)
    W = expected.detach().clone()
    m, v, shadow = torch.zeros_like(W), torch.zeros_like(W), torch.zeros_like(W).bfloat16()
    numbers = {"lr": 0.02, "eps": 1e-5}
    optimizer = torch.optim.Adam([expected], betas=(0.8, 0.95), **numbers)
    for step in range(1, 5):
        (one, of_one), (two, of_two) = factor_of(40, 10 * step), factor_of(9, 10 * step + 5)
        gradient = of_one + of_two
        if unit:
            gradient = without_parallel(gradient, expected.detach())
        expected.grad = scale * gradient
        optimizer.step()
        if unit:
            expected.data /= expected.data.norm(dim=1, keepdim=True)
        versions = [tensor._version for tensor in (W, m, v, shadow)]
        torch_ops.adam_(
            W, m, v, [one, two], beta1=0.8, beta2=0.95, step=step, scale=scale, unit=unit,
            shadow=shadow, **numbers,
        )  # fmt: skip
        now = [tensor._version for tensor in (W, m, v, shadow)]
        assert all(new > old for new, old in zip(now, versions, strict=True))
        torch.testing.assert_close(W, expected.detach(), rtol=1e-6, atol=1e-9)
        assert torch.equal(shadow, W.bfloat16())
    state = optimizer.state[expected]
    torch.testing.assert_close(m, state["exp_avg"], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(v, state["exp_avg_sq"], rtol=1e-6, atol=1e-9)
