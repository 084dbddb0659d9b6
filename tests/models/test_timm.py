from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from sae_runner.config import config_dir
from sae_runner.data.base import Example
from sae_runner.errors import ConfigError
from sae_runner.models import MODELS, build_model
from sae_runner.models._artefact import trained
from sae_runner.models.base import Inputs
from sae_runner.models.timm import Timm
from sae_runner.site import TokenSelection

VIT, DINO, CONVNEXT = "vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2", "convnextv2_atto"
SIZES = {VIT: 48, DINO: 42, CONVNEXT: 64}
HOSTS: dict[str, Timm] = {}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Networks this small lose by sharing their work."""
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


def build(arch: str, **options: Any) -> Timm:
    size = options.pop("image_size", SIZES.get(arch))
    meta = options.pop("meta", False)
    options = {"weights": "random", "precision": "fp32", "seed": 0, **options}
    host = build_model(
        {"type": "timm", "arch": arch, "image_size": size, **options}, device="cpu", meta=meta
    )
    assert isinstance(host, Timm)
    return host


def shared(arch: str) -> Timm:
    """Built once; layer scales of 1e-5 are raised, or every block would be the identity."""
    if arch not in HOSTS:
        HOSTS[arch] = build(arch)
        for name, tensor in HOSTS[arch].network.named_parameters():
            if name.endswith(("ls1.gamma", "ls2.gamma", "grn.weight")):
                tensor.data.fill_(0.7)
    return HOSTS[arch]


def batch(host: Timm, n: int = 2) -> Inputs:
    size = host.preprocessing["input_size"]
    pixels = torch.randn(n, *size, generator=torch.Generator().manual_seed(1))
    return Inputs(torch.arange(n), {"pixels": pixels})


def raw(host: Timm, inputs: Inputs, module: str, side: str = "output") -> Tensor:
    """What a module gave or took, by PyTorch's own hooks."""
    seen: list[Any] = []
    target = host.network.get_submodule(module)
    if side == "output":
        handle = target.register_forward_hook(lambda m, i, o: seen.append(o))
    else:
        handle = target.register_forward_pre_hook(lambda m, i: seen.append(i[0]))
    with torch.no_grad():
        host.forward(inputs)
    handle.remove()
    (value,) = seen
    assert isinstance(value, Tensor)
    return value


@pytest.mark.parametrize("arch", [VIT, DINO])
def test_a_transformer_s_sites_obey_its_equations(arch: str) -> None:
    host = shared(arch)
    inputs = batch(host)
    names = [name for name in host.sites() if name.startswith("blocks.3.")]
    block: Any = host.network.get_submodule("blocks.3")
    with torch.no_grad():
        x = {n.removeprefix("blocks.3."): v for n, v in host.record(inputs, names).items()}
        torch.testing.assert_close(x["resid_pre"] + x["attn_out"], x["resid_mid"])
        torch.testing.assert_close(x["resid_mid"] + x["mlp_out"], x["resid_post"])
        n_heads = block.attn.num_heads
        z = []
        for h in range(n_heads):
            q, k, v = (x[f"attn_{letter}.{h}"] for letter in "qkv")
            z.append((q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).softmax(-1) @ v)
            torch.testing.assert_close(x[f"attn_z.{h}"], z[-1])
        torch.testing.assert_close(x["attn_z"], torch.cat(z, -1))
        torch.testing.assert_close(x["attn_out"], block.ls1(block.attn.proj(x["attn_z"])))
        pre = block.mlp.fc1(block.norm2(x["resid_mid"]))
        torch.testing.assert_close(x["mlp_act"], nn.functional.gelu(pre))
        torch.testing.assert_close(x["mlp_out"], block.ls2(block.mlp.fc2(x["mlp_act"])))


