"""Any module in PyTorch, built by a registered constructor and, if need be, trained here."""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor, nn

from sae_runner.config import (
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Range,
    construct,
)
from sae_runner.data.base import Dataset, Example
from sae_runner.errors import ConfigError
from sae_runner.models import MODELS
from sae_runner.models._artefact import Artefact, assign, identity_of, load, seeded, trained
from sae_runner.models._classifier_training import Labelled, Recipe, accuracy, train
from sae_runner.models._constructors import CONSTRUCTORS, construct_network, constructor
from sae_runner.models.base import HookedModel, Inputs, Tap, labels_of, weights_hash

__all__ = ["CONSTRUCTORS", "TorchModule", "constructor"]

_VERSION = 2  # Part of the fingerprint: raise it when a change alters the trained weights.

log = logging.getLogger("sae_runner")


@MODELS.register("torch_module")
class TorchModule(HookedModel):
    """A network on images; its output is what the module returns, class logits [n, c].

    Args:
        device: where the network lives.
        dataset: what it is trained on where `weights` is None; tells the number of classes.
        outputs: folder that holds `models/`.
        meta: build it without weights, to learn shapes from.
        constructor: name of a registered constructor.
        options: the constructor's own.
        n_classes: None for as many as the dataset has.
        weights: None to train here, or to reuse what was trained; a folder or .safetensors file;
            or `random`.
        image_size: images are resized to this many pixels in each direction.
        channels: 1 for grey, 3 for RGB.
        mean: subtracted from each channel, in units of white.
        std: divides each channel then.
        taps: site name to `module`, `side` (output, input) and `layout` (NLD, NCHW, NHWC, ND …).
            `{i}` in both names stands for every number that the network has there.
        epochs: passes over the training images.
        train_batch: images of a step.
        learning_rate: the highest (AdamW, cosine to zero).
        weight_decay: of all weights.
        seed: of first weights and order.

    Raises:
        ConfigError: no such constructor, option or module; nothing to train on; weights that do not
            fit.
    """

    modality = "image"
    output = "class_logits"

    def __init__(
        self,
        device: str | torch.device,
        dataset: Dataset | None,
        outputs: str | Path,
        meta: bool = False,
        *,
        constructor: str,
        options: dict[str, Any],
        n_classes: Positive | None,
        weights: str | None,
        image_size: Positive,
        channels: Literal[1, 3],
        mean: list[float],
        std: Annotated[list[float], Range(gt=0)],
        taps: dict[str, Any],
        epochs: Positive,
        train_batch: Positive,
        learning_rate: PositiveFloat,
        weight_decay: NonNegativeFloat,
        seed: NonNegative,
    ) -> None:
        super().__init__()
        self.device = torch.device("meta" if meta else device)
        self.name, self.image_size, self.channels = constructor, image_size, channels
        for key, values in (("mean", mean), ("std", std)):
            if len(values) != channels:
                raise ConfigError(f"model.{key}={values}: model.channels={channels} are needed")
        self.mean, self.std = (torch.tensor(v).view(-1, 1, 1) for v in (mean, std))
        found = None if weights in (None, "random") else load(str(weights))
        self.n_classes = n_classes or classes_of(dataset, found)
        check_classes(self.n_classes, dataset, found)
        self.built_from: dict[str, Any] = {
            "constructor": constructor, "options": options, "n_classes": self.n_classes,
            "image_size": image_size, "channels": channels, "mean": mean, "std": std,
        }  # fmt: skip
        self.network = self._new(seed)
        self._found_taps = expand_taps(taps, self.modules())
        self.weights = weights or "trained here"
        self.facts: dict[str, Any] = {}
        recipe = Recipe(epochs, train_batch, learning_rate, weight_decay, seed)
        if weights is None and not meta:
            found = self._trained(dataset, Path(outputs), recipe)
        if found is not None:
            self._take(found, f"model.weights={weights}", dataset)
        elif not meta:
            log.warning("model.weights=random: %s is untrained (seed %d)", constructor, seed)
        self.network.to(self.device).eval()
        self._hashed: tuple[int, str] | None = None

    def _new(self, seed: int) -> nn.Module:
        """The untrained network, on the CPU, or without numbers on the meta device."""
        built = self.built_from
        bare = torch.device("meta" if self.device.type == "meta" else "cpu")
        with seeded(seed), bare:
            return construct_network(
                built["constructor"],
                built["options"],
                **{key: built[key] for key in ("channels", "image_size", "n_classes")},
            )

    def _trained(self, dataset: Dataset | None, outputs: Path, recipe: Recipe) -> Artefact:
        """The weights that training on this dataset gives, from disk if they are there."""
        if dataset is None:
            raise ConfigError("model.weights=null: a dataset is needed to train on")
        data = identity_of(dataset)
        identity = {
            "version": _VERSION, "network": self.built_from, "recipe": vars(recipe), "data": data,
        }  # fmt: skip

        def make(kept: Path) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
            train_set = Labelled.of(dataset, "train", self.to_bytes)
            network = self._new(recipe.seed).to(self.device)
            log.info("%s: training on %s images", self.name, f"{len(train_set.labels):,}")
            loss = train(network, train_set, self.normalise, recipe, self.device, kept)
            heldout_set = Labelled.of(dataset, "heldout", self.to_bytes)
            measured = {
                "heldout": accuracy(network, heldout_set, self.normalise, self.device),
                "train": accuracy(network, train_set, self.normalise, self.device),
                "last_epoch_loss": loss,
            }
            log.info("%s: accuracy on held-out images %s", self.name, measured["heldout"])
            facts = {"type": "torch_module", "dataset": dataset.name, "torch": torch.__version__}
            return network.state_dict(), facts | measured

        return trained(outputs, f"{self.name}-{dataset.name}", identity, make)

    def _take(self, found: Artefact, where: str, dataset: Dataset | None) -> None:
        """Copy the weights in; say so when another dataset's examples may be among their own."""
        self.facts = found.facts
        if self.device.type != "meta":
            assign(self.network, found.tensors, where)
        data = found.facts.get("identity", {}).get("data")
        if data and dataset is not None and data != identity_of(dataset):
            log.warning(
                "%s was trained on other data (%s) or another split than this dataset's: its "
                "held-out images may have been trained on", where, found.facts.get("dataset"),
            )  # fmt: skip

    def forward(self, inputs: Inputs) -> Tensor:
        """What the module returns."""
        output: Tensor = self.network(inputs.tensors["pixels"].to(self.device, non_blocking=True))
        return output

    def taps(self) -> dict[str, Tap]:
        """As configured."""
        return self._found_taps

    def probe(self, n: int) -> Inputs:
        """Black images."""
        shape = (n, self.channels, self.image_size, self.image_size)
        return Inputs(torch.arange(n), {"pixels": torch.zeros(shape, device=self.device)})

    def prepare(self, examples: Sequence[Example]) -> Inputs:
        """Convert to grey or RGB, resize without cropping, normalise."""
        pixels = self.normalise(self.to_bytes(examples))
        ids = torch.tensor([e.id for e in examples], dtype=torch.int64)
        return Inputs(ids, {"pixels": pixels}, labels=labels_of(examples))

    def to_bytes(self, examples: Sequence[Example]) -> UInt8[Tensor, "n c h w"]:
        """Resized images before normalisation."""
        mode, size = "L" if self.channels == 1 else "RGB", (self.image_size, self.image_size)
        images = []
        for example in examples:
            image = example.value.convert(mode)
            images.append(np.array(image if image.size == size else
                                   image.resize(size, Image.Resampling.BILINEAR)))  # fmt: skip
        stacked = torch.from_numpy(np.stack(images))
        return stacked.unsqueeze(1) if self.channels == 1 else stacked.permute(0, 3, 1, 2)

    def normalise(self, pixels: UInt8[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """`(pixels / 255 − mean) / std`."""
        mean, std = self.mean.to(pixels.device), self.std.to(pixels.device)
        return (pixels.float() / 255 - mean) / std

    def fingerprint(self) -> str:
        """See `Model.fingerprint`; computed again only when a weight has changed."""
        version = sum(tensor._version for tensor in self.network.state_dict().values())
        if self._hashed is None or self._hashed[0] != version:
            built = json.dumps(self.built_from, sort_keys=True)
            self._hashed = (version, weights_hash(self.network, built))
        return self._hashed[1]

    def describe(self) -> dict[str, Any]:
        """See `Model.describe`; with the accuracy on held-out images where it was trained here."""
        measured = ("heldout", "train", "last_epoch_loss", "dataset", "sha256")
        return {
            "type": "torch_module",
            "weights": self.weights,
            **self.built_from,
            **{key: self.facts[key] for key in measured if key in self.facts},
        }


def classes_of(dataset: Dataset | None, found: Artefact | None) -> int:
    """How many classes: what the weights were trained for, else what the dataset has.

    Raises:
        ConfigError: neither says.
    """
    if found and (known := found.facts.get("identity", {}).get("network", {}).get("n_classes")):
        return int(known)
    if dataset is None:
        raise ConfigError("model.n_classes=null: no dataset tells how many; give a number")
    if not dataset.label_names:
        raise ConfigError(
            f"model.n_classes=null: dataset {dataset.name!r} has no classes; give a number"
        )
    return len(dataset.label_names)


def check_classes(n_classes: int, dataset: Dataset | None, found: Artefact | None) -> None:
    """Refuse a number of classes that the weights or the labels do not go with.

    Raises:
        ConfigError: the weights are for another number, or there are labels beyond it.
    """
    identity = {} if found is None else found.facts.get("identity", {})
    known = identity.get("network", {}).get("n_classes", n_classes)
    if known != n_classes:
        raise ConfigError(f"model.n_classes={n_classes}: these weights are for {known}")
    if dataset is None or found is not None:
        return
    if (n_labels := len(dataset.label_names or ())) > n_classes:
        raise ConfigError(
            f"model.n_classes={n_classes}: dataset {dataset.name!r} has {n_labels}; "
            f"set it to {n_labels}, or to null"
        )


def make_tap(
    *,
    module: str,
    side: Literal["output", "input"],
    layout: Literal["NLD", "LND", "NCHW", "NHWC", "ND"],
) -> Tap:
    """One entry of `model.taps`."""
    return Tap(module, side, layout=layout)


def expand_taps(taps: Mapping[str, Any], modules: Mapping[str, nn.Module]) -> dict[str, Tap]:
    """Site name to tap, with `{i}` replaced by each number that occurs in a module's name.

    Raises:
        ConfigError: an entry is incomplete, or matches no module.
    """
    found: dict[str, Tap] = {}
    for name, options in taps.items():
        tap: Tap = construct(make_tap, options, where=f"model.taps.{name}")
        if "{i}" not in name:
            found[name] = tap
            continue
        pattern = re.escape(tap.module).replace(r"\{i\}", r"(\d+)")
        numbers = [m[1] for m in (re.fullmatch(pattern, module) for module in modules) if m]
        if not numbers:
            raise ConfigError(f"model.taps.{name}.module={tap.module}: the network has none such")
        for i in sorted(numbers, key=int):
            tap_i = Tap(tap.module.replace("{i}", i), tap.side, layout=tap.layout)
            found[name.replace("{i}", i)] = tap_i
    if not found:
        raise ConfigError("model.taps is empty: at least one site is needed")
    return found
