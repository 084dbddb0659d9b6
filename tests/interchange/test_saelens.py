"""SAELens' folders against its formulas in NumPy, and ours as it would read them."""

import json

import numpy as np
import pytest
import torch
from interchange_folders import D_IN, D_SAE, draw, largest, numpy
from safetensors.torch import load_file, save_file

from sae_runner import load_sae
from sae_runner.errors import ConfigError, StoreError
from sae_runner.interchange import recognise
from sae_runner.interchange.base import Origin
from sae_runner.interchange.saelens import SAELens

COMMON = ["W_enc", "W_dec", "b_enc", "b_dec"]
KEYS = {
    "standard": COMMON, "topk": COMMON, "abstopk": COMMON, "jumprelu": [*COMMON, "threshold"],
    "gated": ["W_enc", "W_dec", "b_gate", "b_mag", "r_mag", "b_dec"],
    "batchtopk": [*COMMON, "topk_threshold"], "matryoshka_batchtopk": [*COMMON, "topk_threshold"],
    "matching_pursuit": ["W_dec", "b_dec"],
}  # fmt: skip


def weights(architecture):
    shapes = {
        "W_enc": (D_IN, D_SAE),
        "W_dec": (D_SAE, D_IN),
        "b_dec": (D_IN,),
        "topk_threshold": (),
    }
    found = {
        name: draw(*shapes.get(name, (D_SAE,)), seed=i, scale=0.4)
        for i, name in enumerate(KEYS[architecture])
    }
    if "threshold" in found:
        found["threshold"] = found["threshold"].abs()
    if "topk_threshold" in found:
        found["topk_threshold"] = torch.tensor(0.8, dtype=torch.float64)
    if architecture == "matching_pursuit":
        found["W_dec"] = found["W_dec"] / found["W_dec"].norm(dim=1, keepdim=True)
    return found


def encode(architecture, t, x, cfg):
    """Latents of rows that are normalised already, by SAELens' definitions."""
    centred = x - t["b_dec"] if cfg.get("apply_b_dec_to_input", True) else x
    if architecture == "matching_pursuit":
        return pursue(centred, t["W_dec"], cfg)
    a = centred @ t["W_enc"]
    norms = np.linalg.norm(t["W_dec"], axis=1)
    if architecture == "gated":
        return (a + t["b_gate"] > 0) * np.maximum(np.exp(t["r_mag"]) * a + t["b_mag"], 0)
    z = a + t["b_enc"]
    if cfg.get("rescale_acts_by_decoder_norm", False):
        z = z * norms
    if architecture == "standard":
        return np.maximum(z, 0)
    if architecture == "jumprelu":
        return np.maximum(z, 0) * (z > t["threshold"])
    if architecture == "topk":
        return np.maximum(z, 0) * largest(z, cfg["k"])
    if architecture == "abstopk":
        return z * largest(np.abs(z), cfg["k"])
    return np.maximum(z, 0) * (z > t["topk_threshold"])


def pursue(residual, rows, cfg):
    acts, done = np.zeros((len(residual), len(rows))), np.zeros(len(residual), bool)
    for _ in range(cfg["max_iterations"]):
        best = np.maximum(residual @ rows.T, 0).argmax(1)
        values = np.maximum((residual * rows[best]).sum(1), 0) * ~done
        before = acts != 0
        acts[np.arange(len(acts)), best] += values
        residual = residual - values[:, None] * rows[best]
        done |= (before == (acts != 0)).all(1)
        done |= np.linalg.norm(residual, axis=1) < cfg["residual_threshold"]
    return acts


def decode(t, acts, cfg):
    norms = np.linalg.norm(t["W_dec"], axis=1)
    acts = acts / norms if cfg.get("rescale_acts_by_decoder_norm", False) else acts
    return acts @ t["W_dec"] + t["b_dec"]


def assert_same(sae, x, acts, x_hat):
    np.testing.assert_allclose(sae.encode(x).double().numpy(), acts, atol=1e-5)
    np.testing.assert_allclose(sae(x).latents.dense().double().numpy(), acts, atol=1e-5)
    np.testing.assert_allclose(sae(x).x_hat.double().numpy(), x_hat, atol=1e-5)