@pytest.mark.parametrize("arch", [VIT, DINO])
def test_a_transformer_s_residual_stream_is_the_library_s(arch: str) -> None:
    host, network = shared(arch), shared(arch).network
    inputs = batch(host)
    sites = [f"blocks.{i}.resid_post" for i in range(12)]
    with torch.no_grad():
        found = host.record(inputs, [*sites, "pooled"])
        features: Any = network.forward_intermediates(  # type: ignore[operator]
            inputs.tensors["pixels"], output_fmt="NLC", return_prefix_tokens=True
        )
        pooled = network.forward_head(features[0], pre_logits=True)  # type: ignore[operator]
        output = network(inputs.tensors["pixels"])
    for site, (patches, prefix) in zip(sites, features[1], strict=True):
        assert torch.equal(found[site], torch.cat([prefix, patches], 1))
    assert torch.equal(found["pooled"].squeeze(1), pooled)
    last = "logits" if arch == VIT else "embed"
    assert torch.equal(host.record(inputs, [last])[last].squeeze(1), output)
    assert torch.equal(host.forward(inputs), output)


@pytest.mark.parametrize("arch", [VIT, DINO])
@torch.no_grad()
def test_the_final_norm_is_of_all_tokens(arch: str) -> None:
    host = shared(arch)
    network: Any = host.network
    inputs = batch(host)
    last, norm = host.record(inputs, ["blocks.11.resid_post", "final_norm"]).values()
    assert torch.equal(norm, network.norm(last))
    assert torch.equal(norm, network.forward_features(inputs.tensors["pixels"]))
    info, stream = host.sites()["final_norm"], host.sites()["blocks.11.resid_post"]
    assert (info.kind, info.n_tokens, info.n_prefix) == ("tokens", stream.n_tokens, stream.n_prefix)


@pytest.mark.parametrize("arch", ["test_vit2", "test_vit4"])
@torch.no_grad()
def test_a_final_norm_after_the_pool_is_of_the_pooled_vector(arch: str) -> None:
    host = build(arch, image_size=None)
    network: Any = host.network
    last = f"blocks.{len(host.block_paths) - 1}.resid_post"
    x, norm = host.record(batch(host), [last, "final_norm"]).values()
    mean = x[:, network.num_prefix_tokens :].mean(1, keepdim=True)
    torch.testing.assert_close(norm, network.fc_norm(mean))
    assert host.sites()["final_norm"].kind == "vector"


def test_class_and_register_tokens_come_first_and_know_no_image() -> None:
    host = shared(DINO)
    info = host.sites()["blocks.0.resid_pre"]
    assert (info.n_tokens, info.n_prefix, info.has_cls, info.grid) == (14, 5, True, (3, 3))
    x = host.record(batch(host), ["blocks.0.resid_pre"])["blocks.0.resid_pre"]
    assert torch.equal(x[0, :5], x[1, :5])
    assert not (x[0, 5:] == x[1, 5:]).any(1).any()
    network: Any = host.network
    torch.testing.assert_close(x[0, 1:5], network.reg_token[0])
    patches = TokenSelection("patches").mask(info, batch(host), 14)
    assert patches.tolist() == [[False] * 5 + [True] * 9] * 2
    plain = shared(VIT).sites()["blocks.0.resid_pre"]
    assert (plain.n_tokens, plain.n_prefix, plain.has_cls, plain.grid) == (10, 1, True, (3, 3))


def test_maps_are_read_cell_by_cell_in_either_layout() -> None:
    host = shared(CONVNEXT)
    inputs = batch(host)
    sites = ["stages.1.blocks.0.mlp_act", "stages.1.blocks.0", "stages.1", "pooled", "logits"]
    found = host.record(inputs, sites)
    outer = raw(host, inputs, "stages.1.blocks.0")
    inner = raw(host, inputs, "stages.1.blocks.0.mlp.act")
    if not host.network.get_submodule("stages.1.blocks.0").use_conv_mlp:
        inner = inner.permute(0, 3, 1, 2)
    assert outer.shape == (2, 80, 8, 8) and inner.shape == (2, 320, 8, 8)
    for row, column in ((0, 0), (2, 5), (7, 1)):
        cell = 8 * row + column
        assert torch.equal(found["stages.1.blocks.0"][:, cell], outer[:, :, row, column])
        assert torch.equal(found["stages.1.blocks.0.mlp_act"][:, cell], inner[:, :, row, column])
    stage = raw(host, inputs, "stages.1")
    assert torch.equal(found["stages.1"], stage.reshape(2, 80, 64).mT)
    assert torch.equal(found["pooled"].squeeze(1), raw(host, inputs, "head.flatten"))
    assert torch.equal(found["logits"].squeeze(1), host.forward(inputs))
    info = host.sites()["stages.1"]
    assert (info.kind, info.d, info.n_tokens, info.grid) == ("map", 80, 64, (8, 8))


