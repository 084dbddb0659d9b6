"""A run killed at any moment and typed again ends with the bits of one that never was."""

import contextlib
import json
import random
import signal
import subprocess
import sys
import time
import zlib

import pytest

from sae_runner.config import options_of, preset
from sae_runner.errors import ConfigError
from sae_runner.saes import SAES
from sae_runner.training.dead_latents import DEAD_LATENTS

BUDGET = [
    "sae.expansion=8", "trainer.n_tokens=40960", "trainer.batch_size=256", "trainer.log_every=5",
    "trainer.dead_window=4096", "trainer.save_every=0", "trainer.n_calibration=512",
    "evaluators=[sparsity]", "evaluators.sparsity.n_bootstrap=50",
]  # fmt: skip
QUICK = [
    "model=toy", "dataset.n_examples=6000", "dataset.d=32", "dataset.n_features=64", *BUDGET,
]  # fmt: skip
PAIR = [
    "model=tiny_clip", "model.epochs=1", "model.width=32", "dataset.n_examples=300",
    "dataset.n_heldout=40", "site.name=blocks.0.resid_mid", "site.target=blocks.0.mlp_out", *BUDGET,
]  # fmt: skip
RESAMPLE = ["sae/dead_latents=resample", "sae.dead_latents.n_rows=2048",
            "sae.dead_latents.lr_warmup=0.1"]  # fmt: skip
SAMPLE = {
    "topk-auxk-ema": ["sae=topk", "sae.k=4", "trainer.ema=0.9"],
    "relu-resample-target": ["sae=relu", "sae.target_l0=4", *RESAMPLE],
    "gated-ghost_grads": ["sae=gated", "sae/dead_latents=ghost_grads"],
}
END_TO_END = [
    "model=mnist_mlp", "model.options.widths=[32,16]", "model.image_size=8", "model.epochs=2",
    "dataset=digits", "site.name=hidden.0", "sae=batch_topk", "sae.k=4", "trainer/objective=e2e",
    *QUICK[4:], "sae.expansion=2", "trainer.n_tokens=10240",
]  # fmt: skip
"""The model in the loop, and examples in an order of their own: 7 epochs of them."""
WITHOUT = {
    "resample": {"archetypal", "transcoder"},
    "pre_act": {
        "topk", "batch_topk", "matryoshka", "matching_pursuit", "archetypal", "transcoder",
    },
}  # fmt: skip
"""Kinds of SAE that refuse a strategy."""
PAIRS = [(kind, strategy) for kind in options_of("sae") for strategy in DEAD_LATENTS.names()]
EVERY = {
    f"{kind}-{strategy}": [f"sae={kind}", f"sae/dead_latents={strategy}"]
    for kind, strategy in PAIRS
    if kind != "transcoder" and kind not in WITHOUT.get(strategy, ())
}
"""A transcoder's are below."""


def command(words):
    return [sys.executable, "-m", "sae_runner", "train", *words]


def finish(words, cwd):
    """What a run that is not disturbed says on standard error."""
    done = subprocess.run(
        command(words), cwd=cwd, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def results(folder):
    (run,) = folder.glob("outputs/train/[!.]*")
    found = {"metrics": (run / "metrics.jsonl").read_bytes()}
    for path in run.glob("checkpoints/*/**/*"):
        if path.is_file():
            found[str(path.relative_to(run))] = path.read_bytes()
    report = json.loads((run / "report.json").read_text())
    found["report"] = report["evaluators"]["sparsity"]["metrics"]
    found["training"] = report["training"]
    return found


def is_killed_and_ends_the_same(words, tmp_path, seed, n_kills):
    folders = [tmp_path / name for name in ("whole", "killed")]
    for folder in folders:
        folder.mkdir()
    finish(words, folders[0])
    chance = random.Random(seed)
    for _ in range(n_kills):
        process = subprocess.Popen(
            command(words), cwd=folders[1], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        steps = folders[1] / "outputs" / "train"
        before = set(steps.glob("*/checkpoints/step_*"))
        # From its own first checkpoint on, at any moment: also while one is being written.
        while process.poll() is None and set(steps.glob("*/checkpoints/step_*")) <= before:
            time.sleep(0.005)
        time.sleep(chance.random())
        process.send_signal(signal.SIGKILL)
        process.wait()
    err = finish(words, folders[1])
    assert results(folders[1]) == results(folders[0])
    return err


@pytest.mark.parametrize(("kind", "strategy"), PAIRS)
def test_no_pair_but_those_that_are_refused_is_left_out(kind, strategy):
    base = preset("sae", "jump_relu") if kind.startswith("jump_relu_") else {}
    sae = SAES.build(base | preset("sae", kind), d_in=32, d_out=32)
    refused = kind in WITHOUT.get(strategy, ())
    with pytest.raises(ConfigError, match=strategy) if refused else contextlib.nullcontext():
        DEAD_LATENTS.build(preset("sae/dead_latents", strategy), sae=sae, window=100)


@pytest.mark.parametrize("name", SAMPLE)
def test_a_sample_of_kinds_and_strategies(name, tmp_path):
    err = is_killed_and_ends_the_same([*QUICK, *SAMPLE[name]], tmp_path, seed=1, n_kills=1)
    assert "going on from step_" in err or "training is done" in err


def test_training_with_the_model_in_the_loop(tmp_path):
    err = is_killed_and_ends_the_same(END_TO_END, tmp_path, seed=3, n_kills=1)
    assert "going on from step_" in err or "training is done" in err


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_every_kind_with_every_strategy(name, tmp_path):
    words = [*QUICK, *EVERY[name]]
    if "-resample" in name:
        words += RESAMPLE[1:]
    is_killed_and_ends_the_same(words, tmp_path, seed=zlib.crc32(name.encode()), n_kills=3)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["none", "auxk", "ghost_grads"])
def test_a_transcoder_with_every_strategy(strategy, tmp_path):
    words = [*PAIR, "sae=transcoder", "sae.k=4", f"sae/dead_latents={strategy}"]
    is_killed_and_ends_the_same(words, tmp_path, seed=zlib.crc32(strategy.encode()), n_kills=3)
