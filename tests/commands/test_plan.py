import collections
import json
import shutil
import subprocess
import sys

import pytest

from sae_runner import files
from sae_runner.commands.plan import check, main
from sae_runner.errors import ConfigError, StoreError


@pytest.fixture
def plan(compose_job, small, tmp_path, monkeypatch, capsys):
    """`plan("sae.k=8", outputs=…)`: what is printed, as a list of lines for each head."""
    monkeypatch.chdir(tmp_path)

    def plan(*words, outputs="outputs"):
        main(compose_job("plan", *small, f"outputs={outputs}", *words))
        lines = collections.defaultdict(list)
        for line in capsys.readouterr().out.splitlines():
            lines[line[:10].strip() if line[0] != "!" else "!"].append(line[10:].strip())
            if line[0] == "!":
                lines["!"][-1] = line[2:]
        return lines

    return plan


def test_the_numbers_are_those_that_training_then_has(plan, trained, tmp_path):
    """A plan of the run that `trained` made, before anything of it is there."""
    (run,), (store,) = trained.glob("train/[!.]*"), trained.glob("stores/[!.]*")
    lines = plan()
    assert lines["store"] == [f"outputs/stores/{store.name}"]
    assert lines["run"] == [f"outputs/train/{run.name}: to be made"]
    manifest = json.loads((store / "activations-all" / "manifest.json").read_text())
    rows = {split: part["n_rows"] for split, part in manifest["splits"].items()}
    assert f"{rows['train']:,} train + {rows['heldout']:,} held-out rows" in lines["site"][0]
    n_windows = sum(len(part["shards"]) for part in manifest["splits"].values())
    assert f"to be written, {n_windows} windows" in lines[""][0]
    facts = json.loads(next(run.glob("checkpoints/*/cfg.json")).read_text())
    assert f"in {facts['step']:,} steps of 256, 0.76 epochs" in lines["training"][0]
    # W_enc and W_dec, 16 × 128 each, and both biases.
    assert lines["sae"] == ["topk: 16 → 128, 4,240 parameters"]
    assert lines["eval"] == ["sparsity, reconstruction on 300 held-out rows"]
    assert lines["!"] == []
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize(
    ("splices", "said"),
    [
        ((), None), (("clean",), "the model runs once on 300"),
        (("clean", "recon"), "the model runs 2 times on 300"),
        (("recon", "zero", "mean"), "the model runs 4 times on 300"),
    ],
)  # fmt: skip
def test_each_splice_is_another_run_of_the_model(plan, splices, said, monkeypatch):
    monkeypatch.setattr("sae_runner.evaluators.sparsity.Sparsity.splices", splices)
    found = [line for line in plan()[""] if line.startswith("the model runs")]
    assert found == ([f"{said} held-out examples"] if said else [])


def test_bytes_are_about_right(plan, trained, compose_job, small):
    from sae_runner.commands.pipeline import Pipeline
    from sae_runner.commands.plan import Plan
    from sae_runner.commands.rehearsal import rehearsal

    (run,), (store,) = trained.glob("train/[!.]*"), trained.glob("stores/[!.]*")
    job = compose_job("plan", *small)
    pipeline = Pipeline(job.cfg, job.choices)
    with rehearsal(pipeline) as copy:
        found = Plan(pipeline, copy)
        (info,) = found.infos
        assert found.store_bytes(info) == found.bytes_to_write() == 3000 * (16 * 4 + 16)
        # Headers, the manifest and the mean are more in a store as small as this.
        shards = sum(p.stat().st_size for p in store.glob("*/*-*.safetensors"))
        assert found.store_bytes(info) == pytest.approx(shards, rel=0.05)
        tensors = sum(p.stat().st_size for p in run.glob("checkpoints/**/*.safetensors"))
        assert found.checkpoint_bytes() == pytest.approx(tensors, rel=0.1)


