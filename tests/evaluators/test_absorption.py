"""First letters: the scores by hand, and a model whose words' letters are planted directions."""

import numpy as np
import pytest
import torch
from evaluators.conftest import Given, assert_publishable
from scipy import sparse

from sae_runner.config import preset
from sae_runner.data.base import Dataset
from sae_runner.errors import ConfigError
from sae_runner.evaluators import EVALUATORS
from sae_runner.evaluators import absorption as module
from sae_runner.evaluators._first_letter import LETTERS, prompts_for, words_of
from sae_runner.evaluators._letter_probes import f1_of, fit_letters, n_split, splits_of
from sae_runner.evaluators.absorption import Seen, absorbed, absorbers, is_full
from sae_runner.evaluators.base import EvalContext, Setting
from sae_runner.models._text import TakesPrompts
from sae_runner.models.base import Inputs, Model, SiteInfo
from sae_runner.site import TokenSelection

CFG = preset("evaluators", "absorption")["absorption"] | {"n_words": None, "force": True}
D, N_OF_EACH, N_CHILDREN, BOS = 110, 20, 3, 0
SITE = SiteInfo("blocks.0.resid_post", "b", D, "tokens", None)


class Speller(Model, TakesPrompts):
    """520 words; the site holds 3 · letter, and in three words of each letter a direction too."""

    modality, output, filler, context = "text", "token_logits", BOS, 200
    device = torch.device("cpu")

    def __init__(self):
        rng = np.random.default_rng(0)
        self.texts = ["<bos>", "1", ":", "\n", " has", "é"]
        self.texts += [
            (" " if i % 2 else "") + (letter.upper() if i % 3 == 0 else letter) + f"{'x' * i}"
            for i in range(N_OF_EACH)
            for letter in LETTERS
        ]
        self.x = torch.from_numpy(rng.normal(size=(len(self.texts), D)) * 0.05).float()
        self.x[:, 26:] = 0  # Adam would make as much of noise as of anything.
        for token, text in enumerate(self.texts):
            if (word := text.strip()).isalpha() and word.isascii() and word != "has":
                letter, i = LETTERS.index(word[0].lower()), len(word) - 1
                self.x[token, letter] += 3
                if i < N_CHILDREN:
                    self.x[token, 26 + N_CHILDREN * letter + i] += 1
        self.seen = []

    @property
    def n_vocab(self):
        return len(self.texts)

    def pieces(self, tokens):
        return [self.texts[t] for t in tokens]

    def begun(self, texts):
        return [[BOS, *([1] * (8 * text.count("\n")))] for text in texts]

    def token_rows(self, rows):
        tokens = torch.full((len(rows), max(map(len, rows))), 2)
        for i, row in enumerate(rows):
            tokens[i, : len(row)] = torch.tensor(row)
        self.seen += rows
        return Inputs(torch.arange(len(rows)), {"tokens": tokens})

    def record(self, inputs, sites):
        return {site: self.x[inputs.tensors["tokens"]] for site in sites}

    def sites(self):
        return {SITE.name: SITE}

    def prepare(self, examples):
        raise NotImplementedError

    def splice(self, inputs, edits, positions=None):
        raise NotImplementedError

    def resume_from(self, site, x, state, edits=None):
        raise NotImplementedError

    def fingerprint(self):
        return "speller"

    def describe(self):
        return {}

    def parameters(self):
        return iter([torch.nn.Parameter(torch.zeros(1000))])


class Nothing(Dataset):
    """No dataset is looked at."""

    modality = "text"

    def ids(self, split):
        raise NotImplementedError

    def load(self, ids):
        raise NotImplementedError

    def fingerprint(self):
        raise NotImplementedError


class Spelling(Given):
    """Latent i is letter i; with `absorbs`, the latents of words take over in their own word."""

    def __init__(self, absorbs):
        n = 26 + 26 * N_CHILDREN
        W_dec = torch.eye(n, D)
        W_dec[26:] /= 3
        W_dec[range(26, n), torch.arange(26).repeat_interleave(N_CHILDREN)] = 1
        super().__init__(2 * W_dec, 1.0)  # Of norm 2 and more: f is half as large.
        self.absorbs = absorbs

    def encode(self, x):
        letter, child = x[:, :26], x[:, 26 : 26 + 26 * N_CHILDREN]
        taken = self.absorbs * (child.amax(1, keepdim=True) > 0.5)
        parents = (letter * ~taken).where(letter > 1, 0)
        return torch.cat([parents, self.absorbs * (child * 3).where(child > 0.5, 0)], 1) / 2


