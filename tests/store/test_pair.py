"""Two sites of one store side by side."""

import pytest
import torch

from sae_runner.errors import StoreError
from sae_runner.store.pair import PairedStore
from sae_runner.store.reader import ActivationStore

WORDS = ["model=tiny_clip", "model.epochs=1", "model.layers=1", "model.width=16", "model.heads=2",
         "dataset.n_examples=48", "dataset.n_heldout=16", "store.window_rows=300",
         "site.tokens=patches"]  # fmt: skip
SITES = ["site.name=blocks.0.resid_mid", "site.target=blocks.0.mlp_act"]


@pytest.fixture
def folders(in_process, tmp_path):
    assert in_process("cache", *WORDS, *SITES) == 0
    found = sorted(p.parent for p in tmp_path.glob("outputs/stores/*/*/manifest.json"))
    assert [folder.name for folder in found] == ["blocks.0.mlp_act-patches",
                                                 "blocks.0.resid_mid-patches"]  # fmt: skip
    return found[1], found[0]


def test_rows_are_those_of_both_sites(folders):
    pair = PairedStore(*folders)
    source, target = (ActivationStore(folder) for folder in folders)
    assert (pair.d_in, pair.d_out, pair.width) == (16, 64, 80)
    for split in ("train", "heldout"):
        rows = zip(*(store.rows(split, 100) for store in (pair, source, target)), strict=True)
        for both, x, y in rows:
            assert torch.equal(both.x, torch.cat([x.x, y.x], dim=1))
            assert torch.equal(both.example_id, y.example_id)
    batches = zip(*(store.shuffled(64, 3) for store in (pair, source, target)), strict=False)
    for _, (both, x, y) in zip(range(30), batches, strict=False):
        assert torch.equal(both.x, torch.cat([x.x, y.x], dim=1))
        assert both.position == x.position


@pytest.mark.parametrize("multiple", [None, 1.05])
def test_statistics_are_of_rows_that_hold_both(folders, multiple):
    pair = PairedStore(*folders, max_norm_multiple=multiple)
    source = ActivationStore(folders[0], max_norm_multiple=multiple)
    found, own = pair.stats(50), source.stats(50)
    every = torch.cat([rows.x for rows in pair.rows("train", 1000)])
    assert found.sample.shape == (50, 80)
    assert (found.mean_norm, found.mean_square_norm) == (own.mean_norm, own.mean_square_norm)
    torch.testing.assert_close(found.mean, every.mean(0), rtol=1e-4, atol=1e-5)
    assert (len(every) < 48 * 16) == (multiple is not None)
    heldout = torch.cat([rows.x for rows in pair.rows("heldout", 1000)])[:, 16:]
    if multiple is None:
        torch.testing.assert_close(pair.heldout_mean().float(), heldout.mean(0))
    else:
        assert pair.heldout_mean() is None


def test_rows_of_other_tokens_are_refused(folders, in_process):
    assert (
        in_process("cache", *WORDS[:-1], SITES[0], "site.tokens=all", "store.window_rows=300") == 0
    )
    other = next(folders[0].parent.glob("*resid_mid-all"))
    with pytest.raises(StoreError, match=r"differ in|do not hold rows of the same examples"):
        list(PairedStore(other, folders[1]).rows("train", 100))


def test_a_transcoder_through_the_command_line(in_process, tmp_path, capfd):
    from sae_runner import load_report, load_sae

    small = ["trainer.n_tokens=1500", "trainer.batch_size=64", "sae.k=4"]
    assert in_process("train", *WORDS, *SITES, "sae=transcoder", "sae.skip=true", *small) == 0
    run = next(tmp_path.glob("outputs/train/tiny_clip-*"))
    assert (load_sae(run).d_in, load_sae(run).d_out) == (16, 64)
    metrics = load_report(run)["evaluators"]["reconstruction"]["metrics"]["reconstruction"]
    stored = sorted(p.parent for p in tmp_path.glob("outputs/stores/*/*/manifest.json"))
    sae, pair = load_sae(run), PairedStore(stored[1], stored[0])
    rows = torch.cat([rows.x for rows in pair.rows("heldout", 1000)]).double()
    x, y = rows[:, :16], rows[:, 16:]
    y_hat = sae.double()(x).x_hat
    fvu = (y - y_hat).square().sum() / (y - y.mean(0)).square().sum()
    assert metrics["fvu"] == pytest.approx(fvu.item(), rel=1e-4)
    capfd.readouterr()
    for words, line in (
        (["sae=transcoder", SITES[0]], "site.target=null: sae=transcoder needs"),
        (SITES, "site.target=blocks.0.mlp_act: sae=topk reconstructs what it reads"),
        (
            ["sae=transcoder", SITES[0], "site.target=blocks.0.mlp_at"],
            "site.target=blocks.0.mlp_at",
        ),
        (["sae=transcoder", SITES[0], "site.target=blocks.*"], "means several sites"),
        (
            ["sae=transcoder", SITES[0], "site.target=embed", "site.tokens=all"],
            "its tokens are not",
        ),
        (["sae=transcoder", *SITES, "store=stream"], "a pair of sites needs store=disk"),
        (["sae=transcoder", *SITES, "sae/dead_latents=resample"], "sae/dead_latents=resample: lat"),
    ):
        assert in_process("train", *WORDS[:-1], *words, *small) == 2, words
        assert line in capfd.readouterr().err.splitlines()[-1]
