"""N-gram autointerp on a host whose latents are planted n-grams."""

from dataclasses import replace

import numpy as np
import pytest
from codes_fixtures import bare
from gram_host import SITE, Rows, measured, of_latent

from sae_runner.config import preset
from sae_runner.errors import ConfigError
from sae_runner.evaluators import EVALUATORS
from sae_runner.evaluators.base import Setting
from sae_runner.models.base import Model
from sae_runner.site import TokenSelection

CFG = preset("evaluators", "autointerp")["autointerp"]


def test_planted_ngrams_are_found_and_predict_others():
    findings, host = measured(CFG)
    metrics = findings.metrics["autointerp"]
    assert of_latent(findings, 0)["explanation"] == " 3"
    assert of_latent(findings, 1)["explanation"] == " 4 5"
    for latent in (0, 1):
        row = of_latent(findings, latent)
        assert row["spearman"] == row["auc"] == row["recall"] == row["precision"] == 1
        assert row["detection_balacc"] == 1 and row["pearson"] == pytest.approx(1)
    row = of_latent(findings, 4)
    assert set(row["explanation"].split(" | ")) == {f"(^) {token}" for token in range(6)}
    assert row["spearman"] == row["recall"] == row["precision"] == 1
    assert metrics["n_scored"] == 4 and metrics["n_dead"] == 2 and metrics["n_constant"] == 0
    assert metrics["not_reproduced_frac"] == 0 and metrics["fuzz_balacc"] is None
    assert metrics["apl_mean"] == pytest.approx(1 - metrics["spearman_mean"])
    assert metrics["spearman_mean"] > 0.9
    assert metrics["spearman_mean_shuffled"] < 0.1
    assert metrics["detection_balacc_shuffled"] < 0.7
    assert host.n_runs < 20  # All texts of all latents together.
    assert host.spent["full_forwards"] == host.spent["sae_encodes"] > 4 * 15


def test_means_are_those_of_the_table():
    findings, _ = measured(CFG)
    metrics, columns = findings.metrics["autointerp"], findings.tables["latents"]
    rho, freq = np.array(columns["spearman"]), np.array(columns["freq"])
    assert metrics["spearman_mean"] == pytest.approx(rho.mean())
    assert metrics["spearman_median"] == pytest.approx(np.median(rho))
    assert metrics["apl_median"] == pytest.approx(1 - np.median(rho))
    assert metrics["spearman_freq_mean"] == pytest.approx((freq * rho).sum() / freq.sum())
    assert metrics["auc_mean"] == pytest.approx(np.mean(columns["auc"]))
    interval = findings.ci["autointerp.apl_mean"]
    assert interval["lo"] <= metrics["apl_mean"] <= interval["hi"] and interval["n"] == 4


def test_explained_and_scored_examples_differ():
    columns = measured(CFG)[0].tables["latents"]
    for explain, score in zip(columns["explain_ids"], columns["score_ids"], strict=True):
        assert len(explain) == 15 and len(score) == 30
        assert len({*explain, *score}) == 45


def test_an_encoder_runs_texts_up_to_the_token_and_counts_what_needs_the_right():
    findings, _ = measured(CFG, encoder=True)
    assert of_latent(findings, 0)["explanation"] == " 3"
    assert of_latent(findings, 0)["spearman"] == 1
    row = of_latent(findings, 3)
    assert row["explanation"].startswith("(^)") and abs(row["spearman"]) < 0.1
    metrics = findings.metrics["autointerp"]
    assert metrics["n_scored"] == 5
    assert metrics["not_reproduced_frac"] == pytest.approx(0.2)


def test_a_first_token_that_is_no_row_of_the_sae_counts_as_inactive():
    findings, _ = measured(CFG, bos=False)  # The selection drops position 0.
    row = of_latent(findings, 0)
    assert row["explanation"] == "(*) 3" and row["spearman"] == 1


