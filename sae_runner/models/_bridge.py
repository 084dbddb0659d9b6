"""Where a transformer's sites are, as TransformerLens' bridge tells for its architecture.

The bridge wraps every part of a Hugging Face network in a component of its own, which names it the
same for every architecture. The names are kept here and the wrappers are taken off again: the
network runs as its library wrote it, bit for bit and with its fused attention.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sae_runner.models.base import Tap

# What the canonical sites of a block are called in TransformerLens.
HOOKS = {
    "resid_pre": "hook_resid_pre", "resid_mid": "hook_resid_mid", "resid_post": "hook_resid_post",
    "attn_out": "hook_attn_out", "mlp_out": "hook_mlp_out", "mlp_act": "mlp.hook_post",
    "attn_q": "attn.hook_q", "attn_k": "attn.hook_k", "attn_v": "attn.hook_v",
    "attn_z": "attn.hook_z",
}  # fmt: skip


class Layout(NamedTuple):
    """The sites of a network and the blocks they are in."""

    taps: dict[str, Tap]
    """By canonical name, in the order of the computation."""
    hooks: dict[str, str]
    """Canonical name to TransformerLens' name."""
    block_paths: list[str]


@dataclass(frozen=True)
class GatheredTap(Tap):
    """A site whose columns lie scattered in its module's output, as where q, k, v interleave."""

    indices: tuple[int, ...] = ()

    def read(self, value: Any) -> Tensor:
        """See `Tap.read`."""
        return super().read(value)[..., list(self.indices)]

    def write(self, value: Any, x: Tensor) -> Any:
        """See `Tap.write`."""
        index = torch.tensor(self.indices, device=x.device)
        return super().write(value, super().read(value).index_copy(-1, index, x))


def layout(network: nn.Module, architecture: str, root: nn.Module | None = None) -> Layout:
    """Find the sites of a Hugging Face network, which is the same afterwards as before.

    Args:
        network: a network with its head, as the bridge wants it.
        architecture: its class name.
        root: the part of it that module names start from; the whole if None.

    Raises:
        ValueError: TransformerLens does not know the architecture.
    """
    from transformer_lens.model_bridge.sources import build_bridge_from_module
    from transformers.initialization import no_init_weights

    config: Any = network.config
    attention = config._attn_implementation
    # The bridge makes linear layers for q, k and v and puts weights in: it need not draw them.
    with _readable(network), no_init_weights():
        bridge = build_bridge_from_module(network, architecture, hf_config=config)
        blocks = [_roles(block) for block in bridge.blocks]
        embed = bridge.embed.original_component
        norm = getattr(getattr(bridge, "ln_final", None), "original_component", None)
        cfg, split = bridge.cfg, getattr(bridge.blocks[0].attn, "split_qkv_matrix", None)
        _unwrap(network)
    config._attn_implementation = attention

    paths = {module: path for path, module in (root or network).named_modules()}
    heads = {"q": int(cfg.n_heads), "z": int(cfg.n_heads)}
    heads |= dict.fromkeys("kv", int(cfg.n_key_value_heads or cfg.n_heads))
    with no_init_weights():
        columns = _fused_columns(blocks[0], split) if split and "qkv" in blocks[0] else {}
    taps, hooks = {"embed": Tap(paths[embed])}, {"embed": "hook_embed"}
    for i, roles in enumerate(blocks):
        where = {role: paths[module] for role, module in roles.items() if module in paths}
        for site, tap in _block_taps(where, roles, heads, columns):
            kind, _, head = site.partition(".")
            taps[f"blocks.{i}.{site}"] = tap
            hooks[f"blocks.{i}.{site}"] = f"blocks.{i}.{HOOKS[kind]}" + (head and f".{head}")
    body: Any = network.base_model
    if norm in set(body.modules()):  # An encoder's is a part of its head, and not the stream's.
        taps["final_norm"], hooks["final_norm"] = Tap(paths[norm]), "ln_final.hook_out"
    return Layout(taps, hooks, [paths[roles["block"]] for roles in blocks])


@contextmanager
def _readable(network: nn.Module) -> Iterator[None]:
    """Give parameters on the meta device values inside the block (zeros that take no memory).

    The bridge cuts fused projections when it is built, and refuses to cut what has no values.
    """
    owners = {module: dict(module._parameters) for module in network.modules()}
    for module, parameters in owners.items():
        for name, parameter in parameters.items():
            if parameter is not None and parameter.is_meta:
                zeros = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
                module._parameters[name] = nn.Parameter(zeros)
    try:
        yield
    finally:
        for module, parameters in owners.items():
            module._parameters.update(parameters)


