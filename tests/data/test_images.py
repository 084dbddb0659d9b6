import io
import json
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import numpy as np
import pytest
import yaml
from PIL import Image

from sae_runner.config import config_dir
from sae_runner.data import build_dataset
from sae_runner.data._sources import content_hash
from sae_runner.data._streams import count_ahead
from sae_runner.data.base import Unreadable
from sae_runner.errors import ConfigError, DataError

OPTIONS = {
    "type": "images", "name": "test", "split": "train", "subset": None, "revision": None,
    "heldout_path": None, "heldout_split": None, "heldout": 0.25, "image_column": None,
    "label_column": None, "caption_column": None, "caption_template": None, "n_examples": None,
    "n_heldout": None, "streaming": False, "seed": 0,
}  # fmt: skip
NAMES = ["cat", "dog", "frog"]


def picture(i: int, mode: str = "RGB") -> Image.Image:
    """Flat colour that tells the number."""
    return Image.new("RGB", (6, 5), (i, 255 - i, 7)).convert(mode)


def png(i: int, mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    picture(i, mode).save(buffer, "PNG")
    return buffer.getvalue()


def table(n: int, **columns) -> datasets.Dataset:
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)}
        | {name: datasets.Value("string") for name in columns}
    )
    rows = {
        "image": [{"bytes": png(i), "path": None} for i in range(n)],
        "label": [i % 3 for i in range(n)],
    }
    return datasets.Dataset.from_dict(rows | columns, features=features)


@pytest.fixture
def parquet(tmp_path) -> Path:
    path = tmp_path / "train.parquet"
    table(12).to_parquet(path)
    return path


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def build(path, **changes):
    return build_dataset(OPTIONS | {"path": str(path)} | changes)


def numbers(examples) -> list[int]:
    return [np.asarray(example.value)[0, 0, 0].item() for example in examples]


def test_a_parquet_file(parquet):
    dataset = build(parquet)
    train, heldout = dataset.ids("train"), dataset.ids("heldout")
    assert len(heldout) == 3 and sorted([*train, *heldout]) == list(range(12))
    assert dataset.label_names == tuple(NAMES)

    examples = dataset.load([7, 2, 11])
    assert [e.id for e in examples] == [7, 2, 11] == numbers(examples)
    assert [e.label for e in examples] == [1, 2, 2]
    assert all(e.value.mode == "RGB" and e.value.size == (6, 5) for e in examples)
    assert dataset.describe()["n_train"] == 9


def test_a_held_out_file_continues_the_ids(parquet, tmp_path):
    table(5).to_parquet(tmp_path / "test.parquet")
    dataset = build(parquet, heldout_path=str(tmp_path / "test.parquet"))
    assert dataset.ids("train").tolist() == list(range(12))
    assert dataset.ids("heldout").tolist() == [12, 13, 14, 15, 16]
    assert numbers(dataset.load([16, 0, 12])) == [4, 0, 0]

    few = build(parquet, heldout_path=str(tmp_path / "test.parquet"), n_examples=4, n_heldout=2)
    assert len(few.ids("train")) == 4 and set(few.ids("train")) < set(range(12))
    assert len(few.ids("heldout")) == 2 and set(few.ids("heldout")) < set(range(12, 17))
    assert few.ids("train").tolist() != [0, 1, 2, 3], "a sample, not the first"


def test_every_local_layout_gives_the_same_pictures(parquet, tmp_path):
    shards = tmp_path / "shards"
    shards.mkdir()
    table(12).select(range(5)).to_parquet(shards / "train-0.parquet")
    table(12).select(range(5, 12)).to_parquet(shards / "train-1.parquet")
    table(12).save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(train=table(12), test=table(3)).save_to_disk(tmp_path / "splits")

    layouts = [parquet, f"{shards}/*.parquet", shards, tmp_path / "saved", tmp_path / "splits"]
    for layout in layouts:
        dataset = build(layout)
        examples = dataset.load(range(12))
        assert numbers(examples) == list(range(12)), layout
        assert [e.label for e in examples] == [i % 3 for i in range(12)], layout


def test_split_of_a_folder(tmp_path):
    datasets.DatasetDict(train=table(12), test=table(3)).save_to_disk(tmp_path / "splits")
    dataset = build(tmp_path / "splits", heldout_split="test")
    assert len(dataset.ids("train")) == 12 and len(dataset.ids("heldout")) == 3
    with pytest.raises(DataError, match=r"no split 'tset'\. Did you mean 'test'"):
        build(tmp_path / "splits", heldout_split="tset")


