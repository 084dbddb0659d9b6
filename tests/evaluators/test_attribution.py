"""Against NumPy on a small host; a model and its SAE in other coordinates say the same."""

import numpy as np
import pytest
import torch
from host_fixtures import N_BLOCKS, SITE, VOCAB, D, Host, Network
from numpy.testing import assert_allclose
from sae_fixtures import build, drawn, stats_of
from scipy.sparse import csr_array

from sae_runner.config import preset
from sae_runner.errors import ConfigError
from sae_runner.evaluators import EVALUATORS, attribution
from sae_runner.evaluators._direct_logits import DirectLogits
from sae_runner.evaluators.base import Setting
from sae_runner.models.base import Inputs, Tap
from sae_runner.report.attribution import Attributions
from sae_runner.report.attribution import attribution as compared
from sae_runner.report.firing import correlations
from sae_runner.saes import SAES
from sae_runner.site import TokenSelection

CFG = {"type": "attribution", "n_rows": 1000, "neurons": True, "n_bootstrap": 0}
D_SAE, LAST = 16, f"blocks.{N_BLOCKS - 1}.resid_post"


class Normed(Network):
    """With a final norm: x / √(mean x²)."""

    def __init__(self):
        super().__init__()
        self.normed = torch.nn.Identity()

    def norm(self, x):
        return x / (x.square().mean(-1, keepdim=True) + 1e-12).sqrt()

    def forward(self, tokens):
        x = self.embed[tokens]
        for block in self.blocks:
            x = block(x)
        return self.normed(self.norm(x)) @ self.head


class Capped(Normed):
    """With logits that are bounded by 3, which is near those of this host."""

    def forward(self, tokens):
        return 3 * torch.tanh(super().forward(tokens) / 3)


class Centred(Normed):
    """With a final layer norm."""

    def __init__(self):
        super().__init__()
        self.gain = torch.linspace(0.5, 2, D, dtype=torch.float64)
        self.bias = torch.linspace(-3, 1, D, dtype=torch.float64)

    def norm(self, x):
        return super().norm(x - x.mean(-1, keepdim=True)) * self.gain + self.bias


def host_of(network):
    made = Host()
    made.network = network()
    made.logit_cap = 3.0 if network is Capped else None
    return made


@pytest.fixture
def normed():
    return host_of(Normed)


@pytest.fixture
def sae():
    return drawn(D, D_SAE)


@pytest.fixture
def texts():
    """60 texts of 9 tokens."""
    tokens = torch.randint(1, VOCAB, (60, 9), generator=torch.Generator().manual_seed(5))
    own = torch.ones(60, 9, dtype=torch.bool)
    return Inputs(torch.arange(60), {"tokens": tokens}, own, tokens == 0)


def entries(arrays):
    """(example, position, next token, latent, attribution) of every entry."""
    for row, (begin, end) in enumerate(zip(arrays["offsets"], arrays["offsets"][1:], strict=False)):
        for i in range(begin, end):
            where = [int(arrays[name][row]) for name in ("example_id", "position", "next_token")]
            yield *where, int(arrays["indices"][i]), float(arrays["values"][i])


def assert_neurons(arrays, x, weights):
    """Each row's are x_i h_i, to half precision."""
    columns = (arrays[key].tolist() for key in ("example_id", "position", "next_token"))
    places = zip(*columns, strict=True)
    expected = [x[e, t].numpy() * weights[e, t][:, token] for e, t, token in places]
    assert arrays["neurons"].dtype == torch.float16
    assert_allclose(arrays["neurons"].double(), expected, rtol=2**-11, atol=2**-25)


