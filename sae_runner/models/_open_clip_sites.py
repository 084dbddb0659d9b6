"""Where the canonical sites are in open_clip's image towers: own ViT and ResNet, timm."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sae_runner.models import _timm_sites
from sae_runner.models._open_attention import PARTS, OpenAttention
from sae_runner.models.base import Tap


@dataclass(frozen=True)
class FirstToken(Tap):
    """Token 0 of a sequence, as the vector that stands for the whole image."""

    def read(self, value: Any) -> Tensor:
        """Token 0 of what the module gave, [n, 1, d]."""
        return self._pick(value)[:, :1]

    def write(self, value: Any, x: Tensor) -> Any:
        """`value` with `x` [n, 1, d] in the place of token 0."""
        return torch.cat([x, self._pick(value)[:, 1:]], dim=1)


@dataclass
class Tower:
    """What a host must know of an image tower."""

    taps: dict[str, Tap] = field(default_factory=dict)
    block_paths: list[str] = field(default_factory=list)
    n_prefix: int = 0
    has_cls: bool = False
    grid: tuple[int, int] | None = None


def find_sites(visual: nn.Module) -> Tower:
    """The sites of `visual`, which sits in a network under the name `visual`."""
    from open_clip.transformer import VisionTransformer

    if isinstance(visual, VisionTransformer):
        tower = _vit(visual)
    elif hasattr(visual, "trunk"):
        tower = _timm(visual)
    else:
        tower = _resnet(visual)
    tower.taps["embed"] = Tap("visual", layout="ND")
    return tower


def _vit(visual: Any) -> Tower:
    """open_clip's own vision transformer.

    `ls_1` is hooked, not `attn`: it is there with and without LayerScale, and a hook on
    nn.MultiheadAttention would switch off its fast path and so change the numbers.
    """
    tower = Tower(n_prefix=1, has_cls=True, grid=tuple(visual.grid_size))
    for i, block in enumerate(visual.transformer.resblocks):
        path = f"visual.transformer.resblocks.{i}"
        tower.block_paths.append(path)
        tower.taps[f"blocks.{i}.resid_pre"] = Tap(path, "input")
        if isinstance(block.attn, nn.MultiheadAttention):
            tower.taps |= _attention(block.attn, f"{path}.attn", f"blocks.{i}")
        tower.taps |= {
            f"blocks.{i}.attn_out": Tap(f"{path}.ls_1"),
            f"blocks.{i}.resid_mid": Tap(f"{path}.ln_2", "input", in_place=True),
            f"blocks.{i}.mlp_act": Tap(f"{path}.mlp.gelu"),
            f"blocks.{i}.mlp_out": Tap(f"{path}.ls_2"),
            f"blocks.{i}.resid_post": Tap(path),
        }
    tower.taps |= _after_blocks(visual)
    return tower


def _after_blocks(visual: Any) -> dict[str, Tap]:
    """`final_norm`, of all tokens or, where the norm comes after the pool, of the pooled vector.

    `pooled` is token 0 of it. An attention that pools (CoCa) gives its queries' tokens, which are
    none of the image: of those the first alone is taken.
    """
    path, by_token = "visual.ln_post", visual.pool_type == "tok"
    first, vector = FirstToken(path, layout="ND"), Tap(path, layout="ND")
    if visual.attn_pool is not None and visual.attn_pool_contrastive is None:
        return {"final_norm": first, "pooled": first} if by_token else {}
    if visual.attn_pool is None and visual.final_ln_after_pool and visual.pool_type != "none":
        return {"final_norm": vector, "pooled": vector} if by_token else {"final_norm": vector}
    taps = {"final_norm": Tap(path)}
    return {**taps, "pooled": first} if by_token else taps


def _attention(attention: nn.MultiheadAttention, path: str, name: str) -> dict[str, Tap]:
    """Queries, keys, values and mixed values, of all heads and of each."""
    OpenAttention.open(attention)
    taps, width = {}, attention.head_dim
    for part in PARTS:
        taps[f"{name}.attn_{part}"] = Tap(f"{path}.{part}")
        for h in range(attention.num_heads):
            columns = (h * width, (h + 1) * width)
            taps[f"{name}.attn_{part}.{h}"] = Tap(f"{path}.{part}", columns=columns)
    return taps


def _timm(visual: Any) -> Tower:
    """A timm trunk with open_clip's head on it."""
    weight = next(visual.trunk.parameters())
    size = visual.preprocess_cfg["size"]
    height, width = (size, size) if isinstance(size, int) else size
    image = torch.zeros(1, 3, height, width, device=weight.device, dtype=weight.dtype)
    trunk = _timm_sites.find_sites(visual.trunk, image, "visual.trunk")
    for name in ("embed", "logits"):
        trunk.taps.pop(name, None)
    return Tower(**vars(trunk))


def _resnet(visual: Any) -> Tower:
    """CLIP's modified ResNet; its blocks change shapes, so none can be left out."""
    tower = Tower()
    for s in range(4):
        for b in range(len(getattr(visual, f"layer{s + 1}"))):
            tower.taps[f"stages.{s}.blocks.{b}"] = Tap(f"visual.layer{s + 1}.{b}", layout="NCHW")
        tower.taps[f"stages.{s}"] = Tap(f"visual.layer{s + 1}", layout="NCHW")
    return tower
