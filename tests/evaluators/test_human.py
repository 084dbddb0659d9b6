import json
import re

import numpy as np
import pytest
import torch
from codes_fixtures import bare
from evaluators.conftest import assert_publishable
from rating_fixtures import (
    CFG,
    D_SAE,
    SOURCES,
    TEXT,
    D,
    N,
    T,
    Words,
    answer,
    data_of,
    measured,
    rows_of,
    setting_of,
    turns_of,
    written,
)

from sae_runner.errors import ConfigError, InputError
from sae_runner.evaluators import EVALUATORS
from sae_runner.evaluators._controls import by_frequency
from sae_runner.evaluators._pack import item_id, plan
from sae_runner.evaluators.base import Setting
from sae_runner.models.base import Model
from sae_runner.site import TokenSelection


@pytest.fixture
def pack():
    found = measured()
    assert_publishable(found)
    return found


# -- The pack ------------------------------------------------------------------------------------


def test_a_pack_has_latents_and_all_controls_and_metrics_wait_for_responses(pack):
    data, metrics = data_of(pack), pack.metrics["human"]
    lines = [json.loads(line) for line in pack.texts["items.jsonl"].splitlines()]
    assert len(lines) == len(data["items"]) == metrics["n_items"] == 8 + 4 + 3 + 4
    assert {line["pack"] for line in lines} == {data["pack"]}
    assert metrics["total_median"] is None and metrics["n_responses"] == 0
    assert any("evaluators.human.responses=PATH" in note.detail for note in pack.notes)
    assert pack.tables == {} and pack.per_latent == {}
    # Outputs without names: nothing is to be scored by them.
    assert metrics["total_max"] == 11 and "logit_consistency" not in data["fields"]


def test_nothing_in_the_pack_says_what_an_item_is(pack):
    for text in (pack.texts["items.jsonl"], json.dumps(data_of(pack))):
        assert not [word for word in (*SOURCES, "quartile", "d_sae", "random") if word in text]
    items = data_of(pack)["items"]
    names = [item["item"] for item in items]
    assert names == sorted(names)  # Not by where they are from.
    allowed = {"item", "intervals", "low", "high", "examples", "example", "pieces", "acts", "peak"}
    keys = {
        k
        for item in items
        for i in item["intervals"]
        for e in i["examples"]
        for k in (*item, *i, *e)
    }
    assert keys == allowed
    # An id of the dataset, tokens and shares of the item's own largest: no number is a latent's.
    strongest = [max(max(e["acts"]) for e in i["intervals"][0]["examples"]) for i in items]
    assert all(255 * 10 / 11 - 1 < share <= 255 for share in strongest)


def test_ids_are_hmacs_of_seed_source_and_number():
    import hashlib
    import hmac

    expected = hmac.new(b"3", b"latent:7", hashlib.sha256).hexdigest()[:16]
    assert item_id(3, "latent", 7) == expected
    assert item_id(4, "latent", 7) != expected != item_id(3, "neuron", 7)


def test_examples_stand_in_their_intervals_the_strongest_first(pack):
    data, (_, f) = data_of(pack), rows_of()
    names = {item_id(0, "latent", j): j for j in range(D_SAE)}
    found = [(names[i["item"]], i) for i in data["items"] if i["item"] in names]
    assert len(found) == 8
    for j, item in found:
        best = f[:, j].view(N, T)
        largest = float(best.max())
        lows = [interval["low"] for interval in item["intervals"]]
        assert lows == sorted(lows, reverse=True) and item["intervals"][0]["high"] == 100
        for interval in item["intervals"]:
            assert len(interval["examples"]) <= 2
            for example in interval["examples"]:
                acts = best[example["example"]]
                share = float(acts.max()) / largest
                assert interval["low"] - 0.51 <= 100 * share <= interval["high"] + 0.51
                assert example["acts"] == [round(255 * float(a) / largest) for a in acts]
                assert example["pieces"] == [f" w{T * example['example'] + t}" for t in range(T)]
                assert example["peak"] == int(acts.argmax())


def test_neurons_and_directions_have_the_activations_of_their_coordinates(pack):
    data, (x, _) = data_of(pack), rows_of()
    names = {item_id(0, "neuron", j): j for j in range(D)}
    found = [(names[i["item"]], i) for i in data["items"] if i["item"] in names]
    assert len(found) == 4
    for j, item in found:
        values = x[:, j].relu().view(N, T)
        example = item["intervals"][0]["examples"][0]
        acts = values[example["example"]] / values.max()
        assert example["acts"] == [round(255 * float(a)) for a in acts]