@pytest.mark.parametrize("centre", [True, False])
@pytest.mark.parametrize(
    ("architecture", "fields"),
    [
        ("standard", {}), ("gated", {}), ("jumprelu", {}), ("topk", {"k": 3}),
        ("topk", {"k": 3, "rescale_acts_by_decoder_norm": True}),
        ("abstopk", {"k": 3, "rescale_acts_by_decoder_norm": False}),
        ("batchtopk", {"k": 3.5, "rescale_acts_by_decoder_norm": True, "topk_threshold_lr": 0.01}),
        ("matryoshka_batchtopk", {"k": 3, "rescale_acts_by_decoder_norm": False}),
        ("matching_pursuit", {"max_iterations": 5, "residual_threshold": 0.4}),
    ],
)  # fmt: skip
def test_every_architecture_computes_what_saelens_does(
    saelens_folder, x, architecture, fields, centre
):
    if architecture == "matching_pursuit" and not centre:
        return  # b_dec is then left out on both sides: the next test.
    t = weights(architecture)
    cfg = {**fields, "apply_b_dec_to_input": centre}
    folder = saelens_folder(t, architecture=architecture, **cfg)
    sae, known = load_sae(folder), numpy(t)
    acts = encode(architecture, known, x.double().numpy(), cfg)
    assert (acts != 0).any() and (acts == 0).any()
    assert_same(sae, x, acts, decode(known, acts, cfg))
    assert not sae.training and not any(p.requires_grad for p in sae.parameters())


def test_matching_pursuit_without_centring_adds_no_bias(saelens_folder, x):
    t = weights("matching_pursuit")
    cfg = {"max_iterations": None, "residual_threshold": 0.2, "apply_b_dec_to_input": False}
    sae = load_sae(saelens_folder(t, architecture="matching_pursuit", **cfg))
    acts = pursue(x.double().numpy(), numpy(t)["W_dec"], {**cfg, "max_iterations": D_IN})
    assert_same(sae, x, acts, acts @ numpy(t)["W_dec"])


def test_layer_norm_is_that_of_saelens(saelens_folder, x):
    t, x = weights("topk"), 0.01 * x  # Small rows: where the epsilon stands decides.
    cfg = {"k": 3, "rescale_acts_by_decoder_norm": False}
    folder = saelens_folder(t, architecture="topk", normalize_activations="layer_norm", **cfg)
    rows, known = x.double().numpy(), numpy(t)
    mean, deviation = rows.mean(1, keepdims=True), rows.std(1, ddof=1, keepdims=True)
    acts = encode("topk", known, (rows - mean) / (deviation + 1e-5), cfg)
    assert_same(load_sae(folder), x, acts, decode(known, acts, cfg) * deviation + mean)


def test_a_norm_factor_is_taken_from_the_file_beside(saelens_folder, x):
    t, cfg = weights("jumprelu"), {}
    folder = saelens_folder(
        t, architecture="jumprelu", normalize_activations="expected_average_only_in"
    )
    with pytest.raises(StoreError, match=r"normalize_activations='expected_average_only_in', but"):
        load_sae(folder)
    (folder / "activation_scaler.json").write_text('{"scaling_factor": 2.5}')
    acts = encode("jumprelu", numpy(t), 2.5 * x.double().numpy(), cfg)
    assert_same(load_sae(folder), x, acts, decode(numpy(t), acts, cfg) / 2.5)


@pytest.mark.parametrize("dtype", ["bfloat16", "torch.float16", "float64"])
def test_weights_of_any_precision_become_float32(saelens_folder, dtype):
    t = {k: v.to(getattr(torch, dtype.removeprefix("torch."))) for k, v in weights("topk").items()}
    sae = load_sae(saelens_folder(t, architecture="topk", k=3, dtype=dtype))
    assert sae.W_dec.dtype == torch.float32
    torch.testing.assert_close(sae.W_dec, t["W_dec"].float())


