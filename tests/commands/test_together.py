"""`hydra/launcher=together`: every job ends with the bits that it has alone."""

import json
import signal
import subprocess
import sys
import time

import pytest

from sae_runner.commands import together
from sae_runner.commands.together import Run, groups_that_fit
from sae_runner.training.trainer import Trainer

SWEEP = ["train", "-m", "sae=topk,relu", "sae.target_l0=2,4", "hydra/launcher=together"]


@pytest.fixture
def small(small):
    return [word for word in small if not word.startswith("evaluators")] + ["evaluators=[sparsity]"]


@pytest.fixture(autouse=True)
def without_figures(monkeypatch):
    """They take most of the time, and nothing here is of them."""
    monkeypatch.setattr("sae_runner.commands.eval.draw_run", lambda *_: None)


def results(outputs):
    """The bytes of what is the same however a run was made, by run and file."""
    found = {}
    for run in sorted(outputs.glob("train/[!.]*")):
        for path in [run / "metrics.jsonl", *run.glob("checkpoints/*/*.safetensors"),
                     *run.glob("checkpoints/*/state/*")]:  # fmt: skip
            found[run.name, str(path.relative_to(run))] = path.read_bytes()
        report = json.loads((run / "report.json").read_text())
        found[run.name, "report"] = report["evaluators"]["sparsity"]["metrics"]
    return found


@pytest.fixture
def alone(in_process, small, tmp_path):
    """The results of the same sweep, one job after another."""
    assert in_process(*SWEEP[:-1], *small) == 0
    found = results(tmp_path / "outputs")
    (tmp_path / "outputs").rename(tmp_path / "alone")
    return found


def test_each_ends_as_alone(alone, in_process, small, tmp_path, capfd):
    assert in_process(*SWEEP, *small) == 0
    assert results(tmp_path / "outputs") == alone and len({run for run, _ in alone}) == 4
    capfd.readouterr()
    assert in_process(*SWEEP, *small) == 0
    assert capfd.readouterr().err.count("training is done") == 4


def test_each_log_is_its_own(in_process, small, tmp_path):
    assert in_process(*SWEEP, *small) == 0
    for run in (tmp_path / "outputs" / "train").glob("toy-*"):
        lines = (run / "run.log").read_text().splitlines()
        assert sum("INFO    sae_runner: training " in line for line in lines) == 1
        assert sum("report: " in line for line in lines) == 1


def test_batches_are_read_once(in_process, small, monkeypatch):
    from sae_runner.store.reader import ActivationStore

    read, shuffled = [], ActivationStore.shuffled

    def count(self, *arguments, **options):
        read.extend(arguments[:1] if arguments[0] == 256 else [])  # Others sample statistics.
        return shuffled(self, *arguments, **options)

    monkeypatch.setattr(ActivationStore, "shuffled", count)
    small = [word for word in small if not word.startswith("evaluators")] + ["evaluators=[]"]
    assert in_process(*SWEEP, *small) == 0
    assert len(read) == 1
    few = ["train", "-m", "sae=topk", SWEEP[-1]]
    assert in_process(*few, *small, "seed=1,2", "store.seed=3,4") == 0
    assert len(read) == 3  # Two orders of the data are two streams.


def test_what_is_predicted_is_part_of_the_stream(compose_job):
    words = ["model=tiny_clip", "sae=transcoder", "site.name=blocks.0.resid_mid"]
    streams = [
        Run(compose_job("train", *words, f"site.target=blocks.0.{target}")).stream
        for target in ("mlp_out", "attn_out", "mlp_out")
    ]
    assert streams[0] == streams[2] != streams[1]


def test_one_that_fails_leaves_the_others_running(
    alone, in_process, small, tmp_path, monkeypatch, capfd
):
    step = Trainer.take_step

    def take_step(self, x):
        if self.sae.kind == "relu" and self.sae.target_l0 == 2 and self.step == 3:
            raise RuntimeError("planted")
        return step(self, x)

    monkeypatch.setattr(Trainer, "take_step", take_step)
    assert in_process(*SWEEP, *small) == 1
    err = capfd.readouterr().err
    assert "sae=relu, sae.target_l0=2" in err and "planted" in err
    monkeypatch.setattr(Trainer, "take_step", step)
    assert len(list((tmp_path / "outputs").glob("train/*/report.json"))) == 3
    assert in_process(*SWEEP, *small) == 0
    assert results(tmp_path / "outputs") == alone


def test_killed_and_typed_again_it_ends_the_same(alone, in_process, small, tmp_path):
    """Killed between saves of one job and another, so they go on from different places."""
    words = [*SWEEP, *small, "trainer.save_every=0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "sae_runner", *words], cwd=tmp_path, stderr=subprocess.DEVNULL
    )
    while not list((tmp_path / "outputs").glob("train/*/checkpoints/step_*")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert in_process(*words) == 0
    assert results(tmp_path / "outputs") == alone


def test_a_stop_saves_every_one(in_process, small, tmp_path, alone, monkeypatch, capfd):
    import os

    step, taken = Trainer.take_step, []

    def take_step(self, x):
        taken.append(self.step)
        if len(taken) == 6:  # The second of four jobs, in the second step.
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, x)

    monkeypatch.setattr(Trainer, "take_step", take_step)
    assert in_process(*SWEEP, *small) == 143
    saved = (tmp_path / "outputs").glob("train/*/checkpoints/step_*")
    assert sorted(path.name for path in saved) == ["step_00000002"] * 4
    assert "type the same command to go on" in capfd.readouterr().err
    monkeypatch.setattr(Trainer, "take_step", step)
    assert in_process(*SWEEP, *small) == 0
    assert results(tmp_path / "outputs") == alone


def test_groups_fit_memory(compose_job, small, monkeypatch):
    runs = [Run(compose_job("train", *small, f"seed={seed}")) for seed in range(5)]
    monkeypatch.setattr(together.memory, "sum_on_device", lambda _: 0.4e9)
    assert [len(group) for group in groups_that_fit(runs, 1.0)] == [2, 2, 1]
    assert [len(group) for group in groups_that_fit(runs, 0.1)] == [1] * 5  # Each has to be run.
    monkeypatch.setattr(together.memory, "free_memory", lambda: int(1.6e9))
    assert [len(group) for group in groups_that_fit(runs, None)] == [3, 2]


def test_only_training_has_batches_to_share(in_process, small, capfd):
    assert in_process("cache", "-m", "model=toy", "hydra/launcher=together", "store.seed=0,1") == 2
    assert "cache has no batches to share; use basic" in capfd.readouterr().err


def test_training_on_inputs_has_no_batches_to_share(in_process, tmp_path, capfd):
    words = ["model=mnist_mlp", "dataset=digits", "model.image_size=8"]
    words += ["trainer/objective=local,e2e", "hydra/launcher=together"]
    assert in_process("train", "-m", *words) == 2
    message = "together: trainer/objective=e2e has no batches to share; use basic"
    assert message in capfd.readouterr().err
    assert {path.name for path in (tmp_path / "outputs").iterdir()} == {"sweeps"}
