import itertools
import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from sae_runner.data.base import Dataset
from sae_runner.errors import DataError
from sae_runner.models.base import Inputs
from sae_runner.site import TokenSelection
from sae_runner.store.activations import Activations
from sae_runner.store.reader import ActivationStore


def take(store: Activations, n: int, batch_size: int = 16, **options: Any) -> list[Any]:
    return list(itertools.islice(store.shuffled(batch_size, 5, **options), n))


def assert_same(disk: Activations, stream: Activations, n: int = 40) -> None:
    """Bit for bit: three epochs of batches, the resume of one, and the held-out rows."""
    expected = take(disk, n)
    assert expected[-1].position.epoch >= 2
    for a, b in zip(expected, take(stream, n), strict=True):
        assert torch.equal(a.x, b.x) and a.position == b.position
    (again,) = take(stream, 1, start=expected[n // 2].position)
    assert torch.equal(again.x, expected[n // 2 + 1].x)
    for a, b in zip(disk.rows("heldout", 9, 30), stream.rows("heldout", 9, 30), strict=True):
        for x, y in zip(a, b, strict=True):
            assert (x is None and y is None) or torch.equal(x, y)


@pytest.mark.parametrize("tokens", ["all", "last", "mean", "positions", "random_k"])
@pytest.mark.parametrize("mix_rows", [1, 120, 2**20])
def test_a_stream_gives_the_batches_of_a_disk_store(world, tokens, mix_rows):
    site = "blocks.0.resid_post"
    world.selection = TokenSelection(tokens, k=3, positions=(0, -1), seed=2)
    world.window_rows = 20
    folder = world.write(site)[0]
    disk = ActivationStore(folder, mix_rows=mix_rows)
    stream = world.stream(site, mix_rows=mix_rows)
    # Examples give fewer rows than they might: both must mix by what was planned.
    assert stream.mix_windows == disk.mix_windows
    assert stream.n_windows("train") == disk.n_windows("train") > 2
    assert_same(disk, stream, n=60)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_it_rounds_as_a_disk_store_does(world, dtype):
    site = "blocks.0.resid_post"
    world.dtype = dtype
    folder = world.write(site)[0]
    assert_same(ActivationStore(folder), world.stream(site))


def test_workers_and_an_unreadable_example_change_nothing(world, caplog):
    world.dataset.bad, world.max_bad = {4, 11}, 0.1
    folder = world.write()[0]
    world.workers = 2
    caplog.clear()
    stream = world.stream()
    with caplog.at_level(logging.WARNING):
        assert_same(ActivationStore(folder), stream)
    assert sorted(stream.bad) == [4, 11]
    named = [r.getMessage() for r in caplog.records]
    # Once each, not every epoch.
    assert sorted(named) == ["unreadable example 11: torn", "unreadable example 4: torn"]


def test_too_many_unreadable_examples_end_a_stream(world):
    world.dataset.bad, world.max_bad = set(range(0, 60, 5)), 0.1
    with pytest.raises(DataError, match=r"dataset\.max_bad=0\.1: \d+ of 60 examples"):
        take(world.stream(), 40)


def test_toy_rows(tmp_path, toy):
    assert_same(*toy(tmp_path), n=40)


@pytest.fixture
def toy() -> Callable[..., tuple[Activations, Activations]]:
    from sae_runner.data.toy import ToyDataset
    from sae_runner.models.toy import ToyHost
    from sae_runner.store.manifest import selection_dir
    from sae_runner.store.stream import StreamStore
    from sae_runner.store.window import WindowPlan
    from sae_runner.store.writer import begin_store, write_selections

    def make(folder):
        dataset: Dataset = ToyDataset(
            n_features=16, d=8, n_active=2.0, zipf=1.0, magnitude="half_normal", correlation=0.5,
            noise_std=0.1, bias_norm=1.0, n_examples=220, heldout=0.1, seed=0,
        )  # fmt: skip
        host = ToyHost(torch.device("cpu"), dataset)
        info, selection = host.sites()["activations"], TokenSelection("all")
        plan = WindowPlan.make(dataset, window_rows=32, rows_per_example=1, seed=9)
        begin_store(folder, host, dataset, {}, {"model": "toy", "dataset": "toy"}, {})
        how = {"dtype": "fp32", "batch_size": 10, "workers": 2, "max_bad": 0.0}
        write_selections(folder, host, dataset, [info], selection, plan, **how)
        disk = ActivationStore(selection_dir(folder, info.name, selection), mix_rows=100)
        stream = StreamStore(lambda: host, dataset, info, selection, plan, mix_rows=100, **how)
        return disk, stream

    return make


def test_images_of_a_small_transformer(world):
    """A host whose numbers come from real layers: attention over patches of random images."""

    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = nn.Linear(64, 12)
            self.block = nn.TransformerEncoderLayer(12, 2, 24, dropout=0.0, batch_first=True)
            generator = torch.Generator().manual_seed(1)
            for parameter in self.parameters():
                parameter.data = torch.randn(parameter.shape, generator=generator) / 4

        def forward(self, tokens):
            hot = nn.functional.one_hot(tokens % 64, 64).float() + (tokens // 64)[..., None] / 60
            return self.block(self.tokens(hot))

    class Transformer(type(world.host)):
        modality = "image"
        grid, n_prefix, has_cls = (2, 3), 1, True

        def __init__(self) -> None:
            super().__init__()
            self.network = nn.Sequential()
            self.network.add_module("embed", nn.Identity())
            self.network.add_module("block", Patches())
            self.network.eval()

        def probe(self, n):
            return Inputs(torch.arange(n), {"tokens": torch.zeros(n, 7, dtype=torch.int64)})

        def taps(self):
            return {"blocks.0.resid_post": super().taps()["blocks.0.resid_post"]}

        def prepare(self, examples):
            inputs = super().prepare(examples)
            return Inputs(inputs.ids, inputs.tensors, labels=inputs.labels)

    world.dataset, world.host = type(world.dataset)(same=7), Transformer()
    world.plan = lambda: _plan(world, rows_per_example=6)
    world.selection = TokenSelection("patches")
    site = "blocks.0.resid_post"
    disk = ActivationStore(world.write(site)[0], mix_rows=100)
    assert disk.n_rows("train") == 45 * 6
    assert_same(disk, world.stream(site, mix_rows=100), n=60)


def _plan(world, rows_per_example):
    from sae_runner.store.window import WindowPlan

    return WindowPlan.make(world.dataset, window_rows=50, rows_per_example=6, seed=0)


def test_a_dataset_without_random_access_is_read_front_to_back(world):
    world.dataset.random_access = False
    world.dataset.loaded.clear()
    stream = world.stream()
    n = len(world.dataset.ids("train"))
    while take_one(stream) < 1:
        pass
    assert world.dataset.loaded[:n] == sorted(world.dataset.ids("train").tolist())


def take_one(stream) -> int:
    """Read a whole epoch; the epoch that it ended in."""
    for batch in stream.shuffled(16, 0):
        if batch.position.epoch:
            return batch.position.epoch
    raise AssertionError


def test_the_model_runs_for_what_is_asked_and_no_further(world):
    """The group after the last batch is not computed before a row of it is wanted."""
    world.dataset = type(world.dataset)(same=7)
    stream = world.stream(mix_rows=1)
    world.host.n_forward = 0
    n_rows = world.plan().window_examples * 7
    first = world.plan().examples("train", 0)
    take(stream, 1, batch_size=n_rows)
    assert world.host.n_forward == -(-len(first) // world.batch_size)


def test_statistics_are_those_of_the_first_window(world):
    stream = world.stream("blocks.0.resid_post")
    x = stream.window("train", 0)["activations"].double()
    stats = stream.stats(5)
    torch.testing.assert_close(stats.mean, x.mean(0).float())
    assert stats.mean_norm == pytest.approx(float(x.norm(dim=1).mean()), rel=1e-6)
    assert stats.mean_square_norm == pytest.approx(float(x.square().sum(1).mean()), rel=1e-6)
    assert torch.equal(stats.sample, x[:5].float())
    world.host.n_forward = 0
    stream.stats(1)
    assert world.host.n_forward == 0


def test_two_threads_do_not_see_each_others_activations(world):
    """Hooks are the network's: without a lock a recording takes what another batch gave."""
    expected = take(world.stream(), 20)
    found: list[list[Any]] = []
    streams = [world.stream() for _ in range(4)]
    threads = [
        threading.Thread(target=lambda s=stream: found.append(take(s, 20))) for stream in streams
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    for batches in found:
        assert all(torch.equal(a.x, b.x) for a, b in zip(batches, expected, strict=True))
