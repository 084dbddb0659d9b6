"""Where the canonical sites are in timm's networks."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sae_runner.models.base import Tap

Layout = Literal["NCHW", "NHWC"]


@dataclass
class Trunk:
    """What a host must know of a network of timm's."""

    taps: dict[str, Tap] = field(default_factory=dict)
    block_paths: list[str] = field(default_factory=list)
    n_prefix: int = 0
    has_cls: bool = False
    grid: tuple[int, int] | None = None


def find_sites(network: Any, image: Tensor, path: str = "") -> Trunk:
    """The sites of `network`, which is a module named `path` of the host ("" for all of it).

    Args:
        network: any model that timm builds.
        image: one made-up input [1, c, h, w], which shows layouts where no rule is known.
        path: prefix of module names, without the last dot.
    """
    from timm.models import beit, convnext, eva, vision_transformer

    prefix = f"{path}." if path else ""
    pre_norm_blocks = (vision_transformer.Block, eva.EvaBlock, beit.Block)
    if isinstance(next(iter(getattr(network, "blocks", [])), None), pre_norm_blocks):
        trunk = _transformer(network, prefix)
    elif isinstance(network, convnext.ConvNeXt):
        trunk = _convnext(network, prefix)
    else:
        trunk = _by_feature_info(network, prefix, image)
    trunk.taps |= _head(network, prefix)
    return trunk


def _transformer(network: Any, prefix: str) -> Trunk:
    grid = getattr(network.patch_embed, "grid_size", None)
    trunk = Trunk(
        n_prefix=network.num_prefix_tokens,
        has_cls=getattr(network, "cls_token", None) is not None,
        grid=tuple(grid) if grid else None,
    )
    for i, block in enumerate(network.blocks):
        trunk.block_paths.append(f"{prefix}blocks.{i}")
        trunk.taps |= block_taps(block, f"{prefix}blocks.{i}", f"blocks.{i}")
    norms = {name: getattr(network, name, nn.Identity()) for name in ("norm", "fc_norm")}
    if not isinstance(norms["norm"], nn.Identity):
        trunk.taps["final_norm"] = Tap(f"{prefix}norm")
    elif not isinstance(norms["fc_norm"], nn.Identity) and network.global_pool:
        trunk.taps["final_norm"] = Tap(f"{prefix}fc_norm", layout="ND")
    return trunk


def block_taps(block: Any, path: str, name: str) -> dict[str, Tap]:
    """Sites of one block `x += attn(norm1(x)); x += mlp(norm2(x))`.

    What attention and MLP write is taken after the layer scale.
    """
    scaled = hasattr(block, "ls1")
    taps = {f"{name}.resid_pre": Tap(path, "input")}
    taps |= attention_taps(block.attn, f"{path}.attn", name)
    taps |= {
        f"{name}.attn_out": Tap(f"{path}.{'ls1' if scaled else 'drop_path1'}"),
        f"{name}.resid_mid": Tap(f"{path}.norm2", "input", in_place=True),
    }
    if type(block.mlp).__name__ == "Mlp":  # Gated ones have no single activation.
        taps[f"{name}.mlp_act"] = Tap(f"{path}.mlp.act")
    taps[f"{name}.mlp_out"] = Tap(f"{path}.{'ls2' if scaled else 'drop_path2'}")
    taps[f"{name}.resid_post"] = Tap(path)
    return taps


def attention_taps(attention: Any, path: str, name: str) -> dict[str, Tap]:
    """Queries, keys, values (before any rotation) and mixed values, of all heads and of each.

    Those are left out that no module gives: where queries and keys are normalised by head, or where
    the bias is added behind the projection's back (BEiT, EVA).
    """
    n = attention.num_heads
    width = attention.proj.in_features // n
    sources = {}
    if type(attention).__name__ in ("Attention", "EvaAttention"):
        own_bias = getattr(attention, "q_bias", None) is None
        plain = isinstance(getattr(attention, "q_norm", None), nn.Identity)
        for j, letter in enumerate("qkv"):
            if attention.qkv is not None and own_bias and (plain or letter == "v"):
                sources[letter] = (Tap(f"{path}.qkv"), j * n * width)
    sources["z"] = (Tap(f"{path}.proj", "input"), 0)
    taps = {}
    for letter, (tap, start) in sources.items():
        spans = {"": (start, start + n * width)}
        spans |= {f".{h}": (start + h * width, start + (h + 1) * width) for h in range(n)}
        for suffix, span in spans.items():
            taps[f"{name}.attn_{letter}{suffix}"] = Tap(tap.module, tap.side, columns=span)
    return taps


