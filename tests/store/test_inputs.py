import itertools

import numpy as np
import pytest
import torch

from sae_runner.errors import ConfigError
from sae_runner.site import TokenSelection
from sae_runner.store.activations import Position
from sae_runner.store.inputs import ShuffledInputs

ALL = TokenSelection("all", drop_special=False)


@pytest.fixture
def stream(world):
    """`stream(n_rows=180, bad=[3])`: the 45 training examples, said to give so many rows."""

    def build(selection=ALL, n_rows=180, workers=0, **options):
        dataset = type(world.dataset)(**options)
        site = world.host.sites()["blocks.0.resid_post"]
        return ShuffledInputs(world.host, dataset, site, selection, n_rows=n_rows, workers=workers)

    return build


def take(stream, n, batch_size=40, seed=1, start=Position()):  # noqa: B008
    return list(itertools.islice(stream.shuffled(batch_size, seed, start=start), n))


def ids_of(batches):
    return [batch.x.ids.tolist() for batch in batches]


def test_a_batch_has_as_many_examples_as_give_its_rows_on_average(stream):
    assert [stream(n_rows=n).n_examples(40) for n in (180, 45, 90, 45 * 39, 45 * 100)] == [
        10, 40, 20, 1, 1,
    ]  # fmt: skip
    assert all(len(ids) == 10 for ids in ids_of(take(stream(), 9)))


def test_every_training_example_comes_once_an_epoch_in_another_order(stream):
    found = stream()
    ids = ids_of(take(found, 9))
    whole = found.ids.tolist()
    assert len(whole) == 45 and ids == [sorted(batch) for batch in ids]
    flat = list(itertools.chain(*ids))
    # Batch 4 holds the last 5 of the first epoch and the first 5 of the second.
    assert sorted(flat[:40] + [i for i in ids[4] if i not in flat[:40]]) == whole
    assert sorted(flat) == sorted(whole * 2)
    even = ids_of(take(found, 10, batch_size=36))  # Five batches an epoch.
    assert sorted(itertools.chain(*even[:5])) == sorted(itertools.chain(*even[5:])) == whole
    assert even[0] != even[5]


def test_the_seed_decides_and_nothing_else(stream):
    first = ids_of(take(stream(), 6))
    assert first == ids_of(take(stream(workers=2), 6))
    assert first != ids_of(take(stream(), 6, seed=2))


@pytest.mark.parametrize("n_done", [1, 4, 5, 7])
def test_it_goes_on_from_any_position(stream, n_done):
    whole = take(stream(), 9)
    rest = take(stream(), 9 - n_done, start=whole[n_done - 1].position)
    assert ids_of(rest) == ids_of(whole[n_done:])
    assert [b.position for b in rest] == [b.position for b in whole[n_done:]]
    assert whole[3].position == Position(0, 0, 40) and whole[4].position == Position(1, 0, 5)
    assert whole[8].position == Position(2, 0, 0)


def test_a_batch_may_be_longer_than_an_epoch(stream):
    (batch,) = take(stream(n_rows=45), 1, batch_size=100)
    counts = np.bincount(batch.x.ids.numpy())
    assert len(batch.x) == 100 and set(counts[counts > 0]) == {2, 3}
    assert batch.position == Position(2, 0, 10)


def test_unreadable_examples_are_left_out(stream):
    bad = stream().ids[:3].tolist()
    found = stream(bad=bad)
    good = set(found.ids.tolist()) - set(bad)
    assert sorted(itertools.chain(*ids_of(take(found, 9)))) == sorted([*good, *good])


@pytest.mark.parametrize("n", [1, 10])
def test_examples_without_a_row_are_left_out(stream, n):
    """One example a batch: without a row it is no batch at all."""
    sixth = TokenSelection("positions", positions=(5,))
    found = stream(selection=sixth, n_rows=45)
    long = {i for i in found.ids.tolist() if found.dataset.length(i) > 5}
    assert 0 < len(long) < 45
    batches = take(found, len(long) if n == 1 else 5, batch_size=n)
    assert {i for ids in ids_of(batches) for i in ids} == long
    assert all(len(x) == len(x.tensors["tokens"]) == len(x.attended) for x, _ in batches)


def test_examples_that_come_in_their_own_order_are_refused(stream):
    with pytest.raises(ConfigError, match=r"order of their own.*set dataset\.streaming=false"):
        stream(random_access=False)


def test_what_comes_is_prepared(stream):
    (batch,) = take(stream(), 1)
    tokens = batch.x.tensors["tokens"]
    assert torch.equal(tokens[:, 0] // 64, batch.x.ids)
