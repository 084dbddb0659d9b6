import json

import pytest

from sae_runner.commands.inventory import relations, take_inventory, users_of

SHA = "a" * 64


def by_name(inventory):
    return {entry.name: entry for entry in inventory}


@pytest.fixture
def crowded(write, tmp_path):
    """Two models, packed text, a store of each model, and runs in every state."""
    write("models/tiny_lm-11111111/training.json", {"heldout_loss": 3.25})
    write("models/tiny_lm-11111111/model.safetensors", "weights")
    write("models/tiny_clip-22222222/model.json", {
        "type": "tiny_clip", "sha256": SHA, "zero_shot": {"accuracy": 0.9142},
    })  # fmt: skip
    write("models/tiny_clip-22222222/model.safetensors", "weights")
    write("data/stdlib-33333333/manifest.json", {
        "sha256": "b" * 64, "n_rows": {"train": 1200, "heldout": 34}, "framing": {"context": 64},
    })  # fmt: skip
    store = {"sites": {}, "dataset": {"name": "stdlib", "fingerprint": "b" * 64}}
    lm = {"name": "tiny_lm", "weights": "tiny_lm-11111111"}
    write("stores/lm/store.json", {**store, "model": lm})
    write("stores/lm/embed-all/manifest.json", {
        "d": 8, "dtype": "fp16",
        "splits": {"train": {"n_rows": 5000, "shards": []}, "heldout": {"n_rows": 7, "shards": []}},
    })  # fmt: skip
    write("stores/lm/embed-last/train-00000.safetensors", "x" * 100)
    write("stores/clip/store.json", {**store, "model": {"sha256": SHA}, "dataset": {}})
    write("stores/broken/store.json", "{")

    def run(name, *, step=None, report=None, **config):
        trainer = {"n_tokens": 1000, "batch_size": 10}
        write(f"train/{name}/config.yaml", {"trainer": trainer, "sae": {"type": "topk"}, **config})
        if step is not None:
            facts = {
                "step": step, "d_in": 8, "sae": {"d_sae": 32}, "model": lm,
                "store": str(tmp_path / "elsewhere" / "lm" / "embed-all"),
            }  # fmt: skip
            write(f"train/{name}/checkpoints/step_{step:08d}/cfg.json", facts)
        if report:
            write(f"train/{name}/report.json", report)

    metrics = {"a": {"metrics": {"sparsity": {"l0": 12.345678}, "reconstruction": {"fvu": 0.25}}}}
    run("done", step=100, report={"evaluators": metrics})
    run("stopped", step=60)
    run("measuring", step=100)
    run("begun")
    run("tuned", init_from=str(tmp_path / "outputs" / "train" / "done"))
    write("train/torn/config.yaml", "{")
    write("train/torn/run.log")
    write("train/notes.txt")
    write("models/.tiny_lm-44444444.999.partial/model.safetensors", "half")
    return tmp_path / "outputs"


def test_states_are_told_apart(crowded):
    states = {name: entry.state for name, entry in by_name(take_inventory(crowded)).items()}
    assert states == {
        "lm": "1 of 2 selections unfinished",
        "lm/embed-all": "complete",
        "lm/embed-last": "unfinished: 1 windows written",
        "clip": "complete",
        "broken": "damaged",
        "done": "complete",
        "stopped": "unfinished: step 60 of 100",
        "measuring": "unfinished: no report",
        "begun": "unfinished: no checkpoint",
        "tuned": "unfinished: no checkpoint",
        "torn": "damaged: config.yaml",
        "tiny_lm-11111111": "complete",
        "tiny_clip-22222222": "complete",
        "stdlib-33333333": "complete",
        ".tiny_lm-44444444.999.partial": "left by a process that was killed",
    }