def test_the_same_seed_gives_the_same_whatever_the_batches():
    one, other = measured(CFG)[0], measured(CFG, batch=37)[0]
    assert one.metrics == other.metrics and one.ci == other.ci
    assert one.tables["latents"] == other.tables["latents"]
    assert (
        measured(CFG, seed=1)[0].tables["latents"]["score_ids"]
        != (one.tables["latents"]["score_ids"])
    )


def test_fewer_latents_are_a_sample():
    columns = measured(CFG, n_latents=2)[0].tables["latents"]
    assert len(columns["feature"]) == 2 and set(columns["feature"]) <= {0, 1, 2, 4}


def test_one_latent_has_no_other_explanation_to_be_given():
    metrics = measured(CFG, n_latents=1)[0].metrics["autointerp"]
    assert metrics["n_scored"] == 1 and metrics["spearman_mean_shuffled"] is None


def test_none_active_enough_is_no_latent_scored():
    metrics = measured(CFG, fewest=399)[0].metrics["autointerp"]
    assert metrics["n_scored"] == 0 and metrics["n_dead"] == 6
    assert metrics["apl_mean"] is None


def test_what_cannot_be_explained_is_refused():
    with pytest.raises(ConfigError, match=r"site\.tokens=mean: n-gram templates"):
        measured(CFG, tokens="mean")
    site = replace(SITE, has_cls=True)
    setting = Setting(bare(Rows), lambda: bare(Model), site, TokenSelection("all"))
    with pytest.raises(ConfigError, match="need a model of text; for images use"):
        EVALUATORS.build(CFG).check(setting)
    for backend, message in (
        ("lm", r"backend=lm: is a block of options; use evaluators=\[autointerp_lm\]"),
        ({"type": "ngrams"}, "backend.type=ngrams: no such type. Did you mean 'ngram'"),
        ({"type": "ngram", "longest": 0}, "backend.longest=0: must be > 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            EVALUATORS.build({**CFG, "backend": backend}).check(setting)
    for key, value in (("fewest", 3), ("n_bootstrap", 5)):
        with pytest.raises(ConfigError, match=f"evaluators.autointerp.{key}={value}"):
            EVALUATORS.build({**CFG, key: value})


def test_neurons_are_explained_by_the_same_protocol():
    """Those that are a token, or the one before, say so and predict themselves."""
    without, _ = measured(CFG)
    findings, _ = measured(CFG, n_neurons=45)
    columns, metrics = findings.tables["neurons"], findings.metrics["autointerp"]
    explained = dict(zip(columns["neuron"], columns["explanation"], strict=True))
    rho = dict(zip(columns["neuron"], columns["spearman"], strict=True))
    assert explained[3] == " 3" and explained[15 + 3] == " 3(*)"
    assert rho[3] == rho[15 + 3] == 1
    # BOS, SEP, filler and what follows the last token are never above their mean.
    assert set(explained) == {*range(12), *range(15, 27), 15 + 12}
    assert metrics["n_scored_neurons"] == 25
    assert metrics["spearman_mean_neurons"] == pytest.approx(np.mean(columns["spearman"]))
    assert metrics["auc_mean_neurons"] > 0.9
    interval = findings.ci["autointerp.spearman_mean_neurons"]
    assert interval["n"] == 25 and interval["lo"] <= metrics["spearman_mean_neurons"]
    assert findings.tables["latents"] == without.tables["latents"]
    own = {k: v for k, v in metrics.items() if not k.endswith("_neurons")}
    assert own == without.metrics["autointerp"]
    batched, _ = measured(CFG, n_neurons=45, batch=37)
    assert batched.tables["neurons"] == columns


def test_no_neuron_is_active_enough():
    metrics = measured(CFG, n_neurons=3, fewest=399)[0].metrics["autointerp"]
    assert metrics["n_scored_neurons"] == 0 and metrics["spearman_mean_neurons"] is None
