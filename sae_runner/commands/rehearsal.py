"""Trying a pipeline out where nothing it does can last: what `plan` knows without writing."""

import logging
import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sae_runner.commands.pipeline import Pipeline
from sae_runner.data.base import SPLITS, Dataset, Example, Ids, Split, Unreadable
from sae_runner.models import build_model
from sae_runner.models.base import Model, SiteInfo
from sae_runner.store.manifest import SELECTION_SCHEMA, STORE_SCHEMA, is_complete, read_json
from sae_runner.store.window import WindowPlan

log = logging.getLogger("sae_runner")
SAMPLE = 256
"""Documents of a split that are tokenised to tell how many rows all of them will make."""


class Count(NamedTuple):
    """How many of something each split has."""

    n: dict[Split, int]
    sense: str = ""
    """Empty for exact numbers, else `about` or `at most`."""

    def __str__(self) -> str:
        text = f"{self.n['train']:,} train + {self.n['heldout']:,} held-out"
        return f"{self.sense} {text}".strip()


@contextmanager
def rehearsal(pipeline: Pipeline) -> Iterator[Pipeline]:
    """The same pipeline over a temporary `outputs` that shows what there is in the real one."""
    with tempfile.TemporaryDirectory(prefix="sae-run-plan-") as folder:
        for place in ("models", "data"):
            (Path(folder) / place).mkdir()
            for path in pipeline.outputs.absolute().glob(f"{place}/[!.]*"):
                (Path(folder) / place / path.name).symlink_to(path, target_is_directory=True)
        copy = Pipeline({**pipeline.cfg, "outputs": folder}, pipeline.choices)
        copy.raw_dataset = pipeline.raw_dataset
        copy.shapes = pipeline.shapes
        yield copy


class Unread(Dataset):
    """A dataset that says what it holds and refuses to be read.

    Training on it, or packing it, ends before it begins; what was made of it before is found.
    """

    class Refused(Exception):
        """Someone wanted to read."""

    def __init__(self, source: Dataset) -> None:
        self.source, self.asked = source, False
        self.modality, self.name = source.modality, source.name
        self.label_names, self.random_access = source.label_names, source.random_access

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    def ids(self, split: Split) -> Ids:
        """See `Dataset.ids`."""
        return self.source.ids(split)

    def load(self, ids: Sequence[int] | Ids) -> list[Example | Unreadable]:
        """Never."""
        self.asked = True
        raise self.Refused

    def fingerprint(self) -> str:
        """See `Dataset.fingerprint`."""
        return self.source.fingerprint()


class Sample(Unread):
    """A seeded sample of each split, which can be read."""

    def __init__(self, source: Dataset, size: int = SAMPLE) -> None:
        super().__init__(source)
        self.size = size

    def ids(self, split: Split) -> Ids:
        """At most `size` of the ids, ascending."""
        ids = self.source.ids(split)
        chosen = np.random.default_rng(0).permutation(len(ids))[: self.size]
        return np.sort(ids[chosen])

    def load(self, ids: Sequence[int] | Ids) -> list[Example | Unreadable]:
        """See `Dataset.load`."""
        return self.source.load(ids)


def trains_here(pipeline: Pipeline) -> bool:
    """Whether the model is one that is trained on the dataset where no weights are given."""
    model = pipeline.cfg["model"]
    return "weights" in model and model["weights"] is None


def load_model(copy: Pipeline) -> Model | None:
    """The model with its weights; None where it would have to be trained first."""
    if not trains_here(copy):
        return copy.model
    guard = Unread(copy.raw_dataset)
    copy.raw_dataset = guard
    level = log.level
    log.setLevel(logging.WARNING)  # No host shall say that it is training now.
    try:
        return copy.model
    # What a refusal becomes on its way through a tokenizer's trainer is not for us to list.
    except Exception:
        if not guard.asked:
            raise
        return None
    finally:
        log.setLevel(level)
        copy.raw_dataset = guard.source


class Adapted(NamedTuple):
    """A dataset as a model reads it."""

    dataset: Dataset
    scale: dict[Split, float]
    """How many times more examples there are, where only a sample of the documents was packed."""

    def examples(self) -> Count:
        """Examples of all documents."""
        n = {split: round(len(self.dataset.ids(split)) * self.scale[split]) for split in SPLITS}
        return Count(n, "" if set(self.scale.values()) == {1.0} else "about")


