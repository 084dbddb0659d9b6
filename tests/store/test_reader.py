import itertools
import json
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sae_runner.errors import DataError, StoreError
from sae_runner.store.activations import Batch, Position, has_room
from sae_runner.store.prefetch import Prefetched
from sae_runner.store.reader import ActivationStore, open_store

Tokens = list[tuple[int, int]]


def tokens_of(x: torch.Tensor) -> Tokens:
    """(example, position) of rows of the site `embed`, which say so themselves."""
    return [(int(i), int(p)) for i, p in x[:, :2].tolist()]


def take(store, n: int, batch_size: int = 16, seed: int = 0, **options) -> list[Batch]:
    return list(itertools.islice(store.shuffled(batch_size, seed, **options), n))


def same(a: list[Batch], b: list[Batch]) -> bool:
    return all(
        torch.equal(x.x, y.x) and x.position == y.position for x, y in zip(a, b, strict=True)
    )


# -- Kept and delivered ------------------------------------------------------------------------


@pytest.mark.parametrize("multiple", [None, 1.2])
def test_what_is_kept_is_asked_for_once_and_gives_the_same_batches(world, monkeypatch, multiple):
    options = {"mix_rows": 100, "max_norm_multiple": multiple}
    fetched = world.store(**options)
    kept = ActivationStore(fetched.folder, keep_bytes=fetched.n_bytes("train"), **options)
    short = ActivationStore(fetched.folder, keep_bytes=fetched.n_bytes("train") - 1, **options)
    asked = Counter()
    window = ActivationStore.window

    def counted(store, split, index):
        asked[id(store), split, index] += 1
        return window(store, split, index)

    monkeypatch.setattr(ActivationStore, "window", counted)
    n = 3 * fetched.n_rows("train") // 16 + 1
    batches = take(fetched, n)
    assert same(batches, take(kept, n)) and same(batches, take(short, n))
    times = {store: {asked[id(store), "train", i] for i in range(fetched.n_windows("train"))}
             for store in (fetched, kept, short)}  # fmt: skip
    assert times[kept] == {1} and times[fetched] == times[short] and min(times[short]) >= 3


def test_a_gpu_has_room_for_rows_that_half_of_what_is_free_takes(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1000, 10**12))
    assert has_room(torch.device("cuda"), 500) and not has_room(torch.device("cuda"), 501)
    assert has_room(torch.device("cpu"), 10**12)


def test_the_size_of_a_split_is_that_of_its_rows(world):
    store = world.store()
    rows = store.window("train", 0)["activations"]
    assert store.n_bytes("train") == store.n_rows("train") * rows[0].nbytes


def test_rows_are_delivered_to_the_device(world):
    # A device that computes nothing is as good as any to see where rows go.
    batch = next(world.store().shuffled(16, 0, device=torch.device("meta")))
    assert batch.x.device.type == "meta" and batch.x.shape == (16, 4)


@pytest.mark.gpu
@pytest.mark.parametrize("keep_bytes", [0, 2**20])
def test_batches_on_cuda_are_those_of_a_cpu(world, keep_bytes):
    store = world.store(mix_rows=100, keep_bytes=keep_bytes)
    there = take(store, 40, device=torch.device("cuda"))
    assert all(batch.x.is_cuda for batch in there)
    assert same(take(store, 40), [batch._replace(x=batch.x.cpu()) for batch in there])


# -- In order ------------------------------------------------------------------------------------


def test_rows_come_in_stored_order_with_what_is_known_of_them(world):
    store = world.store()
    for split in ("train", "heldout"):
        rows = list(store.rows(split, 16))
        found = [token for r in rows for token in tokens_of(r.x)]
        assert set(found) == world.tokens(split) and len(found) == store.n_rows(split)
        paths = sorted(store.folder.glob(f"{split}-*.safetensors"))
        stored = torch.cat([load_file(path)["activations"] for path in paths])
        assert torch.equal(torch.cat([r.x for r in rows]), stored)
        for r in rows:
            assert list(zip(r.example_id.tolist(), r.position.tolist(), strict=True)) == tokens_of(
                r.x
            )
            assert torch.equal(r.label, r.example_id % 3)
        assert store.example_ids(split).tolist() == sorted(world.dataset.ids(split).tolist())
    assert store.d_in == 4


