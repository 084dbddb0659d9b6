"""Against NumPy on a small host, and on hosts whose blocks are known."""

import numpy as np
import pytest
import torch
from host_fixtures import SITE, D, Host
from numpy.testing import assert_allclose
from torch import nn

from sae_runner.errors import ConfigError
from sae_runner.evaluators import EVALUATORS
from sae_runner.evaluators.base import Setting
from sae_runner.models.base import Inputs, Tap
from sae_runner.site import TokenSelection

CFG = {
    "type": "downstream_recon", "later_sites": None, "include_site": False, "n_bootstrap": 0,
}  # fmt: skip


def shrink(x):
    return 0.5 * x + 0.3


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


class Constant(nn.Module):
    def forward(self, x):
        return torch.full_like(x, 3.0)


class Normed(Host):
    """The host with an RMS norm between its last block and the head."""

    def __init__(self):
        super().__init__()
        self.network.norm = nn.RMSNorm(D, eps=0.0, dtype=torch.float64)
        self.network.norm.weight.data = torch.linspace(0.5, 2, D, dtype=torch.float64)

    def forward(self, inputs):
        x = self.network.embed[inputs.tensors["tokens"]]
        for block in self.network.blocks:
            x = block(x)
        return self.network.norm(x) @ self.network.head

    def taps(self):
        return super().taps() | {"final_norm": Tap("norm")}


def fvu_after_norm(host, inputs, reference, replaced, counted, site=0):
    """By NumPy; `site` is the block whose output is replaced."""
    tokens = inputs.tensors["tokens"].numpy()
    _, clean = reference(host, tokens)
    if site == 0:
        _, other = reference(host, tokens, lambda x: np.where(replaced[:, :, None], shrink(x), x))
        pair = clean[-1], other[-1]
    else:
        assert site == len(clean) - 1
        pair = clean[-1], np.where(replaced[:, :, None], shrink(clean[-1]), clean[-1])
    a, b = (
        np.linspace(0.5, 2, D) * x / np.sqrt((x**2).mean(-1, keepdims=True))
        for x in (x[counted] for x in pair)
    )
    return ((a - b) ** 2).sum() / ((a - a.mean(0)) ** 2).sum()


def with_blocks(*blocks):
    """The host with other blocks behind the site."""
    host = Host()
    for i, block in enumerate(blocks, 1):
        host.network.blocks[i] = block
        block.mlp = nn.Identity()
    return host


def compared(host, inputs, reference, replaced, counted):
    """mse, fvu and cosine of every block by NumPy, tokens `replaced` and `counted` being True."""
    tokens = inputs.tensors["tokens"].numpy()
    _, clean = reference(host, tokens)
    _, spliced = reference(host, tokens, lambda x: np.where(replaced[:, :, None], shrink(x), x))
    found = []
    for a, b in zip(clean, spliced, strict=True):
        a, b = a[counted], b[counted]
        error = ((a - b) ** 2).sum()
        cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        fvu = error / ((a - a.mean(0)) ** 2).sum()
        found.append((error / a.size, fvu, cosine.mean()))
    return np.array(found)


def table_of(findings):
    table = findings.tables["sites"]
    assert table == findings.series["downstream_by_site"]
    return np.array([table[name] for name in ("mse", "fvu", "cosine")], float).T


def test_every_later_block_is_that_of_numpy(measure_spliced, host, inputs, selection, reference):
    keep = selection.mask(host.sites()[SITE], inputs, 5).numpy()
    expected = compared(host, inputs, reference, keep, keep)
    found = measure_spliced(CFG, shrink, [inputs])
    assert found.tables["sites"]["site"] == ["blocks.1.resid_post", "blocks.2.resid_post"]
    assert found.tables["sites"]["n_tokens"] == [9, 9]
    assert_allclose(table_of(found), expected[1:], rtol=1e-9)
    metrics = found.metrics["downstream_recon"]
    means = [metrics[f"{name}_mean"] for name in ("mse", "fvu", "cosine")]
    assert_allclose(means, expected[1:].mean(0), rtol=1e-9)
    assert metrics["n_sites"] == 2
    with_site = measure_spliced(CFG | {"include_site": True}, shrink, [inputs])
    assert_allclose(table_of(with_site), expected, rtol=1e-9)


def test_tokens_that_were_not_replaced_count_too(measure_spliced, host, inputs, reference):
    selection = TokenSelection("last", drop_special=False, drop_positions=(0,))
    info = host.sites()[SITE]
    last = selection.mask(info, inputs, 5).numpy()
    every = inputs.attended.numpy() & (np.arange(5) > 0)
    assert last.sum() == 3 < every.sum()
    found = measure_spliced(CFG, shrink, [inputs], selection=selection)
    assert_allclose(table_of(found), compared(host, inputs, reference, last, every)[1:], rtol=1e-9)


