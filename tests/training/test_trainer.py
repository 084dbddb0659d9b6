import copy
import json
import logging
import math
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from sae_runner.checkpoint import load_sae, load_state, read_facts, step_dirs
from sae_runner.errors import ConfigError, DataError, Interrupted, StoreError
from sae_runner.saes.base import SAE, TrainState
from sae_runner.training import schedules
from sae_runner.training.trainer import Trainer

KINDS = {
    "relu": {"kind": "relu"},
    "topk": {"kind": "topk"},
    "auxk": {
        "kind": "topk", "sae": {"k": 1}, "dead_window": 64,
        "dead_latents": {"type": "auxk", "coefficient": 1.0, "k_aux": None},
    },
    "resample": {
        "kind": "relu", "sae": {"l1_coefficient": 10.0}, "dead_window": 32, "lr": 1e-2,
        "penalty_warmup": 0.0, "dead_latents": {
            "type": "resample", "at": [0.25, 0.6], "n_rows": 200, "encoder_norm": 0.2,
            "lr_warmup": 0.1,
        },
    },
    "target": {"kind": "relu", "sae": {"target_l0": 3.0}},
    "batch_topk": {
        "kind": "batch_topk", "sae": {"k": 2.5, "k_start": 6.0, "k_anneal": 0.5}, "dead_window": 64,
        "dead_latents": {"type": "auxk", "coefficient": 1.0, "k_aux": None},
    },
    "matryoshka": {
        "kind": "matryoshka", "dead_window": 64,
        "dead_latents": {"type": "auxk", "coefficient": 1.0, "k_aux": None},
    },
    "threshold and resample": {
        "kind": "batch_topk", "sae": {"k": 0.5}, "dead_window": 64,
        "dead_latents": {
            "type": "resample", "at": [0.25, 0.6], "n_rows": 200, "encoder_norm": 0.2,
            "lr_warmup": 0.1,
        },
    },
    "ghosts": {
        "kind": "relu", "sae": {"l1_coefficient": 10.0}, "dead_window": 32, "lr": 1e-2,
        "penalty_warmup": 0.0, "dead_latents": {"type": "ghost_grads", "coefficient": 1.0},
    },
    "thresholds": {
        "kind": "jump_relu", "sae": {"target_l0": 3.0}, "beta1": 0.0, "dead_window": 64,
        "dead_latents": {"type": "pre_act", "coefficient": 1e-3, "only_dead": True},
    },
    "ema": {"kind": "topk", "ema": 0.9},
    "micro": {"kind": "relu", "micro_batch_size": 8},
    "bf16": {"kind": "topk", "precision": "bf16"},
    "no clipping": {"kind": "relu", "clip_grad_norm": None},
}  # fmt: skip


