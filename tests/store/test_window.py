from dataclasses import replace

import numpy as np
import pytest
import torch

from sae_runner.data.base import SPLITS
from sae_runner.errors import DataError
from sae_runner.models.base import Inputs, SiteInfo, Tap, labels_of
from sae_runner.site import TokenSelection, layout_key
from sae_runner.store.window import WindowPlan, compute_window, select_rows, stored

INFO = SiteInfo("blocks.0.resid_post", "block", 2, "tokens", None)


def inputs(attended: list[list[int]]) -> Inputs:
    n = len(attended)
    return Inputs(torch.arange(n) + 40, {}, torch.tensor(attended, dtype=torch.bool))


def plan(world, **changes) -> WindowPlan:
    return WindowPlan.make(
        world.dataset, **{"window_rows": 20, "rows_per_example": 4, "seed": 0, **changes}
    )


def test_windows_are_a_partition_of_each_split_in_a_seeded_order(world):
    made = plan(world)
    assert (made.window_examples, made.window_rows) == (5, 20)
    for split in SPLITS:
        windows = [made.examples(split, w) for w in range(made.n_windows(split))]
        assert [len(w) for w in windows[:-1]] == [5] * (len(windows) - 1)
        assert all((np.diff(w) > 0).all() for w in windows)
        together = np.concatenate(windows)
        assert sorted(together.tolist()) == world.dataset.ids(split).tolist()
        assert together.tolist() != world.dataset.ids(split).tolist()
    again, other = plan(world), plan(world, seed=1)
    assert (again.ids["train"] == made.ids["train"]).all()
    assert (other.ids["train"] != made.ids["train"]).any()


def test_a_window_has_one_example_at_least(world):
    assert plan(world, rows_per_example=1000).window_examples == 1


def test_every_window_has_a_permutation_of_its_own(world):
    made = plan(world)
    orders = [tuple(made.order(split, w, 50).tolist()) for split in SPLITS for w in range(3)]
    orders.append(tuple(plan(world, seed=1).order("train", 0, 50).tolist()))
    assert len(set(orders)) == 7
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert torch.equal(made.order("train", 1, 50), plan(world).order("train", 1, 50))


def test_a_split_without_examples_is_refused(world):
    world.dataset.ids = lambda split: np.arange(0 if split == "heldout" else 5)
    with pytest.raises(DataError, match="its heldout split is empty"):
        plan(world)


def test_rows_are_selected_with_their_ids_and_positions():
    x = torch.arange(12.0).view(2, 3, 2)
    rows, ids, positions, number = select_rows(
        x, INFO, TokenSelection("all"), inputs([[1, 1, 0], [0, 1, 1]])
    )
    assert rows.tolist() == [[0, 1], [2, 3], [8, 9], [10, 11]]
    assert ids.tolist() == [40, 40, 41, 41] and ids.dtype == torch.int32
    assert positions.tolist() == [0, 1, 1, 2] and number.tolist() == [0, 0, 1, 1]


def test_means_are_over_kept_tokens_alone():
    x = torch.arange(18.0).view(3, 3, 2)
    x[0, 2] = float("nan")  # Padding may hold anything.
    rows, ids, positions, number = select_rows(
        x, INFO, TokenSelection("mean"), inputs([[1, 1, 0], [0, 0, 0], [1, 1, 1]])
    )
    assert rows.tolist() == [[1, 2], [14, 15]]
    assert ids.tolist() == [40, 42] and positions.tolist() == [-1, -1]
    assert number.tolist() == [0, 2]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_means_of_half_precision_are_taken_in_fp32(dtype):
    x = torch.full((1, 4000, 2), 40.0, dtype=dtype)  # Sums past 65,504, and past bf16's integers.
    x[0, 0] = 41.0
    rows, *_ = select_rows(x, INFO, TokenSelection("mean"), inputs([[1] * 4000]))
    torch.testing.assert_close(rows.float(), torch.full((1, 2), 40.00025), rtol=1e-6, atol=0)


def test_what_is_not_finite_is_refused_by_example():
    ids = torch.tensor([7, 8])
    x = torch.tensor([[1.0, 2.0], [3.0, 7e4]])
    with pytest.raises(DataError, match=r"store\.dtype=fp16: blocks.* reaches 7e\+04 at example 8"):
        stored(x, "fp16", INFO, ids)
    assert stored(x, "bf16", INFO, ids).dtype == torch.bfloat16
    x[0, 1] = float("nan")
    with pytest.raises(DataError, match="activation of example 7 is NaN or infinite"):
        stored(x, "bf16", INFO, ids)


