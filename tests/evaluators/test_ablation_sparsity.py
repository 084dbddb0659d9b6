"""Against NumPy on a small host; shares that are known."""

import numpy as np
import pytest
import torch
from host_fixtures import SITE, D, Host
from numpy.testing import assert_allclose
from sae_fixtures import build, drawn, stats_of

from sae_runner.config import preset
from sae_runner.errors import ConfigError
from sae_runner.evaluators import EVALUATORS, ablation_sparsity
from sae_runner.evaluators._ablations import (
    draw_pairs,
    effective_share,
    median,
    part_of_latents,
)
from sae_runner.evaluators.base import Setting
from sae_runner.saes import SAES
from sae_runner.site import TokenSelection

CFG = {"type": "ablation_sparsity", "n_pairs": 9, "n_positions": 2, "n_bootstrap": 0}
D_SAE = 16


class Prepared(Host):
    """A host that knows its texts by their ids."""

    def __init__(self, inputs):
        super().__init__()
        self.inputs = inputs

    def prepare(self, examples):
        return self.inputs.map(lambda t: t[torch.tensor([e.id for e in examples])])


@pytest.fixture
def host(inputs):
    return Prepared(inputs)


@pytest.fixture
def sae():
    return drawn(D, D_SAE)


@pytest.fixture
def edited(reference, host, inputs):
    """Logits of NumPy with a vector taken from the site at one token."""

    def run(example, position, removed, of=host):
        def change(x):
            x = x.copy()
            x[example, position] -= removed
            return x

        return reference(of, inputs.tensors["tokens"].numpy(), change)[0][example]

    return run


def share_of(delta):
    """By the definition, of [positions, vocab]."""
    delta = delta - np.median(delta, axis=1, keepdims=True)
    return np.abs(delta).sum() ** 2 / ((delta**2).sum() * delta.size), np.sqrt((delta**2).mean())


@pytest.mark.parametrize(
    ("delta", "share", "effect"),
    [
        ([[3.0, 0, 0, 0, 0, 0, 0, 0]], 1 / 8, 3 / 8**0.5),
        ([[1.0, -1, 1, -1, 1, -1]], 1, 1),
        ([[2.0, 2, 2, 2, 2, 0, 0, 0]], 3 / 8, 2 * (3 / 8) ** 0.5),  # The median is 2.
        ([[5.0, 5, 5, 6], [0, 0, 0, 0]], 1 / 8, 1 / 8**0.5),
    ],
)
def test_shares_that_are_known(delta, share, effect):
    delta = torch.tensor(delta).double()[None, None]
    counted = torch.ones(1, delta.shape[2], dtype=torch.bool)
    found = effective_share(delta - median(delta), counted)
    assert_allclose([part.item() for part in found], [share, effect])


def test_positions_that_do_not_exist_are_not_counted():
    delta = torch.tensor([[[[3.0, 0, 0, 0], [7.0, 1, 1, 1]]]]).double()
    share, effect = effective_share(delta, torch.tensor([[True, False]]))
    assert_allclose([share.item(), effect.item()], [1 / 4, 3 / 2])


def test_normal_noise_moves_two_over_pi():
    delta = torch.randn(1, 1, 1, 100_000, generator=torch.Generator().manual_seed(0)).double()
    share, _ = effective_share(delta - median(delta), torch.ones(1, 1, dtype=torch.bool))
    assert share.item() == pytest.approx(2 / np.pi, abs=0.01)


@pytest.mark.parametrize("n_positions", [1, 2, 4])  # Of 4, the third text has 2 ahead.
def test_every_pair_is_that_of_numpy(
    measure_spliced, host, inputs, sae, reference, edited, n_positions
):
    found = measure_spliced(CFG | {"n_positions": n_positions}, sae, [inputs], host=host)
    table = found.tables["pairs"]
    tokens, own = inputs.tensors["tokens"].numpy(), inputs.attended.numpy()
    clean, seen = reference(host, tokens)
    rows = zip(*table.values(), strict=True)
    for example, t, latent, f, channel, *shares in rows:
        x = torch.from_numpy(seen[0][example, t])[None]
        acts = sae.encode(x).detach()
        assert acts[0, latent] == pytest.approx(f) and f > 0
        without = acts.clone()
        without[0, latent] = 0
        removed = (sae.decode(acts) - sae.decode(without)).detach().numpy()[0]
        one = np.zeros(D)
        one[channel] = seen[0][example, t, channel]
        until = min(t + n_positions, own[example].sum())
        for i, vector in enumerate((removed, one)):
            delta = (edited(example, t, vector) - clean[example])[t:until]
            expected = share_of(delta)
            assert_allclose((shares[i], shares[i + 3]), expected, rtol=1e-7)
    metrics = found.metrics["ablation_sparsity"]
    for kind in ("latent", "channel", "random"):
        assert_allclose(metrics[kind], np.mean(table[f"{kind}_share"]), rtol=1e-12)
        assert_allclose(metrics[f"effect_{kind}"], np.mean(table[f"{kind}_effect"]), rtol=1e-12)
    assert metrics["n_pairs"] == len(table["latent"]) == 9