def test_images_are_inline_each_once_with_the_activation_of_their_patches():
    data, (_, f) = data_of(measured(image=True)), rows_of()
    shown = {e["image"] for i in data["items"] for v in i["intervals"] for e in v["examples"]}
    assert shown == set(range(len(data["images"]))) and len(shown) <= N
    assert all(uri.startswith("data:image/png;base64,") for uri in data["images"])
    j = next(
        j for j in range(D_SAE) if item_id(0, "latent", j) in {i["item"] for i in data["items"]}
    )
    item = next(i for i in data["items"] if i["item"] == item_id(0, "latent", j))
    example = item["intervals"][-1]["examples"][0]
    heat = f[:, j].view(N, T)[example["example"], 1:] / f[:, j].max()
    assert example["heat"] == [round(255 * float(v)) for v in heat] and example["grid"] == [1, 2]


def test_the_page_fetches_nothing(pack):
    page = pack.texts["pack.html"]
    assert "default-src 'none'" in page and not re.search(r"https?://|src=(?!\")|url\(", page)


def test_the_same_pack_comes_again_whatever_the_batches_and_another_of_another_seed(pack):
    order = torch.randperm(N * T, generator=torch.Generator().manual_seed(1))
    assert measured(order=order, batch=7).texts == pack.texts
    assert data_of(measured(seed=1))["pack"] != data_of(pack)["pack"]


def test_latents_are_drawn_evenly_from_quartiles_of_frequency():
    frequency = np.random.default_rng(0).permutation(400) ** 2
    drawn = by_frequency(np.arange(400), frequency, 20, 0)
    edges = np.quantile(frequency, [0.25, 0.5, 0.75])
    assert np.bincount(np.searchsorted(edges, frequency[drawn])).tolist() == [5, 5, 5, 5]
    assert len(by_frequency(np.arange(400), frequency, 21, 0)) == 21
    assert by_frequency(np.arange(3), frequency, 8, 0).tolist() == [0, 1, 2]


# -- Who is shown what ---------------------------------------------------------------------------


def test_raters_share_some_items_split_the_rest_and_see_some_again():
    sources = {f"{s}{i}": s for s, n in (("a", 50), ("b", 50), ("c", 10)) for i in range(n)}
    turns = plan(sources, 3, 0.2, 0.05, seed=0)
    first = {rater: [t.item for t in its if not t.repeat] for rater, its in turns.items()}
    shared = set.intersection(*map(set, first.values()))
    assert len(shared) == 22 and sum(sources[i] == "c" for i in shared) == 2
    assert set.union(*map(set, first.values())) == sources.keys()
    rest = [set(its) - shared for its in first.values()]
    assert sum(map(len, rest)) == 88 and max(map(len, rest)) - min(map(len, rest)) <= 1
    for rater, its in turns.items():
        items = [t.item for t in its]
        again = [t.item for t in its if t.repeat]
        assert len(again) == round(0.05 * len(first[rater])) == len(set(again))
        for item in again:  # Not while it is fresh in mind.
            assert items[::-1].index(item) + items.index(item) < len(items) * 0.75
    assert turns["1"] != turns["2"] and [i for i in first["1"] if i in shared] != [
        i for i in first["2"] if i in shared
    ]
    assert plan(sources, 3, 0.2, 0.05, seed=0) == turns != plan(sources, 3, 0.2, 0.05, seed=1)


def test_a_lone_rater_sees_everything_and_half_of_the_raters_see_no_strengths(pack):
    turns = plan(dict.fromkeys("abcdefgh", "s"), 1, 0.0, 0.0, seed=0)
    assert sorted(t.item for t in turns["1"]) == list("abcdefgh")
    raters = data_of(measured(n_raters=4))["raters"]
    assert [raters[str(i)]["labels"] for i in range(1, 5)] == [True, False, True, False]


# -- What comes back -----------------------------------------------------------------------------


