"""`trainer/objective=e2e` as it is typed, with a small language model that is trained once."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_runner.checkpoint import load_sae, read_facts, step_dirs
from sae_runner.commands import objectives, plan, train
from sae_runner.commands.pipeline import Pipeline
from sae_runner.errors import StoreError
from sae_runner.saes.base import TrainState
from sae_runner.statistics import ActivationStats
from sae_runner.training.objectives.e2e import EndToEnd

WORDS = (
    "model=tiny_lm", "model.vocab_size=300", "model.n_layers=3", "model.d_model=32",
    "model.n_heads=2", "model.context=32", "model.n_steps=300", "model.rows_per_step=32",
    "dataset.n_examples=60", "dataset.n_heldout=20", "site.name=blocks.0.resid_post", "sae=topk",
    "sae.expansion=4", "sae.k=2", "trainer.batch_size=256", "trainer.n_tokens=80000",
    "trainer.lr=1e-2", "trainer.log_every=10", "sae/dead_latents=none",
    "evaluators=[reconstruction]", "evaluators.reconstruction.n_bootstrap=50",
)  # fmt: skip
OBJECTIVES = ("local", "e2e", "e2e_ds")


class Trained:
    """The runs of three objectives over one store, and the pipeline of each."""

    def __init__(self, outputs: Path, compose_job: Any) -> None:
        self.outputs, self.compose_job = outputs, compose_job
        self.pipelines = {name: self.pipeline(f"trainer/objective={name}") for name in OBJECTIVES}

    def job(self, *words: str, command: str = "train") -> Any:
        return self.compose_job(command, *WORDS, *words, f"outputs={self.outputs}")

    def pipeline(self, *words: str) -> Pipeline:
        job = self.job(*words)
        return Pipeline(job.cfg, job.choices)

    def metrics(self, name: str) -> list[dict[str, float]]:
        lines = (self.pipelines[name].run_dir / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def heldout(self, name: str) -> dict[str, float]:
        """KL and the difference at later blocks, of what is saved, on held-out text."""
        own = self.pipelines[name]
        sae = load_sae(own.run_dir)
        judge = EndToEnd(
            sae, own.model, own.site, own.selection, kl_coefficient=1.0,
            downstream_coefficient=1.0, downstream_sites=None, reconstruction_coefficient=0.0,
        )  # fmt: skip
        inputs = own.model.prepare(own.dataset.load(own.dataset.ids("heldout")[:128]))
        with torch.no_grad():
            loss = judge.loss(inputs, TrainState())
        variance = (loss.x - loss.x.mean(0)).square().sum()
        fvu = float((loss.x - loss.x_hat).square().sum() / variance)
        return {k: float(loss.parts[k]) for k in ("kl", "downstream")} | {
            "fvu": fvu, "l0": float(loss.l0)
        }  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, compose_job: Any) -> Trained:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # Steps are tiny.
    made = Trained(tmp_path_factory.mktemp("trained") / "outputs", compose_job)
    for name in OBJECTIVES:
        train.main(made.job(f"trainer/objective={name}"))
    torch.set_num_threads(threads)
    return made


def test_what_is_trained_for_the_output_serves_it_better(trained):
    """Braun et al. 2024, §3: less KL at the same L0, for more error at the site and on the way.

    With downstream reconstruction as little KL, without that.
    """
    local, e2e, both = (trained.heldout(name) for name in OBJECTIVES)
    for one in (local, e2e, both):  # In a row or two only one is positive.
        assert one["l0"] == pytest.approx(2, abs=0.01)
    assert e2e["kl"] < 0.75 * local["kl"] and both["kl"] < 0.75 * local["kl"]
    assert both["downstream"] < local["downstream"] < 0.5 * e2e["downstream"]
    assert local["fvu"] < 0.5 * e2e["fvu"] and both["fvu"] < 0.5 * e2e["fvu"]


def test_the_log_has_every_part(trained):
    assert "kl" not in trained.metrics("local")[-1]
    for name, parts in (("e2e", {"kl"}), ("e2e_ds", {"kl", "downstream"})):
        rows = trained.metrics(name)
        assert rows[-1].keys() >= parts | {"normalised_mse", "fvu", "l0"}
        assert rows[-1]["kl"] < 0.5 * rows[0]["kl"]
        last = rows[-1]
        options = trained.pipelines[name].cfg["trainer"]["objective"]
        total = options["kl_coefficient"] * last["kl"]
        total += options["downstream_coefficient"] * last.get("downstream", 0.0)
        assert last["loss"] == pytest.approx(total, rel=1e-5)


def test_the_budget_is_of_rows_and_batches_are_of_whole_texts(trained, caplog):
    own = trained.pipelines["e2e"]
    assert own.train_options.batch_size == 8 * 32 and own.train_options.n_steps == 312
    assert own.run_dir != trained.pipelines["local"].run_dir
    assert own.store_dir == trained.pipelines["local"].store_dir
    facts = read_facts(step_dirs(own.run_dir)[-1])
    assert facts["step"] == 312 and facts["n_tokens"] == 312 * 256
    odd = trained.pipeline("trainer/objective=e2e", "trainer.batch_size=250")
    assert odd.train_options.batch_size == 7 * 32 and odd.train_options.n_steps == 357
    with caplog.at_level("INFO"):
        _, inputs = objectives.build_both(own, own.build_sae(own.site.d), own.open_store())
    assert "end to end: 8 examples a step, of 30.99 rows on average" in caplog.text
    assert inputs.n_examples(256) == 8 and inputs.n_examples(224) == 7


def test_a_store_of_other_weights_is_refused(trained, monkeypatch):
    own = trained.pipelines["e2e"]
    monkeypatch.setattr(type(own.model), "fingerprint", lambda _: "0" * 64)
    with pytest.raises(StoreError, match="was written from other model weights"):
        objectives.build_both(own, own.build_sae(own.site.d), own.open_store())


def test_it_says_when_it_is_done(trained, caplog):
    with caplog.at_level("INFO"):
        train.main(trained.job("trainer/objective=e2e"))
    assert "training is done" in caplog.text


def test_parts_of_a_batch_give_nearly_the_same(trained):
    """Exactly so where every text has as many tokens; sums come in another order."""
    words = ["trainer/objective=e2e", "trainer.n_tokens=2560", "trainer.log_every=1", "sae=topk"]
    rows = []
    for more in ([], ["trainer.micro_batch_size=64"]):
        pipeline = trained.pipeline(*words, *more)
        train.main(trained.job(*words, *more))
        lines = (pipeline.run_dir / "metrics.jsonl").read_text().splitlines()
        rows.append([json.loads(line)["kl"] for line in lines])
    assert len(rows[0]) == 10 and rows[0] == pytest.approx(rows[1], rel=1e-3)


@pytest.mark.parametrize(
    "site", ["blocks.1.resid_mid", "blocks.0.attn_z.1", "blocks.0.mlp_act", "blocks.1.resid_pre"]
)
def test_the_gradient_is_right_wherever_it_is_spliced_in(trained, site):
    """By finite differences in float64, in a network of Hugging Face with its own in-place sums."""
    own = trained.pipeline(f"site.name={site}", "sae=topk", "sae.d_sae=64", "sae.expansion=null")
    model = own.model  # This pipeline's alone.
    model.network.double()
    inputs = model.prepare(own.dataset.load(own.dataset.ids("train")[:4]))
    with torch.no_grad():
        x = model.record(inputs, [site])[site].flatten(0, 1)
    norms = x.norm(dim=1)
    stats = ActivationStats(x.mean(0), float(norms.mean()), float(norms.square().mean()), x)
    sae = own.build_sae(x.shape[1]).double()
    sae.initialise(stats, torch.Generator().manual_seed(0))
    judge = EndToEnd(
        sae, model, model.sites()[site], own.selection, kl_coefficient=1.0,
        downstream_coefficient=0.1, downstream_sites=None, reconstruction_coefficient=0.0,
    )  # fmt: skip
    judge.loss(inputs, TrainState()).total.backward()
    direction = torch.randn(
        sae.W_dec.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    values = []
    for step in (1e-5, -1e-5):
        with torch.no_grad():
            sae.W_dec.add_(step * direction)
            values.append(judge.loss(inputs, TrainState()).total.item())
            sae.W_dec.sub_(step * direction)
    slope = (values[0] - values[1]) / 2e-5
    assert float((sae.W_dec.grad * direction).sum()) == pytest.approx(slope, rel=1e-6)


@pytest.mark.parametrize("probe", [False, True])
def test_the_plan_says_so(trained, capsys, probe):
    words = ["trainer/objective=e2e_ds", "sae=relu", "seed=5", f"plan.probe={str(probe).lower()}"]
    job = trained.compose_job(
        "plan", *(w for w in WORDS if w != "sae.k=2"), *words, f"outputs={trained.outputs}"
    )
    plan.main(job)
    said = capsys.readouterr().out
    assert "end to end (e2e_ds), with the model" in said
    assert "! trainer/objective=e2e: the model is run twice in every step" in said
    assert "sae.target_l0 finds one that gives the L0" in said
    assert ("time      training about" in said) == probe
    assert not list(trained.outputs.glob("train/tiny_lm-relu-*"))