def weights_of(host, inputs, site):
    """x at a site, and for each token what a vector there adds to the logits, by NumPy."""
    with torch.no_grad():
        seen = host.record(inputs, list(dict.fromkeys([site, LAST])))
    r, head = seen[LAST].numpy(), host.network.head.detach().numpy()
    head = head - head.mean(1, keepdims=True)
    norm = np.broadcast_to(np.eye(D), (*r.shape[:2], D, D))
    if isinstance(host.network, Centred):
        centre = np.eye(D) - 1 / D
        norm = centre * host.network.gain.numpy() / r.std(-1)[..., None, None]
    elif isinstance(host.network, Normed):
        norm = norm / np.sqrt((r**2).mean(-1))[..., None, None]
    return seen[site], norm @ head


@pytest.mark.parametrize("site", [SITE, "blocks.1.mlp_out", LAST, "blocks.0.resid_pre"])
@pytest.mark.parametrize("n_logits", [2**25, 1])
@pytest.mark.parametrize("network", [Network, Normed, Capped, Centred])
def test_every_attribution_is_that_of_numpy(
    measure_spliced, inputs, sae, network, site, n_logits, monkeypatch
):
    monkeypatch.setattr(attribution, "N_LOGITS", n_logits)
    of = host_of(network)
    found = measure_spliced(CFG, sae, [inputs], host=of, site=site)
    x, weights = weights_of(of, inputs, site)
    decoder = (sae.W_dec / sae.input_scale).detach().numpy()
    seen = {}
    for example, t, token, latent, value in entries(found.arrays["attributions"]):
        assert token == inputs.tensors["tokens"][example, t + 1]
        f = sae.encode(x[example, t][None])[0, latent].item()
        assert f > 0
        assert_allclose(value, f * decoder[latent] @ weights[example, t][:, token], rtol=1e-5)
        seen.setdefault((example, t), []).append(latent)
    # Position 0 is dropped; the last token of a text has none after it.
    assert set(seen) == {(0, 1), (0, 2), (0, 3), (1, 1), (1, 2), (2, 1)}
    assert_neurons(found.arrays["attributions"], x, weights)
    for (example, t), latents in seen.items():
        assert latents == sae.encode(x[example, t][None])[0].nonzero()[:, 0].tolist()


def test_behind_the_final_norm_weights_are_the_heads(measure_spliced, inputs, sae, monkeypatch):
    host = host_of(Centred)
    taps = host.taps()
    monkeypatch.setattr(host, "taps", lambda: {**taps, "final_norm": Tap("normed")})
    found = measure_spliced(CFG, sae, [inputs], host=host, site="final_norm")
    with torch.no_grad():
        x, head = host.record(inputs, ["final_norm"])["final_norm"], host.network.head.numpy()
    decoder, n = (sae.W_dec / sae.input_scale).detach().numpy(), 0
    for example, t, token, latent, value in entries(found.arrays["attributions"]):
        f, n = sae.encode(x[example, t][None])[0, latent].item(), n + 1
        weight = head[:, token] - head.mean(1)
        assert_allclose(value, f * decoder[latent] @ weight, rtol=1e-5)
    assert n > 6
    weights = np.broadcast_to(head - head.mean(1, keepdims=True), (*x.shape[:2], D, VOCAB))
    assert_neurons(found.arrays["attributions"], x, weights)


@pytest.mark.parametrize("network", [Network, Normed, Centred])
def test_all_that_is_in_the_stream_sums_to_the_logit(inputs, network):
    of = host_of(network)
    with torch.no_grad():
        stream, whole = of.record(inputs, [LAST])[LAST], of.forward(inputs)
        head = DirectLogits(of, of.sites()[LAST], inputs, stream)
        at = torch.tensor([0, 1, 2]), torch.tensor([3, 0, 1]), torch.tensor([5, 2, 8])
        weights, logit = head.weights(inputs, stream, *at)
    assert head.centres == (network is Centred)
    assert_allclose(logit, whole[at] - whole[at[:2]].mean(1))
    bias = getattr(of.network, "bias", torch.zeros(D).double()) @ of.network.head.detach()
    said = (weights * stream[at[:2]]).sum(1)
    assert_allclose(said, logit - (bias - bias.mean())[at[2]], rtol=1e-9)