def _convnext(network: Any, prefix: str) -> Trunk:
    """Maps between blocks are NCHW; inside a block they are NHWC unless the MLP is convolutions.

    A stage's output is its last block's, so that one may be resumed like the other.
    """
    trunk = Trunk()
    for s, stage in enumerate(network.stages):
        for b, block in enumerate(stage.blocks):
            name, path = f"stages.{s}.blocks.{b}", f"{prefix}stages.{s}.blocks.{b}"
            inner: Layout = "NCHW" if block.use_conv_mlp else "NHWC"
            trunk.block_paths.append(path)
            trunk.taps[f"{name}.mlp_act"] = Tap(f"{path}.mlp.act", layout=inner)
            trunk.taps[name] = Tap(path, layout="NCHW")
        trunk.taps[f"stages.{s}"] = Tap(trunk.block_paths[-1], layout="NCHW")
    return trunk


def _by_feature_info(network: Any, prefix: str, image: Tensor) -> Trunk:
    """Whatever the library itself names as features, each with the layout that it is seen to have.

    Blocks of no known kind are never left out when resuming.
    """
    modules = dict(network.named_modules())
    wanted = [info["module"] for info in getattr(network, "feature_info", [])]
    shapes = output_shapes(network, {name: modules[name] for name in wanted if name in modules},
                           image)  # fmt: skip
    trunk = Trunk(n_prefix=getattr(network, "num_prefix_tokens", 0) or 0)
    trunk.has_cls = getattr(network, "cls_token", None) is not None
    layout: Layout = "NHWC" if getattr(network, "output_fmt", "") == "NHWC" else "NCHW"
    for s, (name, shape) in enumerate(shapes.items()):
        if len(shape) == 3:
            trunk.taps[f"blocks.{s}.resid_post"] = Tap(prefix + name)
            tokens = shape[1] - trunk.n_prefix
            side = round(tokens**0.5)
            trunk.grid = (side, side) if side * side == tokens else None
        elif len(shape) == 4:
            trunk.taps[f"stages.{s}"] = Tap(prefix + name, layout=layout)
    return trunk


def output_shapes(
    network: nn.Module, modules: Mapping[str, nn.Module], image: Tensor
) -> dict[str, tuple[int, ...]]:
    """Shape of what each of `modules` gives for `image`, in the order in which they run."""
    shapes: dict[str, tuple[int, ...]] = {}

    def keep(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                shapes[name] = tuple(output.shape)

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    try:
        with torch.no_grad():
            network(image)
    finally:
        for handle in handles:
            handle.remove()
    return shapes


def _head(network: Any, prefix: str) -> dict[str, Tap]:
    """`pooled`, and `logits` or `embed`, where each is one vector a picture."""
    classifier = network.pretrained_cfg.get("classifier")
    if getattr(network, "global_pool", "head") == "" or not isinstance(classifier, str):
        return {}  # Unpooled: the output is a map or a sequence. Distilled: there are two heads.
    names = {name for name, _ in network.named_modules()}
    single = classifier in names
    taps = {}
    if type(getattr(network, "head", None)).__name__ == "NormMlpClassifierHead":
        taps["pooled"] = Tap(f"{prefix}head.flatten", layout="ND")
    elif "head_drop" in names:
        taps["pooled"] = Tap(f"{prefix}head_drop", layout="ND")
    elif single:
        taps["pooled"] = Tap(prefix + classifier, "input", layout="ND")
    if single:
        taps["logits" if network.num_classes else "embed"] = Tap(prefix + classifier, layout="ND")
    return taps
