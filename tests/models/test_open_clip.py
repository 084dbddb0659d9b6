import json
import logging
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from sae_runner.config import config_dir
from sae_runner.data.base import Example
from sae_runner.errors import ConfigError
from sae_runner.models import build_model
from sae_runner.models._open_clip_weights import trained_with
from sae_runner.models.open_clip import OpenCLIP
from sae_runner.site import TokenSelection, resolve_sites

OPTIONS = {
    "type": "open_clip", "arch": "test-vit", "weights": "random", "tag": None,
    "quick_gelu": "auto", "precision": "fp32", "seed": 0,
}  # fmt: skip
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
ARCHITECTURES = {
    "test-vit": {"image_size": 24, "patch_size": 8, "width": 32, "head_width": 16, "layers": 3},
    "test-vit-scaled": {
        "image_size": 24, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2,
        "ls_init_value": 0.1, "final_ln_after_pool": True,
    },
    "test-timm-vit": {
        "timm_model_name": "vit_tiny_patch16_224", "timm_pool": "token", "image_size": 224,
    },
    "test-convnext": {"timm_model_name": "convnext_atto", "timm_pool": "", "image_size": 224},
}  # fmt: skip
OTHER_POOLS = {
    "test-vit-mean": {
        "image_size": 24, "patch_size": 8, "width": 32, "head_width": 16, "layers": 1,
        "pool_type": "avg", "final_ln_after_pool": True,
    },
    "test-coca": {
        "image_size": 24, "patch_size": 8, "width": 32, "head_width": 16, "layers": 1,
        "attentional_pool": True, "attn_pooler_queries": 5, "attn_pooler_heads": 2,
    },
}  # fmt: skip
VITS = ["test-vit", "test-vit-scaled"]


@pytest.fixture(scope="module", autouse=True)
def architectures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("configs")
    for name, vision in (ARCHITECTURES | OTHER_POOLS).items():
        config = {"embed_dim": 20, "vision_cfg": vision, "text_cfg": TEXT}
        (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)


def build(meta=False, **changes) -> OpenCLIP:
    return build_model(OPTIONS | changes, device=torch.device("cpu"), meta=meta)


