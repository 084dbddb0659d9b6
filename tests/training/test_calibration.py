"""Which rows a threshold is measured on, and when."""

import os
import signal

import pytest
import torch

from sae_runner.checkpoint import load_sae, read_facts, step_dirs
from sae_runner.errors import Interrupted
from sae_runner.training import calibration


@pytest.fixture
def few(monkeypatch):
    """64 rows at hand, one window of the store's eight."""
    monkeypatch.setattr(calibration, "N_AT_HAND", 64)


def l0_of(folder, x) -> float:
    return load_sae(folder).encode_sparse(x).counts.double().mean().item()


@pytest.mark.parametrize("kind", ["batch_topk", "matryoshka"])
def test_what_is_kept_is_measured_on_every_row_and_the_rest_on_rows_at_hand(trainer, few, kind):
    def stop(row):
        if row["step"] == 13:
            os.kill(os.getpid(), signal.SIGTERM)

    run = trainer(kind, sae={"k": 2.5}, checkpoints=1, sinks=(stop,))
    with pytest.raises(Interrupted):
        run.run()
    at_hand = torch.cat(run.calibration.at_hand)
    assert torch.equal(at_hand, run.store.x[: len(at_hand)]) and len(at_hand) == 64
    kept, stopped = step_dirs(run.run_dir)
    assert [kept.name[-2:], stopped.name[-2:]] == ["10", "13"]
    for folder, x in ((kept, run.store.x), (stopped, at_hand)):
        assert l0_of(folder, x) == pytest.approx(2.5, abs=2 / len(x))
    assert l0_of(kept, at_hand) != pytest.approx(2.5, abs=2 / 64)  # Or this would tell nothing.


def test_a_stop_reads_nothing(trainer, few):
    run = trainer("batch_topk", sae={"k": 2.5}, checkpoints=[5, 6])
    run.begin()
    before, read = run.store.n_read, []
    for step in (4, 5):
        run.step = step
        run.save()
        read.append(run.store.n_read - before)
    assert read == [0, -(-len(run.store.x) // 64)]


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("topk", {"k": 4}, {5: 10, 10: 4, 20: 4}),
        ("topk", {"target_l0": 4.0}, {5: 10, 10: 4, 20: 4}),
        ("batch_topk", {"k": 2.5}, {5: 9.25, 10: 2.5, 20: 2.5}),
        ("matryoshka", {"target_l0": 2.5}, {5: 9.25, 10: 2.5, 20: 2.5}),
    ],
)
def test_a_checkpoint_on_the_way_has_the_k_of_its_step_and_says_so(
    trainer, kind, options, expected
):
    run = trainer(kind, sae={**options, "k_start": 16, "k_anneal": 0.5}, checkpoints=3)
    run.run()
    found = {}
    for folder in step_dirs(run.run_dir):
        facts = read_facts(folder)
        if (step := facts["step"]) in expected:
            found[step] = facts["sae"]["k"]
            assert facts["sae"]["target_l0"] is None  # Which is k by another name.
            l0 = l0_of(folder, run.store.x)
            assert l0 == pytest.approx(expected[step], abs=0.5 if kind == "topk" else 2 / 500)
    assert found == expected
