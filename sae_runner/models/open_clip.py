"""CLIP-like models of the open_clip library; the sites are in the image tower."""

import json
import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sae_runner.config import NonNegative
from sae_runner.data.base import Example
from sae_runner.errors import ConfigError
from sae_runner.models import MODELS
from sae_runner.models._open_clip_sites import find_sites
from sae_runner.models._open_clip_weights import (
    build_network,
    find_weights,
    first_line,
    load_weights,
    trained_with,
)
from sae_runner.models._precision import Precision
from sae_runner.models._text import TextTower
from sae_runner.models.base import HookedModel, Inputs, Tap, labels_of, weights_hash

log = logging.getLogger("sae_runner")


@MODELS.register("open_clip")
class OpenCLIP(HookedModel, TextTower):
    """A CLIP model; its output is the image embedding [n, d], not normalised.

    Sites of its own ViT: `blocks.{i}.resid_pre | attn_q | attn_k | attn_v | attn_z | attn_out |
    resid_mid | mlp_act | mlp_out | resid_post` (one head: `attn_z.3`), `final_norm` (the last layer
    norm, of all tokens unless it comes after the pool), `pooled` (after it, before the projection)
    and `embed`. Convolutional towers have `stages.{s}` and `stages.{s}.blocks.{b}`.

    Args:
        device: where the network lives.
        meta: build it without weights, to learn shapes from.
        arch: open_clip's name of the architecture, e.g. `ViT-L-14`.
        weights: a pretrained tag, a local file, or `random`.
        tag: for a local file or random weights, the pretrained tag that decides preprocessing and
            activation function.
        quick_gelu: `auto` is what the weights were trained with.
        precision: of weights and computation; layer norms stay in fp32.
        seed: of random weights.

    Raises:
        ConfigError: unknown architecture or tag; weights that are absent, do not fit, or were
            trained with another activation function than `quick_gelu` says.
    """

    modality = "image"

    def __init__(
        self,
        device: str | torch.device,
        meta: bool = False,
        *,
        arch: str,
        weights: str,
        tag: str | None,
        quick_gelu: bool | Literal["auto"],
        precision: Precision,
        seed: NonNegative,
    ) -> None:
        super().__init__()
        facts = trained_with(arch, weights, tag, announce=not meta)
        if quick_gelu != "auto" and facts.get("certain") and quick_gelu != facts["quick_gelu"]:
            raise ConfigError(
                f"model.quick_gelu={str(quick_gelu).lower()}: these weights of {arch} were trained "
                f"with quick_gelu={str(facts['quick_gelu']).lower()}; use auto"
            )
        self.quick_gelu = bool(facts["quick_gelu"] if quick_gelu == "auto" else quick_gelu)
        self.arch, self.weights, self.precision = arch, weights, precision
        # Before the network is built: what is absent should be said at once.
        path = None if meta or weights == "random" else find_weights(arch, weights)
        network = build_network(
            arch, self.quick_gelu, facts["preprocess"], precision, "meta" if meta else "cpu", seed
        )
        if path is not None:
            load_weights(network, arch, path)
        elif not meta:
            log.warning("model.weights=random: %s is untrained (seed %d)", arch, seed)
        self.adopt(network, "meta" if meta else device, precision)

    def adopt(self, network: nn.Module, device: str | torch.device, precision: Precision) -> None:
        """Take a built CLIP as the network: its transform, its sites."""
        from open_clip.model import get_input_dtype
        from open_clip.transform import PreprocessCfg, image_transform_v2

        self.device = torch.device(device)
        self.network = network.to(self.device).eval()
        self.pixel_dtype: torch.dtype | None = get_input_dtype(precision)
        visual: Any = network.visual
        self.transform: Callable[[Any], Tensor] = image_transform_v2(
            PreprocessCfg(**visual.preprocess_cfg), is_train=False
        )
        tower = find_sites(visual)
        self._found_taps = tower.taps
        self.block_paths = tower.block_paths
        self.n_prefix, self.has_cls, self.grid = tower.n_prefix, tower.has_cls, tower.grid
        self._hashed: tuple[int, str] | None = None
        self._tokenize: Callable[[list[str]], Tensor] | None = None

    def forward(self, inputs: Inputs) -> Float[Tensor, "n d"]:
        """Image embeddings [n, d], not normalised."""
        network: Any = self.network
        pixels = inputs.tensors["pixels"].to(self.device, self.pixel_dtype, non_blocking=True)
        embeddings: Tensor = network.encode_image(pixels, normalize=False)
        return embeddings

    def taps(self) -> dict[str, Tap]:
        """See the class."""
        return self._found_taps

    def probe(self, n: int) -> Inputs:
        """Black images."""
        network: Any = self.network
        size = network.visual.preprocess_cfg["size"]
        height, width = (size, size) if isinstance(size, int) else size
        pixels = torch.zeros(n, 3, height, width, device=self.device)
        return Inputs(torch.arange(n), {"pixels": pixels})

    def prepare(self, examples: Sequence[Example]) -> Inputs:
        """Resize, crop and normalise as the weights were evaluated; no randomness."""
        pixels = torch.stack([self.transform(e.value.convert("RGB")) for e in examples])
        ids = torch.tensor([e.id for e in examples], dtype=torch.int64)
        return Inputs(ids, {"pixels": pixels}, labels=labels_of(examples))

    def encode_text(self, texts: list[str]) -> Float[Tensor, "n d"]:
        """Text embeddings, not normalised.

        Raises:
            ConfigError: the architecture's tokenizer is not here and cannot be downloaded.
        """
        if self._tokenize is None:
            self._tokenize = self.tokenizer()
        network: Any = self.network
        tokens = self._tokenize(texts).to(self.device)
        embeddings: Tensor = network.encode_text(tokens, normalize=False)
        return embeddings

    def tokenizer(self) -> Callable[[list[str]], Tensor]:
        """What turns texts into tokens [n, context_length] for the text tower."""
        import open_clip

        try:
            tokenize: Callable[[list[str]], Tensor] = open_clip.get_tokenizer(self.arch)
        except Exception as error:  # What a hub client raises is not for us to list.
            raise ConfigError(
                f"model.arch={self.arch}: its tokenizer is not here and cannot be downloaded "
                f"({first_line(error)}); without it there is no zero-shot classification"
            ) from None
        return tokenize

    @property
    def logit_scale(self) -> float:
        """Factor on cosine similarities (already exponentiated)."""
        network: Any = self.network
        return float(network.logit_scale.detach().exp())

    @property
    def logit_bias(self) -> float:
        """Term added to scaled similarities; 0 for models that have none."""
        network: Any = self.network
        bias = getattr(network, "logit_bias", None)
        return 0.0 if bias is None else float(bias.detach())

    def fingerprint(self) -> str:
        """See `Model.fingerprint`; computed again only when a weight has changed."""
        version = sum(tensor._version for tensor in self.network.state_dict().values())
        if self._hashed is None or self._hashed[0] != version:
            facts = (self.transform_name(), str(self.pixel_dtype), self.quick_gelu)
            self._hashed = (version, weights_hash(self.network, *facts))
        return self._hashed[1]

    def transform_name(self) -> str:
        """Preprocessing in words, the same for equal preprocessing."""
        visual: Any = self.network.visual
        return json.dumps(visual.preprocess_cfg, sort_keys=True)

    def describe(self) -> dict[str, Any]:
        """See `Model.describe`."""
        import open_clip

        return {
            "type": "open_clip",
            "arch": self.arch,
            "weights": self.weights,
            "preprocessing": json.loads(self.transform_name()),
            "quick_gelu": self.quick_gelu,
            "precision": self.precision,
            "open_clip": open_clip.__version__,
        }
