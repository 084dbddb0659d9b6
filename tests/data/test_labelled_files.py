"""Files of labelled examples: formats, classes, splits, images, and what is refused."""

import csv
import json
import logging
import re

import numpy as np
import pytest
from PIL import Image

from sae_runner.data._labelled_files import LabelledFile
from sae_runner.data.base import Example, Unreadable
from sae_runner.errors import DataError

RECORDS = [
    {"input": f'text, "{i}"', "label": ["no", "yes", "maybe"][i % 7 % 3], "split": "train"}
    for i in range(40)
]
for i in (3, 4, 5, 30):
    RECORDS[i]["split"] = "test"


def write(path, records=RECORDS):
    names = list(records[0])
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    elif path.suffix == ".tsv":
        lines = [names, *([str(r[n]) for n in names] for r in records)]
        path.write_text("".join("\t".join(line) + "\n" for line in lines))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(records)
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(records), path)
    return path


def opened(path, *, seed=0, n_train=None, n_test=None):
    return LabelledFile(path, seed=seed, limits={"train": n_train, "heldout": n_test}, where="F")


def without(records, *names):
    return [{k: v for k, v in record.items() if k not in names} for record in records]


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "tsv", "parquet"])
def test_every_format_holds_the_same(tmp_path, suffix):
    file = opened(write(tmp_path / f"bias.{suffix}"))
    assert (file.name, file.modality, file.label_names) == ("bias", "text", ("maybe", "no", "yes"))
    assert file.ids("heldout").tolist() == [3, 4, 5, 30]
    assert file.ids("train").tolist() == [i for i in range(40) if i not in (3, 4, 5, 30)]
    assert file.load(np.array([4, 2])) == [
        Example(4, 'text, "4"', 2), Example(2, 'text, "2"', 0)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("label", "names"),
    [([0, 1], ("0", "1")), ([False, True], ("0", "1")), (["10", "9"], ("9", "10")),
     ([-1, 1], ("-1", "1"))],
)  # fmt: skip
def test_classes_are_numbers_in_order_or_names(tmp_path, label, names):
    records = [{"sentence": "a", "class": label[i % 2]} for i in range(4)]
    file = opened(write(tmp_path / "f.jsonl", records))
    assert file.label_names == names
    place = names.index(str(int(label[0])))
    assert file.classes.tolist() == [place, 1 - place] * 2


def test_without_a_split_a_fifth_of_each_class_is_held_out_by_seed(tmp_path):
    labels = [0] * 50 + [1] * 15
    records = [{"text": str(i), "label": y} for i, y in enumerate(labels)]
    file = opened(write(tmp_path / "f.csv", records))
    test, train = file.ids("heldout"), file.ids("train")
    assert np.bincount(file.classes[test]).tolist() == [10, 3]
    assert sorted([*test, *train]) == list(range(65))
    assert opened(file.path).ids("heldout").tolist() == test.tolist()
    assert opened(file.path, seed=1).ids("heldout").tolist() != test.tolist()
    few = opened(file.path, n_train=20, n_test=5)
    assert len(few.ids("train")) == 20 and set(few.ids("train")) < set(train)
    assert len(few.ids("heldout")) == 5 and set(few.ids("heldout")) < set(test)
    assert few.ids("train").tolist() != train[:20].tolist()  # A sample, not the first.


def test_images_are_found_beside_the_file_and_count_as_content(tmp_path):
    (tmp_path / "img").mkdir()
    for i in range(4):
        Image.fromarray(np.full((3, 3), 40 * i, np.uint8)).save(tmp_path / f"img/{i}.png")
    records = [{"image": f"img/{i}.png", "label": i % 2} for i in range(4)]
    file = opened(write(tmp_path / "f.jsonl", records))
    (example,) = file.load([3])
    assert file.modality == "image" and example.label == 1
    assert np.asarray(example.value).tolist() == [[[120] * 3] * 3] * 3
    before = file.fingerprint()
    assert opened(file.path).fingerprint() == before
    (tmp_path / "img/2.png").write_bytes(b"torn")
    torn = opened(file.path)
    assert torn.fingerprint() != before
    assert isinstance(torn.load([2])[0], Unreadable)


def test_a_changed_record_is_other_content(tmp_path):
    path = write(tmp_path / "f.tsv")
    before = opened(path).fingerprint()
    write(path, [*RECORDS[:-1], RECORDS[-1] | {"label": "no"}])
    assert opened(path).fingerprint() != before


@pytest.mark.parametrize(
    ("records", "message"),
    [
        (without(RECORDS, "label"), "F: it has no column 'label'. Choose from: input, split."),
        (without(RECORDS, "input"), "F: it has no column 'input'. Choose from: label, split."),
        ([*RECORDS, RECORDS[0] | {"split": "dev"}], "record 41 has split 'dev'. Choose from: test"),
        ([*RECORDS, RECORDS[0] | {"split": "trian"}], "split 'trian'. Did you mean 'train'?"),
        ([*RECORDS, RECORDS[0] | {"label": None}], "F: record 41 has no label"),
        ([*RECORDS, RECORDS[0] | {"label": 0.5}], "record 41 has label 0.5, which is no class"),
        ([*RECORDS, RECORDS[0] | {"input": " "}], "F: record 41 has no input"),
        ([*RECORDS, RECORDS[0] | {"input": "a.png"}], "record 41 is not a text, which the first"),
        ([{"input": "a.png", "label": 1}], "F: record 1: no such file: "),
    ],
)  # fmt: skip
def test_what_is_no_task_is_refused_in_a_line(tmp_path, records, message):
    with pytest.raises(DataError, match=re.escape(message)) as error:
        opened(write(tmp_path / "f.jsonl", records))
    assert str(error.value).startswith("F: ") and "\n" not in str(error.value)


def test_broken_lines_and_other_formats_are_refused(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    path = write(tmp_path / "f.jsonl")
    path.write_text(path.read_text() + "{torn\n")
    with pytest.raises(DataError, match=r"^F: record 41: "):
        opened(path)
    (tmp_path / "f.txt").write_text("text")
    with pytest.raises(DataError, match=r"^F: such files are not read; use .jsonl"):
        opened(tmp_path / "f.txt")
    (tmp_path / "e.csv").write_text("input,label\n")
    with pytest.raises(DataError, match=r"^F: no examples in it"):
        opened(tmp_path / "e.csv")
