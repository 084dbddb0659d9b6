"""Against NumPy on a small host, and against what must come out of SAEs that are known."""

from math import log

import numpy as np
import pytest
import torch
from host_fixtures import SITE, VOCAB, D, Host
from numpy.testing import assert_allclose
from scipy.special import log_softmax

from sae_runner.errors import ConfigError
from sae_runner.evaluators import EVALUATORS, _predictions
from sae_runner.evaluators._predictions import Head, Places, head_of, judge
from sae_runner.evaluators.base import Setting
from sae_runner.evaluators.downstream_loss import Category, gap
from sae_runner.models._text import TextTower
from sae_runner.models.base import Inputs
from sae_runner.models.open_clip import OpenCLIP
from sae_runner.site import TokenSelection

CFG = {"type": "downstream_loss", "templates": None, "n_bootstrap": 0}
NAMES = tuple(f"class_{i}" for i in range(VOCAB))


def shrink(x):
    return 0.5 * x + 0.3


def squash(x):
    return 0.2 * x + 0.3


class Tower(Host, TextTower):
    """Image embeddings are the means of the last block's tokens."""

    output = "features"
    logit_scale, logit_bias = 3.0, -0.5
    templates = ("a {}", "one {} here")

    def forward(self, inputs):
        x = self.network.embed[inputs.tensors["tokens"]]
        for block in self.network.blocks:
            x = block(x)
        return x.mean(1)

    def encode_text(self, texts):
        rows = []
        for text in texts:
            assert "_" not in text
            seed = sum(ord(c) * (i + 1) for i, c in enumerate(text))
            rows.append(torch.randn(D, generator=torch.Generator().manual_seed(seed)))
        return torch.stack(rows).double()


@pytest.fixture
def replaced(reference, host, inputs, selection):
    """Logits of NumPy with `change` at the selected tokens."""
    keep = selection.mask(host.sites()[SITE], inputs, 5).numpy()[:, :, None]
    tokens = inputs.tensors["tokens"].numpy()

    def run(change, of=host):
        return reference(of, tokens, lambda x: np.where(keep, change(x), x))

    return run


def on_the_labels(inputs, labels):
    return Inputs(inputs.ids, inputs.tensors, inputs.attended, inputs.special, torch.tensor(labels))


def test_two_outcomes_have_the_divergence_and_the_distance_of_the_book():
    p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log()
    at = Places(torch.tensor([0]), None, torch.tensor([1]))
    found = judge(p.double(), q.double(), at)
    assert_allclose([found.kl, found.tv, found.ce], [[0.510826], [0.4], [-log(0.1)]], atol=1e-6)
    assert_allclose(judge(q.double(), p.double(), at).kl, [0.368064], atol=1e-6)


def test_uniform_logits_cost_the_log_of_their_number():
    at = Places(torch.tensor([0, 0]), torch.tensor([0, 1]), torch.tensor([3, 6]))
    flat = torch.full((1, 3, 7), 2.0)
    assert_allclose(judge(flat, flat, at).ce, [log(7)] * 2, rtol=1e-6)


def test_a_token_that_is_masked_out_adds_nothing_and_half_precision_is_left():
    logits = torch.tensor([[0.0, 1.0, -torch.inf]])
    at = Places(torch.tensor([0]), None, torch.tensor([1]))
    found = judge(logits, logits + torch.tensor([0.5, 0, 0]), at)
    p = np.exp([0, 1]) / np.exp([0, 1]).sum()
    q = np.exp([0.5, 1]) / np.exp([0.5, 1]).sum()
    assert_allclose(found.kl, [(p * np.log(p / q)).sum()], rtol=1e-5)
    half = judge(torch.tensor([[0.0, 1, 2]]).half(), torch.tensor([[0.0, 1, 3]]).half(), at)
    full = judge(torch.tensor([[0.0, 1, 2]]), torch.tensor([[0.0, 1, 3]]), at)
    assert half.kl == full.kl


