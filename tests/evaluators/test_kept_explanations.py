"""Explanations of one corpus, scored on another."""

import json

import pytest
from chat_server import serving
from explanation_fixtures import keep
from gram_host import TwoFaced, measured, of_latent

from sae_runner.config import preset
from sae_runner.errors import ConfigError
from sae_runner.evaluators import EVALUATORS
from sae_runner.report.retention import everywhere, retention, scores_of

CFG = preset("evaluators", "autointerp")["autointerp"]
LM = preset("evaluators", "autointerp_lm")["autointerp_lm"]
HERE, THERE = [*range(10), 11], [*range(9), 10, 11]
"""Tokens of two corpora: 9 is in the one alone, 10 in the other."""


def explained(folder, **options):
    """Findings on the corpus of the explanations, which are kept in `folder`."""
    findings, host = measured(CFG, **options)
    keep(findings, folder, data=host.data)
    return findings


def elsewhere(place, **options):
    return measured(CFG, explanations=str(place), **options)


def asked(url, *, max_calls=1000, **options):
    """Findings of a language model."""
    backend = {"base_url": url, "model": "toy", "max_calls": max_calls, "concurrency": 4}
    return measured({**LM, "backend": {**LM["backend"], **backend}}, **options)[0]


def scores(findings):
    return scores_of(findings.tables["latents"])


def test_of_the_same_data_the_same_examples_are_scored_and_none_explains(tmp_path):
    first = explained(tmp_path)
    again, host = elsewhere(tmp_path)
    one, two = first.tables["latents"], again.tables["latents"]
    for name in ("feature", "explanation", "spearman", "pearson", "auc", "score_ids", "recall"):
        assert one[name] == two[name], name
    for explain, score in zip(one["explain_ids"], two["score_ids"], strict=True):
        assert len(explain) == 15 and not {*explain} & {*score}
    found, notes = retention(scores(first), scores(again))
    assert found["retention"] == 1 and notes == []
    metrics = again.metrics["autointerp"]
    assert metrics["n_inactive"] == 0 and "not_reproduced_frac" not in metrics
    assert (
        metrics["spearman_mean_shuffled"] == first.metrics["autointerp"]["spearman_mean_shuffled"]
    )
    assert host.n_runs == 1  # To make the rows: no template is searched.
    assert not again.texts  # What is not explained here is kept there alone.


def test_a_latent_that_means_the_same_is_retained_and_one_that_does_not_is_not(tmp_path):
    first = explained(tmp_path, kind=TwoFaced, vocabulary=HERE)
    second, _ = elsewhere(tmp_path, kind=TwoFaced, vocabulary=THERE)
    assert of_latent(first, 5)["explanation"] == " 9"
    one, two = scores(first), scores(second)
    assert one[0] == one[5] == 1
    assert two[0] == 1 and of_latent(second, 0)["explanation"] == " 3"
    assert two[5] == 0 and of_latent(second, 5)["explanation"] == " 9"
    found, _ = retention({5: one[5]}, {5: two[5]})
    assert found["retention"] == 0
    found, _ = everywhere([two, two], None)
    assert found["uni_interp"] == pytest.approx(sum(two.values()) / len(two))
    # Of other data the ids say nothing: all active examples may be scored.
    assert of_latent(second, 0)["explain_ids"] == []
    assert {*of_latent(second, 0)["score_ids"]} & {*of_latent(first, 0)["explain_ids"]}


def test_a_latent_that_is_not_active_here_is_not_scored(tmp_path):
    explained(tmp_path, vocabulary=[3, 4, 5, 6, 7])
    second, _ = elsewhere(tmp_path, vocabulary=[4, 5, 6, 7])
    assert 0 not in second.tables["latents"]["feature"]
    assert second.metrics["autointerp"]["n_inactive"] == 1


def test_the_number_of_latents_is_that_of_the_explanations(tmp_path):
    first = explained(tmp_path)
    second, _ = elsewhere(tmp_path, n_latents=1, seed=5)
    assert second.tables["latents"]["feature"] == first.tables["latents"]["feature"]