def test_one_saved_table_holds_out_a_share_whatever_the_hub_has(tmp_path, caplog):
    table(12).save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(train=table(12)).save_to_disk(tmp_path / "alone")
    for folder in ("saved", "alone"):
        with caplog.at_level("INFO"):
            dataset = build(tmp_path / folder, heldout_split="test")
        assert "a share of it is held out" in caplog.text
        assert sorted([*dataset.ids("train"), *dataset.ids("heldout")]) == list(range(12))
        caplog.clear()
    apart = build(tmp_path / "saved", heldout_path=str(tmp_path / "alone"), heldout_split="test")
    assert len(apart.ids("heldout")) == 12


def test_what_is_trained_on_is_not_held_out(parquet):
    for same in (parquet, f"{parquet.parent}/../{parquet.parent.name}/{parquet.name}"):
        with pytest.raises(DataError, match=r"heldout_path=.*: the same examples as dataset\.path"):
            build(parquet, heldout_path=str(same))


def test_a_folder_of_pictures_in_folders(tmp_path):
    for name in ("frog", "cat"):
        (tmp_path / "train" / name).mkdir(parents=True)
    for i in range(6):
        picture(i).save(tmp_path / "train" / ("cat", "frog")[i % 2] / f"{i}.png")
    dataset = build(tmp_path / "train")
    assert dataset.label_names == ("cat", "frog")
    examples = dataset.load(range(6))
    assert sorted(numbers(examples)) == list(range(6))
    for example, number in zip(examples, numbers(examples), strict=True):
        assert example.label == number % 2


def test_folders_of_pictures_for_training_and_for_what_is_held_out(tmp_path):
    """As imagenet1k.yaml says; what is held out lacks a class and has one of its own."""
    for split, names in (("train", ("ant", "cat", "frog")), ("val", ("cat", "eel"))):
        for i, name in enumerate(names):
            (tmp_path / split / name).mkdir(parents=True)
            picture(i).save(tmp_path / split / name / f"{i}.png")
    dataset = build(tmp_path / "train", heldout_path=str(tmp_path / "val"), heldout_split="val")
    assert dataset.label_names == ("ant", "cat", "frog", "eel")
    named = {
        split: [dataset.label_names[e.label] for e in dataset.load(dataset.ids(split))]
        for split in ("train", "heldout")
    }
    assert named == {"train": ["ant", "cat", "frog"], "heldout": ["cat", "eel"]}
    assert numbers(dataset.load(range(5))) == [0, 1, 2, 0, 1]


@pytest.mark.parametrize("lacking", ["image", "label"])
def test_what_is_held_out_has_the_same_columns(parquet, tmp_path, lacking):
    table(3).rename_column(lacking, "other").to_parquet(tmp_path / "test.parquet")
    message = rf"dataset\.heldout_path=.*test\.parquet: no column '{lacking}', which .*other"
    with pytest.raises(DataError, match=message):
        build(parquet, heldout_path=str(tmp_path / "test.parquet"))


def test_a_folder_with_one_split_holds_out_a_share_of_it(tmp_path, caplog):
    (tmp_path / "all").mkdir()
    for i in range(8):
        picture(i).save(tmp_path / "all" / f"{i}.png")
    with caplog.at_level("INFO"):
        dataset = build(tmp_path / "all", heldout_split="test")
    assert [len(dataset.ids(split)) for split in ("train", "heldout")] == [6, 2]
    assert "no split 'test'" in caplog.text and "a share of it is held out" in caplog.text


