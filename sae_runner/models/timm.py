"""Image classifiers and backbones of the timm library."""

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sae_runner.config import NonNegative, Positive
from sae_runner.data.base import Example
from sae_runner.errors import ConfigError, did_you_mean
from sae_runner.models import MODELS
from sae_runner.models._artefact import assign, load, seeded
from sae_runner.models._precision import DTYPES, Precision
from sae_runner.models._timm_sites import find_sites
from sae_runner.models.base import HookedModel, Inputs, Tap, labels_of, weights_hash

log = logging.getLogger("sae_runner")


@MODELS.register("timm")
class Timm(HookedModel):
    """A model of timm; its output is class logits, or the pooled features of one without classes.

    Transformers have `blocks.{i}.resid_pre | attn_q | attn_k | attn_v | attn_z | attn_out |
    resid_mid | mlp_act | mlp_out | resid_post` (one head: `attn_z.3`) and `final_norm` (of all
    tokens, or of the pooled vector where it comes after the pool); ConvNeXts have `stages.{s}`,
    `stages.{s}.blocks.{b}` and `….mlp_act`; others the features that timm names. All have `pooled`
    and `logits`, or `embed` when there are no classes.

    Args:
        device: where the network lives.
        meta: build it without weights, to learn shapes from.
        arch: timm's name, with or without a pretrained tag: `convnextv2_atto.fcmae_ft_in1k`.
        weights: `pretrained`, `random`, a .safetensors file, or the folder of an artefact.
        image_size: side of the input in pixels; None for the size of the tag.
        precision: of weights and computation.
        seed: of random weights.

    Raises:
        ConfigError: unknown architecture or tag, weights that are absent or do not fit.
    """

    modality = "image"

    def __init__(
        self,
        device: str | torch.device,
        meta: bool = False,
        *,
        arch: str,
        weights: str,
        image_size: Positive | None,
        precision: Precision,
        seed: NonNegative,
    ) -> None:
        import timm
        from timm.data import create_transform, resolve_data_config

        super().__init__()
        check_arch(arch)
        self.arch, self.weights, self.precision = arch, weights, precision
        if weights == "random" and not meta:
            log.warning("model.weights=random: %s is untrained (seed %d)", arch, seed)
        network: Any = build(arch, "random" if meta else weights, image_size, seed, meta)
        self.preprocessing = resolve_data_config(
            {"img_size": image_size} if image_size else {}, model=network
        )
        self.transform: Callable[[Any], Tensor] = create_transform(
            **self.preprocessing, is_training=False
        )
        self.device = torch.device("meta" if meta else device)
        self.dtype = DTYPES[precision]
        self.network: nn.Module = network.to(self.device, self.dtype).eval()
        self.version = timm.__version__
        trunk = find_sites(network, self.probe(1).tensors["pixels"].to(self.dtype))
        self._found_taps, self.block_paths = trunk.taps, trunk.block_paths
        self.output = "class_logits" if network.num_classes else "features"
        self.n_prefix, self.has_cls, self.grid = trunk.n_prefix, trunk.has_cls, trunk.grid
        self._hashed: tuple[int, str] | None = None

    def forward(self, inputs: Inputs) -> Float[Tensor, "n c"]:
        """Class logits, or pooled features of a model without classes."""
        pixels = inputs.tensors["pixels"].to(self.device, self.dtype, non_blocking=True)
        output: Tensor = self.network(pixels)
        return output

    def taps(self) -> dict[str, Tap]:
        """See the class."""
        return self._found_taps

    def probe(self, n: int) -> Inputs:
        """Black images."""
        pixels = torch.zeros(n, *self.preprocessing["input_size"], device=self.device)
        return Inputs(torch.arange(n), {"pixels": pixels})

    def prepare(self, examples: Sequence[Example]) -> Inputs:
        """Resize, crop and normalise as the weights were evaluated; no randomness."""
        channels = self.preprocessing["input_size"][0]
        mode = "L" if channels == 1 else "RGB"
        pixels = torch.stack([self.transform(e.value.convert(mode)) for e in examples])
        ids = torch.tensor([e.id for e in examples], dtype=torch.int64)
        return Inputs(ids, {"pixels": pixels}, labels=labels_of(examples))

    def fingerprint(self) -> str:
        """See `Model.fingerprint`; computed again only when a weight has changed."""
        version = sum(tensor._version for tensor in self.network.state_dict().values())
        if self._hashed is None or self._hashed[0] != version:
            facts = (self.arch, json.dumps(self.preprocessing, sort_keys=True), self.precision)
            self._hashed = (version, weights_hash(self.network, *facts))
        return self._hashed[1]

    def describe(self) -> dict[str, Any]:
        """See `Model.describe`."""
        return {
            "type": "timm",
            "arch": self.arch,
            "weights": self.weights,
            "preprocessing": self.preprocessing,
            "precision": self.precision,
            "timm": self.version,
        }


def check_arch(arch: str) -> None:
    """Refuse a name that timm does not know.

    Raises:
        ConfigError: no such architecture, or no such pretrained tag of it.
    """
    import timm

    name, _, tag = arch.partition(".")
    if not timm.is_model(name):
        near = did_you_mean(name, timm.list_models())
        raise ConfigError(f"model.arch={arch}: timm has no such architecture.{near}")
    tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{name}.*")]
    if tag and tag not in tags:
        near = did_you_mean(tag, tags)
        raise ConfigError(f"model.arch={arch}: {name} has no pretrained tag {tag!r}.{near}")


def build(arch: str, weights: str, image_size: int | None, seed: int, meta: bool) -> nn.Module:
    """The network with its weights, on the CPU (or without any, on the meta device).

    Raises:
        ConfigError: the weights are absent or do not fit; the size cannot be changed.
    """
    import timm

    options: dict[str, Any] = {"device": "meta" if meta else "cpu"}
    config = timm.get_pretrained_cfg(arch)
    if image_size and config is not None and config.fixed_input_size:
        options["img_size"] = image_size
    file = None
    if weights not in ("pretrained", "random"):
        file = Path(weights).expanduser()
        if not file.is_dir():
            load(file)  # Says what is wrong with the path better than timm does.
            options["pretrained_cfg_overlay"] = {"file": str(file), "custom_load": False}
    wanted = weights == "pretrained" or "pretrained_cfg_overlay" in options
    with seeded(seed):
        try:
            network: nn.Module = timm.create_model(arch, pretrained=wanted, **options)
        except Exception as error:  # What a hub client raises is not for us to list.
            raise ConfigError(complaint(arch, weights, image_size, error)) from None
    patch = getattr(getattr(network, "patch_embed", None), "patch_size", (1,))[0]
    if image_size and image_size % patch:
        near = image_size // patch * patch
        raise ConfigError(
            f"model.image_size={image_size}: {arch} reads patches of {patch} × {patch} pixels and "
            f"would ignore the rest; use {near or patch} or {near + patch}"
        )
    if file is not None and file.is_dir():
        assign(network, load(file).tensors, f"model.weights={weights}")
    return network


def complaint(arch: str, weights: str, image_size: int | None, error: Exception) -> str:
    """One line for what kept timm from building a model."""
    reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    if isinstance(error, TypeError | AssertionError) and image_size:
        return f"model.image_size={image_size}: {arch} cannot be built for it: {reason}"
    if weights == "pretrained":
        return (
            f"model.weights=pretrained: the weights of {arch} are not here and cannot be "
            f"downloaded ({reason}); give model.weights=FILE.safetensors, or random"
        )
    return f"model.weights={weights}: does not fit {arch}: {reason}"