def test_what_is_there_is_skipped(plan, trained):
    lines = plan(outputs=trained)
    (selection,) = trained.glob("stores/[!.]*/*-all")
    assert lines[""][0] == (
        f"activations-all: {files.size(files.folder_bytes(selection))} of fp32, "
        "there, caching is skipped"
    )
    assert lines["run"][0].endswith(": complete, training is skipped")
    assert [line.split()[0] for line in lines["memory"]] == ["training"]
    assert "force=true begins again" in plan("force=true", outputs=trained)["run"][0]


def test_what_is_unfinished_goes_on(plan, outputs):
    (run,), (store,) = outputs.glob("train/[!.]*"), outputs.glob("stores/[!.]*")
    (step,) = run.glob("checkpoints/step_*")
    facts = json.loads((step / "cfg.json").read_text())
    (step / "cfg.json").write_text(json.dumps({**facts, "step": 5}))
    (store / "activations-all" / "manifest.json").unlink()
    (store / "activations-all" / "train-00002.safetensors").unlink()
    lines = plan(outputs=outputs)
    assert "to be finished, 3 of 4 windows are there" in lines[""][0]
    assert lines["run"][0].endswith(": unfinished: step 5 of 8; it goes on")


@pytest.mark.parametrize("probe", [False, True])
def test_nothing_at_all_is_written(plan, outputs, tmp_path, snapshot, monkeypatch, probe):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    before = snapshot(outputs)
    for words in ([], ["dataset.seed=1"], ["store=stream"]):
        plan(f"plan.probe={probe}", *words, outputs=outputs)
    plan(f"plan.probe={probe}", outputs=tmp_path / "absent" / "outputs")
    assert snapshot(outputs) == before
    assert not (tmp_path / "absent").exists()
    assert list(temporary.iterdir()) == []
    assert {p.name for p in tmp_path.iterdir()} == {"outputs", "temporary"}


def test_the_probe_measures_both_parts_or_what_is_left_of_them(plan, trained):
    lines = plan("plan.probe=true", "dataset.seed=1", "model.batch_size=100")
    caching, training = lines["time"]
    assert (
        caching.startswith("caching about ")
        and "for 3,000 examples (batches measured: 8; " in caching
    )
    assert (
        training.startswith("training about ") and "for 8 steps (steps measured: 20; " in training
    )
    assert "noise" not in training
    (training,) = plan("plan.probe=true", outputs=trained)["time"]
    assert training.startswith("training about ")
    assert plan()["time"] == ["not measured; plan.probe=true times a few batches and steps"]


def test_warnings_are_those_of_training(plan):
    lines = plan("trainer.n_tokens=120000", "trainer.dead_window=10_000_000")
    assert lines["!"] == [
        "store has fewer rows than trainer.n_tokens: 44.4 epochs of 2,700 rows, reshuffled",
        "dead horizon 10,000,000 tokens > 120,000 training tokens: AuxK will never fire "
        "(trainer.dead_window)",
    ]


def test_a_full_disk_is_foreseen(plan, monkeypatch):
    monkeypatch.setattr(files, "free_bytes", lambda path: 73_000)
    # 3,000 rows of 16 numbers and 16 bytes of ids.
    (line,) = plan()["!"]
    assert line.startswith("store needs 240 kB and 64.0 MB in reserve, 73 kB free in ")
    monkeypatch.setattr(files, "free_bytes", lambda path: files.RESERVE + 260_000)
    (line,) = plan("trainer.checkpoints=1")["!"]
    # And two checkpoints, each 4,240 parameters of 4 bytes four times.
    needed = files.size(240_000 + 8 * 4 * 4240)
    assert line.startswith(f"store and checkpoints need {needed} and 64.0 MB in reserve, ")


def test_too_little_memory_is_foreseen(plan, monkeypatch):
    monkeypatch.setattr("sae_runner.commands.memory.free_memory", lambda: 1000)
    caching, training = plan()["!"]
    assert caching.startswith("caching needs about ") and caching.endswith(" GB free")
    assert training.startswith("training needs about ")


