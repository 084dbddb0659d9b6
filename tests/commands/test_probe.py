import pytest
import torch

from sae_runner.commands.pipeline import Pipeline
from sae_runner.commands.probe import (
    N_BATCHES,
    N_STEPS,
    Measured,
    RowsInMemory,
    random_rows,
    time_caching,
    time_training,
)
from sae_runner.commands.rehearsal import rehearsal
from sae_runner.models.base import SiteInfo

SITE = SiteInfo("activations", "activations", 16, "vector", 1)


@pytest.fixture
def pipeline(compose_job, small, tmp_path):
    def pipeline(*words):
        job = compose_job("plan", *small, f"outputs={tmp_path}/outputs", *words)
        return Pipeline(job.cfg, job.choices)

    return pipeline


def test_what_is_said_is_what_was_measured_times_what_there_is():
    text = Measured(8, "batches", 0.002).line(50_000, "examples")
    assert text == "about 1m40s for 50,000 examples (batches measured: 8; 500/s)"
    assert "0.125/s" in Measured(1, "steps", 8.0).line(10, "steps")


def test_caching_is_timed_on_rows_of_the_dataset(pipeline):
    composed = pipeline("model.batch_size=50")
    with rehearsal(composed) as copy:
        measured, rows, rows_per_example = time_caching(copy, composed.infos)
    assert rows_per_example == 1
    assert measured.n == N_BATCHES and measured.unit == "batches"
    assert 0 < measured.seconds_each < 1
    # One batch to warm up, and the timed ones: distinct training rows.
    assert rows.shape == (50 * (N_BATCHES + 1), 16) and rows.dtype == torch.float32
    ids = composed.raw_dataset.ids("train")
    known = {tuple(example.value.tolist()) for example in composed.raw_dataset.load(ids)}
    found = {tuple(row.tolist()) for row in rows}
    assert found <= known and len(found) == len(rows)


def test_a_dataset_of_one_batch_is_enough(pipeline):
    composed = pipeline("model.batch_size=4096")
    with rehearsal(composed) as copy:
        measured = time_caching(copy, composed.infos).measured
    assert measured.n == 1 and measured.seconds_each > 0


def test_steps_are_timed_without_a_trace(pipeline, tmp_path):
    state = torch.random.get_rng_state()
    rows = random_rows(SITE, 600, seed=0)
    measured = time_training(pipeline(), rows, tmp_path / "never")
    assert measured.n == N_STEPS and measured.unit == "steps" and measured.seconds_each > 0
    assert not (tmp_path / "never").exists() and not (tmp_path / "outputs").exists()
    assert torch.equal(torch.random.get_rng_state(), state)


def test_time_is_up_after_a_while(pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr("sae_runner.commands.probe.SECONDS", 0.0)
    measured = time_training(pipeline(), random_rows(SITE, 600, seed=0), tmp_path)
    assert measured.n == 1


def test_rows_in_memory_are_a_store():
    x = torch.randn(100, 16, generator=torch.Generator().manual_seed(1))
    store = RowsInMemory(SITE, x)
    assert store.n_rows("train") == 100 and store.d_in == 16
    batches = store.shuffled(50, seed=0)
    epoch = torch.cat([next(batches).x, next(batches).x])
    assert torch.equal(epoch.sort(0).values, x.sort(0).values)
    stats = store.stats(10)
    assert torch.allclose(stats.mean, x.mean(0), atol=1e-6)
    assert stats.mean_norm == pytest.approx(float(x.norm(dim=1).mean()), rel=1e-6)
    assert stats.mean_square_norm == pytest.approx(float(x.square().sum(1).mean()), rel=1e-6)
    assert len(stats.sample) == 10
    assert torch.equal(random_rows(SITE, 5, 3).x, random_rows(SITE, 5, 3).x)
