"""Which tensor of a model and which of its tokens: names, globs and token selections."""

import fnmatch
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from sae_runner.config import Positive, Range
from sae_runner.errors import ConfigError, did_you_mean, nearest
from sae_runner.models.base import Inputs, SiteInfo

Tokens = Literal["cls", "patches", "all", "last", "mean", "random_k", "positions"]


def resolve_sites(wanted: str | Sequence[str], sites: Mapping[str, SiteInfo]) -> list[SiteInfo]:
    """The sites that a name, a list of names or a glob means, in the model's order.

    A host's own module name is taken for the site it carries.

    Raises:
        ConfigError: a name that the model lacks; the nearest ones are listed.
    """
    by_module = {info.module: info.name for info in reversed(list(sites.values()))}
    chosen: set[str] = set()
    for name in [wanted] if isinstance(wanted, str) else wanted:
        found = fnmatch.filter(sites, name) if any(c in name for c in "*?[") else []
        if name in sites:
            found = [name]
        elif name in by_module:
            found = [by_module[name]]
        if not found:
            hint = did_you_mean(name, sites)
            if len(sites) > 24 and not nearest(name, sites):  # The first few would say little.
                families = dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".{i}", site) for site in sites)
                hint = f" Choose from: {' | '.join(families)}."
            raise ConfigError(f"site.name={name}: no such site.{hint}")
        chosen.update(found)
    if not chosen:
        raise ConfigError("site.name: no site is named")
    return [info for info in sites.values() if info.name in chosen]


def layout_key(info: SiteInfo) -> tuple[int | None, str, int, bool]:
    """What decides which tokens a selection keeps: sites that share it share rows."""
    return info.n_tokens, info.kind, info.n_prefix, info.has_cls


