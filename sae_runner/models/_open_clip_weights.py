"""What weights of open_clip's models need to be right, and how they come into a network."""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sae_runner.errors import ConfigError, did_you_mean
from sae_runner.models._artefact import seeded
from sae_runner.models._precision import Precision

log = logging.getLogger("sae_runner")


def trained_with(arch: str, weights: str, tag: str | None, *, announce: bool) -> dict[str, Any]:
    """Activation function and preprocessing that `weights` need.

    `certain` is absent where they had to be guessed from the architecture's name.

    Raises:
        ConfigError: unknown architecture or tag, or a file that is not there.
    """
    import open_clip

    if arch not in open_clip.list_models():
        raise ConfigError(
            f"model.arch={arch}: no such architecture.{did_you_mean(arch, open_clip.list_models())}"
        )
    tags = {name: open_clip.get_pretrained_cfg(arch, name) for name in tags_of(arch)}
    is_file = Path(weights).expanduser().is_file()
    named = tag or (None if weights == "random" or is_file else weights)
    if named is not None:
        return _of_tag(arch, named, tags, "model.tag" if tag else "model.weights")
    if (config := Path(weights).expanduser().parent / "open_clip_config.json").is_file():
        beside = json.loads(config.read_text())
        quick_gelu = beside.get("model_cfg", {}).get("quick_gelu", False)
        return {"quick_gelu": quick_gelu, "preprocess": beside["preprocess_cfg"], "certain": True}
    arch_says = bool((open_clip.get_model_config(arch) or {}).get("quick_gelu", False))
    gelus = {bool(cfg.get("quick_gelu", False)) for cfg in tags.values()}
    transforms = {json.dumps(preprocessing(cfg), sort_keys=True) for cfg in tags.values()}
    if is_file and announce and (len(gelus) > 1 or len(transforms) > 1):
        log.warning(
            "model.weights=%s: weights of %s differ in activation function or preprocessing; took "
            "quick_gelu=%s and the default transform. Say which they are with model.tag=… (%s)",
            weights, arch, arch_says, ", ".join(sorted(tags)),
        )  # fmt: skip
    transform = json.loads(transforms.pop()) if len(transforms) == 1 else {}
    return {"quick_gelu": arch_says, "preprocess": transform}


def _of_tag(arch: str, tag: str, tags: Mapping[str, dict[str, Any]], key: str) -> dict[str, Any]:
    known = tag.lower().replace("-", "_")  # As open_clip spells them.
    if known not in tags:
        others = [*tags, "random"] if key == "model.weights" else [*tags]
        raise ConfigError(
            f"{key}={tag}: neither a file nor a tag of {arch}.{did_you_mean(tag, others)}"
        )
    return {
        "quick_gelu": bool(tags[known].get("quick_gelu", False)),
        "preprocess": preprocessing(tags[known]),
        "certain": True,
    }


def tags_of(arch: str) -> list[str]:
    """Names of the pretrained weights of an architecture."""
    from open_clip.pretrained import list_pretrained_tags_by_model

    return list(list_pretrained_tags_by_model(arch))


def preprocessing(tag_config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a tag's configuration that the transform needs; the size is the tower's."""
    keys = ("mean", "std", "interpolation", "resize_mode")
    return {key: tag_config[key] for key in keys if tag_config.get(key) is not None}


def build_network(
    arch: str,
    quick_gelu: bool,
    preprocess: Mapping[str, Any],
    precision: Precision,
    device: str,
    seed: int,
) -> nn.Module:
    """An untrained network of `arch`.

    Raises:
        ConfigError: a part of the architecture is only on the hub.
    """
    import open_clip

    try:
        with seeded(seed), quiet(), torch.device(device):
            network: nn.Module = open_clip.create_model(
                arch,
                pretrained=None,
                pretrained_text=False,
                precision=precision,
                device=device,
                quick_gelu=quick_gelu,
                force_preprocess_cfg=dict(preprocess),
            )
    except OSError as error:
        raise ConfigError(
            f"model.arch={arch}: a part of it is not here and cannot be downloaded "
            f"({first_line(error)}); choose an architecture without a Hugging Face text tower"
        ) from None
    return network


def find_weights(arch: str, weights: str) -> str:
    """The local file of a pretrained tag, downloaded if need be, or the file itself.

    Raises:
        ConfigError: it cannot be downloaded.
    """
    from open_clip import pretrained

    path = Path(weights).expanduser()
    if path.is_file():
        return str(path)
    try:
        with quiet():
            return str(pretrained.download_pretrained(pretrained.get_pretrained_cfg(arch, weights)))
    except Exception as error:  # What a hub client raises is not for us to list.
        raise ConfigError(
            f"model.weights={weights}: not here and cannot be downloaded ({first_line(error)}); "
            f"give a local file (model.weights=FILE model.tag={weights}) or model.weights=random"
        ) from None


def load_weights(network: nn.Module, arch: str, path: str) -> None:
    """Read the weights in a file into the network.

    Raises:
        ConfigError: they do not fit.
    """
    from open_clip.factory import load_checkpoint

    try:
        with quiet():
            load_checkpoint(network, path, strict=True, weights_only=True)
    except Exception as error:  # Formats are open_clip's business; each fails in its own way.
        raise ConfigError(
            f"model.weights={path}: not weights of {arch} ({first_line(error)}); files are read "
            "as safetensors or as a plain state dict"
        ) from None


def first_line(error: BaseException) -> str:
    """What an error says, short enough for one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= 160 else text[:157] + "…"


@contextmanager
def quiet() -> Iterator[None]:
    """Keep open_clip from talking on the root logger, e.g. of missing weights that are intended."""
    root, nowhere, before = logging.getLogger(), logging.NullHandler(), logging.root.manager.disable
    root.addHandler(nowhere)  # Without a handler, logging.warning would install one for good.
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)
        root.removeHandler(nowhere)