@pytest.mark.parametrize("site", [SITE, "blocks.2.mlp_out", LAST])
def test_neurons_sum_to_all_that_a_site_says_directly(measure_spliced, normed, texts, sae, site):
    arrays = measure_spliced(CFG, sae, [texts], host=normed, site=site).arrays["attributions"]
    at = arrays["example_id"], arrays["position"].long()
    with torch.no_grad():
        seen = normed.record(texts, list(dict.fromkeys([site, LAST])))
        scale = seen[LAST].square().mean(-1, keepdim=True).sqrt()  # As the model has it.
        said = (seen[site] / scale) @ normed.network.head
        whole = normed.forward(texts)
    said, whole = (x - x.mean(2, keepdim=True) for x in (said, whole))
    token = arrays["next_token"].long()
    assert_allclose(arrays["neurons"].double().sum(1), said[(*at, token)], rtol=2e-3, atol=2e-3)
    assert torch.allclose(said, whole) == (site == LAST)


def test_the_metrics_are_sums_of_what_is_kept(measure_spliced, normed, inputs, sae):
    found = measure_spliced(CFG, sae, [inputs], host=normed)
    values = np.array([entry[4] for entry in entries(found.arrays["attributions"])])
    metrics = found.metrics["attribution"]
    assert metrics["n_tokens"] == 6 and found.notes == []
    assert metrics["n_latents"] == len({e[3] for e in entries(found.arrays["attributions"])})
    assert_allclose(metrics["direct"], values.sum() / 6)
    assert_allclose(metrics["positive_frac"], (values > 0).mean())
    with torch.no_grad():
        logits = normed.forward(inputs)
    logits = logits - logits.mean(2, keepdim=True)
    tokens = inputs.tensors["tokens"]
    rows = [(0, 1), (0, 2), (0, 3), (1, 1), (1, 2), (2, 1)]
    assert_allclose(metrics["logit"], np.mean([logits[e, t, tokens[e, t + 1]] for e, t in rows]))


def test_intervals_are_over_examples(measure_spliced, normed, texts, sae):
    found = measure_spliced(CFG | {"n_bootstrap": 400}, sae, texts.split(7), host=normed)
    arrays, metrics = found.arrays["attributions"], found.metrics["attribution"]
    assert measure_spliced(CFG, sae, [texts], host=normed).ci == {} and not found.notes
    of_example = {}
    for example, *_, value in entries(arrays):
        sums = of_example.setdefault(example, np.zeros(3))
        sums += value, value > 0, 1
    said, positive, n = np.array(list(of_example.values())).T
    for name, values in (("direct", said / 7), ("positive_frac", positive / n)):
        ci = found.ci[f"attribution.{name}"]
        assert ci["n"] == 60 and ci["lo"] < metrics[name] < ci["hi"]
        # Examples have 7 rows each, and about as many entries.
        assert ci["se"] == pytest.approx(values.std(ddof=1) / 60**0.5, rel=0.15)
    with torch.no_grad():
        logits = normed.forward(texts)
    logits = logits - logits.mean(2, keepdim=True)
    following = texts.tensors["tokens"][:, 2:].unsqueeze(2)
    means = logits[:, 1:-1].gather(2, following)[..., 0].mean(1)
    ci = found.ci["attribution.logit"]
    assert ci["se"] == pytest.approx(float(means.std()) / 60**0.5, rel=0.15)
    assert metrics["logit"] == pytest.approx(float(means.mean()))
    assert ci["lo"] < metrics["logit"] < ci["hi"]


def test_a_single_example_has_no_interval(measure_spliced, normed, texts, sae):
    (one, *_) = texts.split(1)
    found = measure_spliced(CFG | {"n_bootstrap": 100}, sae, [one], host=normed)
    assert found.ci == {} and {n.code for n in found.notes} == {"too_few_examples"}
    assert {n.metric for n in found.notes} == {
        f"attribution.{name}" for name in ("direct", "logit", "positive_frac")
    }


