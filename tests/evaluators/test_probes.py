"""Tasks and probes on planted examples, and what the evaluator refuses and reports."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from codes_fixtures import bare
from evaluators.conftest import Given, assert_publishable
from gram_host import BOS, Grams
from scipy import sparse
from sklearn.metrics import accuracy_score

from sae_runner.config import preset
from sae_runner.data._labelled_files import LabelledFile
from sae_runner.data.base import Dataset, Example, Unreadable
from sae_runner.errors import ConfigError
from sae_runner.evaluators import EVALUATORS
from sae_runner.evaluators._numbers import Scalars
from sae_runner.evaluators._pooling import Pooled
from sae_runner.evaluators._probe_task import (
    Options,
    accuracy,
    by_difference,
    likely_directions,
    measure_task,
)
from sae_runner.evaluators._tasks import Part, Task, balanced, class_tasks
from sae_runner.evaluators._text_tasks import answers
from sae_runner.evaluators.base import EvalContext, Rows, Setting
from sae_runner.models.base import SiteInfo
from sae_runner.saes import SAES
from sae_runner.saes.base import Latents
from sae_runner.site import TokenSelection

SIZES = {"n_train": 4000, "n_test": 1000}
CFG = preset("evaluators", "probes")["probes"] | SIZES | {
    "tasks": ["labels"], "k": [1, 2], "strengths": [0.01, 1.0], "n_folds": 3, "n_bootstrap": 100,
}  # fmt: skip
OPTIONS = Options(1e-4, (1, 2, 5), (0.01, 1.0), 3, 0)
D_SAE, D = 30, 8


def examples(n, seed, *, n_classes=2, parent=7):
    """Pooled examples whose class decides one latent; raw activations say it with noise."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, n_classes, n)
    f = (rng.random((n, D_SAE)) < 0.3) * rng.exponential(1, (n, D_SAE))
    f[:, 9] = 0
    for c in range(1, n_classes):
        f[:, parent + c - 1] = (label == c) * rng.uniform(1, 2, n)
    raw = rng.normal(size=(n, D)) + 3  # Far from 0: a sum of means is no difference.
    raw[:, 2] += 2 * label
    return Pooled(np.arange(n), label, raw, sparse.csr_array(f))


def whole(pooled, y=None):
    y = pooled.label == 1 if y is None else y
    return Part(np.arange(len(pooled)), y, (int(y.sum()), int((~y).sum())))


def measured(train, test, y=None, y_test=None, options=OPTIONS):
    task = Task("t", "labels", whole(train, y), whole(test, y_test))
    return measure_task(task, train, test, options)


# -- One task --------------------------------------------------------------------------------------


def test_a_planted_latent_is_found_and_decides_the_task():
    train, test = examples(400, 0), examples(200, 1)
    found = measured(train, test)
    row = found.row
    assert row["best_latent"] == 7 and row["best_latent_acc"] == row["best_latent_auc"] == 1
    assert row["probe_loss_train_min"] == found.losses.min() == found.losses[7] < 0.01
    assert row["probe_loss_test"] < 0.02
    assert row["excess"] == row["probe_loss_test"] / row["base_entropy"]
    assert row["probe_loss_test"] != row["probe_loss_train_min"]
    assert row["sae_top_1_test_accuracy"] == 1
    assert by_difference(train.latents, train.label == 1)[0][0] == 7
    assert row["base_entropy"] == pytest.approx(math.log(2), abs=0.01)
    assert row["gap_to_full"] == row["probe_loss_test"] - row["llm_full_loss"] < 0
    assert found.few == [] and row["n_constant"] == 1
    logit = row["w"] * test.latents[:, [7]].toarray()[:, 0] + row["b"]
    y = test.label == 1
    assert row["probe_loss_test"] == pytest.approx(np.mean(np.logaddexp(0, logit) - y * logit))


