"""The Triton kernels against dense definitions in float64.

Without a CUDA device they run in Triton's interpreter, which must be chosen before Triton is
imported: in a process of its own, which runs this file again.
"""

import math
import os
import subprocess
import sys

import pytest
import torch

from sae_runner.kernels import triton_ops
from sae_runner.kernels.base import Factor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not triton_ops.available(), reason="no CUDA device"),
]
DEVICES = ["cpu"] if INTERPRETED else [pytest.param("cuda", marks=on_gpu)]
SETTINGS = dict(lr=0.02, beta1=0.9, beta2=0.999, eps=1e-8)


@pytest.fixture(params=DEVICES)
def device(request):
    torch.manual_seed(0)
    return request.param


def test_in_the_interpreter():
    pytest.importorskip("triton")
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-k", "not in_the_interpreter", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stdout[-3000:]
    assert " passed" in finished.stdout and "skipped" not in finished.stdout.splitlines()[-1]


def test_not_available_without_a_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert triton_ops.available.__wrapped__() is False


def close(found, wanted, tolerance=1e-6):
    """By the norm of the difference: float32 sums in any order."""
    assert found.shape == wanted.shape
    difference = (found.double().cpu() - wanted.double().cpu()).norm()
    assert difference <= tolerance * wanted.double().norm() + 1e-30


def selection(counts, d_sae, device):
    """A CSR selection with so many different latents in each row: (offsets, indices, values)."""
    rows = [torch.randperm(d_sae)[:count] for count in counts]
    offsets = torch.tensor([0, *counts]).cumsum(0)
    indices = torch.cat([*rows, torch.empty(0, dtype=torch.int64)]).int()
    return offsets.to(device), indices.to(device), torch.randn(len(indices), device=device)


def dense_of(offsets, indices, values, d_sae):
    """The same as a float64 matrix [n, d_sae] on the CPU."""
    matrix = torch.zeros(len(offsets) - 1, d_sae, dtype=torch.float64)
    bounds = offsets.tolist()
    for row in range(len(matrix)):
        mine = slice(bounds[row], bounds[row + 1])
        matrix[row, indices[mine].long().cpu()] = values[mine].double().cpu()
    return matrix


# d = 20 and 300 are no powers of two, and 300 is more than one block; rows without an entry; more
# entries than are taken at once; nothing at all.
SHAPES = [
    ([3, 0, 37, 1], 40, 20),
    ([5], 7, 300),
    ([2, 2], 2, 1),
    ([0, 0, 0], 5, 16),
    ([2, 75, 0, 0, 0, 0], 80, 280),
]