@pytest.mark.parametrize("scaling", ["sqrt_d", "layer_norm", "whitening"])
def test_latents_count_in_the_units_of_the_site(measure_spliced, host, inputs, scaling):
    coder = build("topk", D, D_SAE, input_scaling=scaling)
    sample = 5 + 3 * torch.randn(64, D, generator=torch.Generator().manual_seed(0))
    coder.initialise(stats_of(sample), torch.Generator().manual_seed(1))
    coder = coder.double()
    found = measure_spliced(CFG, coder, [inputs], host=host)
    x, weights = weights_of(host, inputs, SITE)
    for example, t, token, latent, value in entries(found.arrays["attributions"]):
        row = x[example, t][None]
        acts = coder.encode(row).detach()
        without = acts.clone()
        without[0, latent] = 0
        part, rest = (coder.unscaled(coder.decode_scaled(a), row) for a in (acts, without))
        alone = (part - rest).detach().numpy()[0]
        assert_allclose(value, alone @ weights[example, t][:, token], rtol=1e-5)


def test_a_transcoders_latents_add_to_what_it_predicts(measure_spliced, host, inputs):
    cfg = preset("sae", "transcoder") | {"d_sae": D_SAE, "expansion": None, "k": 3, "skip": True}
    coder = SAES.build(cfg, d_in=D, d_out=D)
    sample = torch.randn(64, 2 * D, generator=torch.Generator().manual_seed(0))
    coder.initialise(stats_of(sample), torch.Generator().manual_seed(1))
    coder = coder.double()
    found = measure_spliced(CFG, coder, [inputs], host=host, target="blocks.1.mlp_out")
    x, weights = weights_of(host, inputs, SITE)
    decoder = (coder.W_dec / coder.target_scale).detach().numpy()
    for example, t, token, latent, value in entries(found.arrays["attributions"]):
        f = coder.encode(x[example, t][None])[0, latent].item()
        assert_allclose(value, f * decoder[latent] @ weights[example, t][:, token], rtol=1e-5)
    with torch.no_grad():
        written = host.record(inputs, ["blocks.1.mlp_out"])["blocks.1.mlp_out"]
    assert_neurons(found.arrays["attributions"], written, weights)