def test_baselines_on_raw_activations():
    train, test = examples(2000, 2), examples(1000, 3)
    row = measured(train, test).row
    # Class means 2 apart at unit variance in one coordinate: that one, their difference and all
    # together know the same; a random direction knows less.
    rng = np.random.default_rng(4)
    y = rng.random(10**6) < 0.5
    x = rng.normal(size=10**6) + 2 * y
    best = np.mean(np.logaddexp(0, 2 * (x - 1)) - y * 2 * (x - 1))
    for name in ("coordinate_loss", "mean_difference_loss", "llm_full_loss"):
        assert row[name] == pytest.approx(best, abs=0.03)
    assert best + 0.02 < row["random_direction_loss"] < math.log(2)
    assert row["llm_test_accuracy"] == pytest.approx(0.841, abs=0.03)  # Φ(1)
    assert row["llm_top_1_test_accuracy"] == pytest.approx(0.841, abs=0.03)
    assert row["sae_test_accuracy"] > 0.98


def test_shuffled_labels_are_at_chance():
    train, test = examples(1000, 5), examples(1000, 6)
    rng = np.random.default_rng(7)
    row = measured(train, test, rng.random(1000) < 0.5, rng.random(1000) < 0.5).row
    three = 3 * math.sqrt(0.25 / 1000)
    few = ("sae_top_1", "sae_top_5", "llm_top_2", "llm", "sae")
    for name in ("best_latent_acc", "best_latent_auc", *(f"{f}_test_accuracy" for f in few)):
        assert row[name] == pytest.approx(0.5, abs=three), name
    assert row["excess"] == pytest.approx(1, abs=0.02)
    assert row["probe_loss_test"] > row["probe_loss_train_min"]


def test_the_latent_is_chosen_on_the_train_set_and_not_where_it_is_scored():
    train, test = examples(300, 8), examples(300, 9)
    swapped = test.latents.toarray()
    swapped[:, [7, 8]] = swapped[:, [8, 7]]
    other = Pooled(test.ids, test.label, test.raw, sparse.csr_array(swapped))
    row = measured(train, other).row
    assert row["best_latent"] == 7 and row["probe_loss_train_min"] < 0.02
    assert row["probe_loss_test"] > 0.69


def test_dead_latents_have_the_loss_of_the_base_rate():
    train, test = examples(200, 10), examples(100, 11)
    dead = [Pooled(p.ids, p.label, p.raw, sparse.csr_array((len(p), D_SAE))) for p in (train, test)]
    found = measured(*dead)
    assert found.row["best_latent"] is None and found.few == [1, 2, 5]
    assert found.row["excess"] == pytest.approx(1, abs=0.02)
    assert found.row["sae_top_1_test_accuracy"] is None
    assert found.row["best_latent_auc"] == 0.5


def test_the_likely_directions_hold_the_best_of_all_random_ones():
    pooled = examples(500, 12)
    y = pooled.label == 1
    likely = likely_directions(pooled.raw, y, 5000, seed=3)
    every = []
    generator = torch.Generator().manual_seed(3)
    for n in (4096, 904):
        drawn = torch.randn(n, D, generator=generator)
        every.append(torch.nn.functional.normalize(drawn, dim=1).double().numpy())
    every = np.concatenate(every)
    projected = pooled.raw @ every.T
    scores = np.abs(np.corrcoef(projected.T, y.astype(float))[-1, :-1])
    np.testing.assert_allclose(likely, every[np.argsort(-scores, kind="stable")[:64]])


def test_accuracy_is_that_of_scikit_learn():
    rng = np.random.default_rng(13)
    logit, y = rng.normal(size=200).round(1), rng.random(200) < 0.2
    assert accuracy(logit, y) == pytest.approx(accuracy_score(y, logit > 0))