@pytest.mark.parametrize("limit", [0, 1, 16, 50, 77, 10_000])
@pytest.mark.parametrize("multiple", [None, 1.2])
def test_a_limit_tears_no_example(world, limit, multiple):
    store = world.store(max_norm_multiple=multiple)
    every = [token for rows in store.rows("train", 16) for token in tokens_of(rows.x)]
    found = [token for rows in store.rows("train", 16, limit) for token in tokens_of(rows.x)]
    sizes, seen = Counter(example for example, _ in every), {example for example, _ in found}
    assert found == [token for token in every if token[0] in seen], "in order, and all of each"
    assert len(found) <= max(limit, max(sizes.values()) if limit == 1 else 0)
    assert bool(found) == (limit > 0)
    assert len(found) == len(every) or limit - len(found) < max(sizes.values())
    assert all(len(rows.x) > 0 for rows in store.rows("train", 16, limit))


def test_a_limit_draws_examples_whatever_their_ids(world):
    world.dataset.n, world.dataset.same, world.window_rows = 400, 4, 10_000
    store = world.store()
    ids = torch.cat([rows.example_id for rows in store.rows("train", 64, 240)]).unique()
    assert len(ids) == 60
    standard_error = 400 / 12**0.5 / 60**0.5
    assert abs(float(ids.double().mean()) - 199.5) < 4 * standard_error


# -- Shuffled ------------------------------------------------------------------------------------


def test_batches_are_decided_by_the_seed(world):
    store = world.store()
    assert same(take(store, 40), take(store, 40))
    other = take(store, 40, seed=1)
    assert not torch.equal(take(store, 1)[0].x, other[0].x)


