"""Passes: taken part in by overriding, shared, and survived by those that do not fail."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from host_fixtures import SITE, D

from sae_runner.data.toy import ToyDataset
from sae_runner.evaluators._shared_pass import InputPass, encoded, measure
from sae_runner.evaluators.base import EvalContext, Evaluator, Findings, Setting
from sae_runner.store.activations import StoredRows

D_SAE = 16


class Recorder(Evaluator):
    axis = "both"

    def start(self, context):
        self.context, self.n_rows, self.spliced = context, 0, []

    def finish(self):
        return Findings({"recorder": {"n": self.n_rows}})


class OfRows(Recorder):
    def update(self, rows):
        self.n_rows += len(rows.x)


class OfCodes(Recorder):
    keeps_codes = True

    def finish(self):
        return Findings({"recorder": {"n": len(self.context.codes())}})


class OfSplices(Recorder):
    splices = ("recon", "mean")

    def watches(self, setting):
        return [setting.shapes().sites()["blocks.2.resid_post"]]

    def update_spliced(self, batch):
        self.spliced.append(batch)


@pytest.fixture
def sae():
    from sae_fixtures import drawn

    return drawn(D, D_SAE)


@pytest.fixture
def context(sae, host, selection):
    setting = Setting(ToyDataset.__new__(ToyDataset), lambda: host, host.sites()[SITE], selection)
    return EvalContext(sae, 10, np.arange(10), seed=0, setting=setting)


def rows(n=10, batch=4):
    x = torch.randn(n, D, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for part in torch.arange(n).split(batch):
        yield StoredRows(x[part], part, torch.zeros_like(part), None)


def passes(evaluators, context, stored, host=None, inputs=None, **options):
    found = {}
    mean = torch.full((D,), 0.25, dtype=torch.float64)
    taken = None
    if inputs is not None:
        taken = InputPass(lambda: host, lambda: [inputs], len(inputs), lambda: mean)

    def keep(name, findings, cost):
        found[name] = findings, cost

    failures = measure(evaluators, stored, context, keep, inputs=taken, **options)
    return found, failures


def test_rows_are_read_once_for_all_and_only_if_somebody_wants_them(context, host, inputs):
    stored = rows()
    found, _ = passes({"splices": OfSplices()}, context, stored, host, inputs)
    spent = found["splices"][1]
    replaced = context.setting.selection.mask(context.setting.site, inputs, 5)
    assert spent["rows"] == 0 and spent["sae_encodes"] == replaced.sum() > 0
    assert len(next(stored).x) == 4  # Nothing was taken of it.
    found, _ = passes({"a": OfRows(), "b": OfRows(), "c": OfCodes()}, context, rows())
    assert [found[name][0].metrics["recorder"]["n"] for name in "abc"] == [10, 10, 10]
    spent = found["a"][1]
    assert spent["rows"] == spent["sae_encodes"] == 10 and spent["shared_with"] == ["a", "b", "c"]


def test_what_an_evaluator_runs_itself_is_in_its_own_cost(context):
    class Spends(OfRows):
        def start(self, context):
            super().start(context)
            self.own = context

        def finish(self):
            self.own.spent["full_forwards"] += 3
            self.own.spent["partial_forwards"] += 12
            for batch in (*self.own.rows("train", 2), *self.own.rows_of(None, "heldout")):
                assert len(batch.x) == 7
            return super().finish()

    given = encoded(context.sae, next(rows(7, 7)))
    context = replace(
        context, rows=lambda split, n: iter([given] * n), rows_of=lambda data, split: iter([given])
    )

    for _ in range(2):  # Nothing is left of the first time.
        found, _ = passes({"spends": Spends(), "sound": OfRows()}, context, rows())
        kinds = ("full_forwards", "partial_forwards", "sae_encodes", "rows")
        runs = [[found[name][1][kind] for kind in kinds] for name in ("spends", "sound")]
        assert runs == [[3, 12, 10 + 3 * 7, 10], [0, 0, 10, 10]]


def test_splices_replace_the_selected_tokens_and_nothing_else(context, host, inputs, reference):
    evaluator = OfSplices()
    found, failures = passes({"e": evaluator}, context, rows(), host, inputs)
    assert not failures and found["e"][1]["full_forwards"] == 3
    assert found["e"][1]["partial_forwards"] == 6
    recon, mean = evaluator.spliced
    assert (recon.kind, mean.kind) == ("recon", "mean")
    keep = context.setting.selection.mask(context.setting.site, inputs, 5)
    assert torch.equal(recon.replaced, keep) and not keep.all()
    tokens, sae = inputs.tensors["tokens"].numpy(), context.sae

    def by_sae(x):
        x_hat = sae(torch.from_numpy(x).view(-1, D)).x_hat.detach().view(x.shape).numpy()
        return np.where(keep[:, :, None], x_hat, x)

    for batch, change in ((recon, by_sae), (mean, lambda x: np.where(keep[:, :, None], 0.25, x))):
        logits, seen = reference(host, tokens, change)
        np.testing.assert_allclose(batch.run.output.detach(), logits, atol=1e-10)
        clean, seen_clean = reference(host, tokens)
        np.testing.assert_allclose(batch.clean.output.detach(), clean, atol=1e-10)
        if batch.kind == "recon":
            last = "blocks.2.resid_post"
            np.testing.assert_allclose(batch.run.sites[last].detach(), seen[2], atol=1e-10)
            np.testing.assert_allclose(batch.clean.sites[last].detach(), seen_clean[2], atol=1e-10)
        else:
            assert list(batch.run.sites) == [SITE]


@pytest.mark.parametrize("method", ["start", "update", "finish"])
def test_one_that_fails_leaves_the_others(context, method):
    broken = OfRows()

    def fail(*_):
        raise ValueError("broken")

    setattr(broken, method, fail)
    found, failures = passes({"broken": broken, "sound": OfRows()}, context, rows())
    assert found["sound"][0].metrics["recorder"]["n"] == 10 and "broken" not in found
    assert list(failures) == ["broken"] and str(failures["broken"]) == "broken"


def test_without_a_splice_the_model_runs_once(context, host, inputs):
    class Clean(OfSplices):
        splices = ("clean",)

    alone = Clean()
    found, _ = passes({"clean": alone}, context, rows(), host, inputs)
    spent = found["clean"][1]
    assert spent["full_forwards"] == 3 and spent["partial_forwards"] == spent["sae_encodes"] == 0
    (batch,) = alone.spliced
    assert batch.kind == "clean" and batch.run is batch.clean
    assert set(batch.clean.sites) == {SITE, "blocks.2.resid_post"}
    with torch.no_grad():
        assert torch.equal(batch.clean.output, host.forward(inputs))
    keep = context.setting.selection.mask(context.setting.site, inputs, 5)
    assert torch.equal(batch.replaced, keep)
    # Beside others it costs them nothing.
    beside, spliced = Clean(), OfSplices()
    found, _ = passes({"a": spliced, "b": beside}, context, rows(), host, inputs)
    assert [b.kind for b in spliced.spliced] == ["recon", "mean"] and len(beside.spliced) == 1
    spent = found["b"][1]
    assert (spent["full_forwards"], spent["partial_forwards"]) == (3, 6)


def test_one_that_fails_at_a_splice_leaves_the_others(context, host, inputs):
    broken = OfSplices()
    broken.update_spliced = lambda batch: 1 / 0
    sound = OfSplices()
    _, failures = passes({"broken": broken, "sound": sound}, context, rows(), host, inputs)
    assert list(failures) == ["broken"] and len(sound.spliced) == 2


def test_each_evaluator_has_a_folder_of_its_own(context, tmp_path):
    one, other = OfRows(), OfRows()
    passes({"one": one, "other": other}, context, rows(), folder=tmp_path)
    assert one.context.folder == tmp_path / "one" and not one.context.folder.exists()
    assert other.context.folder == tmp_path / "other"


def test_what_cannot_be_kept_ends_the_command(context):
    def full(*_):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        measure({"sound": OfRows()}, rows(), context, full)


def test_the_mean_is_asked_for_once_and_only_if_somebody_wants_it(context, host, inputs):
    asked = []

    def mean():
        asked.append(1)
        return torch.full((D,), 0.25, dtype=torch.float64)

    class Recon(OfSplices):
        splices = ("recon",)

    taken = InputPass(lambda: host, lambda: [inputs, inputs], 6, mean)
    measure({"e": Recon()}, rows(), context, lambda *_: None, inputs=taken)
    assert not asked
    measure({"e": OfSplices()}, rows(), context, lambda *_: None, inputs=taken)
    assert len(asked) == 1