def test_columns_by_difference_of_class_means():
    x = np.array([[0.0, 5, 1, 0], [0, 1, 1, 2], [1, 0, 1, 0], [1, 6, 1, 1]])
    order, n = by_difference(x, np.array([False, False, True, True]))
    assert order.tolist()[:2] == [0, 3] and n == 2  # Differences 1, 0, 0, 1/2.


# -- Tasks -----------------------------------------------------------------------------------------


def test_balancing_keeps_the_rarer_answer_and_draws_equally_from_the_groups_of_the_other():
    rng = np.random.default_rng(14)
    group = np.repeat([0, 1, 2, 3], [30, 100, 100, 5])
    kept = balanced(group == 0, group, rng)
    assert np.bincount(group[kept]).tolist()[0] == 30
    of_others = np.bincount(group[kept])[1:]
    assert of_others.sum() == 30 and of_others[2] == 5 and abs(of_others[0] - of_others[1]) <= 1
    most_true = balanced(group > 0, group, rng)
    assert (group[most_true] > 0).sum() == 30 and len(set(most_true.tolist())) == 60


def test_classes_become_tasks_against_the_rest():
    rng = np.random.default_rng(15)
    train, test = rng.integers(-1, 4, 500), rng.integers(-1, 4, 200)
    names = ("a", "b", "c", "d")
    tasks, n_left_out = class_tasks(train, test, names, balance=True, seed=0, most=3)
    assert n_left_out == 1 and len(tasks) == 3
    for task in tasks:
        c = names.index(task.name)
        for part, label in ((task.train, train), (task.test, test)):
            assert (label[part.rows] >= 0).all()
            assert ((label[part.rows] == c) == part.y).all()
            assert part.y.mean() == 0.5
            assert part.counts == ((label == c).sum(), ((label >= 0) & (label != c)).sum())
    whole, _ = class_tasks(train, test, names, balance=False, seed=0, most=9)
    assert all(len(task.train.rows) == (train >= 0).sum() for task in whole)
    two, _ = class_tasks(train % 2, test % 2, names, balance=True, seed=0, most=9)
    assert [task.name for task in two] == ["b"]


@pytest.mark.parametrize(
    ("task", "yes", "no"),
    [
        ("digit", "from the 1930s", "from the thirties"),
        ("number", "it has Two halves", "it is often late"),
        ("comma", "long , slow", "long and slow"),
        ("quote_or_parenthesis", 'a "film"', "it 's a film"),
        ("quote_or_parenthesis", "good ( at first )", "good at first"),
        ("negation", "they wo n't sit still", "a knot of notes"),
        ("negation", "there is No plot", "nobodyish"),
        ("contrast", "long but good", "a butler"),
        ("conjunction", "long and good", "a band of sand"),
        ("possessive_or_is", "it 's played", "its parts are issues"),
        ("first_word_determiner", "the film", "film of the year"),
        ("first_word_determiner", "`` a film", "another film"),
        ("first_word_pronoun", "They say", "Theyre"),
        ("first_person", "for me", "for some home"),
        ("second_person", "if you 've ever", "in their youth"),
        ("capital_inside", "a film by Allen", "A film by allen"),
        ("final_punctuation", "good . ", "good . bad"),
        ("final_punctuation", 'he said "no."', "he said"),
        ("question", "why ?", "why"),
        ("longer_than_median", "a b c d", "a b c"),
    ],
)
def test_questions_that_a_text_answers(task, yes, no):
    assert answers([yes, no], median=3)[task].tolist() == [True, False]


# -- The evaluator ---------------------------------------------------------------------------------


class Labelled(Dataset):
    """A dataset of which only what the evaluator asks is there."""

    def __init__(self, modality="image", label_names=("no", "yes"), texts=()):
        self.modality, self.label_names, self.name = modality, label_names, "made_up"
        self.texts = dict(texts)

    def ids(self, split):
        raise NotImplementedError

    def fingerprint(self):
        raise NotImplementedError

    def load(self, ids):
        return [Example(i, self.texts[i]) if i in self.texts else Unreadable(i, "lost")
                for i in map(int, ids)]  # fmt: skip