@dataclass(frozen=True)
class TokenSelection:
    """Which tokens of a site become rows (reference: masks of language models drop specials)."""

    tokens: Tokens
    k: int = 0
    positions: tuple[int, ...] = ()
    drop_special: bool = True
    drop_positions: tuple[int, ...] = ()
    seed: int = 0

    @classmethod
    def from_config(
        cls,
        *,
        tokens: Tokens,
        k: Positive,
        positions: list[int],
        drop_special: bool,
        drop_positions: Annotated[list[int], Range(ge=0)],
        seed: int = 0,
    ) -> "TokenSelection":
        """From the `site` group's options."""
        if tokens == "positions" and not positions:
            raise ConfigError("site.positions is empty: name the positions that site.tokens keeps")
        return cls(tokens, k, tuple(positions), drop_special, tuple(drop_positions), seed)

    @property
    def slug(self) -> str:
        """A name for folders that differs when the selection does."""
        name: str = self.tokens
        if self.tokens == "random_k":
            name += f"{self.k}-seed{self.seed}"
        if self.tokens == "positions":
            name += "".join(f".{p}" for p in self.positions)
        if self.tokens in ("all", "last", "mean", "random_k"):
            name += "" if self.drop_special else ".special"
            name += "".join(f".no{p}" for p in self.drop_positions if p != 0)
            name += "" if 0 in self.drop_positions else ".p0"
        return re.sub(r"[^A-Za-z0-9._-]", "_", name)

    def check(self, info: SiteInfo, context: int | None = None) -> None:
        """Refuse a selection that the site cannot serve; a text has `context` tokens at most.

        Raises:
            ConfigError: class tokens of a model without one, patches of a text model, more tokens
                than there are.
        """
        where = f"site.tokens={self.tokens}: {info.name}"
        own = ["cls"] * info.has_cls + ["patches"] * (info.grid is not None)
        others = ", ".join([*own, "all", "last", "mean", "random_k", "positions"])
        if self.tokens == "cls" and not info.has_cls:
            raise ConfigError(f"{where} has no class token; choose from: {others}")
        if self.tokens == "patches" and info.grid is None:
            raise ConfigError(f"{where} has no patches; choose from: {others}")
        n = info.n_tokens or context
        has = f"{info.name} has {n} tokens{'' if info.n_tokens else ' at most'}"
        if n and self.tokens == "positions":
            for position in self.positions:
                if not -n <= position < n:
                    raise ConfigError(f"site.positions={position}: {has}")
        if n and self.tokens == "random_k" and self.k > n:
            raise ConfigError(f"site.k={self.k}: {has}")

    def check_replaceable(self, what: str) -> None:
        """Refuse a selection whose rows `what` cannot put back into the model.

        Raises:
            ConfigError: rows are averages of tokens.
        """
        if self.tokens == "mean":
            raise ConfigError(
                "site.tokens=mean: an average of tokens cannot be put back into the model, as "
                f"{what} does; use all"
            )

    @property
    def rows_asked(self) -> int:
        """How many rows each example is asked for by number; 0 where its length decides."""
        return {"positions": len(set(self.positions)), "random_k": self.k}.get(self.tokens, 0)

    def rows_per_example(self, info: SiteInfo, context: int | None) -> int:
        """The most rows that one example can give."""
        n = info.n_tokens or context or 1
        match self.tokens:
            case "cls" | "last" | "mean":
                return 1
            case "patches":
                return n - info.n_prefix
            case "random_k":
                return self.k
            case "positions":
                return len(self.positions)
            case _:
                return n

    def mask(self, info: SiteInfo, inputs: Inputs, n_tokens: int) -> Bool[Tensor, "n t"]:
        """True at the tokens that become rows (for `mean`: that are averaged), on the CPU."""
        n = len(inputs)
        valid = self._valid(info, inputs, n_tokens)
        match self.tokens:
            case "all" | "mean":
                return valid
            case "cls":
                keep = torch.zeros(n, n_tokens, dtype=torch.bool)
                keep[:, 0] = True
                return keep
            case "patches":
                keep = valid.clone()
                keep[:, : info.n_prefix] = False
                return keep
            case "last":
                order = torch.arange(1, n_tokens + 1) * valid
                keep = torch.zeros(n, n_tokens, dtype=torch.bool)
                keep[torch.arange(n), order.argmax(1)] = True
                return keep & valid
            case "positions":
                own, place = _own_tokens(info, inputs, n_tokens)
                counts = own.sum(1, keepdim=True)
                chosen = [place == (p if p >= 0 else counts + p) for p in self.positions]
                return own & torch.stack(chosen).any(0)
            case "random_k":
                return self._random_k(inputs, valid)

    def _valid(self, info: SiteInfo, inputs: Inputs, n_tokens: int) -> Tensor:
        valid, place = _own_tokens(info, inputs, n_tokens)
        if inputs.attended is None or info.kind != "tokens":
            return valid  # Images: every token counts; the class token is chosen by name.
        if self.drop_special and inputs.special is not None:
            valid = valid & ~inputs.special.cpu()
        for position in self.drop_positions:
            valid = valid & (place != position)
        return valid

    def _random_k(self, inputs: Inputs, valid: Tensor) -> Tensor:
        """K valid tokens of each example, drawn by the example's own id: batches do not matter."""
        keep = torch.zeros_like(valid)
        generator = torch.Generator()
        for row, example in enumerate(inputs.ids.tolist()):
            state = np.random.SeedSequence([self.seed, example]).generate_state(1, np.uint64)
            generator.manual_seed(int(state[0] >> np.uint64(1)))
            candidates = valid[row].nonzero().squeeze(1)
            order = torch.randperm(len(candidates), generator=generator)[: self.k]
            keep[row, candidates[order]] = True
        return keep


def _own_tokens(info: SiteInfo, inputs: Inputs, n_tokens: int) -> tuple[Tensor, Tensor]:
    """True at the tokens that are no padding, and the place of each among them, from 0.

    Places, not columns, are what users mean by a position: padding may be on the left.
    """
    own = torch.ones(len(inputs), n_tokens, dtype=torch.bool)
    if inputs.attended is not None and info.kind == "tokens":
        own = inputs.attended.cpu()
    return own, own.cumsum(1) - 1