def test_where_there_is_no_padding_all_tokens_count(measure_spliced, host, inputs, reference):
    image = Inputs(inputs.ids, inputs.tensors)
    every = np.ones((3, 5), bool)
    found = measure_spliced(CFG, shrink, [image], selection=TokenSelection("all"))
    assert found.tables["sites"]["n_tokens"] == [15, 15]
    expected = compared(host, inputs, reference, every, every)
    assert_allclose(table_of(found), expected[1:], rtol=1e-9)


def test_an_exact_reconstruction_leaves_nothing(measure_spliced, inputs):
    found = measure_spliced(CFG | {"include_site": True}, lambda x: x, [inputs])
    assert_allclose(table_of(found), [[0, 0, 1]] * 3, atol=1e-15)
    assert found.metrics["downstream_recon"]["fvu_mean"] == 0


def test_blocks_that_add_nothing_hand_the_error_on(measure_spliced, host, inputs):
    for block in host.network.blocks[1:]:
        block.weight.data.zero_()
    found = measure_spliced(CFG | {"include_site": True}, shrink, [inputs])
    at_site, *later = table_of(found)
    assert at_site[0] > 0.01
    assert_allclose(later, [at_site, at_site], rtol=1e-12)


def test_blocks_that_double_quadruple_the_error(measure_spliced, inputs):
    host = with_blocks(Doubled(), Doubled())
    found = measure_spliced(CFG | {"include_site": True}, shrink, [inputs], host=host)
    mse, fvu = table_of(found)[:, 0], table_of(found)[:, 1]
    assert_allclose(mse, mse[0] * np.array([1, 4, 16]), rtol=1e-12)
    assert_allclose(fvu, fvu[0], rtol=1e-12)
    assert_allclose(found.metrics["downstream_recon"]["mse_mean"], mse[0] * 7, rtol=1e-12)


def test_batches_and_their_order_change_nothing(measure_spliced, host, inputs):
    host.network.embed.data += 100.0  # So that a mean of each batch would show.
    cfg = CFG | {"n_bootstrap": 200, "include_site": True}
    whole = measure_spliced(cfg, shrink, [inputs])
    parts = measure_spliced(cfg, shrink, inputs.split(1)[::-1])
    assert_allclose(table_of(parts), table_of(whole), rtol=1e-7)
    assert whole.ci.keys() == {f"downstream_recon.{n}_mean" for n in ("mse", "fvu", "cosine")}
    for name, interval in whole.ci.items():
        metric = whole.metrics["downstream_recon"][name.split(".")[1]]
        assert interval["lo"] < metric < interval["hi"] and interval["n"] == 3
        assert_allclose(parts.ci[name]["se"], interval["se"], rtol=1e-6)


def test_a_site_that_does_not_vary_is_left_out_of_the_mean(measure_spliced, inputs):
    host = with_blocks(Doubled(), Constant())
    found = measure_spliced(CFG, shrink, [inputs], host=host)
    table = found.tables["sites"]
    assert table["fvu"][1] is None and table["mse"][1] == 0 and table["cosine"][1] == 1
    assert found.metrics["downstream_recon"]["fvu_mean"] == table["fvu"][0] > 0
    assert [(note.code, note.metric) for note in found.notes] == [
        ("constant_feature", "downstream_recon.fvu_mean"),
        ("not_applicable", "downstream_recon.final_norm_fvu"),
    ]
    only = CFG | {"later_sites": ["blocks.2.resid_post"]}
    found = measure_spliced(only, shrink, [inputs], host=host)
    assert found.metrics["downstream_recon"]["fvu_mean"] is None


def test_later_sites_may_be_named(measure_spliced, inputs):
    found = measure_spliced(CFG | {"later_sites": ["blocks.*.mlp_out"]}, shrink, [inputs],
                            site="blocks.0.resid_pre")  # fmt: skip
    assert found.tables["sites"]["site"] == [f"blocks.{i}.mlp_out" for i in range(3)]


def test_the_last_block_has_itself_alone(measure_spliced, inputs):
    last = "blocks.2.resid_post"
    with pytest.raises(ConfigError, match=r"no block comes after .*or set include_site=true"):
        measure_spliced(CFG, shrink, [inputs], site=last)
    found = measure_spliced(CFG | {"include_site": True}, shrink, [inputs], site=last)
    assert found.tables["sites"]["site"] == [last]
    assert found.metrics["downstream_recon"]["mse_mean"] > 0.01