def webdataset(path: Path, n: int) -> Path:
    with tarfile.open(path, "w") as tar:
        for i in range(n):
            for suffix, data in ((".png", png(i)), (".txt", f"number {i}\n".encode())):
                info = tarfile.TarInfo(f"{i:04d}{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize("streaming", [False, True])
def test_webdataset_with_captions(tmp_path, streaming):
    path = webdataset(tmp_path / "shard.tar", 8)
    dataset = build(path, streaming=streaming, n_heldout=2, n_examples=6)
    examples = dataset.load(list(range(8)))
    assert numbers(examples) == list(range(8))
    assert [e.caption for e in examples] == [f"number {i}" for i in range(8)]
    assert dataset.label_names is None and examples[0].label is None


def test_a_short_archive_is_refused_by_its_headers(tmp_path, monkeypatch):
    path = webdataset(tmp_path / "shard.tar", 8)
    webdataset(tmp_path / "second.tar", 8)
    assert [count_ahead([path], n) for n in (3, 8, 9)] == [3, 8, 8]
    assert count_ahead([path, tmp_path / "second.tar"], 99) == 16
    with pytest.raises(DataError, match=r"ends after 8 examples; lower dataset\.n_examples"):
        build(path, streaming=True, n_heldout=2, n_examples=7)
    assert count_ahead([path], 10**9) is None  # That many headers are better not read.
    (tmp_path / "broken.tar").write_bytes(b"\x01" * 600)
    assert count_ahead([tmp_path / "broken.tar"], 5) is None


def test_a_stream_holds_out_its_first_and_starts_again(parquet):
    dataset = build(parquet, streaming=True, n_heldout=3, n_examples=6)
    assert not dataset.random_access
    assert dataset.ids("heldout").tolist() == [0, 1, 2]
    assert dataset.ids("train").tolist() == [3, 4, 5, 6, 7, 8]
    assert numbers(dataset.load([3, 5])) == [3, 5]
    assert numbers(dataset.load([6])) == [6]
    assert numbers(dataset.load([0, 1])) == [0, 1]
    with pytest.raises(DataError, match="ends after 12 examples"):
        dataset.load([12])
    build(parquet, streaming=True, n_heldout=3, n_examples=9)
    with pytest.raises(DataError, match="ends after 12 examples"):  # Before a row is read.
        build(parquet, streaming=True, n_heldout=3, n_examples=10)
    with pytest.raises(ConfigError, match=r"needs dataset\.n_examples=N"):
        build(parquet, streaming=True, n_heldout=3)


@pytest.mark.parametrize(
    ("labels", "names"),
    [([0, 2, -1, 2], ("0", "1", "2")), ([7, 1000, 12, 5], None), ([-1, -1, -1, -1], None)],
)
def test_numbers_without_names_are_their_own(tmp_path, labels, names):
    """As of a table that was written without the classes. names; large ones are no classes."""
    features = datasets.Features({"img": datasets.Image(), "label": datasets.Value("int64")})
    rows = {"img": [picture(i) for i in range(4)], "label": labels}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "a.parquet")
    dataset = build(tmp_path / "a.parquet")
    assert dataset.label_names == names
    assert [e.label for e in dataset.load(range(4))] == [None if x < 0 else x for x in labels]


def test_captions_from_labels_and_labels_from_strings(parquet, tmp_path):
    captioned = build(parquet, caption_template="a photo of a {}")
    assert captioned.load([1])[0].caption == "a photo of a dog"
    assert captioned.fingerprint() != build(parquet).fingerprint()

    words = ["dog", "ant", "dog", "bee"]
    table(4, kind=words).to_parquet(tmp_path / "words.parquet")
    dataset = build(tmp_path / "words.parquet", label_column="kind")
    assert dataset.label_names == ("ant", "bee", "dog")
    assert [dataset.label_names[e.label] for e in dataset.load(range(4))] == words

    unlabelled = build(parquet, label_column="none")
    assert unlabelled.label_names is None and unlabelled.load([0])[0].label is None
    with pytest.raises(ConfigError, match=r"dataset\.caption_template"):
        build(parquet, label_column="none", caption_template="a {}")


def test_what_cannot_be_read_is_named_and_the_rest_is_there(tmp_path):
    broken = [png(0), png(1)[:46], b"no image at all", png(3), None]
    features = datasets.Features({"img": datasets.Image(), "label": datasets.Value("int64")})
    cells = [None if data is None else {"bytes": data, "path": None} for data in broken]
    rows = {"img": cells, "label": [0, 1, 2, -1, 4]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "x.parquet")

    examples = build(tmp_path / "x.parquet").load(range(5))
    assert [isinstance(e, Unreadable) for e in examples] == [False, True, True, False, True]
    assert examples[2].reason == "UnidentifiedImageError: cannot identify image file"
    assert examples[3].label is None, "-1 is no class"


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "I;16", "CMYK"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    grey = 200
    image = Image.new("L", (6, 5), grey)
    if mode == "I;16":
        image = Image.fromarray(np.full((5, 6), grey * 257, np.uint16))
    elif mode == "P":
        image = image.quantize(4)
    else:
        image = image.convert("RGB").convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, "TIFF")
    features = datasets.Features({"image": datasets.Image()})
    rows = {"image": [{"bytes": buffer.getvalue(), "path": None}] * 4}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "x.parquet")
    value = build(tmp_path / "x.parquet").load([0])[0].value
    assert value.mode == "RGB"
    if mode != "1":
        assert np.abs(np.asarray(value).astype(int) - grey).max() <= 2


def test_the_fingerprint_is_of_content_not_of_place(parquet, tmp_path):
    first = build(parquet).fingerprint()
    (tmp_path / "elsewhere").mkdir()
    copy = tmp_path / "elsewhere" / "train.parquet"
    copy.write_bytes(parquet.read_bytes())
    assert build(copy).fingerprint() == first
    assert build(copy, seed=3, n_examples=2).fingerprint() == first

    changed = table(12).map(lambda row, i: {"label": (row["label"] + (i == 5)) % 3},
                            with_indices=True)  # fmt: skip
    changed.to_parquet(copy)
    assert build(copy).fingerprint() != first