def image(seed: int, size=(40, 30)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def batch(model: OpenCLIP, n: int = 4):
    return model.prepare([Example(i, image(i), i % 3) for i in range(n)])


@pytest.fixture(scope="module")
def models(architectures):
    return {name: build(arch=name) for name in ARCHITECTURES}


@pytest.fixture
def vit(models):
    return models["test-vit"]


# -- Sites ---------------------------------------------------------------------------------------


def test_the_sites_of_a_vit(vit):
    sites = vit.sites()
    whole = [site for site in sites if site.count(".") == 2]
    assert whole[:10] == [
        f"blocks.0.{s}"
        for s in (
            "resid_pre", "attn_q", "attn_k", "attn_v", "attn_z", "attn_out", "resid_mid", "mlp_act",
            "mlp_out", "resid_post",
        )
    ]  # fmt: skip
    assert (sites["blocks.0.attn_k"].d, sites["blocks.0.attn_k.1"].d) == (32, 16)
    assert "blocks.0.attn_k.2" not in sites
    post, pooled, embed = sites["blocks.2.resid_post"], sites["pooled"], sites["embed"]
    assert (post.d, post.n_tokens, post.n_prefix, post.has_cls, post.grid) == (
        32,
        10,
        1,
        True,
        (3, 3),
    )
    assert sites["blocks.1.mlp_act"].d == 128
    assert (pooled.kind, pooled.d, pooled.n_tokens) == ("vector", 32, 1)
    assert (embed.kind, embed.d) == ("vector", 20)
    found = resolve_sites("visual.transformer.resblocks.1", sites)
    assert [info.module for info in found] == ["visual.transformer.resblocks.1"]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_meta_finds_the_same_sites(models, name):
    meta = build(arch=name, meta=True)
    assert meta.sites() == models[name].sites()
    assert all(p.device.type == "meta" for p in meta.parameters())


@pytest.mark.parametrize(
    ("arch", "site", "facts"),
    [
        ("ViT-B-16-SigLIP", "blocks.11.resid_post", (768, 196, 0, False, (14, 14))),
        ("ViT-L-14", "blocks.23.attn_z.15", (64, 257, 1, True, (16, 16))),
        ("ViT-B-16-SigLIP", "blocks.0.attn_q.11", (64, 196, 0, False, (14, 14))),
        ("PE-Core-B-16", "blocks.11.resid_post", (768, 197, 1, True, (14, 14))),
        ("convnext_base_w", "stages.3.blocks.2", (1024, 64, 0, False, (8, 8))),
        ("RN50", "stages.3", (2048, 49, 0, False, (7, 7))),
        ("coca_ViT-B-32", "blocks.3.mlp_out", (768, 50, 1, True, (7, 7))),
    ],
)
def test_sites_of_published_architectures(arch, site, facts):
    info = build(arch=arch, meta=True).sites()[site]
    assert (info.d, info.n_tokens, info.n_prefix, info.has_cls, info.grid) == facts


@pytest.mark.parametrize("name", VITS)
def test_record_gives_what_hooks_on_the_modules_see(models, name):
    model, seen = models[name], {}

    def keep(site):
        return lambda module, args, out: seen.__setitem__(site, out)

    blocks = model.network.visual.transformer.resblocks
    for i, block in enumerate(blocks):
        for site, module in {
            "attn_out": block.ls_1, "mlp_act": block.mlp.gelu, "mlp_out": block.ls_2,
            "resid_post": block,
        }.items():  # fmt: skip
            module.register_forward_hook(keep(f"blocks.{i}.{site}"))
    inputs = batch(model)
    with torch.no_grad():
        embed = model.forward(inputs)
        for module in model.network.modules():
            module._forward_hooks.clear()
        recorded = model.record(inputs, [*seen, "embed"])
    for site, x in seen.items():
        assert torch.equal(recorded[site], x), site
    assert torch.equal(recorded["embed"].squeeze(1), embed)


@pytest.mark.parametrize("name", [*VITS, "test-timm-vit"])
def test_the_residual_stream_adds_up(models, name):
    model = models[name]
    sites = [s for s in model.sites() if s.startswith("blocks.1.") and s.count(".") == 2]
    with torch.no_grad():
        x = {s.removeprefix("blocks.1."): v for s, v in model.record(batch(model), sites).items()}
        before = model.record(batch(model), ["blocks.0.resid_post"])["blocks.0.resid_post"]
    assert torch.equal(x["resid_pre"], before)
    torch.testing.assert_close(x["resid_mid"], x["resid_pre"] + x["attn_out"])
    torch.testing.assert_close(x["resid_post"], x["resid_mid"] + x["mlp_out"])


def test_the_last_class_token_becomes_the_embedding(vit):
    visual, inputs = vit.network.visual, batch(vit)
    with torch.no_grad():
        x = vit.record(inputs, ["blocks.2.resid_post", "pooled"])
        expected = vit.network.encode_image(inputs.tensors["pixels"])
        normed = visual.ln_post(x["blocks.2.resid_post"][:, 0])
    torch.testing.assert_close(normed @ visual.proj, expected)
    torch.testing.assert_close(x["pooled"][:, 0], normed)
    torch.testing.assert_close(vit.forward(inputs), expected)


@pytest.mark.parametrize(
    ("name", "shape", "kind"),
    [
        ("test-vit", (4, 10, 32), "tokens"), ("test-vit-scaled", (4, 1, 32), "vector"),
        ("test-vit-mean", (4, 1, 32), "vector"), ("test-coca", (4, 1, 20), "vector"),
        ("test-timm-vit", (4, 197, 192), "tokens"),
    ],
)  # fmt: skip
def test_the_final_norm_is_of_all_tokens_unless_it_comes_after_the_pool(models, name, shape, kind):
    model = models[name] if name in models else build(arch=name)
    visual, inputs = model.network.visual, batch(model)
    n_blocks = len(model.block_paths)
    with torch.no_grad():
        last = f"blocks.{n_blocks - 1}.resid_post"
        x, norm = model.record(inputs, [last, "final_norm"]).values()
        embed = model.forward(inputs)
    info = model.sites()["final_norm"]
    assert norm.shape == shape and info.kind == kind
    with torch.no_grad():
        expected = {
            "test-vit": lambda: visual.ln_post(x),
            "test-vit-scaled": lambda: visual.ln_post(x[:, :1]),
            "test-vit-mean": lambda: visual.ln_post(x[:, 1:].mean(1, keepdim=True)),
            "test-coca": lambda: visual.ln_post(visual.attn_pool(x))[:, :1],
            "test-timm-vit": lambda: visual.trunk.norm(x),
        }[name]()
        torch.testing.assert_close(norm, expected)
        if name != "test-timm-vit":
            torch.testing.assert_close(norm[:, 0] @ visual.proj, embed)
    names = list(model.sites())
    assert names.index(last) < names.index("final_norm") < names.index("embed")


@pytest.mark.parametrize(("name", "width"), [("test-vit", 16), ("test-timm-vit", 64)])
def test_queries_are_the_attentions(models, name, width):
    model = models[name]
    names = [f"blocks.0.attn_{c}.1" for c in "qkvz"]
    with torch.no_grad():
        q, k, v, z = model.record(batch(model), names).values()
    pattern = (q @ k.transpose(1, 2) / width**0.5).softmax(-1)
    torch.testing.assert_close(pattern @ v, z, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", VITS)
def test_the_parts_of_a_fused_attention_are_those_of_its_weights(models, name):
    model, inputs = models[name], batch(models[name])
    block = model.network.visual.transformer.resblocks[1]
    parts = [f"blocks.1.attn_{c}" for c in "qkvz"]
    with torch.no_grad():
        x = model.record(inputs, ["blocks.1.resid_pre", *parts, "blocks.1.attn_out"])
        fused = model.record(inputs, ["blocks.1.attn_out"])["blocks.1.attn_out"]
        into = block.ln_1(x["blocks.1.resid_pre"])
        weights = zip(
            block.attn.in_proj_weight.chunk(3), block.attn.in_proj_bias.chunk(3), strict=True
        )
        for part, (weight, bias) in zip(parts, weights, strict=False):
            torch.testing.assert_close(x[part], into @ weight.T + bias)
        z = block.attn.out_proj(x["blocks.1.attn_z"])
        torch.testing.assert_close(block.ls_1(z), fused)
        torch.testing.assert_close(x["blocks.1.attn_out"], fused)


def test_the_parts_of_the_attention_are_no_weights_and_change_nothing_unasked(vit):
    library = open_clip.create_model("test-vit")
    library.load_state_dict(vit.network.state_dict())  # The same keys.
    inputs = batch(vit)
    with torch.no_grad():
        vit.record(inputs, ["blocks.0.attn_z"])
        expected = library.eval().encode_image(inputs.tensors["pixels"])
        assert torch.equal(vit.forward(inputs), expected)


def test_an_edit_of_one_head_reaches_that_head_alone(vit):
    inputs, block = batch(vit), vit.network.visual.transformer.resblocks[2]
    parts = ["blocks.2.resid_pre", "blocks.2.attn_z"]
    with torch.no_grad():
        x, z = vit.record(inputs, parts).values()
        z[..., 16:] = 0
        middle = x + block.ls_1(block.attn.out_proj(z))
        expected = vit.splice(inputs, {"blocks.2.resid_mid": lambda _: middle})
        got = vit.splice(inputs, {"blocks.2.attn_z.1": torch.zeros_like})
        # Keys scaled by nothing are an even mixture of the values.
        v = vit.record(inputs, ["blocks.2.attn_v"])["blocks.2.attn_v"]
        even = v.mean(1, keepdim=True).expand_as(v)
        mixed = vit.splice(inputs, {"blocks.2.attn_z": lambda _: even})
        flat = vit.splice(inputs, {"blocks.2.attn_k": torch.zeros_like})
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(flat, mixed)


# -- Edits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_edit_that_changes_nothing_changes_no_bit(models, name):
    model = models[name]
    inputs = batch(model, 2)
    ends = ("blocks.1.attn_z", "blocks.0.attn_q.1", "stages.1.blocks.1")
    ends += ("final_norm", "pooled", "embed")
    residual = ("blocks.0.", "blocks.1.r")
    some = [s for s in model.sites() if s.endswith(ends)]
    some += [s for s in model.sites() if s.startswith(residual) and s.count(".") == 2]
    with torch.no_grad():
        before = model.forward(inputs)
        for site in some:
            after = model.splice(inputs, {site: lambda x: x})
            if ".attn_" in site and name in VITS and "out" not in site:  # Fused until it is hooked.
                torch.testing.assert_close(after, before)
            else:
                assert torch.equal(after, before), site
        torch.testing.assert_close(model.splice(inputs, {s: lambda x: x for s in some}), before)


@pytest.mark.parametrize("name", VITS)
def test_editing_the_middle_of_a_block_reaches_both_branches(models, name):
    model = models[name]
    visual, inputs = model.network.visual, batch(model)
    last = len(visual.transformer.resblocks) - 1
    block = visual.transformer.resblocks[last]
    with torch.no_grad():
        x = model.record(inputs, [f"blocks.{last}.resid_mid"])[f"blocks.{last}.resid_mid"]
        changed = x.flip(0) * 1.5
        after = changed + block.ls_2(block.mlp(block.ln_2(changed)))
        expected = visual.ln_post(after)[:, 0] @ visual.proj
        got = model.splice(inputs, {f"blocks.{last}.resid_mid": lambda _: changed})
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_resume_from_is_a_full_splice(models, name):
    model = models[name]
    inputs = batch(model, 2)
    sites = [s for s in model.sites() if s.endswith(("resid_post", "mlp_out", "blocks.1"))]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for site in [*sites[:4], "pooled", "embed"]:
            x = model.record(inputs, [site])[site]
            x = x + torch.randn(x.shape, generator=generator)
            spliced = model.splice(inputs, {site: lambda _, x=x: x})
            assert torch.equal(model.resume_from(site, x, inputs), spliced), site
            twice = model.resume_from(site, x.repeat_interleave(2, 0), inputs)
            torch.testing.assert_close(twice[::2], spliced)


def test_resume_from_leaves_out_the_blocks_before(vit):
    inputs, ran = batch(vit), []
    blocks = vit.network.visual.transformer.resblocks
    handles = [
        block.mlp.c_fc.register_forward_hook(lambda *_, i=i: ran.append(i))
        for i, block in enumerate(blocks)
    ]
    with torch.no_grad():
        x = torch.randn(4, 10, 32, generator=torch.Generator().manual_seed(0))
        vit.resume_from("blocks.1.resid_post", x, inputs)
    for handle in handles:
        handle.remove()
    assert 0 not in ran and 2 in ran


def test_edits_at_positions_only(vit):
    inputs = batch(vit)
    where = torch.zeros(4, 10, dtype=torch.bool)
    where[1:3, 0] = True
    with torch.no_grad():
        before = vit.forward(inputs)
        after = vit.splice(inputs, {"blocks.2.resid_post": torch.zeros_like}, where)
    changed = (before != after).any(1)
    assert changed.tolist() == [False, True, True, False]


@pytest.mark.parametrize("name", ["test-vit", "test-convnext"])
def test_gradients_flow(models, name):
    model = models[name]
    inputs = batch(model, 2)
    pixels = inputs.tensors["pixels"].requires_grad_()
    site = next(s for s in model.sites() if s.endswith(("resid_post", "blocks.1")))
    model.record(inputs, [site])[site].square().sum().backward()
    assert pixels.grad is not None and pixels.grad.abs().sum() > 0

    for edited in {site, site.replace("post", "mid")}:
        gain = torch.ones((), requires_grad=True)
        model.splice(inputs, {edited: lambda x, gain=gain: x * gain}).sum().backward()
        assert gain.grad is not None and gain.grad != 0


# -- Inputs and texts ----------------------------------------------------------------------------


def test_preparing_is_the_librarys_evaluation_transform(vit):
    pictures = [image(0), image(0), image(1).convert("L"), image(2).convert("P")]
    inputs = vit.prepare([Example(5 + i, p, i) for i, p in enumerate(pictures)])
    assert inputs.ids.tolist() == [5, 6, 7, 8] and inputs.labels.tolist() == [0, 1, 2, 3]
    pixels = inputs.tensors["pixels"]
    assert pixels.shape == (4, 3, 24, 24)
    assert torch.equal(pixels[0], pixels[1])
    _, _, transform = open_clip.create_model_and_transforms("test-vit")
    assert torch.equal(pixels[0], transform(image(0)))
    assert torch.equal(pixels[3], transform(image(2).convert("P").convert("RGB")))
    half = vit.prepare([Example(0, image(0), 1), Example(1, image(1), None)])
    assert half.labels.tolist() == [1, -1]


def test_zero_shot_scores_are_those_of_the_library(vit):
    inputs, texts = batch(vit), ["a cat", "a photo of a dog"]
    with torch.no_grad():
        images, words = vit.forward(inputs), vit.encode_text(texts)
        cosine = torch.nn.functional.cosine_similarity(images[:, None], words[None], dim=-1)
        tokens = open_clip.get_tokenizer("test-vit")(texts)
        expected = vit.network.get_logits(inputs.tensors["pixels"], tokens)[0]
    torch.testing.assert_close(vit.logit_scale * cosine + vit.logit_bias, expected)


def test_lower_precision_is_near(vit):
    low = build(precision="bf16")
    with torch.no_grad():
        x = low.record(batch(low), ["blocks.2.resid_post"])["blocks.2.resid_post"]
        near, exact = low.forward(batch(low)).float(), vit.forward(batch(vit))
    assert x.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(near, exact).min() > 0.99
    assert low.fingerprint() != vit.fingerprint()


# -- Weights -------------------------------------------------------------------------------------


def test_random_weights_come_from_their_seed_alone(vit, caplog):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    with caplog.at_level(logging.WARNING):
        again = build()
    assert torch.equal(torch.get_rng_state(), state)
    assert "untrained" in caplog.text
    assert again.fingerprint() == vit.fingerprint() != build(seed=1).fingerprint()
    assert again.describe()["weights"] == "random"


def test_the_fingerprint_follows_the_weights():
    model = build()
    before = model.fingerprint()
    with torch.no_grad():
        next(iter(model.network.visual.parameters())).add_(1e-3)
    assert model.fingerprint() != before


def test_a_local_file(tmp_path, caplog):
    source = build(seed=3)
    state = {k: v.clone() for k, v in source.network.state_dict().items()}
    save_file(state, tmp_path / "w.safetensors")
    torch.save(state, tmp_path / "w.pt")
    for name in ("w.safetensors", "w.pt"):
        loaded = build(weights=str(tmp_path / name))
        with torch.no_grad():
            assert torch.equal(loaded.forward(batch(loaded)), source.forward(batch(source)))
    with pytest.raises(ConfigError, match=r"w\.pt: not weights of test-vit-scaled \("):
        build(arch="test-vit-scaled", weights=str(tmp_path / "w.pt"))


def test_quick_gelu_is_what_the_weights_were_trained_with(tmp_path, caplog):
    def of(weights, tag=None, arch="ViT-B-32"):
        return trained_with(arch, weights, tag, announce=True)["quick_gelu"]

    assert of("openai") is True and of("laion2b_s34b_b79k") is False
    assert of("random") is False and of("random", arch="ViT-B-32-quickgelu") is True
    file = tmp_path / "w.pt"
    file.touch()
    assert of(str(file), tag="openai") is True and caplog.text == ""
    assert of(str(file)) is False and "model.tag=" in caplog.text
    (tmp_path / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": {"quick_gelu": True}, "preprocess_cfg": {"mean": [0.1, 0.2, 0.3]}})
    )
    assert of(str(file)) is True

    gelu = build(arch="ViT-B-32", weights="openai", meta=True)
    assert type(gelu.network.visual.transformer.resblocks[0].mlp.gelu).__name__ == "QuickGELU"
    plain = build(arch="ViT-B-32", weights="laion2b_s34b_b79k", meta=True)
    assert type(plain.network.visual.transformer.resblocks[0].mlp.gelu).__name__ == "GELU"
    with pytest.raises(ConfigError, match=r"model\.quick_gelu=false: .*quick_gelu=true; use auto"):
        build(arch="ViT-B-32", weights="openai", quick_gelu=False, meta=True)


@pytest.mark.parametrize(
    ("arch", "weights", "mean", "mode"),
    [
        ("ViT-L-14", "openai", 0.48145466, "shortest"),
        ("ViT-L-14", "laion2b_s32b_b82k", 0.5, "shortest"),
        ("ViT-B-16-SigLIP", "webli", 0.5, "squash"),
        ("ViT-B-16-SigLIP", "random", 0.5, "squash"),
    ],
)
def test_preprocessing_is_the_tags(arch, weights, mean, mode):
    described = build(arch=arch, weights=weights, meta=True).describe()["preprocessing"]
    assert described["mean"][0] == mean and described["resize_mode"] == mode
    assert described["size"] == [224, 224]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arch": "ViT-L-41"}, r"model\.arch=ViT-L-41: no such.*Nearest of \d+: .*ViT-L-14"),
        ({"arch": "ViT-L-14", "weights": "opneai"}, r"model\.weights=opneai.*'openai'"),
        ({"arch": "ViT-L-14", "tag": "opneai"}, r"model\.tag=opneai.*'openai'"),
        ({"weights": "no/file.pt"}, r"model\.weights=no/file\.pt: neither a file nor a tag"),
        ({"precision": "fp61"}, r"model\.precision=fp61.*'fp16'"),
    ],
)
def test_what_does_not_exist_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message) as caught:
        build(**changes)
    assert "\n" not in str(caught.value)


def test_absent_weights_say_what_to_do(monkeypatch):
    def offline(*_):
        raise OSError("no route\nto the hub")

    monkeypatch.setattr("open_clip.pretrained.download_pretrained", offline)
    message = r"weights=openai: not here.*\(no route\).*model\.weights=FILE model\.tag=openai"
    with pytest.raises(ConfigError, match=message):
        build(arch="ViT-B-32", weights="openai")


# -- Configuration -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "clip_vit_b16", "clip_vit_b32", "clip_vit_h", "clip_vit_l", "clip_vit_l_336",
        "clip_vit_l_datacomp", "siglip_b16",
    ],
)  # fmt: skip
def test_the_yaml_builds_and_its_site_takes_its_tokens(name):
    config = yaml.safe_load((Path(config_dir()) / "model" / f"{name}.yaml").read_text())
    assert config.pop("defaults")[0] == {"/dataset@_global_.dataset": "imagenet1k"}
    model = build_model(config, device=torch.device("cpu"), meta=True)
    (info,) = resolve_sites(config["site"], model.sites())
    TokenSelection(config["tokens"]).check(info)
