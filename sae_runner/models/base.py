"""What a model under study can do: list its sites, record them, run with one of them replaced.

Every tensor that leaves this module has the shape [examples, tokens, d], whatever the host's own
layout is: a convolution map becomes its h·w cells, a pooled vector one token.
"""

import hashlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sae_runner.data.base import Dataset, Example
from sae_runner.errors import ConfigError, did_you_mean
from sae_runner.models._taps import Tap as Tap
from sae_runner.models._taps import attach, left_out

Edit = Callable[[Float[Tensor, "n tokens d"]], Float[Tensor, "n tokens d"]]
Output = Literal["token_logits", "class_logits", "features"]


@dataclass(frozen=True)
class SiteInfo:
    """One tensor of a model that can be recorded or replaced."""

    name: str
    """Canonical: `blocks.3.resid_post`, the same on every host."""
    module: str
    """The host's own name of the module that carries it; accepted as a site name too."""
    d: int
    """Width: numbers per token."""
    kind: Literal["tokens", "map", "vector"]
    n_tokens: int | None
    """Tokens per example, class and register tokens included; None where inputs decide."""
    n_prefix: int = 0
    """Class and register tokens, which come before the patches."""
    has_cls: bool = False
    """Whether token 0 is a class token."""
    grid: tuple[int, int] | None = None
    """Rows and columns of the patches or of the map."""


@dataclass
class Inputs:
    """A batch as a host takes it. The first axis of every tensor is the example."""

    ids: Int64[Tensor, " n"]
    tensors: dict[str, Tensor]
    """What the host's forward takes, e.g. `pixels` [n, 3, h, w] or `tokens` [n, t]."""
    attended: Bool[Tensor, "n t"] | None = None
    """Text: True where a token is no padding."""
    special: Bool[Tensor, "n t"] | None = None
    """Text: True at BOS, EOS, CLS, SEP and their like."""
    labels: Int64[Tensor, " n"] | None = None
    """Class of each example, -1 where it has none; None where none of the batch has one."""

    def __len__(self) -> int:
        return len(self.ids)

    def split(self, n: int) -> list["Inputs"]:
        """Parts of n examples; the last may have fewer."""
        starts = range(0, len(self), n)
        return [self.map(lambda tensor, i=i: tensor[i : i + n]) for i in starts]  # type: ignore[misc]

    def to(self, device: str | torch.device) -> "Inputs":
        """The same batch on another device."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def map(self, change: Callable[[Tensor], Tensor]) -> "Inputs":
        """The batch with `change` applied to each of its tensors."""
        optional = {k: getattr(self, k) for k in ("attended", "special", "labels")}
        return replace(
            self,
            ids=change(self.ids),
            tensors={k: change(v) for k, v in self.tensors.items()},
            **{k: None if v is None else change(v) for k, v in optional.items()},
        )


def labels_of(examples: Sequence[Example]) -> Int64[Tensor, " n"] | None:
    """What `Inputs.labels` is for a batch."""
    if all(example.label is None for example in examples):
        return None
    return torch.tensor([-1 if e.label is None else e.label for e in examples], dtype=torch.int64)


class Model(ABC):
    """A frozen network: what the runner, the store and the evaluators know of one."""

    modality: Literal["image", "text", "rows"]
    device: torch.device
    output: Output = "features"
    """What `splice` gives: logits of trained weights, [n, t, vocab] or [n, classes], or anything
    else (embeddings, hidden states, rows), which is no distribution."""
    causal: bool = True
    """Whether token logits are of the next token; False for an encoder, which fills in masks."""
    logit_cap: float | None = None
    """c of logits c · tanh(ℓ / c), where the last thing a model does is to cap them (Gemma 2)."""

    @abstractmethod
    def sites(self) -> dict[str, SiteInfo]:
        """Every site by its canonical name, in the order of the computation."""

    @abstractmethod
    def prepare(self, examples: Sequence[Example]) -> Inputs:
        """Preprocess and batch examples, on the CPU. Safe to call from several threads."""

    @abstractmethod
    def record(self, inputs: Inputs, sites: Sequence[str]) -> dict[str, Float[Tensor, "n t d"]]:
        """Activations at `sites` (canonical names); stops after the last of them is known.

        Gradients flow when they are enabled: nothing is detached here.
        """

    @abstractmethod
    def splice(
        self,
        inputs: Inputs,
        edits: Mapping[str, Edit],
        positions: Bool[Tensor, "n t"] | None = None,
    ) -> Tensor:
        """The model's output with `edits` applied at sites, where `positions` is True."""

    @abstractmethod
    def resume_from(
        self,
        site: str,
        x: Float[Tensor, "n t d"],
        state: Inputs,
        edits: Mapping[str, Edit] | None = None,
    ) -> Tensor:
        """The model's output when `site` holds `x`, running only what lies after it if possible.

        `state` is the batch that `x` came from; when `x` has more rows, `state` is repeated, so
        one input can be continued from many edits of it. `edits` are of later sites.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 over weights and preprocessing (hex)."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What a report says of the model: weights, preprocessing, versions."""

    def adapt(self, dataset: Dataset) -> Dataset:
        """The dataset as this model reads it (a language model packs running text here)."""
        return dataset

    def parameters(self) -> Iterator[nn.Parameter]:
        """What fine-tuning would change."""
        return iter(())


