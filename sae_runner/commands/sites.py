"""`sae-run sites`: every tensor of a model that an SAE can be trained on, without its weights."""

import itertools
import typing
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import NoneType
from typing import Any

from sae_runner.commands.job import Job
from sae_runner.commands.listing import show_table
from sae_runner.config import Name, convert
from sae_runner.data import build_dataset
from sae_runner.log import working
from sae_runner.models import MODELS, build_model
from sae_runner.models.base import Model, SiteInfo
from sae_runner.site import resolve_sites


def main(job: Job) -> None:
    """Print one line for each site, in the order of the computation; heads alike share theirs.

    Raises:
        ConfigError: an option of the model is wrong, or it has no site of that name.
    """
    cfg = job.cfg
    wanted = convert(cfg["site"]["name"], str | list[str], "site.name")
    outputs = convert(cfg["outputs"], Name, "outputs")
    context = convert(cfg["model"].get("context"), int | None, "model.context")
    model = without_weights(cfg, Path(outputs).expanduser())
    infos = resolve_sites(wanted, model.sites())
    # Compared, not resolved: with other layers the default may be no site of this model.
    default = cfg["model"].get("site")
    lines = heads_together(infos)
    columns = {
        "site": [info.name for info in lines],
        "name in the host": [info.module for info in lines],
        "tokens × d": [shape(info, context) for info in lines],
        "layout": [layout(info) for info in lines],
        "": ["default" if default in (info.name, info.module) else "" for info in lines],
    }
    show_table(columns, right=["tokens × d"])


@working("building the model without its weights")
def without_weights(cfg: dict[str, Any], outputs: Path) -> Model:
    """The model on the meta device; data are loaded only for a host that is nothing without."""
    import torch

    host: Any = MODELS[str(cfg["model"].get("type"))]
    taken = typing.get_type_hints(host.__init__).get("dataset", NoneType)
    does_without = isinstance(None, taken)
    dataset = None if does_without else build_dataset(cfg["dataset"], outputs=outputs)
    return build_model(
        cfg["model"], device=torch.device("meta"), dataset=dataset, outputs=outputs, meta=True
    )


def heads_together(infos: Sequence[SiteInfo]) -> list[SiteInfo]:
    """Heads that follow each other as one, `blocks.0.attn_q.{0..15}`; all else as it is."""

    def kind(info: SiteInfo) -> tuple[str, int]:
        stem, _, head = info.name.rpartition(".")
        return stem if head.isdigit() and ".attn_" in stem else info.name, info.d

    lines = []
    for (stem, _), alike in itertools.groupby(infos, kind):
        first, *others = alike
        if others:
            start, stop = (i.name.rpartition(".")[2] for i in (first, others[-1]))
            module = first.module.removesuffix(f".{start}")
            first = replace(first, name=f"{stem}.{{{start}..{stop}}}", module=module)
        lines.append(first)
    return lines


def shape(info: SiteInfo, context: int | None) -> str:
    """Tokens of an example and numbers of a token; a text has at most `context` tokens."""
    tokens = str(info.n_tokens or (f"≤{context}" if context else "any"))
    return f"{tokens} × {info.d}"


def layout(info: SiteInfo) -> str:
    """What the tokens are: `class + 4 registers + 16 × 16 patches`."""
    if info.kind == "vector":
        return "one vector"
    if info.kind == "map":
        return "map of {} × {} cells".format(*info.grid) if info.grid else "map"
    parts = ["class"] if info.has_cls else []
    if (registers := info.n_prefix - info.has_cls) > 0:
        parts.append(f"{registers} registers")
    if info.grid:
        parts.append("{} × {} patches".format(*info.grid))
    elif info.n_tokens is None:
        parts.append("text")
    elif info.n_tokens > info.n_prefix:
        parts.append(f"{info.n_tokens - info.n_prefix} tokens")
    return " + ".join(parts)