@pytest.fixture(params=SHAPES, ids=str)
def case(request, device):
    counts, d_sae, d = request.param
    W = torch.randn(d_sae, d, device=device)
    x = torch.randn(len(counts), d, device=device)
    return *selection(counts, d_sae, device), W, x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("n", "width", "k"),
    [(1, 1, 1), (2, 37, 1), (2, 100, 97), (2, 100, 100), (2, 4500, 20), (1, 5000, 600)],
)
def test_topk(device, dtype, n, width, k):
    scores = torch.randn(n, width, device=device).to(dtype)
    places = triton_ops.topk(scores, k)
    assert places.dtype == torch.int32 and places.shape == (n, k)
    for row, found in zip(scores.float().cpu(), places.long().cpu(), strict=True):
        assert len(set(found.tolist())) == k
        wanted = row.sort(descending=True).values[:k]
        assert torch.equal(row[found].sort(descending=True).values, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_topk_of_equals_infinities_and_nan(device, dtype):
    nan, inf = math.nan, math.inf
    rows = torch.zeros(5, 3000)
    rows[1, 2999], rows[1, 7] = 1, -1
    rows[2] = nan
    rows[2, [5, 2500]] = torch.tensor([-inf, -3e38])
    rows[2, 100:200] = -torch.tensor(nan)
    rows[3] = torch.arange(3000) % 7
    rows[4] = -inf
    rows[4, :2000] = nan
    rows[4, 2100] = inf
    scores = rows.to(dtype).to(device)
    places = triton_ops.topk(scores, 4).long().cpu()
    assert all(len(set(row.tolist())) == 4 for row in places)
    assert places.min() >= 0 and places.max() < 3000
    chosen = scores.float().cpu().gather(1, places)
    assert (chosen[0] == 0).all()
    assert chosen[1].tolist().count(0) == 3 and 1 in chosen[1]
    assert {5, 2500} < set(places[2].tolist())
    assert (chosen[3] == 6).all()
    assert sorted(chosen[4].tolist()) == [-inf, -inf, -inf, inf]
    assert torch.equal(triton_ops.topk(scores, 4).long().cpu(), places)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sign", [1, -1])
def test_topk_of_neighbours(device, dtype, sign):
    """Numbers that differ in their last bit; and a row ends where the next one begins."""
    integers = torch.int16 if dtype == torch.bfloat16 else torch.int32
    bits = sign * torch.tensor(1.5, dtype=dtype)
    below = torch.stack([torch.randperm(3000) for _ in range(4)]).to(integers)
    scores = (bits.view(integers) - below).view(dtype)
    scores[0, 952:962] = 3  # Of the same groups as what would be places 3000 to 3009.
    scores[1, :10] = 5
    ordered = scores.float().sort(descending=True).values
    for k in (30, 31):
        places = triton_ops.topk(scores.to(device), k).long().cpu()
        assert places.max() < 3000
        found = scores.float().gather(1, places).sort(descending=True).values
        assert torch.equal(found, ordered[:, :k])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_topk_beyond_what_a_program_holds(device, dtype, monkeypatch):
    monkeypatch.setattr(triton_ops, "MOST_SURVIVORS", 16)
    scores = torch.randn(2, 50, device=device).to(dtype)
    scores[0, 1:48] = math.nan
    places = triton_ops.topk(scores, 20).long().cpu()
    assert {0, 48, 49} < set(places[0].tolist()) and len(set(places[0].tolist())) == 20
    wanted = scores[1].float().cpu().sort(descending=True).values[:20]
    assert torch.equal(scores[1].float().cpu()[places[1]].sort(descending=True).values, wanted)


@pytest.mark.parametrize(
    ("n", "m", "k", "d"), [(2, 12, 8, 20), (1, 1, 1, 1), (2, 70, 70, 300), (1, 300, 9, 16)]
)
def test_rescore(device, n, m, k, d):
    d_sae = 400
    x, W, b = torch.randn(n, d), torch.randn(d_sae, d), torch.randn(d_sae)
    candidates = torch.stack([torch.randperm(d_sae)[:m] for _ in range(n)])
    given = (tensor.to(device) for tensor in (x, W, b, candidates.int()))
    values, indices = triton_ops.rescore(*given, k)
    assert values.shape == indices.shape == (n, k) and indices.dtype == torch.int32
    exact = x.double() @ W.double().T + b.double()
    wanted = candidates.gather(1, exact.gather(1, candidates).topk(k).indices)
    assert torch.equal(indices.long().cpu().sort().values, wanted.sort().values)
    close(values, exact.gather(1, indices.long().cpu()))


def test_rescore_never_prefers_nan(device):
    x = torch.ones(1, 3, device=device)
    W = torch.arange(8.0, device=device)[:, None].expand(8, 3).contiguous()
    W[5] = math.nan
    candidates = torch.tensor([[5, 0, 1, 6]], dtype=torch.int32, device=device)
    values, indices = triton_ops.rescore(x, W, torch.zeros(8, device=device), candidates, 2)
    assert sorted(indices[0].tolist()) == [1, 6] and sorted(values[0].tolist()) == [3, 18]


def test_products(case):
    offsets, indices, _, W, x = case
    found = triton_ops.products(x, W, offsets, indices)
    every = x.double() @ W.double().T
    row = torch.repeat_interleave(torch.arange(len(x), device=x.device), offsets.diff())
    close(found, every[row, indices.long()])


def test_decode(case):
    offsets, indices, values, W, _ = case
    wanted = dense_of(offsets, indices, values, len(W)) @ W.double().cpu()
    close(triton_ops.decode(W, offsets, indices, values), wanted)


def test_reconstruct(case):
    offsets, indices, values, W, x = case
    residual, products = triton_ops.reconstruct(W, offsets, indices, values, x)
    wanted = x.double().cpu() - dense_of(offsets, indices, values, len(W)) @ W.double().cpu()
    close(residual, wanted)
    row = torch.repeat_interleave(torch.arange(len(x)), offsets.diff().cpu())
    close(products, (wanted @ W.double().cpu().T)[row, indices.long().cpu()])


# The last needs keys of more than 16 bits.
@pytest.mark.parametrize(
    ("counts", "d_sae"),
    [([3, 0, 17, 1, 0], 40), ([0, 4], 9), ([0], 40), ([2] * 300, 4), ([0, 2], 65_537)],
)
def test_by_latent(device, d_sae, counts):
    offsets, indices, _ = selection(counts, d_sae, device)
    if len(indices):
        indices[0] = d_sae - 1  # The end of the range, as often as may be.
    starts, rows, entries = triton_ops.by_latent(offsets, indices, d_sae)
    assert (starts.dtype, rows.dtype, entries.dtype) == (torch.int64, torch.int32, torch.int32)
    latents = indices.tolist()
    wanted = sorted(range(len(latents)), key=lambda entry: latents[entry])
    assert entries.tolist() == wanted
    row = [t for t, count in enumerate(counts) for _ in range(count)]
    assert rows.tolist() == [row[entry] for entry in wanted]
    counted = torch.bincount(indices.long().cpu(), minlength=d_sae).cumsum(0)
    assert starts.tolist() == [0, *counted.tolist()]


def factor(fired, d_sae, d, device, scale=1.0):
    """A factor from who fires (bool [n, d_sae]), and its dense gradient in float64."""
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), fired.sum(1).cumsum(0)])
    indices = fired.nonzero()[:, 1].int()
    coefs, dense = scale * torch.randn(len(indices)), torch.randn(len(fired), d)
    gradient = dense_of(offsets, indices, coefs, d_sae).T @ dense.double()
    ordered = triton_ops.by_latent(offsets.to(device), indices.to(device), d_sae)
    return Factor(ordered, coefs.to(device), dense.to(device)), gradient