class _Stop(Exception):
    """Raised by the last recording hook: nothing after it is needed."""


class HookedModel(Model):
    """A model in PyTorch whose sites are modules; hosts say which, and how to call it.

    A host sets `network`, `device`, `modality` and `block_paths`, and defines `forward`, `taps`,
    `probe`, `prepare`, `fingerprint` and `describe`.
    """

    network: nn.Module
    block_paths: Sequence[str] = ()
    """Residual blocks in order, by module name: what `resume_from` can leave out."""
    n_prefix: int = 0
    has_cls: bool = False
    grid: tuple[int, int] | None = None

    def __init__(self) -> None:
        self._sites: dict[str, SiteInfo] | None = None
        # Hooks are the network's: two threads at once would see each other's activations.
        self._lock = threading.RLock()

    @abstractmethod
    def forward(self, inputs: Inputs) -> Tensor:
        """The network's own output: embeddings [n, d], class logits [n, c] or [n, t, vocab]."""

    @abstractmethod
    def taps(self) -> dict[str, Tap]:
        """Canonical site name to where it is found, in the order of the computation."""

    @abstractmethod
    def probe(self, n: int) -> Inputs:
        """`n` made-up examples on this model's device, to learn shapes from."""

    def modules(self) -> dict[str, nn.Module]:
        """Every module of the network by name."""
        return dict(self.network.named_modules())

    def sites(self) -> dict[str, SiteInfo]:
        """Shapes learned from a made-up batch, which also proves the batch axis and the hooks.

        A tap whose module never runs is left out; one whose first axis is not the batch is refused.
        """
        if self._sites is None:
            self._sites = self._probe_sites()
        return self._sites

    def _probe_sites(self) -> dict[str, SiteInfo]:
        n = 3  # A batch that no model has as a number of tokens or channels.
        taps, seen = self.taps(), dict[str, Tensor]()
        with torch.no_grad(), self._hooks(taps, seen.__setitem__):
            self.forward(self.probe(n))
        found = {}
        for name, tap in taps.items():
            if name not in seen:
                continue
            x = seen[name]
            if x.ndim != 3 or x.shape[0] != n:
                raise ConfigError(
                    f"site {name!r} ({tap.module}): axis 0 of its tensor is not the batch: "
                    f"{tuple(x.shape)} for {n} examples in layout {tap.layout}"
                )
            found[name] = self.site_info(name, tap, x)
        return found

    def site_info(self, name: str, tap: Tap, x: Tensor) -> SiteInfo:
        """Describe a site from a recorded example batch `x`; hosts refine it."""
        tokens = x.shape[1]
        if tap.layout == "ND":
            return SiteInfo(name, tap.module, x.shape[2], "vector", 1)
        if tap.layout in ("NCHW", "NHWC"):
            side = round(tokens**0.5)
            grid = (side, side) if side * side == tokens else None
            return SiteInfo(name, tap.module, x.shape[2], "map", tokens, grid=grid)
        fixed = tokens if self.modality == "image" else None
        prefix, has_cls = self.n_prefix, self.has_cls
        return SiteInfo(
            name, tap.module, x.shape[2], "tokens", fixed, prefix, has_cls, grid=self.grid
        )

    @contextmanager
    def _hooks(
        self, taps: Mapping[str, Tap], visit: Callable[[str, Tensor], Any], *, edit: bool = False
    ) -> Iterator[None]:
        """Call `visit(name, x)` whenever a tapped module runs; with `edit`, put back its result."""
        modules, handles = self.modules(), list[RemovableHandle]()
        for name, tap in taps.items():
            if tap.module not in modules:
                raise ConfigError(
                    f"site {name!r}: this network has no module {tap.module!r}."
                    f"{did_you_mean(tap.module, modules, limit=8)}"
                )
        with self._lock:
            try:
                for name, tap in taps.items():
                    handles.append(attach(modules[tap.module], name, tap, visit, edit))
                yield
            finally:
                for handle in handles:
                    handle.remove()

    def _taps(self, names: Sequence[str]) -> dict[str, Tap]:
        every = self.taps()
        if missing := [name for name in names if name not in every]:
            raise ConfigError(
                f"site.name: no site {missing[0]!r}.{did_you_mean(missing[0], every)}"
            )
        return {name: every[name] for name in names}

    def record(self, inputs: Inputs, sites: Sequence[str]) -> dict[str, Tensor]:
        """See `Model.record`."""
        taps, seen = self._taps(sites), dict[str, Tensor]()
        if not taps:
            return {}

        def visit(name: str, x: Tensor) -> None:
            seen[name] = x
            if len(seen) == len(taps):
                raise _Stop

        with self._hooks(taps, visit):
            try:
                self.forward(inputs)
            except _Stop:
                pass
            else:
                silent = next(name for name in taps if name not in seen)
                raise ConfigError(f"site {silent!r}: its module never ran in the forward pass")
        for name, x in seen.items():
            if x.shape[0] != len(inputs):
                raise ConfigError(f"site {name!r}: {x.shape[0]} rows for {len(inputs)} examples")
        return {name: seen[name] for name in sites}

    def splice(
        self,
        inputs: Inputs,
        edits: Mapping[str, Edit],
        positions: Bool[Tensor, "n t"] | None = None,
    ) -> Tensor:
        """See `Model.splice`."""

        def visit(name: str, x: Tensor) -> Tensor:
            changed = edits[name](x).to(x.dtype)  # An SAE in fp32 in a host in bf16.
            if positions is None:
                return changed
            return torch.where(positions.to(x.device).unsqueeze(-1), changed, x)

        with self._hooks(self._taps(list(edits)), visit, edit=True):
            return self.forward(inputs)

    def resume_from(
        self,
        site: str,
        x: Float[Tensor, "n t d"],
        state: Inputs,
        edits: Mapping[str, Edit] | None = None,
    ) -> Tensor:
        """See `Model.resume_from`; blocks up to a block's input or output are left out.

        Elsewhere the whole network runs again with the site replaced.
        """
        if len(x) != len(state):
            if len(x) % len(state):
                raise ValueError(f"{len(x)} rows are no multiple of the {len(state)} in the state")
            repeats = len(x) // len(state)
            state = state.map(lambda tensor: tensor.repeat_interleave(repeats, dim=0))
        modules = self.modules()
        with self._lock, left_out([modules[path] for path in self._needless(site)]):
            return self.splice(state, {site: lambda _: x, **(edits or {})})

    def _needless(self, site: str) -> Sequence[str]:
        """Blocks that what lies after a site does not need, once the site is known."""
        every = self.taps()
        tap, blocks = self._taps([site])[site], list(self.block_paths)
        if tap.module not in blocks or tap.columns is not None:
            return ()
        skipped = blocks[: blocks.index(tap.module) + (tap.side == "output")]
        # A block that gives a tuple cannot be left out: it would hand on a bare tensor.
        tuples = {t.module for t in every.values() if t.item is not None}
        return () if tuples & set(skipped) else skipped

    def parameters(self) -> Iterator[nn.Parameter]:
        """See `Model.parameters`."""
        return self.network.parameters()


def weights_hash(network: nn.Module, *facts: Any) -> str:
    """SHA-256 (hex) over the network's tensors, by name, and over `facts`."""
    digest = hashlib.sha256(repr(facts).encode())
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        if tensor.device.type != "meta":
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy() if flat.numel() else b"")
    return digest.hexdigest()