@pytest.mark.parametrize("mix_rows", [1, 100, 2**20])
@pytest.mark.parametrize("batch_size", [7, 16, 500])
def test_every_row_comes_once_an_epoch_also_across_groups_and_epochs(world, mix_rows, batch_size):
    store = world.store(mix_rows=mix_rows)
    n = store.n_rows("train")
    n_batches = -(-3 * n // batch_size)
    batches = take(store, n_batches, batch_size)
    assert {len(batch.x) for batch in batches} == {batch_size}
    rows = [token for batch in batches for token in tokens_of(batch.x)]
    counts = Counter(rows)
    assert set(counts) == world.tokens("train")
    whole, begun = divmod(n_batches * batch_size, n)
    assert sum(c == whole + 1 for c in counts.values()) == begun
    assert sum(c == whole for c in counts.values()) == n - begun
    # The boundary is exact: positions count rows of the epoch that are out.
    group_sizes = _group_sizes(store)
    for t, batch in enumerate(batches):
        place = batch.position
        out = place.epoch * n + sum(group_sizes[place.epoch][: place.group]) + place.offset
        assert out == (t + 1) * batch_size


def _group_sizes(store: ActivationStore) -> list[list[int]]:
    """Rows of each group of the first epochs, learned by reading one row at a time."""
    sizes: list[list[int]] = [[0]]
    for batch in store.shuffled(1, 0):
        sizes[-1][-1] += 1
        if batch.position.epoch >= len(sizes):
            if len(sizes) == 8:
                return sizes
            sizes.append([0])
        elif batch.position.group >= len(sizes[-1]):
            sizes[-1].append(0)
    raise AssertionError


def test_epochs_and_seeds_have_orders_of_their_own(world):
    store = world.store()
    n = store.n_rows("train")
    orders = [tokens_of(batch.x) for seed in (0, 1) for batch in take(store, 3 * n, 1, seed=seed)]
    epochs = [tuple(t for (t,) in orders[start : start + n]) for start in range(0, 6 * n, n)]
    assert len(set(epochs)) == 6
    for a, b in itertools.combinations(epochs, 2):
        place = {token: i for i, token in enumerate(b)}
        same_place = sum(place[token] == i for i, token in enumerate(a))
        assert same_place < 8  # Expected: 1.


def test_groups_of_an_epoch_have_permutations_of_their_own(world):
    """One for all would tie the place of a row in one group to that of another."""
    world.dataset = type(world.dataset)(same=7)
    world.window_rows = 35
    store = world.store(mix_rows=35)
    place = {
        (int(i), int(p)): row
        for w in range(store.n_windows("train"))
        for row, (i, p) in enumerate(
            zip(store.window("train", w)["example_id"], store.window("train", w)["position"],
                strict=True)
        )
    }  # fmt: skip
    order = [place[tokens_of(batch.x)[0]] for batch in take(store, 35 * 9, 1)]
    groups = {tuple(order[start : start + 35]) for start in range(0, len(order), 35)}
    assert len(groups) == 9 and all(sorted(group) == list(range(35)) for group in groups)


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_ranks_share_each_batch(world, world_size):
    store = world.store(mix_rows=100)
    whole = take(store, 30, 15)
    parts = [take(store, 30, 15, rank=r, world_size=world_size) for r in range(world_size)]
    for t, batch in enumerate(whole):
        shares = [tokens_of(part[t].x) for part in parts]
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        assert sorted(itertools.chain(*shares)) == sorted(tokens_of(batch.x))
        assert all(part[t].position == batch.position for part in parts)


@pytest.mark.parametrize("mix_rows", [1, 100, 2**20])
def test_going_on_from_any_batch_is_as_if_nothing_had_happened(world, mix_rows):
    store = world.store(mix_rows=mix_rows)
    whole = take(store, 45)
    assert whole[-1].position.epoch >= 2
    for t, batch in enumerate(whole[:-1]):
        again = take(ActivationStore(store.folder, mix_rows=mix_rows), 3, start=batch.position)
        assert same(again[: len(whole) - t - 1], whole[t + 1 : t + 4])


def pairs_together(order: list[int], batch_size: int) -> int:
    """Pairs of rows of one example that are in one batch."""
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    return sum(c * (c - 1) // 2 for batch in batches for c in Counter(batch).values())


def neighbours(order: list[int]) -> int:
    """Rows followed by one of the same example."""
    return sum(a == b for a, b in itertools.pairwise(order))


@pytest.mark.parametrize("mix_windows", [1, 20])
def test_rows_of_an_example_are_spread_as_a_uniform_permutation_spreads_them(world, mix_windows):
    """Against the expectation and spread of numpy's permutations of the same groups."""
    world.dataset = type(world.dataset)(320, same=7)
    world.window_rows = 84
    store = world.store(mix_rows=84 * mix_windows)
    assert store.mix_windows == mix_windows and store.n_windows("train") == 20
    n, group = store.n_rows("train"), 84 * mix_windows
    ids = np.concatenate([r.example_id.numpy() for r in store.rows("train", 84)])
    generator = np.random.default_rng(0)
    orders = [
        [tokens_of(batch.x)[0][0] for batch in take(store, n, 1, seed=seed)] for seed in range(8)
    ]
    for measure in (neighbours, lambda order: pairs_together(order, 21)):
        expected = []
        for _ in range(200):
            # Which windows share a group does not matter to either measure.
            groups = [generator.permutation(ids[i : i + group]) for i in range(0, n, group)]
            expected.append(measure(np.concatenate(groups).tolist()))
        mean, std = float(np.mean(expected)), float(np.std(expected))
        found = float(np.mean([measure(order) for order in orders]))
        assert abs(found - mean) < 4 * std / len(orders) ** 0.5, (measure, found, mean, std)
        assert measure(np.sort(ids).tolist()) > mean + 10 * std  # The test can tell.


def test_the_batch_size_does_not_change_the_order(world):
    store = world.store()
    one_by_one = [tokens_of(batch.x)[0] for batch in take(store, 160, 1)]
    for t, batch in enumerate(take(store, 10, 16)):
        assert sorted(tokens_of(batch.x)) == sorted(one_by_one[16 * t : 16 * t + 16])


def test_many_readers_at_once_read_the_same(world):
    store = world.store(mix_rows=100, max_norm_multiple=2.0)
    expected = take(store, 40)
    found: list[list[Batch]] = []
    threads = [threading.Thread(target=lambda: found.append(take(store, 40))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6 and all(same(batches, expected) for batches in found)


# -- Outliers and statistics ---------------------------------------------------------------------


@pytest.mark.parametrize("multiple", [1.0, 1.5])
def test_norm_outliers_are_left_out_and_counted(world, multiple):
    everything = world.store()
    norms = {
        split: torch.cat([rows.x.norm(dim=1) for rows in everything.rows(split, 16)])
        for split in ("train", "heldout")
    }
    limit = multiple * float(norms["train"].median())  # Of the median itself: kept.
    store = ActivationStore(everything.folder, max_norm_multiple=multiple)
    for split, norm in norms.items():
        kept = torch.cat([rows.x for rows in everything.rows(split, 16)])[norm <= limit]
        assert 0 < len(kept) < len(norm)
        assert store.n_rows(split) == len(kept)
        assert store.n_dropped(split) == len(norm) - len(kept)
        assert torch.equal(torch.cat([rows.x for rows in store.rows(split, 16)]), kept)
    kept = torch.cat([rows.x for rows in store.rows("train", 16)]).double()
    n = store.n_rows("train")
    epoch = [token for batch in take(store, n, 1) for token in tokens_of(batch.x)]
    assert sorted(epoch) == sorted(tokens_of(kept))
    stats = store.stats(40)
    torch.testing.assert_close(stats.mean, kept.mean(0).float())
    assert stats.mean_norm == pytest.approx(float(kept.norm(dim=1).mean()))
    assert stats.mean_square_norm == pytest.approx(float(kept.square().sum(1).mean()))
    assert set(tokens_of(stats.sample)) <= set(tokens_of(kept)) and len(stats.sample) == 40
    assert store.heldout_mean() is None


def test_a_limit_that_leaves_nothing_is_said(world):
    store = world.store(max_norm_multiple=1e-6)
    assert store.n_rows("train") == 0
    with pytest.raises(DataError, match=r"no row of the train split of embed.*max_norm_multiple"):
        next(store.shuffled(4, seed=0))
    with pytest.raises(DataError, match="no row"):
        store.stats()


def test_statistics_are_those_of_all_training_rows(world):
    store = world.store()
    x = torch.cat([rows.x for rows in store.rows("train", 16)]).double()
    stats = store.stats(50)
    torch.testing.assert_close(stats.mean, x.mean(0).float())
    assert stats.mean_norm == pytest.approx(float(x.norm(dim=1).mean()), rel=1e-6)
    assert stats.mean_square_norm == pytest.approx(float(x.square().sum(1).mean()), rel=1e-6)
    assert len(stats.sample) == 50 and len(set(tokens_of(stats.sample))) == 50
    assert len(store.stats(10**6).sample) == store.n_rows("train")
    heldout = torch.cat([rows.x for rows in store.rows("heldout", 16)]).double()
    torch.testing.assert_close(store.heldout_mean(), heldout.mean(0), rtol=1e-12, atol=1e-12)


# -- Damage --------------------------------------------------------------------------------------


def damage(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("name", ["train-00001", "heldout-00000", "stats"])
def test_a_flipped_bit_anywhere_is_found(world, name):
    store = world.store()
    store.verify()
    path = store.folder / f"{name}.safetensors"
    damage(path, -1)
    line = f"{name}.safetensors is damaged: it differs from its hash; .*force=true"
    with pytest.raises(StoreError, match=line):
        ActivationStore(store.folder, verify=False).verify()
    # It is found before it is used, too.
    with pytest.raises(StoreError, match=line):
        use(ActivationStore(store.folder))
    use(ActivationStore(store.folder, verify=False))


def use(store: ActivationStore) -> None:
    store.stats()
    for split in ("train", "heldout"):
        assert sum(len(rows.x) for rows in store.rows(split, 16)) == store.n_rows(split)


def test_a_file_is_compared_with_its_hash_once(world, monkeypatch):
    from sae_runner import files

    store, hashed = world.store(mix_rows=100), []
    sha256 = files.sha256
    monkeypatch.setattr(files, "sha256", lambda path: hashed.append(path.name) or sha256(path))
    for _ in range(2):
        use(store)
        take(store, 30)
    assert sorted(hashed) == sorted(p.name for p in store.folder.glob("*.safetensors"))


def test_damage_that_can_be_seen_at_once_is_said_in_one_line(world):
    store = world.store()
    path = store.folder / "train-00001.safetensors"
    whole = path.read_bytes()
    damage(path, 0)  # The header's length.
    with pytest.raises(StoreError, match=r"train-00001\.safetensors is damaged: ") as error:
        list(ActivationStore(store.folder, verify=False).rows("train", 16))
    assert "\n" not in str(error.value)
    path.write_bytes(whole[:-3])
    with pytest.raises(StoreError, match=r"absent or cut short: .*force=true"):
        ActivationStore(store.folder)
    path.unlink()
    with pytest.raises(StoreError, match="absent or cut short"):
        ActivationStore(store.folder)
    with pytest.raises(StoreError, match="absent or cut short"):
        store.verify()
    path.write_bytes(whole)
    stats = store.folder / "stats.safetensors"
    damage(stats, 0)
    with pytest.raises(StoreError, match=r"stats\.safetensors is damaged"):
        ActivationStore(store.folder, verify=False).stats()


@pytest.mark.parametrize("missing", ["splits", "site", "stats", "window_rows"])
def test_a_manifest_that_lacks_something_is_damaged(world, missing):
    path = world.store().folder / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest[missing]
    path.write_text(json.dumps(manifest))
    with pytest.raises(StoreError, match=rf"manifest\.json is damaged: it lacks '{missing}'"):
        ActivationStore(path.parent)


def test_a_store_is_opened_by_its_folder_if_it_holds_one_selection(world, tmp_path):
    folder = world.write()[0]
    assert open_store(folder).folder == open_store(str(folder.parent)).folder == folder
    assert open_store(folder).source["model"]["name"] == "host"
    world.write("blocks.0.resid_post")
    with pytest.raises(StoreError, match=r"holds 2 selections \(blocks.*, embed-all"):
        open_store(folder.parent)
    with pytest.raises(StoreError, match="is no finished store: it has no manifest"):
        open_store(tmp_path)
    (folder / "manifest.json").unlink()
    (folder.parent / "blocks.0.resid_post-all.p0" / "manifest.json").unlink()
    with pytest.raises(StoreError, match=r"0 selections \(none finished\)"):
        open_store(folder.parent)


# -- Read ahead ----------------------------------------------------------------------------------


def batches(n: int, done: list[int] | None = None, error: Exception | None = None):
    for t in range(n):
        if done is not None:
            done.append(t)
        yield Batch(torch.full((1, 1), float(t)), Position(0, 0, t))
    if error:
        raise error


def test_reading_ahead_changes_neither_what_comes_nor_its_end():
    ahead = Prefetched(batches(10), 3)
    assert [int(batch.x) for batch in ahead] == list(range(10))
    with pytest.raises(StopIteration):
        next(ahead)
    ahead.close()
    assert not ahead.thread.is_alive()


def test_an_error_comes_after_the_batches_before_it():
    ahead = Prefetched(batches(2, error=DataError("torn")), 4)
    assert [int(next(ahead).x), int(next(ahead).x)] == [0, 1]
    for _ in range(2):
        with pytest.raises(DataError, match="torn"):
            next(ahead)


def test_it_reads_no_further_ahead_than_asked_and_stops_when_told():
    done: list[int] = []
    ahead = Prefetched(batches(100, done), 3)
    next(ahead)
    deadline = threading.Event()
    deadline.wait(0.3)
    assert len(done) == 1 + 3 + 1  # Taken, waiting, and the one that waits to be put.
    ahead.close()
    assert not ahead.thread.is_alive() and len(done) <= 6