def test_responses_are_unblinded_and_scored_by_source(pack, tmp_path):
    data = data_of(pack)
    is_latent = {item_id(0, "latent", j) for j in range(D_SAE)}
    responses = [answer(data, rater, turn, 9 if turn[0] in is_latent else 2)
                 for rater, turn in turns_of(data)]  # fmt: skip
    paths = [
        written(tmp_path / f"r{n}.jsonl", [r for r in responses if r["rater"] == n]) for n in "12"
    ]
    found = measured(responses=str(tmp_path / "r*.jsonl"))
    assert_publishable(found)
    assert found.texts == pack.texts
    metrics = found.metrics["human"]
    assert metrics["n_rated"] == 8 and metrics["total_median"] == metrics["total_mean"] == 9
    for source in SOURCES[1:]:
        assert metrics[f"total_median_{source}"] == 2 and metrics[f"superiority_{source}"] == 1
        assert metrics[f"u_{source}"] == 8 * metrics[f"n_rated_{source}"]
        assert metrics[f"p_{source}"] < 0.05
    assert metrics["confidence_mean"] == 3 and metrics["confidence_mean_neuron"] == 2
    assert metrics["alpha_total"] == metrics["kappa_total"] == metrics["repeat_exact"] == 1
    assert metrics["repeat_mean_abs_diff"] == 0 and metrics["n_raters"] == 2
    assert found.ci["human.total_mean"] == {"se": 0, "lo": 9, "hi": 9, "n": 8}
    items = found.tables["items"]
    for name, source, number in zip(items["item"], items["source"], items["id"], strict=True):
        assert name == item_id(0, source, number)
    assert set(items["quartile"]) == {-1, 0, 1, 2, 3}
    assert len(found.tables["responses"]["item"]) == len(responses)
    assert measured(responses=paths).metrics == found.metrics


def test_an_item_is_worth_its_median_over_raters_repeats_aside(pack, tmp_path):
    data = data_of(pack)
    rated = [tuple(turn) for _, turn in turns_of(data)]
    twice = next(item for item, repeat in rated if repeat)
    rater = next(r for r, t in turns_of(data) if tuple(t) == (twice, 1))
    shared = next(i for i, _ in rated if rated.count((i, 0)) == 2 and i != twice)
    responses = [
        answer(data, "1", (shared, 0), 4), answer(data, "2", (shared, 0), 9),
        answer(data, rater, (twice, 0), 5), answer(data, rater, (twice, 1), 8),
    ]  # fmt: skip
    found = measured(responses=written(tmp_path / "r.jsonl", responses))
    items = dict(zip(found.tables["items"]["item"], found.tables["items"]["total"], strict=True))
    assert items[shared] == 6.5 and items[twice] == 5
    metrics, table = found.metrics["human"], found.tables["items"]
    for source in set(table["source"]):
        scores = [t for t, s in zip(table["total"], table["source"], strict=True)
                  if s == source and t is not None]  # fmt: skip
        suffix = "" if source == "latent" else f"_{source}"
        expected = np.mean(scores) if scores else None
        assert metrics[f"total_mean{suffix}"] == expected
    assert metrics["repeat_exact"] == 0 and metrics["repeat_mean_abs_diff"] == 3
    assert metrics["n_repeats"] == 1


def test_a_score_left_out_leaves_the_item_out_for_that_score_and_the_total(pack, tmp_path):
    data = data_of(pack)
    turns = [t for r, t in turns_of(data) if r == "1"][:6]
    responses = [answer(data, "1", t, 9) for t in turns]
    responses[0]["specificity"] = None
    found = measured(responses=written(tmp_path / "r.jsonl", responses))
    assert_publishable(found)
    totals = [v for v in found.tables["items"]["total"] if v is not None]
    scores = [v for v in found.tables["items"]["confidence"] if v is not None]
    assert len(scores) == len(totals) + 1
    assert found.metrics["human"]["alpha_total"] is None  # One rater agrees with nobody.
    assert found.metrics["human"]["kappa_total"] is None


def test_an_interpretation_may_hold_any_text(pack, tmp_path):
    data, said = data_of(pack), 'one\u2028two\u0085three\x0b "<b>"\r\n漢'
    response = {**answer(data, *turns_of(data)[0], 9), "interpretation": said}
    path = tmp_path / "r.jsonl"  # As a browser writes it: only what JSON must escape is escaped.
    path.write_text(json.dumps(response, ensure_ascii=False) + "\n", "utf-8")
    assert measured(responses=str(path)).tables["responses"]["interpretation"] == [said]