def run(absorbs=True, **options):
    model, evaluator = Speller(), EVALUATORS.build(CFG | options)
    setting = Setting(Nothing(), lambda: model, SITE, TokenSelection("all"))
    evaluator.check(setting)
    context = EvalContext(
        Spelling(absorbs), 0, np.arange(1), 0, model=lambda: model, setting=setting
    )
    evaluator.start(context)
    with torch.no_grad():
        findings = evaluator.finish()
    assert_publishable(findings)
    model.spent = context.spent
    return findings, model


# -- By hand ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("total", "main", "a", "wanted"),
    [
        (1, 0.3, 0.6, 0.6 / 0.9),  # The three of the definition.
        (1, 0, 0.5, 1),
        (1, 1, 0.5, 0),
        (1, 1.2, 0.5, 0),
        (1, 0.3, 0.39, 0),  # Too small a share.
        (1, 0.3, 0.9, 0.7),  # No more than what main leaves: 0.7 / (0.7 + 0.3).
        (1, -0.1, 0.5, 1),
        (2, 0.6, 1.2, 0.6 / 0.9),
    ],
)
def test_fractions_by_hand(total, main, a, wanted):
    assert absorbed(total, main, a) == pytest.approx(wanted)


def test_absorbers_are_at_most_three_and_point_along_the_letter():
    share = np.array([0.5, 0.4, 0.3, 0.2, 0.6, 0.9, -0.5])
    cosines = np.array([0.5, 0.5, 0.5, 0.5, 0.09, 0.5, 0.5])
    own = np.array([False] * 5 + [True, False])
    assert absorbers(share, cosines, own) == pytest.approx(1.2)
    assert absorbers(share[-1:], cosines[-1:], own[-1:]) == 0


def test_full_absorption_by_hand():
    share, cosines = np.array([0.1, 0.5]), np.array([0.3, 0.03])
    silent, own = np.array([1e-9, 2.0]), np.array([True, False])
    assert is_full(silent, share, cosines, own, total=1)
    assert not is_full(np.array([1e-7, 2.0]), share, cosines, own, total=1)
    assert not is_full(silent, share, np.array([0.3, 0.02]), own, total=1)
    assert not is_full(silent, share, cosines, own, total=1.3)
    assert not is_full(share[:0], share[:0], share[:0], own[:0], total=1)


@pytest.mark.parametrize(
    ("f1", "n"),
    [([], 0), ([0.5], 1), ([0.5, 0.52], 1), ([0.5, 0.54, 0.58, 0.6, 0.9], 3), ([0.5, 0.4, 0.9], 1)],
)
def test_latents_are_added_as_long_as_each_helps(f1, n):
    assert n_split(f1) == n


def test_f1_is_that_of_scikit_learn():
    from sklearn.metrics import f1_score

    rng = np.random.default_rng(1)
    said, true = rng.random(50) < 0.5, rng.random(50) < 0.3
    assert f1_of(said, true) == pytest.approx(f1_score(true, said))
    assert f1_of(said & False, true & False) == 0


def test_decoder_norms_do_not_matter_when_activations_make_up_for_them():
    rng = np.random.default_rng(2)
    decoder, f = rng.normal(size=(12, 8)), np.abs(rng.normal(size=(30, 12)))
    x, probe = f @ decoder, decoder[0] + 0.3 * rng.normal(size=8)
    splits = module.Splits(np.array([0]), [1.0])
    factor = rng.uniform(0.1, 10, 12)
    found = [
        module._scores(Seen(x, sparse.csr_array(g), np.zeros(30, int)), probe, W, splits)
        for g, W in ((f, decoder), (f * factor, decoder / factor[:, None]))
    ]
    assert found[0]["fraction"] == pytest.approx(found[1]["fraction"]) and found[0]["fraction"] > 0


# -- Probes ----------------------------------------------------------------------------------------