def test_a_window_depends_on_nothing_outside_it(world):
    made = plan(world)
    infos = [world.host.sites()["embed"]]

    def window(number: int):
        return compute_window(
            world.host, world.dataset, infos, world.selection, made, "train", number,
            batch_size=3, workers=0, dtype="fp32",
        )  # fmt: skip

    later_first = window(3)
    window(0)
    again = window(3)
    assert torch.equal(later_first.activations["embed"], again.activations["embed"])
    assert torch.equal(later_first.example_id, again.example_id) and len(again) == len(
        later_first.position
    )


def test_workers_read_ahead_but_no_further_than_they_are_many(world):
    from sae_runner.store.loading import load_batches

    world.dataset.loaded.clear()
    found = load_batches(world.dataset, world.host, np.arange(60), 5, 2)
    first = next(found)
    assert first.inputs is not None and first.inputs.ids.tolist() == [0, 1, 2, 3, 4]
    assert max(world.dataset.loaded) < 5 * 4
    ids = [i for batch in found for i in batch.inputs.ids.tolist()]
    assert ids == list(range(5, 60))


def test_a_batch_of_unreadable_examples_has_no_inputs(world):
    from sae_runner.store.loading import load_batches

    world.dataset.bad = {5, 6}
    batches = list(load_batches(world.dataset, world.host, np.arange(4, 10), 2, 0))
    assert [None if b.inputs is None else b.inputs.ids.tolist() for b in batches] == [
        [4], [7], [8, 9],
    ]  # fmt: skip
    assert [[bad.id for bad in b.bad] for b in batches] == [[5], [6], []]
    world.dataset.bad = {4, 5}
    assert next(load_batches(world.dataset, world.host, np.arange(4, 6), 2, 0)).inputs is None


class Shrunk(torch.nn.Module):
    """Half as many tokens come out as go in, as after a stage of a convolutional network."""

    def forward(self, x):
        return x[:, ::2]


@pytest.mark.parametrize("tokens", ["last", "random_k", "positions"])
def test_sites_of_other_tokens_share_no_window(world, tokens):
    world.dataset.same = 6
    world.host.network.add_module("shrunk", Shrunk())
    taps = {**world.host.taps(), "shrunk": Tap("shrunk")}
    world.host.taps = lambda: taps
    sites = world.host.sites()
    selection = TokenSelection(tokens, k=2, positions=(0, -1))

    def window(*names: str):
        return compute_window(
            world.host, world.dataset, [sites[name] for name in names], selection, plan(world),
            "train", 0, batch_size=3, workers=0, dtype="fp32",
        )  # fmt: skip

    prepare = world.host.prepare  # As images are: no padding that says which tokens count.
    world.host.prepare = lambda examples: replace(prepare(examples), attended=None)
    assert len(window("embed", "blocks.0.resid_post")) == len(window("shrunk"))
    with pytest.raises(DataError, match="embed and shrunk differ in their tokens"):
        window("embed", "shrunk")


def test_the_layout_of_a_site_says_with_which_others_it_shares_rows():
    stage = SiteInfo("stages.0.blocks.0", "m", 96, "map", 3136, grid=(56, 56))
    assert layout_key(stage) == layout_key(replace(stage, name="stages.0.blocks.1", d=192))
    for change in ({"n_tokens": 784}, {"kind": "tokens"}, {"n_prefix": 1}, {"has_cls": True}):
        assert layout_key(stage) != layout_key(replace(stage, **change))


@pytest.mark.parametrize("named", [True, False])
def test_rows_of_unlabelled_examples_are_marked(world, named):
    labels = {i: None if i % 4 < 3 else i % 3 for i in range(world.dataset.n)}
    load, prepare = world.dataset.load, world.host.prepare
    world.dataset.load = lambda ids: [e._replace(label=labels[e.id]) for e in load(ids)]
    world.host.prepare = lambda examples: replace(
        prepare([e._replace(label=0) for e in examples]), labels=labels_of(examples)
    )
    world.dataset.label_names = ("a", "b", "c") if named else None
    for batch_size in (1, 5):  # One at a time, most batches have no label at all.
        rows = compute_window(
            world.host, world.dataset, [world.host.sites()["embed"]], world.selection, plan(world),
            "train", 0, batch_size=batch_size, workers=0, dtype="fp32",
        )  # fmt: skip
        if named:
            known = [-1 if labels[i] is None else labels[i] for i in rows.example_id.tolist()]
            assert rows.label.tolist() == known and -1 in known and max(known) >= 0
        else:
            assert rows.label is None
