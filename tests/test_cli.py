"""The command line: help without torch, completion, sweeps, and every bad input's one line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

QUICK = ["model=toy", "dataset.n_examples=3000", "sae.expansion=2", "sae.k=8",
         "trainer.n_tokens=4096", "trainer.batch_size=512", "evaluators.sparsity.n_bootstrap=50",
         "evaluators.reconstruction.n_bootstrap=50"]  # fmt: skip


def one_line(err: str) -> str:
    """The last line on standard error, which must be the only one that is no log line."""
    lines = [line for line in err.splitlines() if line.strip()]
    assert lines, "nothing was said"
    assert "Traceback" not in err
    return lines[-1]


# ruff: noqa: E501
# Words and what the line must say: the key, the value, the nearest right one.
BAD = {
    "unknown command": (["trian"], "no command 'trian'. Did you mean 'train'?"),
    "unknown option": (["train", "sae=topkk"], "no option 'topkk' in group 'sae'. Did you mean 'topk'?"),
    "unknown key": (["train", "sae.kk=3"], "no key 'sae.kk'. Did you mean 'k'?"),
    "unknown key with +": (["train", "+sae.kk=3"], "no key 'sae.kk'. Did you mean 'k'?"),
    "key without its group": (["train", "k=3"], "no key 'k'. Did you mean 'sae.k' or 'site.k'?"),
    "key of several groups": (
        ["train", "batch_size=3"], "no key 'batch_size'. Did you mean 'eval.batch_size' or 'model.batch_size' or 'trainer.batch_size'?"),
    "key in another group": (["train", "sae.lr=1"], "no key 'sae.lr'. Did you mean 'trainer.lr'?"),
    "unknown group": (["train", "seas=topk"], "seas"),
    "unknown evaluator": (["train", "evaluators=[sparsty]"], "Did you mean 'sparsity'?"),
    "new evaluator by a key": (
        ["train", "+evaluators.geometri.seed=0"], "'evaluators.geometri.type' needs a value. Did you mean 'geometry'?"),
    "key of an evaluator": (["train", "evaluators.sparsity.active_epss=1"], "active_eps"),
    "missing value": (["train", "~sae.k"], "'sae.k' needs a value"),
    "text for a number": (["train", "sae.k=abc"], "sae.k=abc: Value 'abc' of type 'str'"),
    "fraction for a count": (["train", "sae.k=2.5"], "sae.k=2.5"),
    "k of zero": (["train", "sae.k=0"], "sae.k=0: must be > 0"),
    "negative k": (["train", "sae.k=-3"], "sae.k=-3: must be > 0"),
    "k above d_sae": (["train", "sae.d_sae=16", "sae.k=17"], "sae.k=17: must be <= d_sae=16"),
    "negative learning rate": (["train", "trainer.lr=-1"], "trainer.lr=-1.0: must be > 0"),
    "text for lr": (["train", "trainer.lr=fast"], "trainer.lr=fast"),
    "batch of zero": (["train", "trainer.batch_size=0"], "trainer.batch_size=0: must be > 0"),
    "batch above budget": (
        ["train", "trainer.n_tokens=100"], "trainer.batch_size=512: more than trainer.n_tokens=100"),
    "micro batch": (["train", "trainer.micro_batch_size=100"], "must divide trainer.batch_size=512"),
    "one bad value of a sweep": (["train", "-m", "sae.k=4,8,0"], "sae.k=0: must be > 0"),
    "one bad option of a sweep": (["train", "-m", "sae=topk,rleu"], "Did you mean 'relu'?"),
    "both widths": (["train", "sae.d_sae=64", "sae.expansion=2"], "both given"),
    "neither width": (["train", "sae.expansion=null"], "neither given"),
    "unknown site": (["train", "site.name=activation"], "Did you mean 'activations'?"),
    "no class token": (["train", "site.tokens=cls"], "site.tokens=cls: activations has no class token"),
    "unknown tokens": (["train", "site.tokens=clss"], "site.tokens=clss"),
    "several sites": (["train", "site.name=[]"], "site.name"),
    "unknown device": (["train", "device=cdua"], "device=cdua: no such device. Did you mean 'cuda'?"),
    "held-out of one": (["train", "dataset.heldout=1.5"], "dataset.heldout=1.5"),
    "unknown dtype": (["train", "store.dtype=fp8"], "store.dtype=fp8"),
    "outliers of a stream": (["train", "store=stream", "store.max_norm_multiple=3"], "store=disk"),
    "absent start": (["train", "init_from=absent"], "init_from=absent: there is no such folder"),
    "unknown key at the top": (["train", "+sed=3"], "no key 'sed'. Did you mean 'seed'?"),
    "k under two names": (
        ["train", "sae.k=8", "sae.target_l0=16"], "sae.k=8 and sae.target_l0=16: two names of one"),
    "text for a seed": (["train", "seed=x"], "seed=x: Value 'x' of type 'str'"),
    "negative seed": (["train", "seed=-1"], "seed=-1: must be >= 0"),
    "fraction for a seed": (["train", "seed=1.5"], "seed=1.5"),
    "seed of a sweep": (["train", "-m", "seed=0,x"], "seed=x"),
    "text for force": (["train", "force=perhaps"], "force=perhaps"),
    "run name that climbs": (["train", "run_name=..", "force=true"], "run_name=..: at most 200 letters"),
    "one name for two runs": (
        ["train", "-m", "run_name=a", "sae.k=4,8"], "run_name=a: jobs of different configurations would share it"),
    "run name with a folder": (["train", "run_name=a/b"], "run_name=a/b: at most 200 letters"),
    "no site": (["train", "site.name=null"], "site.name=null: needs a value"),
    "no device": (["train", "device=null"], "device=null: needs a value"),
    "no k": (["train", "sae.k=null"], "sae.k=null: needs a value"),
    "no outputs": (["train", "outputs=null"], "outputs=null: needs a value"),
    "empty outputs": (["train", "outputs="], "outputs=: needs a value"),
    "empty outputs of ls": (["ls", "outputs="], "outputs=: needs a value"),
    "empty outputs of report": (["report", "outputs="], "report: outputs=: needs a value"),
    "absent outputs": (["ls", "outputs=absent"], "outputs=absent: there is no such folder"),
    "no evaluation": (["train", "eval=null"], "eval=null: needs one of full, smoke, standard"),
    "no option": (["train", "sae=null"], "sae=null: needs one of "),
    "no option in a sweep": (["train", "-m", "trainer=default,null"], "trainer=null: needs one of default, "),
    "number for published numbers": (
        ["train", "experiment=toy_recovery", "expected=5"], "expected=5: "),
    "word for a list": (["ls", "runs=x"], "runs=x: needs a list, as in runs=[x]"),
    "number for a list": (["train", "site.positions=3"], "site.positions=3: needs a list, as in site.positions=[3]"),
    "unknown flag": (["train", "--multi-run"], "no flag '--multi-run'. Did you mean '--multirun'?"),
    "flag without its value": (["train", "--cfg"], "argument --cfg/-c: expected one argument"),
    "+ before a key that is there": (["train", "+sae.k=8"], "no new key 'sae.k': there is one already"),
    "key of a run's record": (["train", "+choices=1"], "Choose from: dataset, device, eval, evaluators, "
                              "expected, force, init_from, logger, model, outputs, run_name, "),
    "sweep of one bad value": (["train", "-m", "sae.k="], "sae.k=: Value ''"),
    "momentum of one": (["train", "trainer.beta1=1"], "trainer.beta1=1.0: must be < 1"),
    "beta2 of one in a sweep": (["train", "-m", "trainer.beta2=0.9,1"], "trainer.beta2=1.0: must be < 1"),
    "eps of zero": (["train", "trainer.eps=0"], "trainer.eps=0.0: must be > 0"),
    "more than all steps": (["train", "trainer.lr_warmup=0.5", "trainer.lr_decay=0.6"],
                            "trainer.lr_decay=0.6: with trainer.lr_warmup=0.5 more than all steps"),
    "negative workers": (["train", "dataset.workers=-1"], "dataset.workers=-1: must be >= 0"),
    "unreadable share": (["train", "dataset.max_bad=5"], "dataset.max_bad=5"),
    "type of nothing": (["train", "sae.type=foo"], "sae.type=foo: no such type"),
    "no checkpoint": (["eval"], "'checkpoint' needs a value"),
    "absent checkpoint": (["eval", "checkpoint=absent"], "checkpoint=absent: there is no such folder"),
    "model for a run": (["eval", "checkpoint=absent", "model=toy"], "checkpoint=absent: there is no such folder"),
    "no format": (["export", "checkpoint=absent"], "'format' needs a value. Choose from: dictionary_learning, saelens, sparsify."),
    "unknown format": (["export", "checkpoint=absent", "format=sae_lens"], "format=sae_lens: no such format. Did you mean 'saelens'?"),
    "nothing to export": (["export", "format=saelens"], "'checkpoint' needs a value"),
    "absent checkpoint of export": (
        ["export", "checkpoint=absent", "format=saelens"], "checkpoint=absent: there is no such folder"),
    "place on the hub": (["export", "checkpoint=x", "format=saelens", "push_to=me/it"], "push_to=me/it: expected hf:org/repo"),
    "checkpoint on the hub": (["eval", "checkpoint=hf:me"], "checkpoint=hf:me: expected hf:org/repo/path"),
    "start on the hub": (["train", "init_from=hf:me"], "init_from=hf:me: expected hf:org/repo/path"),
    "key of export": (["export", "formt=saelens"], "no key 'formt'. Did you mean 'format'?"),
    "unknown objective": (["train", "trainer/objective=e2ee"], "no option 'e2ee' in group 'trainer/objective'. Did you mean 'e2e'?"),
    "objective as a word": (
        ["train", "trainer.objective=e2e"], "trainer.objective=e2e: choose with trainer/objective=NAME. Did you mean 'e2e'?"),
    "type of no objective": (["train", "trainer.objective.type=e2"], "trainer.objective.type=e2: no such type. Did you mean 'e2e'?"),
    "key of an objective": (
        ["train", "trainer/objective=e2e", "+trainer.objective.kl=1"], "no key 'trainer.objective.kl'. Choose from: downstream_coefficient, "),
    "key of another objective": (
        ["train", "trainer.objective.kl_coefficient=1"], "no key 'trainer.objective.kl_coefficient'."),
    "negative KL": (
        ["train", "trainer/objective=e2e", "trainer.objective.kl_coefficient=-1"], "trainer.objective.kl_coefficient=-1.0: must be >= 0"),
    "KL without logits": (
        ["train", "trainer/objective=e2e"], "trainer.objective.kl_coefficient=1: not applicable: this model gives no logits"),
    "no term": (
        ["train", "trainer/objective=e2e", "trainer.objective.kl_coefficient=0"], "kl_coefficient=0: nothing is left to minimise"),
    "nothing later": (
        ["train", "trainer/objective=e2e_ds", "trainer.objective.kl_coefficient=0"], "no block comes after activations"),
    "stream end to end": (["train", "trainer/objective=e2e", "store=stream"], "store=stream: trainer/objective=e2e reads statistics"),
    "outliers end to end": (
        ["train", "trainer/objective=e2e", "store.max_norm_multiple=3"], "store.max_norm_multiple=3: trainer/objective=e2e replaces every"),
    "batch below an example": (
        ["train", "model=tiny_lm", "trainer/objective=e2e", "trainer.batch_size=100"], "one gives up to 128 rows; set it to 128 or more"),
    "end to end without a head": (
        ["train", "model=minilm", "dataset=stdlib_text", "trainer/objective=e2e", "trainer.batch_size=512"], "gives no logits of trained weights"),
    "no key": (["train", "=3"], "'=3': no key before the ="),
    "seed beyond 64 bits": (["train", "seed=99999999999999999999"], "seed=1e+20: must be < 2^63"),
    "budget beyond 64 bits": (["train", "trainer.n_tokens=1e30"], "trainer.n_tokens=1e+30: must be < 2^63"),
    "width beyond indices": (["train", "sae.d_sae=1000000000000"], "sae.d_sae=1e+12: more than 2,147,483,647 latents"),
    "expansion beyond indices": (["train", "sae.expansion=1e30"], "sae.expansion=1e+30: more than 2,147,483,647 latents"),
    "a word of 5,000 digits": (["train", "sae.k=" + 5000 * "9"], "5,006 characters are no override"),
    "long name of a run": (["train", "run_name=" + 300 * "x"], "at most 200 letters"),
    "long name of a folder": (["train", "outputs=" + 400 * "y"], "File name too long"),
    "rows for a model of images": (["train", "model=tiny_clip", "dataset=toy"], "model=tiny_clip: reads image, and dataset=toy holds rows"),
    "text for a model of images": (
        ["train", "model=clip_vit_b32", "model.weights=random", "dataset=stdlib_text"], "reads image, and dataset=stdlib_text holds text"),
    "images for a model of text": (["train", "model=tiny_lm", "dataset=digits"], "reads text, and dataset=digits holds image"),
    "one example": (["train", "dataset.n_examples=1"], "dataset of 1 examples cannot be split"),
    "checkpoints beyond the disk": (["train", "sae.d_sae=2000000000"], "store and checkpoints need 4.1 TB"),
    "batch beyond memory": (
        ["train", "trainer.batch_size=10000000000", "trainer.n_tokens=100000000000"], "lower trainer.micro_batch_size"),
    "weights beyond memory in a sweep": (
        ["train", "-m", "sae.expansion=2,10000000"], "lower sae.expansion"),
    "examples beyond memory": (
        ["train", "dataset.n_examples=1000000000000"], "dataset.n_examples=1000000000000: takes 48,000 GB of memory"),
    "near a word of its values": (["train", "trainer.lr=autoo"], "trainer.lr=autoo: Value 'autoo' of type 'str' could not be "
                                  "converted to Float. Did you mean 'auto'?"),
    "unknown launcher": (["train", "-m", "hydra/launcher=togethr"], "no option 'togethr' in group 'hydra/launcher'. Did you mean 'together'?"),
    "group of another command": (["ls", "model=toy"], "no key 'model' here. ls takes outputs, runs."),
    "run that is not there": (["report", "nope"], "runs=nope: no run directory there."),
    "letters that no key has": (["train", "sae.ü=3"], "sae.ü=3: cannot be read; a value with special characters needs quotes"),
    "word that is no override": (["train", "nothing"], "'nothing': expected key=value or group=option"),
    "+ before a group that is there": (["train", "+experiment=toy_recovery"], "no new key 'experiment': there is one already"),
    "unknown config": (["train", "--config-name", "trian"], "no config 'trian'. Did you mean 'train'?"),
    "open quote": (["train", "init_from='x"], "init_from='x: cannot be read"),
    "data of another alphabet": (
        ["train", "model=tiny_lm", "dataset=sst2", "dataset.path=./Bücher/x.tsv"], "dataset.path=./Bücher/x.tsv: "),
    "absent data": (
        ["train", "model=tiny_clip", "dataset=cifar10", "dataset.path=./absent.parquet"], "dataset.path"),
    "absent text": (["train", "model=tiny_lm", "dataset=sst2", "dataset.path=./absent.tsv"], "dataset.path"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_makes_nothing(name, in_process, capfd, tmp_path):
    words, message = BAD[name]
    quick = [] if words[0] != "train" else QUICK
    quick = [w for w in quick if w.split("=")[0] not in {x.split("=")[0] for x in words}]
    if any(w.startswith("sae.d_sae") for w in words) and "both" not in name:
        quick = [w for w in quick if not w.startswith("sae.expansion")]
    assert in_process(words[0], *quick, *words[1:]) == 2
    said = capfd.readouterr()
    line = one_line(said.err)
    assert line.startswith("sae-run")
    assert message in line
    assert said.out == "" and "usage" not in said.err
    assert list(tmp_path.iterdir()) == []


def test_figures_that_a_stop_left_out_are_drawn(in_process, tmp_path):
    import shutil

    assert in_process("train", *QUICK) == 0
    (figures,) = tmp_path.glob("outputs/train/*/figures")
    names = {path.name for path in figures.iterdir()}
    assert {"loss.png", "loss.svg", "density.png"} <= names
    shutil.rmtree(figures)
    assert in_process("train", *QUICK) == 0
    assert {path.name for path in figures.iterdir()} == names


def test_no_sae_at_all(in_process, capfd, tmp_path):
    assert in_process("train", "model=toy", "~sae") == 2
    assert "sae=null: needs one of archetypal" in one_line(capfd.readouterr().err)
    assert list(tmp_path.iterdir()) == []


def test_unknown_site_of_a_vision_model_names_the_nearest(in_process, capfd, tmp_path):
    assert in_process("train", "site.name=blocks.99.resid_post") == 2
    line = one_line(capfd.readouterr().err)
    assert "site.name=blocks.99.resid_post: no such site" in line
    assert "blocks.3.resid_post" in line or "blocks.0.resid_post" in line
    assert list(tmp_path.iterdir()) == []


def test_site_unlike_any_other_shows_the_families_of_sites(in_process, capfd):
    assert in_process("train", "site.name=foo") == 2
    line = one_line(capfd.readouterr().err)
    assert " | blocks.{i}.resid_post" in line and "blocks.{i}.attn_q.{i}" in line


def test_unwritable_outputs(in_process, capfd, tmp_path):
    (tmp_path / "file").write_text("no folder")
    assert in_process("train", *QUICK, "outputs=file/out") == 2
    assert "outputs=file/out: cannot write" in one_line(capfd.readouterr().err)


def test_too_little_disk_is_seen_ahead(in_process, capfd, tmp_path, monkeypatch):
    monkeypatch.setattr("sae_runner.files.free_bytes", lambda _: 10_000)
    assert in_process("train", *QUICK) == 2
    line = one_line(capfd.readouterr().err)
    assert "store needs" in line
    assert "and 64.0 MB in reserve, 10 kB free in" in line
    assert list(tmp_path.iterdir()) == []


def test_nan_in_activations_names_the_example(in_process, capfd, tmp_path, monkeypatch):
    from sae_runner.models.toy import ToyHost as Toy

    whole = Toy.record

    def record(self, inputs, sites):
        found = whole(self, inputs, sites)
        for x in found.values():
            x[inputs.ids == 7] = float("nan")
        return found

    monkeypatch.setattr(Toy, "record", record)
    assert in_process("train", *QUICK) == 2
    assert "example 7 is NaN or infinite" in one_line(capfd.readouterr().err)
    assert not list(tmp_path.glob("outputs/stores/*/*/manifest.json"))


@pytest.fixture
def finished_run(in_process, tmp_path) -> Path:
    assert in_process("train", *QUICK) == 0
    return next(tmp_path.glob("outputs/train/[!.]*"))


def test_a_name_that_another_run_has_is_refused_until_forced(in_process, capfd):
    assert in_process("train", *QUICK, "run_name=mine") == 0
    capfd.readouterr()
    assert in_process("train", *QUICK, "run_name=mine", "seed=1") == 2
    line = one_line(capfd.readouterr().err)
    assert "run_name=mine: there is a run of another configuration; give another name, or" in line
    assert in_process("train", *QUICK, "run_name=mine", "seed=1", "force=true") == 0


def test_no_row_left_is_one_line_and_leaves_no_run(in_process, capfd, tmp_path):
    assert in_process("train", *QUICK, "store.max_norm_multiple=0.001") == 2
    line = one_line(capfd.readouterr().err)
    assert "store.max_norm_multiple=0.001: drops all 2,700 training rows" in line
    assert list(tmp_path.glob("outputs/train/*")) == []
    assert not list(tmp_path.glob("outputs/train/.*"))


@pytest.mark.parametrize("name", ["*/manifest.json", "store.json"])
@pytest.mark.parametrize("damage", ["garbage", '{"schema": "other/1"}', None])
def test_damaged_store_is_not_called_complete(
    name, damage, finished_run, in_process, capfd, tmp_path
):
    path = next(tmp_path.glob(f"outputs/stores/*/{name}"))
    path.unlink()
    if damage:
        path.write_text(damage)
    model = ["model=toy", "dataset.n_examples=3000"]
    for words in (["cache", *model], ["train", *QUICK], ["plan", *QUICK]):
        if not damage and path.name == "manifest.json":
            continue  # An unfinished store.
        capfd.readouterr()
        assert in_process(*words) == 2
        line = one_line(capfd.readouterr().err)
        assert path.name in line and "`sae-run cache` with the same words for model, " in line
    assert in_process("cache", *model, "force=true") == 0
    assert in_process("train", *QUICK) == 0


def test_corrupt_and_foreign_stores(finished_run, in_process, capfd, tmp_path):
    shard = next(tmp_path.glob("outputs/stores/*/*/train-00000.safetensors"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    assert in_process("train", *QUICK, "seed=1") == 2
    assert "cut short" in one_line(capfd.readouterr().err)
    shard.write_bytes(whole)
    manifest = shard.parent / "manifest.json"
    manifest.write_text(json.dumps({"schema": "other/1"}))
    assert in_process("train", *QUICK, "seed=1") == 2
    assert "schema 'other/1'" in one_line(capfd.readouterr().err)


def test_checkpoint_of_another_width(finished_run, in_process, capfd):
    assert in_process("train", *QUICK, "dataset.d=32", f"init_from={finished_run}") == 2
    assert "its d_in is 64, this run's is 32" in one_line(capfd.readouterr().err)


def test_weights_for_normalised_rows_are_no_start_for_others(finished_run, in_process, capfd):
    start = ["sae.input_scaling=layer_norm", f"init_from={finished_run}"]
    assert in_process("train", *QUICK, *start) == 2
    said = "its input_scaling is sqrt_d, this run's is layer_norm"
    assert said in one_line(capfd.readouterr().err)


def test_what_a_saved_sae_lacks_for_training_is_named(in_process, capfd, tmp_path):
    words = [w for w in QUICK if not w.startswith("sae=")]
    words += ["sae=archetypal", "sae.n_candidates=64", "run_name=first"]
    assert in_process("train", *words) == 0
    capfd.readouterr()
    start = f"init_from={tmp_path}/outputs/train/first"
    assert in_process("train", *words, "run_name=second", start) == 2
    assert "lacks 'mixture', which training needs" in one_line(capfd.readouterr().err)


@pytest.mark.parametrize("damage", [lambda text: text[:-40], lambda text: "a: [1"])
def test_damaged_record_of_a_run_is_named_with_the_way_out(damage, finished_run, in_process, capfd):
    record = finished_run / "config.yaml"
    record.write_text(damage(record.read_text()))
    for words in (["train", *QUICK], ["eval", f"checkpoint={finished_run}"]):
        capfd.readouterr()
        assert in_process(*words) == 2
        line = one_line(capfd.readouterr().err)
        assert f"{finished_run.name}/config.yaml is damaged: `sae-run rm " in line
    assert in_process("train", *QUICK, "force=true") == 0


def test_a_run_of_before_an_option_of_training_is_evaluated(finished_run, in_process, capfd):
    record = finished_run / "config.yaml"
    words = ["eval", f"checkpoint={finished_run}", "evaluators=[geometry]"]
    lines = record.read_text().splitlines(keepends=True)
    left = [line for line in lines if line.split(":")[0] not in ("  cuda_graph", "  ema")]
    assert len(left) == len(lines) - 2
    record.write_text("".join(left))
    assert in_process(*words) == 0, capfd.readouterr().err


def test_what_was_left_out_for_memory_is_measured_once_there_is_more(finished_run, in_process):
    def n_examples(*sizes: str) -> tuple[int, int]:
        words = ["eval", f"checkpoint={finished_run}", "evaluators=[top_examples,density]"]
        assert in_process(*words, *sizes) == 0
        folder = next(finished_run.glob("eval/*"))
        path = folder / "top_examples.json"
        when = path.stat().st_mtime_ns + (folder / "density.json").stat().st_mtime_ns
        return json.loads(path.read_text())["metrics"]["top_examples"]["n_examples"], when

    few, all_of_them = "eval.keep_gb=0.00001", "eval.keep_gb=1"
    first = n_examples(few)
    assert n_examples(few) == first
    second = n_examples(all_of_them)
    assert second[0] > first[0]
    # Where all fits, how much more would fit decides nothing.
    assert n_examples("eval.keep_gb=2") == second


def test_damaged_checkpoint_is_named(finished_run, in_process, capfd):
    weights = next(finished_run.glob("checkpoints/*/sae.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    assert in_process("eval", f"checkpoint={finished_run}", "force=true") == 2
    err = capfd.readouterr().err
    assert "no sound checkpoint" in one_line(err)


def test_exports_that_cannot_be(finished_run, in_process, capfd, tmp_path):
    words = ["export", f"checkpoint={finished_run}"]
    before = set(tmp_path.rglob("*"))
    for more, message in (
        (["format=saelens"], "site activations is no hook of TransformerLens; hook_name= sets"),
        (["format=sparsify", f"out={finished_run}"], "is there already: force=true replaces it"),
        (
            ["format=sparsify", f"out={finished_run}", "force=true"],
            "holds no sparsify SAE: it is not",
        ),
    ):
        assert in_process(*words, *more) == 2
        assert message in one_line(capfd.readouterr().err)
    assert set(tmp_path.rglob("*")) == before
    words = [w for w in QUICK if not w.startswith("sae.k")]
    assert in_process("train", *words, "sae=relu", "run_name=relu") == 0
    capfd.readouterr()
    assert in_process("export", "checkpoint=relu", "format=sparsify") == 2
    line = one_line(capfd.readouterr().err)
    assert "format=sparsify: it has no SAE like sae.type=relu" in line
    assert not (tmp_path / "outputs" / "exports").exists()


# -- What works --------------------------------------------------------------------------------


def test_second_time_nothing_is_done_again(finished_run, in_process, capfd):
    before = {p: p.stat().st_mtime_ns for p in finished_run.rglob("*.safetensors")}
    capfd.readouterr()
    assert in_process("train", *QUICK) == 0
    err = capfd.readouterr().err
    assert "is complete" in err
    assert "training is done" in err
    assert "report is there" in err
    assert before == {p: p.stat().st_mtime_ns for p in finished_run.rglob("*.safetensors")}


def test_checkpoints_asked_of_a_finished_run_are_not_passed_over(finished_run, in_process, capfd):
    capfd.readouterr()
    assert in_process("train", *QUICK, "trainer.checkpoints=1") == 0
    assert "trainer.checkpoints came too late for steps 4" in capfd.readouterr().err
    assert in_process("train", *QUICK, "trainer.checkpoints=1", "force=true") == 0
    capfd.readouterr()
    assert in_process("train", *QUICK, "trainer.checkpoints=1") == 0
    assert "too late" not in capfd.readouterr().err


def test_force_trains_again_to_the_same_bits(finished_run, in_process):
    weights = next(finished_run.glob("checkpoints/*/sae.safetensors"))
    bytes_before, time_before = weights.read_bytes(), weights.stat().st_mtime_ns
    assert in_process("train", *QUICK, "force=true") == 0
    assert weights.stat().st_mtime_ns != time_before
    assert weights.read_bytes() == bytes_before


def test_half_failed_sweep_runs_only_what_is_missing(in_process, tmp_path, monkeypatch, capfd):
    from sae_runner.training.trainer import Trainer

    whole = Trainer.run

    def run(self):
        if self.sae.k == 16:
            raise OSError(28, "No space left on device")
        whole(self)

    sweep = ["train", "-m", *[w for w in QUICK if "sae.k" not in w], "sae.k=4,16"]
    monkeypatch.setattr(Trainer, "run", run)
    assert in_process(*sweep) == 2
    assert "sae.k=16" in one_line(capfd.readouterr().err)
    assert len(list(tmp_path.glob("outputs/train/[!.]*/report.json"))) == 1
    monkeypatch.setattr(Trainer, "run", whole)
    assert in_process(*sweep) == 0
    err = capfd.readouterr().err
    assert err.count("training is done") == 1
    assert len(list(tmp_path.glob("outputs/train/[!.]*/report.json"))) == 2


def test_a_launcher_of_parallel_jobs_ends_the_others_and_says_what_failed(sae_run, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    (tmp_path / "outputs" / "train").mkdir(parents=True)
    (tmp_path / "outputs" / "train" / "seed1").touch()
    sweep = ["-m", *QUICK, "seed=0,1,2", "run_name=seed${seed}", "hydra/launcher=joblib"]
    done = sae_run("train", *sweep, "hydra.launcher.n_jobs=2")
    assert done.returncode == 2
    assert "seed1 is a file" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    reports = tmp_path.glob("outputs/train/*/report.json")
    assert sorted(report.parent.name for report in reports) == ["seed0", "seed2"]
    assert len(list(tmp_path.glob("outputs/stores/*/store.json"))) == 1


def test_sweep_job_and_single_run_share_a_directory(finished_run, in_process, tmp_path):
    assert in_process("train", "-m", *QUICK, "sae.target_l0=null") == 0
    assert len(list(tmp_path.glob("outputs/train/[!.]*"))) == 1


def test_runtime_keys_and_spelling_name_no_new_run(finished_run, in_process, tmp_path):
    same = ["model.batch_size=7", "dataset.workers=0", "outputs=./outputs/", "site.name='act*'"]
    assert in_process("train", *QUICK, *same, "site.k=7", "site.positions=[1]") == 0
    assert len(list(tmp_path.glob("outputs/train/[!.]*"))) == 1


def test_the_report_has_width_and_k_as_numbers_and_what_was_typed(in_process, tmp_path, capfd):
    words = [w for w in QUICK if not w.startswith(("sae.", "evaluators"))] + [
        "evaluators=[density]"
    ]
    assert in_process("train", *words, "sae.d_sae=96", "sae.k=8") == 0
    assert in_process("train", *words, "sae.expansion=2", "sae.target_l0=16") == 0
    reports = [json.loads(p.read_text()) for p in tmp_path.glob("outputs/train/*/report.json")]
    saes = sorted((r["config"]["sae"]["d_sae"], r["config"]["sae"]["k"]) for r in reports)
    assert saes == [(96, 8), (128, 16)]
    assert not any("sae.expansion=null" in report["overrides"] for report in reports)
    capfd.readouterr()
    assert in_process("report") == 0
    head = capfd.readouterr().out.splitlines()[0].split()
    assert {"d_sae", "k"} <= set(head) and "expansion" not in head


def test_finished_run_is_extended_from_its_weights(finished_run, in_process, tmp_path):
    words = [w for w in QUICK if "n_tokens" not in w]
    assert in_process("train", *words, "trainer.n_tokens=8192", f"init_from={finished_run}") == 0
    runs = sorted(tmp_path.glob("outputs/train/[!.]*"))
    assert len(runs) == 2
    last = {r.name: json.loads((r / "metrics.jsonl").read_text().splitlines()[-1]) for r in runs}
    longer = next(v for k, v in last.items() if k != finished_run.name)
    assert longer["fvu"] < last[finished_run.name]["fvu"]


def test_eval_alone_adds_an_evaluator(finished_run, in_process, tmp_path):
    from sae_runner import load_report

    assert in_process("eval", f"checkpoint={finished_run}", "evaluators=[recovery]") == 0
    assert set(load_report(finished_run)["evaluators"]) == {
        "sparsity", "reconstruction", "density", "recovery",
    }  # fmt: skip


def test_eval_of_nothing_new_needs_no_rows(finished_run, in_process, tmp_path, capfd):
    import shutil

    shutil.rmtree(tmp_path / "outputs" / "stores")
    assert in_process("eval", f"checkpoint={finished_run}", "evaluators=[]") == 0
    bootstraps = [w for w in QUICK if w.startswith("evaluators.")]
    assert in_process("eval", f"checkpoint={finished_run}", *bootstraps) == 0
    assert "evaluator density is done" in capfd.readouterr().err
    assert not (tmp_path / "outputs" / "stores").exists()


def test_eval_takes_the_name_of_a_run(finished_run, in_process, capfd):
    assert in_process("eval", f"checkpoint={finished_run.name}", "evaluators=[density]") == 0
    for words in (["eval", f"checkpoint={finished_run.name[:-1]}"],
                  ["train", *QUICK, f"init_from=outputs/train/{finished_run.name[:-1]}"]):  # fmt: skip
        capfd.readouterr()
        assert in_process(*words) == 2
        line = one_line(capfd.readouterr().err)
        assert f"there is no such folder; did you mean {finished_run}?" in line


def test_training_without_splicing_never_loads_the_model(finished_run, in_process, monkeypatch):
    from sae_runner.commands import store_pipeline

    def refuse(*_, **__):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(store_pipeline, "build_model", refuse)
    monkeypatch.setattr(store_pipeline, "_shapes", refuse)
    assert in_process("train", *QUICK, "seed=3") == 0


def test_sweeps_leave_nothing_in_the_folder_where_they_are_typed(
    finished_run, in_process, tmp_path
):
    (tmp_path / "outputs").rename(tmp_path / "elsewhere")
    run, moved = f"elsewhere/train/{finished_run.name}", "outputs=elsewhere"
    for words in (
        ["eval", "-m", f"checkpoint={run}", "evaluators=[density],[]", moved],
        ["report", "-m", run, "x=sparsity.l0,sparsity.l1", moved],
        ["ls", "-m", moved],
        ["rm", "-m", "yes=true", run, moved],
    ):
        assert in_process(*words) == 0
        assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"]
    assert len(list(tmp_path.glob("elsewhere/reports/*/report.html"))) == 1
    assert not (tmp_path / run).exists()


def test_out_of_memory_is_one_line(in_process, monkeypatch, capfd):
    from sae_runner.training.trainer import Trainer

    def run(self):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(Trainer, "run", run)
    assert in_process("train", *QUICK) == 1
    line = one_line(capfd.readouterr().err)
    assert "out of memory: lower trainer.micro_batch_size" in line


def test_false_is_no_order_to_delete(finished_run, in_process):
    (finished_run / "precious").write_text("kept")
    assert in_process("train", *QUICK, "force=no") == 0
    assert (finished_run / "precious").exists()


def test_changed_data_are_noticed(in_process, tmp_path, capfd):
    import numpy as np
    from PIL import Image

    folder = tmp_path / "images"
    for label in ("a", "b"):
        (folder / label).mkdir(parents=True)
        for i in range(12):
            pixels = np.random.default_rng(i).integers(0, 255, (16, 16, 3), np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{i}.png")
    words = ["train", "model=clip_vit_b32", "model.weights=random", "dataset=cifar10",
             f"dataset.path={folder}", "dataset.split=train", "dataset.heldout_split=null",
             "site.tokens=cls", "sae.expansion=1", "sae.k=4", "trainer.n_tokens=64",
             "trainer.batch_size=16", "evaluators=[density]", "model.batch_size=12"]  # fmt: skip
    assert in_process(*words) == 0
    Image.new("RGB", (16, 16), "red").save(folder / "a" / "0.png")
    from sae_runner.commands import store_pipeline

    store_pipeline._dataset.cache_clear()
    capfd.readouterr()
    assert in_process(*words, "seed=1") == 2
    assert "was written from other data" in one_line(capfd.readouterr().err)
    assert in_process("cache", *[w for w in words[1:] if w.split("=")[0].split(".")[0] in
                                 ("model", "dataset", "site")], "force=true") == 0  # fmt: skip
    assert in_process(*words, "seed=1") == 0


# -- Start-up ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [[], ["--version"], ["--help"], ["train", "--help"], ["train", "--cfg", "job"], ["eval", "--help"],
     ["report", "--help"], ["cache", "--help"]],
    ids=" ".join,
)  # fmt: skip
def test_help_does_not_import_torch(words, tmp_path):
    code = (
        "import sys; sys.modules['torch'] = None; "
        f"sys.argv[1:] = {words}; from sae_runner.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["ls", "rm", "report"])
def test_help_of_a_command_without_groups_lists_none(command, in_process, capfd):
    assert in_process(command, "--help") == 0
    text = capfd.readouterr().out
    assert f"sae-run {command} [WORD ...]" in text and "outputs: outputs" in text
    assert "trainer" not in text and "Groups" not in text


def test_unknown_names_are_refused_without_torch(tmp_path):
    for words, message in ((["sae=topkk"], "topk"), (["sae.kk=1"], "'k'")):
        code = (
            "import sys; sys.modules['torch'] = None; "
            f"sys.argv[1:] = {['train', *words]}; from sae_runner.cli import main; main()"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
        )
        assert done.returncode == 2
        assert message in done.stderr


@pytest.mark.parametrize(
    ("line", "expected"),
    [("sae-run tr", "train"), ("sae-run train sae=", "sae=relu"), ("sae-run train -m sae.k", "sae.k="),
     ("sae-run report ", "outputs"), ("sae-run train sae=topk,ga", "sae=topk,gated\n")],
)  # fmt: skip
def test_completion(line, expected, tmp_path):
    environment = {**os.environ, "COMP_LINE": line, "COMP_POINT": str(len(line)), "_PYTHON": "x"}
    done = subprocess.run(
        [sys.executable, "-m", "sae_runner", "-sc", "query=bash"],
        capture_output=True, text=True, cwd=tmp_path, env=environment,
    )  # fmt: skip
    assert expected in done.stdout, done.stderr


def test_broken_pipe_is_silent(tmp_path):
    command = f"{sys.executable} -m sae_runner train --help | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=tmp_path)
    assert "Traceback" not in done.stderr