def test_every_metric_is_that_of_numpy(measure_spliced, inputs, replaced):
    found = measure_spliced(CFG, squash, [inputs]).metrics["downstream_loss"]
    tokens, own = inputs.tensors["tokens"].numpy(), inputs.attended.numpy()
    at = own[:, :-1] & own[:, 1:]
    at[:, 0] = False  # The first token is never replaced.
    target = tokens[:, 1:][at]
    runs = {
        "clean": lambda x: x, "recon": squash, "zero": np.zeros_like,
        "mean": lambda x: np.full_like(x, 0.25),
    }  # fmt: skip
    lp = {name: log_softmax(replaced(c)[0], axis=-1)[:, :-1][at] for name, c in runs.items()}
    ce = {name: -rows[np.arange(len(target)), target].mean() for name, rows in lp.items()}
    p = np.exp(lp["clean"])
    kl = {n: (p * (lp["clean"] - lp[n])).sum(1).mean() for n in ("recon", "zero", "mean")}
    first = {name: rows.argmax(1) for name, rows in lp.items()}
    expected = {
        "kl": kl["recon"], "kl_zero": kl["zero"], "kl_mean": kl["mean"],
        "kl_score_zero": (kl["zero"] - kl["recon"]) / kl["zero"],
        "kl_score_mean": (kl["mean"] - kl["recon"]) / kl["mean"],
        "ce_increase": ce["recon"] - ce["clean"],
        "ce_recovered_zero": (ce["zero"] - ce["recon"]) / (ce["zero"] - ce["clean"]),
        "ce_recovered_mean": (ce["mean"] - ce["recon"]) / (ce["mean"] - ce["clean"]),
        "top1_agreement": (first["clean"] == first["recon"]).mean(),
        "tv": np.abs(p - np.exp(lp["recon"])).sum(1).mean() / 2,
        "n_predictions": at.sum(),
        **{f"ce_{name}": value for name, value in ce.items()},
        **{f"top1_acc_{name}": (rows == target).mean() for name, rows in first.items()},
    }  # fmt: skip
    assert found.keys() == expected.keys()
    assert kl["recon"] > 0.01 and expected["n_predictions"] == 6
    assert 0 < expected["top1_agreement"] < 1
    for name, value in expected.items():
        assert_allclose(found[name], value, rtol=1e-9, err_msg=name)


def test_cross_entropy_is_pytorchs(measure_spliced, inputs, host):
    every = TokenSelection("all", drop_special=False)
    found = measure_spliced(CFG, shrink, [inputs], selection=every).metrics["downstream_loss"]
    tokens = inputs.tensors["tokens"]
    logits = host.forward(inputs)[:, :-1]
    target = torch.where(inputs.attended[:, 1:], tokens[:, 1:], -100)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())
    assert_allclose(found["ce_clean"], expected.detach(), rtol=1e-9)


@pytest.mark.parametrize("position", [0, 1, 2])
def test_places_before_the_first_replaced_token_do_not_count(
    measure_spliced, inputs, host, reference, position
):
    one = TokenSelection("positions", positions=(position,), drop_special=False)
    keep = one.mask(host.sites()[SITE], inputs, 5).numpy()[:, :, None]
    tokens, own = inputs.tensors["tokens"].numpy(), inputs.attended.numpy()
    clean = log_softmax(reference(host, tokens)[0], axis=-1)
    other = reference(host, tokens, lambda x: np.where(keep, squash(x), x))[0]
    kl = (np.exp(clean) * (clean - log_softmax(other, axis=-1))).sum(-1)
    assert not kl[:, :position].any() and kl[0, position:].all()  # What comes later is changed.
    at = (own[:, :-1] & own[:, 1:])[:, position:]
    ce = -np.take_along_axis(clean[:, :-1], tokens[:, 1:, None], 2)[:, position:, 0]
    found = measure_spliced(CFG, squash, [inputs], selection=one).metrics["downstream_loss"]
    assert found["n_predictions"] == at.sum() == {0: 9, 1: 6, 2: 3}[position]
    assert_allclose(found["kl"], kl[:, position:-1][at].mean(), rtol=1e-9)
    assert_allclose(found["ce_clean"], ce[at].mean(), rtol=1e-9)


