"""Language-model autointerp against a local server that answers well, badly, slowly, not at all."""

import json
import logging

import numpy as np
import pytest
import torch
from chat_server import serving
from codes_fixtures import bare
from gram_host import SITE, Grams, Rows, measured, of_latent

from sae_runner.config import preset
from sae_runner.errors import ConfigError
from sae_runner.evaluators import EVALUATORS
from sae_runner.evaluators._explainers import _asking
from sae_runner.evaluators._explainers._asking import Asking, OverBudget, Unparsed
from sae_runner.evaluators._explainers._endpoint import Endpoint, Speaker, Unanswered
from sae_runner.evaluators._explainers._excerpts import explained_excerpts, marked_excerpts
from sae_runner.evaluators._explainers.base import Case, Shown
from sae_runner.evaluators._showing import TextWindow
from sae_runner.evaluators.base import Setting
from sae_runner.models.base import Model
from sae_runner.site import TokenSelection

CFG = preset("evaluators", "autointerp_lm")["autointerp_lm"]
KEY = "sk-a-very-secret-key-0123456789"
QUICK = {"retries": 1, "backoff": 0.01, "timeout": 30.0, "concurrency": 4, "model": "toy"}


def asked(url, *, folder=None, backend=(), **options):
    """Findings about two planted latents, of tokens 3 and 6, and how the host was run."""
    given = {**CFG["backend"], **QUICK, "base_url": url, **dict(backend)}
    return measured({**CFG, "backend": given}, folder=folder, **options)[0]


def texts_below(folder):
    return "".join(p.read_text(errors="replace") for p in folder.rglob("*") if p.is_file())


def test_somebody_who_understands_scores_1_for_latents_of_one_token():
    with serving() as server:
        findings = asked(server.url)
    metrics = findings.metrics["autointerp"]
    row = of_latent(findings, 0)
    assert row["explanation"] == "the token 3"
    assert row["detection_balacc"] == row["fuzz_balacc"] == 1
    assert metrics["detection_balacc"] > 0.7 > metrics["detection_balacc_shuffled"]
    assert metrics["n_scored"] == 4 and metrics["n_unscored"] == 0 and metrics["n_unparsed"] == 0
    assert metrics["spearman_mean"] is None and findings.incomplete == ""  # Not simulated.
    bodies = server.requests
    assert all(body["temperature"] == 0 and body["model"] == "toy" for body in bodies)
    assert set(server.paths) == {"/v1/chat/completions"}
    assert len(bodies) <= 4 * (1 + 2 * 2 + 1)
    assert not any("Authorization" in headers for headers in server.headers)


def test_simulation_gives_correlations():
    with serving() as server:
        findings = asked(server.url, backend={"simulate": True, "fuzz": False})
    row = of_latent(findings, 0)
    assert row["spearman"] == row["auc"] == 1 and row["fuzz_balacc"] is None
    assert findings.metrics["autointerp"]["spearman_mean_shuffled"] is None


def test_answers_are_kept_and_no_question_is_asked_twice(tmp_path):
    with serving() as server:
        first = asked(server.url, folder=tmp_path)
        n = len(server.requests)
        again = asked(server.url, folder=tmp_path)
        assert len(server.requests) == n
        assert first.metrics == again.metrics and first.tables == again.tables
        # A run that was killed: a part of the answers, and of the last one but a piece.
        path = tmp_path / "answers.jsonl"
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(lines[:5]) + lines[5][:20])
        logging.disable(logging.WARNING)
        try:
            third = asked(server.url, folder=tmp_path)
        finally:
            logging.disable(logging.NOTSET)
        assert third.metrics == first.metrics
        assert len(server.requests) == n + len(lines) - 5
        asked(server.url, folder=tmp_path)
        assert len(server.requests) == n + len(lines) - 5


