import hashlib

import pytest
from omegaconf import OmegaConf

from sae_runner.config import config_dir
from sae_runner.data import build_dataset
from sae_runner.data._packed import DOCUMENTS_AT_ONCE, Framing, PackedText
from sae_runner.data.base import Dataset, Example, Unreadable, split_ids
from sae_runner.errors import DataError


class Corpus(Dataset):
    """Documents of ten letters, some of them unreadable."""

    modality, name, kind = "text", "letters", "corpus"

    def __init__(self, n: int, bad: set[int]) -> None:
        self.n, self.bad, self.n_loaded = n, bad, 0

    def ids(self, split):
        return split_ids(self.n, split, heldout=0.25, seed=0)

    def load(self, ids):
        self.n_loaded += len(ids)
        return [
            Unreadable(i, "torn") if i in self.bad else Example(i, "abcdefghij")
            for i in map(int, ids)
        ]

    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self.n} {sorted(self.bad)}".encode()).hexdigest()


def packed(corpus: Corpus, folder) -> PackedText:
    def encode(texts):
        return [[ord(letter) for letter in text] for text in texts]

    return PackedText(corpus, encode, Framing(context=5), "letters", folder)


def test_documents_are_refused_past_max_bad(tmp_path):
    corpus = Corpus(40, {3, 7})
    message = r"dataset\.max_bad=0: 2 of 40 examples are unreadable, e\.g\. 3: torn"
    with pytest.raises(DataError, match=message):
        packed(corpus, tmp_path)  # Where nothing is said, none may be.
    corpus.max_bad = 0.04
    with pytest.raises(DataError, match=r"dataset\.max_bad=0\.04: 2 of 40"):
        packed(corpus, tmp_path)
    assert not [p for p in tmp_path.iterdir() if p.is_dir()]
    corpus.max_bad = 0.05
    found = packed(corpus, tmp_path)
    assert found.describe()["n_unreadable"] == 2
    assert sum(len(found.ids(split)) for split in ("train", "heldout")) == 38 * 2
    corpus.max_bad = 0.01  # Packed already, under another limit.
    with pytest.raises(DataError, match=r"dataset\.max_bad=0\.01: 2 of 40"):
        packed(corpus, tmp_path)


def test_a_broken_corpus_is_refused_before_it_is_read_through(tmp_path):
    corpus = Corpus(4 * DOCUMENTS_AT_ONCE, set(range(30)))
    corpus.max_bad = 0.001
    with pytest.raises(DataError, match=r"30 of 2048"):
        packed(corpus, tmp_path)
    assert corpus.n_loaded == DOCUMENTS_AT_ONCE


def test_a_dataset_knows_the_limit_of_its_config(tmp_path):
    cfg = OmegaConf.load(f"{config_dir()}/dataset/digits.yaml")
    cfg.max_bad = 0.125
    assert build_dataset(cfg, outputs=tmp_path).max_bad == 0.125