def test_tokens_with_all_their_outputs_ahead_come_first(measure_spliced, host, inputs, sae):
    table = measure_spliced(CFG, sae, [inputs], host=host).tables["pairs"]
    drawn = list(zip(table["example_id"], table["position"], table["latent"], strict=True))
    places = [{t for e, t, _ in drawn if e == example} for example in range(3)]
    # Texts of 5, 4 and 3 tokens, position 0 dropped: the last tokens have one output ahead, not 2.
    assert places[0] <= {1, 2, 3} and places[1] <= {1, 2} and places[2] == {1}
    assert len(set(drawn)) == 9  # None twice.


def test_a_random_vector_is_as_long_as_the_latents(host, inputs, sae, selection):
    with torch.no_grad():
        x = host.record(inputs, [SITE])[SITE]
        keep = selection.mask(host.sites()[SITE], inputs, 5)
        ahead = torch.ones_like(keep, dtype=torch.int64)
        pairs = draw_pairs(sae, x, x, keep, ahead, inputs.ids, {0: 4, 1: 4, 2: 4}, 0)
    alone, channel, random = pairs.removed.unbind(1)
    assert_allclose(random.norm(dim=1), alone.norm(dim=1))
    unit = torch.nn.functional.normalize(torch.cat([random, alone[:1]]), dim=1)
    assert (unit @ unit.T - torch.eye(13)).abs().max() < 0.999  # None twice.
    assert ((channel != 0).sum(1) == 1).all()
    norms = sae.W_dec[pairs.latent].norm(dim=1) * pairs.activation / sae.input_scale
    assert_allclose(alone.norm(dim=1), norms.detach())
    assert keep[pairs.example, pairs.position].all()


def test_batches_change_nothing_and_the_seed_does(measure_spliced, host, inputs, sae, monkeypatch):
    cfg = CFG | {"n_bootstrap": 100}
    whole = measure_spliced(cfg, sae, [inputs], host=host)
    assert whole.ci["ablation_sparsity.latent"]["n"] == 3
    monkeypatch.setattr(ablation_sparsity, "N_EXAMPLES", 1)
    monkeypatch.setattr(ablation_sparsity, "N_OUTPUTS", 1)
    parts = measure_spliced(cfg, sae, [inputs], host=host)
    for name, column in whole.tables["pairs"].items():
        assert_allclose(parts.tables["pairs"][name], column, rtol=1e-8, err_msg=name)
    other = measure_spliced(cfg, sae, [inputs], host=host, seed=1)
    assert other.tables["pairs"]["random_share"] != whole.tables["pairs"]["random_share"]


def test_the_profile_limits_the_pairs(measure_spliced, host, inputs, sae):
    found = measure_spliced(CFG, sae, [inputs], host=host, n_latents=2)
    assert found.metrics["ablation_sparsity"]["n_pairs"] == 2
    assert len(set(found.tables["pairs"]["example_id"])) == 2  # Spread over the examples.


def test_a_classifier_has_one_position(
    measure_spliced, host, inputs, sae, labels_of_names, reference, edited
):
    host.output = "class_logits"
    found = measure_spliced(CFG, sae, [inputs], host=host, dataset=labels_of_names)
    table = found.tables["pairs"]
    assert max(table["position"]) == 4  # Every token has the same outputs ahead.
    clean, seen = reference(host, inputs.tensors["tokens"].numpy())
    columns = ("example_id", "position", "channel", "channel_effect")
    for e, t, channel, effect in zip(*(table[name] for name in columns), strict=True):
        one = np.zeros(D)
        one[channel] = seen[0][e, t, channel]
        delta = (edited(e, t, one) - clean[e]).mean(0, keepdims=True)
        assert_allclose(effect, share_of(delta)[1], rtol=1e-7)


def transcoder():
    cfg = preset("sae", "transcoder") | {"d_sae": D_SAE, "expansion": None, "k": 3, "skip": True}
    made = SAES.build(cfg, d_in=D, d_out=D)
    x = torch.randn(64, 2 * D, generator=torch.Generator().manual_seed(0))
    made.initialise(stats_of(x), torch.Generator().manual_seed(1))
    made.W_skip.data.normal_(generator=torch.Generator().manual_seed(2))
    return made.double()


