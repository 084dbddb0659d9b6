import textwrap
import typing

import pytest

from sae_runner.data import build_dataset
from sae_runner.data.stdlib_text import gather
from sae_runner.errors import DataError

OPTIONS = {
    "type": "stdlib_text", "document": "module", "heldout": 0.1, "n_examples": None,
    "n_heldout": None, "seed": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def dataset():
    return build_dataset(OPTIONS | {"max_bad": 0.0, "workers": 2})


@pytest.fixture
def library(tmp_path):
    (tmp_path / "a.py").write_text(
        textwrap.dedent('''
            """Module a."""
            def late(): pass
            class B:
                """Class B.

                    Indented.
                """
                def inner(self):
                    """Said twice."""
            async def c():
                "Function c."
        ''')
    )
    (tmp_path / "b.py").write_text('def f():\n    """Said twice."""\n')
    (tmp_path / "c.py").write_text('"""Module c."""\ndef f():\n    """Module c."""\n')
    (tmp_path / "broken.py").write_text('"""Lost."""\ndef (:\n')
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "d.py").write_text('"""Skipped."""\n')
    return tmp_path


def test_docstrings_in_source_order_without_repetition(library):
    assert gather(library, "docstring") == [
        "Module a.", "Class B.\n\nIndented.", "Said twice.", "Function c.", "Module c.",
    ]  # fmt: skip


def test_one_document_for_each_module_that_has_any(library):
    assert gather(library, "module") == [
        "Module a.\n\nClass B.\n\nIndented.\n\nSaid twice.\n\nFunction c.", "Module c.",
    ]  # fmt: skip


def test_a_library_without_sources_is_refused(tmp_path):
    with pytest.raises(DataError, match="dataset=stdlib_text: no docstrings in"):
        gather(tmp_path, "module")


def test_the_real_library_is_large_enough_to_train_on(dataset):
    texts = [e.value for e in dataset.load(range(len(dataset.texts)))]
    assert len(texts) > 300
    assert sum(map(len, texts)) > 1_000_000
    joined = "\n".join(texts)
    assert typing.__doc__.splitlines()[0] in joined
    assert dataset.modality == "text" and dataset.kind == "corpus"


def test_splits_are_of_documents_and_never_mix(dataset):
    train, heldout = dataset.ids("train"), dataset.ids("heldout")
    assert sorted([*train, *heldout]) == list(range(len(dataset.texts)))
    assert len(heldout) == round(0.1 * len(dataset.texts))
    small = build_dataset(OPTIONS | {"n_examples": 7, "n_heldout": 3})
    assert set(small.ids("train")) <= set(train) and len(small.ids("train")) == 7
    assert set(small.ids("heldout")) <= set(heldout) and len(small.ids("heldout")) == 3
    assert small.fingerprint() == dataset.fingerprint()


def test_docstrings_are_other_documents_than_modules(dataset):
    fine = build_dataset(OPTIONS | {"document": "docstring"})
    assert len(fine.texts) > 10 * len(dataset.texts)
    assert fine.fingerprint() != dataset.fingerprint()
    assert len(set(fine.texts)) == len(fine.texts)
