"""sparsify's folders against its formulas in NumPy, and ours as it would read them."""

import json

import numpy as np
import pytest
import torch
from interchange_folders import D_IN, D_SAE, draw, largest, numpy
from safetensors.torch import load_file, save_file

from sae_runner import load_sae
from sae_runner.config import preset
from sae_runner.errors import ConfigError, StoreError
from sae_runner.interchange import recognise
from sae_runner.interchange.base import Origin
from sae_runner.interchange.sparsify import Sparsify
from sae_runner.saes import SAES


def compute(folder, x):
    """Latents and reconstruction by that library's definitions."""
    cfg, t = (
        json.loads((folder / "cfg.json").read_text()),
        numpy(load_file(folder / "sae.safetensors")),
    )
    centre = 0 if cfg["transcode"] else t["b_dec"]
    z = np.maximum((x - centre) @ t["encoder.weight"].T + t["encoder.bias"], 0)
    if cfg["activation"] == "topk":
        acts = z * largest(z, cfg["k"])
    else:
        groups = z.reshape(len(z), cfg["k"], -1)
        acts = (groups * (groups == groups.max(2, keepdims=True))).reshape(z.shape)
    past = x @ t["W_skip"].T if cfg["skip_connection"] else 0
    return acts, acts @ t["W_dec"] + past + t["b_dec"]


@pytest.mark.parametrize(("activation", "k"), [("topk", 3), ("groupmax", 7)])
def test_both_activations_compute_what_sparsify_does(sparsify_folder, x, activation, k):
    folder = sparsify_folder(activation=activation, k=k)
    sae, (acts, x_hat) = load_sae(folder), compute(folder, x.double().numpy())
    np.testing.assert_allclose(sae.encode(x).double().numpy(), acts, atol=1e-5)
    np.testing.assert_allclose(sae(x).x_hat.double().numpy(), x_hat, atol=1e-5)
    assert Sparsify().read(folder).origin.hook == "layers.3"


@pytest.mark.parametrize("skip", [False, True])
def test_transcoders_compute_what_sparsify_does(sparsify_folder, trained_transcoder, x, skip):
    folder = sparsify_folder(transcode=True, skip_connection=skip)
    if skip:
        weights = load_file(folder / "sae.safetensors")
        save_file({**weights, "W_skip": draw(D_IN, D_IN, seed=8)}, folder / "sae.safetensors")
    sae, (acts, y_hat) = load_sae(folder), compute(folder, x.double().numpy())
    assert sae.kind == "transcoder"
    np.testing.assert_allclose(sae.encode(x).double().numpy(), acts, atol=1e-5)
    np.testing.assert_allclose(sae(x).x_hat.double().numpy(), y_hat, atol=1e-5)
    ours = trained_transcoder(skip=skip)
    Sparsify().write(folder, ours, Origin())
    cfg = json.loads((folder / "cfg.json").read_text())
    assert cfg["transcode"] and cfg["skip_connection"] == skip
    assert ("W_skip" in load_file(folder / "sae.safetensors")) == skip
    acts, y_hat = compute(folder, x.double().numpy())
    for found in (ours, load_sae(folder)):
        np.testing.assert_allclose(found.encode(x).double().numpy(), acts, atol=1e-5)
        np.testing.assert_allclose(found(x).x_hat.double().numpy(), y_hat, atol=1e-5)


def test_a_transcoder_between_widths_has_no_place_there(trained_transcoder, tmp_path):
    with pytest.raises(ConfigError, match=r"sae.type=transcoder with d_in=6 and d_out=5"):
        Sparsify().write(tmp_path, trained_transcoder(d_out=5), Origin())