def test_another_site_than_the_one_read_may_be_edited(measure_spliced, host, inputs):
    target, coder = "blocks.1.mlp_out", transcoder()
    found = measure_spliced(CFG, coder, [inputs], host=host, target=target)
    table = found.tables["pairs"]
    columns = ("example_id", "position", "latent", "activation", "latent_effect")
    with torch.no_grad():
        seen = host.record(inputs, [SITE, target])
        for e, t, latent, f, effect in zip(*(table[name] for name in columns), strict=True):
            assert coder.encode(seen[SITE][e, t][None])[0, latent] == pytest.approx(f)
            y = seen[target].clone()
            y[e, t] -= f * coder.W_dec[latent] / coder.target_scale
            delta = (host.splice(inputs, {target: lambda _, y=y: y}) - host.forward(inputs))[e]
            until = min(t + 2, int(inputs.attended[e].sum()))
            assert_allclose(effect, share_of(delta[t:until].numpy())[1], rtol=1e-7)


@pytest.mark.parametrize("scaling", ["none", "sqrt_d", "layer_norm", "whitening"])
def test_a_latents_part_is_in_the_units_of_the_site(scaling):
    sae = build("topk", D, D_SAE, input_scaling=scaling)
    x = 5 + 3 * torch.randn(64, D, generator=torch.Generator().manual_seed(0))
    sae.initialise(stats_of(x), torch.Generator().manual_seed(1))
    sae, x = sae.double(), x.double()[:4]
    acts = sae.encode(x)
    latent = acts.argmax(1)
    part = part_of_latents(sae, x, latent, acts.gather(1, latent[:, None])[:, 0])
    without = acts.scatter(1, latent[:, None], 0)
    expected = sae(x).x_hat - sae.unscaled(sae.decode_scaled(without), x)
    assert_allclose(part.detach(), expected.detach(), rtol=1e-9, atol=1e-12)


def test_without_active_latents_there_is_nothing_to_say(measure_spliced, host, inputs, sae):
    sae.b_enc.data -= 1e6
    found = measure_spliced(CFG, sae, [inputs], host=host)
    assert found.metrics["ablation_sparsity"]["n_pairs"] == 0
    assert found.metrics["ablation_sparsity"]["latent"] is None
    assert found.notes[0].code == "too_few_examples"


def test_what_moves_nothing_is_skipped(measure_spliced, host, inputs, sae):
    host.network.head.data.zero_()
    found = measure_spliced(CFG, sae, [inputs], host=host)
    assert found.metrics["ablation_sparsity"]["latent"] is None
    assert "9 of 9 pairs move no logit" in found.notes[0].detail
    assert found.tables["pairs"]["latent_share"] == [None] * 9


def test_some_pairs_may_be_skipped(measure_spliced, host, inputs, sae):
    sae.W_dec.data[12:] *= 1e-20
    found = measure_spliced(CFG | {"n_bootstrap": 100}, sae, [inputs], host=host)
    table = found.tables["pairs"]
    tiny = [latent >= 12 for latent in table["latent"]]
    assert 0 < sum(tiny) < 9
    assert [share is None for share in table["latent_share"]] == tiny
    assert None not in table["channel_share"]
    kept = [share for share in table["latent_share"] if share is not None]
    mean = found.metrics["ablation_sparsity"]["latent"]
    assert_allclose(mean, np.mean(kept))
    interval = found.ci["ablation_sparsity.latent"]
    assert interval["lo"] <= mean <= interval["hi"]


def test_what_moves_the_logits_by_rounding_alone_is_skipped(
    measure_spliced, host, inputs, sae, monkeypatch
):
    effects = measure_spliced(CFG, sae, [inputs], host=host).tables["pairs"]["latent_effect"]
    with torch.no_grad():
        size = float(host.forward(inputs).square().mean().sqrt())  # Of these logits, nearly.
    monkeypatch.setattr(
        ablation_sparsity, "ROUNDING", np.median(effects) / size / np.finfo(float).eps
    )
    shares = measure_spliced(CFG, sae, [inputs], host=host).tables["pairs"]["latent_share"]
    skipped = [effect for effect, s in zip(effects, shares, strict=True) if s is None]
    kept = [effect for effect, s in zip(effects, shares, strict=True) if s is not None]
    assert skipped and kept and np.mean(skipped) < np.mean(kept)


@pytest.mark.parametrize(
    ("output", "tokens", "message"),
    [("features", "all", "gives no logits"), ("token_logits", "mean", r"site\.tokens=mean")],
)
def test_what_cannot_be_served_is_refused_ahead(host, make_labels, output, tokens, message):
    host.output = output
    setting = Setting(make_labels(), lambda: host, host.sites()[SITE], TokenSelection(tokens))
    with pytest.raises(ConfigError, match=message):
        EVALUATORS.build(CFG).check(setting)
