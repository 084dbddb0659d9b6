"""N-gram autointerp on a host whose latents are planted n-grams."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from codes_fixtures import bare, codes_of, context_of
from evaluators.conftest import Given, assert_publishable

from sae_runner.config import preset
from sae_runner.data.base import Dataset, Example
from sae_runner.errors import ConfigError
from sae_runner.evaluators import EVALUATORS
from sae_runner.evaluators.base import Setting
from sae_runner.models._text import ReadsTokens
from sae_runner.models.base import Inputs, Model, SiteInfo
from sae_runner.site import TokenSelection

CFG = preset("evaluators", "autointerp")["autointerp"]
VOCAB, N_EXAMPLES, LENGTH, BOS, SEP, FILLER = 12, 400, 20, 12, 13, 14
SITE = SiteInfo("blocks.0.resid_post", "m", 45, "tokens", None)


class Grams(Model, ReadsTokens):
    """x_t = the one-hot tokens at t, t − 1 and, in an encoder, t + 1. BOS, perhaps SEP, around."""

    modality, device, filler, context = "text", torch.device("cpu"), FILLER, LENGTH + 2
    encoder, bos, n_runs = False, True, 0

    @property
    def prefix(self):
        return [BOS] if self.bos else []

    @property
    def suffix(self):
        return [SEP] if self.encoder else []

    def pieces(self, tokens):
        return [f" {t}" for t in tokens]

    def prepare(self, examples):
        bodies = [[0] if isinstance(e.value, str) else e.value for e in examples]
        return self.token_rows([[*self.prefix, *body, *self.suffix] for body in bodies])

    def token_rows(self, rows):
        assert all(len(row) <= self.context for row in rows)
        tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
        attended = torch.zeros(tokens.shape, dtype=torch.bool)
        for i, row in enumerate(rows):
            tokens[i, : len(row)], attended[i, : len(row)] = torch.tensor(row), True
        special = (tokens == BOS) | (tokens == SEP)
        return Inputs(torch.arange(len(rows)), {"tokens": tokens}, attended, special)

    def record(self, inputs, sites):
        self.n_runs += 1
        hot = torch.nn.functional.one_hot(inputs.tensors["tokens"], 15).float()
        hot = hot * inputs.attended.unsqueeze(2)
        before, after = torch.zeros_like(hot), torch.zeros_like(hot)
        before[:, 1:] = hot[:, :-1]
        after[:, :-1] = hot[:, 1:] * self.encoder
        return {SITE.name: torch.cat([hot, before, after], dim=2)}


class Planted(Given):
    """0: token 3; 1: 5 after 4; 2: 6 or 7, the latter weaker; 3: 2 before 8, in an encoder; 4: one
    of 0 to 5 after BOS; 5: dead."""

    def encode(self, x):
        hot, before, after = x.split(15, dim=1)
        return torch.stack([
            2 * hot[:, 3],
            (hot[:, 5] + before[:, 4] - 1).relu() * 3,
            hot[:, 6] + 0.25 * hot[:, 7],
            (hot[:, 2] + after[:, 8] - 1).relu(),
            hot[:, :6].sum(1) * before[:, BOS],
            torch.zeros(len(x)),
        ], dim=1)  # fmt: skip


class Rows(Dataset):
    modality, rows = "tokens", None

    def load(self, ids):
        return [Example(int(i), self.rows[int(i)]) for i in ids]


def measured(
    *, encoder=False, bos=True, n_latents=10, seed=0, batch=10**9, tokens="all", **options
):
    host = bare(Grams, encoder=encoder, bos=bos)
    rng = np.random.default_rng(0)
    rows = rng.integers(0, VOCAB, (N_EXAMPLES, LENGTH)).tolist()
    inputs = host.prepare([Example(i, row) for i, row in enumerate(rows)])
    sae = Planted(torch.ones(6, 45), 1.0)
    selection = TokenSelection("all", drop_positions=(0,))
    keep = selection.mask(SITE, inputs, inputs.tensors["tokens"].shape[1])
    example, position = keep.nonzero(as_tuple=True)
    latents = sae.encode(host.record(inputs, [])[SITE.name][keep])
    order = 7 if batch < 10**9 else None
    codes = codes_of(latents, ids=example, position=position, batch=batch, order_seed=order)
    dataset = bare(Rows, rows=rows)
    setting = Setting(dataset, lambda: host, SITE, replace(selection, tokens=tokens))
    evaluator = EVALUATORS.build({**CFG, "n_silent": 10, "n_bootstrap": 50, **options})
    evaluator.check(setting)
    evaluator.start(
        context_of(
            codes, sae=sae, seed=seed, setting=setting, dataset=lambda: dataset,
            model=lambda: host, n_latents=n_latents,
        )
    )  # fmt: skip
    findings = evaluator.finish()
    assert_publishable(findings)
    return findings, host


def of_latent(findings, latent):
    columns = findings.tables["latents"]
    at = columns["feature"].index(latent)
    return {name: column[at] for name, column in columns.items()}


def test_planted_ngrams_are_found_and_predict_others():
    findings, host = measured()
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


def test_means_are_those_of_the_table():
    findings, _ = measured()
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
    columns = measured()[0].tables["latents"]
    for explain, score in zip(columns["explain_ids"], columns["score_ids"], strict=True):
        assert len(explain) == 15 and len(score) == 30
        assert len({*explain, *score}) == 45


def test_an_encoder_runs_texts_up_to_the_token_and_counts_what_needs_the_right():
    findings, _ = measured(encoder=True)
    assert of_latent(findings, 0)["explanation"] == " 3"
    assert of_latent(findings, 0)["spearman"] == 1
    row = of_latent(findings, 3)
    assert row["explanation"].startswith("(^)") and abs(row["spearman"]) < 0.1
    metrics = findings.metrics["autointerp"]
    assert metrics["n_scored"] == 5
    assert metrics["not_reproduced_frac"] == pytest.approx(0.2)


def test_a_first_token_that_is_no_row_of_the_sae_counts_as_inactive():
    findings, _ = measured(bos=False)  # The selection drops position 0.
    row = of_latent(findings, 0)
    assert row["explanation"] == "(*) 3" and row["spearman"] == 1


def test_the_same_seed_gives_the_same_whatever_the_batches():
    one, other = measured()[0], measured(batch=37)[0]
    assert one.metrics == other.metrics and one.ci == other.ci
    assert one.tables["latents"] == other.tables["latents"]
    assert (
        measured(seed=1)[0].tables["latents"]["score_ids"] != (one.tables["latents"]["score_ids"])
    )


def test_fewer_latents_are_a_sample():
    columns = measured(n_latents=2)[0].tables["latents"]
    assert len(columns["feature"]) == 2 and set(columns["feature"]) <= {0, 1, 2, 4}


def test_one_latent_has_no_other_explanation_to_be_given():
    metrics = measured(n_latents=1)[0].metrics["autointerp"]
    assert metrics["n_scored"] == 1 and metrics["spearman_mean_shuffled"] is None


def test_none_active_enough_is_no_latent_scored():
    metrics = measured(fewest=399)[0].metrics["autointerp"]
    assert metrics["n_scored"] == 0 and metrics["n_dead"] == 6
    assert metrics["apl_mean"] is None


def test_what_cannot_be_explained_is_refused():
    with pytest.raises(ConfigError, match=r"site\.tokens=mean: n-gram templates"):
        measured(tokens="mean")
    site = replace(SITE, has_cls=True)
    setting = Setting(bare(Rows), lambda: bare(Model), site, TokenSelection("all"))
    with pytest.raises(ConfigError, match="need a model of text; for images use"):
        EVALUATORS.build(CFG).check(setting)
    for backend, message in (
        ("lm", r"backend=lm: choose with evaluators=\[NAME\]"),
        ({"type": "ngrams"}, "backend.type=ngrams: no such type. Did you mean 'ngram'"),
        ({"type": "ngram", "longest": 0}, "backend.longest=0: must be > 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            EVALUATORS.build({**CFG, "backend": backend}).check(setting)
    for key, value in (("fewest", 3), ("n_bootstrap", 5)):
        with pytest.raises(ConfigError, match=f"evaluators.autointerp.{key}={value}"):
            EVALUATORS.build({**CFG, key: value})