def test_the_key_goes_into_the_header_and_nowhere_else(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("TOY_KEY", KEY)
    backend = {"key_env": "TOY_KEY"}
    with caplog.at_level(logging.DEBUG), serving("echo") as server:  # It repeats the key.
        findings = asked(server.url, folder=tmp_path, backend=backend)
        assert all(h["Authorization"] == f"Bearer {KEY}" for h in server.headers)
    assert KEY not in texts_below(tmp_path) and "***" in texts_below(tmp_path)
    assert KEY not in repr(findings) and KEY not in caplog.text
    for mode in ("400", "500", "redirect", "html"):
        with caplog.at_level(logging.DEBUG), serving(mode) as server:
            findings = asked(server.url, folder=tmp_path / mode, backend=backend)
            assert "/v1/chat/completions/elsewhere" not in server.paths
        assert KEY not in repr(findings) + caplog.text + texts_below(tmp_path)


@pytest.mark.parametrize(
    ("mode", "why", "tries"),
    [
        ("500", "HTTP 500", 2),
        ("429", "HTTP 429", 2),
        ("400", "HTTP 400", 1),
        ("401", "HTTP 401", 1),
        ("redirect", "HTTP 302", 1),
        ("html", "no chat completion", 2),
        ("empty", "no chat completion", 2),
        ("slow", "no answer within 0.3 s", 2),
    ],
)
def test_an_endpoint_that_fails_leaves_latents_without_a_score(mode, why, tries, tmp_path):
    with serving(mode) as server:
        findings = asked(
            server.url, folder=tmp_path, backend={"timeout": 0.3 if mode == "slow" else 30.0}
        )
        assert len(server.requests) == 4 * tries  # One question of each latent.
    metrics = findings.metrics["autointerp"]
    assert metrics["n_scored"] == 0 and metrics["n_unscored"] == 4
    assert metrics["detection_balacc"] is None
    assert findings.incomplete.startswith("4 of 4 latents are without a score: ")
    assert why in findings.incomplete
    assert findings.tables["latents"]["scored"] == [False] * 4
    assert not (tmp_path / "answers.jsonl").exists()


def test_nobody_there():
    with serving() as server:
        url = server.url
    findings = asked(url)
    assert findings.incomplete == "4 of 4 latents are without a score: no connection"


def test_what_passes_is_asked_again_and_what_failed_is_asked_by_the_next_run(tmp_path):
    with serving("flaky") as server:  # Every other answer is a 500.
        backend = {"concurrency": 1}
        findings = asked(server.url, folder=tmp_path, backend=backend)
        assert findings.incomplete == "" and findings.metrics["autointerp"]["n_scored"] == 4
    with serving("500") as server:
        first = asked(server.url, folder=tmp_path / "b")
        assert first.metrics["autointerp"]["n_scored"] == 0
        server.mode = "good"
        second = asked(server.url, folder=tmp_path / "b")
        assert second.incomplete == "" and second.metrics["autointerp"]["n_scored"] == 4


def test_nobody_is_asked_for_ever(monkeypatch):
    monkeypatch.setattr(_asking, "FAILURES_IN_A_ROW", 2)
    with serving("400") as server:
        findings = asked(server.url, backend={"concurrency": 1})
        assert len(server.requests) == 2
    assert findings.incomplete == "4 of 4 latents are without a score: HTTP 400"


def test_replies_that_cannot_be_understood_count_as_wrong():
    with serving() as server:
        server.spoil = lambda prompt: "right tokens" in prompt and "the token 3" in prompt
        findings = asked(server.url, backend={"shuffled": False})
    row = of_latent(findings, 0)
    assert row["fuzz_balacc"] == 0 and row["detection_balacc"] == 1
    n = findings.tables["latents"]["explanation"].count("the token 3")
    assert findings.metrics["autointerp"]["n_unparsed"] == n and findings.incomplete == ""


def test_a_latent_of_whose_replies_none_is_understood_has_no_score_and_is_asked_again(tmp_path):
    with serving() as server:
        server.spoil = lambda prompt: "responds to: the token 3" in prompt
        findings = asked(server.url, folder=tmp_path, backend={"shuffled": False})
        assert not of_latent(findings, 0)["scored"] and of_latent(findings, 1)["scored"]
        n_bad = findings.tables["latents"]["explanation"].count("the token 3")
        assert findings.incomplete == (
            f"{n_bad} of 4 latents are without a score: replies that cannot be understood"
        )
        server.spoil, n = lambda prompt: False, len(server.requests)
        again = asked(server.url, folder=tmp_path, backend={"shuffled": False})
        assert again.incomplete == "" and of_latent(again, 0)["detection_balacc"] == 1
        assert len(server.requests) == n + 3 * n_bad


def test_judgements_by_other_explanations_that_nobody_understands_are_told():
    with serving() as server:
        good, asked_of = server.answer, list[str]()

        def answer(handler, prompt):
            if "Which of the numbered" in prompt or "responds to" in prompt:
                asked_of.append(prompt)
            good(handler, prompt)

        server.answer = answer
        asked(server.url, backend={"concurrency": 1, "fuzz": False})
        blind = set(asked_of[len(asked_of) // 2 :])  # Own explanations come first.
        server.spoil = lambda prompt: prompt in blind
        findings = asked(server.url, backend={"concurrency": 1, "fuzz": False})
    assert findings.metrics["autointerp"]["n_scored"] == 4
    assert findings.incomplete == (
        "not all shuffled explanations are judged: replies that cannot be understood"
    )


def test_no_more_latents_are_begun_than_the_budget_can_finish(tmp_path, caplog):
    backend = {"max_calls": 13, "dollars_per_million": 2.0}  # Six for each latent.
    with caplog.at_level(logging.INFO), serving() as server:
        first = asked(server.url, folder=tmp_path, backend=backend)
        assert len(server.requests) <= 13
        assert first.metrics["autointerp"]["n_scored"] == 2
        assert "2 of 4 latents are without a score: backend.max_calls=13 is spent" in (
            first.incomplete
        )
        assert "up to 24 questions and " in caplog.text and "about $0." in caplog.text
        assert "limits: 13 questions" in caplog.text and "; 0 of the latents were" in caplog.text
        second = asked(server.url, folder=tmp_path, backend=backend)  # The rest.
        assert second.metrics["autointerp"]["n_scored"] == 4 and second.incomplete == ""
        # Not how many answers are kept: some are of other questions, or another model's.
        assert "; 2 of the latents were asked about before" in caplog.text


def test_the_budget_of_tokens_is_kept():
    with serving() as server:
        findings = asked(server.url, backend={"max_tokens": 1500, "concurrency": 1})
        spent = sum(len(b["messages"][0]["content"]) / 4 + b["max_tokens"] for b in server.requests)
    assert 0 < spent <= 1500
    assert "backend.max_tokens=1500 is spent" in findings.incomplete


def test_a_coin_scores_a_half_and_a_constant_yes_too():
    from chat_server import well

    with serving() as server:
        import chat_server

        rng = np.random.default_rng(0)

        def answer(prompt):
            if "share" in prompt:
                return well(prompt)
            return ", ".join(map(str, range(1, prompt.count("\n", prompt.index("1. ")) + 2)))

        def coin(prompt):
            numbers = answer(prompt)
            if "share" in prompt:
                return numbers
            return ", ".join(n for n in numbers.split(", ") if rng.random() < 0.5) or "None"

        original = chat_server.well
        try:
            chat_server.well = answer
            yes = asked(server.url)
            chat_server.well = coin
            by_coin = asked(server.url)
        finally:
            chat_server.well = original
    assert yes.metrics["autointerp"]["detection_balacc"] == 0.5
    assert yes.metrics["autointerp"]["fuzz_balacc"] == 0.5
    found = by_coin.metrics["autointerp"]["detection_balacc"]
    assert abs(found - 0.5) < 3 * np.sqrt(0.25 / (4 * 10))


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ({"base_url": None}, "base_url=URL or backend.local=FOLDER: give one"),
        ({"local": "x"}, "give one of them"),
        ({"base_url": "localhost:8000"}, "backend.base_url=localhost:8000: needs http"),
        ({"base_url": f"http://me:{KEY}@host/v1"}, "with a user, password or query"),
        ({"base_url": f"http://host/v1?api_key={KEY}"}, "with a user, password or query"),
        ({"model": None}, "backend.model=null"),
        ({"key_env": KEY}, "backend.key_env: no environment variable of that name"),
        ({"base_url": None, "local": "/absent"}, "backend.local=/absent: no such folder"),
        ({"timeout": 0}, "backend.timeout=0.0: must be > 0"),
    ],
)
def test_bad_input_is_refused_without_repeating_a_secret(backend, message):
    setting = Setting(bare(Rows), lambda: bare(Grams), SITE, TokenSelection("all"))
    given = {**CFG["backend"], **QUICK, "base_url": "http://localhost:1/v1", **backend}
    with pytest.raises(ConfigError, match=message) as raised:
        EVALUATORS.build({**CFG, "backend": given}).check(setting)
    assert KEY not in str(raised.value)


def test_images_and_means_are_refused():
    given = {**CFG["backend"], **QUICK, "base_url": "http://localhost:1/v1"}
    evaluator = EVALUATORS.build({**CFG, "backend": given})
    setting = Setting(bare(Rows), lambda: bare(Model), SITE, TokenSelection("all"))
    with pytest.raises(ConfigError, match="need a model of text"):
        evaluator.check(setting)
    setting = Setting(bare(Rows), lambda: bare(Grams), SITE, TokenSelection("mean"))
    with pytest.raises(ConfigError, match=r"site\.tokens=mean"):
        evaluator.check(setting)


# -- Parts ---------------------------------------------------------------------------------------


def window(example_id, acts):
    n = len(acts)
    return TextWindow(
        example_id, 0, torch.arange(n), [f" {i}" for i in range(n)], torch.tensor(acts),
        torch.ones(n, dtype=torch.bool), torch.zeros(n, dtype=torch.bool),
    )  # fmt: skip


def test_marks_are_from_three_tenths_of_the_maximum_and_moved_in_half_of_the_excerpts():
    acts = [[0.0, 10.0, 3.1, 2.9, 0.0], [0.0, 0.0, 0.0, 1.0, 0.0]]
    shown = [Shown(i, i, max(a), window(i, a)) for i, a in enumerate(acts)]
    assert explained_excerpts(Case(0, shown, [])) == [" 0<< 1 2>> 3 4", " 0 1 2<< 3>> 4"]
    silent = Shown(9, 9, 0.0, window(9, [0.0] * 5))
    many = [Shown(i, i, 10.0, window(i, acts[0])) for i in range(9)]
    texts, right = marked_excerpts(Case(0, shown, [*many, silent]), seed=0)
    assert right.sum() == 5 and len(texts) == 9
    for text, is_right in zip(texts, right, strict=True):
        assert (text == " 0<< 1 2>> 3 4") == is_right
        if not is_right:  # As many marks, on the two tokens where it is inactive.
            assert text == "<< 0>> 1 2 3<< 4>>"


def test_a_budget_and_replies_of_a_speaker():
    class Parrot(Speaker):
        def complete(self, prompt, max_tokens):
            return prompt

    asking = Asking(Parrot(), "it", None, max_calls=2, max_tokens=1000, concurrency=1)
    assert asking.ask("a", 10, str.upper) == "A" == asking.ask("a", 10, str.upper)
    assert asking.n_calls == 1 and asking.knows("a", 10) and not asking.knows("a", 11)
    with pytest.raises(Unparsed):
        asking.ask("b", 10, lambda reply: None)
    assert not asking.knows("b", 10) and asking.n_unparsed == 1
    with pytest.raises(OverBudget):
        asking.ask("c", 10, str.upper)
    assert asking.ask("a", 10, str.upper) == "A"  # What is known costs nothing.


def test_a_stop_ends_the_waiting():
    endpoint = Endpoint("http://127.0.0.1:9", "m", None, timeout=1, retries=50, backoff=60)
    endpoint.ended.set()
    with pytest.raises(Unanswered, match="stopped"):
        endpoint.complete("a", 5)


def test_another_wording_another_model_other_answers(tmp_path):
    with serving() as server:
        asked(server.url, folder=tmp_path)
        n = len(server.requests)
        asked(server.url, folder=tmp_path, backend={"model": "other"})
        assert len(server.requests) == 2 * n
    lines = [json.loads(x) for x in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert len({line["key"] for line in lines}) == len(lines) == 2 * n
