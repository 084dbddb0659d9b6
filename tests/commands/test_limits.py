"""What plainly cannot fit is refused before anything is made; what may is not."""

import pytest

from sae_runner import files
from sae_runner.commands import limits, memory, train
from sae_runner.commands.limits import checkpoint_bytes, require_room
from sae_runner.commands.memory import Part
from sae_runner.commands.pipeline import Pipeline
from sae_runner.errors import ConfigError, InputError


@pytest.fixture
def pipeline(compose_job, small, tmp_path):
    def pipeline(*words, outputs=tmp_path / "outputs"):
        job = compose_job("train", *small, f"outputs={outputs}", "device=cpu", *words)
        return Pipeline(job.cfg, job.choices)

    return pipeline


@pytest.fixture
def free(monkeypatch):
    return lambda n: monkeypatch.setattr(files, "free_bytes", lambda _: n + files.RESERVE)


@pytest.fixture
def physical(monkeypatch):
    return lambda n: monkeypatch.setattr(memory, "physical_bytes", lambda: n)


STORE = 3000 * (16 * 4 + 8 + 4 + 4)
"""About what a store of `small` takes: rows, ids, positions and norms."""


def test_checkpoints_that_will_not_fit_are_refused_with_the_key_to_lower(pipeline, free):
    run = pipeline("sae.d_sae=10000", "sae.expansion=null")
    weights = 4 * (2 * 10_000 * 16 + 10_000 + 16)
    sae = run.build_sae(16, device="meta")
    assert checkpoint_bytes(run.train_options, sae) == 4 * weights  # With the state at the end.
    free(2 * STORE + 4 * weights)
    require_room(run)
    free(STORE + 2 * weights)
    with pytest.raises(InputError, match=r"^store and checkpoints need .*, or lower sae\.d_sae$"):
        require_room(run)
    with pytest.raises(InputError, match=r"or lower sae\.expansion$"):
        require_room(pipeline("sae.expansion=625"))
    many = pipeline("sae.expansion=625", "trainer.checkpoints=3")
    assert checkpoint_bytes(many.train_options, sae) == 4 * 4 * weights
    with pytest.raises(InputError, match=r"or lower trainer\.checkpoints$"):
        require_room(many)


def test_a_store_that_will_not_fit_is_refused(pipeline, free):
    free(STORE // 2)
    with pytest.raises(InputError, match=r"^store needs .*: .* lower dataset\.n_examples, or use"):
        require_room(pipeline())


def test_what_is_there_needs_no_room(pipeline, free, trained, physical):
    run = pipeline(outputs=trained)
    assert run.run_dir.is_dir()
    free(0)
    physical(1)
    require_room(run)
    with pytest.raises(InputError, match="checkpoints need"):
        require_room(pipeline("seed=1", outputs=trained))


def test_weights_beyond_the_memory_of_the_machine_are_refused(pipeline, free, physical):
    run = pipeline("sae.expansion=625", "trainer.micro_batch_size=1")
    weights = 4 * (2 * 10_000 * 16 + 10_000 + 16)
    free(10**12)
    sae, n_rows = run.build_sae(16, device="meta"), limits.rows_for_sure(run)
    held = sum(part.sure * part.n_bytes for part in memory.training(run, sae, n_rows))
    assert held > 3 * weights  # Parameters and two moments.
    physical(held)
    require_room(run)
    physical(held - 1)
    refused = (
        r"^training needs at least .* GB of memory, .*: lower sae\.expansion \(Adam's moments\)$"
    )
    with pytest.raises(ConfigError, match=refused):
        require_room(run)


def test_a_batch_beyond_the_memory_of_the_machine_is_refused(pipeline, physical):
    words = ["trainer.batch_size=1_000_000", "trainer.n_tokens=2_000_000", "sae.expansion=4"]
    physical(5 * 10**7)
    with pytest.raises(ConfigError, match=r"lower trainer\.micro_batch_size \(activations of a b"):
        require_room(pipeline(*words))
    require_room(pipeline(*words, "trainer.micro_batch_size=1000"))


def test_only_what_is_sure_counts():
    parts = [Part("a", 8e9, "host", "x.a", 0.5), Part("b", 9e9, "host", "x.b")]
    memory.require("it", parts, "cpu")  # Nobody knows of this device how much memory there is.


def test_on_a_device_its_own_memory_counts(monkeypatch):
    monkeypatch.setattr(memory, "physical_bytes", lambda: 10**9)
    monkeypatch.setattr(memory, "total_on", lambda device: 10**10 if device == "cuda:0" else None)
    parts = [Part("a", 8e9, "device", "x.a", 1), Part("b", 1e8, "host", "x.b", 1)]
    memory.require("it", parts, "cuda:0")
    with pytest.raises(ConfigError, match=r"^it needs at least 8.1 GB of memory, .* lower x\.a"):
        memory.require("it", parts, "cpu")
    more = [*parts, Part("c", 4e9, "device", "x.c", 1)]
    with pytest.raises(
        ConfigError, match=r"12 GB of memory of cuda:0, which has 10 GB: lower x\.a"
    ):
        memory.require("it", more, "cuda:0")


def test_rows_of_text_are_known_once_it_is_packed(compose_job, tmp_path, free):
    job = compose_job("train", "model=tiny_lm", "dataset=stdlib_text", f"outputs={tmp_path}/o")
    run = Pipeline(job.cfg, job.choices)
    free(10**8)  # Of 15 MB of weights; the store will take more, and nobody knows how much.
    assert limits.rows_for_sure(run) == 0
    require_room(run)


def test_plan_says_what_train_refuses(compose_job, small, tmp_path, free, capsys):
    from sae_runner.commands import plan

    free(1000)
    words = [*small, f"outputs={tmp_path}/outputs"]
    plan.main(compose_job("plan", *words))
    assert "! store needs" in capsys.readouterr().out
    with pytest.raises(InputError, match="store needs"):
        train.check(compose_job("train", *words))