def context(dataset, splits, *, seed=0, sae=None):
    """Rows of two tokens an example; the pooled latents are those given."""
    sae = sae or Given(torch.ones(D_SAE, D), 1.0)

    def rows(split, n_examples):
        pooled = splits[split]
        f, ids = torch.from_numpy(pooled.latents.toarray()[:n_examples]), pooled.ids[:n_examples]
        raw = torch.from_numpy(pooled.raw[:n_examples])
        label = None if pooled.label is None else torch.from_numpy(pooled.label[:n_examples])
        for start in range(0, len(f), 50):
            part = slice(start, start + 50)
            for position, factor in ((1, 0.5), (0, 1.5)):
                yield Rows(
                    raw[part] * factor, Latents.from_dense(f[part] * factor), raw[part],
                    torch.from_numpy(ids[part]), torch.full((len(f[part]),), position),
                    None if label is None else label[part],
                )  # fmt: skip

    def rows_of(file, split):
        # Latent 7 + c fires in examples of class c that say so; every other text is noise.
        ids = file.ids(split)
        f = np.random.default_rng(0).exponential(1, (len(ids), D_SAE))
        values = [e.value for e in file.load(ids)]
        for c in range(len(file.label_names)):
            f[:, 7 + c] = [f"class {c}" in value for value in values]
        f, raw = torch.from_numpy(f), torch.from_numpy(f[:, :D])
        where = torch.from_numpy(ids), torch.zeros(len(ids), dtype=torch.int64)
        yield Rows(raw, Latents.from_dense(f), raw, *where, torch.from_numpy(file.classes[ids]))

    return EvalContext(
        sae, 0, np.arange(1), seed, dataset=lambda: dataset, rows=rows, rows_of=rows_of,
        model=lambda: pytest.fail("the model is not needed"),
    )  # fmt: skip


def run(dataset, train, test, *, seed=0, sae=None, **options):
    evaluator = EVALUATORS.build(CFG | options)
    evaluator.start(context(dataset, {"train": train, "heldout": test}, seed=seed, sae=sae))
    findings = evaluator.finish()
    assert_publishable(findings)
    return findings


def test_findings_of_labelled_examples():
    names = ("zero", "one", "two")
    train, test = examples(600, 16, n_classes=3), examples(300, 17, n_classes=3)
    found = run(Labelled(label_names=names), train, test)
    metrics, table = found.metrics["probes"], found.tables["tasks"]
    assert sorted(table["task"]) == ["one", "two", "zero"]
    by_name = dict(zip(table["task"], table["best_latent"], strict=True))
    assert (by_name["one"], by_name["two"]) == (7, 8)
    assert metrics["n_tasks"] == 3 and metrics["base_entropy"] == pytest.approx(math.log(2))
    for name in ("probe_loss_test", "excess", "gap_to_full", "sae_top_2_test_accuracy",
                 "llm_test_accuracy", "coordinate_loss"):  # fmt: skip
        assert metrics[name] == pytest.approx(np.mean(table[name]))
        interval = found.ci[f"probes.{name}"]
        assert interval["lo"] <= metrics[name] <= interval["hi"] and interval["n"] == 3
    assert set(found.arrays["losses"]) == set(names)
    assert found.arrays["losses"]["one"].argmin() == 7
    assert any("3 tasks: means and intervals" in note.detail for note in found.notes)
    assert "probes_labels" not in found.metrics  # The same as all.
    again = run(Labelled(label_names=names), train, test)
    assert again.metrics == found.metrics and again.tables == found.tables
    other = run(Labelled(label_names=names), train, test, seed=1)
    assert other.metrics != found.metrics


