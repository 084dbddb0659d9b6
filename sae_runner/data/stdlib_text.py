"""Docstrings of Python's standard library: English text that every installation carries."""

import ast
import functools
import hashlib
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from sae_runner.config import NonNegative, Positive, ProperFraction
from sae_runner.data import DATASETS
from sae_runner.data.base import Dataset, Example, Ids, Split, Unreadable, split_ids
from sae_runner.errors import DataError

# Tests, bundled third-party code and what distributions add or leave out.
SKIPPED = frozenset({
    "__pycache__", "dist-packages", "ensurepip", "idle_test", "idlelib", "lib2to3",
    "site-packages", "test", "tests", "turtledemo",
})  # fmt: skip


@DATASETS.register("stdlib_text")
class StdlibText(Dataset):
    """What the interpreter's own library says of itself, read with `ast`; nothing is imported.

    A docstring that stands in several places is kept where it first stands, so that no text is in
    both splits. Other Python versions have other texts: the fingerprint tells.

    Args:
        document: one document for each module (its docstrings in source order), or for each
            docstring.
        heldout: share of the documents that is never trained on.
        n_examples: at most so many documents to train on; None for all.
        n_heldout: at most so many held-out documents; None for all.
        seed: decides which documents are held out.
    """

    modality = "text"
    name = "stdlib_text"
    kind = "corpus"

    def __init__(
        self,
        *,
        document: Literal["module", "docstring"],
        heldout: ProperFraction,
        n_examples: Positive | None,
        n_heldout: Positive | None,
        seed: NonNegative,
    ) -> None:
        self.texts = of_this_python(document)
        self.heldout, self.seed = heldout, seed
        self.limits: dict[Split, int | None] = {"train": n_examples, "heldout": n_heldout}

    def ids(self, split: Split) -> Ids:
        """See `Dataset.ids`."""
        n, limit = len(self.texts), self.limits[split]
        return split_ids(n, split, heldout=self.heldout, seed=self.seed, limit=limit)

    def load(self, ids: Sequence[int] | Ids) -> list[Example | Unreadable]:
        """See `Dataset.load`."""
        return [Example(int(i), self.texts[i]) for i in ids]

    def fingerprint(self) -> str:
        """See `Dataset.fingerprint`."""
        return hashlib.sha256("\0".join(self.texts).encode()).hexdigest()


@functools.cache
def of_this_python(document: Literal["module", "docstring"]) -> list[str]:
    """The documents of the library that runs this; a sweep asks for them for each of its jobs."""
    return gather(Path(sysconfig.get_path("stdlib")), document)


def gather(library: Path, document: Literal["module", "docstring"]) -> list[str]:
    """Documents of every Python source below `library`, in the order of paths and lines.

    Raises:
        DataError: no source is there, as where an interpreter carries only compiled modules.
    """
    texts, known = [], set[str]()
    for path in sorted(library.rglob("*.py")):
        if SKIPPED & set(path.relative_to(library).parts):
            continue
        found = [text for text in docstrings(path) if text not in known]
        found = list(dict.fromkeys(found))
        known.update(found)
        if document == "docstring":
            texts += found
        elif found:
            texts.append("\n\n".join(found))
    if len(texts) < 2:
        raise DataError(
            f"dataset=stdlib_text: no docstrings in {library}; give text by dataset=text"
        )
    return texts


def docstrings(path: Path) -> Iterator[str]:
    """The docstrings of one source file, by line; none of a file that does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Escapes that a later Python will refuse.
            tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, kinds)]
    for node in sorted(nodes, key=lambda node: getattr(node, "lineno", 0)):
        if text := ast.get_docstring(node):
            yield text
