import numpy as np
import pytest

from sae_runner.data import build_dataset
from sae_runner.errors import ConfigError

OPTIONS = {"type": "digits", "heldout": 0.2, "n_examples": None, "n_heldout": None, "seed": 0}


def test_pixels_and_labels_are_those_of_scikit_learn():
    from sklearn.datasets import load_digits

    raw = load_digits()
    dataset = build_dataset(OPTIONS | {"max_bad": 0.0, "workers": 2})
    examples = dataset.load([1796, 0, 11])

    assert [e.id for e in examples] == [1796, 0, 11]
    for example in examples:
        assert example.value.mode == "L" and example.value.size == (8, 8)
        back = np.asarray(example.value, dtype=float) * 16 / 255
        assert np.abs(back - raw.images[example.id]).max() < 0.04
        assert example.label == raw.target[example.id]
    assert dataset.label_names[examples[1].label] == "zero"


def test_splits_cover_everything_once_and_keep_their_limits():
    dataset = build_dataset(OPTIONS)
    train, heldout = dataset.ids("train"), dataset.ids("heldout")
    assert sorted([*train, *heldout]) == list(range(1797))
    assert len(heldout) == round(1797 * 0.2)

    small = build_dataset(OPTIONS | {"n_examples": 50, "n_heldout": 20})
    assert len(small.ids("train")) == 50 and set(small.ids("train")) <= set(train)
    assert len(small.ids("heldout")) == 20 and set(small.ids("heldout")) <= set(heldout)
    assert small.fingerprint() == dataset.fingerprint()


def test_another_seed_holds_out_others():
    first, second = build_dataset(OPTIONS), build_dataset(OPTIONS | {"seed": 1})
    assert set(first.ids("heldout")) != set(second.ids("heldout"))


def test_a_share_of_everything_is_refused():
    with pytest.raises(ConfigError, match=r"dataset\.heldout=1\.0: must be < 1"):
        build_dataset(OPTIONS | {"heldout": 1.0})