def test_pooling_and_sizes_are_the_options():
    train, test = examples(300, 18), examples(300, 19)
    mean, last = (run(Labelled(), train, test, pool=pool) for pool in ("mean", "last"))
    # Each example has its pooled latents × 0.5 at its last token and × 1.5 before.
    assert last.tables["tasks"]["w"][0] == pytest.approx(2 * mean.tables["tasks"]["w"][0], rel=1e-5)
    few = run(Labelled(), train, test, n_train=100, n_test=60, balance=False)
    assert few.tables["tasks"]["n_train"] == [100] and few.tables["tasks"]["n_test"] == [60]


def test_pre_activations_stand_for_latents_that_never_fire():
    train, test = examples(300, 26), examples(200, 27)
    dead = [Pooled(p.ids, p.label, p.raw, sparse.csr_array((len(p), D_SAE))) for p in (train, test)]
    sae = Given(torch.ones(D_SAE, D), 2.0)
    directions = torch.randn(D_SAE, D, generator=torch.Generator().manual_seed(0))
    directions[11] = torch.nn.functional.one_hot(torch.tensor(2), D)  # The coordinate that knows.
    sae.W_enc_rows.data, sae.b_dec.data = directions, torch.full((D,), 0.5)
    sae.b_enc.data = torch.full((D_SAE,), -100.0)
    found = run(Labelled(), *dead, sae=sae, latent="pre", balance=False)
    z = [(2 * p.raw - 0.5) @ directions.double().numpy().T - 100 for p in dead]
    assert all((part < 0).all() for part in z)
    wanted = measured(*(
        Pooled(p.ids, p.label, p.raw, part.astype(np.float32))
        for p, part in zip(dead, z, strict=True)
    ), options=replace(OPTIONS, k=(1, 2)))  # fmt: skip
    (row,) = found.tables["tasks"]["best_latent"]
    assert row == 11 == wanted.row["best_latent"]
    apart = np.abs(z[0][train.label == 1].mean(0) - z[0][train.label == 0].mean(0))
    order, n = by_difference(z[0].astype(np.float32), train.label == 1)
    assert order.tolist() == np.argsort(-apart).tolist() and n == D_SAE
    for name, values in found.tables["tasks"].items():
        if isinstance(values[0], float):
            assert values[0] == pytest.approx(wanted.row[name], rel=1e-3, abs=1e-4), name
    # As good as the coordinate itself, at any scale and shift.
    assert wanted.row["probe_loss_test"] == pytest.approx(wanted.row["coordinate_loss"], abs=1e-4)
    after = run(Labelled(), *dead, sae=sae, balance=False)
    assert after.metrics["probes"]["excess"] == pytest.approx(1, abs=0.02)


def test_texts_become_tasks_and_rare_ones_are_left_out_with_their_counts():
    train, test = examples(300, 20), examples(200, 21)
    test = Pooled(test.ids + 1000, test.label, test.raw, test.latents)
    # Where the planted latent fires, the text has a comma; one text in a hundred has a digit.
    texts = {
        int(i): ("one , two" if c else "one two three") + (" 7" if i % 100 == 0 else "")
        for p in (train, test)
        for i, c in zip(p.ids, p.label, strict=True)
    }
    dataset = Labelled("text", ("no", "yes"), texts)
    found = run(dataset, train, test, tasks=["labels", "text"])
    table = found.tables["tasks"]
    assert table["task"][:1] == ["yes"] and "comma" in table["task"]
    assert table["best_latent"][table["task"].index("comma")] == 7
    assert {"probes", "probes_labels", "probes_text"} == set(found.metrics)
    text = [row for row, f in enumerate(table["family"]) if f == "text"]
    assert found.metrics["probes_text"]["probe_loss_test"] == pytest.approx(
        np.mean([table["probe_loss_test"][row] for row in text])
    )
    details = {note.detail: note.code for note in found.notes}
    rare = "task digit left out: 3 positive and 297 negative train examples, at least 20 of each"
    assert details[rare] == "too_few_examples"
    none = "task question left out: 0 positive and 300 negative train examples, at least 20 of each"
    assert details[none] == "single_class"
    assert found.metrics["probes"]["n_tasks_left_out"] > 0


