import os

import pytest

from sae_runner.commands.inventory import take_inventory
from sae_runner.commands.words import named, restricted
from sae_runner.errors import InputError


@pytest.fixture
def things(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for store in ("toy-a", "toy-b"):
        write(f"stores/{store}/store.json", {"model": {}, "dataset": {}})
        write(f"stores/{store}/embed-all/x", "")
    for run in ("toy-topk-1", "toy-topk-2", "toy-relu-3"):
        write(f"train/{run}/config.yaml", {})
    write("train/notes.txt", "")
    return tmp_path / "outputs"


def names(entries):
    return [entry.name for entry in entries]


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("toy-topk-1", ["toy-topk-1"]),
        ("outputs/train/toy-topk-1", ["toy-topk-1"]),
        ("outputs/train/toy-topk-1/", ["toy-topk-1"]),
        ("./outputs/../outputs/train/toy-topk-1", ["toy-topk-1"]),
        ("train/toy-topk-1", ["toy-topk-1"]),
        ("toy-topk-*", ["toy-topk-1", "toy-topk-2"]),
        ("outputs/train/*", ["toy-relu-3", "toy-topk-1", "toy-topk-2"]),
        ("outputs/*/toy-[ab]", ["toy-a", "toy-b"]),
        ("toy-a/embed-all", ["toy-a/embed-all"]),
        ("outputs/stores/toy-b/embed-*", ["toy-b/embed-all"]),
    ],
)
def test_rm_takes_paths_names_and_globs(things, word, expected):
    inventory = take_inventory(things)
    assert names(named([word], inventory, things)) == expected
    absolute = str(things / "train" / "toy-topk-1")
    assert names(named([absolute], inventory, things)) == ["toy-topk-1"]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("toy-topk-9", "toy-topk-9: nothing of that name or path in .*Did you mean 'toy-topk-"),
        ("outputs/train", "is no store, run, model or anything else that `sae-run ls` shows; name"),
        ("outputs", "is no store"),
        ("outputs/train/notes.txt", "is no store"),
        ("outputs/train/toy-topk-1/config.yaml", "is no store"),
        ("elsewhere", "elsewhere is outside outputs=.*: nothing is removed there"),
        ("/", "/ is outside outputs="),
        ("..", ".. is outside outputs="),
        ("outputs/train/../../elsewhere", "is outside outputs="),
        ("nothing-*", "nothing of that name"),
    ],
)
def test_rm_refuses_what_is_nothing_or_elsewhere(things, tmp_path, word, message):
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(InputError, match=message):
        named([word], take_inventory(things), things)


def test_a_link_is_itself_and_not_what_it_leads_to(things, tmp_path):
    outside = tmp_path / "run"
    outside.mkdir()
    (outside / "config.yaml").write_text("{}")
    (things / "train" / "linked").symlink_to(outside)
    inventory = take_inventory(things)
    assert [e.path for e in named(["linked"], inventory, things)] == [things / "train" / "linked"]
    with pytest.raises(InputError, match="is outside outputs="):
        named([str(outside)], inventory, things)


def test_outputs_may_be_a_link_or_relative(things, tmp_path):
    (tmp_path / "link").symlink_to(things)
    inventory = take_inventory(tmp_path / "link")
    for word in ("outputs/train/toy-topk-1", "link/train/toy-topk-1", "train/toy-topk-1"):
        assert names(named([word], inventory, tmp_path / "link")) == ["toy-topk-1"]
    relative = type(things)(os.path.relpath(things))
    inventory = take_inventory(relative)
    assert names(named([str(things / "train/toy-topk-1")], inventory, relative)) == ["toy-topk-1"]


def test_ls_shows_all_below_a_folder_and_stores_with_their_selections(things):
    inventory = take_inventory(things)
    stores = ["toy-a", "toy-a/embed-all", "toy-b", "toy-b/embed-all"]
    assert names(restricted(["outputs/stores"], inventory, things)) == stores
    assert names(restricted(["toy-a"], inventory, things)) == stores[:2]
    assert names(restricted(["embed-*"], inventory, things)) == [stores[1], stores[3]]
    assert names(restricted(["outputs"], inventory, things)) == names(inventory)
    with pytest.raises(InputError, match="nothing of that name"):
        restricted(["toy-c"], inventory, things)
