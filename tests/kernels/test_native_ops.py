"""The C++ kernels against dense definitions in NumPy and float64, and Adam against PyTorch's."""

import ctypes
import logging
import platform
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from sae_runner.kernels import _native_call, _native_library, int8, native_ops
from sae_runner.kernels.base import Factor, Int8Rows

SHAPES = [
    # n, d, d_sae, entries per row (mean)
    (1, 1, 1, 1), (1, 7, 5, 3), (5, 1, 9, 4), (16, 64, 40, 8), (33, 100, 257, 12),
    (64, 129, 30, 29), (7, 16, 3000, 0),
]  # fmt: skip


def load(level: str) -> ctypes.CDLL:
    """The library for a level; the test is skipped without a compiler or such a processor."""
    if level not in _native_library.supported_levels():
        pytest.skip(f"this processor has no {level}")
    if not _native_library.compiler():
        pytest.skip("no C++ compiler in PATH")
    return _native_library.load_level(level)


@pytest.fixture(params=_native_library.LEVELS)
def ops(request, monkeypatch):
    """The operations, at each level of instructions."""
    library = load(request.param)
    for module in (native_ops, _native_call, int8):
        monkeypatch.setattr(module, "load_library", lambda: library)
    return native_ops


@pytest.fixture(params=[1, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


class Case:
    """Random matrices and a random selection: some rows empty, latent 0 in every other row."""

    def __init__(self, n: int, d: int, d_sae: int, mean: int, seed: int = 0) -> None:
        generator = np.random.default_rng([seed, n, d, d_sae])
        self.n, self.d, self.d_sae = n, d, d_sae
        active = generator.random((n, d_sae)) < mean / d_sae
        active[::3] = False
        active[1::2, 0] = mean > 0
        chosen = [generator.permutation(np.flatnonzero(row)) for row in active]
        self.rows = np.repeat(np.arange(n), [len(row) for row in chosen])
        self.columns = np.concatenate(chosen)
        self.offsets = torch.tensor([0, *np.cumsum([len(row) for row in chosen])])
        self.indices = torch.tensor(self.columns, dtype=torch.int32)
        draw = lambda *shape: torch.tensor(generator.standard_normal(shape), dtype=torch.float32)  # noqa: E731
        self.x, self.W, self.b = draw(n, d), draw(d_sae, d), draw(d_sae)
        self.values = draw(len(self.columns))

    def dense(self, values: torch.Tensor) -> np.ndarray:
        acts = np.zeros((self.n, self.d_sae))
        acts[self.rows, self.columns] = values.double().numpy()
        return acts

    def factor(self, ops) -> Factor:
        return Factor(ops.by_latent(self.offsets, self.indices, self.d_sae), self.values, self.x)

    def gradient(self) -> np.ndarray:
        return self.dense(self.values).T @ self.x.double().numpy()


def close(found: torch.Tensor, wanted: np.ndarray, rtol: float = 1e-5) -> None:
    scale = np.abs(wanted).max(initial=1e-30)
    np.testing.assert_allclose(found.double().numpy(), wanted, rtol=0, atol=rtol * scale)


@pytest.fixture(params=SHAPES, ids=str)
def case(request) -> Case:
    return Case(*request.param)


# -- The k largest ---------------------------------------------------------------------------------


def best(scores: np.ndarray, k: int) -> np.ndarray:
    """Sorted places of the k largest of each row: NaN last, and of equal ones the first."""
    ranked = np.where(np.isnan(scores), -np.inf, scores)
    order = np.lexsort(
        (np.broadcast_to(np.arange(scores.shape[1]), scores.shape), np.isnan(scores), -ranked)
    )
    return np.sort(order[:, :k])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("n", "d_sae", "k"),
    [(1, 1, 1), (3, 5, 5), (4, 100, 7), (3, 5000, 1), (5, 5000, 48), (3, 2049, 256), (2, 3000, 700),
     (2, 3000, 3000), (40, 777, 776)],
)  # fmt: skip
def test_topk(ops, n, d_sae, k, dtype):
    generator = torch.Generator().manual_seed(n * d_sae + k)
    scores = torch.randn(n, d_sae, generator=generator).to(dtype)
    np.testing.assert_array_equal(ops.topk(scores, k).numpy(), best(scores.double().numpy(), k))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("d_sae", [90, 5000])
def test_topk_of_odd_rows(ops, d_sae, dtype):
    k, nan, inf = 40, float("nan"), float("inf")
    scores = torch.randn(9, d_sae, generator=torch.Generator().manual_seed(0))
    scores[0] = 1.5
    scores[1] = -2.0
    scores[2] = nan
    scores[3, ::2] = nan
    scores[4] = nan
    scores[4, 7:37] = -inf  # Fewer numbers than k.
    scores[5] = scores[5].round()  # Many ties.
    scores[6] = scores[6].relu()
    scores[7, :50], scores[7, 50:] = inf, -inf
    scores[8] = -scores[8].abs()
    scores = scores.to(dtype)
    scores[3, 1:18:6] = -scores[3, 0]  # NaN with the other sign.
    np.testing.assert_array_equal(ops.topk(scores, k).numpy(), best(scores.double().numpy(), k))


def test_topk_of_equal_rows_beyond_16_bits(ops):
    """As many ties as an int16 cannot count."""
    scores = torch.zeros(2, 70_000, dtype=torch.bfloat16)
    scores[1, 66_000] = 1
    assert ops.topk(scores, 3).tolist() == [[0, 1, 2], [0, 1, 66_000]]
    assert ops.topk(scores, 40_000)[1].tolist() == [*range(39_999), 66_000]


def scores_off_by(error, n=19, d=37, d_sae=900, seed=1):
    """Rows and weights, and scores in bfloat16 that are off by up to `error` of each row."""
    generator = torch.Generator().manual_seed(seed)
    x, W = (torch.randn(rows, d, generator=generator) for rows in (n, d_sae))
    b = torch.randn(d_sae, generator=generator)
    off = 2 * torch.rand(n, d_sae, generator=generator) - 1
    return (x @ W.T + b + off * error.unsqueeze(1)).bfloat16(), x, W, b


@pytest.mark.parametrize("d_sae", [900, 2500])  # Below and above what is searched by groups.
@pytest.mark.parametrize("k", [1, 6, 200])
def test_largest_within(ops, d_sae, k):
    error = torch.linspace(0, 3, 19)
    scores, x, W, b = scores_off_by(error, d_sae=d_sae)
    values, indices, looked_at = ops.largest_within(scores, error, x, W, b, k)
    exact = x.double().numpy() @ W.double().numpy().T + b.double().numpy()
    expected = best(exact, k)
    np.testing.assert_array_equal(indices.numpy(), expected)  # In the order of latents.
    close(values, np.take_along_axis(exact, expected.astype(np.int64), 1))
    # All that may be among them, and no others.
    kth = scores.float().topk(k).values.amin(1)
    cut = (kth - 2 * error - kth.abs() / 128).bfloat16()
    assert looked_at == (scores >= cut.unsqueeze(1)).sum()
    assert not np.array_equal(best(scores.double().numpy(), k), expected)


def test_largest_within_of_odd_rows(ops):
    nan, inf = float("nan"), float("inf")
    error = torch.full((19,), 0.5)
    scores, x, W, b = scores_off_by(error)
    x[3], W[7], error[4], scores[5, ::2], scores[6] = nan, nan, inf, nan, nan
    scores[:, 7] = nan
    values, indices, _ = ops.largest_within(scores, error, x, W, b, 10)
    assert len(set(indices[3].tolist())) == 10 and values[3].isnan().all()
    exact = x.double().numpy() @ W.double().numpy().T + b.double().numpy()
    wanted = best(np.where(np.isnan(exact), -np.inf, exact), 10)
    for t in (0, 4, 6):  # Of 6 no score is known: all are candidates.
        np.testing.assert_array_equal(indices[t].numpy(), wanted[t])
    with pytest.raises(ValueError, match=r"k must lie in 1\.\.900, not be 901"):
        ops.largest_within(scores, error, x, W, b, 901)
    with pytest.raises(ValueError, match="error must be known"):
        ops.largest_within(scores, None, x, W, b, 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("n", "d_sae"), [(1, 1), (5, 63), (40, 1000)])
def test_above(ops, n, d_sae, dtype):
    generator = torch.Generator().manual_seed(d_sae)
    scores = torch.randn(n, d_sae, generator=generator).to(dtype)
    scores[0, 0] = float("nan")
    least = torch.randn(d_sae, generator=generator)
    least[-1] = scores[-1, -1].float()  # Not above it.
    error = torch.rand(n, generator=generator)
    error[-1] = 0
    offsets, indices = ops.above(scores, least, error)
    rows, columns = np.nonzero(scores.float().numpy() > least.numpy() - error.numpy()[:, None])
    np.testing.assert_array_equal(offsets.numpy(), np.cumsum([0, *np.bincount(rows, minlength=n)]))
    np.testing.assert_array_equal(indices.numpy(), columns)


# -- Rows in int8 ----------------------------------------------------------------------------------


def whole_numbers(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows in whole steps, and the step of each: a 127th of the largest entry."""
    most = np.abs(rows).max(1, keepdims=True)
    scale = np.divide(np.float32(127), most, out=np.zeros_like(most), where=most > 0)
    return np.rint(rows * scale).astype(np.int64), (most / np.float32(127))[:, 0]


def unpacked(tiles: torch.Tensor, d: int) -> np.ndarray:
    """Numbers of tiles, [d_sae, d]: a panel has 16 latents, a line four columns of each."""
    panels = tiles.view(-1, -(-d // 64), 16, 16, 4)
    return panels.permute(0, 3, 1, 2, 4).reshape(len(panels) * 16, -1).long().numpy()


def lost_of(rows: torch.Tensor) -> np.ndarray:
    """The length of what is less than half a step, times the root of its share of the columns."""
    zeros = whole_numbers(rows.numpy())[0] == 0
    return np.sqrt((rows.double().numpy() ** 2 * zeros).sum(1) * zeros.mean(1))


INT8_SHAPES = [(1, 1, 1), (3, 64, 32), (33, 65, 31), (40, 100, 257), (300, 129, 600)]


@pytest.mark.parametrize(("n", "d", "d_sae"), INT8_SHAPES)
def test_rows_in_int8(ops, n, d, d_sae):
    W = Case(n, d, d_sae, 1).W
    W[0] = 0
    found = Int8Rows.empty(d_sae, d)
    int8.write(W, found)
    numbers, steps = whole_numbers(W.numpy())
    read = unpacked(found.tiles, d)
    np.testing.assert_array_equal(read[:d_sae, :d], numbers)
    assert not read[d_sae:].any() and not read[:, d:].any()
    np.testing.assert_allclose(found.steps[:d_sae].numpy(), steps, rtol=1e-6)
    close(found.lengths[:d_sae], np.linalg.norm(W.double().numpy(), axis=1), rtol=1e-6)
    close(found.lost[:d_sae], lost_of(W), rtol=1e-5)


@pytest.fixture
def multiplies(ops):
    """Where int8 can be multiplied."""
    if not int8.available():
        out = torch.zeros(1, 1, dtype=torch.bfloat16)
        with pytest.raises(RuntimeError, match="no matrices of int8"):
            int8.scores(torch.zeros(1, 1), Int8Rows.empty(1, 1), torch.zeros(1), out)
        pytest.skip("no matrices of int8")


@pytest.mark.parametrize(("n", "d", "d_sae"), INT8_SHAPES)
def test_scores_in_int8(multiplies, n, d, d_sae):
    case = Case(n, d, d_sae, 1)
    x, W, b = case.x, case.W, case.b
    x[0], x[-1, 0] = 0, 1000
    rows, beyond = Int8Rows.empty(d_sae, d), torch.full((n + 1, d_sae), 9.0, dtype=torch.bfloat16)
    int8.write(W, rows)
    error = int8.scores(x, rows, b, beyond[:n])
    assert (beyond[n] == 9).all()
    (in_x, a), (in_W, w) = whole_numbers(x.numpy()), whole_numbers(W.numpy())
    expected = (in_x @ in_W.T) * a[:, None].astype(float) * w.astype(float) + b.double().numpy()
    found = beyond[:n].double().numpy()
    np.testing.assert_allclose(found, expected, rtol=2**-8, atol=1e-6 * np.abs(expected).max())
    longest = np.linalg.norm(W.double().numpy(), axis=1).max()
    squares = (x.double().numpy() ** 2).sum(1)
    variance = ((a.astype(float) * longest) ** 2 + squares * float(w.max()) ** 2) / 12
    lost = lost_of(x) * longest + np.sqrt(squares) * lost_of(W).max()
    np.testing.assert_allclose(error, 4 * np.sqrt(variance) + lost, rtol=1e-4)


def test_the_error_of_scores_in_int8_is_no_exaggeration(multiplies):
    case = Case(200, 300, 1000, 1)
    rows, scores = Int8Rows.empty(1000, 300), torch.empty(200, 1000, dtype=torch.bfloat16)
    int8.write(case.W, rows)
    error = int8.scores(case.x, rows, case.b, scores).double().numpy()[:, None]
    exact = case.x.double().numpy() @ case.W.double().numpy().T + case.b.double().numpy()
    off = np.abs(scores.double().numpy() - exact)
    assert (off <= error + np.abs(exact) / 256).all() and (off > error / 2).mean() > 0.001


def test_scores_in_int8_of_odd_rows(multiplies):
    nan, inf = float("nan"), float("inf")
    case = Case(16, 70, 40, 1)
    case.x[1, 69], case.x[2, 3], case.x[3] = nan, inf, 1e-38
    case.W[5, 0], case.W[6, 1] = nan, -inf
    rows, scores = Int8Rows.empty(40, 70), torch.empty(16, 40, dtype=torch.bfloat16)
    int8.write(case.W, rows)
    error = int8.scores(case.x, rows, case.b, scores)
    odd = torch.zeros(16, 40, dtype=torch.bool)
    odd[1:3], odd[:, 5:7] = True, True
    assert torch.equal(scores.isnan(), odd) and (error == inf).all()
    assert torch.equal(scores[3, 7:], case.b[7:].bfloat16())


# -- Rows of the batch -----------------------------------------------------------------------------


def test_products(ops, case):
    scores = case.x.double().numpy() @ case.W.double().numpy().T
    found = ops.products(case.x, case.W, case.offsets, case.indices)
    close(found, scores[case.rows, case.columns])


def test_decode(ops, case):
    found = ops.decode(case.W, case.offsets, case.indices, case.values)
    close(found, case.dense(case.values) @ case.W.double().numpy())


def test_reconstruct(ops, case):
    residual, products = ops.reconstruct(case.W, case.offsets, case.indices, case.values, case.x)
    W = case.W.double().numpy()
    wanted = case.x.double().numpy() - case.dense(case.values) @ W
    close(residual, wanted)
    close(products, (wanted @ W.T)[case.rows, case.columns], rtol=3e-5)


# -- Rows of the weights ---------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [*SHAPES, (600, 1, 400, 300)], ids=str)
def test_by_latent(ops, shape, threads):
    case = Case(*shape)
    # Of the last, several threads count a part each.
    assert len(case.columns) > 2**16 or shape in SHAPES
    order = np.argsort(case.columns, kind="stable")
    counts = np.bincount(case.columns, minlength=case.d_sae)
    starts, rows, entries = ops.by_latent(case.offsets, case.indices, case.d_sae)
    np.testing.assert_array_equal(starts.numpy(), [0, *np.cumsum(counts)])
    np.testing.assert_array_equal(rows.numpy(), case.rows[order])
    np.testing.assert_array_equal(entries.numpy(), order)


def test_sums_by_latent(ops, case):
    by_latent = ops.by_latent(case.offsets, case.indices, case.d_sae)
    close(ops.sums_by_latent(by_latent, case.values), case.dense(case.values).sum(0))


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_weighted_sum(ops, case, share):
    """Also where most weights are zero, whose rows may hold anything."""
    weights = torch.where(
        torch.rand(case.d_sae, generator=torch.Generator().manual_seed(1)) < share, case.b, 0
    )
    expected = weights.double().numpy() @ case.W.double().numpy()
    case.W[weights == 0] = torch.nan
    close(ops.weighted_sum(case.W, weights), expected)


def test_weight_gradient(ops, case):
    close(ops.weight_gradient(case.factor(ops), case.d_sae), case.gradient())


def frequent(ops) -> tuple[Case, Factor]:
    """A latent with more entries than one thread should sum alone."""
    case = Case(4500, 70, 6, 2)
    assert len(case.rows[case.columns == 0]) > 2048
    return case, case.factor(ops)


def test_gradient_of_a_frequent_latent(ops, threads):
    case, factor = frequent(ops)
    close(ops.weight_gradient(factor, 6), case.gradient(), rtol=1e-4)


def parts(ops, case) -> tuple[list[Factor], np.ndarray]:
    """Two factors, the second of which leaves most latents out, and the sum of their gradients."""
    few = Case(case.n + 3, case.d, case.d_sae, 1, seed=1)
    return [case.factor(ops), few.factor(ops)], case.gradient() + few.gradient()


def without_parallel(g: np.ndarray, W: np.ndarray) -> np.ndarray:
    direction = W / np.maximum(np.linalg.norm(W, axis=1, keepdims=True), 1e-12)
    return g - (g * direction).sum(1, keepdims=True) * direction


@pytest.mark.parametrize("unit", [False, True])
def test_gradient_norm(ops, case, unit):
    factors, gradient = parts(ops, case)
    wanted = without_parallel(gradient, case.W.double().numpy()) if unit else gradient
    found = ops.gradient_norm2(factors, case.W if unit else None)
    assert found.dtype == torch.float64 and found.shape == ()
    # With d = 1 nothing is orthogonal to a row.
    floor = 1e-10 * (gradient**2).sum()
    assert found.item() == pytest.approx((wanted**2).sum(), rel=1e-5, abs=floor)


@pytest.mark.parametrize("shadow", [False, True])
@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("shape", [(33, 100, 257, 12), (5, 3, 9, 4), (7, 16, 300, 0)], ids=str)
def test_adam_is_pytorchs(ops, shape, unit, shadow):
    case = Case(*shape)
    numbers = {"lr": 0.02, "eps": 1e-5}
    expected = torch.nn.Parameter(case.W.double())
    optimizer = torch.optim.Adam([expected], betas=(0.8, 0.95), **numbers)
    W, m, v = case.W.clone(), torch.zeros_like(case.W), torch.zeros_like(case.W)
    # With something of another's beside each row.
    wide = torch.full((len(W), W.shape[1] + 3), 7.0, dtype=torch.bfloat16)
    copy = wide[:, :-3] if shadow else None
    for step in range(1, 6):
        now = Case(*shape, seed=step)
        factors, gradient = parts(ops, now)
        expected.grad = torch.tensor(gradient)
        if unit:
            with torch.no_grad():
                expected.grad = torch.tensor(without_parallel(gradient, expected.detach().numpy()))
        expected.grad.mul_(0.3)
        optimizer.step()
        if unit:
            with torch.no_grad():
                expected.div_(expected.norm(dim=1, keepdim=True).clamp_min(1e-12))
        ops.adam_(
            W, m, v, factors, beta1=0.8, beta2=0.95, step=step, scale=torch.tensor(0.3), unit=unit,
            shadow=copy, **numbers,
        )  # fmt: skip
        close(W, expected.detach().numpy(), rtol=2e-5)
    state = optimizer.state[expected]
    close(m, state["exp_avg"].numpy(), rtol=2e-5)
    close(v, state["exp_avg_sq"].numpy(), rtol=2e-5)
    if copy is not None:
        assert torch.equal(copy, W.bfloat16()) and (wide[:, -3:] == 7).all()


def adam(ops, W, m, v, factors, step=1, scale=1.0, unit=False, shadow=None) -> None:
    numbers = {"lr": 0.1, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8}
    ops.adam_(W, m, v, factors, step=step, scale=scale, unit=unit, shadow=shadow, **numbers)


def test_adam_of_odd_rows(ops):
    """A decoder row of zeros stays finite, and a NaN stays in its row and in the shadow."""
    case = Case(16, 64, 40, 8)
    case.W[3] = 0
    case.W[5, 2] = float("nan")
    zeros = torch.zeros_like(case.W)
    shadow = zeros.bfloat16()
    adam(ops, case.W, zeros.clone(), zeros.clone(), [case.factor(ops)], unit=True, shadow=shadow)
    assert case.W[5].isnan().all() and torch.equal(shadow.isnan(), case.W.isnan())
    others = case.W[torch.arange(40) != 5]
    assert others.isfinite().all()
    close(others.norm(dim=1), np.ones(39))


def test_the_shadow_is_rounded_as_pytorch_does(ops):
    """Ties go to even, and no NaN becomes a number."""
    bits = [0x3F80_8000, 0x3F81_8000, 0x3F80_8001, 0x7F7F_FFFF, 0x7FFF_FFFF, 0x7FC0_0001, 1]
    W = torch.tensor(bits * 5, dtype=torch.int32).view(torch.float32).view(-1, 1)
    W = torch.cat([W, -W], dim=1).T.contiguous()  # [2, 35]: registers and what is left over.
    expected, shadow = W.bfloat16(), torch.zeros_like(W).bfloat16()
    none = Case(3, 35, 2, 0).factor(ops)  # Nothing moves.
    adam(ops, W, torch.zeros_like(W), torch.zeros_like(W), [none], shadow=shadow)
    torch.testing.assert_close(shadow, expected, rtol=0, atol=0, equal_nan=True)


def test_moments_of_an_idle_latent_end_at_zero(ops):
    """Denormal numbers would make every later step many times slower."""
    case = Case(7, 16, 300, 0)
    tiny = torch.full_like(case.W, 1e-39)
    before = case.W.clone()
    v = torch.full_like(tiny, 1e-39)
    adam(ops, case.W, tiny, v, [case.factor(ops)])
    if platform.machine() == "x86_64":
        assert not tiny.any() and not v.any()
    assert torch.equal(case.W, before)
    assert torch.tensor(1e-39) * 1 > 0  # This thread's own arithmetic is as it was.


@pytest.mark.parametrize("shape", [(33, 100, 257, 12), (5, 3, 9, 4)], ids=str)
def test_adam_writes_rows_in_int8(ops, shape):
    case = Case(*shape)
    found, expected = (Int8Rows.empty(shape[2], shape[1]) for _ in range(2))
    m, v = torch.zeros_like(case.W), torch.zeros_like(case.W)
    adam(ops, case.W, m, v, [case.factor(ops)], unit=True, shadow=found)
    int8.write(case.W, expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert found.tiles.any()


def test_writing_in_place_is_seen_by_autograd(ops):
    case = Case(5, 3, 9, 4)
    tensors = [case.W, torch.zeros(9, 3), torch.zeros(9, 3), torch.zeros(9, 3).bfloat16()]
    before = [tensor._version for tensor in tensors]
    adam(ops, *tensors[:3], [case.factor(ops)], shadow=tensors[3])
    assert all(t._version > old for t, old in zip(tensors, before, strict=True))


# -- The same bits ---------------------------------------------------------------------------------


def test_the_number_of_threads_changes_no_bit(ops):
    case, factor = frequent(ops)

    def everything() -> list[torch.Tensor]:
        W, m, v = case.W.clone(), torch.zeros_like(case.W), torch.zeros_like(case.W)
        adam(ops, W, m, v, [factor], unit=True)
        return [
            W, m, v, ops.weight_gradient(factor, 6), ops.gradient_norm2([factor, factor], case.W),
            *ops.reconstruct(case.W, case.offsets, case.indices, case.values, case.x),
            ops.topk(case.x, 9), ops.decode(case.W, case.offsets, case.indices, case.values),
            *ops.by_latent(case.offsets, case.indices, 6),
            ops.sums_by_latent(ops.by_latent(case.offsets, case.indices, 6), case.values),
            ops.weighted_sum(case.W, case.b), *in_int8(),
            *ops.above(scores, others[2], error), *ops.largest_within(*close_scores, 9)[:2],
        ]  # fmt: skip

    error = torch.full((300,), 0.5)
    scores, *others = scores_off_by(error, n=300)
    close_scores = (scores, error, *others)

    def in_int8() -> list[torch.Tensor]:
        x, W, b = others
        rows, scores = Int8Rows.empty(*W.shape), torch.empty(len(x), len(W), dtype=torch.bfloat16)
        int8.write(W, rows)
        found = [int8.scores(x, rows, b, scores), scores] if int8.available() else []
        return [*rows, *found]

    before = torch.get_num_threads()
    found = []
    for threads in (1, 2, 5, 2):
        torch.set_num_threads(threads)
        found.append(everything())
    torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


# -- What is refused -------------------------------------------------------------------------------


def test_wrong_tensors_are_refused(ops):
    case = Case(5, 3, 9, 4)
    with pytest.raises(ValueError, match=r"scores must be torch.float32 \[9, 3\], contiguous"):
        ops.topk(case.W.double(), 2)
    with pytest.raises(ValueError, match=r"exp_avg must be torch.float32 \[9, 3\]"):
        adam(ops, case.W, torch.zeros(3, 9).T, case.W, [case.factor(ops)])
    with pytest.raises(ValueError, match=r"starts must be torch.int64 \[9\]"):
        ops.weight_gradient(case.factor(ops), 8)
    with pytest.raises(ValueError, match="not contiguous"):
        ops.topk(case.W.T, 2)
    with pytest.raises(ValueError, match="offsets end at"):
        ops.by_latent(case.offsets[:-2], case.indices, 9)
    with pytest.raises(ValueError, match=r"k must lie in 1\.\.3, not be 4"):
        ops.topk(case.W, 4)
    with pytest.raises(ValueError, match=r"rows in int8 must be torch.int8 \[1, 2048\]"):
        int8.write(case.W, Int8Rows.empty(33, 3))


# -- Compiling -------------------------------------------------------------------------------------


compiles = pytest.mark.skipif(not _native_library.compiler(), reason="no C++ compiler in PATH")


@pytest.fixture
def fresh(monkeypatch, tmp_path, caplog):
    """As in a new home: nothing compiled, nothing loaded."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    monkeypatch.setattr(_native_library, "supported_levels", lambda: ["portable"])
    monkeypatch.setattr(_native_library, "FLAGS", (*_native_library.FLAGS, "-O0"))  # Faster.
    caplog.set_level(logging.INFO)
    _native_library.load_library.cache_clear()
    yield tmp_path
    _native_library.load_library.cache_clear()


@compiles
def test_compiled_once_and_said_once(fresh, caplog):
    assert native_ops.available() and native_ops.available()
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2 and said[0].startswith("compiling") and " s: " in said[1]
    found = [path.suffix for path in fresh.rglob("*") if path.is_file()]
    assert found == [".so"]  # Nothing else is left behind.


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (None, "no C++ compiler"),
        ("echo 'x.cpp:1: error: no OpenMP' >&2; exit 1", "error: no OpenMP"),
        ("exit 3", "exit code 3"),
        ("shift; for last; do :; done; echo junk > $last", "file too short"),
    ],
)
def test_without_a_working_compiler_it_is_said_in_one_line(
    fresh, caplog, monkeypatch, script, reason
):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(fresh))
    if script is not None:
        fake = fresh / "c++"
        fake.write_text(f"#!/bin/sh\n{script}\n")
        fake.chmod(0o755)
    assert not native_ops.available() and not native_ops.available()
    assert _native_library.loaded_level() is None
    (said,) = [r.getMessage() for r in caplog.records if "not used" in r.getMessage()]
    assert reason in said and "\n" not in said


