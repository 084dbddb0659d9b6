"""dictionary_learning's folders against its formulas in NumPy, and ours as it would read them."""

import json

import numpy as np
import pytest
import torch
from interchange_folders import D_IN, D_SAE, draw, largest, numpy
from safetensors.torch import load_file

from sae_runner import load_sae
from sae_runner.errors import ConfigError, StoreError
from sae_runner.interchange import recognise
from sae_runner.interchange.base import Origin
from sae_runner.interchange.dictionary_learning import DictionaryLearning, read_state

LINEAR = {
    "encoder.weight": (D_SAE, D_IN),
    "encoder.bias": (D_SAE,),
    "decoder.weight": (D_IN, D_SAE),
}
PLAIN = {"W_enc": (D_IN, D_SAE), "b_enc": (D_SAE,), "W_dec": (D_SAE, D_IN), "b_dec": (D_IN,)}
CHOOSING = {"k": (), "threshold": ()}
SHAPES = {
    "AutoEncoder": {**LINEAR, "bias": (D_IN,)},
    "AutoEncoderNew": {**LINEAR, "decoder.bias": (D_IN,)},
    "GatedAutoEncoder": {
        "encoder.weight": (D_SAE, D_IN), "decoder.weight": (D_IN, D_SAE), "r_mag": (D_SAE,),
        "gate_bias": (D_SAE,), "mag_bias": (D_SAE,), "decoder_bias": (D_IN,),
    },
    "JumpReluAutoEncoder": {**PLAIN, "threshold": (D_SAE,)},
    "AutoEncoderTopK": {**LINEAR, "b_dec": (D_IN,), **CHOOSING},
    "BatchTopKSAE": {**LINEAR, "b_dec": (D_IN,), **CHOOSING},
    "MatryoshkaBatchTopKSAE": {**PLAIN, **CHOOSING, "group_sizes": (2,)},
}  # fmt: skip
OPTIONS = {
    "AutoEncoderTopK": {"k": 3}, "BatchTopKSAE": {"k": 3},
    "MatryoshkaBatchTopKSAE": {"k": 3, "group_sizes": [5, 9], "group_fractions": [5 / 14, 9 / 14]},
}  # fmt: skip


def state(dict_class, threshold=0.4):
    shapes = SHAPES[dict_class].items()
    found = {name: draw(*shape, seed=i, scale=0.5) for i, (name, shape) in enumerate(shapes)}
    if dict_class == "JumpReluAutoEncoder":
        found["threshold"] = found["threshold"].abs()
    if "k" in found:
        found["k"] = torch.tensor(3, dtype=torch.int32)
        found["threshold"] = torch.tensor(threshold)
    if "group_sizes" in found:
        found["group_sizes"] = torch.tensor([5, 9])
    return found


def compute(dict_class, t, x):
    """Latents and reconstruction by that library's definitions."""
    if dict_class in ("JumpReluAutoEncoder", "MatryoshkaBatchTopKSAE"):
        w_enc, b_enc, w_dec, b_dec = (t[name] for name in PLAIN)
    else:
        w_enc, w_dec = t["encoder.weight"].T, t["decoder.weight"].T
        b_enc = t.get("encoder.bias", 0)
        b_dec = next(t[n] for n in ("bias", "decoder.bias", "decoder_bias", "b_dec") if n in t)
    centre = dict_class not in ("AutoEncoderNew", "JumpReluAutoEncoder")
    z = (x - b_dec if centre else x) @ w_enc + b_enc
    scale = 1.0
    match dict_class:
        case "GatedAutoEncoder":
            magnitude = np.maximum(np.exp(t["r_mag"]) * z + t["mag_bias"], 0)
            acts = (z + t["gate_bias"] > 0) * magnitude
        case "AutoEncoder":  # Its loader makes decoder rows unit vectors.
            scale = np.linalg.norm(w_dec, axis=1)
            acts = np.maximum(z, 0) * scale
        case "AutoEncoderNew":
            acts = np.maximum(z, 0)
        case "AutoEncoderTopK":
            acts = np.maximum(z, 0) * largest(z, 3)
        case _:
            acts = np.maximum(z, 0) * (np.maximum(z, 0) > t["threshold"])
    return acts, acts / scale @ w_dec + b_dec


def assert_same(sae, x, acts, x_hat):
    np.testing.assert_allclose(sae.encode(x).double().numpy(), acts, atol=1e-5)
    np.testing.assert_allclose(sae(x).latents.dense().double().numpy(), acts, atol=1e-5)
    np.testing.assert_allclose(sae(x).x_hat.double().numpy(), x_hat, atol=1e-5)