def test_one_class_in_the_data_is_null_with_notes():
    train, test = examples(100, 22), examples(100, 23)
    one = [Pooled(p.ids, np.ones_like(p.label), p.raw, p.latents) for p in (train, test)]
    found = run(Labelled(), *one)
    assert found.metrics["probes"]["probe_loss_test"] is None
    assert found.metrics["probes"]["n_tasks"] == 0
    assert "single_class" in {note.code for note in found.notes} and not found.tables


def test_dead_latents_are_noted():
    train, test = examples(200, 24), examples(100, 25)
    dead = [Pooled(p.ids, p.label, p.raw, sparse.csr_array((len(p), D_SAE))) for p in (train, test)]
    found = run(Labelled(), *dead)
    assert found.metrics["probes"]["excess"] == pytest.approx(1)
    assert found.metrics["probes"]["sae_top_1_test_accuracy"] is None
    assert "constant_feature" in {note.code for note in found.notes}


def task_file(path, n_of_each, classes=("no", "yes"), split=False):
    """Texts that say their class."""
    lines = [f"text {i} of class {c}\t{name}" + ("\ttest" if i % 3 == 0 else "\ttrain") * split
             for c, name in enumerate(classes) for i in range(n_of_each[c])]  # fmt: skip
    header = "input\tlabel" + "\tsplit" * split
    path.write_text("\n".join([header, *lines]))
    return str(path)


def test_files_are_families_of_tasks_beside_the_dataset(tmp_path):
    two = task_file(tmp_path / "bias a.tsv", (150, 120))
    three = task_file(tmp_path / "kind.tsv", (90, 60, 12), ("x", "y", "z"), split=True)
    train, test = examples(300, 28), examples(200, 29)
    found = run(Labelled(), train, test, files=[two, three], max_classes=5, min_per_class=10)
    table = found.tables["tasks"]
    assert table["task"] == ["yes", "bias a", "kind/x", "kind/y"]
    assert table["family"] == ["labels", "bias_a", "kind", "kind"]
    assert table["best_latent"] == [7, 8, 7, 8]
    # A fifth of 150 and 120 is held out, or what `split` says; the rarer answer counts twice.
    assert table["n_test"] == [2 * min(np.bincount(test.label)), 48, 48, 40]
    assert table["n_train"][1:] == [192, 96, 80]
    assert set(found.metrics) == {"probes", "probes_labels", "probes_bias_a", "probes_kind"}
    assert found.metrics["probes_kind"]["n_train"] == 88
    assert found.metrics["probes"]["n_tasks"] == 4
    assert found.metrics["probes"]["n_tasks_left_out"] == 1
    rare = "task kind/z left out: 8 positive and 100 negative train examples, at least 10 of each"
    assert rare in {note.detail for note in found.notes}
    most = run(Labelled(), train, test, files=[three], max_classes=1, min_per_class=10)
    assert most.tables["tasks"]["task"] == ["yes", "kind/x"]
    left_out = "2 classes of kind.tsv beyond max_classes=1 left out"
    assert left_out in {note.detail for note in most.notes}


def test_files_suffice_and_sizes_hold_for_them(tmp_path):
    file = task_file(tmp_path / "yes.tsv", (200, 200))
    none = Labelled(label_names=None)
    lost = Pooled(np.arange(0), None, np.zeros((0, D)), sparse.csr_array((0, D_SAE)))
    found = run(none, lost, lost, files=file, n_train=90, n_test=50, balance=False)
    assert found.tables["tasks"]["n_train"] == [90] and found.tables["tasks"]["n_test"] == [50]
    assert set(found.metrics) == {"probes"}
    other = run(none, lost, lost, files=file, n_train=90, n_test=50, balance=False, seed=1)
    assert other.metrics != found.metrics
    train, test = examples(300, 30), examples(200, 31)
    both = run(Labelled(), train, test, files=file)  # A class and a file by one name.
    assert set(both.arrays["losses"]) == {"labels/yes", "yes/yes"}