def test_a_compiler_without_an_end_is_no_error(fresh, caplog, monkeypatch):
    monkeypatch.setenv("CXX", "'g++")
    assert not native_ops.available()
    assert "No closing quotation" in caplog.messages[-1]


@compiles
def test_a_compiler_that_knows_less_is_asked_for_less(fresh, caplog, monkeypatch):
    monkeypatch.setitem(_native_library.LEVELS, "amx", ("-mno-such-instructions",))
    monkeypatch.setattr(_native_library, "supported_levels", lambda: ["amx", "portable"])
    assert native_ops.available() and not int8.available()
    assert _native_library.loaded_level() == "portable"
    assert "int8 is not multiplied" in caplog.messages[0] and "portable" in caplog.messages[1]
    assert len(caplog.messages) == 3


@compiles
def test_a_folder_that_cannot_be_made_is_no_error(fresh, caplog):
    (fresh / "extensions").write_text("a file")
    assert not native_ops.available()
    assert "extensions" in caplog.messages[-1] and "\n" not in caplog.messages[-1]


@compiles
def test_a_file_that_does_not_load_is_compiled_again(fresh):
    path = _native_library.library_path("portable")
    path.parent.mkdir(parents=True)
    path.write_bytes(b"\x7fELF cut off")
    assert native_ops.available()


@compiles
def test_many_may_compile_at_once(fresh):
    """Each ends with a library that is whole, and nothing else is left behind."""
    path = _native_library.library_path("portable")
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(_native_library.compile_library, ["portable"] * 3, [path] * 3))
    assert [found.name for found in path.parent.iterdir()] == [path.name]
    assert native_ops.available()