def test_channels_last_inside_a_block_is_seen() -> None:
    """ConvNeXt of this size has its MLP in NHWC; the atto above has it in NCHW."""
    host = build("convnext_tiny", image_size=32)
    inputs = batch(host, 3)
    inner = raw(host, inputs, "stages.2.blocks.1.mlp.act")
    assert inner.shape == (3, 2, 2, 1536)
    site = "stages.2.blocks.1.mlp_act"
    x = host.record(inputs, [site])[site]
    assert torch.equal(x, inner.reshape(3, 4, 1536))
    assert torch.equal(host.splice(inputs, {site: lambda x: x}), host.forward(inputs))


@pytest.mark.parametrize("arch", [VIT, DINO, CONVNEXT])
@torch.no_grad()
def test_splicing_what_was_there_changes_no_bit_and_noise_changes_much(arch: str) -> None:
    host = shared(arch)
    inputs = batch(host)
    output = host.forward(inputs)
    for site in host.sites():
        skipped = site.startswith("blocks.") and not site.startswith("blocks.2.")
        if skipped or (site[-2:] in (".2", ".3", ".4", ".5") and "attn" in site):
            continue
        x = host.record(inputs, [site])[site]
        same = host.splice(inputs, {site: lambda x: x.clone()})
        assert torch.equal(same, output), site
        other = host.splice(inputs, {site: lambda x: x + 1 + x.square()})
        assert (other - output).abs().max() > 1e-4, site
        assert torch.equal(host.record(inputs, [site])[site], x), site


