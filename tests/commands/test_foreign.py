"""`sae-run eval checkpoint=FOLDER model=…`: SAEs of other libraries, measured as ours are."""

import json

import pytest
import torch

from sae_runner import load_report, load_sae
from sae_runner.checkpoint import find_checkpoint
from sae_runner.commands import eval as eval_command
from sae_runner.commands.entries import read_run
from sae_runner.errors import ConfigError, StoreError
from sae_runner.interchange.base import Origin
from sae_runner.interchange.saelens import SAELens


@pytest.fixture
def run(outputs):
    return next(outputs.glob("train/[!.]*"))


@pytest.fixture
def folder(run, tmp_path):
    """The run's SAE as SAELens would have saved it, with decoder rows of another norm."""
    sae = load_sae(run)
    with torch.no_grad():
        sae.W_dec.mul_(2.0)
        sae.W_enc_rows.mul_(0.5)
        sae.b_enc.mul_(0.5)
    (tmp_path / "foreign").mkdir()
    SAELens().write(tmp_path / "foreign", sae, Origin(model="toy"))
    return tmp_path / "foreign"


@pytest.fixture
def evaluate(compose_job, outputs, small):
    """`evaluate(checkpoint, "model=toy", …)`; without words the data of the run are named."""
    data = [w for w in small if w.split(".")[0].split("=")[0] in ("model", "dataset", "store")]

    def evaluate(checkpoint, *words):
        words = words or data
        evaluators = "evaluators=[sparsity,reconstruction]"
        common = (f"checkpoint={checkpoint}", f"outputs={outputs}", evaluators)
        job = compose_job("eval", *common, *words)
        eval_command.check(job)
        eval_command.main(job)

    return evaluate


def imported(outputs):
    return next(outputs.glob("train/toy-saelens-*"))


def test_it_is_measured_as_the_run_that_it_is_from(evaluate, folder, run, outputs):
    evaluate(folder)
    theirs = load_report(imported(outputs))["evaluators"]
    ours = load_report(run)["evaluators"]
    for name in ("fvu", "cosine", "mse"):
        values = [e["reconstruction"]["metrics"]["reconstruction"][name] for e in (theirs, ours)]
        assert values[0] == pytest.approx(values[1], rel=1e-4)
    assert (
        theirs["sparsity"]["metrics"]["sparsity"]["l0"]
        == (ours["sparsity"]["metrics"]["sparsity"]["l0"])
    )


def test_latents_stay_as_the_library_has_them(evaluate, folder, outputs):
    evaluate(folder)
    x = torch.randn(9, 16, generator=torch.Generator().manual_seed(0))
    expected, found = load_sae(folder)(x), load_sae(imported(outputs))(x)
    torch.testing.assert_close(found.latents.dense(), expected.latents.dense())
    torch.testing.assert_close(found.x_hat, expected.x_hat)


def test_a_second_time_nothing_is_done_again(evaluate, folder, outputs, caplog):
    evaluate(folder)
    weights = find_checkpoint(imported(outputs)) / "sae.safetensors"
    before = weights.stat().st_mtime_ns
    with caplog.at_level("INFO", "sae_runner"):
        evaluate(folder)
    assert "evaluator sparsity is done" in caplog.text
    assert weights.stat().st_mtime_ns == before
    assert len(list(outputs.glob("train/toy-saelens-*"))) == 1


def test_its_run_is_a_run_like_others(evaluate, folder, outputs):
    evaluate(folder)
    run = imported(outputs)
    entry = read_run(run, "train", outputs)
    assert entry.state == "complete" and "topk 16" in entry.holds
    evaluate(run, "evaluators=[density]")
    assert "density" in load_report(run)["evaluators"]
    assert "trainer" not in load_report(run)["config"]


def test_other_weights_make_another_run(evaluate, folder, outputs):
    evaluate(folder)
    cfg = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps({**cfg, "k": cfg["k"] - 1}))
    evaluate(folder)
    assert len(list(outputs.glob("train/toy-saelens-*"))) == 2


def test_whose_activations_must_be_said(evaluate, folder, outputs):
    with pytest.raises(ConfigError, match=r"with model=…; it says model toy"):
        evaluate(folder, "device=cpu")
    assert not list(outputs.glob("train/toy-saelens-*"))


def test_a_run_is_measured_on_its_own_data_unless_a_model_is_named(evaluate, run, outputs, small):
    with pytest.raises(ConfigError, match=r"store=stream: .* is measured on what it was trained o"):
        evaluate(run, "store=stream")
    given = [word for word in small if word.startswith(("model", "dataset", "store"))]
    evaluate(run, *given, "dataset.seed=9")
    (other,) = (path for path in outputs.glob("train/toy-topk-*") if path != run)
    one, two = (load_report(path) for path in (run, other))
    assert one["fingerprints"]["dataset"] != two["fingerprints"]["dataset"]
    x = torch.randn(9, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(load_sae(other)(x).x_hat, load_sae(run)(x).x_hat)
    source = two["evaluators"]["sparsity"]["sae"]["source_sha256"]
    assert source == one["fingerprints"]["sae"]


def test_a_site_of_another_width_is_refused(evaluate, folder):
    with pytest.raises(StoreError, match="its d_in is 16, that of activations is 64"):
        evaluate(folder, "model=toy")


def test_the_site_that_it_says_is_where_it_is_measured(evaluate, folder, run):
    SAELens().write(folder, load_sae(run), Origin(model="toy", site="blocks.3.resid_post"))
    with pytest.raises(ConfigError, match=r"site.name=blocks.3.resid_post: no such site"):
        evaluate(folder, "model=toy", "dataset.d=16")