@pytest.mark.parametrize("dict_class", SHAPES)
def test_every_class_computes_what_it_does_there(dictionary_folder, x, dict_class):
    t = state(dict_class)
    folder = dictionary_folder(dict_class, t, **OPTIONS.get(dict_class, {}))
    acts, x_hat = compute(dict_class, numpy(t), x.double().numpy())
    assert (acts != 0).any() and (acts == 0).any()
    assert_same(load_sae(folder), x, acts, x_hat)


@pytest.mark.parametrize("dict_class", ["BatchTopKSAE", "MatryoshkaBatchTopKSAE"])
def test_a_threshold_that_was_not_measured_lets_all_through(dictionary_folder, x, dict_class):
    t = state(dict_class, threshold=-1.0)
    folder = dictionary_folder(dict_class, t, **OPTIONS[dict_class])
    acts, x_hat = compute(dict_class, numpy(t), x.double().numpy())
    assert_same(load_sae(folder), x, acts, x_hat)


def test_nested_widths_come_back(dictionary_folder):
    t = state("MatryoshkaBatchTopKSAE")
    folder = dictionary_folder("MatryoshkaBatchTopKSAE", t, **OPTIONS["MatryoshkaBatchTopKSAE"])
    assert load_sae(folder).widths == [5, 14]


def test_what_goes_with_the_dictionary_is_kept(dictionary_folder):
    origin = (
        DictionaryLearning().read(dictionary_folder("AutoEncoder", state("AutoEncoder"))).origin
    )
    assert (origin.model, origin.site) == ("pythia", "blocks.3.resid_post")
    assert origin.hook == "resid_post_layer_3" and origin.training["lr"] == 1e-4
    other = dictionary_folder("AutoEncoder", state("AutoEncoder"), submodule_name="mlp3")
    assert DictionaryLearning().read(other).origin.site is None


# -- Refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ({"dict_class": "IdentityDict"}, "dict_class='IdentityDict' cannot be read"),
        ({"input_scale": 3}, "field 'input_scale'=3 is unknown here"),
        ({"k": 4}, "k=4, but it is 3 in the weights"),
        ({"dict_size": 15}, r"decoder.weight has shape \(6, 14\), expected \(6, 15\)"),
        ({"activation_dim": "6"}, "field 'activation_dim' is '6', no int"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(dictionary_folder, trainer, message):
    folder = dictionary_folder("AutoEncoderTopK", state("AutoEncoderTopK"), **{"k": 3, **trainer})
    with pytest.raises(StoreError, match=message):
        load_sae(folder)


def test_pairs_of_sites_are_refused(dictionary_folder):
    folder = dictionary_folder("AutoEncoder", state("AutoEncoder"))
    cfg = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**cfg, "buffer": {"io": "in_and_out"}}))
    with pytest.raises(StoreError, match="io=in_and_out: transcoders"):
        load_sae(folder)


class Intruder:
    def __reduce__(self):
        return print, ("ran",)


def test_nothing_of_a_file_is_run(tmp_path, capfd):
    torch.save({"encoder.weight": Intruder()}, tmp_path / "ae.pt")
    with pytest.raises(StoreError, match=r"ae.pt is no state dict"):
        read_state(tmp_path / "ae.pt")
    assert "ran" not in capfd.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"ae": {}, "optimizer": {}, "step": 3, "config": {}}, "is a backup of a run in progress"),
        ({"a": 3}, "holds more than tensors"),
        ([torch.ones(2)], "holds more than tensors"),
        ({"bias": torch.ones(D_IN)}, "tensor 'decoder.weight' is absent"),
    ],
)
def test_other_contents_are_named(dictionary_folder, content, message):
    with pytest.raises(StoreError, match=message):
        load_sae(dictionary_folder("AutoEncoder", content))


# -- Writing -------------------------------------------------------------------------------------

WRITTEN = [
    ("relu", {}, "AutoEncoderNew"), ("relu", {"apply_b_dec_to_input": True}, "AutoEncoder"),
    ("p_anneal", {"apply_b_dec_to_input": True}, "AutoEncoder"),
    ("gated", {}, "GatedAutoEncoder"),
    ("gated", {"apply_b_dec_to_input": False}, "GatedAutoEncoder"),
    ("jump_relu", {}, "JumpReluAutoEncoder"),
    ("jump_relu", {"apply_b_dec_to_input": True}, "JumpReluAutoEncoder"),
    ("topk", {}, "AutoEncoderTopK"), ("topk", {"apply_b_dec_to_input": False}, "AutoEncoderTopK"),
    ("archetypal", {"n_candidates": 20}, "AutoEncoderTopK"),
    ("batch_topk", {}, "BatchTopKSAE"),
    ("matryoshka", {"group_fractions": [5 / 14, 9 / 14]}, "MatryoshkaBatchTopKSAE"),
]  # fmt: skip
TRAINER = [
    "dict_class", "trainer_class", "activation_dim", "dict_size", "lr", "steps", "seed", "device",
    "layer", "lm_name", "wandb_name", "submodule_name",
]  # fmt: skip
BUFFER = [
    "d_submodule",
    "io",
    "n_ctxs",
    "ctx_len",
    "refresh_batch_size",
    "out_batch_size",
    "device",
]


