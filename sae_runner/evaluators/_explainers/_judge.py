"""A CLIP beside the host that judges what the host's latents were said to be."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sae_runner import files
from sae_runner.config import options_of, preset
from sae_runner.errors import ConfigError, did_you_mean
from sae_runner.models import build_model
from sae_runner.models._text import TextTower
from sae_runner.models.base import Model


def judge_options(judge: Any) -> dict[str, Any]:
    """A `model` block from a preset's name, or from `preset` and options that replace its own.

    Raises:
        ConfigError: no such preset or option, or one whose weights would have to be trained.
    """
    given = dict(judge) if isinstance(judge, Mapping) else {"preset": judge}
    name = str(given.pop("preset", ""))
    if name not in options_of("model"):
        hint = did_you_mean(name, options_of("model"))
        raise ConfigError(f"backend.judge={name or judge}: is no preset of a model.{hint}")
    options = preset("model", name)
    for key in given:
        if key not in options:
            raise ConfigError(f"backend.judge.{key}: no such option.{did_you_mean(key, options)}")
    options |= given
    if options.get("weights") is None:
        raise ConfigError(
            f"backend.judge={name}: this model has no weights of its own; use "
            f"{{preset: {name}, weights: FOLDER}}"
        )
    return options


def build_judge(options: Mapping[str, Any], device: torch.device, *, meta: bool = False) -> Model:
    """The judge; with `meta` only its shape.

    Raises:
        ConfigError: it has no text tower, or its weights are absent.
    """
    try:
        model = build_model(options, device=device, dataset=None, outputs=Path(), meta=meta)
    except ConfigError as error:  # Of the options of a model, which are the judge's here.
        raise ConfigError(str(error).replace("model.", "backend.judge.")) from None
    if not isinstance(model, TextTower):
        raise ConfigError(
            f"backend.judge: a {options['type']} model has no text tower beside its images; "
            "use a CLIP, such as clip_vit_b16"
        )
    return model


def hash_of_weights(options: Mapping[str, Any]) -> str | None:
    """Hash of weights that are a file or folder here; None of those that have a name."""
    path = Path(str(options["weights"])).expanduser()
    if not path.exists():
        return None
    every = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return hashlib.sha256("".join(map(files.sha256, every)).encode()).hexdigest()