def test_log_thresholds_of_older_training_checkpoints(saelens_folder, x):
    t = weights("jumprelu")
    expected = load_sae(saelens_folder(t, architecture="jumprelu"))(x)
    t["log_threshold"] = t.pop("threshold").log()
    found = load_sae(saelens_folder(t, architecture="jumprelu"))(x)
    torch.testing.assert_close(found.x_hat, expected.x_hat)


# -- Version 5 and before ------------------------------------------------------------------------

V5 = {
    "metadata": None, "activation_fn_str": "relu", "finetuning_scaling_factor": False,
    "context_size": 128, "model_name": "gpt2", "hook_name": "blocks.8.hook_resid_pre",
    "hook_layer": 8, "hook_head_index": None, "prepend_bos": True, "dataset_path": "openwebtext",
    "sae_lens_training_version": "3.1.0", "l1_coefficient": 5, "apply_b_dec_to_input": None,
}  # fmt: skip


def test_a_file_without_a_version_is_read_as_an_old_one(saelens_folder, x):
    t = weights("standard")
    folder = saelens_folder(t, architecture="standard", **V5)
    acts = encode("standard", numpy(t), x.double().numpy(), {})
    assert_same(load_sae(folder), x, acts, decode(numpy(t), acts, {}))
    origin = SAELens().read(folder).origin
    assert origin.model == "gpt2" and origin.site == "blocks.8.resid_pre"
    assert origin.dataset == "openwebtext"


def test_top_k_of_old_files_is_an_activation_function(saelens_folder, x):
    t = weights("topk")
    old = {**V5, "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 4}}
    folder = saelens_folder(t, architecture="standard", **old)
    acts = encode("topk", numpy(t), x.double().numpy(), {"k": 4})
    assert_same(load_sae(folder), x, acts, decode(numpy(t), acts, {}))


def test_an_old_file_of_hook_z_has_heads_that_are_reshaped(saelens_folder):
    old = {**V5, "hook_name": "blocks.8.attn.hook_z", "reshape_activations": None}
    folder = saelens_folder(weights("standard"), architecture="standard", **old)
    with pytest.raises(StoreError, match="reshape_activations='hook_z'"):
        load_sae(folder)


def test_a_finetuning_factor_is_part_of_the_decoder(saelens_folder, x):
    t = weights("standard")
    scale = draw(D_SAE, seed=9).abs()
    old = {**V5, "finetuning_scaling_factor": True}
    folder = saelens_folder({**t, "scaling_factor": scale}, architecture="standard", **old)
    acts = encode("standard", numpy(t), x.double().numpy(), {})
    assert_same(load_sae(folder), x, acts, decode(numpy(t), acts * scale.double().numpy(), {}))
    with pytest.raises(StoreError, match="finetuning_scaling_factor is not set"):
        load_sae(saelens_folder({**t, "scaling_factor": scale}, architecture="standard", **V5))
    ones = {**t, "scaling_factor": torch.ones(D_SAE)}
    load_sae(saelens_folder(ones, architecture="standard", **V5))
    with pytest.raises(StoreError, match="finetuning_scaling_factor=true, but"):
        load_sae(saelens_folder(t, architecture="standard", **old))


# -- Refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architecture": "temporal"}, "architecture='temporal' cannot be read"),
        ({"architecture": "transcoder"}, "architecture='transcoder' cannot be read"),
        ({"normalize_activations": "constant_norm_rescale"}, "'constant_norm_rescale' cannot"),
        ({"normalize_activations": "covariance_whitening"}, "'covariance_whitening' cannot"),
        ({"reshape_activations": "hook_z"}, "reshape_activations='hook_z'"),
        ({"dtype": "fp8"}, "dtype='fp8' is unknown"),
        ({"sparse_gate": 3}, "field 'sparse_gate'=3 is unknown here"),
        ({"k": 3}, "field 'k'=3 is unknown here"),
        ({"d_sae": 13}, r"W_dec has shape \(14, 6\), expected \(13, 6\)"),
        ({"d_in": None}, "field 'd_in' is absent"),
        ({"metadata": None, "sparse_gate": 3}, "field 'sparse_gate'=3 is unknown here"),
        ({"metadata": None, "activation_fn_str": "gelu"}, "activation_fn='gelu'"),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused_by_name(saelens_folder, fields, message):
    folder = saelens_folder(weights("standard"), **{"architecture": "standard", **fields})
    with pytest.raises(StoreError, match=message):
        load_sae(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("b_enc"), "tensor 'b_enc' is absent"),
        (lambda t: t.update(W_skip=torch.ones(2)), "tensor 'W_skip' is unknown"),
        (lambda t: t.update(b_dec=torch.ones(D_SAE)), "b_dec has shape"),
    ],
)
def test_other_tensors_are_refused_by_name(saelens_folder, change, message):
    t = weights("standard")
    change(t)
    with pytest.raises(StoreError, match=message):
        load_sae(saelens_folder(t, architecture="standard"))