def test_places_are_counted_from_where_a_token_is_replaced_padding_on_the_left_or_not():
    tokens = torch.arange(1, 13).view(2, 6)
    own = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]], dtype=torch.bool)
    replaced = torch.tensor([[0, 0, 0, 1, 0, 1], [0, 0, 1, 0, 0, 0]], dtype=torch.bool)
    inputs = Inputs(torch.arange(2), {"tokens": tokens}, own)
    found = Head("tokens", 0).places(inputs, torch.zeros(2, 6, 3), replaced)
    assert found.example.tolist() == [0, 0, 1, 1]
    assert found.position.tolist() == [3, 4, 2, 3]
    assert found.target.tolist() == [5, 6, 10, 11]


def test_where_only_the_last_token_is_replaced_nothing_is_predicted(measure_spliced, inputs):
    last = TokenSelection("last")
    found = measure_spliced(CFG | {"n_bootstrap": 100}, shrink, [inputs], selection=last)
    values = found.metrics["downstream_loss"]
    assert values.pop("n_predictions") == 0 and set(values.values()) == {None}
    assert {note.detail for note in found.notes} == {
        "nothing that is predicted comes after a replaced token"
    }


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda x: x, {"kl": 0, "ce_increase": 0, "ce_recovered_zero": 1, "ce_recovered_mean": 1,
                       "kl_score_zero": 1, "kl_score_mean": 1, "top1_agreement": 1, "tv": 0}),
        (torch.zeros_like, {"ce_recovered_zero": 0, "kl_score_zero": 0}),
        (lambda x: torch.full_like(x, 0.25), {"ce_recovered_mean": 0, "kl_score_mean": 0}),
    ],
    ids=["identity", "zero", "mean"],
)  # fmt: skip
def test_known_saes_recover_what_they_must(measure_spliced, inputs, change, expected):
    found = measure_spliced(CFG, change, [inputs]).metrics["downstream_loss"]
    assert {name: found[name] for name in expected} == expected  # To the last bit.


def test_batches_their_order_and_slabs_change_nothing(measure_spliced, inputs, monkeypatch):
    cfg = CFG | {"n_bootstrap": 200}
    whole = measure_spliced(cfg, shrink, [inputs])
    monkeypatch.setattr(_predictions, "CHUNK", 2 * VOCAB)
    parts = measure_spliced(cfg, shrink, inputs.split(1)[::-1])
    assert whole.ci.keys() == parts.ci.keys() and len(whole.ci) > 15
    for name, value in whole.metrics["downstream_loss"].items():
        assert_allclose(parts.metrics["downstream_loss"][name], value, rtol=1e-9, err_msg=name)
    for name, interval in whole.ci.items():
        metric = whole.metrics["downstream_loss"][name.split(".")[1]]
        assert interval["n"] == 3 and interval["lo"] <= metric <= interval["hi"]
        assert_allclose(parts.ci[name]["se"], interval["se"], rtol=1e-6, atol=1e-12)
    kl = whole.ci["downstream_loss.kl"]
    assert kl["lo"] < kl["hi"]


@pytest.mark.parametrize("output", ["token_logits", "class_logits"])
def test_an_example_in_which_nothing_is_replaced_is_left_out(measure_spliced, inputs, host, output):
    host.output = output
    short = Inputs(
        torch.tensor([7]), {"tokens": torch.tensor([[0, 0, 0, 0, 0]])},
        torch.tensor([[True, True, False, False, False]]), torch.ones(1, 5, dtype=torch.bool),
    )  # fmt: skip
    found = measure_spliced(CFG, shrink, [inputs, short]).metrics
    assert found == measure_spliced(CFG, shrink, [inputs]).metrics


# -- Classifiers ---------------------------------------------------------------------------------


@pytest.fixture
def classifier():
    made = Host()
    made.output = "class_logits"
    return made