def test_batches_change_nothing(measure_spliced, normed, texts, sae):
    whole = measure_spliced(CFG, sae, [texts], host=normed).arrays["attributions"]
    parts = measure_spliced(CFG, sae, texts.split(7), host=normed).arrays["attributions"]
    for name, column in whole.items():
        assert_allclose(parts[name], column, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("size", [60, 4, 1])
def test_as_many_whole_examples_are_kept_as_fit(
    measure_spliced, normed, texts, sae, size, monkeypatch
):
    whole = measure_spliced(CFG, sae, [texts], host=normed).arrays["attributions"]
    cfg, batches = CFG | {"n_rows": 7 * 5 + 6}, texts.split(size)  # 7 rows an example.
    found = measure_spliced(cfg, sae, batches, host=normed)
    kept = found.arrays["attributions"]
    assert found.metrics["attribution"]["n_tokens"] == len(kept["position"]) == 35
    assert [note.code for note in found.notes] == ["too_few_examples"]
    assert found.left_out and not measure_spliced(CFG, sae, batches, host=normed).left_out
    for name, column in kept.items():
        assert_allclose(column, whole[name][: len(column)], rtol=1e-6, err_msg=name)
    assert kept["offsets"][-1] == len(kept["values"]) and len(kept["neurons"]) == 35
    # Of `keep_bytes`: 14 rows.
    for name, n_bytes in (("ROW_BYTES", 2 * 10**9 // 15), ("NEURON_BYTES", 2 * 10**9 // 15 // D)):
        with monkeypatch.context() as patch:
            patch.setattr(attribution, name, n_bytes)
            found = measure_spliced(CFG, sae, batches, host=normed)
        assert found.metrics["attribution"]["n_tokens"] == 14
    found = measure_spliced(CFG | {"n_rows": 6}, sae, batches, host=normed)
    assert found.metrics["attribution"]["n_tokens"] == 0
    assert found.metrics["attribution"]["direct"] is None and not found.arrays
    assert {note.detail[:30] for note in found.notes} == {"the first example takes more t"}


def test_bytes_are_those_that_are_kept(measure_spliced, normed, texts, sae):
    arrays = measure_spliced(CFG, sae, [texts], host=normed).arrays["attributions"]
    n, nnz = len(arrays["position"]), len(arrays["values"])
    # An id, a position, a token and an offset; a place and a value; a coordinate.
    assert attribution.ROW_BYTES * n == sum(
        arrays[key].nbytes for key in ("example_id", "position", "next_token")
    ) + (arrays["offsets"].nbytes - 8)
    assert attribution.ENTRY_BYTES * nnz == arrays["indices"].nbytes + arrays["values"].nbytes
    assert attribution.NEURON_BYTES * n * D == arrays["neurons"].nbytes


def test_neurons_can_be_left_out(measure_spliced, normed, texts, sae, monkeypatch):
    whole = measure_spliced(CFG, sae, [texts], host=normed).arrays["attributions"]
    monkeypatch.setattr(attribution, "NEURON_BYTES", 10**9)  # Which counts no longer.
    found = measure_spliced(CFG | {"neurons": False}, sae, [texts], host=normed)
    arrays = found.arrays["attributions"]
    assert arrays.keys() == whole.keys() - {"neurons"} and not found.notes
    for name, column in arrays.items():
        assert torch.equal(column, whole[name])


def test_what_is_too_large_for_half_precision_stays_finite():
    given = torch.tensor([[1e6, -1e30, 65504.0, 0.1]])
    assert attribution.in_half(given).tolist() == [[65504, -65504, 65504, pytest.approx(0.1, 1e-3)]]


def turned(host, sae, Q, order):
    """The host with Q x for x everywhere, the SAE that reads it so, its latents in some order."""
    other = Host()
    other.network = type(host.network)()
    with torch.no_grad():
        other.network.embed.copy_(host.network.embed @ Q)
        other.network.head.copy_(Q.T @ host.network.head)
        for mine, block in zip(other.network.blocks, host.network.blocks, strict=True):
            mine.weight.copy_(Q.T @ block.weight)
            mine.mlp = torch.nn.Linear(D, D, bias=False, dtype=torch.float64)
            mine.mlp.weight.copy_(Q.T)
        coder = build("topk", D, D_SAE).double()
        coder.load_state_dict(sae.state_dict())
        coder.W_enc_rows.copy_((sae.W_enc_rows @ Q)[order])
        coder.W_dec.copy_((sae.W_dec @ Q)[order])
        coder.b_enc.copy_(sae.b_enc[order])
        coder.b_dec.copy_(sae.b_dec @ Q)
    return other, coder


def kept_by(findings):
    arrays = {k: v.numpy() for k, v in findings.arrays["attributions"].items()}
    matrix = csr_array((arrays["values"], arrays["indices"], arrays["offsets"]),
                       shape=(len(arrays["position"]), D_SAE))  # fmt: skip
    columns = (arrays[name].astype(np.int64) for name in ("example_id", "position", "next_token"))
    return Attributions(*columns, matrix, arrays["neurons"])


def test_in_other_coordinates_latents_say_the_same_up_to_their_order(
    measure_spliced, normed, texts, sae
):
    generator = torch.Generator().manual_seed(2)
    Q = torch.linalg.qr(torch.randn(D, D, generator=generator, dtype=torch.float64)).Q
    order = torch.randperm(D_SAE, generator=generator)
    other, coder = turned(normed, sae, Q, order)
    assert_allclose(other.forward(texts).detach(), normed.forward(texts).detach(), rtol=1e-9)
    one, two = (
        kept_by(measure_spliced(CFG, s, [texts], host=h))
        for h, s in ((normed, sae), (other, coder))
    )
    ((_, rho),) = correlations(one.matrix.astype(float), two.matrix.astype(float))
    fires = ~np.isnan(rho).all(1)
    assert fires.sum() > D_SAE / 2
    for k, j in enumerate(order.tolist()):
        if fires[j]:
            assert np.nanargmax(rho[:, k]) == j and rho[j, k] == pytest.approx(1, abs=1e-5)
    found, why = compared(one, two, neurons=True, seed=0)
    assert not why and found["n_units"] == 60 * 7 and found["n_other_token"] == 0
    assert found["max_corr_quantiles_12"]["0.05"] == pytest.approx(1, abs=1e-5)
    assert found["frac_above_half_21"] == 1 and found["frac_above_half_shuffled_12"] < 0.1
    assert found["n_constant_1"] == found["n_constant_2"] == (~fires).sum()
    # Coordinates are others now: each is a bit of many.
    assert found["max_corr_quantiles_neurons_12"]["0.95"] < 0.7
    # Of another model with the same texts it is chance, or little more.
    torch.nn.init.normal_(other.network.head, generator=generator)
    stranger = kept_by(measure_spliced(CFG, coder, [texts], host=other))
    apart, _ = compared(one, stranger, neurons=False, seed=0)
    assert apart["max_corr_mean_12"] < 0.6 < found["max_corr_mean_12"]
    assert not any("neurons" in key for key in apart)


def test_neurons_of_a_model_whose_coordinates_are_in_another_order_say_the_same(
    measure_spliced, normed, texts, sae
):
    order = torch.tensor([3, 5, 0, 1, 4, 2])
    other, coder = turned(normed, sae, torch.eye(D).double()[:, order], torch.arange(D_SAE))
    one, two = (
        kept_by(measure_spliced(CFG, s, [texts], host=h))
        for h, s in ((normed, sae), (other, coder))
    )
    rho = np.corrcoef(one.neurons.astype(float).T, two.neurons.astype(float).T)[:D, D:]
    assert (rho.argmax(0) == order.numpy()).all() and (np.sort(rho, 0)[-2] < 0.9).all()
    found, why = compared(one, two, neurons=True, seed=0)
    assert not why and found["n_constant_neurons_1"] == 0
    for way in ("12", "21"):
        assert found[f"max_corr_quantiles_neurons_{way}"]["0.05"] == pytest.approx(1, abs=1e-5)
        assert found[f"max_corr_mean_neurons_shuffled_{way}"] < 0.2


@pytest.mark.parametrize(
    ("output", "tokens", "site", "message"),
    [
        (
            "features",
            "all",
            SITE,
            r"takes the logits of a causal language model; .*compare=\[firing\]",
        ),
        ("class_logits", "all", SITE, "takes the logits of a causal language model"),
        ("token_logits", "mean", SITE, r"site\.tokens=mean"),
        ("token_logits", "last", SITE, r"site\.tokens=last: no token comes after the last"),
        ("token_logits", "all", "blocks.0.mlp_act", "mlp_act adds nothing to a residual stream"),
    ],
)
def test_what_cannot_be_served_is_refused_ahead(
    make_labels, output, tokens, site, message, monkeypatch
):
    host, taps = Host(), Host().taps()
    monkeypatch.setattr(host, "taps", lambda: {"blocks.0.mlp_act": Tap("blocks.0.mlp"), **taps})
    host.output = output
    setting = Setting(make_labels(), lambda: host, host.sites()[site], TokenSelection(tokens))
    with pytest.raises(ConfigError, match=message):
        EVALUATORS.build(CFG).check(setting)


def test_an_encoder_is_refused_ahead(host, make_labels):
    host.causal = False
    setting = Setting(make_labels(), lambda: host, host.sites()[SITE], TokenSelection("all"))
    with pytest.raises(ConfigError, match="takes the logits of a causal"):
        EVALUATORS.build(CFG).check(setting)
