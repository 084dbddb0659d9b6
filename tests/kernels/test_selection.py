"""What is chosen, against the whole product of rows and latents."""

import pytest
import torch

from sae_runner.kernels import int8, selection
from sae_runner.kernels.choice import using
from sae_runner.kernels.screen_error import ScreenError
from sae_runner.kernels.selection import Selector

N, D, S = 150, 24, 700


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(N, D, generator=generator)
    W = torch.randn(S, D, generator=generator)
    b = 0.3 * torch.randn(S, generator=generator)
    return x, W, b


WAYS = ["fp32", "screened", "screened in bf16", "screened by PyTorch", "screened with b beside"]


@pytest.fixture(params=WAYS)
def selector(request, monkeypatch):
    monkeypatch.setattr(selection, "CHUNK_BYTES", {"cpu": 50_000, "cuda": 0})  # Several chunks.
    monkeypatch.setattr(selection, "LEAST_ROWS", 7)
    precision, _, how = request.param.partition(" ")
    if how == "in bf16":
        monkeypatch.setattr(int8, "available", lambda: False)
    if how == "with b beside":  # As on CUDA, where b is a vector in bfloat16.
        monkeypatch.setattr(selection, "beside", lambda _: 0)
    with using("torch" if how in ("by PyTorch", "with b beside") else "auto"):
        yield Selector(precision)


@pytest.mark.parametrize("k", [1, 5, 20, S])
def test_top_is_that_of_the_whole_product(problem, selector, k):
    x, W, b = problem
    scores = x.double() @ W.double().T + b.double()
    expected = scores.topk(k, dim=1)
    for _ in range(2):  # Buffers are used again.
        values, indices = selector.top(x, W, b, k)
        order = values.sort(dim=1, descending=True)
        torch.testing.assert_close(order.values.double(), expected.values, rtol=1e-5, atol=1e-5)
        assert (
            indices.gather(1, order.indices)
            .sort(1)
            .values.equal(expected.indices.int().sort(1).values)
        )


def test_a_screen_without_spare_candidates_would_choose_others(problem):
    x, W, b = problem
    exact = Selector("fp32").top(x, W, b, 20)[1].sort(1).values
    half = Selector("bf16").top(x, W, b, 20)[1].sort(1).values
    assert (exact != half).any(1).float().mean() > 0.05