@pytest.mark.parametrize("arch", [VIT, DINO, CONVNEXT])
@torch.no_grad()
def test_resuming_is_splicing_for_one_or_several_edits_of_an_input(arch: str) -> None:
    host = shared(arch)
    inputs = batch(host)
    for site in host.sites():
        block = site.startswith("blocks.")
        if block and (site[-1].isdigit() or site.split(".")[1] not in ("0", "5", "11")):
            continue
        x = host.record(inputs, [site])[site]
        edited = x + torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
        spliced = host.splice(inputs, {site: lambda _, new=edited: new})
        assert torch.equal(host.resume_from(site, edited, inputs), spliced), site
        several = torch.stack([x, edited], dim=1).flatten(0, 1)
        both = host.resume_from(site, several, inputs).unflatten(0, (2, 2))
        torch.testing.assert_close(both[:, 0], host.forward(inputs), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(both[:, 1], spliced, atol=1e-4, rtol=1e-4)


def test_resuming_leaves_out_what_lies_before() -> None:
    host = shared(CONVNEXT)
    inputs = batch(host)
    x = host.record(inputs, ["stages.2"])["stages.2"]
    ran: list[str] = []
    handles = [
        host.network.get_submodule(f"{path}.conv_dw").register_forward_hook(
            lambda m, i, o, path=path: ran.append(path)
        )
        for path in host.block_paths
    ]
    host.resume_from("stages.2", x, inputs)
    for handle in handles:
        handle.remove()
    last = list(host.block_paths).index("stages.2.blocks.5")
    assert ran == list(host.block_paths)[last + 1 :]


def test_an_edit_of_the_middle_of_a_block_reaches_the_skip_too() -> None:
    host = shared(VIT)
    inputs = batch(host)
    block: Any = host.network.get_submodule("blocks.4")
    with torch.no_grad():
        middle = host.record(inputs, ["blocks.4.resid_mid"])["blocks.4.resid_mid"]
        edited = middle * 1.5 + 1
        post = edited + block.ls2(block.mlp(block.norm2(edited)))
        expected = host.resume_from("blocks.4.resid_post", post, inputs)
        found = host.splice(inputs, {"blocks.4.resid_mid": lambda x: x * 1.5 + 1})
        torch.testing.assert_close(found, expected)
        where = torch.zeros(2, 10, dtype=torch.bool)
        where[:, 0] = True
        only = torch.where(where.unsqueeze(-1), edited, middle)
        found = host.splice(inputs, {"blocks.4.resid_mid": lambda x: x * 1.5 + 1}, where)
        post = only + block.ls2(block.mlp(block.norm2(only)))
        torch.testing.assert_close(found, host.resume_from("blocks.4.resid_post", post, inputs))


@pytest.mark.parametrize("site", ["blocks.4.resid_mid", "blocks.4.resid_post", "blocks.4.attn_q.1"])
def test_gradients_flow_through_an_edit(site: str) -> None:
    host = shared(VIT)
    inputs = batch(host)

    def loss(scale: Tensor) -> Tensor:
        return host.splice(inputs, {site: lambda x: x.square() * scale + x})[:, 0].sum()

    scale = torch.tensor(0.1, requires_grad=True)
    loss(scale).backward()
    assert scale.grad is not None
    with torch.no_grad():
        step = 1e-2
        slope = (loss(scale + step) - loss(scale - step)) / (2 * step)
    assert scale.grad.item() == pytest.approx(slope.item(), rel=0.05, abs=1e-4)
    assert scale.grad.abs() > 1e-4


@pytest.mark.parametrize("arch", [VIT, DINO, CONVNEXT])
def test_shapes_are_learned_without_weights(arch: str) -> None:
    bare = build(arch, meta=True)
    assert bare.device.type == "meta"
    assert {tensor.device.type for tensor in bare.network.state_dict().values()} == {"meta"}
    assert bare.sites() == shared(arch).sites()


def test_other_architectures_have_the_features_that_the_library_names() -> None:
    host = build("resnet18", image_size=64)
    sites = host.sites()
    assert list(sites) == [f"stages.{s}" for s in range(5)] + ["pooled", "logits"]
    assert sites["stages.4"].d == 512 and sites["stages.4"].grid == (2, 2)
    inputs = batch(host)
    found = host.record(inputs, ["stages.3", "pooled"])
    assert torch.equal(found["stages.3"], raw(host, inputs, "layer3").flatten(2).mT)
    last = raw(host, inputs, "layer4")
    torch.testing.assert_close(found["pooled"].squeeze(1), last.mean((2, 3)))
    spliced = host.splice(inputs, {"pooled": lambda x: 2 * x})
    network: Any = host.network
    torch.testing.assert_close(spliced, network.fc(2 * last.mean((2, 3))))
    x = host.record(inputs, ["stages.2"])["stages.2"]
    assert torch.equal(host.resume_from("stages.2", x, inputs), host.forward(inputs))
    swin = build("swin_tiny_patch4_window7_224", image_size=None, meta=True).sites()
    assert swin["stages.1"].d == 192 and swin["stages.1"].grid == (28, 28)
    siglip = build("vit_base_patch16_siglip_224", image_size=32, meta=True).sites()
    assert not siglip["blocks.0.resid_pre"].has_cls
    assert siglip["blocks.0.resid_pre"].n_prefix == 0
    eva = build("eva02_tiny_patch14_224", image_size=28, meta=True).sites()
    assert "blocks.0.attn_z.0" in eva and "blocks.0.attn_q" not in eva


def test_seeds_decide_random_weights_and_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, again, other = (build("test_vit", image_size=None, seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    assert one.fingerprint() == again.fingerprint() != other.fingerprint()
    weight: Any = again.network.get_submodule("blocks.0.attn.proj").weight
    weight.data[0, 0] += 1
    assert one.fingerprint() == again.fingerprint()  # .data is invisible, by design of PyTorch:
    with torch.no_grad():
        weight[0, 0] += 1
    assert one.fingerprint() != again.fingerprint()
    assert not any(p.requires_grad for p in one.parameters())


def test_pixels_are_scaled_and_normalised_as_the_tag_says() -> None:
    host = shared(CONVNEXT)
    grey = Image.fromarray(np.full((90, 100), 51, np.uint8))
    inputs = host.prepare([Example(7, grey, 3), Example(2, grey.convert("RGB"), 1)])
    assert inputs.ids.tolist() == [7, 2]
    assert inputs.labels is not None and inputs.labels.tolist() == [3, 1]
    pixels = inputs.tensors["pixels"]
    assert pixels.shape == (2, 3, 64, 64)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    expected = torch.tensor((0.2 - mean) / std, dtype=torch.float32).view(3, 1, 1)
    torch.testing.assert_close(pixels, expected.expand(2, 3, 64, 64))
    assert host.prepare([Example(0, grey)]).labels is None
    half = host.prepare([Example(0, grey), Example(1, grey, 4)])
    assert half.labels is not None and half.labels.tolist() == [-1, 4]


def test_half_precision_takes_edits_in_full() -> None:
    host = build("test_vit", image_size=None, precision="bf16")
    inputs = batch(host)
    x = host.record(inputs, ["blocks.1.resid_mid"])["blocks.1.resid_mid"]
    assert x.dtype == torch.bfloat16
    for site in ("blocks.1.resid_mid", "blocks.1.resid_post", "pooled"):
        output = host.splice(inputs, {site: lambda x: x.float()})
        assert torch.equal(output, host.forward(inputs))


def test_weights_come_from_a_file_or_an_artefact(tmp_path: Path) -> None:
    host = build("test_vit", image_size=None, seed=3)
    state = {k: v.contiguous() for k, v in host.network.state_dict().items()}
    save_file(state, tmp_path / "weights.safetensors")
    assert build("test_vit", image_size=None, weights=str(tmp_path / "weights.safetensors"),
                 seed=9).fingerprint() == host.fingerprint()  # fmt: skip
    artefact = trained(tmp_path, "tuned", {"seed": 3}, lambda _: (state, {}))
    again = build("test_vit", image_size=None, weights=artefact.facts["path"], seed=9)
    assert again.fingerprint() == host.fingerprint()
    save_file({"weight": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ConfigError, match=r"^model\.weights=.*does not fit test_vit[^\n]*$"):
        build("test_vit", image_size=None, weights=str(tmp_path / "other.safetensors"))
    with pytest.raises(ConfigError, match=r"model\.weights=/none: no file"):
        build("test_vit", weights="/none")
    (tmp_path / "w.pth").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"only \.safetensors"):
        build("test_vit", weights=str(tmp_path / "w.pth"))


def test_what_cannot_be_built_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    with pytest.raises(ConfigError, match=r"model\.arch=vit_tinny.* Did you mean 'vit_tiny"):
        build("vit_tinny_patch16_224")
    wrong = "vit_base_patch14_reg4_dinov2.lvd142"
    with pytest.raises(ConfigError, match=r"no pretrained tag 'lvd142'.*'lvd142m'"):
        build(wrong)
    with pytest.raises(ConfigError, match=r"^model\.image_size=41: .* 16 .* use 32 or 48$"):
        build(VIT, image_size=41)

    def offline(*_: Any, **__: Any) -> nn.Module:
        raise OSError("nobody answers\nat all")

    monkeypatch.setattr(timm, "create_model", offline)
    message = r"^model\.weights=pretrained: .*nobody answers\).*\.safetensors, or random$"
    with pytest.raises(ConfigError, match=message):
        build(VIT, weights="pretrained")


@pytest.mark.parametrize(
    ("name", "check"),
    [
        ("convnextv2_large", lambda i: (i.d, i.kind, i.module) == (1536, "vector", "head.flatten")),
        ("dinov2_b14", lambda i: (i.d, i.n_prefix, i.n_tokens) == (768, 5, 5 + 256)),
        ("vit_b16", lambda i: (i.d, i.n_prefix, i.grid) == (768, 1, (14, 14))),
    ],
)
def test_the_yaml_describes_a_model_with_its_default_site(
    name: str, check: Callable[[Any], bool]
) -> None:
    from omegaconf import OmegaConf

    cfg: Any = OmegaConf.load(f"{config_dir()}/model/{name}.yaml")
    del cfg["defaults"]
    site = cfg.site
    options = {k: v for k, v in cfg.items() if k not in ("site", "tokens", "batch_size")}
    MODELS.check(options)
    host = build_model(cfg, device="cpu", meta=True)
    info = host.sites()[site]
    TokenSelection(cfg.tokens).check(info)
    assert check(info)
