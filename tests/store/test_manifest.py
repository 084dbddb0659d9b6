import json

import pytest

from sae_runner.errors import StoreError
from sae_runner.models.base import SiteInfo
from sae_runner.site import TokenSelection
from sae_runner.store.manifest import (
    SELECTION_SCHEMA,
    check_same_source,
    is_complete,
    n_missing,
    read_json,
    records_dir,
    selection_dir,
    site_from_json,
    site_to_json,
    sites_of,
)

SITES = [
    SiteInfo("blocks.3.resid_post", "h.3", 8, "tokens", None, n_prefix=1, has_cls=True),
    SiteInfo("stages.2.blocks.0", "stages.2.0", 8, "map", 49, grid=(7, 7)),
]


@pytest.mark.parametrize("info", SITES, ids=lambda info: info.name)
def test_a_site_survives_json(info):
    text = json.dumps({"sites": {info.name: site_to_json(info)}})
    assert sites_of(json.loads(text)) == {info.name: info}
    assert site_from_json(site_to_json(info)) == info


def test_selections_that_differ_have_folders_that_differ(tmp_path):
    selections = [
        TokenSelection("all"), TokenSelection("all", drop_special=False), TokenSelection("cls"),
        TokenSelection("all", drop_positions=(0,)), TokenSelection("all", drop_positions=(0, 3)),
        TokenSelection("random_k", k=4), TokenSelection("random_k", k=4, seed=1),
        TokenSelection("positions", positions=(0, -1)), TokenSelection("positions", positions=(1,)),
        TokenSelection("last"), TokenSelection("mean"),
    ]  # fmt: skip
    folders = {selection_dir(tmp_path, "blocks.3/../x y", s) for s in selections}
    assert len(folders) == len(selections)
    assert all(folder.parent == tmp_path and " " not in folder.name for folder in folders)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is no finished store: it has no manifest.json"),
        (b"", "is damaged"),
        (b"{\"schema\": ", "is damaged"),
        (b"\xff\xfe\x00", "is damaged"),
        (b"[1, 2]", "schema 'list', expected 'sae-run.selection/1'; written by another tool"),
        (b"{}", "schema None, expected"),
        (b"{\"schema\": \"saev/2\"}", "schema 'saev/2', expected"),
    ],
)  # fmt: skip
def test_foreign_and_damaged_json_is_refused_in_one_line(tmp_path, content, message):
    path = tmp_path / "manifest.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(StoreError, match=message) as error:
        read_json(path, SELECTION_SCHEMA, "finished store")
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_a_selection_is_complete_when_its_writer_is_through(tmp_path):
    assert not is_complete(tmp_path)
    records_dir(tmp_path).mkdir()
    (tmp_path / "manifest.json").write_text("{}")
    assert not is_complete(tmp_path)
    records_dir(tmp_path).rmdir()
    assert is_complete(tmp_path)


def test_rows_of_other_weights_or_data_are_not_added(tmp_path, world):
    store = {"model": {"fingerprint": "a" * 64}, "dataset": {"fingerprint": "b" * 64}}
    check_same_source(tmp_path, store, "a" * 64, "b" * 64)
    with pytest.raises(StoreError, match=r"other model weights \(aaaaaaaaaaaa, now cccccccccccc\)"):
        check_same_source(tmp_path, store, "c" * 64, "b" * 64)
    with pytest.raises(StoreError, match=r"from other data .*force=true"):
        check_same_source(tmp_path, store, "a" * 64, "c" * 64)
    world.write()
    world.dataset.fingerprint = lambda: "c" * 64
    with pytest.raises(StoreError, match="written from other data"):
        world.write("blocks.0.resid_post")


@pytest.mark.parametrize(("asked", "n_unreadable", "expected"), [(3, 0, 4), (3, 1, 1), (0, 0, 0)])
def test_rows_that_short_examples_did_not_give_are_counted(asked, n_unreadable, expected):
    splits = {"train": {"n_examples": 8, "n_rows": 21}, "heldout": {"n_examples": 2, "n_rows": 5}}
    assert n_missing(asked, splits, n_unreadable) == expected