@pytest.fixture(params=[(1, 5, 3), (9, 6, 20), (300, 4, 5), (3, 3, 300)], ids=str)
def firing(request, device):
    """(who fires, d_sae, d, device): latent 0 in most rows, the last one never."""
    n, d_sae, d = request.param
    fired = torch.rand(n, d_sae) < 0.3
    fired[:, 0] = torch.rand(n) < 0.9
    fired[:, -1] = False
    return fired, d_sae, d, device


def test_weight_gradient(firing):
    made, wanted = factor(*firing)
    close(triton_ops.weight_gradient(made, firing[1]), wanted)


def test_sums_by_latent(firing):
    fired, d_sae, d, device = firing
    made, _ = factor(fired, d_sae, d, device)
    row, latent = fired.nonzero(as_tuple=True)
    dense = torch.zeros(fired.shape, dtype=torch.float64)
    dense[row, latent] = made.coefs.double().cpu()
    close(triton_ops.sums_by_latent(made.by_latent, made.coefs), dense.sum(0))


def test_sums_of_segments_are_used(device):
    """A latent over several segments, with and without what lies beside them; none written else."""
    segment = triton_ops.SEGMENT
    fired = torch.zeros(4 * segment, 3, dtype=torch.bool)
    fired[:5, 0], fired[: 3 * segment, 1], fired[-segment - 1 :, 2] = True, True, True
    made, wanted = factor(fired, 3, 4, device)
    sums = triton_ops._segment_sums(made)
    assert sums.shape == (4, 4)
    starts, rows, entries = (part.cpu() for part in made.by_latent)
    assert starts.tolist() == [0, 5, 3 * segment + 5, 4 * segment + 6]
    for whole in (1, 2):
        at = slice(whole * segment, (whole + 1) * segment)
        part = (
            made.coefs.double().cpu()[entries[at].long(), None]
            * made.dense.double().cpu()[rows[at].long()]
        )
        close(sums[whole], part.sum(0))
    close(triton_ops.weight_gradient(made, 3), wanted)