def test_of_large_files_blocks_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr("sae_runner.data._sources._HASHED_WHOLE", 100)
    path = tmp_path / "large"
    path.write_bytes(bytes(2**22))
    first = content_hash([path], tmp_path)
    content = bytearray(2**22)
    content[-1] = 1
    path.write_bytes(content)
    assert content_hash([path], tmp_path) != first


def test_threads_read_the_same(parquet):
    dataset = build(parquet)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda i: numbers(dataset.load([i % 12, (i + 5) % 12])), range(48)))
    assert results == [[i % 12, (i + 5) % 12] for i in range(48)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"path": "{dir}/trian.parquet"},
            r"path=.*trian\.parquet: no such file.*train\.",
        ),
        ({"path": "{dir}/*.tar"}, r"dataset\.path=.*\*\.tar: no such file"),
        ({"path": "{dir}/empty"}, r"path=.*empty: there is no file in it"),
        ({"path": "{dir}/notes.txt"}, r"cannot read \.txt files"),
        ({"path": "{dir}/bad.parquet"}, r"dataset\.path=.*bad\.parquet: cannot be read \("),
        ({"path": "{dir}/cut.parquet"}, r"cut\.parquet: cannot be read \(Parquet magic bytes"),
        ({"path": "nobody/nothing"}, r"dataset\.path=nobody/nothing: not a file or folder here"),
        ({"image_column": "imgae"}, r"dataset\.image_column=imgae.*Did you mean 'image'.*label"),
        ({"label_column": "labels"}, r"dataset\.label_column=labels.*Did you mean 'label'"),
        ({"heldout_path": "{dir}/no.parquet"}, r"dataset\.heldout_path=.*no\.parquet"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(parquet, changes, message, monkeypatch, capfd):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    folder = parquet.parent
    (folder / "empty").mkdir()
    (folder / "notes.txt").write_text("no table")
    (folder / "bad.parquet").write_bytes(b"PAR1 or so")
    (folder / "cut.parquet").write_bytes(parquet.read_bytes()[:-40])
    filled = {k: v.replace("{dir}", str(folder)) for k, v in changes.items()}
    with pytest.raises((DataError, ConfigError), match=message) as caught:
        build(**({"path": parquet} | filled))
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""  # The library logs to a handler of its own.


def test_columns_of_captioned_tars_are_guessed(tmp_path):
    path = webdataset(tmp_path / "w.tar", 8)
    cfg = yaml.safe_load((Path(config_dir()) / "dataset" / "cc3m.yaml").read_text())
    dataset = build_dataset(cfg | {"path": str(path), "n_examples": 6, "n_heldout": 2})
    assert [e.caption for e in dataset.load([0, 1])] == ["number 0", "number 1"]


def test_an_empty_table_and_one_without_images(tmp_path):
    table(0).to_parquet(tmp_path / "none.parquet")
    with pytest.raises(DataError, match="no examples in it"):
        build(tmp_path / "none.parquet")
    datasets.Dataset.from_dict({"a": [1, 2]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"dataset\.image_column=null: no column looks like"):
        build(tmp_path / "a.parquet")


@pytest.mark.parametrize("name", ["cifar10", "mnist", "imagenet1k", "cc3m"])
def test_the_yaml_has_every_option(name, parquet):

    from sae_runner.data import COMMON_KEYS, DATASETS

    options = yaml.safe_load((Path(config_dir()) / "dataset" / f"{name}.yaml").read_text())
    assert options.keys() >= COMMON_KEYS
    checked = DATASETS.check({k: v for k, v in options.items() if k not in COMMON_KEYS})
    assert checked["name"] == name
    assert json.dumps(checked)


@pytest.mark.data
@pytest.mark.parametrize("name", ["cifar10", "mnist"])
def test_real_files(name, data_dir):
    folder = data_dir / name
    options = {"heldout_path": str(folder / "test.parquet"), "label_column": "label"}
    dataset = build(folder / "train.parquet", **options)
    n = {"cifar10": 50_000, "mnist": 60_000}[name]
    assert len(dataset.ids("train")) == n and len(dataset.ids("heldout")) == 10_000
    first, last = dataset.load([0, n + 9_999])
    assert first.value.size == {"cifar10": (32, 32), "mnist": (28, 28)}[name]
    assert last.label in range(10) and len(dataset.label_names) == 10


def test_a_file_without_splits_holds_out_a_share_whatever_the_hub_has(parquet, caplog):
    with caplog.at_level("INFO", "sae_runner"):
        dataset = build(path=parquet, heldout_split="test")
    assert "without splits: a share of it is held out" in caplog.text
    same = build(path=parquet, heldout_split=None)
    for split in ("train", "heldout"):
        assert dataset.ids(split).tolist() == same.ids(split).tolist()
    assert not set(dataset.ids("train")) & set(dataset.ids("heldout"))