def _roles(block: Any) -> dict[str, nn.Module]:
    """The network's own modules that a block of the bridge wraps, by role."""
    from transformer_lens.model_bridge.generalized_components import BlockBridge

    attention, mlp = getattr(block, "attn", None), getattr(block, "mlp", None)
    wrapped = {"block": block, "attn": attention, "mlp": mlp, "mlp_end": getattr(mlp, "out", None)}
    wrapped |= {name: getattr(attention, name, None) for name in ("q", "k", "v", "o", "qkv")}
    wrapped |= {name: getattr(block, name, None) for name in ("ln1_post", "ln2_post")}
    # Blocks of other classes run attention and MLP side by side, or scale what they write: what
    # lies between the two is then no residual stream.
    if type(block) is BlockBridge:
        wrapped |= {name: getattr(block, name, None) for name in ("ln1", "ln2")}
    found = {role: getattr(part, "original_component", None) for role, part in wrapped.items()}
    return {role: module for role, module in found.items() if isinstance(module, nn.Module)}


def _unwrap(module: nn.Module) -> None:
    """Put every wrapped module back in the place of its wrapper."""
    for name, child in list(module.named_children()):
        while isinstance(inner := child._modules.get("_original_component"), nn.Module):
            child = module._modules[name] = inner
        _unwrap(child)


def _block_taps(
    where: Mapping[str, str],
    roles: Mapping[str, nn.Module],
    heads: Mapping[str, int],
    columns: Mapping[str, Sequence[int]],
) -> Iterator[tuple[str, Tap]]:
    """The sites of one block, as far as its architecture has them, in order."""
    yield "resid_pre", Tap(where["block"], side="input")
    for letter in "qkv":
        if letter in where:
            yield from _with_heads(letter, Tap(where[letter]), _width(roles[letter]), heads)
        elif letter in columns:
            yield from _fused(letter, where["qkv"], columns[letter], heads[letter])
    if "o" in where:
        yield from _with_heads("z", Tap(where["o"], side="input"), _width(roles["o"], 1), heads)
    if "o" in where or "ln1_post" in where:
        yield "attn_out", _output(where, "ln1_post", "o")
    if tap := _resid_mid(where):
        yield "resid_mid", tap
    if "mlp_end" in where:
        yield "mlp_act", Tap(where["mlp_end"], side="input")
    if "mlp" in where or "mlp_end" in where:
        yield "mlp_out", _output(where, "ln2_post", "mlp_end", "mlp")
    yield "resid_post", Tap(where["block"])


def _output(where: Mapping[str, str], *roles: str) -> Tap:
    """The output of the first of `roles` that is there."""
    return Tap(next(where[role] for role in roles if role in where))


def _resid_mid(where: Mapping[str, str]) -> Tap | None:
    """What the MLP's half of the block reads and adds to, or None where there is no such tensor."""
    if "ln1" in where and where["ln1"].startswith(where["attn"] + "."):
        return Tap(where["ln1"])  # Post-norm: the sum is normalised at the end of attention.
    if "ln2" in where:
        return Tap(where["ln2"], side="input", in_place=True)
    return None


def _with_heads(
    letter: str, tap: Tap, width: int, heads: Mapping[str, int]
) -> Iterator[tuple[str, Tap]]:
    yield f"attn_{letter}", tap
    size = width // heads[letter]
    for head in range(heads[letter]):
        columns = (head * size, (head + 1) * size)
        yield f"attn_{letter}.{head}", Tap(tap.module, tap.side, columns=columns)


def _fused(
    letter: str, module: str, columns: Sequence[int], n_heads: int
) -> Iterator[tuple[str, Tap]]:
    """Like `_with_heads`, where one module gives q, k and v."""
    size = len(columns) // n_heads
    parts = {f".{head}": columns[head * size : (head + 1) * size] for head in range(n_heads)}
    for suffix, part in {"": columns, **parts}.items():
        start, stop = part[0], part[-1] + 1
        if list(part) == list(range(start, stop)):
            yield f"attn_{letter}{suffix}", Tap(module, columns=(start, stop))
        else:
            yield f"attn_{letter}{suffix}", GatheredTap(module, indices=tuple(part))


def _fused_columns(roles: Mapping[str, nn.Module], split: Any) -> dict[str, list[int]]:
    """Which output columns of the fused projection are q, k and v, head by head.

    The architecture's adapter knows how to cut the weights: it is given weights that hold the
    number of their column.
    """
    module = roles["qkv"]
    weight: Any = module._parameters["weight"]
    by_rows = isinstance(module, nn.Linear)  # Conv1D keeps [in, out].
    n = weight.shape[0] if by_rows else weight.shape[1]
    labels = torch.arange(n, dtype=torch.float32).unsqueeze(1 if by_rows else 0)
    module._parameters["weight"] = nn.Parameter(labels.expand(weight.shape))
    try:
        parts = split(roles["attn"])
    finally:
        module._parameters["weight"] = weight
    return {
        letter: [round(label) for label in part.weight[:, 0].tolist()]
        for letter, part in zip("qkv", parts, strict=True)
    }


def _width(module: nn.Module, axis: int = 0) -> int:
    """Numbers that a linear layer gives (axis 0) or takes (axis 1)."""
    weight: Any = module._parameters["weight"]
    return int(weight.shape[axis if isinstance(module, nn.Linear) else 1 - axis])
