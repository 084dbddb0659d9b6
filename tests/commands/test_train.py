"""`train` as it is typed: killed and typed again, twice at once, started from other weights."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from sae_runner.checkpoint import load_sae, save_checkpoint, step_dirs
from sae_runner.commands.train import take_weights
from sae_runner.config import preset
from sae_runner.errors import ConfigError
from sae_runner.saes import SAES
from sae_runner.saes.base import SAE
from sae_runner.statistics import ActivationStats
from sae_runner.training.trainer import Trainer

COMMAND = [
    "model=toy", "device=cpu", "dataset.n_examples=3000", "dataset.d=16", "dataset.n_features=32",
    "dataset.n_active=3", "sae.expansion=4", "sae.k=4", "trainer.batch_size=32",
    "trainer.n_tokens=19200", "trainer.dead_window=2000", "trainer.log_every=10",
    "trainer.save_every=0.002", "store.window_rows=500", "store.mix_rows=1000",
    "evaluators.sparsity.n_bootstrap=50", "evaluators.reconstruction.n_bootstrap=50",
]  # fmt: skip


def begin(folder: Path, *words: str) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-m", "sae_runner", "train", *COMMAND, *words],
        cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # Steps are tiny.
    )  # fmt: skip


def end(process: subprocess.Popen[str]) -> str:
    """Wait for a process; what it said."""
    return process.communicate(timeout=240)[1]


def run_dir(folder: Path) -> Path:
    (found,) = (p for p in (folder / "outputs" / "train").iterdir() if not p.name.startswith("."))
    return found


def last_step(folder: Path) -> int:
    """The step that metrics.jsonl has come to, of whatever run is there."""
    for path in folder.glob("outputs/train/*/metrics.jsonl"):
        if lines := path.read_text().splitlines()[:-1]:
            return int(json.loads(lines[-1])["step"])
    return 0


def stop_after(folder: Path, number: signal.Signals, n_steps: int) -> tuple[int, str]:
    """Type the command and stop it at least `n_steps` steps further on: exit code and words."""
    wanted = last_step(folder) + n_steps
    process = begin(folder)
    deadline = time.monotonic() + 120
    while last_step(folder) < wanted and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(number)
    return process.wait(120), end(process)


def report_of(folder: Path) -> Any:
    """The report without what a clock, a memory meter or a commit beside the test says."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            left_out = ("cost", "timestamp_utc", "git")
            return {k: clean(v) for k, v in value.items() if k not in left_out}
        return [clean(v) for v in value] if isinstance(value, list) else value

    return clean(json.loads((run_dir(folder) / "report.json").read_text()))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a run but those in which a clock is read."""
    clocks = ("timings.jsonl", "run.log", "report.json")
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and p.name not in clocks and "eval" not in p.parts and p.suffix != ".png"
    }


def test_a_run_that_is_stopped_again_and_again_ends_as_one_that_never_was(tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    process = begin(whole)
    end(process)
    assert process.returncode == 0
    draw = random.Random(0)
    codes = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}
    for number in (signal.SIGKILL, signal.SIGINT, signal.SIGTERM):
        code, words = stop_after(stopped, number, draw.randint(10, 80))
        assert code == codes[number], words
        if number != signal.SIGKILL:
            line = words.strip().splitlines()[-1]
            pattern = rf"sae-run train: interrupted by {number.name}: stopped at step \d+; type"
            assert re.match(pattern, line), words
    (run_dir(stopped) / ".report.json.1.partial").mkdir()  # What a kill might leave.
    (run_dir(stopped) / ".report.json.1.partial" / "report.json").write_text("{")
    # The newest checkpoint is damaged, too: the one before it serves.
    steps = [int(folder.name[5:]) for folder in step_dirs(run_dir(stopped))]
    assert len(steps) == 2 and 0 < steps[0] < steps[1] < 600
    damaged = step_dirs(run_dir(stopped))[-1] / "sae.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    process = begin(stopped)
    words = end(process)
    assert process.returncode == 0, words
    assert f"step_{steps[1]:08d} is damaged: sae.safetensors differs from its hash" in words
    assert f"going on from step_{steps[0]:08d}" in words
    assert contents(run_dir(stopped)) == contents(run_dir(whole))
    assert report_of(stopped) == report_of(whole)


def test_two_that_are_typed_at_once_share_the_work(tmp_path):
    processes = [begin(tmp_path, "trainer.n_tokens=9600") for _ in range(2)]
    words = [end(process) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], words
    assert sum("caching activations" in text for text in words) == 1
    assert sum("training topk" in text for text in words) == 1
    assert sum("evaluator sparsity is done" in text for text in words) == 1
    log = (run_dir(tmp_path) / "run.log").read_text()
    assert log.count("training topk") == 1 and "training is done" in log
    assert len(json.loads((run_dir(tmp_path) / "report.json").read_text())["evaluators"]) == 3


def test_a_full_disk_while_training_is_one_line_and_leaves_what_was(
    in_process, monkeypatch, capfd, tmp_path
):
    from sae_runner import checkpoint

    words = ["train", *COMMAND, "trainer.n_tokens=3200", "trainer.checkpoints=3"]
    real, calls = checkpoint.files.write_tensors, iter(range(100))

    def write_tensors(path: Path, tensors: Any) -> None:
        if "step_" in str(path) and next(calls) == 4:  # In the second checkpoint.
            raise OSError(28, "No space left on device")
        real(path, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.files, "write_tensors", write_tensors)
        assert in_process(*words, "trainer.save_every=null") == 2
    line = capfd.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("sae-run train: no space left on device") and "same command" in line
    (only,) = (run_dir(tmp_path) / "checkpoints").iterdir()
    assert only.name == "step_00000025"
    assert in_process(*words) == 0
    assert "going on from step_00000025" in capfd.readouterr().err


# -- Starting from other weights -----------------------------------------------------------------


def rows(scale: float, seed: int) -> torch.Tensor:
    return scale * torch.randn(200, 6, generator=torch.Generator().manual_seed(seed)) + 1


def initialised(kind: str, x: torch.Tensor, **options: Any) -> SAE:
    cfg = preset("sae", kind) | {"d_sae": 10, "expansion": None, "units": None}
    cfg.update({key: value for key, value in {"k": 3, **options}.items() if key in cfg})
    sae: SAE = SAES.build(cfg, d_in=6)
    norms = x.norm(dim=1)
    stats = ActivationStats(x.mean(0), float(norms.mean()), float(norms.square().mean()), x)
    with torch.no_grad():
        sae.initialise(stats, torch.Generator().manual_seed(len(kind)))
    return sae


@pytest.mark.parametrize("kind", ["relu", "topk"])
@pytest.mark.parametrize("scaling", ["none", "sqrt_d", "unit_mean_square"])
def test_a_run_starts_from_what_the_other_run_ended_with(tmp_path, kind, scaling):
    """Though that one saw activations of another size, and its saved weights take raw ones."""
    source = initialised(kind, rows(7, 0), input_scaling="sqrt_d")
    with torch.no_grad():
        for parameter in source.parameters():
            parameter += 0.2 * torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())
            )
    source.after_step()
    folder = tmp_path / "step_00000001"
    save_checkpoint(folder, source, {"step": 1})
    x = rows(0.5, 1)
    sae = initialised(kind, x, input_scaling=scaling)
    scale = float(sae.input_scale)
    take_weights(sae, folder)
    assert float(sae.input_scale) == pytest.approx(scale)
    with torch.no_grad():
        found, expected, original = sae(x), load_sae(folder)(x), source(x)
    torch.testing.assert_close(found.x_hat, expected.x_hat)
    torch.testing.assert_close(found.x_hat, original.x_hat)
    assert torch.equal(found.latents.dense() > 0, original.latents.dense() > 0)
    # What is trained from there and saved takes raw activations again.
    save_checkpoint(tmp_path / "step_00000002", sae, {"step": 2})
    torch.testing.assert_close(load_sae(tmp_path / "step_00000002")(x).x_hat, original.x_hat)


@pytest.mark.parametrize("kind", ["relu", "topk", "gated", "jump_relu"])
@pytest.mark.parametrize("centred", [True, False])
def test_a_run_starts_from_another_librarys_folder(tmp_path, kind, centred):
    """Whose encoder may see x − b_dec where ours sees x, and whose decoder rows have any norm."""
    from sae_runner.interchange.base import Origin
    from sae_runner.interchange.saelens import SAELens

    x = rows(0.5, 1)
    free = {"decoder_norm": "free", "decoder_init_norm": 0.3} if kind != "topk" else {}
    source = initialised(
        kind, rows(7, 0), input_scaling="none", apply_b_dec_to_input=not centred, units=None, **free
    )
    with torch.no_grad():
        for parameter in source.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * rows(1, 5)[0, 0].abs()
    SAELens().write(tmp_path, source, Origin())
    unit = {"decoder_norm": "unit", "decoder_init_norm": 1.0}
    sae = initialised(
        kind, x, input_scaling="sqrt_d", apply_b_dec_to_input=centred, units=None, **unit
    )
    take_weights(sae, tmp_path)
    with torch.no_grad():
        found, expected = sae(x), source(x)
        torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(10))
    torch.testing.assert_close(found.x_hat, expected.x_hat)
    assert torch.equal(found.latents.dense() > 0, expected.latents.dense() > 0)


def test_decoder_rows_that_cannot_be_made_unit_vectors_are_refused(tmp_path):
    source = initialised("topk", rows(7, 0), decoder_norm="free", decoder_init_norm=0.3)
    save_checkpoint(tmp_path / "step_00000001", source, {"step": 1})
    sae = initialised("topk", rows(1, 1))
    with pytest.raises(ConfigError, match=r"go from 0.3 to 0.3, and sae.decoder_norm=unit"):
        take_weights(sae, tmp_path / "step_00000001")


@pytest.mark.parametrize("weights", ["null", "random"])
def test_what_could_not_be_read_is_in_the_report(tmp_path, compose_job, caplog, weights):
    """Of a folder of pictures one is torn, for a model that trains on them and for one that not."""
    from sae_runner.commands import train

    for i in range(120):
        path = tmp_path / "digits" / str(i % 3) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 2 * i).save(path)
    path.write_bytes(path.read_bytes()[:20])
    job = compose_job(
        "train", "model=mnist_mlp", f"model.weights={weights}", "model.options.widths=[16]",
        "model.epochs=1", f"dataset.path={tmp_path / 'digits'}", "dataset.heldout_split=null",
        "dataset.max_bad=0.01", "trainer.n_tokens=256", "trainer.batch_size=32", "sae.k=4",
        "evaluators=[density]", f"outputs={tmp_path / 'outputs'}",
    )  # fmt: skip
    train.main(job)
    report = json.loads((run_dir(tmp_path) / "report.json").read_text())
    assert "unreadable examples, left out of the data: 1" in report["warnings"]
    named = [line for line in caplog.messages if "unreadable example" in line]
    assert len(named) == (2 if weights == "null" else 1)


@pytest.mark.parametrize("launcher", ["basic", "together"])
def test_the_model_is_gone_once_its_rows_are_stored(tmp_path, compose_job, monkeypatch, launcher):
    from sae_runner.commands import store_pipeline, together, train

    built, alive = [], []
    build_model, advance = store_pipeline.build_model, Trainer.advance

    def build(*args, **options):
        model = build_model(*args, **options)
        if not options["meta"]:
            built.append(weakref.ref(model))
        return model

    def step(trainer, *args):
        alive.append([ref() is not None for ref in built])
        return advance(trainer, *args)

    monkeypatch.setattr(store_pipeline, "build_model", build)
    monkeypatch.setattr(Trainer, "advance", step)
    job = compose_job(
        "train", "model=mnist_mlp", "model.weights=random", "model.options.widths=[16]",
        "dataset=digits", "dataset.n_examples=200", "dataset.n_heldout=20",
        "trainer.n_tokens=256", "trainer.batch_size=128", "sae.k=4", "evaluators=[density]",
        f"outputs={tmp_path / 'outputs'}",
    )  # fmt: skip
    if launcher == "basic":
        train.main(job)
    else:
        assert together.main([job], None) == [None]
    assert alive == [[False], [False]]