def adapted(host: Model, dataset: Dataset) -> Adapted:
    """What `host` makes of the dataset: what is packed already, else of a sample of it."""
    guard, whole = Unread(dataset), dict.fromkeys(SPLITS, 1.0)
    try:
        found = host.adapt(guard)
    except Exception:
        if not guard.asked:
            raise
    else:
        return Adapted(dataset if found is guard else found, whole)
    sample = Sample(dataset)
    scale = {split: len(dataset.ids(split)) / len(sample.ids(split)) for split in SPLITS}
    return Adapted(host.adapt(sample), scale)


def reader_of(pipeline: Pipeline, copy: Pipeline) -> Model | None:
    """Whoever knows how the model reads a dataset: the model without weights, if that is enough.

    None where the model, and its tokenizer, have to be trained first.
    """
    if trains_here(pipeline):
        return load_model(copy)
    import torch

    # Like `pipeline.shapes`, but whatever it packs is thrown away.
    return build_model(
        pipeline.cfg["model"], device=torch.device("meta"), dataset=pipeline.raw_dataset,
        outputs=copy.outputs, meta=True,
    )  # fmt: skip


def count_examples(pipeline: Pipeline, copy: Pipeline) -> Count:
    """Examples of each split as the model reads them, e.g. rows of packed text."""
    path = pipeline.store_dir / "store.json"
    if path.is_file():
        described = read_json(path, STORE_SCHEMA, "activation store")["dataset"]
        return Count({"train": described["n_train"], "heldout": described["n_heldout"]})
    raw = pipeline.raw_dataset
    # Only a host that overrides `adapt` makes other examples (a language model packs text).
    if type(pipeline.shapes).adapt is Model.adapt:
        return Count({split: len(raw.ids(split)) for split in SPLITS})
    host = reader_of(pipeline, copy)
    if host is None:
        return bound(raw, pipeline.context or 1)
    return adapted(host, raw).examples()


def bound(dataset: Dataset, context: int) -> Count:
    """Rows of `context` tokens that text can make, if every byte were a token."""
    sample, n = Sample(dataset), dict[Split, int]()
    for split in SPLITS:
        ids = sample.ids(split)
        texts = [e.value for e in sample.load(ids) if isinstance(e, Example)]
        n_bytes = sum(len(str(text).encode()) + 1 for text in texts)  # And a separator.
        n[split] = math.ceil(n_bytes * len(dataset.ids(split)) / len(ids) / context)
    return Count(n, "at most about")


def count_rows(pipeline: Pipeline, info: SiteInfo, examples: Count) -> Count:
    """Rows of a site: as they were written, or as they follow from the examples."""
    folder = pipeline.selection_dir(info)
    if pipeline.store_options.kind == "disk" and is_complete(folder):
        splits = read_json(folder / "manifest.json", SELECTION_SCHEMA, "finished store")["splits"]
        return Count({split: splits[split]["n_rows"] for split in SPLITS})
    per_example = pipeline.rows_per_example(info)
    # How many tokens a text has, and which of them are special, is known once it is read.
    unsure = pipeline.shapes.modality == "text" and pipeline.selection.tokens in (
        "all", "random_k", "positions", "patches",
    )  # fmt: skip
    if unsure and (mean := mean_rows(pipeline, info)) is not None:
        return Count({split: round(n * mean) for split, n in examples.n.items()}, "about")
    senses = ["at most"] if unsure or "at most" in examples.sense else []
    senses += ["about"] if "about" in examples.sense else []
    return Count({split: n * per_example for split, n in examples.n.items()}, " ".join(senses))


def mean_rows(pipeline: Pipeline, info: SiteInfo) -> float | None:
    """Rows that one labelled text gives on average, from a tokenised sample; None if unknown."""
    dataset = pipeline.raw_dataset
    if (
        dataset.modality != "text"
        or trains_here(pipeline)
        or getattr(dataset, "kind", "") != "labelled"
    ):
        return None
    sample = Sample(dataset)
    texts = [e for e in sample.load(sample.ids("train")) if isinstance(e, Example)]
    inputs = pipeline.shapes.prepare(texts)
    if inputs.attended is None:
        return None
    n_tokens = inputs.attended.shape[1]
    return int(pipeline.selection.mask(info, inputs, n_tokens).sum()) / len(texts)


def window_plan(pipeline: Pipeline, info: SiteInfo, examples: Count) -> WindowPlan:
    """The windows of a store of so many examples."""
    ids: dict[Split, Ids] = {s: np.arange(examples.n[s], dtype=np.int64) for s in SPLITS}
    options = pipeline.store_options
    size = max(1, options.window_rows // pipeline.rows_per_example(info))
    return WindowPlan(ids, size, options.seed)