@pytest.fixture
def trained_transcoder():
    def trained_transcoder(d_out=D_IN, **options):
        cfg = preset("sae", "transcoder") | {"d_sae": D_SAE, "expansion": None, "k": 3, **options}
        sae = SAES.build({**cfg, "loss_reduction": "sum"}, d_in=D_IN, d_out=d_out)
        with torch.no_grad():
            for i, parameter in enumerate(sae.parameters()):
                parameter.copy_(draw(*parameter.shape, seed=i, scale=0.5))
            sae.input_scale.fill_(0.5)
            sae.target_scale.fill_(2.0)
        return sae.fold().eval().requires_grad_(False)

    return trained_transcoder


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"transcode": True, "skip_connection": True}, "tensor 'W_skip' is absent"),
        ({"skip_connection": True}, "skip_connection=true without transcode"),
        ({"activation": "jumprelu"}, "activation='jumprelu': only topk and groupmax"),
        ({"signed": True}, "field 'signed'=True is unknown here"),
        ({"num_latents": 0}, r"W_dec has shape \(14, 6\), expected \(192, 6\)"),
        ({"k": 3.5}, "field 'k' is 3.5, no int"),
        ({"k": 15}, "sae.k=15: must be <= d_sae=14"),
        ({"activation": "groupmax"}, "groupmax needs a divisor of d_sae=14"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(sparsify_folder, fields, message):
    with pytest.raises(StoreError, match=message):
        load_sae(sparsify_folder(**fields))


@pytest.mark.parametrize(
    ("kind", "options"),
    [("topk", {}), ("topk", {"selection": "groupmax", "k": 7}),
     ("archetypal", {"n_candidates": 20}),
     ("topk", {"apply_b_dec_to_input": False, "decoder_norm": "free"})],
)  # fmt: skip
def test_what_is_written_is_what_sparsify_writes_and_computes_the_same(
    trained, tmp_path, x, kind, options
):
    sae = trained(kind, **options)
    Sparsify().write(tmp_path, sae, Origin())
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    assert list(cfg) == [
        "activation", "expansion_factor", "normalize_decoder", "num_latents", "k", "multi_topk",
        "skip_connection", "transcode", "d_in",
    ]  # fmt: skip
    assert (cfg["d_in"], cfg["num_latents"]) == (D_IN, D_SAE)
    shapes = {k: tuple(v.shape) for k, v in load_file(tmp_path / "sae.safetensors").items()}
    assert shapes == {"encoder.weight": (D_SAE, D_IN), "encoder.bias": (D_SAE,),
                      "W_dec": (D_SAE, D_IN), "b_dec": (D_IN,)}  # fmt: skip
    acts, x_hat = compute(tmp_path, x.double().numpy())
    assert (acts != 0).any()
    for found in (sae, load_sae(tmp_path)):
        np.testing.assert_allclose(found.encode(x).double().numpy(), acts, atol=1e-5)
        np.testing.assert_allclose(found(x).x_hat.double().numpy(), x_hat, atol=1e-5)
    assert recognise(tmp_path).name == "sparsify"


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("relu", {}, "format=sparsify: it has no SAE like sae.type=relu"),
        ("topk", {"selection": "abstopk"}, "sae.type=topk with selection=abstopk"),
        ("topk", {"input_scaling": "layer_norm"}, "with input_scaling=layer_norm"),
    ],
)
def test_what_sparsify_lacks_is_refused_by_name(trained, tmp_path, kind, options, message):
    with pytest.raises(ConfigError, match=message):
        Sparsify().write(tmp_path, trained(kind, **options), Origin())


@pytest.mark.data
def test_what_sparsify_wrote(data_dir, tmp_path):
    folder = data_dir / "interchange" / "sparsify_topk"
    sae, expected = load_sae(folder), load_file(folder / "expected.safetensors")
    x = expected["x"]
    assert (sae.encode(x) - expected["acts"]).abs().max() < 1e-5
    assert (sae(x).x_hat - expected["x_hat"]).abs().max() < 1e-5
    Sparsify().write(tmp_path, sae, Origin())
    theirs, ours = (json.loads((p / "cfg.json").read_text()) for p in (folder, tmp_path))
    differing = {"expansion_factor", "normalize_decoder"}  # Neither is of the SAE as it is.
    assert ours.keys() == theirs.keys()
    assert all(ours[key] == theirs[key] for key in ours.keys() - differing)
    theirs, ours = (load_file(p / "sae.safetensors") for p in (folder, tmp_path))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