def test_files_are_split_by_the_seed_and_the_model_runs_once_on_each_example(tmp_path):
    path = task_file(tmp_path / "yes.tsv", (200, 150))
    evaluator = EVALUATORS.build(CFG | {"files": path, "tasks": [], "n_train": 200})
    given = context(Labelled(), {}, seed=3)
    evaluator.start(given)
    ((_, train, test, _),) = evaluator._groups(Scalars("probes"))
    wanted = LabelledFile(tmp_path / "yes.tsv", seed=3, limits={"train": 200}, where="F")
    assert train.ids.tolist() == wanted.ids("train").tolist()
    assert test.ids.tolist() == wanted.ids("heldout").tolist()
    assert given.spent["full_forwards"] == 200 + 70


def test_the_content_of_files_decides_what_is_measured(tmp_path):
    evaluator = EVALUATORS.build(CFG | {"files": task_file(tmp_path / "a.tsv", (30, 30))})
    before = evaluator.reads()
    assert set(before) == {"a.tsv"}
    task_file(tmp_path / "a.tsv", (30, 31))
    assert evaluator.reads() != before
    assert EVALUATORS.build(CFG).reads() == {}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a": (40, 120)}, r"a.tsv: 8 examples of 'no' to test on; at least min_per_class=20"),
        ({"a": (20, 500)}, r"a.tsv: 4 examples of 'no' to test on; at least"),
        ({"a": (9, 0)}, r"a.tsv: it has one class, 'no': nothing to tell apart"),
        ({"a b": (200, 200), "a_b": (200, 200)}, r"a_b.tsv: 'a_b' is .*a b.tsv already; rename it"),
        ({"labels": (200, 200)}, r"labels.tsv: 'labels' is a family of tasks of the dataset alre"),
    ],
)
def test_files_that_will_not_do_are_refused(tmp_path, files, message):
    paths = [task_file(tmp_path / f"{name}.tsv", n) for name, n in files.items()]
    evaluator = EVALUATORS.build(CFG | {"files": paths})
    with pytest.raises(ConfigError, match=message) as error:
        evaluator.check(setting(Labelled("text"), reads="text"))
    assert str(error.value).startswith("files=")


def test_files_of_what_a_model_does_not_read_or_that_are_not_there_are_refused(tmp_path):
    path = task_file(tmp_path / "a.tsv", (200, 200))
    evaluator = EVALUATORS.build(CFG | {"files": path})
    evaluator.check(setting(Labelled(label_names=None), reads="text"))  # The file suffices.
    EVALUATORS.build(CFG | {"files": path, "tasks": []}).check(setting(Labelled(), reads="text"))
    for reads in ("image", "rows"):
        with pytest.raises(ConfigError, match=f"its inputs are text, and the model reads {reads}"):
            evaluator.check(setting(Labelled(), reads=reads))
    absent = EVALUATORS.build(CFG | {"files": [str(tmp_path / "b.tsv")]})
    with pytest.raises(ConfigError, match=r"files=.*b.tsv: there is no such file. Did you mean"):
        absent.check(setting(Labelled(), reads="text"))
    three = task_file(tmp_path / "c.tsv", (200, 90, 3), ("x", "y", "z"))
    EVALUATORS.build(CFG | {"files": three, "min_per_class": 18}).check(
        setting(Labelled(), reads="text")
    )