def test_every_place_that_means_them(tmp_path):
    for folder in (tmp_path / "eval" / "step_00000010", tmp_path / "eval" / "step_00000009"):
        first = explained(folder, n_latents=2 + int(folder.name[-1] == "0"))
        (folder / "report.json").write_text("{}")
        (folder / "density.json").write_text('{"type": "density", "artifacts": {}}')
    folder = tmp_path / "eval" / "step_00000010"
    found = [
        EVALUATORS.build({**CFG, "explanations": str(path)}).reads()["explanations"]
        for path in (tmp_path, folder, folder / "autointerp.json")
    ]
    assert len(set(found)) == 1
    other = EVALUATORS.build({**CFG, "explanations": str(folder.parent / "step_00000009")})
    assert other.reads()["explanations"] != found[0]
    keep(first, folder, name="second")
    with pytest.raises(ConfigError, match=r"means several evaluations; use one of .*, .*second.js"):
        elsewhere(folder)


def test_what_is_of_no_use_here_is_refused_in_a_line(tmp_path):
    folder = tmp_path / "good"
    findings = explained(folder)
    refused = [
        (tmp_path / "gone", {}, "there is no such folder"),
        (tmp_path, {}, r"no explanations are kept there; `sae-run eval checkpoint=RUN"),
        (folder, {"weights": "b" * 64}, r"they are of the SAE an SAE, this is b{12}$"),
        (folder, {"weights": None}, r"they are of the SAE an SAE, this one is not trained yet"),
        (keep(findings, tmp_path / "host", host="c" * 64), {}, r"they are of model c{12}, this is"),
        (folder, {"folder": folder / "autointerp"}, "they are this evaluation's own"),
    ]  # fmt: skip
    for place, options, message in refused:
        with pytest.raises(ConfigError, match=f"explanations={place}: .*{message}") as error:
            elsewhere(place, **options)
        assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match=f"explanations={folder}: autointerp.json is of backend"):
        asked("http://localhost:1", explanations=str(folder))
    path = folder / "autointerp" / "explanations.json"
    sound = path.read_text()
    for text in (sound[:-40], sound.replace("explanations/1", "explanations/9"), "[]",
                 sound.replace('"rule": [[[', '"rule": [[["x", ', 1)):  # fmt: skip
        assert text != sound
        path.write_text(text)
        with pytest.raises(ConfigError, match=r"explanations\.json is damaged: "):
            elsewhere(folder)
    path.write_text(json.dumps({**json.loads(sound), "latents": []}))
    with pytest.raises(ConfigError, match="no latent was explained there"):
        elsewhere(folder)


def test_an_sae_of_another_library_is_known_by_its_own_file(tmp_path):
    findings = explained(tmp_path)
    keep(findings, tmp_path, source_sha256="d" * 64)
    found, _ = elsewhere(tmp_path, weights="d" * 64)
    assert found.metrics["autointerp"]["n_scored"] == 4


def test_a_language_model_judges_what_was_said_elsewhere(tmp_path):
    with serving() as server:
        first = asked(server.url)
        keep(first, tmp_path, name="lm")
        n = len(server.requests)
        again = asked(server.url, explanations=str(tmp_path), folder=tmp_path / "own")
        questions = [body["messages"][-1]["content"] for body in server.requests[n:]]
        assert questions and not any("activate one unit" in text for text in questions)
        assert again.tables["latents"]["explanation"] == first.tables["latents"]["explanation"]
        assert of_latent(again, 0)["detection_balacc"] == 1
        # Of other data: as in the files, whose `data` is none of these.
        assert of_latent(again, 0)["explain_ids"] == []


def test_a_budget_begins_no_latent_that_it_cannot_finish(tmp_path):
    with serving() as server:
        keep(asked(server.url), tmp_path, name="lm")
        options = {"explanations": str(tmp_path), "folder": tmp_path / "own"}
        found = asked(server.url, max_calls=13, **options)
        n_scored = found.metrics["autointerp"]["n_scored"]
        assert 0 < n_scored < 4 and "max_calls=13 is spent" in found.incomplete
        # Those that are answered are there again, and others get their turn.
        found = asked(server.url, max_calls=13, **options)
        assert found.metrics["autointerp"]["n_scored"] > n_scored
