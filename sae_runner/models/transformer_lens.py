"""Transformers for text, encoders and decoders, of every kind that TransformerLens knows."""

from collections.abc import Sequence
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sae_runner.config import Positive
from sae_runner.data._packed import PackedText
from sae_runner.data.base import Dataset, Example
from sae_runner.errors import ConfigError
from sae_runner.models import MODELS
from sae_runner.models._precision import DTYPES, Precision
from sae_runner.models._pretrained import Pretrained, load, load_tokenizer
from sae_runner.models._text import TakesPrompts
from sae_runner.models._tokens import Tokens
from sae_runner.models.base import HookedModel, Inputs, SiteInfo, Tap, weights_hash


class TextHost(HookedModel, TakesPrompts):
    """A Hugging Face transformer whose sites are found by TransformerLens' bridge.

    Weights are used as they are: no folding of layer norms, no centring. Sites of block i:

    - `resid_pre`, `resid_post`: what block i takes and gives;
    - `attn_q`, `attn_k`, `attn_v`: as projected, before rotation and norms; `attn_z`: the heads'
      weighted values, before the output projection; each also per head, `attn_z.3`;
    - `attn_out`, `mlp_out`: what is added to the stream; `mlp_act`: the neurons' outputs;
    - `resid_mid`: the stream between the two, where the block has one: none where attention and
      MLP run side by side (Pythia), nor where a block scales what it adds. In an encoder with norms
      after each half (BERT) it is the normalised sum that the MLP reads and adds to.

    `embed` is the token embedding alone; `final_norm` what the norm after the last block gives, if
    there is one (not in BERT). TransformerLens' names (`blocks.3.hook_resid_post`) are accepted
    too.
    """

    modality = "text"
    weights: str
    revision: str | None
    precision: str

    def _set_up(
        self, loaded: Pretrained, device: torch.device, outputs: Path, context: int, bos: bool
    ) -> None:
        longest = getattr(loaded.config, "max_position_embeddings", None)
        if longest is not None and context > longest:
            raise ConfigError(f"model.context={context}: this model reads at most {longest} tokens")
        self.loaded, self.outputs, self.context, self.prepend_bos = loaded, outputs, context, bos
        first = next(loaded.network.parameters())
        self.device = torch.device("meta") if first.is_meta else torch.device(device)
        self.network: nn.Module = loaded.network.to(self.device)
        self.block_paths = loaded.layout.block_paths
        self.has_cls, self.causal = loaded.encoder, not loaded.encoder
        self.has_trained_head = loaded.has_trained_head
        self.logit_cap = getattr(loaded.config, "final_logit_softcapping", None)
        self.output = "token_logits" if loaded.has_trained_head else "features"
        self._by_name = dict(self.network.named_modules())

    @cached_property
    def tokens(self) -> Tokens:
        """The tokenizer, loaded when it is first needed: shapes can be known without it."""
        return Tokens(
            load_tokenizer(self.loaded.source, self.revision),
            context=self.context,
            prepend_bos=self.prepend_bos,
            encoder=self.loaded.encoder,
        )

    def modules(self) -> dict[str, nn.Module]:
        """See `HookedModel.modules`."""
        return self._by_name

    def forward(self, inputs: Inputs) -> Tensor:
        """Logits [n, t, vocab], or the last hidden states [n, t, d] where no head was trained."""
        options = {} if self.loaded.encoder else {"use_cache": False}
        output = self.network(
            input_ids=inputs.tensors["tokens"],
            attention_mask=inputs.tensors.get("mask"),
            **options,
        )
        found: Tensor = output.logits if self.has_trained_head else output.last_hidden_state
        return found

    def taps(self) -> dict[str, Tap]:
        """See `HookedModel.taps`."""
        return self.loaded.layout.taps

    def probe(self, n: int) -> Inputs:
        """`n` examples of four made-up tokens."""
        tokens = torch.arange(4, device=self.device).expand(n, 4) % self.loaded.config.vocab_size
        tensors = {"tokens": tokens}
        if self.device.type == "meta":
            # A mask in full is taken as it is; to make one, the library would look at values.
            tensors["mask"] = torch.ones(n, 1, 4, 4, dtype=torch.bool, device=self.device)
        return Inputs(torch.arange(n, device=self.device), tensors)

    def site_info(self, name: str, tap: Tap, x: Tensor) -> SiteInfo:
        """See `HookedModel.site_info`; the host's own name is TransformerLens'."""
        hook = self.loaded.layout.hooks[name]
        return SiteInfo(name, hook, x.shape[2], "tokens", None, has_cls=self.has_cls)

    def prepare(self, examples: Sequence[Example]) -> Inputs:
        """See `Model.prepare` and `Tokens.prepare`."""
        return self.tokens.prepare(examples)

    def pieces(self, tokens: Sequence[int]) -> list[str]:
        """See `ReadsTokens.pieces`."""
        return self.tokens.pieces(tokens)

    def token_rows(self, rows: Sequence[Sequence[int]]) -> Inputs:
        """See `ReadsTokens.token_rows`."""
        return self.tokens.rows(rows)

    @property
    def filler(self) -> int:
        """See `ReadsTokens.filler`."""
        return self.tokens.filler

    @property
    def n_vocab(self) -> int:
        """See `TakesPrompts.n_vocab`."""
        return len(self.tokens.tokenizer)

    def begun(self, texts: list[str]) -> list[list[int]]:
        """See `TakesPrompts.begun`."""
        return self.tokens.begun(texts)

    def adapt(self, dataset: Dataset) -> Dataset:
        """Running text packed to rows of `context` tokens; other text as it is.

        Raises:
            ConfigError: the dataset holds no text.
        """
        self._refuse_other(dataset)
        if dataset.modality == "tokens" or getattr(dataset, "kind", None) != "corpus":
            return dataset
        return self._packed(dataset)

    def _refuse_other(self, dataset: Dataset) -> None:
        if dataset.modality not in ("text", "tokens"):
            raise ConfigError(
                f"model.weights={self.weights} reads text, but dataset={dataset.name} holds "
                f"{dataset.modality}: choose a dataset of text"
            )

    def _packed(self, dataset: Dataset) -> PackedText:
        tokens, folder = self.tokens, Path(self.outputs) / "data"
        return PackedText(dataset, tokens.encode, tokens.framing, tokens.hash(), folder)

    @cached_property
    def _fingerprint(self) -> str:
        facts = (self.tokens.hash(), self.context, self.prepend_bos, self.precision)
        return weights_hash(self.network, *facts)

    def fingerprint(self) -> str:
        """See `Model.fingerprint`."""
        return self._fingerprint

    def describe(self) -> dict[str, Any]:
        """See `Model.describe`."""
        config = self.loaded.config
        return {
            "type": "transformer_lens",
            "weights": self.weights,
            "revision": self.revision,
            "architecture": self.loaded.architecture,
            "head": "trained" if self.has_trained_head else "none",
            "n_layers": len(self.block_paths),
            "d_model": config.hidden_size,
            "n_heads": config.num_attention_heads,
            "vocab_size": config.vocab_size,
            "precision": self.precision,
            "processing": "none",
            "context": self.context,
            "prepend_bos": self.prepend_bos,
            "versions": {name: version(name) for name in ("transformers", "transformer_lens")},
        }


@MODELS.register("transformer_lens")
class TransformerLensHost(TextHost):
    """A pretrained transformer, from the hub, a folder or an installed package.

    Args:
        device: where it runs.
        meta: True for shapes only; nothing is read but the configuration.
        outputs: folder under which packed text is kept.
        dataset: what it will read, to refuse at once what is no text; None if that is not known.
        weights: hub name, local folder, or `package:NAME` for weights in an installed package.
        revision: branch, tag or commit on the hub.
        context: tokens of an example, special ones included.
        precision: of weights and activations.
        prepend_bos: whether every example begins with BOS; False for encoders, which have CLS.
    """

    def __init__(
        self,
        device: torch.device,
        meta: bool,
        outputs: Path,
        dataset: Dataset | None = None,
        *,
        weights: str,
        revision: str | None,
        context: Positive,
        precision: Precision,
        prepend_bos: bool,
    ) -> None:
        super().__init__()
        self.weights, self.revision, self.precision = weights, revision, precision
        if dataset is not None:
            self._refuse_other(dataset)
        loaded = load(weights, revision, DTYPES[precision], meta=meta)
        self._set_up(loaded, device, outputs, context, prepend_bos)