def setting(
    dataset, *, tokens="all", has_cls=False, grid=None, sae="topk", keep_bytes=10**9, reads="?"
):
    site = SiteInfo("blocks.0.resid_post", "b", D, "tokens", 4, has_cls=has_cls, grid=grid)
    shape = {"kind": sae, "no_pre_acts": SAES[sae].no_pre_acts, "d_sae": 1000}
    return Setting(
        dataset, lambda: SimpleNamespace(modality=reads), site, TokenSelection(tokens), None,
        lambda: SimpleNamespace(**shape), keep_bytes,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        (Labelled(label_names=None), {}, "has no classes and no text; use a labelled dataset"),
        (Labelled(label_names=None), {"tasks": ["text"]}, "has no text; use a labelled dataset"),
        (Labelled(), {"tasks": ["text"]}, "has no text; use tasks=.labels."),
        (Labelled("text", None), {"tasks": ["labels"]}, "has no classes; use tasks=.text."),
        (Labelled(label_names=("cat",)), {}, "has one class, 'cat'"),
        (Labelled(), {"pool": "cls"}, "pool=cls: site.tokens=all .* use pool=mean"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_runs(dataset, options, message):
    evaluator = EVALUATORS.build({**CFG, "tasks": ["labels", "text"], **options})
    with pytest.raises(ConfigError, match=message):
        evaluator.check(setting(dataset))


def test_pre_activations_are_refused_where_there_are_none_or_too_many():
    pre = EVALUATORS.build(CFG | {"latent": "pre", "n_train": 900, "n_test": 100})
    with pytest.raises(ConfigError, match=r"latent=pre: not of sae=matching_pursuit: what .*; use"):
        pre.check(setting(Labelled(), sae="matching_pursuit"))
    needed = 8 * 1000 * 1000 + 16 * 900 * 900
    with pytest.raises(ConfigError, match=r"1,000 examples of 1,000 numbers take 0.0 GB, more tha"):
        pre.check(setting(Labelled(), keep_bytes=needed - 1))
    pre.check(setting(Labelled(), keep_bytes=needed))
    for sae in set(SAES.names()) - {"matching_pursuit"}:
        pre.check(setting(Labelled(), sae=sae))
    EVALUATORS.build(CFG).check(setting(Labelled(), sae="matching_pursuit", keep_bytes=0))


def test_what_can_be_measured_is_not_refused():
    both = EVALUATORS.build({**CFG, "tasks": ["labels", "text"]})
    for dataset in (Labelled(), Labelled("text", None), Labelled("tokens", None)):
        both.check(setting(dataset))
    cls = EVALUATORS.build(CFG | {"pool": "cls"})
    cls.check(setting(Labelled(), has_cls=True, grid=(2, 2)))
    cls.check(setting(Labelled(), has_cls=True, tokens="cls"))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"tasks": []}, "probes.tasks is empty"), ({"strengths": []}, "probes.strengths is empty"),
     ({"n_bootstrap": 3}, "n_bootstrap=3"), ({"k": [0]}, "k=.*0"),
     ({"pool": "sum"}, "pool"), ({"min_per_class": 1}, "min_per_class")],
)  # fmt: skip
def test_bad_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        EVALUATORS.build(CFG | options)


def test_the_yaml_has_every_option():
    assert EVALUATORS.build(preset("evaluators", "probes")["probes"] | SIZES).ridge == 1e-4


def test_a_packed_text_begins_with_its_first_word():
    class Packed(Labelled):
        def load(self, ids):
            return [Example(int(i), torch.tensor([BOS, 3, int(i), BOS, 5])) for i in ids]

    class Words(Grams):
        def pieces(self, tokens):
            return ["<|end|>" if t == BOS else ["", "", "", "The", "n", "it"][t] for t in tokens]

    evaluator = EVALUATORS.build(CFG)
    dataset, host = Packed("tokens", None), bare(Words)
    evaluator.start(replace(context(dataset, {}), model=lambda: host))
    texts = evaluator._texts(np.array([4, 1]))
    assert texts == {4: " Then it", 1: " The it"}
    found = answers([texts[4], texts[1]], 2.0)
    assert found["first_word_determiner"].tolist() == [False, True]