def test_what_is_in_them_is_said(crowded):
    entries = by_name(take_inventory(crowded))
    assert entries["lm/embed-all"].holds == "5,000 + 7 rows of 8 fp16"
    assert entries["done"].holds == "topk 8 → 32, L0 12.35, FVU 0.25"
    assert entries["tiny_clip-22222222"].holds == "tiny_clip, zero-shot accuracy 0.914"
    assert entries["tiny_lm-11111111"].holds == "tiny_lm, held-out loss 3.250"
    assert entries["stdlib-33333333"].holds == "1,200 + 34 rows of 64 tokens"
    assert entries["lm/embed-last"].n_bytes == 100
    assert entries["lm"].n_bytes == sum(
        p.stat().st_size for p in (crowded / "stores" / "lm").rglob("*") if p.is_file()
    )


def test_who_needs_whom(crowded):
    inventory = take_inventory(crowded)
    users = {e.name: {u.name for u in users_of(e, inventory)} for e in inventory}
    # By name: models, and stores although outputs was moved. By hash: weights, packed text.
    runs = {"done", "stopped", "measuring"}
    assert users["tiny_lm-11111111"] == {"lm"} | runs
    assert users["tiny_clip-22222222"] == {"clip"}
    assert users["stdlib-33333333"] == {"lm"}
    assert users["lm"] == users["lm/embed-all"] == runs
    assert users["lm/embed-last"] == set()
    assert users["done"] == {"tuned"}
    needs, _ = relations(inventory)
    assert [e.name for e in needs[crowded / "train" / "done"]] == [
        "lm/embed-all", "tiny_lm-11111111",
    ]  # fmt: skip


def test_a_word_that_names_a_run_makes_nothing_need_it(write, tmp_path):
    """`run_name=toy`: stores say `toy` of their model."""
    write("stores/s/store.json", {"model": {"name": "toy", "type": "toy"}, "dataset": {}})
    write("train/toy/config.yaml", {})
    inventory = take_inventory(tmp_path / "outputs")
    assert not users_of(by_name(inventory)["toy"], inventory)


def test_a_run_without_a_checkpoint_needs_the_store_that_it_would_train_on(outputs):
    (run,), (store,) = outputs.glob("train/[!.]*"), outputs.glob("stores/[!.]*")
    for folder in run.glob("checkpoints/*"):
        for path in [*folder.glob("state/*"), *folder.glob("*.*")]:
            path.unlink()
        (folder / "state").rmdir()
        folder.rmdir()
    inventory = take_inventory(outputs)
    entry = by_name(inventory)[run.name]
    assert entry.state == "unfinished: no checkpoint"
    needs, users = relations(inventory)
    assert [e.name for e in needs[run]] == [f"{store.name}/activations-all"]
    assert users[store] == users[store / "activations-all"] == [entry]


def test_what_training_wrote_is_understood(trained):
    """The files that the other commands write, not ones made up here."""
    (run,), (store,) = trained.glob("train/[!.]*"), trained.glob("stores/[!.]*")
    entries = by_name(take_inventory(trained))
    assert {name: entry.state for name, entry in entries.items()} == dict.fromkeys(
        [store.name, f"{store.name}/activations-all", run.name], "complete"
    )
    assert entries[f"{store.name}/activations-all"].holds == "2,700 + 300 rows of 16 fp32"
    metrics = json.loads((run / "report.json").read_text())["evaluators"]
    l0 = metrics["sparsity"]["metrics"]["sparsity"]["l0"]
    fvu = metrics["reconstruction"]["metrics"]["reconstruction"]["fvu"]
    assert entries[run.name].holds == f"topk 16 → 128, L0 {l0:.4g}, FVU {fvu:.4g}"
    assert entries[run.name].n_bytes == sum(p.stat().st_size for p in run.rglob("*") if p.is_file())


def test_lost_shards_and_checkpoints_are_damage(outputs):
    (run,), (store,) = outputs.glob("train/[!.]*"), outputs.glob("stores/[!.]*")
    next(store.glob("*/train-*.safetensors")).unlink()
    next(run.glob("checkpoints/*/cfg.json")).unlink()
    entries = by_name(take_inventory(outputs))
    assert entries[f"{store.name}/activations-all"].state == "damaged: 1 of 4 shards are gone"
    assert entries[run.name].state == "damaged: step_00000008"


def test_an_absent_folder_holds_nothing(tmp_path):
    assert take_inventory(tmp_path / "outputs") == []