def test_the_final_norm_has_a_value_of_its_own(measure_spliced, inputs, selection, reference):
    host = Normed()
    keep = selection.mask(host.sites()[SITE], inputs, 5).numpy()
    expected = fvu_after_norm(host, inputs, reference, keep, keep)
    cfg = CFG | {"n_bootstrap": 200}
    found = measure_spliced(cfg, shrink, [inputs], host=host)
    plain = measure_spliced(cfg, shrink, [inputs])
    metrics = found.metrics["downstream_recon"]
    assert_allclose(metrics.pop("final_norm_fvu"), expected, rtol=1e-9)
    assert abs(expected / metrics["fvu_mean"] - 1) > 0.02
    # The rest is what it is without.
    assert plain.metrics["downstream_recon"].pop("final_norm_fvu") is None
    (note,) = plain.notes
    assert (note.code, note.metric) == ("not_applicable", "downstream_recon.final_norm_fvu")
    assert metrics == plain.metrics["downstream_recon"] and found.tables == plain.tables
    interval = found.ci.pop("downstream_recon.final_norm_fvu")
    assert interval["lo"] < expected < interval["hi"] and interval["n"] == 3
    assert found.ci == plain.ci
    parts = measure_spliced(cfg, shrink, inputs.split(1)[::-1], host=host)
    assert_allclose(parts.metrics["downstream_recon"]["final_norm_fvu"], expected, rtol=1e-7)


def test_the_final_norm_counts_tokens_that_were_not_replaced(measure_spliced, inputs, reference):
    host = Normed()
    selection = TokenSelection("last", drop_special=False, drop_positions=(0,))
    last = selection.mask(host.sites()[SITE], inputs, 5).numpy()
    every = inputs.attended.numpy() & (np.arange(5) > 0)
    found = measure_spliced(CFG, shrink, [inputs], selection=selection, host=host)
    expected = fvu_after_norm(host, inputs, reference, last, every)
    assert_allclose(found.metrics["downstream_recon"]["final_norm_fvu"], expected, rtol=1e-9)


def test_a_named_final_norm_is_in_the_table_too(measure_spliced, inputs):
    named = CFG | {"later_sites": ["blocks.2.resid_post", "final_norm"]}
    found = measure_spliced(named, shrink, [inputs], host=Normed())
    assert found.tables["sites"]["site"] == ["blocks.2.resid_post", "final_norm"]
    metrics = found.metrics["downstream_recon"]
    assert metrics["final_norm_fvu"] == found.tables["sites"]["fvu"][1]
    assert metrics["fvu_mean"] == pytest.approx(sum(found.tables["sites"]["fvu"]) / 2)


def test_after_the_last_block_only_the_final_norm_is_left(
    measure_spliced, inputs, selection, reference
):
    host, last = Normed(), "blocks.2.resid_post"
    keep = selection.mask(host.sites()[last], inputs, 5).numpy()
    expected = fvu_after_norm(host, inputs, reference, keep, keep, site=2)
    cfg = CFG | {"n_bootstrap": 200}
    found = measure_spliced(cfg, shrink, [inputs], site=last, host=host)
    metrics = found.metrics["downstream_recon"]
    assert_allclose(metrics.pop("final_norm_fvu"), expected, rtol=1e-9)
    assert metrics == {"n_sites": 0, "mse_mean": None, "fvu_mean": None, "cosine_mean": None}
    assert {note.code for note in found.notes} == {"not_applicable"} and len(found.notes) == 3
    assert found.tables == found.series == {}
    assert list(found.ci) == ["downstream_recon.final_norm_fvu"]
    with_site = measure_spliced(
        cfg | {"include_site": True}, shrink, [inputs], site=last, host=host
    )
    assert with_site.tables["sites"]["site"] == [last]
    assert_allclose(with_site.metrics["downstream_recon"]["final_norm_fvu"], expected, rtol=1e-9)


def test_behind_the_final_norm_or_without_one_there_must_be_a_block(measure_spliced, inputs):
    for host, site in ((Normed(), "final_norm"), (Host(), "blocks.2.resid_post")):
        with pytest.raises(ConfigError, match=f"no block comes after {site}.*include_site=true"):
            measure_spliced(CFG, shrink, [inputs], site=site, host=host)
    own = CFG | {"include_site": True}
    found = measure_spliced(own, shrink, [inputs], site="final_norm", host=Normed())
    assert found.tables["sites"]["site"] == ["final_norm"]
    assert found.metrics["downstream_recon"]["final_norm_fvu"] is None


def test_a_final_norm_that_does_not_vary_has_no_value(measure_spliced, inputs):
    host = Normed()
    host.network.norm.weight.data.zero_()
    found = measure_spliced(CFG, shrink, [inputs], host=host)
    assert found.metrics["downstream_recon"]["final_norm_fvu"] is None
    assert [note.code for note in found.notes] == ["constant_feature"]


@pytest.mark.parametrize(
    ("options", "tokens", "message"),
    [
        ({"later_sites": ["blocks.0.resid_pre"]}, "all", "later_sites=blocks.0.resid_pre: does"),
        ({"later_sites": ["blocks.7.mlp_out"]}, "all", "later_sites=blocks.7.mlp_out: no such"),
        ({}, "mean", "site.tokens=mean: an average of tokens"),
    ],
)
def test_what_cannot_be_served_is_refused_ahead(host, make_labels, options, tokens, message):
    setting = Setting(make_labels(), lambda: host, host.sites()[SITE], TokenSelection(tokens))
    with pytest.raises(ConfigError, match=message):
        EVALUATORS.build(CFG | options).check(setting)