def test_a_classifier_is_measured_at_its_labels(
    measure_spliced, labels_of_names, classifier, inputs, replaced
):
    labelled = on_the_labels(inputs, [3, -1, 5])
    found = measure_spliced(
        CFG, shrink, [labelled], host=classifier, dataset=labels_of_names
    ).metrics["downstream_loss"]
    lp = {
        name: log_softmax(replaced(change)[0].mean(1), axis=1)
        for name, change in {
            "clean": lambda x: x, "recon": shrink, "zero": np.zeros_like,
        }.items()
    }  # fmt: skip
    p = np.exp(lp["clean"])
    assert_allclose(found["kl"], (p * (lp["clean"] - lp["recon"])).sum(1).mean(), rtol=1e-9)
    for name, rows in lp.items():
        assert_allclose(found[f"ce_{name}"], -(rows[0, 3] + rows[2, 5]) / 2, rtol=1e-9)
        right = [rows[0].argmax() == 3, rows[2].argmax() == 5]
        assert found[f"acc_{name}"] == np.mean(right)
    assert (found["n_predictions"], found["n_labelled"]) == (3, 2)
    assert "top1_acc_clean" not in found


def test_accuracy_recovered_is_a_share_of_what_the_ablation_costs(
    measure_spliced, labels_of_names, classifier, inputs
):
    clean = classifier.forward(inputs).argmax(1).tolist()
    labelled = on_the_labels(inputs, clean)
    options = {"host": classifier, "dataset": labels_of_names}
    found = measure_spliced(CFG, lambda x: x, [labelled], **options).metrics["downstream_loss"]
    assert found["acc_clean"] == 1 and found["acc_zero"] < 1 and found["acc_recovered_zero"] == 1
    found = measure_spliced(CFG, torch.zeros_like, [labelled], **options).metrics
    assert found["downstream_loss"]["acc_recovered_zero"] == 0


@pytest.mark.parametrize(
    ("names", "labels", "why"),
    [
        (None, None, "the dataset has no labels"),
        (("a", "b"), [0, 1, 1], "the labels are of 2 classes, the logits of 11"),
        (NAMES, [-1, -1, -1], "no example with a label"),
    ],
)
def test_without_labels_a_classifier_has_no_accuracy(
    measure_spliced, make_labels, classifier, inputs, names, labels, why
):
    batch = inputs if labels is None else on_the_labels(inputs, labels)
    found = measure_spliced(CFG, shrink, [batch], host=classifier, dataset=make_labels(names))
    metrics = found.metrics["downstream_loss"]
    assert metrics["kl"] > 0 and metrics["top1_agreement"] is not None
    nulls = {name for name, value in metrics.items() if value is None}
    assert nulls >= {"ce_clean", "ce_recovered_zero", "acc_recon", "acc_recovered_mean"}
    assert {note.metric.split(".")[1] for note in found.notes if note.detail == why} == nulls


# -- Text towers ---------------------------------------------------------------------------------


def test_a_text_tower_is_measured_by_names_at_its_own_temperature(
    measure_spliced, labels_of_names, inputs, replaced
):
    tower = Tower()

    def unit(rows):
        return rows / np.linalg.norm(rows, axis=-1, keepdims=True)

    texts = [[f"a class {i}", f"one class {i} here"] for i in range(VOCAB)]
    classes = unit(np.stack([unit(tower.encode_text(t).numpy()).mean(0) for t in texts]))
    v = {n: unit(replaced(c, tower)[1][-1].mean(1)) for n, c in
         {"clean": lambda x: x, "recon": shrink}.items()}  # fmt: skip
    lp = {name: log_softmax(3.0 * rows @ classes.T - 0.5, axis=1) for name, rows in v.items()}
    choices = (-lp["clean"]).argsort(1)
    labels = [int(choices[0, 2]), int(choices[1, 7]), -1]
    labelled = on_the_labels(inputs, labels)
    found = measure_spliced(CFG, shrink, [labelled], host=tower, dataset=labels_of_names).metrics
    loss, shot = found["downstream_loss"], found["zeroshot"]
    assert shot["acc_clean"] == 0 and shot["acc5_clean"] == 0.5
    p = np.exp(lp["clean"])
    assert_allclose(loss["kl"], (p * (lp["clean"] - lp["recon"])).sum(1).mean(), rtol=1e-9)
    assert_allclose(shot["embed_cos"], (v["clean"] * v["recon"]).sum(1).mean(), rtol=1e-9)
    assert shot["embed_cos"] < 0.999
    for name, rows in lp.items():
        one, other = labels[:2]
        assert_allclose(loss[f"ce_{name}"], -(rows[0, one] + rows[1, other]) / 2, rtol=1e-9)
        order = (-rows).argsort(1)
        assert shot[f"acc_{name}"] == np.mean([order[0, 0] == one, order[1, 0] == other])
        assert shot[f"acc5_{name}"] == np.mean([one in order[0, :5], other in order[1, :5]])
    assert shot["agreement"] == (lp["clean"].argmax(1) == lp["recon"].argmax(1)).mean()
    assert (shot["n_labelled"], shot["n_classes"], shot["logit_scale"]) == (2, VOCAB, 3.0)
    assert not {"acc_clean", "top1_acc_clean"} & loss.keys()