def test_damaged_files_are_named(saelens_folder):
    folder = saelens_folder(weights("standard"), architecture="standard")
    whole = (folder / "sae_weights.safetensors").read_bytes()
    (folder / "sae_weights.safetensors").write_bytes(whole[:-9])
    with pytest.raises(StoreError, match=r"sae_weights.safetensors is damaged"):
        load_sae(folder)
    (folder / "cfg.json").write_text("{")
    with pytest.raises(StoreError, match=r"cfg.json is no JSON"):
        load_sae(folder)


# -- Writing -------------------------------------------------------------------------------------

WRITTEN = [
    ("relu", {}, "standard"), ("relu", {"apply_b_dec_to_input": True}, "standard"),
    ("p_anneal", {}, "standard"), ("gated", {}, "gated"), ("jump_relu", {}, "jumprelu"),
    ("batch_topk", {}, "jumprelu"), ("matryoshka", {"group_fractions": [0.5, 0.5]}, "jumprelu"),
    ("topk", {}, "topk"), ("topk", {"selection": "abstopk"}, "abstopk"),
    ("topk", {"input_scaling": "layer_norm"}, "topk"),
    ("topk", {"input_scaling": "whitening"}, "topk"),
    ("archetypal", {"n_candidates": 20}, "topk"), ("matching_pursuit", {}, "matching_pursuit"),
]  # fmt: skip
EXTRA = {
    "topk": ["k", "rescale_acts_by_decoder_norm"], "abstopk": ["k", "rescale_acts_by_decoder_norm"],
    "matching_pursuit": ["residual_threshold", "max_iterations", "stop_on_duplicate_support"],
}  # fmt: skip


@pytest.mark.parametrize(("kind", "options", "architecture"), WRITTEN)
def test_what_is_written_is_what_saelens_writes_and_computes_the_same(
    trained, tmp_path, x, kind, options, architecture
):
    sae = trained(kind, **options)
    expected = sae(x)
    SAELens().write(tmp_path, sae, Origin(model="gpt2", site="blocks.3.resid_post"))
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    assert list(cfg) == [
        "d_in", "d_sae", "dtype", "device", "apply_b_dec_to_input", "normalize_activations",
        "reshape_activations", "metadata", *EXTRA.get(architecture, []), "architecture",
    ]  # fmt: skip
    assert cfg["architecture"] == architecture and cfg["dtype"] == "float32"
    assert int(cfg["metadata"]["sae_lens_version"].split(".")[0]) >= 6
    assert cfg["metadata"]["hook_name"] == "blocks.3.hook_resid_post"
    t = load_file(tmp_path / "sae_weights.safetensors")
    assert sorted(t) == sorted(KEYS[architecture])
    assert all(tensor.dtype == torch.float32 for tensor in t.values())
    assert t["W_dec"].shape == (D_SAE, D_IN)
    assert all(v.shape == (D_SAE,) for k, v in t.items() if k not in ("W_enc", "W_dec", "b_dec"))
    # By SAELens' own definitions.
    rows, back = x.double().numpy(), (1.0, 0.0)
    if cfg["normalize_activations"] == "layer_norm":
        back = rows.std(1, ddof=1, keepdims=True), rows.mean(1, keepdims=True)
        rows = (rows - back[1]) / (back[0] + 1e-5)
    acts = encode(architecture, numpy(t), rows, cfg)
    assert (acts != 0).any()
    np.testing.assert_allclose(expected.latents.dense().double().numpy(), acts, atol=1e-5)
    x_hat = decode(numpy(t), acts, cfg) * back[0] + back[1]
    np.testing.assert_allclose(expected.x_hat.double().numpy(), x_hat, atol=1e-5)
    # And read back by us.
    assert recognise(tmp_path).name == "saelens"
    assert_same(load_sae(tmp_path), x, acts, x_hat)


