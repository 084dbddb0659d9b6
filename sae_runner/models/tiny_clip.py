"""A small CLIP that is trained here, on the training images of the dataset it is used with."""

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sae_runner.config import (
    Fraction,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
)
from sae_runner.data.base import Dataset, Split
from sae_runner.errors import ConfigError
from sae_runner.models import MODELS
from sae_runner.models._artefact import (
    Artefact,
    assign,
    chunks_of,
    identity_of,
    load,
    seeded,
    trained,
)
from sae_runner.models._contrastive import Recipe, WordTokenizer, train
from sae_runner.models._image_pairs import pairs_of, to_normal
from sae_runner.models._open_clip_weights import quiet
from sae_runner.models._text import check_templates, spoken
from sae_runner.models.base import HookedModel
from sae_runner.models.open_clip import OpenCLIP

_VERSION = 2  # Part of the fingerprint: raise it when a change alters the trained weights.
_PREPROCESS = {
    "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5),
    "interpolation": "bicubic", "resize_mode": "shortest",
}  # fmt: skip

log = logging.getLogger("sae_runner")


@MODELS.register("tiny_clip")
class TinyCLIP(OpenCLIP):
    """A CLIP of open_clip's own parts with the sites of its ViT, and words as tokens.

    It is trained once, on images of the training split only, and kept in
    `OUTPUTS/models/tiny_clip-DATASET-FINGERPRINT/`.

    Args:
        device: where the network lives.
        dataset: images with labels or captions.
        outputs: folder that holds `models/`.
        meta: build it without weights, to learn shapes from.
        weights: None to train or to reuse what was trained; else such a folder, whose shape then
            counts instead of these options.
        image_size: images are resized to this many pixels in each direction.
        patch_size: pixels of a patch in each direction.
        width: of the image tower's residual stream.
        layers: blocks of the image tower.
        heads: of each of its blocks.
        embed_dim: width of the shared embedding.
        text_width: of the text tower's residual stream.
        text_layers: blocks of the text tower.
        text_heads: of each of its blocks.
        context_length: words of a text that are read, the end included.
        max_words: size of the vocabulary, at most.
        templates: sentences that stand for a label, with `{}` for its name.
        max_images: train on at most so many, a seeded sample.
        epochs: passes over the images.
        train_batch: images of a step.
        learning_rate: its highest (AdamW).
        weight_decay: of matrices.
        warmup: share of the steps over which the learning rate rises.
        shift: images move by at most so many pixels.
        flip: half of the images are mirrored.
        seed: of weights, order and augmentation.

    Raises:
        ConfigError: the dataset has neither labels nor captions, or the folder holds no tiny_clip.
    """

    def __init__(
        self,
        device: str | torch.device,
        dataset: Dataset | None,
        outputs: str | Path,
        meta: bool = False,
        *,
        weights: str | None,
        image_size: Positive,
        patch_size: Positive,
        width: Positive,
        layers: Positive,
        heads: Positive,
        embed_dim: Positive,
        text_width: Positive,
        text_layers: Positive,
        text_heads: Positive,
        context_length: Positive,
        max_words: Positive,
        templates: list[str],
        max_images: Positive,
        epochs: Positive,
        train_batch: Positive,
        learning_rate: PositiveFloat,
        weight_decay: NonNegativeFloat,
        warmup: Fraction,
        shift: NonNegative,
        flip: bool,
        seed: NonNegative,
    ) -> None:
        HookedModel.__init__(self)
        self.arch, self.precision, self.quick_gelu = "tiny_clip", "fp32", False
        self.templates = tuple(templates)
        shape = {
            "embed_dim": embed_dim,
            "vision_cfg": {
                "image_size": image_size, "patch_size": patch_size, "width": width,
                "layers": layers, "head_width": width // heads,
            },
            "text_cfg": {
                "context_length": context_length, "width": text_width, "layers": text_layers,
                "heads": text_heads,
            },
        }  # fmt: skip
        check_templates(templates, "model.templates")
        check_shape(image_size, patch_size, (width, heads), (text_width, text_heads))
        recipe = Recipe(
            epochs, train_batch, learning_rate, weight_decay, warmup, shift, flip, seed
        )  # fmt: skip
        if meta:
            shape = shape if weights is None else facts_of(load(weights), weights)["architecture"]
            self.weights, self.facts = "meta", {"architecture": shape}
            self.adopt(new_network(shape, 2, 0, "meta"), "meta", "fp32")
            return
        self.device = torch.device(device)
        if weights is not None:
            found = load(weights)
        else:
            dataset = images_of(dataset)
            words: dict[str, Any] = {
                "max_words": max_words,
                "templates": templates,
                "max_images": max_images,
            }
            identity = {
                "version": _VERSION, "architecture": shape, "recipe": vars(recipe) | words,
                "data": identity_of(dataset),
            }  # fmt: skip
            found = trained(
                Path(outputs),
                f"tiny_clip-{dataset.name}",
                identity,
                lambda kept: self._train(dataset, shape, recipe, kept, **words),
            )
        self._take(found, weights, dataset)

    def tokenizer(self) -> Callable[[list[str]], Tensor]:
        """Words of the training captions."""
        return self.words

    def describe(self) -> dict[str, Any]:
        """See `Model.describe`; with the zero-shot accuracy on held-out images."""
        import open_clip

        return {
            "type": "tiny_clip",
            "weights": self.weights,
            "preprocessing": json.loads(self.transform_name()),
            "open_clip": open_clip.__version__,
            **{k: self.facts.get(k) for k in ("architecture", "data", "zero_shot", "sha256")},
        }

    def zero_shot_accuracy(
        self, dataset: Dataset, split: Split, templates: Sequence[str]
    ) -> dict[str, Any]:
        """Share of the images of a split whose class has the most similar text.

        A class's text is the mean over templates of unit embeddings.
        """
        names = [spoken(name) for name in dataset.label_names or ()]
        with torch.no_grad():
            classes = self.class_embeddings(names, templates)
            right = n_seen = 0
            for examples in chunks_of(dataset, dataset.ids(split)):
                inputs = self.prepare([e for e in examples if e.label is not None])
                if inputs.labels is None or not len(inputs):
                    continue
                scores = self.forward(inputs) @ classes.T  # The images' norms change no order.
                right += int((scores.argmax(1).cpu() == inputs.labels).sum())
                n_seen += len(inputs)
        return {"accuracy": right / n_seen if n_seen else None, "n": n_seen, "split": split}

    def _train(
        self,
        dataset: Dataset,
        shape: dict[str, Any],
        recipe: Recipe,
        kept: Path,
        *,
        max_words: int,
        templates: list[str],
        max_images: int,
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Train, and measure on held-out images: weights and what is to be known of them."""
        # The transform comes with a network; the vocabulary is not known before the images.
        device = self.device
        self.adopt(new_network(shape, 2, 0, "meta"), "meta", "fp32")
        pairs = pairs_of(dataset, self.prepare, templates, max_images, recipe.seed)
        texts = [text for options in pairs.texts for text in options]
        context = shape["text_cfg"]["context_length"]
        self.words = WordTokenizer.from_texts(texts, context, max_words)
        log.info("tiny_clip: training on %s images of %s", f"{len(pairs):,}", dataset.name)
        network = new_network(shape, self.words.vocab_size, recipe.seed, "cpu").to(device)
        loss = train(network, self.words, pairs, to_normal, recipe, device, kept)
        self.adopt(network, device, "fp32")
        zero_shot = None
        if dataset.label_names:
            zero_shot = self.zero_shot_accuracy(dataset, "heldout", templates)
            right = "unknown" if zero_shot["n"] == 0 else f"{100 * zero_shot['accuracy']:.1f}%"
            log.info(
                "tiny_clip: zero-shot accuracy %s on %d held-out images", right, zero_shot["n"]
            )
        facts = {
            "type": "tiny_clip",
            "architecture": shape,
            "words": self.words.words,
            "data": identity_of(dataset) | {"name": dataset.name, "n_images": len(pairs)},
            "last_epoch_loss": loss,
            "zero_shot": zero_shot,
        }
        return network.state_dict(), facts

    def _take(self, found: Artefact, where: str | None, dataset: Dataset | None) -> None:
        """Become the network that was found."""
        self.facts = facts_of(found, where)
        self.weights = Path(found.facts["path"]).name
        shape = self.facts["architecture"]
        self.words = WordTokenizer(self.facts["words"], shape["text_cfg"]["context_length"])
        network = new_network(shape, self.words.vocab_size, 0, "cpu")
        assign(network, found.tensors, f"model.weights={where}")
        self.adopt(network, self.device, "fp32")
        if dataset is None:
            return
        own, here = self.facts["data"], identity_of(dataset)
        if any(own[key] != here[key] for key in here):
            log.warning(
                "model.weights=%s was trained on other data (%s) or another split than this "
                "dataset's: its held-out images may have been trained on", where, own["name"],
            )  # fmt: skip


def check_shape(
    image_size: int, patch_size: int, image: tuple[int, int], text: tuple[int, int]
) -> None:
    """Refuse patches that do not tile an image, and heads that do not divide a width."""
    if image_size % patch_size:
        raise ConfigError(
            f"model.patch_size={patch_size}: does not divide model.image_size={image_size}"
        )
    for key, (width, heads) in (("", image), ("text_", text)):
        if width % heads:
            raise ConfigError(f"model.{key}heads={heads}: does not divide model.{key}width={width}")


def images_of(dataset: Dataset | None) -> Dataset:
    """The dataset, which must hold images."""
    if dataset is None:
        raise ConfigError("model.type=tiny_clip needs a dataset to train on")
    if dataset.modality != "image":
        raise ConfigError(
            f"model.type=tiny_clip reads images, but dataset {dataset.name!r} has "
            f"{dataset.modality}: use dataset=digits or another model"
        )
    return dataset


def new_network(shape: dict[str, Any], vocab_size: int, seed: int, device: str) -> nn.Module:
    """An untrained CLIP of `shape`."""
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg, set_model_preprocess_cfg

    with seeded(seed), quiet(), torch.device(device):
        network: nn.Module = CLIP(
            shape["embed_dim"],
            CLIPVisionCfg(**shape["vision_cfg"]),
            CLIPTextCfg(**shape["text_cfg"], vocab_size=vocab_size),
        )
    size = shape["vision_cfg"]["image_size"]
    set_model_preprocess_cfg(network, _PREPROCESS | {"size": (size, size), "fill_color": 0})
    return network


def facts_of(found: Artefact, where: str | None) -> dict[str, Any]:
    """What is known of trained weights.

    Raises:
        ConfigError: they are those of something else.
    """
    if found.facts.get("type") != "tiny_clip":
        raise ConfigError(
            f"model.weights={where}: not the folder of a tiny_clip; use null to train one"
        )
    return found.facts