@pytest.mark.parametrize(("kind", "options", "dict_class"), WRITTEN)
def test_what_is_written_is_what_the_library_writes_and_computes_the_same(
    trained, tmp_path, x, kind, options, dict_class
):
    sae = trained(kind, **options)
    expected = sae(x)
    origin = Origin(model="pythia", site="blocks.3.resid_post", training={"lr": 1e-3, "steps": 7})
    DictionaryLearning().write(tmp_path, sae, origin)
    cfg = json.loads((tmp_path / "config.json").read_text())
    own = {"AutoEncoderTopK": ["k"], "BatchTopKSAE": ["k"],
           "MatryoshkaBatchTopKSAE": ["k", "group_sizes"]}.get(dict_class, [])  # fmt: skip
    assert list(cfg["trainer"]) == TRAINER + own and list(cfg["buffer"]) == BUFFER
    assert cfg["trainer"]["dict_class"] == dict_class
    assert (cfg["trainer"]["layer"], cfg["trainer"]["submodule_name"]) == (3, "resid_post_layer_3")
    t = torch.load(tmp_path / "ae.pt", weights_only=True)
    assert {name: tuple(tensor.shape) for name, tensor in t.items()} == SHAPES[dict_class]
    assert all(v.dtype == torch.float32 for k, v in t.items() if k not in ("k", "group_sizes"))
    if "k" in t:
        assert t["k"].dtype == torch.int32 and int(t["k"]) == 3
    acts, x_hat = compute(dict_class, numpy(t), x.double().numpy())
    np.testing.assert_allclose(expected.latents.dense().double().numpy(), acts, atol=1e-5)
    np.testing.assert_allclose(expected.x_hat.double().numpy(), x_hat, atol=1e-5)
    assert recognise(tmp_path).name == "dictionary_learning"
    assert_same(load_sae(tmp_path), x, acts, x_hat)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("matching_pursuit", {}, "no SAE like sae.type=matching_pursuit"),
        ("topk", {"selection": "abstopk"}, "sae.type=topk with selection=abstopk"),
        ("topk", {"input_scaling": "layer_norm"}, "with input_scaling=layer_norm"),
        ("batch_topk", {"k": 2.5}, "sae.type=batch_topk with k=2.5, no whole number"),
    ],
)
def test_what_the_library_lacks_is_refused_by_name(trained, tmp_path, kind, options, message):
    with pytest.raises(ConfigError, match=message):
        DictionaryLearning().write(tmp_path, trained(kind, **options), Origin())


def test_a_site_in_no_layer_needs_a_name(trained, tmp_path):
    with pytest.raises(ConfigError, match="site pooled is in no layer"):
        DictionaryLearning().write(tmp_path, trained("topk"), Origin(site="pooled"))
    named = Origin(site="pooled", hook="visual.4.ln")
    DictionaryLearning().write(tmp_path, trained("topk"), named)
    trainer = json.loads((tmp_path / "config.json").read_text())["trainer"]
    assert (trainer["layer"], trainer["submodule_name"]) == (4, "visual.4.ln")


@pytest.mark.data
@pytest.mark.parametrize(("name", "kind"), [("standard", "relu"), ("topk", "topk")])
def test_what_the_library_wrote(data_dir, tmp_path, name, kind):
    folder = data_dir / "interchange" / f"dictionary_learning_{name}"
    sae, expected = load_sae(folder), load_file(folder / "expected.safetensors")
    assert sae.kind == kind
    x = expected["x"]
    assert (sae.encode(x) - expected["acts"]).abs().max() < 1e-5
    assert (sae(x).x_hat - expected["x_hat"]).abs().max() < 1e-5
    # Written again: the same fields and tensors.
    DictionaryLearning().write(tmp_path, sae, DictionaryLearning().read(folder).origin)
    theirs, ours = (json.loads((p / "config.json").read_text()) for p in (folder, tmp_path))
    assert {key: ours[key].keys() for key in ours} == {key: theirs[key].keys() for key in theirs}
    assert ours["trainer"]["submodule_name"] == "resid_post_layer_3"
    theirs, ours = (torch.load(p / "ae.pt", weights_only=True) for p in (folder, tmp_path))
    assert ours.keys() == theirs.keys()
    for key in theirs:
        torch.testing.assert_close(ours[key], theirs[key])