def test_templates_may_be_others_than_the_models(labels_of_names):
    tower = Tower()
    own, other = head_of(tower, labels_of_names, None), head_of(tower, labels_of_names, ["my {}"])
    assert not torch.allclose(own.classes, other.classes)
    assert_allclose(other.classes.norm(dim=1), 1)
    assert_allclose(own.logits(5 * own.classes).diagonal(), tower.logit_scale + tower.logit_bias)


# -- Denominators --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ablated", "accuracy", "value", "code"),
    [
        (2.0, False, 0.5, None),
        (0.0, False, 1.5, "negative_denominator"),
        (1.0 + 4e-7, False, None, "zero_denominator"),
        (1.0 - 4e-7, False, None, "zero_denominator"),
        (1.02, True, -24.0, None),
        (1.005, True, None, "zero_denominator"),
        (0.9, True, None, "zero_denominator"),
    ],
)
def test_small_denominators_are_null_and_negative_ones_are_noted(ablated, accuracy, value, code):
    sums = {"places": [2, 2], "clean": [1, 3], "recon": [3, 3], "ablated": [0, 4 * ablated]}
    category = Category("c", {name: np.array(column, float) for name, column in sums.items()})
    above, below = (gap("ablated", name, "places") for name in ("recon", "clean"))
    category.share("it", above, below, accuracy=accuracy)
    found = category.values["it"]
    assert found is None if value is None else found == pytest.approx(value)
    assert [note.code for note in category.notes] == ([code] if code else [])
    assert ("c.it" in category.statistics) == (value is not None)


# -- What cannot be served -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("facts", "names", "options", "message"),
    [
        ({"output": "features"}, None, {}, "gives no logits of trained weights"),
        ({"causal": False}, None, {}, "fills in masked tokens"),
        ({}, None, {"tokens": "mean"}, "site.tokens=mean: an average of tokens"),
        ({}, None, {"templates": ["a {}"]}, "no text tower"),
        ({"tower": True}, None, {}, "'made_up' has no labels"),
    ],
)
def test_what_has_no_predictions_is_refused_ahead(make_labels, facts, names, options, message):
    host = Tower() if facts.pop("tower", False) else Host()
    for name, value in facts.items():
        setattr(host, name, value)
    selection = TokenSelection(options.pop("tokens", "all"))
    setting = Setting(make_labels(names), lambda: host, host.sites()[SITE], selection)
    with pytest.raises(ConfigError, match=message):
        EVALUATORS.build(CFG | options).check(setting)


def test_templates_without_a_place_for_the_name_are_refused():
    with pytest.raises(ConfigError, match=r"downstream_loss\.templates=a photo: needs one"):
        EVALUATORS.build(CFG | {"templates": ["a photo"]})


def test_open_clip_models_have_text_towers():
    assert issubclass(OpenCLIP, TextTower) and OpenCLIP.output == "features"
