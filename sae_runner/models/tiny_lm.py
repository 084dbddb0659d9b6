"""A small language model that trains here, on the run's own text: no download, minutes on a CPU."""

import json
import logging
from pathlib import Path
from typing import Annotated, Any

import torch

from sae_runner.config import NonNegative, Positive, PositiveFloat, Range, fingerprint
from sae_runner.data._packed import split_key
from sae_runner.data.base import Dataset
from sae_runner.errors import ConfigError
from sae_runner.files import atomic, locked
from sae_runner.models import MODELS
from sae_runner.models._artefact import TRAINING
from sae_runner.models._precision import DTYPES, Precision
from sae_runner.models._pretrained import from_config, load
from sae_runner.models._tiny_training import Recipe, make
from sae_runner.models.transformer_lens import TextHost

log = logging.getLogger("sae_runner")

RECIPE_VERSION = 1
"""Raised when the same options come to mean other weights."""

BytesAtLeast = Annotated[int, Range(ge=257)]
"""Every byte and one special token."""


@MODELS.register("tiny_lm")
class TinyLM(TextHost):
    """A GPT-2 of a few layers with a byte-level tokenizer, trained on the training documents.

    Training happens once: `<outputs>/models/tiny_lm-<fingerprint>/` holds a Hugging Face folder and
    `training.json`, with the loss on held-out documents beside that of the unigram frequencies.
    Sites are those of `TextHost`.

    Args:
        device: where it trains and runs.
        meta: True for shapes only: nothing is trained or read.
        outputs: folder under which the model and packed text are kept.
        dataset: text to train on; its held-out split is only measured.
        weights: folder of a model trained before; None to train here, or to take what did.
        vocab_size: tokens, of which 257 are the bytes and the end of a text.
        n_layers: blocks.
        d_model: width of the residual stream.
        n_heads: attention heads of a block.
        context: tokens of an example.
        prepend_bos: whether every example begins with the end-of-text token.
        n_steps: optimizer steps.
        rows_per_step: examples of `context` tokens in a step.
        learning_rate: its peak.
        seed: initialises the weights and shuffles the rows.
        precision: of weights and activations once it is trained; training is in float32.
    """

    def __init__(
        self,
        device: torch.device,
        meta: bool,
        outputs: Path,
        dataset: Dataset | None,
        *,
        weights: str | None,
        vocab_size: BytesAtLeast,
        n_layers: Positive,
        d_model: Positive,
        n_heads: Positive,
        context: Positive,
        prepend_bos: bool,
        n_steps: Positive,
        rows_per_step: Positive,
        learning_rate: PositiveFloat,
        seed: NonNegative,
        precision: Precision,
    ) -> None:
        super().__init__()
        if d_model % n_heads:
            raise ConfigError(f"model.n_heads={n_heads} does not divide model.d_model={d_model}")
        if context < 2:
            raise ConfigError(f"model.context={context}: nothing to predict; take at least 2")
        recipe = Recipe(
            vocab_size, n_layers, d_model, n_heads, context, prepend_bos, n_steps, rows_per_step,
            learning_rate, seed,
        )  # fmt: skip
        dtype = DTYPES[precision]
        self.revision, self.precision = None, precision
        if meta and weights is None:
            self.weights = "tiny_lm"
            loaded = from_config(recipe.config(), self.weights, None, dtype, meta=True)
        else:
            self.weights = weights or str(_trained(recipe, dataset, Path(outputs), device))
            loaded = load(self.weights, None, dtype, meta=meta)
        self._set_up(loaded, device, outputs, context, prepend_bos)

    def describe(self) -> dict[str, Any]:
        """See `Model.describe`; `training` holds what its making measured."""
        path = Path(self.loaded.source) / "training.json"
        training = json.loads(path.read_text()) if path.is_file() else None
        weights = Path(self.weights).name
        return super().describe() | {"type": "tiny_lm", "weights": weights, "training": training}


def _trained(recipe: Recipe, dataset: Dataset | None, outputs: Path, device: torch.device) -> Path:
    """The folder of the model that `recipe` makes of `dataset`, made now if it is not there."""
    if dataset is None or dataset.modality != "text":
        holds = "no dataset" if dataset is None else f"dataset={dataset.name} of {dataset.modality}"
        raise ConfigError(f"model.type=tiny_lm trains on text, and was given {holds}")
    key = fingerprint([RECIPE_VERSION, vars(recipe), split_key(dataset)])
    folder = outputs / "models" / f"tiny_lm-{key}"
    with locked(folder):
        if not (folder / "training.json").is_file():
            log.info("training a language model on %s, once, into %s", dataset.name, folder)
            device, kept = torch.device(device), folder / TRAINING
            with atomic(folder) as temporary:
                make(recipe, dataset, temporary, outputs / "data", device, kept)
            report = json.loads((folder / "training.json").read_text())
            log.info(
                "tiny_lm: held-out loss %.3f, of the unigram frequencies %.3f nats per token",
                report["heldout_loss"], report["unigram_loss"],
            )  # fmt: skip
    return folder
