"""Text and hosts that train here, made up so that every number can be counted by hand."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from sae_runner.commands import rehearsal as module
from sae_runner.commands.pipeline import Pipeline
from sae_runner.commands.rehearsal import (
    Count,
    Sample,
    Unread,
    adapted,
    bound,
    count_examples,
    count_rows,
    load_model,
    rehearsal,
)
from sae_runner.data import DATASETS
from sae_runner.data._packed import Framing, PackedText
from sae_runner.data.base import Dataset, Example
from sae_runner.models import MODELS
from sae_runner.models._artefact import trained as artefact
from sae_runner.models.base import HookedModel, Inputs, SiteInfo, Tap

N_DOCUMENTS, N_HELDOUT, N_WORDS, CONTEXT = 600, 100, 9, 5


class Text(Dataset):
    """Documents of nine words; with the separator ten tokens, two rows of five."""

    modality, kind, name = "text", "corpus", "made_up"
    n_read = 0

    def ids(self, split):
        return np.arange(N_DOCUMENTS) if split == "train" else N_DOCUMENTS + np.arange(N_HELDOUT)

    def load(self, ids):
        Text.n_read += len(ids)
        return [Example(int(i), " ".join(["word"] * N_WORDS)) for i in ids]

    def fingerprint(self):
        return "made up"


class Host(HookedModel):
    modality = "text"

    def __init__(self, outputs, meta):
        super().__init__()
        self.outputs, self.device = outputs, torch.device("meta" if meta else "cpu")
        self.network = nn.Sequential()
        self.network.add_module("embed", nn.Embedding(3, 4, device=self.device))

    def forward(self, inputs):
        return self.network(inputs.tensors["tokens"])

    def taps(self):
        return {"embed": Tap("embed")}

    def probe(self, n):
        tokens = torch.zeros(n, 2, dtype=torch.int64, device=self.device)
        return Inputs(torch.arange(n, device=self.device), {"tokens": tokens})

    def prepare(self, examples):
        tokens = torch.from_numpy(np.stack([example.value for example in examples]))
        ids = torch.tensor([example.id for example in examples])
        return Inputs(ids, {"tokens": tokens}, torch.ones_like(tokens, dtype=torch.bool))

    def fingerprint(self):
        return "made up"

    def describe(self):
        return {}

    def adapt(self, dataset):
        def encode(texts):
            return [[1] * len(text.split()) for text in texts]

        framing = Framing(CONTEXT, separator=2)
        return PackedText(dataset, encode, framing, "words", self.outputs / "data")


class Reader(Host):
    """Knows its tokenizer without weights."""

    def __init__(self, outputs, meta=False, *, context: int):
        super().__init__(outputs, meta)


class Learner(Host):
    """Trains here where no weights are given."""

    def __init__(self, outputs, dataset, meta=False, *, context: int, weights: str | None):
        super().__init__(outputs, meta)
        if not meta:
            artefact(
                outputs, "learner", {"data": dataset.fingerprint()}, lambda _: self.train(dataset)
            )

    def train(self, dataset):
        n = len(dataset.load(dataset.ids("train")))
        return {"embed.weight": torch.zeros(3, 4)}, {"n": n}


@pytest.fixture
def pipeline(compose_job, tmp_path, monkeypatch):
    monkeypatch.setitem(DATASETS.classes, "made_up_text", Text)
    monkeypatch.setitem(MODELS.classes, "made_up_reader", Reader)
    monkeypatch.setitem(MODELS.classes, "made_up_learner", Learner)

    def pipeline(**model):
        job = compose_job("train", "model=toy", "evaluators=[]", f"outputs={tmp_path}/outputs")
        common = {"site": "embed", "tokens": "all", "batch_size": 4, "context": CONTEXT}
        site = {**job.cfg["site"], "name": "embed"}
        made_up = {"type": "made_up_text", "workers": 0, "max_bad": 0.0}
        cfg = {**job.cfg, "model": {**common, **model}, "dataset": made_up}
        return Pipeline({**cfg, "site": site}, {**job.choices, "dataset": "made_up"})

    return pipeline


def test_a_sample_of_long_text_tells_how_many_rows_there_are(pipeline, tmp_path):
    reader, Text.n_read = pipeline(type="made_up_reader"), 0
    with rehearsal(reader) as copy:
        found = count_examples(reader, copy)
        assert found == Count({"train": 2 * N_DOCUMENTS, "heldout": 2 * N_HELDOUT}, "about")
        rows = count_rows(reader, reader.infos[0], found)
    assert Text.n_read == module.SAMPLE + N_HELDOUT
    # Specials and the first position are dropped: fewer rows than tokens.
    expected = {"train": 2 * N_DOCUMENTS * CONTEXT, "heldout": 2 * N_HELDOUT * CONTEXT}
    assert rows == Count(expected, "at most about")
    assert str(rows) == "at most about 6,000 train + 1,000 held-out"
    assert not (tmp_path / "outputs").exists()


def test_text_that_is_packed_already_is_counted_and_not_read(pipeline, tmp_path, snapshot):
    reader = pipeline(type="made_up_reader")
    reader.model.adapt(reader.raw_dataset)
    before, Text.n_read = snapshot(tmp_path / "outputs"), 0
    with rehearsal(reader) as copy:
        found = count_examples(reader, copy)
    assert found == Count({"train": 2 * N_DOCUMENTS, "heldout": 2 * N_HELDOUT})
    assert Text.n_read == 0 and snapshot(tmp_path / "outputs") == before


def test_a_model_that_is_not_trained_yet_is_not_trained(pipeline, tmp_path):
    learner, Text.n_read = pipeline(type="made_up_learner", weights=None), 0
    with rehearsal(learner) as copy:
        assert load_model(copy) is None
        found = count_examples(learner, copy)
    # Without a tokenizer every byte may be a token: nine words of four letters, spaces, separator.
    n_bytes = 5 * N_WORDS
    expected = {"train": n_bytes * N_DOCUMENTS / CONTEXT, "heldout": n_bytes * N_HELDOUT / CONTEXT}
    assert found == Count(expected, "at most about")
    assert not (tmp_path / "outputs").exists()


def test_a_model_that_was_trained_here_is_found(pipeline, tmp_path, snapshot):
    learner = pipeline(type="made_up_learner", weights=None)
    assert isinstance(learner.model, Learner)
    before, Text.n_read = snapshot(tmp_path / "outputs"), 0
    with rehearsal(learner) as copy:
        assert isinstance(load_model(copy), Learner)
        assert Text.n_read == 0
        assert count_examples(learner, copy).sense == "about"
    assert snapshot(tmp_path / "outputs") == before


def test_other_errors_of_a_host_are_not_taken_for_untrained(pipeline):
    learner = pipeline(type="made_up_learner", weights=None)
    with rehearsal(learner) as copy:
        copy.raw_dataset.fingerprint = lambda: 1 / 0
        with pytest.raises(ZeroDivisionError):
            load_model(copy)


def test_a_store_that_was_begun_knows_its_examples(pipeline, tmp_path):
    reader = pipeline(type="made_up_reader")
    reader.store_dir.mkdir(parents=True)
    info = SiteInfo("embed", "embed", 4, "tokens", None)
    (reader.store_dir / "store.json").write_text(json.dumps({
        "schema": "sae-run.store/1", "dataset": {"n_train": 11, "n_heldout": 5}, "sites": {},
    }))  # fmt: skip
    with rehearsal(reader) as copy:
        found = count_examples(reader, copy)
    assert found == Count({"train": 11, "heldout": 5})
    assert count_rows(reader, info, found).sense == "at most"


def test_an_unread_dataset_answers_all_but_load():
    text = Text()
    guard = Unread(text)
    assert guard.fingerprint() == "made up" and guard.kind == "corpus" and guard.modality == "text"
    assert np.array_equal(guard.ids("heldout"), text.ids("heldout")) and not guard.asked
    with pytest.raises(Unread.Refused):
        guard.load([1])
    assert guard.asked


def test_a_sample_is_seeded_ascending_and_within_its_split():
    sample, again = Sample(Text(), 50), Sample(Text(), 50)
    for split in ("train", "heldout"):
        ids = sample.ids(split)
        assert len(set(ids)) == 50 and np.array_equal(ids, again.ids(split))
        assert np.all(np.diff(ids) > 0) and set(ids) <= set(Text().ids(split))
    assert len(Sample(Text(), 10_000).ids("train")) == N_DOCUMENTS


def test_a_sample_of_everything_is_exact(tmp_path):
    found = adapted(Reader(tmp_path, context=CONTEXT), Sample(Text(), 100))
    assert found.examples() == Count({"train": 200, "heldout": 200})


def test_bytes_are_bytes():
    class Accents(Text):
        def load(self, ids):
            return [Example(int(i), "éé") for i in ids]

    # Two letters of two bytes and a separator in each document.
    assert bound(Accents(), 5).n == {"train": 5 * N_DOCUMENTS / 5, "heldout": 5 * N_HELDOUT / 5}


def test_the_probe_counts_rows_that_shapes_only_bound(pipeline):
    from sae_runner.commands.plan import Plan
    from sae_runner.commands.probe import times

    reader = pipeline(type="made_up_reader")
    with rehearsal(reader) as copy:
        lines = times(Plan(reader, copy), copy)
    # Position 0 of every five is dropped.
    assert ("", "4 rows an example in these batches: about 4,800 train rows") in lines


def test_rows_of_labelled_text_follow_from_a_tokenised_sample(tmp_path):
    from sae_runner.commands.rehearsal import count_examples, count_rows
    from sae_runner.composition import composed_jobs

    # One word is one token here, and [CLS] and [SEP] are no rows: 2 and 4 rows, 3 on average.
    lines = ["good film\t1", "a very good film\t0"] * 20
    path, dev = tmp_path / "reviews.tsv", tmp_path / "dev.tsv"
    for file in (path, dev):
        file.write_text("\n".join(lines) + "\n")
    words = ["model=minilm", f"dataset.path={path}", f"dataset.heldout_path={dev}"]
    job = composed_jobs("train", [*words, f"outputs={tmp_path / 'out'}"])[0]
    pipeline = Pipeline(job.cfg, job.choices)
    rows = count_rows(pipeline, pipeline.site, count_examples(pipeline, pipeline))
    assert rows.n == {"train": 120, "heldout": 120}
    assert rows.sense == "about"
    assert not (tmp_path / "out").exists()