def test_a_threshold_says_what_it_was_in_training(trained, tmp_path):
    SAELens().write(tmp_path, trained("batch_topk"), Origin())
    metadata = json.loads((tmp_path / "cfg.json").read_text())["metadata"]
    assert metadata["training_architecture"] == "batchtopk"
    assert metadata["training_architecture_details"] == {"k": 3}


def test_heads_are_named_as_transformer_lens_names_them(trained, tmp_path):
    SAELens().write(tmp_path, trained("topk"), Origin(site="blocks.2.attn_z.5"))
    metadata = json.loads((tmp_path / "cfg.json").read_text())["metadata"]
    assert (metadata["hook_name"], metadata["hook_head_index"]) == ("blocks.2.attn.hook_z", 5)
    assert SAELens().read(tmp_path).origin.site == "blocks.2.attn_z.5"


def test_what_saelens_lacks_is_refused_by_name(trained, tmp_path):
    with pytest.raises(ConfigError, match=r"format=saelens: it has no SAE like sae.type=topk with "
                                          "selection=groupmax"):  # fmt: skip
        SAELens().write(tmp_path, trained("topk", selection="groupmax", k=7), Origin())
    with pytest.raises(ConfigError, match="site pooled is no hook of TransformerLens; hook_name="):
        SAELens().write(tmp_path, trained("topk"), Origin(site="pooled"))
    SAELens().write(tmp_path, trained("topk"), Origin(site="pooled", hook="pooled"))
    assert SAELens().read(tmp_path).origin.site is None
    assert SAELens().read(tmp_path).origin.hook == "pooled"


# -- What SAELens itself wrote -------------------------------------------------------------------


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "kind"),
    [("standard", "relu"), ("topk", "topk"), ("gated", "gated"), ("batchtopk", "jump_relu")],
)
def test_what_saelens_wrote(data_dir, tmp_path, name, kind):
    folder = data_dir / "interchange" / f"saelens_{name}"
    sae, expected = load_sae(folder), load_file(folder / "expected.safetensors")
    assert sae.kind == kind
    x = expected["x"]
    assert (sae.encode(x) - expected["acts"]).abs().max() < 1e-5
    assert (sae(x).x_hat - expected["x_hat"]).abs().max() < 1e-5
    # Written again: the same fields and tensors.
    SAELens().write(tmp_path, sae, Origin())
    theirs, ours = (json.loads((p / "cfg.json").read_text()) for p in (folder, tmp_path))
    assert ours.keys() == theirs.keys()
    metadata = {"metadata": None}
    assert {**ours, **metadata} == {**theirs, **metadata}
    theirs, ours = (load_file(p / "sae_weights.safetensors") for p in (folder, tmp_path))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_folders_are_told_apart_by_content(saelens_folder, tmp_path):
    folder = saelens_folder(weights("standard"), architecture="standard")
    assert recognise(folder).name == "saelens"
    save_file({"a": torch.ones(1)}, tmp_path / "sae.safetensors")
    (tmp_path / "cfg.json").write_text('{"schema": "sae-run.checkpoint/1"}')
    assert recognise(tmp_path) is None and recognise(tmp_path / "absent") is None
