import json
from pathlib import Path

import numpy as np
import pytest

from sae_runner.data import build_dataset
from sae_runner.data.base import Unreadable
from sae_runner.errors import ConfigError, DataError

OPTIONS = {
    "type": "text", "name": "text", "split": None, "subset": None, "revision": None,
    "heldout_path": None, "heldout_split": None, "heldout": 0.25, "columns": None,
    "text_column": None, "label_column": None, "label_names": None, "kind": "labelled",
    "document_separator": None, "n_examples": None, "n_heldout": None, "streaming": False,
    "seed": 0,
}  # fmt: skip
ROWS = [
    {"text": "a fine film", "label": "good"},
    {"text": 'he said "no", twice', "label": "bad"},
    {"text": "über alles gut", "label": "good"},
    {"text": "meh, really", "label": "so-so"},
]


def build(path, **options):
    return build_dataset(OPTIONS | {"path": str(path)} | options)


def texts(dataset, ids=None):
    return [e.value for e in dataset.load(range(4) if ids is None else ids)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The same four records in every format."""
    import csv

    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
    )
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        writer.writerows(ROWS)
    (tmp_path / "rows.tsv").write_text("".join(f"{r['text']}\t{r['label']}\n" for r in ROWS))
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    return tmp_path


# -- Formats ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "tsv", "parquet"])
def test_every_format_gives_the_same_examples(folder, suffix):
    dataset = build(
        folder / f"rows.{suffix}", columns=["text", "label"] if suffix == "tsv" else None
    )
    examples = dataset.load([2, 0, 1, 3])
    assert [e.id for e in examples] == [2, 0, 1, 3]
    assert [e.value for e in examples] == [ROWS[i]["text"] for i in (2, 0, 1, 3)]
    assert dataset.label_names == ("bad", "good", "so-so")
    assert [e.label for e in examples] == [1, 1, 0, 2]
    assert dataset.modality == "text" and dataset.random_access
    assert dataset.describe()["text_column"] == "text"


def test_arrow_files_and_saved_tables_are_read(folder, tmp_path):
    import datasets

    table = datasets.Dataset.from_list(ROWS)
    datasets.disable_progress_bars()
    table.save_to_disk(tmp_path / "saved")
    arrow = next((tmp_path / "saved").glob("*.arrow"))
    assert texts(build(tmp_path / "saved")) == texts(build(arrow)) == [r["text"] for r in ROWS]


def test_a_csv_record_may_span_lines_and_a_mark_may_begin_the_file(tmp_path):
    content = '\ufefftext,label\r\n"two\nlines, ""quoted""",1\r\n\r\nplain,0\r\nthird,1\r\n'
    (tmp_path / "rows.csv").write_bytes(content.encode())
    dataset = build(tmp_path / "rows.csv")
    assert texts(dataset, range(3)) == ['two\nlines, "quoted"', "plain", "third"]
    assert dataset.label_names == ("0", "1")


def test_quotes_mean_nothing_between_tabs(tmp_path):
    (tmp_path / "rows.tsv").write_text('"unclosed\t1\nnext " line\t0\nlast\t1\n')
    dataset = build(tmp_path / "rows.tsv", columns=["sentence", "label"])
    assert texts(dataset, range(3)) == ['"unclosed', 'next " line', "last"]
    assert [e.label for e in dataset.load(range(3))] == [1, 0, 1]


def test_a_header_that_says_the_same_as_columns_is_no_record(tmp_path):
    (tmp_path / "rows.tsv").write_text("sentence\tlabel\nfirst\t1\nsecond\t0\n")
    dataset = build(tmp_path / "rows.tsv", columns=["sentence", "label"])
    assert texts(dataset, range(2)) == ["first", "second"]


@pytest.mark.parametrize(
    ("suffix", "header"),
    [
        ("csv", "sentence,label"), ("csv", "label,sentence"), ("csv", "Sentence, Label"),
        ("csv", "idx,sentence,label"), ("csv", '"sentence","label"'), ("tsv", "label\tsentence"),
    ],
)  # fmt: skip
def test_a_header_with_the_names_that_are_wanted_is_no_record(tmp_path, suffix, header):
    """As of a file of one's own under the columns that sst2.yaml gives files without a header."""
    rows = {"sentence": ("good, really", "bad"), "label": ("1", "0"), "idx": ("7", "8")}
    comma = "," if suffix == "csv" else "\t"
    names = [name.strip(' "').lower() for name in header.split(comma)]
    lines = [[f'"{rows[n][i]}"' if comma == "," else rows[n][i] for n in names] for i in range(2)]
    path = tmp_path / f"rows.{suffix}"
    path.write_text("\n".join([header, *map(comma.join, lines)]))
    (tmp_path / "bare.csv").write_text('"good, really",1\nbad,0\n')
    for found, others in ((path, {}), (tmp_path / "bare.csv", {"heldout_path": str(path)})):
        dataset = build(
            found, columns=["sentence", "label"], text_column="sentence", label_column="label",
            label_names=["negative", "positive"], **others,
        )  # fmt: skip
        n = 4 if others else 2
        assert texts(dataset, range(n)) == ["good, really", "bad"] * (n // 2)
        assert [e.label for e in dataset.load(range(n))] == [1, 0] * (n // 2)


@pytest.mark.parametrize(
    ("header", "names", "message"),
    [
        ("text,label", ["no", "yes"], r"has other names: text, label; set dataset\.columns=null"),
        ("review,sentiment", None, r"has other names: review, sentiment; set"),
        ("opinion,stars", ["no", "yes"], r"has label 'stars', which is no class; if these are nam"),
        ("opinion,stars", None, r"has label 'stars', which is no class"),
        ("id,text,label", ["no", "yes"], r"has 3 fields; null takes names from there"),
    ],
)
def test_a_header_with_other_names_is_refused(tmp_path, header, names, message):
    fields = header.count(",") - 1
    rows = "".join("0," * fields + f"some words,{i % 2}\n" for i in range(5))
    (tmp_path / "rows.csv").write_text(f"{header}\n{rows}")
    with pytest.raises(DataError, match=rf"dataset\.columns=sentence,label: .*rows\.csv {message}"):
        build(tmp_path / "rows.csv", columns=["sentence", "label"], label_names=names)


def test_files_may_differ_in_the_order_of_their_columns_only(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\nfirst,1\n")
    (tmp_path / "b.csv").write_text("label,text\n0,second\n")
    dataset = build(tmp_path / "*.csv")
    assert texts(dataset, range(2)) == ["first", "second"]
    (tmp_path / "c.csv").write_text("text,class\nthird,0\n")
    with pytest.raises(DataError, match=r"c\.csv has other names than .*text, class"):
        build(tmp_path / "*.csv")


@pytest.mark.parametrize(("header", "lacking"), [("words,label", "text"), ("text,star", "label")])
def test_what_is_held_out_has_the_same_columns(tmp_path, header, lacking):
    (tmp_path / "a.csv").write_text("text,label\nfirst,1\nsecond,0\n")
    (tmp_path / "b.csv").write_text(f"{header}\nthird,1\n")
    message = rf"dataset\.heldout_path=.*b\.csv: no column '{lacking}', which "
    with pytest.raises(DataError, match=message):
        build(tmp_path / "a.csv", heldout_path=str(tmp_path / "b.csv"))


def test_a_corpus_is_cut_at_its_separator(tmp_path):
    (tmp_path / "plays.txt").write_bytes(b"First.\r\nSpeech\r\n\r\n  \n\nSecond.\n\nThird.\n\n\n")
    dataset = build(tmp_path / "plays.txt", kind="corpus", document_separator="\n\n", heldout=0.34)
    assert texts(dataset, range(3)) == ["First.\nSpeech", "Second.", "Third."]
    assert dataset.label_names is None and dataset.kind == "corpus"
    assert len(dataset.ids("train")) == 2 and len(dataset.ids("heldout")) == 1
    typed = build(
        tmp_path / "plays.txt", kind="corpus", document_separator=r"\n\n", heldout=0.34
    )  # A shell leaves backslashes as they are.
    assert typed.fingerprint() == dataset.fingerprint() and typed.separator == "\n\n"


def test_several_files_are_one_corpus(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(f"Document {i}")
    (tmp_path / "empty.txt").write_text("")
    assert texts(build(tmp_path / "*.txt", kind="corpus"), range(3)) == [
        "Document 0", "Document 1", "Document 2",
    ]  # fmt: skip


# -- Columns and labels ----------------------------------------------------------------------------


def test_the_text_column_is_guessed_by_name_then_by_length(tmp_path, caplog):
    rows = [{"id": f"x{i}", "prose": "long text here", "note": "-"} for i in range(4)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    caplog.set_level("INFO")
    dataset = build(tmp_path / "a.jsonl")
    assert dataset.text_column == "prose" and dataset.label_names is None
    assert "dataset.text_column: took 'prose'" in caplog.text
    assert "dataset.label_column: took none" in caplog.text

    rows = [r | {"sentence": "s"} for r in rows]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert build(tmp_path / "b.jsonl").text_column == "sentence"


def test_class_names_come_from_the_type_or_the_option(tmp_path):
    import datasets

    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    rows = {"text": ["a", "b", "c"], "label": [1, 0, -1]}
    datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "typed.parquet")
    dataset = build(tmp_path / "typed.parquet")
    assert dataset.label_names == ("no", "yes")
    assert [e.label for e in dataset.load(range(3))] == [1, 0, None]

    (tmp_path / "rows.tsv").write_text("a\t1\nb\t0\nc\tnegative\n")
    dataset = build(
        tmp_path / "rows.tsv", columns=["text", "label"], label_names=["negative", "positive"]
    )
    assert [e.label for e in dataset.load(range(3))] == [1, 0, 0]


def test_labels_can_be_left_out(folder):
    dataset = build(folder / "rows.jsonl", label_column="none")
    assert dataset.label_names is None and dataset.load([0])[0].label is None


# -- Splits ----------------------------------------------------------------------------------------


def test_splits_cover_everything_once_and_samples_are_of_them(tmp_path):
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"text": f"number {i}"}) + "\n" for i in range(40))
    )
    dataset = build(tmp_path / "rows.jsonl")
    train, heldout = dataset.ids("train"), dataset.ids("heldout")
    assert sorted([*train, *heldout]) == list(range(40)) and len(heldout) == 10
    small = build(tmp_path / "rows.jsonl", n_examples=5, n_heldout=3)
    assert len(small.ids("train")) == 5 and set(small.ids("train")) <= set(train)
    assert len(small.ids("heldout")) == 3 and set(small.ids("heldout")) <= set(heldout)
    assert set(build(tmp_path / "rows.jsonl", seed=1).ids("heldout")) != set(heldout)


def test_a_second_file_is_what_is_held_out(folder, tmp_path):
    (tmp_path / "dev.jsonl").write_text('{"text": "dev one", "label": "bad"}\n' * 3)
    dataset = build(folder / "rows.jsonl", heldout_path=str(tmp_path / "dev.jsonl"))
    assert dataset.ids("train").tolist() == [0, 1, 2, 3]
    assert dataset.ids("heldout").tolist() == [4, 5, 6]
    examples = dataset.load([5, 3])
    assert [e.value for e in examples] == ["dev one", "meh, really"]
    assert [e.label for e in examples] == [0, 2]
    two = build(folder / "rows.jsonl", heldout_path=str(tmp_path / "dev.jsonl"), n_heldout=2)
    assert len(two.ids("heldout")) == 2 and two.ids("heldout").min() >= 4


def test_what_has_no_splits_holds_out_a_share_whatever_the_hub_has(folder, tmp_path, caplog):
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    for name in ("rows.parquet", "rows.jsonl", "saved"):
        caplog.clear()
        with caplog.at_level("INFO"):
            dataset = build(folder / name, split="train", heldout_split="validation")
        assert caplog.text.count("a share of it is held out") == 1, name
        train, heldout = dataset.ids("train").tolist(), dataset.ids("heldout").tolist()
        assert len(train) == 3 and sorted(train + heldout) == [0, 1, 2, 3], name


def test_a_folder_with_one_split_holds_out_a_share_of_it(folder, tmp_path, caplog):
    (tmp_path / "all").mkdir()
    (folder / "rows.parquet").rename(tmp_path / "all" / "train.parquet")
    with caplog.at_level("INFO"):
        dataset = build(tmp_path / "all", split="train", heldout_split="validation")
    assert "no split 'validation'" in caplog.text
    assert [len(dataset.ids(split)) for split in ("train", "heldout")] == [3, 1]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_what_is_trained_on_is_not_held_out(folder, suffix):
    path = str(folder / f"rows.{suffix}")
    with pytest.raises(DataError, match=r"heldout_path=.*: the same examples as dataset\.path"):
        build(path, heldout_path=path)


def test_a_stream_holds_out_its_first_examples(folder):
    dataset = build(
        folder / "rows.parquet", streaming=True, n_examples=2, n_heldout=1, kind="corpus"
    )
    assert dataset.ids("heldout").tolist() == [0] and dataset.ids("train").tolist() == [1, 2]
    assert not dataset.random_access
    assert texts(dataset, [0, 2]) == [ROWS[0]["text"], ROWS[2]["text"]]
    assert texts(dataset, [1]) == [ROWS[1]["text"]]  # Backwards: from the start again.
    with pytest.raises(DataError, match="the stream ends after 4 examples"):
        dataset.load([4])


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_plain_files_are_read_in_place_where_a_stream_is_the_default(folder, suffix):
    """As `dataset=openwebtext dataset.path=FILE` says."""
    path = folder / f"rows.{suffix}"
    one, other = build(path, streaming=True), build(path)
    assert one.random_access and one.fingerprint() == other.fingerprint()
    for split in ("train", "heldout"):
        assert one.ids(split).tolist() == other.ids(split).tolist()
    assert sorted(texts(one)) == sorted(row["text"] for row in ROWS)


def test_fingerprints_follow_content_and_meaning_not_the_split(folder, tmp_path):
    dataset = build(folder / "rows.jsonl")
    assert dataset.fingerprint() == build(folder / "rows.jsonl", seed=3).fingerprint()
    (tmp_path / "copy").mkdir()
    copy = tmp_path / "copy" / "rows.jsonl"
    copy.write_bytes((folder / "rows.jsonl").read_bytes())
    assert build(copy).fingerprint() == dataset.fingerprint()
    copy.write_text(copy.read_text().replace("fine", "nice"))
    others = [
        build(copy), build(folder / "rows.jsonl", label_column="none"),
        build(folder / "rows.jsonl", kind="corpus"),
        build(folder / "rows.jsonl", text_column="label"),
        build(folder / "rows.jsonl", heldout_path=str(copy)),
    ]  # fmt: skip
    assert len({dataset.fingerprint(), *(o.fingerprint() for o in others)}) == 6


# -- What cannot be read ---------------------------------------------------------------------------


def test_broken_records_are_named_and_spoil_no_other(tmp_path):
    lines = [
        b'{"text": "fine", "label": 0}', b'{"text": "torn', b'{"text": "", "label": 0}',
        b'{"label": 1}', b'"a string"', b'{"text": "\xff\xfe", "label": 0}',
        b'{"text": "also fine", "label": 1}', b'{"text": 7, "label": 1}',
    ]  # fmt: skip
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(lines))
    found = build(tmp_path / "rows.jsonl").load(range(8))
    bad = [e for e in found if isinstance(e, Unreadable)]
    assert [e.id for e in bad] == [1, 2, 3, 4, 5, 7]
    assert [found[i].value for i in (0, 6)] == ["fine", "also fine"]
    assert "JSONDecodeError" in bad[0].reason and "empty" in bad[1].reason
    assert "UnicodeDecodeError" in bad[4].reason

    (tmp_path / "rows.tsv").write_text("a\t1\nb\nc\t0\td\ne\tx\nf\t0\n")
    found = build(tmp_path / "rows.tsv", columns=["text", "label"], label_names=["no", "yes"]).load(
        range(5)
    )
    reasons = {e.id: e.reason for e in found if isinstance(e, Unreadable)}
    assert set(reasons) == {1, 2, 3}
    assert "1 fields, not 2" in reasons[1] and "label: 'x' is no class" in reasons[3]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"path": "{}/row.jsonl"}, DataError, r"dataset\.path=.*Did you mean .*rows\.jsonl\?"),
        ({"path": ""}, DataError, r"dataset\.path=: name a file"),
        ({"path": "{}/empty.jsonl"}, DataError, r"dataset\.path=.*no examples in it"),
        ({"path": "plays.txt"}, DataError, r"dataset\.path=\./plays\.txt: no such file"),
        ({"path": "no-such/dataset"}, DataError, r"dataset\.path=no-such/dataset: not a file or"),
        ({"heldout_path": "{}/none.jsonl"}, DataError, r"dataset\.heldout_path=.*no such file"),
        (
            {"text_column": "txet"}, DataError,
            r"dataset\.text_column=txet: no such column\. Did you mean 'text'\?.*label, text",
        ),
        ({"label_column": "l"}, DataError, r"dataset\.label_column=l: no such column"),
        ({"path": "{}/numbers.jsonl"}, DataError, r"dataset\.text_column=null: no column has text"),
        ({"path": "{}/list.json"}, DataError, r"no JSON lines"),
        (
            {"path": "{}/rows.tsv", "columns": ["text"]}, DataError,
            r"dataset\.columns=text: the first line of .* has 2 fields",
        ),
        (
            {"path": "{}/rows.parquet", "streaming": True}, ConfigError,
            r"streaming=true needs dataset\.n_examples=N",
        ),
        ({"kind": "running"}, ConfigError, r"dataset\.kind=running: not one of its values"),
        ({"heldout": 0}, ConfigError, r"dataset\.heldout=0.*: must be > 0"),
        ({"path": "{}/one.txt", "kind": "corpus"}, DataError, r"dataset of 1 examples cannot be"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused_in_one_line(folder, options, error, message):
    (folder / "empty.jsonl").write_text("\n\n")
    (folder / "one.txt").write_text("one document")
    (folder / "numbers.jsonl").write_text('{"a": 1, "b": 2}\n' * 4)
    (folder / "list.json").write_text('[{"text": "a"}]')
    options = {k: v.format(folder) if isinstance(v, str) else v for k, v in options.items()}
    options = {"path": folder / "rows.jsonl"} | options
    with pytest.raises(error, match=message) as caught:
        build(**options).ids("train")
    assert "\n" not in str(caught.value)


# -- Real data -------------------------------------------------------------------------------------


def composed(*overrides):
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from sae_runner.config import config_dir

    with initialize_config_dir(config_dir(), version_base="1.3"):
        return OmegaConf.to_container(compose("train", list(overrides)), resolve=True)["dataset"]


@pytest.mark.data
def test_sst2_as_it_is_configured(data_dir):
    train, dev = data_dir / "text/sst2_train.tsv", data_dir / "text/sst2_dev.tsv"
    dataset = build_dataset(
        composed("dataset=sst2", f"dataset.path={train}", f"dataset.heldout_path={dev}")
    )
    assert len(dataset.ids("train")) == 6920 and len(dataset.ids("heldout")) == 872
    assert dataset.label_names == ("negative", "positive")
    lines = train.read_text().splitlines() + dev.read_text().splitlines()
    examples = dataset.load(np.arange(6920 + 872))
    assert [f"{e.value}\t{e.label}" for e in examples] == lines


@pytest.mark.data
def test_tinyshakespeare_as_it_is_configured(data_dir):
    path = data_dir / "text/tinyshakespeare.txt"
    dataset = build_dataset(composed("dataset=tinyshakespeare", f"dataset.path={path}"))
    ids = np.sort(np.concatenate([dataset.ids("train"), dataset.ids("heldout")]))
    assert "\n\n".join(texts(dataset, ids)) == path.read_text()
    assert len(dataset.ids("heldout")) == round(0.1 * len(ids)) > 700
    assert texts(dataset, [0])[0].startswith("First Citizen:\nBefore we proceed")