def test_several_sites_are_cached_and_one_is_needed_to_train(compose_job, tmp_path, capsys):
    words = ["model=tiny_clip", "site.name=blocks.*.resid_post", f"outputs={tmp_path}/o"]
    job = compose_job("plan", *words)
    main(job)
    out = capsys.readouterr().out
    assert out.count(": 17 × 128, class + 4 × 4 patches; all tokens, 24,446 train + 6,103") == 4
    assert out.count("of fp32, to be written, 2 windows") == 4
    assert "none: 4 sites, and an SAE takes one: -m site.name=blocks.0.resid_post,…" in out
    assert "training" not in out and "to be trained here first" in out
    check(job)
    with pytest.raises(ConfigError, match=r"trainer\.n_tokens=-1: must be > 0"):
        check(compose_job("plan", *words, "trainer.n_tokens=-1"))


def test_a_stream_writes_no_store_and_runs_the_model_every_epoch(plan):
    lines = plan("store=stream", "plan.probe=true")
    assert lines["store"] == ["none (store=stream): the model runs again every epoch"]
    assert "and in every epoch as long as caching: the rows are not kept" in lines[""]


def test_what_train_would_refuse_is_refused(plan, tmp_path):
    with pytest.raises(ConfigError, match=r"sae\.k=-3: must be > 0"):
        plan("sae.k=-3")
    with pytest.raises(ConfigError, match=r"plan\.probe=perhaps"):
        plan("plan.probe=perhaps")
    with pytest.raises(StoreError, match="init_from=nowhere"):
        plan("init_from=nowhere")
    with pytest.raises(ConfigError, match=r"site\.name=activation: no such site"):
        plan("site.name=activation")


def test_a_sweep_is_planned_here_one_by_one(in_process, small, tmp_path, capsys):
    words = [word for word in small if "=" in word]
    assert in_process("plan", "-m", *words, "sae.k=4,8", "sae=topk,relu") == 2
    assert "k" in capsys.readouterr().err  # relu has none: refused before anything is said.
    assert in_process("plan", "-m", *words, "sae.k=4,8", "hydra/launcher=basic") == 0
    out = capsys.readouterr().out
    assert out.count("\n# ") + out.startswith("# ") == 2
    assert "sae.k=4" in out and "sae.k=8" in out
    runs = {line.split()[1] for line in out.splitlines() if line.startswith("run ")}
    assert len(runs) == 2
    assert list(tmp_path.iterdir()) == []


def test_help_cfg_and_typos_on_the_command_line(in_process, tmp_path, capsys):
    assert in_process("plan", "--help") == 0
    out = capsys.readouterr().out
    assert "sae-run plan [group=option]" in out and "probe: false" in out and "n_tokens" in out
    assert in_process("plan", "--cfg", "job", "model=toy") == 0
    assert "plan:\n  probe: false" in capsys.readouterr().out
    assert in_process("plan", "model=toy", "trainer.n_token=3") == 2
    assert "Did you mean 'n_tokens'" in capsys.readouterr().err
    assert in_process("plan", "model=toi") == 2
    assert "Did you mean 'toy'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_leaves_is_no_error(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "sae_runner", "plan", "model=toy", "dataset.n_examples=3000"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    process.stdout.close()
    assert process.wait(60) == 1
    with process.stderr as stderr:
        # A slow machine may have said by then what it is at.
        assert [line for line in stderr if " INFO " not in line] == []


def test_plan_takes_every_key_of_train(compose_job):
    ours, theirs = compose_job("plan"), compose_job("train")
    assert {k: v for k, v in ours.cfg.items() if k != "plan"} == theirs.cfg
    same = {k: v for k, v in theirs.choices.items() if not k.startswith("hydra")}
    assert {k: v for k, v in ours.choices.items() if not k.startswith("hydra")} == same


def test_moved_outputs_are_found_again(plan, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "moved")
    assert plan(outputs="moved")["run"][0].endswith("training is skipped")