def test_top_where_scores_are_close(selector):
    """More than half as many more lie within what a screen rounds off."""
    generator = torch.Generator().manual_seed(7)
    both = torch.randn(1, D, generator=generator)
    x = both + 0.01 * torch.randn(N, D, generator=generator)
    W = both + 0.02 * torch.randn(S, D, generator=generator)
    values, indices = selector.top(x, W, torch.zeros(S), 20)
    exact = x.double() @ W.double().T  # About 24 ± 0.1, and bfloat16 has steps of 0.125.
    expected = exact.topk(20, dim=1).values
    order = values.sort(dim=1, descending=True).values
    torch.testing.assert_close(order.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(values.double(), exact.gather(1, indices.long()), rtol=1e-6, atol=0)


def test_top_where_the_bias_cancels_the_product(selector):
    """As it does where latents share the mean of x."""
    generator = torch.Generator().manual_seed(7)
    d = 384
    x = torch.randn(N, d, generator=generator) + 10
    W = 0.05 * torch.randn(S, d, generator=generator) + 0.5
    b = -W.sum(1) * 10  # Some 1,900, of which bfloat16 has steps of 8.
    exact = x.double() @ W.double().T + b.double()
    for _ in range(2):
        values, _ = selector.top(x, W, b, 20)
        order = values.sort(dim=1, descending=True).values
        torch.testing.assert_close(order.double(), exact.topk(20).values, rtol=0, atol=5e-3)


def test_rows_with_one_massive_entry(selector):
    """In steps of its size the others are zero: what is lost is a latent's own direction."""
    generator = torch.Generator().manual_seed(7)
    d = 256
    W = torch.nn.functional.normalize(torch.randn(S, d, generator=generator), dim=1)
    x = 3 * W[:N].clone()
    x[:, 5] = 500 * x.std()
    exact = x @ W.T
    _, indices = selector.top(x, W, torch.zeros(S), 20)
    assert indices.sort(1).values.equal(exact.topk(20).indices.sort(1).values.int())
    floor = exact.topk(20).values.amin().expand(S) - 1e-4
    found = selector.above(x, W, torch.zeros(S), floor)
    assert found.offsets.diff().equal((exact > floor).sum(1))


def test_a_latent_that_is_no_number_hides_no_other(problem, selector):
    x, W, b = problem
    W[3, 2] = torch.nan
    expected = ((x @ W.T + b) > 4.0).nonzero()
    found = selector.above(x, W, b, torch.full((S,), 4.0))
    assert found.indices.equal(expected[:, 1].int())


def test_int8_is_left_where_it_is_too_coarse(problem, caplog):
    x, W, b = problem
    x[:, 3] *= 1000
    W[:, 3] = 0  # The column is of no use, but all others are less than a step.
    selector = Selector("screened")
    expected = (x @ W.T + b).topk(5).values.sort().values
    caplog.set_level("INFO")
    for _ in range(3):
        torch.testing.assert_close(selector.top(x, W, b, 5)[0].sort().values, expected)
        selector.shadow_written(W)  # What was read is W, and what is read next may not be yet.
    said = [message for message in caplog.messages if "too coarse" in message]
    assert len(said) == int8.available()


@pytest.mark.parametrize("level", [-1.0, 4.0, 1e6])
def test_above_is_all_that_exceeds_its_floor(problem, selector, level):
    x, W, b = problem
    floor = level + torch.linspace(-1, 1, S)
    scores = x @ W.T + b
    found = selector.above(x, W, b, floor)
    rows, indices = (scores > floor).nonzero(as_tuple=True)
    assert found.offsets.equal(
        torch.cat([torch.zeros(1, dtype=torch.int64), (scores > floor).sum(1).cumsum(0)])
    )
    assert found.indices.equal(indices.int())
    torch.testing.assert_close(found.values, scores[rows, indices], rtol=1e-5, atol=1e-5)


def test_above_a_floor_that_a_screen_rounds(problem, selector):
    x, W, b = problem
    b = b + 1000  # bfloat16 has steps of 4 there, or of 8.
    floor = torch.full((S,), 1005.0)
    expected = (x @ W.T + b) > floor
    found = selector.above(x, W, b, floor)
    assert found.offsets.diff().equal(expected.sum(1))
    assert found.indices.equal(expected.nonzero()[:, 1].int())


@pytest.mark.parametrize("n_wanted", [0, 1, 1500, 60_000, N * S])
def test_largest_are_those_of_the_whole_batch(problem, selector, n_wanted):
    x, W, b = problem
    flat = (x @ W.T + b).flatten()
    best = flat.topk(n_wanted).indices.sort().values
    best = best[flat[best] > 0]
    found = selector.largest(x, W, b, n_wanted)
    rows = torch.repeat_interleave(torch.arange(N), found.offsets.diff())
    assert (rows * S + found.indices).equal(best)
    torch.testing.assert_close(found.values, flat[best], rtol=1e-5, atol=1e-5)


def test_a_floor_that_was_guessed_too_high_is_noticed(selector):
    x = torch.zeros(640, 4)
    x[::10, 0], x[1::10, 0] = 1.0, 0.5  # The rows that are sampled are the larger.
    W = torch.cat([torch.eye(4), -torch.eye(4)])
    found = selector.largest(x, W, torch.zeros(8), 128)
    assert len(found.values) == 128 and found.values.min() == 0.5


@pytest.mark.parametrize(("outlier", "weight"), [(1, 1), (30, 30), (1000, 0.01)])
def test_the_bound_of_a_screens_rounding_holds_and_is_no_exaggeration(outlier, weight):
    generator = torch.Generator().manual_seed(5)
    x, W = torch.randn(600, 48, generator=generator), torch.randn(900, 48, generator=generator)
    x[:, 7] *= outlier  # A coordinate that dominates, as models have them.
    W[:, 7] *= weight
    exact = x.double() @ W.double().T
    off = (x.bfloat16().double() @ W.bfloat16().double().T - exact).abs()
    bound = ScreenError(W, torch.zeros(900)).of(x).unsqueeze(1)
    assert (off <= bound).all() and (off > bound / 4).any()
    by_norms = 4 / 512 * (x**4).sum(1) ** 0.25 * ((W**4).sum(1) ** 0.25).max()
    by_columns = 4 / 512 * (x * W.abs().max(0).values).norm(dim=1)
    torch.testing.assert_close(bound[:, 0], torch.minimum(by_norms, by_columns))
    assert (by_norms < by_columns).all() == (outlier == 1)


def test_the_copy_of_the_weights_is_one_that_whoever_writes_it_knows(problem):
    x, W, b = problem
    selector = Selector("screened")
    selector.top(x, W, b, 3)
    with using("torch"):
        assert isinstance(selector.shadow_of(W), torch.Tensor)
    assert selector.top(x, W, b, 3)[1].equal(Selector("screened").top(x, W, b, 3)[1])


def test_a_shadow_is_used_while_it_is_that_of_the_weights(problem):
    x, W, b = problem
    selector, other = Selector("bf16"), torch.randn(S, D)
    selector.shadow_of(W).copy_(other)
    selector.shadow_written(W)
    expected = Selector("bf16").top(x, other, b, 3)[1]
    assert selector.top(x, W, b, 3)[1].equal(expected)
    # The bias lies beside it, and is no part of what it is a copy of.
    expected = Selector("bf16").top(x, other, b.flip(0), 3)[1]
    assert selector.top(x, W, b.flip(0), 3)[1].equal(expected)
    W.mul_(2)  # Now it is not.
    assert selector.top(x, W, b, 3)[1].equal(Selector("bf16").top(x, W, b, 3)[1])