def metrics(trainer: Trainer) -> list[dict[str, float]]:
    lines = (trainer.run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def results(run_dir: Path) -> dict[str, bytes]:
    """The bytes that decide whether two runs are the same: metrics and the last checkpoint."""
    last = step_dirs(run_dir)[-1]
    found = {str(p.relative_to(last)): p for p in last.rglob("*") if p.is_file()}
    return {name: p.read_bytes() for name, p in found.items()} | {
        "metrics": (run_dir / "metrics.jsonl").read_bytes(),
        "last": last.name.encode(),
    }


# -- The same bits -------------------------------------------------------------------------------


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_one_seed_one_result_bit_for_bit(trainer, options):
    a, b = (trainer(name=name, **options) for name in "ab")
    a.run()
    b.run()
    assert results(a.run_dir) == results(b.run_dir)


def test_the_seeds_decide_weights_and_order_apart(trainer):
    runs = {
        name: trainer("relu", name, seed=seed, data_seed=data_seed)
        for name, seed, data_seed in (("a", 0, 0), ("b", 1, 0), ("c", 0, 1))
    }
    starts = {name: run.sae.W_dec.detach().clone() for name, run in runs.items()}
    assert torch.equal(starts["a"], starts["c"]) and not torch.equal(starts["a"], starts["b"])
    for run in runs.values():
        run.run()
    assert len({results(run.run_dir)["sae.safetensors"] for run in runs.values()}) == 3


def test_weights_are_drawn_on_the_cpu_whatever_computes(stored, options, sae, tmp_path):
    """`meta` stands for any other device: it has no generator of its own."""
    drawn_by = []
    for device in ("cpu", "meta"):
        trainer = Trainer(
            sae("relu"), stored(), options(), tmp_path, seed=5, data_seed=0,
            device=torch.device(device), facts={},
        )  # fmt: skip
        initialise = trainer.sae.initialise

        def spy(stats, generator, initialise=initialise):
            drawn_by.append((generator.device.type, generator.initial_seed()))
            initialise(stats, generator)

        trainer.sae.initialise = spy
        trainer.initialise()
        assert trainer.sae.W_dec.device.type == device
    assert drawn_by == [("cpu", 5), ("cpu", 5)]


@pytest.mark.parametrize("kind", ["relu", "topk"])
def test_the_input_scale_is_set_once(trainer, kind):
    run = trainer(kind, sae={"input_scaling": "sqrt_d"}, initialise=False)
    scale, calls = run.sae.set_input_scale, []
    run.sae.set_input_scale = lambda stats: (calls.append(stats), scale(stats))
    run.initialise()
    assert len(calls) == 1
    mean_norm = float(run.store.x.norm(dim=1).mean())
    assert float(run.sae.input_scale) == pytest.approx(8**0.5 / mean_norm)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", ["relu", "topk"])
def test_one_seed_one_start_on_every_device(kind, stored, options, sae, tmp_path):
    starts = []
    for device in ("cpu", "cuda"):
        trainer = Trainer(
            sae(kind), stored(), options(), tmp_path, seed=5, data_seed=0,
            device=torch.device(device), facts={},
        )  # fmt: skip
        trainer.initialise()
        starts.append({name: p.detach().cpu() for name, p in trainer.sae.named_parameters()})
    for name in ("W_enc_rows", "W_dec", "b_enc"):
        assert torch.equal(starts[0][name], starts[1][name])
    torch.testing.assert_close(starts[0]["b_dec"], starts[1]["b_dec"])


def test_the_global_generator_decides_nothing(trainer):
    torch.manual_seed(1)
    trainer("topk", "a").run()
    torch.manual_seed(2)
    before = torch.get_rng_state()
    b = trainer("topk", "b")
    b.run()
    assert results(b.run_dir) == results(b.run_dir.parent / "a")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_going_on_from_any_checkpoint_ends_with_the_same_bits(trainer, options):
    whole = trainer(name="whole", checkpoints=5, **options)
    whole.run()
    expected, folders = results(whole.run_dir), step_dirs(whole.run_dir)
    assert [int(folder.name[5:]) for folder in folders] == [3, 7, 10, 13, 17, 20]
    if options in (KINDS["auxk"], KINDS["resample"], KINDS["threshold and resample"]):
        # Some are dead, others not, when it goes on, and when latents are resampled.
        assert 0.1 < metrics(whole)[11]["dead_fraction"] < 0.9
    for folder in folders[:-1:2]:
        name = f"from-{folder.name}"
        again = trainer(name=name, initialise=False, **options)
        shutil.copy(whole.run_dir / "metrics.jsonl", again.run_dir)
        again.restore(*load_state(folder))
        again.run()
        assert results(again.run_dir) == expected


@pytest.mark.parametrize("kind", ["topk", "threshold and resample"])
def test_when_and_how_often_it_is_saved_changes_nothing(trainer, kind):
    """A threshold is measured at each save, and must teach training nothing."""
    plain = trainer(name="plain", **KINDS[kind])
    plain.run()
    for name, options in (("often", {"save_every": 0}), ("kept", {"checkpoints": 7})):
        other = trainer(name=name, **KINDS[kind], **options)
        other.run()
        assert results(other.run_dir) == results(plain.run_dir)


def test_lines_beyond_the_checkpoint_and_torn_ones_are_forgotten(trainer):
    whole = trainer("relu", "whole", checkpoints=1)
    whole.run()
    path = whole.run_dir / "metrics.jsonl"
    text = path.read_text()
    path.write_text(text + '{"step": 21, "n_tokens": 672, "los')
    again = trainer("relu", "whole", checkpoints=1, initialise=False)
    again.restore(*load_state(whole.run_dir / "checkpoints" / "step_00000010"))
    assert path.read_text() == "".join(text.splitlines(keepends=True)[:10])
    timings = (whole.run_dir / "timings.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in timings] == list(range(1, 11))


@pytest.mark.parametrize("kind", ["batch_topk", "matryoshka"])
def test_what_is_saved_has_the_l0_that_was_asked_for(trainer, kind):
    run = trainer(kind, sae={"k": 2.5}, checkpoints=1)
    run.run()
    for folder in step_dirs(run.run_dir):
        l0 = load_sae(folder).encode_sparse(run.store.x).counts.double().mean().item()
        assert l0 == pytest.approx(2.5, abs=2 / 500)
    assert metrics(run)[-1]["l0"] == 2.5
    # The threshold is of what is saved, not of what is trained.
    assert run.sae.threshold == 0


def test_resampling_looks_at_rows_through_the_threshold_of_that_step(trainer):
    run = trainer(**KINDS["threshold and resample"])
    seen, intervene = [], run.dead.intervene

    def watched(*arguments):
        l0 = run.sae.encode_sparse(run.store.x).counts.double().mean().item()
        seen.append((run.step, round(l0, 3)))
        intervene(*arguments)

    run.dead.intervene = watched
    run.run()
    assert seen == [(5, 0.5), (12, 0.5)]


# -- What is saved -------------------------------------------------------------------------------


class Stop(Exception):
    pass


def stop_at(step: int):
    def sink(row):
        if row["step"] == step:
            raise Stop

    return sink


def steps_of(run_dir: Path) -> list[int]:
    return [int(folder.name[5:]) for folder in step_dirs(run_dir)]


def test_while_it_trains_the_newest_two_are_there(trainer):
    """The one before the newest serves should that be damaged."""
    run = trainer("relu", save_every=0, sinks=(stop_at(15),))
    with pytest.raises(Stop):
        run.run()
    assert steps_of(run.run_dir) == [13, 14]
    again = trainer("relu", save_every=0, initialise=False)
    again.restore(*load_state(step_dirs(run.run_dir)[0]))
    again.run()
    assert steps_of(again.run_dir) == [20]


def test_checkpoints_that_were_asked_for_stay(trainer):
    run = trainer("relu", save_every=0, checkpoints=3, sinks=(stop_at(18),))
    with pytest.raises(Stop):
        run.run()
    assert steps_of(run.run_dir) == [5, 10, 15, 16, 17]
    run = trainer("relu", checkpoints=3)
    run.run()
    assert steps_of(run.run_dir) == [5, 10, 15, 20]


def test_it_is_saved_after_so_many_minutes(trainer, monkeypatch):
    from sae_runner.training import trainer as module

    now = iter(range(0, 10**6, 30))  # Half a minute whenever the clock is looked at.
    monkeypatch.setattr(module.time, "monotonic", lambda: float(next(now)))
    saved = []
    run = trainer("relu", save_every=2.0)
    save = run.save
    monkeypatch.setattr(run, "save", lambda *_, **__: (saved.append(run.step), save())[1])
    run.run()
    # It is looked at once a step, and once more to note the time of a save.
    assert saved == [4, 8, 12, 16, 20]


def test_null_saves_at_the_end_alone(trainer):
    run = trainer("relu", save_every=None, sinks=(stop_at(20),))
    with pytest.raises(Stop):
        run.run()
    assert steps_of(run.run_dir) == []


def test_the_last_checkpoint_may_go_without_its_state(trainer):
    run = trainer("relu", keep_state=False, checkpoints=1)
    run.run()
    first, last = step_dirs(run.run_dir)
    assert (first / "state").is_dir() and not (last / "state").exists()
    facts = read_facts(last)
    assert (facts["step"], facts["n_tokens"]) == (20, 640)
    torch.testing.assert_close(
        load_sae(run.run_dir)(run.store.x).x_hat, run.sae(run.store.x).x_hat, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("step", [7, 20])
def test_a_signal_stops_after_the_step_with_everything_saved(trainer, number, step):
    whole = trainer("topk", "whole")
    whole.run()

    def sink(row):
        if row["step"] == step:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    run = trainer("topk", "stopped", sinks=(sink,))
    with pytest.raises(Interrupted, match=f"{number.name}: stopped at step {step}; type"):
        run.run()
    assert steps_of(run.run_dir) == [step]
    again = trainer("topk", "stopped", initialise=False)
    again.restore(*load_state(step_dirs(run.run_dir)[-1]))
    again.run()
    assert results(again.run_dir) == results(whole.run_dir)
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("save_every", [None, 0])
def test_timings_reach_to_every_step_that_is_gone_on_from(trainer, save_every):
    run = trainer("relu", log_every=8, save_every=save_every)
    step = run.take_step

    def take_step(x):
        if run.step == 10:  # The eleventh step, away from any line of metrics.
            os.kill(os.getpid(), signal.SIGTERM)
        return step(x)

    run.take_step = take_step
    with pytest.raises(Interrupted):
        run.run()
    timings = [json.loads(x) for x in (run.run_dir / "timings.jsonl").read_text().splitlines()]
    expected = [8, 11] if save_every is None else list(range(1, 12))
    assert [row["step"] for row in timings] == expected


def test_statistics_are_taken_before_anything_is_read_ahead(trainer):
    run = trainer("relu")
    stats, asked_at = run.store.stats, []
    run.store.n_read = 0

    def watched(*arguments):
        time.sleep(0.05)  # A reader in the background would have begun.
        asked_at.append(run.store.n_read)
        return stats(*arguments)

    run.store.stats = watched
    run.run()
    assert asked_at == [0] and run.store.n_read > 0


# -- The numbers ---------------------------------------------------------------------------------


class Watched(Trainer):
    """Keeps what a step started from."""

    def take_step(self, x):
        self.before = [*getattr(self, "before", []), (copy.deepcopy(self.sae), x.clone())]
        return super().take_step(x)


@pytest.mark.parametrize("options", [KINDS["relu"], KINDS["topk"], KINDS["micro"]])
def test_metrics_are_what_their_names_say(trainer, options, monkeypatch):
    run = trainer(n_tokens=160, clip_grad_norm=1e-3, **options)
    run.__class__ = Watched
    silent = torch.zeros(32)
    run.run()
    mean = run.store.x.double().mean(0)
    for t, row in enumerate(metrics(run)):
        sae, x = run.before[t]
        with torch.no_grad():
            x_hat, latents = sae(x)
        assert (row["step"], row["n_tokens"]) == (t + 1, 32 * (t + 1))
        fvu = (x - x_hat).double().square().sum() / (x.double() - mean).square().sum()
        assert row["fvu"] == pytest.approx(float(fvu), rel=1e-4)
        acts = latents.dense()
        assert row["l0"] == pytest.approx(float((acts != 0).sum(1).float().mean()), rel=1e-6)
        silent = torch.where((acts != 0).any(0), 0, silent + 32)
        assert row["dead_fraction"] == pytest.approx(float((silent >= 96).float().mean()))
        # The whole batch in one piece, whatever the micro batch.
        state = TrainState(schedules.warmup(t, 0.05 * 5))
        loss = sae.loss(x, state)
        assert row["loss"] == pytest.approx(loss.total.item(), rel=1e-5)
        loss.total.backward()
        sae.before_step()
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in sae.parameters()))
        assert row["grad_norm"] == pytest.approx(norm, rel=1e-4)
        # One step of decay at the end of five; warm-up is over at once.
        assert row["lr"] == pytest.approx(3e-3)


def test_every_log_every_th_step_and_the_last_are_logged(trainer):
    run = trainer("relu", log_every=6)
    run.run()
    assert [row["step"] for row in metrics(run)] == [6, 12, 18, 20]
    timings = (run.run_dir / "timings.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in timings] == [6, 12, 18, 20]


def test_rates_and_penalties_follow_their_schedules(trainer, monkeypatch):
    run, penalties = trainer("relu", lr_warmup=0.2, lr_decay=0.25, penalty_warmup=0.5), []
    loss = run.sae.loss
    monkeypatch.setattr(
        run.sae, "loss", lambda x, state: (penalties.append(state.penalty), loss(x, state))[1]
    )
    run.run()
    rates = [row["lr"] / 3e-3 for row in metrics(run)]
    expected = [0.25, 0.5, 0.75, *[1.0] * 13, 0.8, 0.6, 0.4, 0.2]
    expected[15] = 1.0
    assert rates == pytest.approx(expected)
    assert penalties == pytest.approx([min(1.0, (t + 1) / 10) for t in range(20)])


def test_the_auto_learning_rate_is_that_of_the_width(trainer):
    assert trainer("relu", lr="auto").lr == pytest.approx(2e-4 * (2**14 / 32) ** 0.5)


@pytest.mark.parametrize("bound", [0.05, None])
def test_gradients_are_clipped_to_the_bound_and_logged_before(trainer, bound):
    run = trainer("relu", clip_grad_norm=bound)
    x = run.store.x[:32]
    _, norm, _ = run.take_step(x)
    applied = math.sqrt(sum(float(p.grad.square().sum()) for p in run.sae.parameters()))
    assert float(norm) > 0.05
    assert applied == pytest.approx(bound or float(norm), rel=1e-4)


@pytest.mark.parametrize(
    ("kind", "sae"),
    [
        ("relu", {"loss_reduction": "sum"}), ("relu", {"loss_reduction": "mean", "units": None}),
        ("topk", {"loss_reduction": "sum"}),
        ("topk", {"loss_reduction": "mean"}),
        ("topk", {"loss_reduction": "normalised"}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("micro", [1, 8, 16])
def test_parts_of_a_batch_give_the_gradient_of_the_whole(trainer, kind, sae, micro):
    whole = trainer(kind, "whole", sae=sae, clip_grad_norm=None)
    whole.update.by_rows = False  # Which leaves no gradient to look at.
    parts = trainer(kind, "parts", sae=sae, clip_grad_norm=None, micro_batch_size=micro)
    x = whole.store.x[:32]
    (a, norm_a, _), (b, norm_b, _) = whole.take_step(x), parts.take_step(x)
    for (name, p), q in zip(whole.sae.named_parameters(), parts.sae.parameters(), strict=True):
        scale = float(p.grad.abs().max())
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-6 * scale, msg=name)
    for name in ("total", "parts", "l0", "fired", "fit"):
        torch.testing.assert_close(getattr(b, name), getattr(a, name), rtol=1e-5, atol=1e-6)
    # What a part needed is gone once its numbers are known.
    assert (a.n_rows, b.n_rows) == (32, 32)
    assert (len(a.last.x_hat), len(b.last.x_hat)) == (32, micro)
    assert float(norm_a) == pytest.approx(float(norm_b), rel=1e-5)
    assert torch.equal(whole.dead.rows_since_fired, parts.dead.rows_since_fired)


@pytest.mark.parametrize("kind", ["relu", "topk"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_learns(trainer, kind, precision):
    run = trainer(kind, n_tokens=12_800, precision=precision, log_every=40)
    run.run()
    fvu = [row["fvu"] for row in metrics(run)]
    assert fvu[-1] < min(0.25, 0.5 * fvu[0])
    assert {p.dtype for p in run.sae.parameters()} == {torch.float32}
    assert {v.dtype for s in run.optimizer.state.values() for v in s.values()} == {torch.float32}


# -- Going wrong ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["relu", "topk"])
@pytest.mark.parametrize("log_every", [1, 50])
def test_a_training_that_diverges_is_ended_in_one_line(trainer, kind, log_every):
    run = trainer(kind, lr=1e6, log_every=log_every, checkpoints=3)
    line = r"training diverged at step \d+: .*lower trainer\.lr \(1e\+06\)"
    with pytest.raises(ConfigError, match=line) as error:
        run.run()
    assert "\n" not in str(error.value)
    for folder in step_dirs(run.run_dir):
        assert all(torch.isfinite(t).all() for t in load_sae(folder).state_dict().values())


def test_nothing_that_diverged_is_saved_or_logged(trainer, monkeypatch):
    run = trainer("relu", save_every=0)
    real = run.take_step

    def take_step(x):
        taken = real(x)
        if run.step == 9:
            run.sae.W_dec.data[3, 2] = float("nan")
        return taken

    monkeypatch.setattr(run, "take_step", take_step)
    with pytest.raises(ConfigError, match="diverged at step 10: W_dec is nan"):
        run.run()
    assert steps_of(run.run_dir) == [8, 9] and metrics(run)[-1]["step"] == 9


def test_data_far_from_the_origin_is_no_divergence(trainer, stored):
    """An initial error that is many times the variance, but not many times the activations."""
    store = stored()
    store.x = 0.01 * store.x + 1000
    run = trainer("relu", store=store)
    run.run()
    assert metrics(run)[0]["fvu"] > 1e4


def test_an_error_in_the_data_comes_out_of_the_loop(trainer, stored, monkeypatch):
    store = stored()
    monkeypatch.setattr(
        store, "window", lambda *_: (_ for _ in ()).throw(DataError("example 3 is NaN"))
    )
    with pytest.raises(DataError, match="example 3 is NaN"):
        trainer("relu", store=store).run()


def test_no_more_is_read_than_is_used(trainer, stored):
    """With a stream, what is read ahead keeps the model busy when the evaluation wants it."""
    store = stored(192)  # Three windows, one group, 6 batches.
    run = trainer("relu", store=store, n_tokens=192)
    store.n_read = 0
    run.run()
    assert store.n_read == 3


# -- Options -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_tokens": 10}, r"trainer\.batch_size=32: more than trainer\.n_tokens=10"),
        (
            {"micro_batch_size": 5},
            r"trainer\.micro_batch_size=5: must divide trainer\.batch_size=32",
        ),
        ({"save_every": -1}, r"trainer\.save_every=-1\.?0?: must be >= 0"),
        ({"lr": 0}, r"trainer\.lr=0\.?0?: must be > 0"),
        ({"lr_warmup": 1.5}, r"trainer\.lr_warmup=1\.5: must be <= 1"),
        ({"precision": "fp16"}, r"trainer\.precision=fp16: .*Did you mean 'bf16'"),
        ({"checkpoints": -1}, r"trainer\.checkpoints=-1: must be >= 0"),
    ],
)
def test_options_that_make_no_sense_are_refused_by_name(options, changes, message):
    with pytest.raises(ConfigError, match=message):
        options(**changes)


def test_a_budget_is_whole_batches_and_checkpoints_are_spread_evenly(options):
    assert options(n_tokens=100).n_steps == 3
    assert options(checkpoints=0).checkpoint_steps() == set()
    assert options(checkpoints=3).checkpoint_steps() == {5, 10, 15}
    assert options(n_tokens=64, checkpoints=5).checkpoint_steps() <= {1, 2}


def test_saves_are_quiet(trainer, caplog):
    with caplog.at_level(logging.INFO):
        trainer("relu", save_every=0).run()
    # A slow machine may show progress meanwhile.
    said = [record.getMessage() for record in caplog.records]
    assert [line for line in said if not line.startswith("train ")] == []


@pytest.mark.parametrize("options", [{}, {"ema": 0.9}, {"kind": "batch_topk"}], ids=str)
def test_a_save_copies_the_sae_once(trainer, options, monkeypatch):
    """At 65,536 latents each copy is half a gigabyte."""
    copied, deepcopy = [], copy.deepcopy
    run = trainer(**options)
    run.begin()
    run.take_step(run.store.x[:32])

    def counted(x, memo=None):
        if isinstance(x, SAE):
            copied.append(x)
        return deepcopy(x, memo)

    monkeypatch.setattr(copy, "deepcopy", counted)
    run.save()
    assert copied == [run.sae]


def test_a_step_is_saved_once_and_the_one_before_stays(trainer):
    run = trainer("relu", save_every=0, sinks=(stop_at(15),))
    with pytest.raises(Stop):
        run.run()
    before = steps_of(run.run_dir)
    run.step = before[-1]
    run.save()
    assert steps_of(run.run_dir) == before


def test_what_cannot_be_restored_begins_anew(trainer):
    whole = trainer("topk", "whole", checkpoints=1)
    whole.run()
    state, weights, optimizer = load_state(step_dirs(whole.run_dir)[0])
    del optimizer["dead.rows_since_fired"]
    other = trainer("topk", "other", initialise=False)
    with pytest.raises(StoreError, match=r"lacks .dead\.rows_since_fired"):
        other.restore(state, weights, optimizer)
    assert other.step == 0


def test_going_on_with_another_number_of_threads_is_said(trainer, caplog):
    """The same weights, in sums that are rounded otherwise: nothing else would show it."""
    whole = trainer("topk", "whole", checkpoints=1)
    whole.run()
    state = load_state(step_dirs(whole.run_dir)[0])
    trainer("topk", "same", initialise=False).restore(*copy.deepcopy(state))
    assert not caplog.records
    torch.set_num_threads(2)
    trainer("topk", "other", initialise=False).restore(*state)
    (said,) = caplog.messages
    assert "going on with cpu, 2 threads from a checkpoint made with cpu, 1 thread:" in said