@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("both", [False, True])
def test_gradient_norm2(firing, unit, both):
    first, gradient = factor(*firing)
    factors = [first]
    if both:
        second, more = factor(torch.rand_like(firing[0], dtype=torch.float32) < 0.2, *firing[1:])
        factors, gradient = [first, second], gradient + more
    W = torch.randn(gradient.shape)
    if unit:
        gradient = orthogonal(gradient, W.double())
    found = triton_ops.gradient_norm2(factors, W.to(firing[3]) if unit else None)
    assert found.dtype == torch.float64 and found.shape == ()
    assert found.item() == pytest.approx(gradient.square().sum().item(), rel=1e-5)


def orthogonal(gradient, W):
    direction = W / W.norm(dim=1, keepdim=True)
    return gradient - (gradient * direction).sum(1, keepdim=True) * direction


def adam_by_torch(W, gradients, scale, unit):
    """The definition, in float64: torch's own Adam, with constraints around it."""
    W = W.double().requires_grad_()
    optimizer = torch.optim.Adam([W], SETTINGS["lr"], (0.9, 0.999), SETTINGS["eps"])
    for gradient in gradients:
        gradient = scale * gradient
        W.grad = orthogonal(gradient, W.detach()) if unit else gradient
        optimizer.step()
        if unit:
            W.data /= W.data.norm(dim=1, keepdim=True)
    state = optimizer.state[W]
    return W.detach(), state["exp_avg"], state["exp_avg_sq"]


@pytest.mark.parametrize("on_device", [False, True], ids=["numbers", "tensors"])
@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("both", [False, True])
def test_adam(firing, unit, both, on_device):
    fired, d_sae, d, device = firing
    W = torch.randn(d_sae, d)
    W /= W.norm(dim=1, keepdim=True)
    steps, gradients = [], []
    for step in range(3):
        firing_now = fired if step != 1 else torch.zeros_like(fired)  # Momentum alone moves.
        made = [factor(firing_now, d_sae, d, device)]
        if both:
            rare = torch.rand(fired.shape) < 0.1
            made.append(factor(rare, d_sae, d, device, scale=0.5))
        steps.append([part for part, _ in made])
        gradients.append(sum(gradient for _, gradient in made))
    found = [W.clone().to(device), *(torch.zeros(d_sae, d, device=device) for _ in range(2))]
    shadow = torch.full((d_sae, d), math.nan, dtype=torch.bfloat16, device=device)
    for step, factors in enumerate(steps, start=1):
        given = dict(SETTINGS, step=step, scale=0.3)
        if on_device:
            for name in ("lr", "step", "scale"):
                given[name] = torch.tensor(given[name], device=device)
        last = shadow if step == 3 else None
        assert triton_ops.adam_(*found, factors, unit=unit, shadow=last, **given) is None
    wanted = adam_by_torch(W, gradients, 0.3, unit)
    for one, other in zip(found, wanted, strict=True):
        close(one, other, tolerance=2e-6)
    close(found[0] - W.to(device), wanted[0] - W.double(), tolerance=2e-5)
    # The interpreter cuts the bits off, where a device rounds.
    tolerance = 2**-7 if INTERPRETED else 0
    torch.testing.assert_close(shadow, found[0].bfloat16(), rtol=tolerance, atol=0)


def test_more_than_two_factors(firing):
    """Of different rows and latents, one of them without an entry."""
    fired, d_sae, d, device = firing
    others = [torch.rand(n, d_sae) < share for n, share in ((4, 0.5), (2, 0.0), (7, 0.3))]
    made = [factor(who, d_sae, d, device) for who in (fired, *others)]
    factors, gradient = [part for part, _ in made], sum(dense for _, dense in made)
    joined = triton_ops._joined(factors)
    close(triton_ops.weight_gradient(joined, d_sae), gradient)
    counts = joined.by_latent.starts.diff()
    assert counts.tolist() == sum(who.sum(0) for who in (fired, *others)).tolist()
    found = triton_ops.gradient_norm2(factors, None)
    assert found.item() == pytest.approx(gradient.square().sum().item(), rel=1e-5)