def test_the_multi_probe_finds_planted_letters_sparse_or_dense_and_l1_leaves_few_weights():
    rng = np.random.default_rng(3)
    letter = rng.integers(0, 26, 600)
    x = rng.normal(size=(600, 40)) * 0.3
    x[np.arange(600), letter] += 3
    dense = fit_letters(x, letter, n_epochs=100, l1=0.0, seed=0)
    assert (dense.scores(x).argmax(1) == letter).mean() > 0.98
    assert all(f1_of(dense.scores(x)[:, i] > 0, letter == i) > 0.65 for i in range(26))
    same = fit_letters(sparse.csr_array(x), letter, n_epochs=100, l1=0.0, seed=0)
    np.testing.assert_allclose(same.w, dense.w, atol=1e-3)
    few = fit_letters(x, letter, n_epochs=100, l1=1.0, seed=0)
    assert np.abs(few.w[:, 26:]).sum() < 0.5 * np.abs(dense.w[:, 26:]).sum()


def test_batches_of_a_large_vocabulary(monkeypatch):
    monkeypatch.setattr("sae_runner.evaluators._letter_probes.BATCH", 100)
    rng = np.random.default_rng(4)
    letter = rng.integers(0, 26, 450)
    x = sparse.csr_array(np.eye(26)[letter] * 2)
    probes = fit_letters(x, letter, n_epochs=40, l1=0.0, seed=0)
    assert (probes.scores(x).argmax(1) == letter).all()
    again = fit_letters(x, letter, n_epochs=40, l1=0.0, seed=0)
    np.testing.assert_array_equal(again.w, probes.w)


def test_a_letter_split_over_two_latents():
    rng = np.random.default_rng(5)
    y, f = rng.random(400) < 0.5, np.abs(rng.normal(size=(400, 6))) * 0.1
    half = rng.random(400) < 0.6
    f[y & half, 2] += 2
    f[y & ~half, 4] += 2
    f[:, 5] = 0.01
    weights = np.array([0.1, -1, 0.9, 0, 0.8, 0.05, *[-2] * 14])
    f = np.concatenate([f, np.ones((400, 14))], axis=1)
    found = splits_of(weights, sparse.csr_array(f), y, sparse.csr_array(f), y)
    assert found.latents.tolist() == [2, 4] and found.f1[1] == 1 and len(found.f1) == 4


# -- Words and prompts -----------------------------------------------------------------------------


def test_words_are_the_tokens_of_letters_alone():
    words = words_of(Speller(), None, 0)
    assert len(words) == 26 * N_OF_EACH + 1  # " has" is a word too.
    assert words.texts[:3] == ["has", "A", "B"] and words.letter[1:27].tolist() == list(range(26))
    some = words_of(Speller(), 50, 0)
    assert len(some) == 50 and set(some.texts) <= set(words.texts)
    assert words_of(Speller(), 50, 0).texts == some.texts != words_of(Speller(), 50, 1).texts


def test_prompts_end_with_the_word_and_show_others(monkeypatch):
    model = Speller()
    words = words_of(model, 60, 0)
    texts = []
    monkeypatch.setattr(model, "begun", lambda given: [texts.append(t) or [BOS] for t in given])
    rows, n_lines = prompts_for(words, model, 10, 0)
    assert n_lines == 10 and [row[-1] for row in rows] == words.tokens.tolist()
    for word, text in zip(words.texts, texts, strict=True):
        lines = text.splitlines()
        assert len(lines) == 10 == len(set(lines))
        shown = [line.split(" has the first letter: ") for line in lines]
        assert all(other[0].upper() == letter for other, letter in shown)
        assert word not in [other for other, _ in shown]


def test_prompts_are_no_longer_than_the_model_reads():
    model = Speller()
    model.context = 50  # A line is 8 tokens here, and BOS and the word are two.
    rows, n_lines = prompts_for(words_of(model, 60, 0), model, 10, 0)
    assert n_lines == 6 and {len(row) for row in rows} == {50}


# -- The evaluator ---------------------------------------------------------------------------------