DAMAGES = {
    "it is no JSON": lambda text: text[:-20],
    "it lacks 'specificity'": lambda text: text.replace('"specificity"', '"specific"', 1),
    "it lacks 'seconds'": lambda text: text.replace('"seconds"', '"s"', 1),
    "confidence=4: not from 0 to 3": lambda t: re.sub(
        '"confidence": .', '"confidence": 4', t, count=1
    ),
    "interpretable=2: not from 0 to 1": lambda t: re.sub(
        '"interpretable": .', '"interpretable": 2', t, count=1
    ),
    "confidence=True": lambda t: re.sub('"confidence": .', '"confidence": true', t, count=1),
    "confidence=1.5": lambda t: re.sub('"confidence": .', '"confidence": 1.5', t, count=1),
    "rater=7: is a int": lambda t: t.replace('"rater": "1"', '"rater": 7', 1),
    "repeat=3: not 0 or 1": lambda t: re.sub('"repeat": .', '"repeat": 3', t, count=1),
    "it is empty": lambda text: "\n",
    "it is no response": lambda text: "[1]\n" + text,
    "has rated item": lambda text: text + text,
    "they are of several packs": lambda t: re.sub('"pack": "..', '"pack": "zz', t, count=1),
}  # fmt: skip


@pytest.mark.parametrize("message", DAMAGES)
def test_a_bad_response_file_is_refused_ahead_in_one_line(pack, tmp_path, message):
    data = data_of(pack)
    path = tmp_path / "r.jsonl"
    written(path, [answer(data, r, t, 9) for r, t in turns_of(data)])
    path.write_text(DAMAGES[message](path.read_text()))
    evaluator = EVALUATORS.build({**CFG, "responses": str(path)})
    with pytest.raises(ConfigError, match=f"^responses.*{re.escape(message)}") as error:
        evaluator.check(setting_of())
    assert "\n" not in str(error.value)


def test_absent_files_and_other_packs_are_refused(pack, tmp_path):
    with pytest.raises(ConfigError, match=r"^responses=nowhere\*: there is no such file"):
        EVALUATORS.build({**CFG, "responses": ["nowhere*"]}).check(setting_of())
    data = data_of(pack)
    path = written(tmp_path / "r.jsonl", [answer(data, *turns_of(data)[0], 9)])
    with pytest.raises(
        InputError, match=r"they are of pack \w{16}, not of pack \w{16}; use the opt"
    ):
        measured(responses=path, n_latents=7)
    changed = {**answer(data, *turns_of(data)[0], 9), "item": "f" * 16}
    other = written(tmp_path / "changed.jsonl", [changed])
    with pytest.raises(InputError, match=r"changed.jsonl: f{16} is no item of their pack \w{16};"):
        measured(responses=other)
    # Where the pack is on disk, nothing is computed first.
    (tmp_path / "items.jsonl").write_text(measured(seed=5).texts["items.jsonl"])
    with pytest.raises(InputError, match=r"not of .*items.jsonl.*make it again first"):
        measured(responses=path, folder=tmp_path)
    (tmp_path / "items.jsonl").write_text(pack.texts["items.jsonl"])
    assert measured(responses=path, folder=tmp_path).metrics["human"]["n_responses"] == 1


def test_scores_are_not_dropped_in_silence(pack, tmp_path, caplog):
    path = written(tmp_path / "r.jsonl", [answer(data_of(pack), *turns_of(data_of(pack))[0], 9)])
    measured(folder=tmp_path)
    (tmp_path / "items.parquet").touch()
    measured(responses=path, folder=tmp_path)
    assert "dropped" not in caplog.text
    measured(folder=tmp_path)
    assert "scores that are there are dropped" in caplog.text


def test_response_files_decide_what_is_measured(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text("one")
    evaluator = EVALUATORS.build({**CFG, "responses": str(path)})
    before = evaluator.reads()
    path.write_text("two")
    assert before.keys() == {"r.jsonl"} and evaluator.reads() != before
    assert EVALUATORS.build(CFG).reads() == {}


def test_rows_of_numbers_and_models_without_words_are_refused():
    with pytest.raises(ConfigError, match="holds rows of numbers"):
        EVALUATORS.build(CFG).check(setting_of(modality="rows"))
    mute = Setting(Words(), lambda: bare(Model), TEXT, TokenSelection("all"))
    with pytest.raises(ConfigError, match="no pieces of text"):
        EVALUATORS.build(CFG).check(mute)
