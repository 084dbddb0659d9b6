"""What evaluators are given of a pipeline: rows of other data are read as the dataset's are."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from sae_runner.commands.cache import ensure_store
from sae_runner.commands.passes import context_of
from sae_runner.commands.pipeline import Pipeline
from sae_runner.data._labelled_files import LabelledFile
from sae_runner.evaluators._pooling import pooled

WORDS = ["model=tiny_clip", "model.epochs=1", "model.layers=1", "model.width=16", "model.heads=2",
         "dataset.n_examples=48", "dataset.n_heldout=16", "store.window_rows=300",
         "site.tokens=patches", "site.name=blocks.0.resid_mid", "device=cpu"]  # fmt: skip


def task_file(tmp_path, dataset):
    """A dataset's own held-out images, half of them to train on, in a file of tasks."""
    records = []
    for example in dataset.load(dataset.ids("heldout")):
        Image.fromarray(np.asarray(example.value)).save(tmp_path / f"{example.id}.png")
        split = "train" if len(records) % 2 else "test"
        records.append({"input": f"{example.id}.png", "label": example.id % 2, "split": split})
    path = tmp_path / "task.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return LabelledFile(path, seed=0, limits={}, where="F")


@pytest.mark.parametrize(
    "words",
    [["sae=topk"], ["sae=topk", "store.max_norm_multiple=1.02"], ["sae=topk", "store.dtype=fp16"],
     ["sae=transcoder", "site.target=blocks.0.mlp_act"]],
    ids=" ".join,
)  # fmt: skip
def test_rows_of_other_data_are_those_that_the_dataset_would_have(words, compose_job, tmp_path):
    job = compose_job("train", *WORDS, *words, f"outputs={tmp_path}/outputs")
    pipeline = Pipeline(job.cfg, job.choices)
    ensure_store(pipeline)
    sae = pipeline.build_sae(pipeline.site.d)
    generator = torch.Generator().manual_seed(0)
    for parameter in sae.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    context = context_of(sae, pipeline.open_store(), pipeline)
    own = pooled(context.rows("heldout", 16), "mean")
    file = task_file(tmp_path, pipeline.raw_dataset)
    found = [pooled(context.rows_of(file, split), "mean") for split in ("train", "heldout")]
    for part, place in zip(found, (slice(1, None, 2), slice(0, None, 2)), strict=True):
        at = pipeline.raw_dataset.ids("heldout")[part.ids]
        assert (at % 2 == part.label).all() and len(at) > 3
        same = np.isin(own.ids, at)
        assert own.ids[same].tolist() == at.tolist()
        assert set(at) <= set(pipeline.raw_dataset.ids("heldout")[place])
        np.testing.assert_allclose(part.raw, own.raw[same], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(
            part.latents.toarray(), own.latents[same.nonzero()[0]].toarray(), rtol=1e-3, atol=1e-4
        )


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "there is no such file. Did you mean tasks/bias.csv?"),
     ("input,label\na,1\nb,0\n", "its inputs are text, and the model reads image"),
     ("input,lable\na,1\n", "it has no column 'label'. Did you mean 'lable'?")],
)  # fmt: skip
def test_a_file_that_will_not_do_ends_the_command_before_it_begins(
    content, message, in_process, tmp_path, capfd
):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/bias.csv").write_text("input,label\na,1\n")
    if content:
        (tmp_path / "tasks/bais.csv").write_text(content)
    words = ["evaluators=[probes]", "evaluators.probes.files=[tasks/bais.csv]"]
    assert in_process("train", *WORDS, *words) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if " INFO " not in line]
    assert len(lines) == 1 and f"evaluators.probes: files=tasks/bais.csv: {message}" in lines[0]
    assert not (tmp_path / "outputs").exists()