def test_a_planted_absorber_is_found_in_the_words_that_it_absorbs():
    found, model = run()
    metrics, table = found.metrics["absorption"], found.tables["letters"]
    assert metrics["n_words"] == 26 * N_OF_EACH + 1 == len(model.seen)
    assert metrics["n_letters"] >= 24 and metrics["mean_probe_f1"] > 0.9
    order = np.random.default_rng(0).permutation(metrics["n_words"])
    words = words_of(model, None, 0)
    test = order[int(0.8 * len(order)) :]
    n_checked = 0
    for row, letter in enumerate(table["letter"]):
        own = [words.texts[i] for i in test if LETTERS[words.letter[i]] == letter]
        if table["full"][row] is None or letter == "h":  # " has" has no planted direction.
            continue
        assert table["split_latents"][row] == [LETTERS.index(letter)]
        if table["n_true_positives"][row] == len(own) > 0:
            n_child = sum(len(word) <= N_CHILDREN for word in own)
            assert table["full"][row] == pytest.approx(n_child / len(own))
            assert table["fraction"][row] == pytest.approx(n_child / len(own))
            n_checked += 1
    assert n_checked > 15
    scored = [f for f in table["full"] if f is not None]
    assert metrics["mean_full_absorption_score"] == pytest.approx(np.mean(scored))
    assert np.mean(scored) > 0.1
    assert metrics["std_dev_full_absorption_score"] == pytest.approx(np.std(scored, ddof=1))
    assert metrics["mean_num_split_features"] == 1


def test_without_an_absorber_nothing_is_absorbed():
    found, _ = run(absorbs=False)
    metrics = found.metrics["absorption"]
    assert metrics["mean_full_absorption_score"] == 0
    assert metrics["mean_absorption_fraction_score"] == 0


def test_batches_do_not_matter_and_the_seed_decides():
    one, model = run(n_words=400, min_letters=5, batch_size=7)
    other, _ = run(n_words=400, min_letters=5, batch_size=400)
    assert model.spent == {"full_forwards": 400, "sae_encodes": 400}  # A row of each prompt.
    assert one.metrics == other.metrics and one.tables == other.tables


def test_only_words_of_the_letter_are_scored(monkeypatch):
    fit = module.fit_letters

    def says_yes_to_all(*given, **options):
        probes = fit(*given, **options)
        return probes._replace(b=probes.b + 100)

    monkeypatch.setattr(module, "fit_letters", says_yes_to_all)
    monkeypatch.setattr(module, "LEAST_F1", 0.0)
    table = run(n_words=200, min_letters=1)[0].tables["letters"]
    seen = zip(table["n_true_positives"], table["n_skipped"], strict=True)
    assert [n + skipped for n, skipped in seen] == table["n_test"]


def test_too_few_letters_or_words_are_null_with_notes(monkeypatch):
    few, _ = run(n_words=30)
    assert few.metrics["absorption"]["mean_full_absorption_score"] is None
    assert {note.code for note in few.notes} == {"too_few_examples"} and not few.tables
    monkeypatch.setattr(module, "LEAST_F1", 1.0)
    none, _ = run(n_words=200)
    assert none.metrics["absorption"]["mean_absorption_fraction_score"] is None
    assert none.metrics["absorption"]["n_letters"] < 20 and none.tables["letters"]["letter"]
    assert any("letters whose probe has an F1" in note.detail for note in none.notes)


def setting(model, *, site=SITE, target=None):
    return Setting(Nothing(), lambda: model, site, TokenSelection("all"), target)


def test_what_it_cannot_be_measured_on_is_refused():
    evaluator = EVALUATORS.build(CFG | {"force": False})
    with pytest.raises(ConfigError, match="force=false: the model has 1,000 parameters"):
        evaluator.check(setting(Speller()))
    forced = EVALUATORS.build(CFG)
    forced.check(setting(Speller()))
    features = Speller()
    features.output = "features"
    with pytest.raises(ConfigError, match="it prompts a causal language model"):
        forced.check(setting(features))
    encoder = SiteInfo(SITE.name, "b", D, "tokens", None, has_cls=True)
    with pytest.raises(ConfigError, match="an encoder goes on with no prompt"):
        forced.check(setting(Speller(), site=encoder))
    with pytest.raises(ConfigError, match="a transcoder"):
        forced.check(setting(Speller(), target=SITE))
    with pytest.raises(ConfigError, match="min_letters=27"):
        EVALUATORS.build(CFG | {"min_letters": 27})


def test_the_yaml_has_every_option():
    cfg = preset("evaluators", "absorption")["absorption"]
    assert EVALUATORS.build(cfg | {"n_words": None}).n_lines == 10
