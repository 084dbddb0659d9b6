"""Where a site is found in a network, and the hooks that read or replace it there."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


@dataclass(frozen=True)
class Tap:
    """Where a site is found in a host: a module, which side of it, and its layout."""

    module: str
    side: Literal["output", "input"] = "output"
    item: int | None = None
    """Index into the output when that is a tuple."""
    layout: Literal["NLD", "LND", "NCHW", "NHWC", "ND", "NLHD"] = "NLD"
    columns: tuple[int, int] | None = None
    """Start and stop in the last axis, for one head of several."""
    in_place: bool = False
    """Input side only: the tensor is read elsewhere too (by the skip around a norm), so an edit is
    written into it instead of replacing the argument."""

    def read(self, value: Any) -> Tensor:
        """The site's [n, tokens, d] in what the module took or gave."""
        return self._columns(self._canonical(self._pick(value)))

    def write(self, value: Any, x: Tensor) -> Any:
        """`value` with the site's part replaced by `x` [n, tokens, d]."""
        old = self._pick(value)
        if self.columns is not None:
            whole = self._canonical(old)
            start, stop = self.columns
            x = torch.cat([whole[..., :start], x, whole[..., stop:]], dim=-1)
        match self.layout:
            case "NLD":
                new = x
            case "LND":
                new = x.transpose(0, 1)
            case "NCHW":
                new = x.transpose(1, 2).reshape(len(x), x.shape[-1], *old.shape[2:])
            case "NHWC" | "NLHD":
                new = x.reshape(len(x), *old.shape[1:])
            case "ND":
                new = x.squeeze(1)
        if not isinstance(value, tuple | list):
            return new
        make = getattr(type(value), "_make", type(value))  # A named tuple takes its fields apart.
        return make([*value[: self.item or 0], new, *value[(self.item or 0) + 1 :]])

    def _pick(self, value: Any) -> Tensor:
        if isinstance(value, tuple | list):
            value = value[self.item or 0]
        if not isinstance(value, Tensor):
            raise TypeError(f"{self.module} gives a {type(value).__name__}, not a tensor")
        return value

    def _canonical(self, x: Tensor) -> Tensor:
        match self.layout:
            case "NLD":
                return x
            case "LND":
                return x.transpose(0, 1)
            case "NCHW":
                return x.flatten(2).transpose(1, 2)
            case "NHWC":
                return x.flatten(1, -2)
            case "NLHD":
                return x.flatten(2)
            case "ND":
                return x.unsqueeze(1)

    def _columns(self, x: Tensor) -> Tensor:
        return x if self.columns is None else x[..., self.columns[0] : self.columns[1]]


def attach(
    module: nn.Module, name: str, tap: Tap, visit: Callable[[str, Tensor], Any], edit: bool
) -> RemovableHandle:
    """Call `visit(name, x)` whenever the module runs; with `edit`, put back its result."""
    if tap.side == "input":
        hook = _input_hook(name, tap, visit, edit)
        return module.register_forward_pre_hook(hook, with_kwargs=True)
    return module.register_forward_hook(_output_hook(name, tap, visit, edit))


def _input_hook(name: str, tap: Tap, visit: Callable[[str, Tensor], Any], edit: bool) -> Any:
    def hook(_: nn.Module, arguments: Any, options: dict[str, Any]) -> Any:
        if edit and tap.in_place:
            old = arguments[0] if arguments else next(iter(options.values()))
            # The edit sees a copy, so that what it keeps for its gradient is not overwritten.
            old.copy_(tap.write(old, visit(name, tap.read(old.clone()))))
            return None
        if arguments:
            changed = visit(name, tap.read(arguments[0]))
            return ((tap.write(arguments[0], changed), *arguments[1:]), options) if edit else None
        key = next(iter(options))  # e.g. hidden_states=…: some libraries pass keywords only.
        changed = visit(name, tap.read(options[key]))
        return ((), {**options, key: tap.write(options[key], changed)}) if edit else None

    return hook


def _output_hook(name: str, tap: Tap, visit: Callable[[str, Tensor], Any], edit: bool) -> Any:
    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        changed = visit(name, tap.read(output))
        return tap.write(output, changed) if edit else None

    return hook


@contextmanager
def left_out(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Let residual blocks hand on what they were given, inside the block."""

    def hand_on(*arguments: Any, **options: Any) -> Any:
        return arguments[0] if arguments else next(iter(options.values()))

    before = [vars(module).get("forward") for module in modules]  # None: its class's own.
    for module in modules:
        module.forward = hand_on
    try:
        yield
    finally:
        for module, forward in zip(modules, before, strict=True):
            if forward is None:
                del module.forward
            else:
                module.forward = forward
